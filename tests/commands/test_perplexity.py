"""--option perplexity, against a loop over the tokens and against transformers."""

from __future__ import annotations

import json
import math
import re

import pytest

from llama import load_pretrained
from minillama.formats.huggingface import write_huggingface
from minillama.formats.tokenizer_json import write_huggingface_tokenizer
from models import tiny_llama
from programs import MARK, STORIES
from reference import brute_force
from run_llama import main
from tokenizer import Tokenizer


@pytest.fixture
def command(pretrain_command):
    return pretrain_command


def figures(out):
    pattern = (
        r"(\S+): ([\d,]+) documents, ([\d,]+) bytes, ([\d,]+) tokens: perplexity ([\d.]+), bits per token ([\d.]+), "
    )
    found = re.findall(pattern + r"bits per byte ([\d.]+)\n", out)
    return [(path, *(float(number.replace(",", "")) for number in numbers)) for path, *numbers in found]


@pytest.mark.parametrize("more, window, stride", [([], 32, 16), (["--window", "9", "--stride", "4"], 9, 4)])
def test_perplexity_is_that_of_a_loop_over_the_tokens(command, more, window, stride):
    assert command.pretrain()[0] == 0
    (command.folder / "other.txt").write_text("zw\u00f6lf dogs\n\n" + MARK.join(["x", STORIES[0]]), encoding="utf-8")
    arguments = ["--option", "perplexity", "--pretrained-model-path", "out.safetensors", *more]
    code, out, err = command(*arguments, "--corpus", "other.txt", "stories.txt", "--held_out", "2")
    assert code == 0 and out.count("\n") == 2, err
    model, tokenizer = load_pretrained("out.safetensors"), Tokenizer(tokenizer_model="out.model")
    texts = {"other.txt": ["zw\u00f6lf dogs\n\nx", STORIES[0]], "stories.txt": STORIES[-2:]}
    for (path, documents), found in zip(texts.items(), figures(out), strict=True):
        ids = [tokenizer.encode(document, bos=True, eos=False) for document in documents]
        nats, tokens = brute_force(model, ids, window, stride)
        size = sum(len(document.encode()) for document in documents)
        assert found[:4] == (path, len(documents), size, tokens)
        assert found[4] == pytest.approx(math.exp(nats / tokens), abs=2e-3)
        assert found[5] == pytest.approx(nats / tokens / math.log(2), abs=1e-4)
        assert found[6] == pytest.approx(nats / size / math.log(2), abs=1e-4)


def test_perplexity_of_all_documents_unless_some_were_held_out(command):
    assert command.pretrain()[0] == 0
    arguments = ["--option", "perplexity", "--pretrained-model-path", "out.safetensors", "--corpus", "stories.txt"]
    for more, count in (([], 40), (["--held_out", "4"], 4), (["--held_out", "0.1"], 4), (["--held_out", "40"], 40)):
        assert figures(command(*arguments, *more)[1])[0][1] == count


def test_perplexity_without_bos_counts_what_is_scored_as_transformers_does(tmp_path, small_tokenizer, capsys):
    transformers = pytest.importorskip("transformers")
    model = tiny_llama(vocab_size=320, norm="rmsnorm", causal=True, max_seq_len=64)
    (tmp_path / "m").mkdir()
    write_huggingface(tmp_path / "m", model.config, model.state_dict(), 1, 2)
    write_huggingface_tokenizer(Tokenizer(tokenizer_model=small_tokenizer), tmp_path / "m")
    path = tmp_path / "m" / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"post_processor": None}))
    documents = ["the boy ran home", "a", "She saw a dog."]
    (tmp_path / "t.txt").write_text("\n<|endoftext|>\n".join(documents))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    encode = transformers.AutoTokenizer.from_pretrained(tmp_path / "m")
    nats, tokens, size = 0.0, 0, 0
    for document in documents:
        ids = encode(document, return_tensors="pt").input_ids
        assert ids[0, 0] != 1
        if (count := ids.shape[1] - 1) > 0:
            nats, tokens = nats + count * float(theirs(ids, labels=ids).loss), tokens + count
        size += len(document.encode()) - len(encode.decode(ids[0, :1]).encode())
    arguments = ["--option", "perplexity", "--corpus", str(tmp_path / "t.txt")]
    for name in ("tokenizer.model", "tokenizer.json"):  # each by itself is without bos, by what lies beside it
        typed = ["--pretrained-model-path", str(tmp_path / "m"), "--tokenizer", str(tmp_path / "m" / name)]
        assert main([*arguments, *typed]) == 0
        out = capsys.readouterr().out
        assert f"{size:,} bytes, {tokens:,} tokens: " in out
        found = [float(number) for number in re.findall(r"(?:perplexity|per byte) ([\d.]+)", out)]
        assert found == pytest.approx([math.exp(nats / tokens), nats / size / math.log(2)], rel=1e-4)
