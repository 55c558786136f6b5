"""tokenizer.py: what is no text is refused in words."""

from __future__ import annotations

import pytest

from tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer(asset):
    return Tokenizer(tokenizer_model=asset("stories260K/tok512.model"))


@pytest.mark.parametrize("text", ["a good \ud800 film", b"caf\xe9".decode("utf-8", "surrogateescape"), "\udfff"])
def test_half_a_character_is_no_text(tokenizer, text):
    with pytest.raises(ValueError, match=r"\\ud.*is no UTF-8 text.*save or type it as UTF-8") as raised:
        tokenizer.encode(text, bos=True, eos=True)
    assert str(raised.value).isprintable()


@pytest.mark.parametrize("text", ["", "zwölf 映画 \U0001f600", "nul \0 and \x85 and \u2028"])
def test_every_other_text_has_ids_that_give_it_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text, bos=True, eos=True)) == text
