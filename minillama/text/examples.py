"""Prompts with answers: reads JSON lines, tokenizes them, packs them into rows, and writes predicted answers."""

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
from minillama.text.labelled import beginning, read_text
from minillama.text.tables import numbered_lines
from tokenizer import Tokenizer

EXAMPLE_LINE = '{"prompt": "...", "answer": "..."}'
NO_TARGET = -100  # ignored by torch's cross-entropy


@dataclass(frozen=True)
class Example:
    """A prompt and its answer. ids: <s> prompt answer </s>; the first `prompt_length` are the prompt's."""

    prompt: str
    answer: str
    ids: tuple[int, ...] = ()
    prompt_length: int = 0
    line: int = field(default=0, compare=False)  # the number of its line, for messages; 0: unknown

    @property
    def prompt_ids(self) -> tuple[int, ...]:
        return self.ids[: self.prompt_length]

    @property
    def targets(self) -> int:
        """Number of tokens to learn: those of the answer, and </s>."""
        return len(self.ids) - self.prompt_length


def read_examples(path: str | PathLike[str]) -> list[Example]:
    """The examples of a file of JSON lines, not yet tokenized. Raises ValueError, naming file and line."""
    text = read_text(path, f"data file of {EXAMPLE_LINE} lines").rstrip()
    examples = []
    for number, line in numbered_lines(text):
        where = f"{path}, line {number}"
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: not JSON ({error}); a line is {EXAMPLE_LINE}") from error
        if not isinstance(fields, dict):
            raise ValueError(f"{where}: {shown(fields)} is not a JSON object; a line is {EXAMPLE_LINE}")
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
    """The examples of a file with their ids, and the number of prompts that were cut.

    A prompt loses spaces at its end, because the answer includes one. <s> is left out if the tokenizer does not add
    it. A prompt is cut at its beginning (after <s>), so that `window` tokens have room for it and the answer, or for
    it and `new_tokens`. Raises ValueError, naming file and line, if an answer leaves no room for a prompt.
    """
    done, cut = [], 0
    for number, example in enumerate(examples, start=1):
        try:
            prompt = tokenizer.encode(example.prompt.rstrip(" "), bos=False, eos=False)
            answer = word_ids(tokenizer, example.answer)
            begin = beginning(tokenizer, prompt)
            room = window - len(begin) - max(len(answer), new_tokens)
            if room < 1:
                longer = f"an answer of {len(answer)} tokens, or --max_new_tokens {new_tokens}"
                raise ValueError(f"{longer}, leaves no room for its prompt in {window} tokens; shorten it")
        except ValueError as error:
            raise ValueError(f"{path}, line {example.line or number}: {error}") from error
        cut += len(prompt) > room
        kept = (*begin, *prompt[-room:])
        done.append(replace(example, ids=(*kept, *answer, tokenizer.eos_id), prompt_length=len(kept)))
    return done, cut


class Packed(NamedTuple):
    """Examples packed into rows, int64 (rows, T). targets: the next id, or NO_TARGET. segments: the example, from 1."""

    ids: Tensor
    targets: Tensor
    segments: Tensor  # 0 for padding


def shared_rows(lengths: Sequence[int], room: int) -> list[list[int]]:
    """The sequences in each row of `room` tokens. The longest is placed first, and each in the first row with room."""
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
    """The examples in rows of at most `window` tokens. The last token of each is left out: it only is a target."""
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
    """Writes JSON lines of prompt, answer and predicted answer, atomically."""
    with atomic_file(path) as file:
        for predicted, example in zip(answers, examples, strict=True):
            line = {"prompt": example.prompt, "answer": example.answer, "predicted": predicted}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
