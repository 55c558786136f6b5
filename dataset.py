"""Labelled sentences, and prompts with answers: files in, token ids and batches out, predictions back into files."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from config import shown
from files import atomic_file
from tokenizer import Tokenizer

SEPARATOR = " ||| "
EXAMPLE_LINE = '{"prompt": "...", "answer": "..."}'
NO_TARGET = -100  # what torch's cross-entropy leaves out
# str.splitlines would also break a sentence at characters such as U+0085 or U+2028.
LINE_END = re.compile(r"\r{0,2}\n|\r")


@dataclass(frozen=True)
class Row:
    """One line of a data file; `ids` are its tokens, made once."""

    label: int
    sentence: str
    ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class Example:
    """A prompt and its answer; `ids` are both, with the marks around them, the first `prompt_length` the prompt's."""

    prompt: str
    answer: str
    ids: tuple[int, ...] = ()
    prompt_length: int = 0

    @property
    def prompt_ids(self) -> tuple[int, ...]:
        return self.ids[: self.prompt_length]

    @property
    def targets(self) -> int:
        """Tokens to be learnt: the answer's, and the end mark."""
        return len(self.ids) - self.prompt_length


class Batch(NamedTuple):
    """ids int64 (B, T); mask bool (B, T), True for real tokens, None where there is no padding; labels int64 (B,)."""

    ids: Tensor
    mask: Tensor | None
    labels: Tensor
    positions: list[int]  # of the rows in the list that the batch was drawn from


def read_text(path: str | PathLike[str], what: str) -> str:
    """The text of a UTF-8 file. Raises FileNotFoundError or ValueError, naming `what` it should have been."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(
            f"{path}: no such {what}; give another path, or `python fetch_data.py` brings the course's"
        )
    if not path.is_file():
        raise ValueError(f"{path} is not a file; it should be a {what}")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = len(LINE_END.split(error.object[: error.start].decode("latin-1")))
        raise ValueError(f"{path}, line {line}: not UTF-8; save the {what} as UTF-8 text") from error
    if not text.strip():
        raise ValueError(f"{path} is empty; it should be a {what}")
    return text


def read_label_names(path: str | PathLike[str]) -> list[str]:
    """The class names, in the order of their ids, from a JSON list. Raises ValueError unless they are 2 or more,
    distinct.
    """
    text = read_text(path, "label file (a JSON list of class names)")
    try:
        names = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f'{path} is not JSON ({error}); it should be a list of names such as ["bad", "good"]'
        ) from error
    if not isinstance(names, list) or not all(isinstance(name, str) and name.strip() for name in names):
        raise ValueError(f'{path} should be a JSON list of names such as ["bad", "good"]')
    if len(names) < 2 or len(set(names)) < len(names):
        raise ValueError(f"{path} names {names}; a classifier needs at least two names, each once")
    return names


def read_rows(path: str | PathLike[str], label_names: Sequence[str]) -> list[Row]:
    """The rows of a file of `label ||| sentence` lines, not yet tokenized.

    Raises ValueError, naming file and line, if a line has no separator, no sentence, or a label that is not the id of
    one of `label_names`.
    """
    rows = []
    text = read_text(path, "data file of `label ||| sentence` lines").rstrip()
    allowed = f"0 to {len(label_names) - 1} ({', '.join(label_names)})"
    for number, line in enumerate(LINE_END.split(text), start=1):
        where = f"{path}, line {number}"
        label, separator, sentence = line.partition(SEPARATOR.rstrip())
        if not separator or not f"{sentence} ".startswith(" "):
            raise ValueError(f'{where}: no "{SEPARATOR}" in {line[:60]!r}; a line is `label{SEPARATOR}sentence`')
        label = label.strip()
        if not re.fullmatch(r"-?[0-9]+", label):
            raise ValueError(f"{where}: label {label[:60]!r} is no whole number; it must be one of {allowed}")
        if len(label) > 20 or not 0 <= int(label) < len(label_names):  # int refuses a number of thousands of digits
            raise ValueError(
                f"{where}: label {label[:60]} is none of {allowed}; give the --label-names that belong to this file"
            )
        if not sentence.strip():
            raise ValueError(f"{where}: the sentence is empty; write one, or take the line out")
        rows.append(Row(int(label), sentence.strip()))
    return rows


def has_gold_labels(rows: Sequence[Row]) -> bool:
    """Whether the labels can be scored against: a column with one value (CFIMDB's test set: all 0) is a placeholder."""
    return len({row.label for row in rows}) > 1


def missing_classes(path: str | PathLike[str], rows: Sequence[Row], label_names: Sequence[str]) -> list[str]:
    """The names that no training row bears, for a warning.

    Raises ValueError if the last one is among them: then the names are those of another data set, with more classes.
    """
    found = {row.label for row in rows}
    if max(found) + 1 < len(label_names):
        raise ValueError(
            f"{path} has the labels {', '.join(map(str, sorted(found)))}, but --label-names has {len(label_names)} "
            f"names ({', '.join(label_names)}); give the mapping that belongs to this file"
        )
    return [name for label, name in enumerate(label_names) if label not in found]


def prompt_question(label_names: Sequence[str]) -> str:
    """What follows a sentence to ask for its class: ` Is this movie bad, average, or good? This movie is `."""
    *first, last = label_names
    choices = f"{first[0]} or {last}" if len(first) == 1 else f"{', '.join(first)}, or {last}"
    return f" Is this movie {choices}? This movie is "


def tokenize_rows(
    rows: Iterable[Row],
    tokenizer: Tokenizer,
    context: int,
    *,
    question: str | None = None,
    max_sentence_len: int | None = None,
) -> tuple[list[Row], int]:
    """The rows with their ids, each text tokenized once, and how many sentences had to be cut to fit `context`.

    Without a question a row is <s> sentence </s>. With one it is <s> sentence question, left open for a continuation;
    a row too long for the context loses the end of its sentence, never of the question. `max_sentence_len` cuts
    sentences first. Raises ValueError if the question alone does not fit.
    """
    # No piece of the vocabulary reaches from one word's end into the next, so the question is the same pieces after any
    # sentence, and the two parts may be tokenized apart.
    tail = [tokenizer.eos_id] if question is None else tokenizer.encode(question.lstrip(), bos=False, eos=False)
    room = context - 1 - len(tail)
    if room < 1:
        raise ValueError(
            f"the model's context of {context} tokens has no room for a sentence beside {len(tail)} of prompt"
        )
    done, cut = [], 0
    for row in rows:
        ids = tokenizer.encode(row.sentence, bos=False, eos=False)[:max_sentence_len]
        cut += len(ids) > room
        done.append(Row(row.label, row.sentence, (tokenizer.bos_id, *ids[:room], *tail)))
    return done, cut


def pad(sequences: Sequence[Sequence[int]], pad_id: int, side: str = "right") -> tuple[Tensor, Tensor | None]:
    """Sequences of ids as one tensor (B, T) and the mask of its real tokens, None where all are as long.

    Prompts that will be continued are padded on the left, rows that are read on the right.
    """
    longest = max(map(len, sequences))
    ids = torch.full((len(sequences), longest), pad_id)
    mask = torch.zeros(ids.shape, dtype=torch.bool)
    for i, sequence in enumerate(sequences):
        where = slice(0, len(sequence)) if side == "right" else slice(longest - len(sequence), longest)
        ids[i, where] = torch.tensor(sequence)
        mask[i, where] = True
    return ids, None if mask.all() else mask


def to_batch(rows: Sequence[Row], positions: list[int], pad_id: int) -> Batch:
    """The rows at `positions`, padded to the longest of them."""
    ids, mask = pad([rows[i].ids for i in positions], pad_id)
    return Batch(ids, mask, torch.tensor([rows[i].label for i in positions]), positions)


def cut_in_batches(order: Sequence[int], batch_size: int) -> list[list[int]]:
    """`order`, `batch_size` at a time; the last batch may be smaller."""
    return [list(order[start : start + batch_size]) for start in range(0, len(order), batch_size)]


def by_length(rows: Sequence[Row]) -> list[int]:
    """The rows' positions, the longest first."""
    return sorted(range(len(rows)), key=lambda i: len(rows[i].ids), reverse=True)


def shuffled_batches(
    rows: Sequence[Row] | Sequence[Example], batch_size: int, seed: int, epoch: int, bucketed: bool = True
) -> list[list[int]]:
    """The batches of one epoch, each row in one of them; the same for the same seed and epoch.

    Bucketed: rows are drawn into pools of up to 32 batches (half of all, where there are few), and within a pool those
    of like length share a batch, so that about a twentieth of it is padding instead of half. The longest batch is the
    first: if the memory does not suffice, that shows at once.
    """
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % (1 << 63))
    order = torch.randperm(len(rows), generator=generator).tolist()
    if not bucketed:
        return cut_in_batches(order, batch_size)
    pool = max(1, min(32, len(rows) // batch_size // 2))
    found = []
    for drawn in cut_in_batches(order, pool * batch_size):
        drawn.sort(key=lambda i: len(rows[i].ids), reverse=True)
        found += cut_in_batches(drawn, batch_size)
    longest = max(range(len(found)), key=lambda k: len(rows[found[k][0]].ids) * len(found[k]))
    first = found.pop(longest)
    return [first] + [found[i] for i in torch.randperm(len(found), generator=generator).tolist()]


# Prompts and answers


def read_examples(path: str | PathLike[str]) -> list[Example]:
    """The examples of a file of JSON lines with "prompt" and "answer", not yet tokenized; further keys are ignored.

    Raises ValueError, naming file and line, if one is no JSON object, or lacks either text.
    """
    text = read_text(path, f"data file of {EXAMPLE_LINE} lines").rstrip()
    examples = []
    for number, line in enumerate(LINE_END.split(text), start=1):
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
        examples.append(Example(fields["prompt"], fields["answer"].strip()))
    return examples


def answer_ids(tokenizer: Tokenizer, answer: str) -> list[int]:
    """The ids of an answer as it follows a word and a space, whatever the word.

    The space belongs to the answer: pieces of Llama's vocabularies begin with it and none ends in one. So a prompt has
    the same ids with an answer behind it as without, which is how it is seen when it is to be answered.
    """
    before = tokenizer.encode(".", bos=False, eos=False)
    both = tokenizer.encode(f". {answer}", bos=False, eos=False)
    if both[: len(before)] != before:
        raise ValueError(
            f"{tokenizer.path} makes one token of the end of a prompt and the beginning of {answer[:40]!r}"
        )
    return both[len(before) :]


def tokenize_examples(
    path: str | PathLike[str], examples: Iterable[Example], tokenizer: Tokenizer, window: int, new_tokens: int
) -> tuple[list[Example], int]:
    """The examples of a file with their ids, <s> prompt answer </s>, and how many prompts had to be cut.

    A prompt loses its beginning (after <s>) where it would leave no room in `window` tokens for the answer, or for the
    `new_tokens` that are made in its place. Raises ValueError, naming file and line, if an answer leaves no room.
    """
    done, cut = [], 0
    for number, example in enumerate(examples, start=1):
        try:
            prompt = tokenizer.encode(example.prompt, bos=False, eos=False)
            answer = answer_ids(tokenizer, example.answer)
            room = window - 1 - max(len(answer), new_tokens)
            if room < 1:
                raise ValueError(
                    f"an answer of {len(answer)} tokens, or --max_new_tokens {new_tokens}, leaves no room for its "
                    f"prompt in {window} tokens; shorten it"
                )
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
        cut += len(prompt) > room
        kept = (tokenizer.bos_id, *prompt[-room:])
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


# Predictions


def write_predictions(path: str | PathLike[str], labels: Sequence[int], rows: Sequence[Row]) -> None:
    """Writes `{label} ||| {sentence}` lines, atomically."""
    with atomic_file(path) as file:
        for label, row in zip(labels, rows, strict=True):
            file.write(f"{label}{SEPARATOR}{row.sentence}\n")
