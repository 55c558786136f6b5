"""Sampling from any language model, token by token.

With a cache each token is computed once. Without a cache, the whole window is computed for each new token, with the
same results. This is also necessary beyond the context, where each new token shifts all positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from config import DEFAULT_EPSILON
from minillama.decoding.filters import (
    BANNED,
    Filter,
    all_finite,
    check_finite,
    distribution,
    draw,
    epsilon_filter,
    filters_by_name,
    repetition_penalised,
)
from minillama.layers.precision import at_least_float32
from tokenizer import Tokenizer


class LanguageModel(Protocol):
    """The interface of a model for decoding: `config.max_seq_len`, and a call as `Llama.forward`.

    A model with a method `new_cache` takes its result as `cache`.
    """

    @property
    def config(self) -> Any: ...

    @property
    def __call__(self) -> Callable[..., tuple[Tensor, Tensor]]: ...


def next_token(
    logits: Tensor,
    temperature: float,
    epsilon: float = 0.0,
    generator: torch.Generator | None = None,
    filters: Sequence[Filter] = (),
) -> Tensor:
    """Chooses a token per row: logits (B, V), finite -> ids (B,), at temperature 0 the arg-max."""
    if temperature == 0.0:
        return logits.argmax(-1)
    if epsilon > 0.0:
        filters = (lambda logits: epsilon_filter(logits, epsilon), *filters)
    return draw(distribution(logits, temperature, filters), generator)


def check_settings(max_new_tokens: int, temperature: float, epsilon: float, repetition_penalty: float = 1.0) -> None:
    """Raises ValueError for a decoding setting out of its range."""
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be 0 or more")
    if not (0.0 <= temperature < math.inf):
        raise ValueError(f"temperature is {temperature}; it must be 0 (greedy) or a finite number above 0")
    if not 0.0 <= epsilon < 1.0:
        raise ValueError(f"epsilon is {epsilon}; it must be in [0, 1)")
    if not 0.01 <= repetition_penalty <= 100.0:  # beyond it logits overflow
        raise ValueError(f"repetition_penalty is {repetition_penalty}; it must be from 0.01 to 100 (1 changes nothing)")


def check_prompts(idx: Tensor, attention_mask: Tensor | None) -> Tensor | None:
    """The mask as bool. Raises ValueError for an empty or right-padded prompt, or a mask of another shape."""
    if idx.dim() != 2 or 0 in idx.shape:
        raise ValueError(f"idx has shape {tuple(idx.shape)}; it must be (batch, tokens) with at least one of each")
    if attention_mask is not None:
        if attention_mask.shape != idx.shape:
            raise ValueError(
                f"attention_mask has shape {tuple(attention_mask.shape)}, idx {tuple(idx.shape)}; they must be the same"
            )
        attention_mask = attention_mask.to(torch.bool)
        if not attention_mask[:, -1].all():
            raise ValueError("a prompt ends in padding; pad prompts of unequal length on the left")
    return attention_mask


def check_one_prompt(idx: Tensor, decoder: str) -> None:
    """Raises ValueError unless idx is (1, T), for a decoder that takes one prompt."""
    check_prompts(idx, None)
    if idx.shape[0] != 1:
        raise ValueError(f"{decoder} takes one prompt, not {idx.shape[0]}")


class Reader:
    """A model that reads a growing text: with a cache while the text fits the context, then with a sliding window.

    banned_ids: tokens that are never generated; their logits are `BANNED`.
    """

    def __init__(
        self, model: LanguageModel, capacity: int, use_cache: bool = True, banned_ids: Sequence[int] = ()
    ) -> None:
        self.model = model
        self.banned = torch.tensor(list(banned_ids), dtype=torch.long)
        self.context = model.config.max_seq_len
        new_cache = getattr(model, "new_cache", None)
        self.cache: Any = new_cache(min(capacity, self.context)) if new_cache is not None and use_cache else None

    def __call__(self, tokens: Tensor, attention_mask: Tensor | None = None, **options: Any) -> tuple[Tensor, Tensor]:
        """The model's output for the text tokens (B, T); tokens in the cache are not computed again."""
        logits, hidden = self._read(tokens, attention_mask, **options)
        if len(self.banned):
            self.banned = self.banned.to(tokens.device)
            logits = at_least_float32(logits).index_fill(-1, self.banned, BANNED)  # BANNED is -inf in float16
        return logits, hidden

    def _read(self, tokens: Tensor, attention_mask: Tensor | None, **options: Any) -> tuple[Tensor, Tensor]:
        end = tokens.shape[1]
        if self.cache is None or end > self.context:
            self.cache = None  # from now on the window slides, and all positions change
            window = slice(max(0, end - self.context), end)
            mask = None if attention_mask is None else attention_mask[:, window]
            return self.model(tokens[:, window], attention_mask=mask, **options)
        new = slice(self.cache.length, end)
        # Only a prompt has padding.
        mask = attention_mask[:, new] if attention_mask is not None and new.start == 0 else None
        return self.model(tokens[:, new], attention_mask=mask, cache=self.cache, **options)


@torch.no_grad()
def stream(
    model: LanguageModel,
    idx: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    epsilon: float = 0.05,
    filters: Sequence[Filter] = (),
    repetition_penalty: float = 1.0,
    attention_mask: Tensor | None = None,
    eos_ids: Sequence[int] = (),
    generator: torch.Generator | None = None,
    use_cache: bool = True,
    banned_ids: Sequence[int] = (),
    watch: Callable[[Tensor, Tensor], None] | None = None,
) -> Iterator[Tensor]:
    """Yields the next tokens (B,) after the prompts idx (B, T), step by step. Beyond the context the window slides.

    The tokens are on the CPU. A step waits for a GPU once: for them, and for whether to go on.

    attention_mask: bool (B, T), True for real tokens. Prompts of unequal length are padded on the left, so that each
    continuation follows its prompt. Rotary positions are relative, so the shift changes nothing.
    eos_ids: end tokens. An ended row is filled with the first of them; the stream ends when all rows have ended.
    generator: source of the random draws, on the device of idx (default: torch's).
    banned_ids: tokens that are never chosen.
    watch: called in each step with the logits (B, V), after the repetition penalty, and the chosen tokens (B,).

    Raises ValueError for an empty or right-padded prompt, for settings out of range, and for NaN logits.
    """
    check_settings(max_new_tokens, temperature, epsilon, repetition_penalty)
    attention_mask = check_prompts(idx, attention_mask)
    tokens = torch.cat((idx, idx.new_empty(idx.shape[0], max_new_tokens)), dim=1)
    if attention_mask is not None:
        new = torch.ones(idx.shape[0], max_new_tokens, dtype=torch.bool, device=idx.device)
        attention_mask = torch.cat((attention_mask, new), dim=1)
    ends = idx.new_tensor(list(eos_ids))
    finished = torch.zeros(idx.shape[0], dtype=torch.bool, device=idx.device)
    read = Reader(model, tokens.shape[1], use_cache, banned_ids)
    for end in range(idx.shape[1], tokens.shape[1]):
        mask = None if attention_mask is None else attention_mask[:, :end]
        logits = read(tokens[:, :end], mask)[0][:, -1]
        if repetition_penalty != 1.0:
            seen = tokens[:, :end] if mask is None else torch.where(mask, tokens[:, :end], tokens[:, end - 1 : end])
            logits = repetition_penalised(logits, seen, repetition_penalty)  # padding counts as the last token
        chosen = drawn = next_token(logits, temperature, epsilon, generator, filters)
        if len(ends):
            chosen = torch.where(finished, ends[0], drawn)
            finished |= torch.isin(chosen, ends)
        answers = torch.stack((all_finite(logits), finished.all()))
        found = torch.cat((chosen, answers)).cpu()  # the only wait of a step
        check_finite(logits, found[-2])
        if watch is not None:
            watch(logits, drawn)
        tokens[:, end] = chosen
        yield found[:-2]
        if found[-1]:
            return


def generate(
    model: LanguageModel,
    idx: Tensor,
    max_new_tokens: int,
    *,
    tokenizer: Tokenizer | None = None,
    stop: str | Sequence[str] = (),
    epsilon: float = DEFAULT_EPSILON,
    eta: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    typical_p: float | None = None,
    **settings: Any,
) -> Tensor:
    """Continues each prompt of idx (B, T): int64 (B, T + max_new_tokens).

    After its end, a row is filled with the first of `eos_ids`.

    tokenizer: a row ends with one of its end tokens (unless `eos_ids` are given), and no id without a piece is chosen.
    stop: texts; a row ends after one of them, which needs the tokenizer. epsilon to typical_p: see `filters_by_name`.
    settings: see `stream`, such as temperature, repetition_penalty, attention_mask, eos_ids, generator. Raises
    ValueError for settings out of range.
    """
    stops = [stop] if isinstance(stop, str) else list(stop)
    if "" in stops:
        raise ValueError("stop has an empty text, which would stop at once; leave it out")
    if tokenizer is not None:
        settings = {"eos_ids": tokenizer.stop_ids, "banned_ids": tokenizer.unused_ids} | settings
    elif stops:
        raise ValueError("stop needs the tokenizer that reads the new tokens; give tokenizer=...")
    chosen = filters_by_name(epsilon, eta, top_k, top_p, min_p, typical_p)
    settings["filters"] = [*chosen, *settings.get("filters", ())]
    ends, mask = settings.get("eos_ids", ()), settings.get("attention_mask")

    def ended(row: int, ids: list[int]) -> bool:
        if ids[-1] in ends or tokenizer is None or not stops:
            return ids[-1] in ends
        before = idx[row] if mask is None else idx[row][mask[row].bool()]
        return has_stop(tokenizer, before.tolist(), ids, stops)

    rows = until_end(stream(model, idx, max_new_tokens, epsilon=0.0, **settings), len(idx), ended)
    tokens = torch.cat((idx, idx.new_full((len(idx), max_new_tokens), (*ends, 0)[0])), dim=1)
    for row, ids in zip(tokens, rows, strict=True):
        row[idx.shape[1] : idx.shape[1] + len(ids)] = idx.new_tensor(ids)
    return tokens


def until_end(
    steps: Iterator[Tensor],
    count: int,
    ended: Callable[[int, list[int]], bool],
    tick: Callable[[int], object] = lambda tokens: None,
) -> list[list[int]]:
    """The new tokens of each of `count` rows from the steps of `stream`, up to the one with which the row ends.

    ended: given a row and its new tokens, whether it has ended. tick: called with the number of new tokens.
    """
    rows: list[list[int]] = [[] for _ in range(count)]
    going = set(range(count))
    for chosen in steps:
        for row, token in enumerate(chosen.tolist()):
            if row in going:
                rows[row].append(token)
                if ended(row, rows[row]):
                    going.discard(row)
                tick(1)
        if not going:
            break
    return rows


def has_stop(tokenizer: Tokenizer, before: list[int], ids: list[int], stops: Sequence[str]) -> bool:
    """Whether the text of `ids`, which follow the tokens `before`, contains one of the texts `stops`."""
    if not stops:
        return False
    text = tokenizer.decode(before + ids)[len(tokenizer.decode(before)) :]
    return any(stop in text for stop in stops)
