"""Prompts with answers: read, tokenized, packed into rows."""

from __future__ import annotations

import pytest
import torch

from conftest import TOKENIZERS
from minillama.text.batches import tokenize_rows, word_ids
from minillama.text.examples import NO_TARGET, Example, pack, read_examples, shared_rows, tokenize_examples
from minillama.text.labelled import Row
from tokenizer import Tokenizer


def test_examples_are_read_whatever_else_is_in_a_line(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        '{"id": 7, "prompt": "Who\u2028 is \\"he\\"? ", "answer": " Zo\u00eb\\n"}\r\n'
        '{"answer": "b", "prompt": "a"}\n\n'.encode()
    )
    assert read_examples(path) == [Example('Who\u2028 is "he"? ', "Zo\u00eb"), Example("a", "b")]


PAIRS = [
    ("Where was it?", "under the bed"),
    ("The colour is", "red"),
    ("Q: who\nA:", "Zo\u00eb"),
    ("2 + 2 =", "4, or so"),
]


@pytest.mark.parametrize("any_tokenizer", [*TOKENIZERS, "stories260K/tok512.model"], indirect=True)
@pytest.mark.parametrize("prompt, answer", PAIRS)
def test_prompt_and_answer_are_the_pieces_of_the_text_that_they_make(any_tokenizer, prompt, answer):
    """The prompt's are those of the prompt alone, so that it looks the same when it is to be answered."""
    whole = any_tokenizer.encode(f"{prompt} {answer}", bos=True, eos=True)
    (found,), cut = tokenize_examples("a.jsonl", [Example(prompt, answer)], any_tokenizer, 99, 5)
    assert list(found.ids) == whole and cut == 0
    assert list(found.prompt_ids) == any_tokenizer.encode(prompt, bos=True, eos=False)
    assert found.targets == len(whole) - len(found.prompt_ids)
    assert any_tokenizer.decode(word_ids(any_tokenizer, answer)).strip() == answer


@pytest.mark.parametrize("any_tokenizer", [*TOKENIZERS, "stories260K/tok512.model"], indirect=True)
def test_spaces_at_the_end_of_a_prompt_are_no_token_of_their_own(any_tokenizer):
    """The answer brings its space, which would be there twice."""
    pairs = [Example(f"Q: who\nA:{end}", "Zo\u00eb") for end in ("", " ", "   ")]
    found, _ = tokenize_examples("a.jsonl", pairs, any_tokenizer, 99, 5)
    assert len({(one.ids, one.prompt_length) for one in found}) == 1
    assert found[1].prompt == "Q: who\nA: "
    (line, _), _ = tokenize_examples("a.jsonl", [Example("A:\n", "b"), Example("A:", "b")], any_tokenizer, 99, 5)
    assert line.prompt_ids == tuple(any_tokenizer.encode("A:\n", bos=True, eos=False))


def test_a_prompt_loses_its_beginning_where_the_answer_needs_the_room(llama_tokenizer):
    prompt, answer = "one two three four five", "six"
    pieces, last = (llama_tokenizer.encode(text, bos=False, eos=False) for text in (prompt, answer))
    for window, new_tokens in ((len(pieces) + 2, 1), (6, 3), (6, 1), (3, 1)):
        (found,), cut = tokenize_examples("a.jsonl", [Example(prompt, answer)], llama_tokenizer, window, new_tokens)
        room = window - 1 - max(new_tokens, len(last))
        assert found.ids == (1, *pieces[-room:], *last, 2) and cut == (room < len(pieces))
        assert len(found.ids) - 1 <= window and found.prompt_length + new_tokens <= window
    with pytest.raises(
        ValueError, match="a.jsonl, line 1: an answer of 1 tokens, or --max_new_tokens 3, leaves no room"
    ):
        tokenize_examples("a.jsonl", [Example(prompt, answer)], llama_tokenizer, 4, 3)


def test_sequences_share_rows_without_overflow_and_each_is_in_one():
    generator = torch.Generator().manual_seed(0)
    for room in (10, 17, 40):
        lengths = torch.randint(1, 11, (50,), generator=generator).tolist()
        rows = shared_rows(lengths, room)
        sums = [sum(lengths[i] for i in row) for row in rows]
        assert max(sums) <= room and sorted(i for row in rows for i in row) == list(range(50))
        assert len(rows) <= 11 / 9 * -(-sum(lengths) // room) + 1  # what first fit of the longest promises
    assert shared_rows([3, 5, 2], 5) == [[1], [0, 2]]


def test_packed_examples_are_taken_apart_again():
    examples = [
        Example("", "", (1, 11, 12, 13, 2), 3),
        Example("", "", (1, 21, 2), 2),
        Example("", "", (1, 31, 32, 2), 1),
    ]
    packed = pack(examples, 7)
    assert packed.ids.tolist() == [[1, 11, 12, 13, 1, 31, 32], [1, 21, 0, 0, 0, 0, 0]]
    N = NO_TARGET
    assert packed.targets.tolist() == [[N, N, 13, 2, 31, 32, 2], [N, 2, N, N, N, N, N]]
    assert packed.segments.tolist() == [[1, 1, 1, 1, 3, 3, 3], [2, 2, 0, 0, 0, 0, 0]]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r", " \n"])
def test_blank_lines_between_examples_are_left_out_and_lines_keep_their_numbers(tmp_path, llama_tokenizer, end):
    path = tmp_path / "a.jsonl"
    lines = ["\ufeff", '{"prompt": "a", "answer": "b"}', "", " \t", '{"prompt": "c", "answer": "d d d d d d d d"}']
    path.write_bytes(end.join([*lines, "", ""]).encode())
    examples = read_examples(path)
    assert examples == [Example("a", "b"), Example("c", "d d d d d d d d")]
    with pytest.raises(ValueError, match=r"a.jsonl, line 5: an answer of 8 tokens"):
        tokenize_examples(path, examples, llama_tokenizer, 6, 1)
    path.write_bytes(end.join([*lines, "", '{"prompt": "a"}']).encode())
    with pytest.raises(ValueError, match=r'a.jsonl, line 7: there is no "answer"'):
        read_examples(path)


def test_without_bos_an_example_and_a_row_begin_with_their_text(small_tokenizer, tmp_path):
    tokenizer = Tokenizer(tokenizer_model=small_tokenizer)
    example = [Example("the boy", "ran")]
    for adds, begin in ((True, (1,)), (False, ())):
        tokenizer.adds_bos = adds
        (done,), _ = tokenize_examples("x", example, tokenizer, 50, 4)
        text = tuple(tokenizer.encode("the boy", bos=False, eos=False))
        assert done.prompt_ids == (*begin, *text)
        (cut,), lost = tokenize_examples("x", example, tokenizer, 6, 4)
        assert lost == 1 and len(cut.prompt_ids) == 2
        (row,), _ = tokenize_rows([Row(0, "the boy")], tokenizer, 50)
        assert row.ids == (*begin, *text, 2)
        (short,), lost = tokenize_rows([Row(0, "the boy")], tokenizer, 3)
        assert lost == 1 and len(short.ids) == 3
        (empty,), _ = tokenize_rows([Row(0, "")], tokenizer, 50, question="")
        assert empty.ids == (1,)  # something to read
