"""Tokenized rows, with prompts around them, and the batches of an epoch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from minillama.formats.names import COURSE_TEMPLATE
from minillama.text.labelled import Row, beginning
from tokenizer import Tokenizer


class Tokenized(Protocol):
    """An object with token ids: a `Row` or an `Example`."""

    @property
    def ids(self) -> Sequence[int]: ...


Length = TypeVar("Length", bound=Tokenized)


class Batch(NamedTuple):
    """A batch: ids int64 (B, T); mask bool (B, T), True for real tokens, None without padding; labels int64 (B,)."""

    ids: Tensor
    mask: Tensor | None
    labels: Tensor
    positions: list[int]  # of the rows in their list


def listed(words: Sequence[str]) -> str:
    """Words joined as an English list: `bad, average, or good`."""
    *first, last = words
    return f"{first[0]} or {last}" if len(first) == 1 else f"{', '.join(first)}, or {last}"


def prompt_parts(template: str, words: Sequence[str], pooling: str = "last_token") -> tuple[str, str]:
    """The parts of a template before and after the sentence, with `words` instead of {labels}.

    The prompt ends without a space, because the next word includes one. Pooling "last_column" keeps the space, as the
    course does.
    """
    before, _, behind = (part.replace("{labels}", listed(words)) for part in template.partition("{sentence}"))
    return before, behind if pooling == "last_column" else behind.rstrip(" ")


def prompt_question(label_names: Sequence[str]) -> str:
    """The course's question: ` Is this movie bad, average, or good? This movie is `."""
    return prompt_parts(COURSE_TEMPLATE, label_names, "last_column")[1]


def tokenize_rows(
    rows: Iterable[Row],
    tokenizer: Tokenizer,
    context: int,
    *,
    before: str = "",
    question: str | None = None,
    max_sentence_len: int | None = None,
) -> tuple[list[Row], int]:
    """The rows with their ids, and the number of sentences cut to fit `context`.

    A row is <s> sentence </s>, or with a question <s> before sentence question. Only the sentence is cut, at its end:
    first to `max_sentence_len`, then to the context. <s> is left out if the tokenizer does not add it. Raises
    ValueError if a row has no room for its sentence.
    """

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, bos=False, eos=False)

    end = [tokenizer.eos_id] if question is None else []
    behind = question or ""
    done, cut = [], 0
    for row in rows:
        # With an empty sentence there is one space between its neighbours, and none at the beginning.
        text = before + row.sentence + behind if row.sentence else (before.rstrip(" ") + behind).lstrip(" ")
        ids = encode(text)
        begin = beginning(tokenizer, ids)
        # The whole text is tokenized at once, because ids depend on the text before them. A piece that overlaps the
        # sentence and the question counts as the question's and is never cut.
        if max_sentence_len is not None or len(begin) + len(ids) + len(end) > context:
            start = _shared_length(ids, encode(before)) if before else 0
            stop = _shared_length(ids, encode(before + row.sentence)) if behind else len(ids)
            sentence, question_ids = ids[start:stop][:max_sentence_len], ids[stop:]
            around = start + len(question_ids) + len(end)
            room = context - len(begin) - around
            if room < 1:
                raise ValueError(f"a context of {context} tokens has no room for a sentence and {around} of prompt")
            cut += len(sentence) > room
            ids = ids[:start] + sentence[:room] + question_ids
        done.append(replace(row, ids=(*begin, *ids, *end)))
    return done, cut


def _shared_length(one: Sequence[int], other: Sequence[int]) -> int:
    """The length of the common beginning of two lists."""
    differing = (n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return next(differing, min(len(one), len(other)))


def word_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of a text that follows another word, including the space between them.

    In Llama's vocabularies pieces may begin with a space but not end with one. So a prompt has the same ids with and
    without a text after it. Raises ValueError for a vocabulary without this property.
    """
    if getattr(tokenizer, "kind", "sentencepiece") == "sentencepiece":  # adds the space to any text
        return tokenizer.encode(text, bos=False, eos=False)
    before = tokenizer.encode(".", bos=False, eos=False)
    both = tokenizer.encode(f". {text}", bos=False, eos=False)
    if both[: len(before)] != before:
        raise ValueError(f"{tokenizer.path} makes one token of the end of a prompt and the beginning of {text[:40]!r}")
    return both[len(before) :]


def pad(sequences: Sequence[Sequence[int]], pad_id: int, side: str = "right") -> tuple[Tensor, Tensor | None]:
    """Sequences padded to a tensor (B, T), and the mask of real tokens (None without padding)."""
    longest = max(map(len, sequences))
    ids = torch.full((len(sequences), longest), pad_id)
    mask = torch.zeros(ids.shape, dtype=torch.bool)
    for i, sequence in enumerate(sequences):
        where = slice(0, len(sequence)) if side == "right" else slice(longest - len(sequence), longest)
        ids[i, where] = torch.tensor(sequence)
        mask[i, where] = True
    return ids, None if mask.all() else mask


def to_batch(rows: Sequence[Row], positions: list[int], pad_id: int) -> Batch:
    """The rows at `positions`, padded to the longest."""
    ids, mask = pad([rows[i].ids for i in positions], pad_id)
    return Batch(ids, mask, torch.tensor([rows[i].label for i in positions]), positions)


def cut_in_batches(order: Sequence[int], batch_size: int) -> list[list[int]]:
    """`order` in batches; the last one may be smaller."""
    return [list(order[start : start + batch_size]) for start in range(0, len(order), batch_size)]


def cut_by_length(
    positions: list[int], lengths: Sequence[int], piece_cost: int, most_rows: int | None = None
) -> list[list[int]]:
    """A batch in pieces of similar length, the longest rows first: the pieces that cost least.

    A piece is padded to its longest row. It costs its tokens, padding included, plus `piece_cost` tokens. lengths: of
    the rows at `positions`. most_rows: in a piece. A batch that is best in one piece keeps its order.
    """
    count = len(positions)
    most_rows = min(most_rows or count, count)
    if most_rows == count and count * max(lengths) - sum(lengths) <= piece_cost:
        return [positions]
    order = sorted(range(count), key=lambda i: lengths[i], reverse=True)
    # The least cost of order[start:], and the end of its first piece; found from the shortest rows to the longest.
    best = [(0, count)] * (count + 1)
    for start in reversed(range(count)):
        longest = lengths[order[start]]
        ends = range(min(start + most_rows, count), start, -1)
        best[start] = min(
            ((longest * (end - start) + piece_cost + best[end][0], end) for end in ends),
            key=lambda found: found[0],  # of equal costs the first, with the largest piece
        )
    pieces, start = [], 0
    while start < count:
        end = best[start][1]
        pieces.append([positions[i] for i in order[start:end]])
        start = end
    return pieces


def by_length(rows: Sequence[Tokenized]) -> list[int]:
    """The positions of the rows, the longest row first."""
    return sorted(range(len(rows)), key=lambda i: len(rows[i].ids), reverse=True)


def spread(rows: Sequence[Length], count: int) -> list[Length]:
    """At most `count` rows, evenly spread over all rows in the order of their lengths."""
    ordered = by_length(rows)
    step = max(1, math.ceil(len(ordered) / count))
    return [rows[i] for i in ordered[step // 2 :: step]]


def shuffled_batches(
    rows: Sequence[Tokenized], batch_size: int, seed: int, epoch: int, bucketed: bool = True
) -> list[list[int]]:
    """The batches of one epoch, determined by seed and epoch; each row is in one batch.

    bucketed: draw rows into pools of up to 32 batches (at most half of all rows) and batch rows of similar length.
    Padding is then about a twentieth of a batch instead of half. The longest batch comes first, so that a lack of
    memory shows at once.
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
