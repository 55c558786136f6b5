"""Text generation with any decoder, alone or in batches, up to a stop text. Pieces appear as soon as they are final."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from minillama.decoding import sampling
from minillama.decoding.beam_search import beam_search
from minillama.decoding.contrastive_search import contrastive_search
from minillama.decoding.filters import Filter
from minillama.decoding.lookup import lookup_decoding
from minillama.decoding.sampling import LanguageModel, has_stop, until_end
from minillama.text.batches import pad
from tokenizer import Tokenizer

Watch = Callable[[Tensor, Tensor], None]


@dataclass(frozen=True)
class Decoding:
    """Settings of decoding. decoder: "sample", "beam", "contrastive" or "lookup"; stops: texts that end a
    continuation; shows_prompt: whether the shown text starts with the prompt.
    """

    decoder: str = "sample"
    max_new_tokens: int = 75
    temperature: float = 1.0
    filters: list[Filter] = field(default_factory=list)
    repetition_penalty: float = 1.0
    beams: int = 4
    length_penalty: float = 1.0
    k: int = 4  # candidates of contrastive search
    contrast: float = 0.6
    stops: Sequence[str] = ()
    seed: int = 0
    shows_prompt: bool = True


@dataclass
class Continuation:
    """The continuation of one prompt. finish: "end" (an end token), "stop" (a text of `stops`) or "length". tokens: the
    number of generated tokens, including the end token or the stop text.
    """

    prompt: str
    text: str
    tokens: int
    finish: str


class Speed:
    """Token counter with a clock. The time of the first token includes reading the prompt; before the second one, the
    compiled decoder may have to be loaded.
    """

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.early: list[float] = []  # the times of the first two tokens
        self.tokens = 0

    def count(self) -> None:
        self.tokens += 1
        if len(self.early) < 2:
            self.early.append(time.perf_counter() - self.start)

    def __str__(self) -> str:
        seconds = time.perf_counter() - self.start
        total = f"{self.tokens} tokens in {seconds:.2f} s"
        if self.tokens < 3 or self.early[0] > 0.9 * seconds:  # all tokens came at once
            return f"{total}, {self.tokens / seconds:.0f} per second"
        first, second = self.early
        rate = (self.tokens - 2) / (seconds - second)
        waited = second - first - 1 / rate > 0.1
        when = f"the first after {first:.2f} s" + (
            f", the second after {second:.2f} s (loading compiled code)" if waited else ""
        )
        return f"{total}; {when}, then {rate:.0f} per second"


class Writer:
    """A model that continues prompts."""

    def __init__(self, model: LanguageModel, tokenizer: Tokenizer, device: torch.device, decoding: Decoding) -> None:
        self.model, self.tokenizer, self.device, self.decoding = model, tokenizer, device, decoding
        self.generator = torch.Generator(device)
        self.reset_generator()

    def reset_generator(self) -> None:
        """Resets the random generator to the seed."""
        self.generator.manual_seed(self.decoding.seed)

    def ids(self, prompt: list[int], temperature: float | None = None, watch: Watch | None = None) -> Iterator[int]:
        """The new tokens of one prompt. Beam search, contrastive search and lookup give them all at once.

        temperature: overrides that of the decoding. watch: as in `sampling.stream`.
        """
        how, count = self.decoding, self.decoding.max_new_tokens
        ends: dict[str, Any] = {"eos_ids": self.tokenizer.stop_ids, "banned_ids": self.tokenizer.unused_ids}
        idx = torch.tensor([prompt], device=self.device)
        if how.decoder == "sample":
            for chosen in self.stream(idx, None, temperature, watch):
                yield int(chosen)
            return
        if how.decoder == "beam":
            found, _ = beam_search(self.model, idx, count, beams=how.beams, length_penalty=how.length_penalty, **ends)
        elif how.decoder == "contrastive":
            found = contrastive_search(self.model, idx, count, k=how.k, alpha=how.contrast, **ends)
        else:
            draws: dict[str, Any] = {
                "temperature": how.temperature,
                "filters": how.filters,
                "generator": self.generator,
            }
            found = lookup_decoding(self.model, idx, count, **draws, **ends)
        yield from found[len(prompt) :].tolist()

    def stream(
        self, idx: Tensor, mask: Tensor | None, temperature: float | None = None, watch: Watch | None = None
    ) -> Iterator[Tensor]:
        """`sampling.stream` with the settings of the decoding."""
        return sampling.stream(
            self.model,
            idx,
            self.decoding.max_new_tokens,
            temperature=self.decoding.temperature if temperature is None else temperature,
            epsilon=0.0,  # it is one of the filters
            filters=self.decoding.filters,
            repetition_penalty=self.decoding.repetition_penalty,
            attention_mask=mask,
            eos_ids=self.tokenizer.stop_ids,
            banned_ids=self.tokenizer.unused_ids,
            generator=self.generator,
            watch=watch,
        )

    def continuation(
        self, prompt: list[int], ids: Iterator[int], show: Callable[[str], None] = lambda piece: None
    ) -> Continuation:
        """The text of a prompt and the ids after it. Passes each piece to `show`; takes no more ids than needed."""
        taken: list[int] = []
        pieces: list[str] = []
        stopped = False

        def counted() -> Iterator[int]:
            for token in ids:
                taken.append(token)
                yield token

        def until_stop() -> Iterator[str]:
            nonlocal stopped
            stopped = yield from text_pieces(self.tokenizer, self.shown(prompt), counted(), self.decoding.stops)

        for piece in until_stop():
            show(piece)
            pieces.append(piece)
        ended = bool(taken) and taken[-1] in self.tokenizer.stop_ids
        finish = "stop" if stopped else "end" if ended else "length"
        return Continuation(pieces[0], "".join(pieces[1:]), len(taken), finish)

    def batch(
        self, prompts: list[list[int]], tick: Callable[[int], object] = lambda tokens: None
    ) -> list[Continuation]:
        """Continues prompts as one batch. At temperature 0 each result is that of the prompt alone; above 0 it depends
        on the batch. tick: called with the number of new tokens.
        """
        idx, mask = pad(prompts, self.tokenizer.pad_id, side="left")

        def ended(row: int, ids: list[int]) -> bool:
            before = self.shown(prompts[row])
            return ids[-1] in self.tokenizer.stop_ids or has_stop(self.tokenizer, before, ids, self.decoding.stops)

        steps = self.stream(idx.to(self.device), None if mask is None else mask.to(self.device))
        rows = until_end(steps, len(prompts), ended, tick)
        return [self.continuation(prompt, iter(ids)) for prompt, ids in zip(prompts, rows, strict=True)]

    def shown(self, prompt: list[int]) -> list[int]:
        """The tokens of a prompt that are shown before its continuation."""
        return prompt if self.decoding.shows_prompt else []


def text_pieces(
    tokenizer: Tokenizer, prompt: list[int], ids: Iterator[int], stops: Sequence[str]
) -> Generator[str, None, bool]:
    """The text of prompt and ids in pieces, the prompt first. A piece appears as soon as it is final: no incomplete
    character, and no text that may be the start of a stop. Ends before the first stop after the prompt; returns
    whether there was one.
    """
    tokens = list(prompt)
    shown = tokenizer.decode(tokens)
    length = len(shown)
    yield shown
    text = shown
    for token in ids:
        tokens.append(token)
        text = tokenizer.decode(tokens)
        found = [place for place in (text.find(stop, length) for stop in stops) if place >= 0]
        if found:
            yield text[len(shown) : min(found)]
            return True
        certain = text.rstrip("\ufffd")
        waiting = max((overlap(certain[length:], stop) for stop in stops), default=0)
        certain = certain[: len(certain) - waiting]
        if len(certain) > len(shown):
            yield certain[len(shown) :]
            shown = certain
    yield text[len(shown) :]
    return False


def overlap(text: str, stop: str) -> int:
    """The length of the longest suffix of `text` that is a prefix of `stop`."""
    return next((size for size in range(min(len(text), len(stop)), 0, -1) if text.endswith(stop[:size])), 0)
