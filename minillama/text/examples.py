"""Prompts with answers: JSON lines in, token ids and packed rows out, answers back into JSON lines."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from os import PathLike
from typing import NamedTuple

import torch
from torch import Tensor

from config import shown
from minillama.formats.files import atomic_file
from minillama.text.batches import word_ids
from minillama.text.labelled import beginning, numbered_lines, read_text
from tokenizer import Tokenizer

EXAMPLE_LINE = '{"prompt": "...", "answer": "..."}'
NO_TARGET = -100  # what torch's cross-entropy leaves out


@dataclass(frozen=True)
class Example:
    """A prompt and its answer; `ids` are both, with the marks around them, the first `prompt_length` the prompt's."""

    prompt: str
    answer: str
    ids: tuple[int, ...] = ()
    prompt_length: int = 0
    line: int = field(default=0, compare=False)  # in its file, for messages; 0: unknown

    @property
    def prompt_ids(self) -> tuple[int, ...]:
        return self.ids[: self.prompt_length]

    @property
    def targets(self) -> int:
        """Tokens to be learnt: the answer's, and the end mark."""
        return len(self.ids) - self.prompt_length


def read_examples(path: str | PathLike[str]) -> list[Example]:
    """The examples of a file of JSON lines with "prompt" and "answer", not yet tokenized; further keys and blank
    lines are ignored.

    Raises ValueError, naming file and line, if one is no JSON object, or lacks either text.
    """
    text = read_text(path, f"data file of {EXAMPLE_LINE} lines").rstrip()
    examples = []
    for number, line in numbered_lines(text):
        where = f"{path}, line {number}"
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: no JSON ({error}); a line is {EXAMPLE_LINE}") from error
        if not isinstance(fields, dict):
            raise ValueError(f"{where}: {shown(fields)} is no JSON object; a line is {EXAMPLE_LINE}")
        for name in ("prompt", "answer"):
            if name not in fields:
                raise ValueError(f'{where}: there is no "{name}"; a line is {EXAMPLE_LINE}')
            if not isinstance(fields[name], str) or not fields[name].strip():
                raise ValueError(f'{where}: "{name}" is {shown(fields[name])}; it must be a text')
        examples.append(Example(fields["prompt"], fields["answer"].strip(), line=number))
    return examples


def tokenize_examples(
    path: str | PathLike[str], examples: Iterable[Example], tokenizer: Tokenizer, window: int, new_tokens: int
) -> tuple[list[Example], int]:
    """The examples of a file with their ids, <s> prompt answer </s>, and how many prompts had to be cut. Spaces at the
    end of a prompt are left out, as in a template (`dataset.prompt_parts`): the answer brings its own. There is no <s>
    where the tokenizer adds none.

    A prompt loses its beginning (after <s>) where it would leave no room in `window` tokens for the answer, or for the
    `new_tokens` that are made in its place. Raises ValueError, naming file and line, if an answer leaves no room.
    """
    done, cut = [], 0
    for number, example in enumerate(examples, start=1):
        try:
            prompt = tokenizer.encode(example.prompt.rstrip(" "), bos=False, eos=False)
            answer = word_ids(tokenizer, example.answer)
            begin = beginning(tokenizer, prompt)
            room = window - len(begin) - max(len(answer), new_tokens)
            if room < 1:
                raise ValueError(
                    f"an answer of {len(answer)} tokens, or --max_new_tokens {new_tokens}, leaves no room for its "
                    f"prompt in {window} tokens; shorten it"
                )
        except ValueError as error:
            raise ValueError(f"{path}, line {example.line or number}: {error}") from error
        cut += len(prompt) > room
        kept = (*begin, *prompt[-room:])
        done.append(replace(example, ids=(*kept, *answer, tokenizer.eos_id), prompt_length=len(kept)))
    return done, cut


class Packed(NamedTuple):
    """Examples end to end: ids, targets and segments, each int64 (rows, T). A target is the id that follows, NO_TARGET
    where that is none to learn; a segment is the number of the example from 1 on, 0 for padding.
    """

    ids: Tensor
    targets: Tensor
    segments: Tensor


def shared_rows(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Which sequences share a row of `room` tokens: the longest first, each in the first row that has the room."""
    rows: list[list[int]] = []
    left: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i], reverse=True):
        row = next((row for row, free in enumerate(left) if free >= lengths[i]), len(rows))
        if row == len(rows):
            rows.append([])
            left.append(room)
        rows[row].append(i)
        left[row] -= lengths[i]
    return rows


def pack(examples: Sequence[Example], window: int) -> Packed:
    """The examples in rows of at most `window` tokens; what predicts nothing, the last token of each, is left out."""
    rows = shared_rows([len(example.ids) - 1 for example in examples], window)
    longest = max(sum(len(examples[i].ids) - 1 for i in row) for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.int64)
    targets, segments = torch.full_like(ids, NO_TARGET), torch.zeros_like(ids)
    for number, row in enumerate(rows):
        start = 0
        for i in row:
            tokens, end = torch.tensor(examples[i].ids), start + len(examples[i].ids) - 1
            ids[number, start:end] = tokens[:-1]
            targets[number, end - examples[i].targets : end] = tokens[-examples[i].targets :]
            segments[number, start:end] = i + 1
            start = end
    return Packed(ids, targets, segments)


def write_answers(path: str | PathLike[str], answers: Sequence[str], examples: Sequence[Example]) -> None:
    """Writes JSON lines of prompt, answer and what was predicted, atomically."""
    with atomic_file(path) as file:
        for predicted, example in zip(answers, examples, strict=True):
            line = {"prompt": example.prompt, "answer": example.answer, "predicted": predicted}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
