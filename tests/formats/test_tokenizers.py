"""Files of tokenizers: the kind is detected from the content, damage is refused, the marks are those the files name."""

from __future__ import annotations

import base64
import itertools
import json
import os
import pickle
import shutil
import sys

import pytest

from conftest import ROOT
from minillama.formats.tokenizer_json import write_huggingface_tokenizer
from models import EDGES_OF_TEXT, word_level
from tokenizer import Tokenizer

KINDS = ("sentencepiece", "llama3", "gpt2", "huggingface")


@pytest.fixture(params=KINDS)
def tokenizer(request, tokenizers):
    return tokenizers(request.param)


def llama3_text(count=128_000):
    """The number of ranks that Llama 3 has, of one, two and three bytes."""
    tokens = itertools.chain.from_iterable(itertools.product(range(256), repeat=size) for size in (1, 2, 3))
    rows = (b"%s %d\n" % (base64.b64encode(bytes(t)), n) for n, t in enumerate(itertools.islice(tokens, count)))
    return b"".join(rows)


def gpt2_json(**changes):
    """GPT-2's first 257 tokens."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return (
        {letter: n for n, letter in enumerate(bytes_to_unicode().values())}
        | {"\u0120t": 256, "<|endoftext|>": 257}
        | changes
    )


def test_content_tells_the_kind_whatever_the_name(tokenizer, tmp_path):
    path = shutil.copy(tokenizer.path, tmp_path / "vocab.png")
    again = Tokenizer(tokenizer_model=path)
    assert (again.kind, again.n_words, again.path) == (tokenizer.kind, tokenizer.n_words, path)
    assert again.encode(EDGES_OF_TEXT[-1], bos=True, eos=True) == tokenizer.encode(
        EDGES_OF_TEXT[-1], bos=True, eos=True
    )


def test_either_file_of_gpt_2_and_their_folder_do(asset, tokenizers):
    encoder, merges = (asset(f"tokenizers/{name}") for name in ("gpt2_encoder.json", "gpt2_vocab.bpe"))
    for path in (merges, encoder.parent):
        other = Tokenizer(tokenizer_model=path)
        assert (other.kind, other.model.ranks) == ("gpt2", tokenizers("gpt2").model.ranks)
        assert other.path.is_file()


@pytest.mark.parametrize("names", [("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt")])
def test_two_files_of_gpt_2_have_to_agree(tmp_path, names):
    encoder, merges = (tmp_path / name for name in names)
    encoder.write_text(json.dumps(gpt2_json()), encoding="utf-8")
    merges.write_text("#version: 0.2\n\u0120 t\n", encoding="utf-8")
    for path in (encoder, merges, tmp_path):
        assert Tokenizer(tokenizer_model=path).encode(" t", bos=False, eos=True) == [256, 257]
    merges.write_text("#version: 0.2\n\u0120 t\nh e\n", encoding="utf-8")
    for path in (encoder, merges, tmp_path):
        with pytest.raises(ValueError, match=f"{names[0]} and .*{names[1]} belong to two tokenizers"):
            Tokenizer(tokenizer_model=path)


def test_a_folder_is_searched_for_a_proto_then_json(tokenizers, tmp_path):
    with pytest.raises(
        ValueError, match="folder without a tokenizer: no tokenizer.model, tokenizer.json, encoder.json"
    ):
        Tokenizer(tokenizer_model=tmp_path)
    shutil.copy(tokenizers("huggingface").path, tmp_path / "tokenizer.json")
    assert Tokenizer(tokenizer_model=tmp_path).kind == "huggingface"
    shutil.copy(ROOT / "data/mini-llama.model", tmp_path / "tokenizer.model")
    assert Tokenizer(tokenizer_model=tmp_path).kind == "sentencepiece"


def test_marks_are_as_the_file_beside_names_them(tmp_path):
    tokenizer = Tokenizer(tokenizer_model=word_level(tmp_path))
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.n_words) == (2, 3, 4)
    assert tokenizer.encode("b a b", bos=True, eos=True) == [2, 1, 0, 1, 3]  # neither cut nor padded
    assert tokenizer.decode([2, 1, 0, 3]) == "b a"
    with pytest.raises(ValueError, match="has no chat format"):
        tokenizer.encode_chat([{"role": "user", "content": "a"}])


def test_marks_are_else_known_by_name(tmp_path):
    path = word_level(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(ValueError, match="names no eos; put a tokenizer_config.json with"):
        Tokenizer(tokenizer_model=path)
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    tokens = [{"id": 4 + n, "content": name, **plain} for n, name in enumerate(("<pad>", "</s>", "<s>"))]
    tokenizer = Tokenizer(tokenizer_model=word_level(tmp_path, added_tokens=tokens))
    assert (tokenizer.bos_id, tokenizer.eos_id) == (2, 3)
    (tmp_path / "tokenizer_config.json").unlink()
    tokenizer = Tokenizer(tokenizer_model=path)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.n_words) == (6, 5, 7)


DAMAGED = {
    "nothing": b"",
    "random bytes": bytes(range(200, 256)),
    "pickle": pickle.dumps({"run": os.system}),
    "half a proto": lambda: (ROOT / "data/mini-llama.model").read_bytes()[:-5000],
    "proto of other bytes": lambda: (
        (ROOT / "data/mini-llama.model").read_bytes().replace(b"\x01e\x15", b"\x01\xff\x15")
    ),
    "half a JSON": json.dumps(gpt2_json()).encode()[:-1],
    "deep JSON": b'{"a":' * 100_000,
    "a long number": b'{"a": ' + b"9" * 5000 + b"}",
    "JSON of something else": b'{"label": {"positive": 1}}',
    "JSON that is not UTF-8": b'{"caf\xe9": 1}',
    "JSON without a model": b'{"model": {"type": "BPE"}}',
    "JSON with a bad regex": json.dumps(
        {"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}
        | {"normalizer": {"type": "Replace", "pattern": {"Regex": "("}, "content": ""}}
    ).encode(),
    "a token too few": json.dumps(gpt2_json(x=0)).encode(),
    "a truth for an id": json.dumps(gpt2_json(**{'"': True})).encode(),
    "no end of text": json.dumps({k: v for k, v in gpt2_json().items() if v < 257}).encode(),
    "a letter for no byte": json.dumps(gpt2_json(映=257) | {"<|endoftext|>": 258}).encode(),
    "a merge of three": "#version: 0.2\n\u0120 t h\n".encode(),
    "a merge of what is not there": b"#version: 0.2\nth e\n",
    "a merge given twice": b"#version: 0.2\nt h\nt h\n",
    "ranks cut short": lambda: llama3_text()[:-20_000],
    "ranks of another tokenizer": lambda: llama3_text(100_256),
    "wrong base64": lambda: llama3_text().replace(b"\nAgA= ", b"\nAgA*= "),
    "no number": lambda: llama3_text().replace(b" 300\n", b" 3O0\n"),
    "a rank twice": lambda: llama3_text().replace(b" 300\n", b" 301\n"),
    "a token twice": lambda: b"AgA= 127999\n" + llama3_text(127_999),
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED.keys())
def test_damage_is_told_in_one_line(tmp_path, capfd, content):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(content() if callable(content) else content)
    with pytest.raises(ValueError, match="is damaged|is not a|but neither|instead of") as raised:
        Tokenizer(tokenizer_model=path)
    message = str(raised.value)
    assert message.startswith(str(path)) and message.isprintable() and len(message) < len(str(path)) + 300
    assert capfd.readouterr().err == ""


def test_ranks_that_are_whole_are_read(tmp_path):
    (tmp_path / "ranks").write_bytes(llama3_text().replace(b"\n", b"\r\n"))
    tokenizer = Tokenizer(tokenizer_model=tmp_path / "ranks")
    assert tokenizer.encode("\x02\0", bos=True, eos=False) == [128000, 256 + 2 * 256]
    assert (tokenizer.pad_id, tokenizer.n_words) == (0, 128256)


def test_a_damaged_file_beside_is_named(tmp_path):
    path = word_level(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(ValueError, match="tokenizer_config.json holds .*must be a JSON object"):
        Tokenizer(tokenizer_model=path)


def test_a_file_that_is_far_too_large_is_not_read(tmp_path):
    with open(tmp_path / "model.safetensors", "wb") as file:
        file.truncate(1 << 33)
    with pytest.raises(ValueError, match="8,589,934,592 bytes, more than any tokenizer .*checkpoint"):
        Tokenizer(tokenizer_model=tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    ("kind", "package"), [("gpt2", "tiktoken"), ("llama3", "tiktoken"), ("huggingface", "tokenizers")]
)
def test_a_package_that_is_not_there_is_named(tokenizers, monkeypatch, kind, package):
    path = tokenizers(kind).path
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=f"another package: pip install {package}$"):
        Tokenizer(tokenizer_model=path)


def test_a_word_without_ids_is_refused(tmp_path):
    model = {"type": "WordLevel", "vocab": {"a": 0, "<go>": 1, "<halt>": 2}, "unk_token": "<unk>"}
    tokenizer = Tokenizer(tokenizer_model=word_level(tmp_path, model=model))
    with pytest.raises(ValueError, match="no ids for a text: .*unk|UNK"):
        tokenizer.encode("never seen", bos=False, eos=False)


# Marks before a text, and the size of a model


BEGIN = {"SpecialToken": {"id": "<go>", "type_id": 0}}
END = {"SpecialToken": {"id": "<halt>", "type_id": 0}}
TEXT, PAIR = {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}


def template(*single):
    marks = {name: {"id": name, "ids": [i], "tokens": [name]} for name, i in (("<go>", 2), ("<halt>", 3))}
    return {"type": "TemplateProcessing", "single": single, "pair": [TEXT, PAIR], "special_tokens": marks}


WHOLE = {"truncation": None, "padding": None, "added_tokens": []}
POST_PROCESSORS = {
    "none": None,
    "begin": template(BEGIN, TEXT),
    "end": template(TEXT, END),
    "both": template(BEGIN, TEXT, END),
    "bert": {"type": "BertProcessing", "sep": ["<halt>", 3], "cls": ["<go>", 2]},
    "sequence": {"type": "Sequence", "processors": [template(TEXT), template(BEGIN, TEXT)]},
}


@pytest.mark.parametrize("added", [{}, {"add_bos_token": True}, {"add_bos_token": False}])
@pytest.mark.parametrize("name", POST_PROCESSORS)
def test_bos_stands_before_a_text_where_transformers_puts_it(tmp_path, name, added):
    transformers = pytest.importorskip("transformers")
    path = word_level(tmp_path, post_processor=POST_PROCESSORS[name], **WHOLE)
    beside = tmp_path / "tokenizer_config.json"
    beside.write_text(json.dumps({"bos_token": "<go>", "eos_token": "<halt>"} | added))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)("b").input_ids
    ours = Tokenizer(tokenizer_model=path)
    assert ours.adds_bos == (theirs[0] == ours.bos_id)
    assert ours.encode_prompt("b") == [i for i in theirs if i != ours.eos_id]  # what is continued has no end
    assert ours.encode_prompt("") == [2]  # something to begin with


def test_one_mark_for_both_ends_tells_where_it_stands(tmp_path):
    for single, adds in (([BEGIN, TEXT], True), ([TEXT, BEGIN], False)):
        path = word_level(tmp_path, post_processor=template(*single), **WHOLE)
        (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<go>", "eos_token": "<go>"}')
        assert Tokenizer(tokenizer_model=path).adds_bos == adds


def test_a_sentencepiece_model_has_its_bos_as_the_files_beside_it_say(small_tokenizer, tmp_path):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(small_tokenizer.read_bytes())
    assert Tokenizer(tokenizer_model=path).adds_bos
    (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": false}')
    assert not Tokenizer(tokenizer_model=path).adds_bos
    write_huggingface_tokenizer(Tokenizer(tokenizer_model=small_tokenizer), tmp_path)
    assert Tokenizer(tokenizer_model=path).adds_bos
    (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": false}')
    assert Tokenizer(tokenizer_model=path).adds_bos  # with tokenizer.json there, it alone is asked
    renamed = (tmp_path / "tokenizer.json").read_text().replace('"<s>"', '"[BEGIN]"')
    (tmp_path / "tokenizer.json").write_text(renamed)  # another name for the same id
    assert Tokenizer(tokenizer_model=path).adds_bos
    content = json.loads((tmp_path / "tokenizer.json").read_text()) | {"post_processor": None}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    again = Tokenizer(tokenizer_model=path)
    assert not again.adds_bos
    write_huggingface_tokenizer(again, tmp_path / "out")
    assert not Tokenizer(tokenizer_model=tmp_path / "out" / "tokenizer.json").adds_bos
