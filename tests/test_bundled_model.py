"""The model that ships is a Llama to other programs: transformers, GGUF's reader, and llama2.c's int8 file."""

from __future__ import annotations

import pytest
import torch

from conftest import ROOT
from llama import load_pretrained
from minillama.formats.checkpoint import read_checkpoint
from minillama.inference import complete
from run_llama import main
from tokenizer import Tokenizer

MODEL, TOKENIZER = ROOT / "data" / "mini-llama.safetensors", ROOT / "data" / "mini-llama.model"
PROMPTS = ("Once upon a time", "this film is", "Tom gave Anna a red ball. She was very")


def convert(kind, path):
    arguments = ["--to", kind, "--model_out", str(path), "--pretrained-model-path", str(MODEL)]
    return main(["--option", "convert", *arguments])


@pytest.fixture(scope="module")
def model():
    return load_pretrained(MODEL)


def test_it_is_small():
    assert MODEL.stat().st_size + TOKENIZER.stat().st_size < 12_000_000


def test_it_opens_in_transformers_with_equal_logits_tokens_and_greedy_text(tmp_path, model):
    transformers = pytest.importorskip("transformers")
    assert convert("huggingface", tmp_path / "out") == 0
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    their_tokenizer, tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out"), Tokenizer(TOKENIZER)
    for text in (*PROMPTS, "zwölf 映画 \U0001f600", "It's n't (1 , 000) - \"no\""):
        ids = tokenizer.encode(text, bos=True, eos=False)
        assert their_tokenizer(text).input_ids == ids
        tokens = torch.tensor([ids])
        with torch.no_grad():
            torch.testing.assert_close(theirs(tokens).logits, model(tokens, targets=tokens)[0], rtol=1e-4, atol=1e-4)
    for prompt in PROMPTS:
        ids = their_tokenizer(prompt, return_tensors="pt").input_ids
        found = theirs.generate(input_ids=ids, max_new_tokens=40, do_sample=False, eos_token_id=[2, 1])[0]
        ours = complete(model, tokenizer, [prompt], max_new_tokens=40, temperature=0.0)[0]
        assert their_tokenizer.decode(found, skip_special_tokens=True) == prompt + ours


def test_its_gguf_file_has_its_weights(tmp_path, model):
    gguf = pytest.importorskip("gguf")
    assert convert("gguf", tmp_path / "out.gguf") == 0
    reader = gguf.GGUFReader(tmp_path / "out.gguf")
    found = {tensor.name: tensor for tensor in reader.tensors}
    stored = found["blk.0.ffn_gate.weight"]
    numbers = torch.frombuffer(bytearray(stored.data.tobytes()), dtype=torch.bfloat16)
    weight = model.layers[0].feed_forward.w1.weight
    assert torch.equal(numbers.view(weight.shape).float(), weight)
    assert reader.get_field("llama.context_length").contents() == model.config.max_seq_len
    assert len(found) == 2 + 9 * model.config.n_layers  # tied: the embedding and the last norm, and nine a layer


def test_its_int8_file_of_llama2c_is_near(tmp_path, model):
    assert convert("llama2c-v2", tmp_path / "out.bin") == 0
    state = read_checkpoint(tmp_path / "out.bin").state
    assert model.state_dict().keys() - state.keys() == {"output.weight"}  # which is the embedding
    for name in state:
        weight = model.state_dict()[name]
        assert (state[name].float() - weight).abs().max() <= weight.abs().max() / 127, name
