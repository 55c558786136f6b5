"""A mix of texts to pretrain on: windows of tokens for training, and held-out windows for evaluation."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from minillama.text.documents import DOCUMENT_END, Tokens

MOST_WINDOWS = 1 << 28  # of one text in one pass; their order is in memory


class Stretch:
    """The concatenated tokens of several files, in windows of `length` inputs and one more token, the last target."""

    def __init__(self, parts: Sequence[np.ndarray], length: int) -> None:
        self.length = length
        self._parts = parts
        self._ends = np.cumsum([len(part) for part in parts])

    @property
    def size(self) -> int:
        return int(self._ends[-1])

    def __len__(self) -> int:
        return max(0, (self.size - 1) // self.length)

    def window(self, i: int) -> np.ndarray:
        """Window i (length + 1,); the next window begins with its last token."""
        start, missing = i * self.length, self.length + 1
        k = int(np.searchsorted(self._ends, start, side="right"))
        found = [self._parts[k][start - int(self._ends[k]) + len(self._parts[k]) :][:missing]]
        while missing := missing - len(found[-1]):
            k += 1
            found.append(self._parts[k][:missing])
        return np.concatenate(found)


def held_out_count(held_out: float, documents: int) -> int:
    """The number of held-out documents, from a number or a share below 1. Raises ValueError for others, such as 1.5."""
    if held_out >= 1 and held_out != int(held_out):
        raise ValueError(f"--held_out is {held_out:g}; it must be a share below 1, or a whole number of documents")
    if held_out >= 1 or not held_out:
        return int(held_out)
    return min(max(1, round(held_out * documents)), documents - 1)


class Text:
    """The training windows of a text, and those of its last, held-out documents. Raises ValueError if too short."""

    def __init__(self, name: str, files: Sequence[Tokens], length: int, held_out: float, weight: float = 1.0) -> None:
        self.name, self.weight = name, weight
        documents = sum(len(tokens.text_bytes) for tokens in files)
        kept_out = held_out_count(held_out, documents)
        self.documents, self.held_out_documents = documents - kept_out, kept_out
        if kept_out >= documents:
            remedy = f"separate documents by {DOCUMENT_END}" + (
                ", or give a smaller --held_out" if documents > 1 else ""
            )
            has = f"{documents} document{'s' * (documents != 1)}"
            raise ValueError(f"{name} has {has}, so {kept_out} cannot be held out; {remedy}")
        train, out = [], []
        self.held_out_bytes = 0
        left = documents - kept_out  # documents to train on in this file and the next ones
        for tokens in files:
            here = min(left, len(tokens.text_bytes))
            middle = int(tokens.starts[here])
            train.append(tokens.ids[:middle])
            out.append(tokens.ids[middle:])
            self.held_out_bytes += int(tokens.text_bytes[here:].sum())
            left -= here
        self.train, self.held_out = Stretch(train, length), Stretch(out, length)
        self.checksum = (*(tokens.checksum for tokens in files), kept_out, length)
        self.held_out_tokens = self.held_out.size
        self.training_windows, self.held_out_windows = len(self.train), len(self.held_out)
        if self.training_windows * weight > MOST_WINDOWS:
            makes = f"a weight of {weight:g} makes {self.training_windows * weight:.3g} windows in a pass"
            raise ValueError(f"{name}: {makes}, more than {MOST_WINDOWS:,}; give a smaller weight and more --epochs")
        if not self.training_windows or (kept_out and not self.held_out_windows):
            remedy = "give more text, a shorter --window, or another --held_out"
            raise ValueError(f"{name} is too short for windows of {length} tokens; {remedy}")


class Corpus:
    """Texts mixed by weight: in one pass, each window of a text occurs `weight` times.

    With a weight of 0.3, a pass has three in ten windows (at least one), and the next pass has different ones.
    """

    def __init__(self, texts: Sequence[Text], seed: int) -> None:
        self.texts, self.seed = texts, seed
        self._ends = np.cumsum([text.training_windows for text in texts])
        self._pass: tuple[int, np.ndarray] = (-1, np.empty(0))

    def window(self, i: int) -> np.ndarray:
        """Training window i (length + 1,), counted over all texts."""
        k = int(np.searchsorted(self._ends, i, side="right"))
        return self.texts[k].train.window(i - int(self._ends[k]) + self.texts[k].training_windows)

    @property
    def pass_length(self) -> int:
        """Number of windows in one pass."""
        return sum(map(_windows_in_pass, self.texts))

    def order(self, number: int) -> np.ndarray:
        """The shuffled windows of pass `number`, determined by the seed."""
        if self._pass[0] != number:
            parts, first = [], 0
            for text in self.texts:
                n, count = text.training_windows, _windows_in_pass(text)
                # Each pass takes the next `count` windows of an endless sequence of permutations of the text.
                begin, end = number * count, (number + 1) * count
                rounds = [_permutation(n, self.seed, text.name, r) for r in range(begin // n, -(-end // n))]
                parts.append(first + np.concatenate(rounds)[begin % n :][:count])
                first += n
            together = np.concatenate(parts)
            self._pass = (number, together[_permutation(len(together), self.seed, "pass", number)])
        return self._pass[1]

    def batch(self, step: int, batch_size: int) -> list[int]:
        """The windows of optimizer step 0, 1, ...; a batch may contain the end of a pass and the start of the next."""
        places = range(step * batch_size, (step + 1) * batch_size)
        return [int(self.order(place // self.pass_length)[place % self.pass_length]) for place in places]


def _windows_in_pass(text: Text) -> int:
    return max(1, round(text.weight * text.training_windows))


def _permutation(n: int, *seed: object) -> np.ndarray:
    generator = torch.Generator().manual_seed(zlib.crc32(repr(seed).encode()))
    return torch.randperm(n, generator=generator).numpy()


def to_tensor(windows: Sequence[np.ndarray]) -> Tensor:
    """Windows as int64 (B, length + 1)."""
    return torch.from_numpy(np.stack(windows).astype(np.int64))


def evenly(stretch: Stretch, count: int) -> list[np.ndarray]:
    """At most `count` windows, evenly spread."""
    return [stretch.window(i) for i in range(0, len(stretch), max(1, math.ceil(len(stretch) / count)))]
