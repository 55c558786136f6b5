"""--option convert: the file opens elsewhere with the same logits, tokens and text, or the conversion is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from config import RopeScaling
from conftest import ROOT, find_asset
from llama import load_pretrained
from minillama.formats.checkpoint import read_checkpoint, write_checkpoint, write_safetensors
from minillama.formats.huggingface import write_huggingface
from minillama.formats.keys import renamed
from models import tiny_llama
from rope import rotary_table
from run_llama import main

BUNDLED_TOKENIZER = ROOT / "data" / "mini-llama.model"
TEXTS = ("Once upon a time", " two  spaces ", "zwölf 映画 \U0001f600", "", "a\nb\tc")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model with the vocabulary of the bundled tokenizer, of the kind that other programs have, in bfloat16."""
    folder = tmp_path_factory.mktemp("models")
    model = tiny_llama(vocab_size=4096, norm="rmsnorm", causal=True)
    write_safetensors(folder / "model.safetensors", model.state_dict(), model.config, torch.bfloat16)
    (folder / "model.model").write_bytes(BUNDLED_TOKENIZER.read_bytes())
    return folder


def convert(folder: Path, to: str, out: Path, *more: str) -> int:
    path = ["--pretrained-model-path", str(folder / "model.safetensors")]
    return main(["--option", "convert", "--to", to, *path, "--model_out", str(out), *more])


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("to", ["safetensors", "huggingface", "llama2c-v0", "llama2c-v1"])
def test_there_and_back_gives_the_same_weights(folder, tmp_path, to):
    assert convert(folder, to, tmp_path / "out") == 0
    there = read_checkpoint(tmp_path / "out")
    original = read_checkpoint(folder / "model.safetensors")
    state = original.complete_state(original.config)
    if to.startswith("llama2c"):
        state = {name: tensor.float() for name, tensor in state.items()}
    assert same(there.complete_state(there.config), state)
    beside = sorted(path.name for path in tmp_path.iterdir())
    assert beside == (["out", "out.model"] if to == "safetensors" else ["out"])


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_out_dtype_is_what_is_written(folder, tmp_path, dtype):
    assert convert(folder, "huggingface", tmp_path / "out", "--out_dtype", dtype) == 0
    wanted = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
    assert {tensor.dtype for tensor in read_checkpoint(tmp_path / "out").state.values()} == {wanted}


def test_transformers_has_the_same_tokens_and_text(folder, tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    assert convert(folder, "huggingface", tmp_path / "out") == 0
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    from tokenizer import Tokenizer

    ours = Tokenizer(tokenizer_model=BUNDLED_TOKENIZER)
    for text in TEXTS:
        assert tokenizer(text)["input_ids"] == ours.encode(text, bos=True, eos=False)
    ids = torch.tensor([ours.encode(TEXTS[0], bos=True, eos=False)])
    settings = {"max_new_tokens": 12, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    theirs = tokenizer.decode(model.generate(ids, **settings)[0], skip_special_tokens=True)
    capsys.readouterr()
    arguments = ["--temperature", "0", "--max_new_tokens", "12", "--prompt", TEXTS[0]]
    assert main([*arguments, "--pretrained-model-path", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out == theirs + "\n"


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": False, "rope_scaling": RopeScaling(8.0, 1.0, 4.0, 16)}])
def test_gguf_holds_every_tensor_and_the_vocabulary(tmp_path, dtype, changes):
    gguf = pytest.importorskip("gguf")
    model = tiny_llama(vocab_size=4096, norm="rmsnorm", causal=True, **changes)
    write_safetensors(tmp_path / "model.safetensors", model.state_dict(), model.config)
    (tmp_path / "model.model").write_bytes(BUNDLED_TOKENIZER.read_bytes())
    assert convert(tmp_path, "gguf", tmp_path / "out.gguf", "--out_dtype", dtype) == 0
    reader = gguf.GGUFReader(tmp_path / "out.gguf")
    found = {tensor.name: tensor for tensor in reader.tensors}
    state = model.state_dict()
    if not changes:
        state.pop("output.weight")
    names = renamed(state, "ours", "gguf")
    factors = found.pop("rope_freqs.weight", None)
    assert found.keys() == set(names.values())
    for name, tensor in state.items():
        stored = found[names[name]]
        kind = "F32" if tensor.dim() == 1 else {"fp32": "F32", "fp16": "F16", "bf16": "BF16"}[dtype]
        assert stored.tensor_type.name == kind and tuple(reversed(stored.shape.tolist())) == tuple(tensor.shape)
        wide = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[kind]
        if dtype != "fp32" and tensor.dim() == 1:
            tensor = tensor.to({"fp16": torch.float16, "bf16": torch.bfloat16}[dtype])
        numbers = torch.frombuffer(bytearray(stored.data.tobytes()), dtype=wide).view(tensor.shape)
        assert torch.equal(numbers, tensor.to(wide)), name
    field = lambda name: reader.get_field(name).contents()  # noqa: E731
    assert (field("llama.context_length"), field("llama.attention.head_count_kv")) == (32, 2)
    assert field("llama.rope.dimension_count") == 8 and field("tokenizer.ggml.model") == "llama"
    from sentencepiece import SentencePieceProcessor

    pieces = SentencePieceProcessor(model_file=str(BUNDLED_TOKENIZER))
    assert field("tokenizer.ggml.tokens") == [pieces.id_to_piece(i) for i in range(4096)]
    assert field("tokenizer.ggml.token_type")[:5] == [2, 3, 3, 6, 6]
    assert field("tokenizer.ggml.bos_token_id") == 1 and field("tokenizer.ggml.add_bos_token")
    if changes:  # llama.cpp divides each frequency by its factor
        plain, stretched = (
            rotary_table(8, 2, 10000.0, torch.device("cpu"), s)[1] for s in (None, changes["rope_scaling"])
        )
        np.testing.assert_allclose(plain.angle().numpy() / factors.data, stretched.angle().numpy(), rtol=1e-5)
    else:
        assert factors is None


def test_transformers_reads_the_gguf_file_with_equal_logits(tmp_path):
    """Which takes it for llama.cpp's layout, and reorders query and key on its way."""
    pytest.importorskip("gguf")
    transformers = pytest.importorskip("transformers")
    model = tiny_llama(vocab_size=4096, norm="rmsnorm", causal=True)
    write_safetensors(tmp_path / "model.safetensors", model.state_dict(), model.config)
    (tmp_path / "model.model").write_bytes(BUNDLED_TOKENIZER.read_bytes())
    assert convert(tmp_path, "gguf", tmp_path / "out.gguf") == 0
    with pytest.raises(ValueError, match="is GGUF, which this program only writes"):
        read_checkpoint(tmp_path / "out.gguf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="out.gguf", dtype=torch.float32)
    ids = torch.randint(4096, (2, 30))
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, model(ids, targets=ids)[0], rtol=1e-5, atol=1e-5)


def test_ids_without_a_piece_are_unused_tokens_in_gguf(tmp_path):
    gguf = pytest.importorskip("gguf")
    folder = tmp_path / "tiny-v1.5"
    folder.mkdir()
    model = tiny_llama(vocab_size=4160, norm="rmsnorm", causal=True)
    write_huggingface(folder, model.config, model.state_dict(), 1, 2)
    (folder / "tokenizer.model").write_bytes(BUNDLED_TOKENIZER.read_bytes())
    path = ["--pretrained-model-path", str(folder), "--model_out", str(tmp_path / "out.gguf")]
    assert main(["--option", "convert", "--to", "gguf", *path]) == 0
    reader = gguf.GGUFReader(tmp_path / "out.gguf")
    fields = {
        name: reader.get_field(f"tokenizer.ggml.{name}").contents() for name in ("tokens", "token_type", "scores")
    }
    assert {len(values) for values in fields.values()} == {4160} and len(set(fields["tokens"])) == 4160
    assert fields["token_type"][4096:] == [gguf.TokenType.UNUSED] * 64
    assert reader.get_field("general.name").contents() == "tiny-v1.5"


@pytest.mark.parametrize("eos", [[2, 77, 5], 2])
def test_the_ids_at_which_a_text_ends_go_to_every_format_and_back(tmp_path, eos):
    folder = tmp_path / "model"
    folder.mkdir()
    model = tiny_llama(vocab_size=4096, norm="rmsnorm", causal=True)
    write_huggingface(folder, model.config, model.state_dict(), 1, eos)
    (folder / "tokenizer.model").write_bytes(BUNDLED_TOKENIZER.read_bytes())
    ours = str(tmp_path / "ours.safetensors")
    for to, source, out in (("safetensors", str(folder), ours), ("huggingface", ours, str(tmp_path / "again"))):
        arguments = ["--option", "convert", "--to", to, "--pretrained-model-path", source, "--model_out", out]
        assert main(arguments) == 0
    assert read_checkpoint(ours).stop_ids == tuple([eos] if eos == 2 else eos)
    assert json.loads((tmp_path / "again" / "config.json").read_text())["eos_token_id"] == eos


@pytest.mark.slow
def test_gguf_takes_the_merges_of_llama_3(tmp_path):
    gguf = pytest.importorskip("gguf")
    pytest.importorskip("tiktoken")
    model = tiny_llama(vocab_size=128256, dim=8, n_heads=2, n_kv_heads=1, norm="rmsnorm", causal=True)
    write_safetensors(tmp_path / "model.safetensors", model.state_dict(), model.config)
    tokenizer = ["--tokenizer", str(find_asset("tokenizers/llama3_tokenizer.model"))]
    assert convert(tmp_path, "gguf", tmp_path / "out.gguf", *tokenizer) == 0
    reader = gguf.GGUFReader(tmp_path / "out.gguf")
    field = lambda name: reader.get_field(name).contents()  # noqa: E731
    tokens, merges = field("tokenizer.ggml.tokens"), field("tokenizer.ggml.merges")
    assert len(tokens) == 128256 and tokens[128000] == "<|begin_of_text|>" and tokens[264] == "Ġa"
    assert merges[0] == "Ġ Ġ" and field("tokenizer.ggml.pre") == "llama-bpe"
    assert field("tokenizer.ggml.eos_token_id") == 128001


def test_an_adapter_is_merged_or_written_by_itself(folder, tmp_path, capsys):
    from lora import apply_lora, lora_layers, lora_state_dict, merge_lora_weights
    from minillama.formats.adapters import Adapter, write_peft

    model = load_pretrained(folder / "model.safetensors")
    torch.manual_seed(0)
    apply_lora(model, 3, 6.0)
    with torch.no_grad():
        for _, layer in lora_layers(model):
            layer.lora_B.normal_(std=0.5)
    (tmp_path / "adapter").mkdir()
    write_peft(tmp_path / "adapter", Adapter(lora_state_dict(model), 3, 6.0, {}), model.config, "base")
    adapter = ["--adapter", str(tmp_path / "adapter")]
    assert convert(folder, "safetensors", tmp_path / "merged.safetensors", *adapter, "--out_dtype", "fp32") == 0
    ids = torch.randint(4096, (2, 9))
    merged, expected = load_pretrained(tmp_path / "merged.safetensors")(ids)[0], merge_lora_weights(model)(ids)[0]
    assert (merged - load_pretrained(folder / "model.safetensors")(ids)[0]).abs().max() > 0.1
    torch.testing.assert_close(merged, expected, rtol=0.02, atol=0.05)  # merged into bfloat16 weights
    assert convert(folder, "peft", tmp_path / "again", *adapter) == 0
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        old, new = ((tmp_path / at / name).read_bytes() for at in ("adapter", "again"))
        assert old == new or name.endswith("json")
    assert convert(folder, "adapter", tmp_path / "ours.pt", *adapter) == 0
    alone = ["--adapter", str(tmp_path / "ours.pt")]
    assert convert(folder, "safetensors", tmp_path / "too.safetensors", *alone, "--out_dtype", "fp32") == 0
    assert (tmp_path / "too.safetensors").read_bytes() == (tmp_path / "merged.safetensors").read_bytes()
    assert convert(folder, "peft", tmp_path / "without") == 2
    assert "--to peft writes an adapter; name it with --adapter" in capsys.readouterr().err


def test_what_a_format_cannot_hold_is_refused_and_nothing_written(tmp_path, capsys):
    model = tiny_llama(vocab_size=4096, causal=True)
    write_safetensors(tmp_path / "model.safetensors", model.state_dict(), model.config)
    (tmp_path / "model.model").write_bytes(BUNDLED_TOKENIZER.read_bytes())
    before = sorted(tmp_path.iterdir())
    for to in ("huggingface", "gguf", "llama2c-v0", "llama2c-v1", "llama2c-v2"):
        assert convert(tmp_path, to, tmp_path / "out") == 2
        lines = capsys.readouterr().err.splitlines()
        assert "supports only RMSNorm, and this model has LayerNorm" in lines[-1] and "Traceback" not in "".join(lines)
        assert sorted(tmp_path.iterdir()) == before


def test_outputs_that_are_there_or_inputs_are_refused(folder, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    assert convert(folder, "huggingface", tmp_path / "link") == 2
    assert "link already exists" in capsys.readouterr().err
    assert convert(folder, "safetensors", tmp_path / "mine.model") == 2
    assert "mine.model is its tokenizer's name" in capsys.readouterr().err
    assert convert(folder, "huggingface", tmp_path / "hf") == 0
    path = ["--pretrained-model-path", str(tmp_path / "hf"), "--model_out", str(tmp_path / "hf" / "model.safetensors")]
    assert main(["--option", "convert", *path]) == 2
    assert "is inside" in capsys.readouterr().err
    assert convert(folder, "huggingface", tmp_path / "full") == 2
    assert "full already exists; give the name of a new folder" in capsys.readouterr().err
    assert convert(folder, "huggingface", tmp_path / "none" / "deeper") == 2
    assert "there is no folder" in capsys.readouterr().err
    assert convert(folder, "llama2c-v1", folder / "model.safetensors") == 2
    assert "is both input and output" in capsys.readouterr().err
    assert (tmp_path / "full" / "a").read_text() == "mine"


def test_a_missing_package_is_named(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert convert(folder, "gguf", tmp_path / "out") == 2
    assert "--to gguf needs the gguf package: pip install gguf" in capsys.readouterr().err


@pytest.mark.parametrize("broken", [{}, {"GGUFWriter": lambda *_: 1 / 0}])
def test_a_package_that_is_broken_at_its_first_use_ends_in_one_line(folder, tmp_path, monkeypatch, capsys, broken):
    monkeypatch.setitem(sys.modules, "gguf", SimpleNamespace(**broken))
    assert convert(folder, "gguf", tmp_path / "out") == 2
    err = capsys.readouterr().err
    assert "Traceback" not in err and list(tmp_path.iterdir()) == []
    assert "gguf is broken here (" in err and err.endswith("): pip install --force-reinstall gguf\n")


def test_ours_keeps_its_norm_and_takes_what_the_command_says_of_attention(tmp_path):
    model = tiny_llama(vocab_size=4096)
    write_checkpoint(tmp_path / "model.safetensors", model.state_dict(), model.config)
    (tmp_path / "model.model").write_bytes(BUNDLED_TOKENIZER.read_bytes())
    assert convert(tmp_path, "safetensors", tmp_path / "out.safetensors", "--attention", "causal") == 0
    config = read_checkpoint(tmp_path / "out.safetensors").config
    assert config.causal and config.norm == "layernorm"


def test_numbers_beyond_half_precision_are_refused(tmp_path, capsys):
    model = tiny_llama(vocab_size=4096, norm="rmsnorm", causal=True)
    with torch.no_grad():
        model.norm.weight[3] = 1e6
    write_safetensors(tmp_path / "model.safetensors", model.state_dict(), model.config)
    (tmp_path / "model.model").write_bytes(BUNDLED_TOKENIZER.read_bytes())
    assert convert(tmp_path, "safetensors", tmp_path / "out.safetensors", "--out_dtype", "fp16") == 2
    assert "norm.weight has values too large for fp16; give another --out_dtype" in capsys.readouterr().err
    assert not (tmp_path / "out.safetensors").exists()


def test_a_link_to_a_gguf_file_goes_on_pointing(folder, tmp_path):
    pytest.importorskip("gguf")
    (tmp_path / "link.gguf").symlink_to(tmp_path / "real.gguf")
    assert convert(folder, "gguf", tmp_path / "link.gguf") == 0
    assert (tmp_path / "link.gguf").is_symlink() and (tmp_path / "real.gguf").read_bytes()[:4] == b"GGUF"


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_average_is_the_mean_of_the_weights_in_the_first_ones_precision(dtype, tied, tmp_path):
    paths, states = [], []
    for number in range(3):
        torch.manual_seed(number)
        model = tiny_llama(vocab_size=4096, norm="rmsnorm", causal=True, tie_embeddings=tied)
        for weight in model.parameters():
            torch.nn.init.normal_(weight)
        paths.append(str(tmp_path / f"{number}.safetensors"))
        write_safetensors(paths[-1], model.state_dict(), model.config, torch.float32 if number else dtype)
        states.append(
            {name: tensor.to(torch.float32 if number else dtype) for name, tensor in model.state_dict().items()}
        )
    (tmp_path / "0.model").write_bytes(BUNDLED_TOKENIZER.read_bytes())
    path = [
        "--pretrained-model-path",
        paths[0],
        "--average",
        *paths[1:],
        "--model_out",
        str(tmp_path / "mean.safetensors"),
    ]
    assert main(["--option", "convert", *path]) == 0
    made = read_checkpoint(tmp_path / "mean.safetensors")
    for name, tensor in made.complete_state(made.config).items():
        wanted = sum(state[name].double() for state in states) / 3
        assert tensor.dtype == dtype
        torch.testing.assert_close(tensor.double(), wanted, rtol=2**-8 if dtype == torch.bfloat16 else 1e-6, atol=1e-6)


def test_the_same_model_in_another_format_can_be_averaged_with_it(folder, tmp_path):
    for to in ("huggingface", "llama2c-v1"):
        assert convert(folder, to, tmp_path / to) == 0
        assert convert(folder, "safetensors", tmp_path / f"{to}.mean", "--average", str(tmp_path / to)) == 0
        first, mean = (read_checkpoint(path) for path in (folder / "model.safetensors", tmp_path / f"{to}.mean"))
        assert same(mean.complete_state(mean.config), first.complete_state(first.config))


def test_models_that_differ_or_an_adapter_cannot_be_averaged(folder, tmp_path, capsys):
    other = tiny_llama(vocab_size=4096, norm="rmsnorm", causal=False)
    write_safetensors(tmp_path / "other.safetensors", other.state_dict(), other.config)
    for more, told in (
        (["--average", str(tmp_path / "other.safetensors")], "its causal is False, that of "),
        (["--average", str(tmp_path / "none.safetensors")], "none.safetensors"),
        (["--average", str(tmp_path / "out.safetensors")], "out.safetensors"),
        (["--average", "a.safetensors", "--adapter", "b.pt"], "--average and --adapter cannot be combined"),
    ):
        assert convert(folder, "safetensors", tmp_path / "out.safetensors", *more) == 2
        assert told in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out.safetensors").exists()
