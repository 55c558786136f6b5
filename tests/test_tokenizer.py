"""tokenizer.py: every kind has the published ids and gives text back."""

from __future__ import annotations

import pytest

from models import EDGES_OF_TEXT, word_level
from tokenizer import Tokenizer

KINDS = ("sentencepiece", "llama3", "gpt2", "huggingface")


@pytest.fixture(params=KINDS)
def tokenizer(request, tokenizers):
    return tokenizers(request.param)


@pytest.fixture(scope="module")
def lines(asset):
    """Three thousand lines of reviews, stories and novels."""
    names = ("course/data/sst-dev.txt", "corpora/tinystories.txt", "corpora/prose/prose_03.txt")
    texts = [asset(name).read_text(encoding="utf-8")[:400_000].split("\n") for name in names]
    return [line for text in texts for line in text[:1000]]


# Ids


def test_llama_2_has_its_published_ids(tokenizers):
    tokenizer = tokenizers("sentencepiece")
    assert tokenizer.encode("Hello World!", bos=False, eos=False) == [15043, 2787, 29991]
    assert (tokenizer.kind, tokenizer.n_words, tokenizer.stop_ids) == ("sentencepiece", 32000, (2, 1))
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, 3)


def test_llama_3_has_its_published_ids(tokenizers):
    tokenizer = tokenizers("llama3")
    text = "the answer to the ultimate question of life, the universe, and everything is "
    ids = [128000, 1820, 4320, 311, 279, 17139, 3488, 315, 2324, 11, 279, 15861, 11, 323, 4395, 374, 220]
    assert tokenizer.encode(text, bos=True, eos=False) == ids
    assert (tokenizer.kind, tokenizer.n_words, tokenizer.stop_ids) == ("llama3", 128256, (128001, 128009, 128000))
    assert (tokenizer.bos_id, tokenizer.eos_id) == (128000, 128001)
    special = [
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eot_id|>",
        "<|python_tag|>",
        "<|reserved_special_token_247|>",
    ]
    assert [tokenizer.special_ids[name] for name in special] == [128006, 128007, 128009, 128010, 128255]
    assert len(tokenizer.special_ids) == 256


def test_gpt_2_has_its_published_ids(tokenizers):
    tokenizer = tokenizers("gpt2")
    assert tokenizer.encode("Hello world", bos=True, eos=True) == [50256, 15496, 995, 50256]
    assert (tokenizer.kind, tokenizer.n_words, tokenizer.stop_ids) == ("gpt2", 50257, (50256,))


def test_padding_is_the_byte_0(tokenizer):
    ids = tokenizer.encode("a\0", bos=False, eos=False)
    assert ids[-1] == tokenizer.pad_id


def test_without_bytes_padding_is_what_is_no_text(tmp_path):
    json_file = word_level(tmp_path)
    assert Tokenizer(tokenizer_model=json_file).pad_id == Tokenizer(tokenizer_model=json_file).eos_id


def test_gpt_2_equals_the_tokenizers_library(asset, tokenizers, lines):
    from tokenizers import ByteLevelBPETokenizer

    files = [str(asset(f"tokenizers/{name}")) for name in ("gpt2_encoder.json", "gpt2_vocab.bpe")]
    independent = ByteLevelBPETokenizer.from_file(*files)
    texts = [*lines, *EDGES_OF_TEXT[:-1], *(" " * n for n in range(40))]
    assert tokenizers("gpt2").encode_many(texts) == [done.ids for done in independent.encode_batch(texts)]


@pytest.mark.slow
def test_llama_3_equals_the_tokenizers_library(llama3_elsewhere, tokenizers, lines):
    texts = [*lines, *EDGES_OF_TEXT, *(" " * n for n in range(40))]
    assert tokenizers("llama3").encode_many(texts) == [done.ids for done in llama3_elsewhere.encode_batch(texts)]


# Text and back


def test_real_text_comes_back(tokenizer, lines):
    many = tokenizer.encode_many(lines)
    assert [tokenizer.decode(ids) for ids in many] == lines
    assert many[::100] == [tokenizer.encode(line, bos=False, eos=False) for line in lines[::100]]


@pytest.mark.parametrize("text", EDGES_OF_TEXT)
def test_every_text_has_ids_that_give_it_back(tokenizer, text):
    ids = tokenizer.encode(text, bos=True, eos=True)
    assert tokenizer.decode(ids) == text
    assert (ids[0], ids[-1]) == (tokenizer.bos_id, tokenizer.eos_id)
    assert not set(ids[1:-1]) & set(tokenizer.special_ids.values())  # also of text that reads like them


def test_max_len_cuts_before_the_marks_are_added(tokenizer):
    short = Tokenizer(max_len=2, tokenizer_model=tokenizer.path)
    whole = tokenizer.encode("a good film", bos=False, eos=False)
    assert short.encode("a good film", bos=True, eos=True) == [tokenizer.bos_id, *whole[:2], tokenizer.eos_id]
    assert short.encode_many(["a good film"]) == [whole]


def test_parts_of_characters_are_decoded_to_something(tokenizer):
    smile = tokenizer.encode("\U0001f600", bos=False, eos=False)
    for ids in ([tokenizer.pad_id], smile[:-1], smile[-1:], smile[::-1], [tokenizer.eos_id], []):
        assert isinstance(tokenizer.decode(ids), str)
    assert "\ufffd" in tokenizer.decode(smile[-1:])


@pytest.mark.parametrize("outside", [-1, 1 << 20])
def test_ids_that_are_not_there_are_refused(tokenizer, outside):
    with pytest.raises(ValueError, match=f"has ids from 0 to {tokenizer.n_words - 1}, not {outside}"):
        tokenizer.decode([5, outside])


@pytest.mark.parametrize("text", ["a good \ud800 film", b"caf\xe9".decode("utf-8", "surrogateescape"), "\udfff"])
def test_half_a_character_is_no_text(tokenizer, text):
    for encode in (lambda: tokenizer.encode(text, bos=True, eos=True), lambda: tokenizer.encode_many([text])):
        with pytest.raises(ValueError, match=r"\\ud.*is not UTF-8 text.*save or type it as UTF-8") as raised:
            encode()
        assert str(raised.value).isprintable()


def test_what_is_no_string_is_refused(tokenizer):
    with pytest.raises(TypeError, match="takes a string, not bytes"):
        tokenizer.encode(b"film", bos=False, eos=False)


@pytest.mark.parametrize("kind", ["llama3", "gpt2"])
def test_runs_that_the_regex_could_not_hold_are_cut(tokenizers, kind):
    tokenizer = tokenizers(kind)
    text = " " * 1_000_000 + "a" + "\n" * 30_000 + "b" * 30_000
    ids = tokenizer.encode(text, bos=False, eos=False)
    assert tokenizer.decode(ids) == text
    beginning = tokenizer.encode(" " * 25_000, bos=False, eos=False)
    assert ids[: 2 * len(beginning)] == 2 * beginning


@pytest.mark.parametrize("text", ["Once upon", "a", "é", " b", "\n", "\U0001f600 x"])
def test_the_first_token_covers_the_bytes_of_its_text(tokenizer, text):
    size, ids = tokenizer.bytes_of_first(text), tokenizer.encode(text, bos=False, eos=False)
    first = tokenizer.decode(ids[:1])
    assert size == len(text.encode()) if len(ids) == 1 else 0 <= size < len(text.encode())
    if "\ufffd" not in first:
        assert size == len(first.encode()) and text.startswith(first)
    elif text == "é":
        assert size == 1  # half of it


@pytest.mark.parametrize("special", [True, False])
def test_a_token_that_the_model_lacks_is_kept_out_of_text(tmp_path, special):
    added = {"id": 4, "content": "<pad>", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    path = word_level(tmp_path, added_tokens=[added | {"special": special}], truncation=None, padding=None)
    tokenizer = Tokenizer(tokenizer_model=path)
    assert tokenizer.n_words == 5
    tokenizer.fit_to_model(4, stop_ids=[1])
    assert 4 not in tokenizer.encode("b <pad> a<pad>", bos=False, eos=False) and "<pad>" not in tokenizer.special_ids
    assert tokenizer.stop_ids == (3, 2, 1) and tokenizer.unused_ids == ()
    with pytest.raises(ValueError, match="gives ids that a model with a vocabulary of 3 does not have"):
        tokenizer.fit_to_model(3)


def test_ids_without_a_piece_are_unused_unless_a_text_ends_with_them(tmp_path):
    model = {"type": "WordLevel", "vocab": {"a": 0, "b": 1, "<go>": 2, "<halt>": 3, "c": 6}, "unk_token": "a"}
    tokenizer = Tokenizer(tokenizer_model=word_level(tmp_path, model=model))
    tokenizer.fit_to_model(10, stop_ids=(9,))
    assert tokenizer.unused_ids == (4, 5, 7, 8)
    assert tokenizer.decode([1, 9]) == "b"
    with pytest.raises(ValueError, match="has ids from 0 to 6, not 8"):
        tokenizer.decode([1, 8])


# The file's name may come first


def test_the_file_may_be_named_first_or_as_before(tokenizers, monkeypatch, tmp_path):
    path = tokenizers("sentencepiece").path
    same = [Tokenizer(path), Tokenizer(str(path), 3), Tokenizer(3, path), Tokenizer(None, path)]
    same += [Tokenizer(tokenizer_model=path), Tokenizer(max_len=3, tokenizer_model=str(path))]
    assert {tokenizer.path for tokenizer in same} == {path}
    assert [tokenizer.max_len for tokenizer in same] == [None, 3, 3, None, None, 3]
    assert same[1].encode("Hello World!", bos=True, eos=True) == [1, 15043, 2787, 29991, 2]
    (tmp_path / "tokenizer.model").write_bytes(path.read_bytes())
    monkeypatch.chdir(tmp_path)
    assert Tokenizer(2).max_len == 2 and Tokenizer(None).path.name == Tokenizer().path.name == "tokenizer.model"


def test_two_paths_two_numbers_and_a_missing_file_are_refused(tokenizers, tmp_path):
    path = tokenizers("sentencepiece").path
    with pytest.raises(ValueError, match="max_len is .*; it must be 1 or more, or None"):
        Tokenizer(path, path)
    with pytest.raises(ValueError, match="tokenizer_model is 3; it must be the path of a tokenizer's file"):
        Tokenizer(2, 3)
    with pytest.raises(FileNotFoundError, match="gone.model: no such tokenizer"):
        Tokenizer(tmp_path / "gone.model")
