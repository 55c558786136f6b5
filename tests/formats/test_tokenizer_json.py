"""Tokenizers written as tokenizer.json: transformers reads the same tokenizer back."""

from __future__ import annotations

import json
import random

import pytest

from conftest import ROOT
from minillama.formats.tokenizer_json import _fields, write_huggingface_tokenizer
from tokenizer import Tokenizer

SPACES = [
    "",
    *(" " * n for n in (1, 2, 3, 5, 17, 31, 60)),
    "  a",
    "a  ",
    " a   b ",
    *(f"a{' ' * n}b" for n in range(2, 40)),
]
EDGES = [
    "\n",
    "\n\n\n x\t\ty\r\n",
    "\0",
    "a\0b",
    "\x01\x7f\x85\u2028\ufeff\ufffd",
    "zwölf e\u0301 \ufb01 İ",
    "映画 кино",
]
EDGES += [
    "\U0001f600\U0001f468\u200d\U0001f469",
    "\u2581",
    "\u2581a\u2581 \u2581",
    "a \u2581 ",
    "1234567",
    "<0x0A>",
    "[INST]",
]


def texts(asset, count=1000):
    """Lines of reviews, stories and novels, the edges, and random ones of few letters, where many merges compete."""
    names = ("course/data/sst-dev.txt", "corpora/tinystories.txt", "corpora/prose/prose_03.txt")
    lines = [line for name in names for line in asset(name).read_text(encoding="utf-8")[:400_000].split("\n")[:count]]
    draw = random.Random(0)
    letters = "aabe tth.,\n  \u2581i’x19\U0001f642é-_"
    return [*SPACES, *EDGES, *("".join(draw.choices(letters, k=draw.randrange(40))) for _ in range(count)), *lines]


def exported(tokenizer, folder):
    """AutoTokenizer opens the tokenizer, with the configuration of a model beside it and without."""
    from transformers import AutoTokenizer

    write_huggingface_tokenizer(tokenizer, folder)
    return AutoTokenizer.from_pretrained(folder)


def assert_same(tokenizer, other, lines):
    """Both give equal ids for a text, with bos and without, and equal texts for these ids, random and special ones."""
    ids = [tokenizer.encode(line, bos=True, eos=False) for line in lines]
    assert other(lines)["input_ids"] == ids
    assert other(lines[-9:], add_special_tokens=False)["input_ids"] == [row[1:] for row in ids[-9:]]
    draw = random.Random(1)
    ids += [[draw.randrange(tokenizer.n_words) for _ in range(9)] for _ in range(300)]
    # SentencePiece's text for its unknown piece, and of bytes that are not UTF-8, is another than Hugging Face's.
    bytes_and_unknown = range(259) if tokenizer.kind == "sentencepiece" else ()
    ids[-300:] = [[i for i in row if i not in bytes_and_unknown] for row in ids[-300:]]
    ids.append([tokenizer.bos_id, *ids[-1], tokenizer.eos_id])
    decoded = [other.decode(row, skip_special_tokens=True) for row in ids]
    assert [tokenizer.decode(row) for row in ids] == decoded
    marks = (tokenizer.bos_id, tokenizer.eos_id, tokenizer.n_words)
    assert (other.bos_token_id, other.eos_token_id, len(other)) == marks


@pytest.mark.parametrize("name", ["mini-llama.model", "stories260K/tok512.model"])
def test_a_small_proto_comes_out_the_same(asset, tmp_path, name):
    tokenizer = Tokenizer(tokenizer_model=asset(name))
    assert_same(tokenizer, exported(tokenizer, tmp_path), texts(asset))
    assert (tmp_path / "tokenizer.model").read_bytes() == tokenizer.path.read_bytes()
    again = Tokenizer(tokenizer_model=tmp_path / "tokenizer.json")
    assert again.encode(" a  b", bos=True, eos=True) == tokenizer.encode(" a  b", bos=True, eos=True)
    assert (again.pad_id, again.stop_ids) == (tokenizer.pad_id, tokenizer.stop_ids)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["course/tokenizer.model", "tokenizers/llama3_tokenizer.model", "tokenizers/gpt2_encoder.json"]
)
def test_a_published_tokenizer_comes_out_the_same(asset, tmp_path, name):
    tokenizer = Tokenizer(tokenizer_model=asset(name))
    lines = [line for line in texts(asset) if "<|endoftext|>" not in line]  # GPT-2's own, between stories
    assert_same(tokenizer, exported(tokenizer, tmp_path), lines)
    again = Tokenizer(tokenizer_model=tmp_path / "tokenizer.json")
    line = "<s><|eot_id|><|endoftext|> zw\u00f6lf  "  # which is text to both
    assert again.encode(line, bos=True, eos=True) == tokenizer.encode(line, bos=True, eos=True)
    assert again.stop_ids == tokenizer.stop_ids
    assert again.special_ids == tokenizer.special_ids


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_the_configuration_of_a_model_beside_it_changes_nothing(tmp_path, model_type):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}), encoding="utf-8")
    tokenizer = Tokenizer(tokenizer_model=ROOT / "data/mini-llama.model")
    assert_same(tokenizer, exported(tokenizer, tmp_path), [*SPACES, *EDGES])


def trained(folder, **options):
    """A SentencePiece model of a few lines; some read like a piece for a byte."""
    import sentencepiece

    lines = [f"the {a} cat saw  the {b} dog" for a in ("big", "small", "red") for b in ("old", "young", "happy")] + [
        "<0x0A> <0x0A>"
    ]
    settings = {"model_type": "bpe", "vocab_size": 300, "byte_fallback": True, "normalization_rule_name": "identity"}
    path = folder / "small.model"
    with open(path, "wb") as file:
        settings |= {"model_writer": file, "minloglevel": 2} | options
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(9 * lines), **settings)
    return Tokenizer(tokenizer_model=path)


@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("strip", [True, False])
def test_spaces_are_kept_added_and_removed_as_the_proto_says(tmp_path, prefix, strip):
    tokenizer = trained(tmp_path, add_dummy_prefix=prefix, remove_extra_whitespaces=strip)
    lines = [*SPACES, *EDGES, "the cat  saw\n the   dog ", " \u2581 \u2581", "the\u2581 "]
    assert_same(tokenizer, exported(tokenizer, tmp_path / "out"), lines)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"model_type": "unigram", "hard_vocab_limit": False}, "it is not a BPE model"),
        ({"byte_fallback": False, "vocab_size": 40}, "it has no pieces for bytes"),
        ({"normalization_rule_name": "nmt_nfkc"}, "it normalizes characters"),
        ({"treat_whitespace_as_suffix": True}, "it puts spaces after words"),
        ({"user_defined_symbols": "<turn>"}, "it has user-defined pieces"),
    ],
)
def test_what_cannot_be_said_is_refused_with_the_reason(tmp_path, options, reason):
    tokenizer = trained(tmp_path, **options)
    with pytest.raises(
        ValueError, match=f"small.model cannot be written for other programs: {reason}, which their files"
    ):
        write_huggingface_tokenizer(tokenizer, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_character_without_a_piece_is_refused(tmp_path):
    tokenizer = trained(tmp_path)
    path = tmp_path / "small.model"
    path.write_bytes(
        path.read_bytes().replace(b"\x0a\x01g\x15", b"\x0a\x01Q\x15")
    )  # the piece g, not those that hold it
    with pytest.raises(ValueError, match="it has no piece for 'g', but longer pieces with it"):
        write_huggingface_tokenizer(Tokenizer(tokenizer_model=tokenizer.path), tmp_path / "out")


def test_a_tokenizer_json_is_copied_with_what_stands_beside_it(tmp_path):
    write_huggingface_tokenizer(Tokenizer(tokenizer_model=ROOT / "data/mini-llama.model"), tmp_path / "one")
    (tmp_path / "one/special_tokens_map.json").write_text("{}")
    opened = Tokenizer(tokenizer_model=tmp_path / "one/tokenizer.json")
    for _ in range(2):  # the second time over what is there
        write_huggingface_tokenizer(opened, tmp_path / "two")
    names = {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"}
    assert {path.name for path in (tmp_path / "two").iterdir()} == names
    for name in names:
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()
    (tmp_path / "one/tokenizer_config.json").unlink()
    write_huggingface_tokenizer(opened, tmp_path / "three")
    config = json.loads((tmp_path / "three/tokenizer_config.json").read_text(encoding="utf-8"))
    assert (config["bos_token"], config["eos_token"]) == ("<s>", "</s>")


def test_a_proto_is_read_as_sentencepiece_reads_it():
    tokenizer = Tokenizer(tokenizer_model=ROOT / "data/mini-llama.model")
    pieces = [dict(_fields(value))[1].decode() for number, value in _fields(tokenizer.path.read_bytes()) if number == 1]
    assert pieces == [tokenizer.sp_model.id_to_piece(i) for i in range(tokenizer.n_words)]


def test_a_failure_leaves_what_was_there(tmp_path, monkeypatch):
    from minillama.formats import tokenizer_json as tokenizer_files

    tokenizer = Tokenizer(tokenizer_model=ROOT / "data/mini-llama.model")
    write_huggingface_tokenizer(tokenizer, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr(tokenizer_files, "_bpe", lambda *_, **__: {"type": object()})
    with pytest.raises(TypeError, match="not JSON serializable"):
        write_huggingface_tokenizer(tokenizer, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
