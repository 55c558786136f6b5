"""Text generation: logits filters, each a pure function of logits, and the decoding loop over any model.

Order: temperature, then the filter, then renormalise (softmax), then sample. A filter cuts a token by setting its logit
to -inf and always leaves the row's arg-max alive.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor


class Config(Protocol):
    """What decoding needs to know of a model's config."""

    @property
    def max_seq_len(self) -> int: ...


class LanguageModel(Protocol):
    """What decoding needs of a model: a context length, and logits (B, 1, V) of each row's last real token."""

    @property
    def config(self) -> Config: ...

    @property
    def __call__(self) -> Callable[..., tuple[Tensor, Tensor]]: ...


def epsilon_filter(logits: Tensor, epsilon: float) -> Tensor:
    """Keeps the tokens with probability >= epsilon (arXiv 2210.15191); logits (..., V) -> (..., V).

    The course's 0.05 keeps at most 20 tokens; the paper suggests 3e-4 to 9e-4. 0 keeps everything.
    """
    cut = logits.softmax(-1) < epsilon
    cut.scatter_(-1, logits.argmax(-1, keepdim=True), False)
    return logits.masked_fill(cut, -math.inf)


def next_token(logits: Tensor, temperature: float, epsilon: float, generator: torch.Generator | None = None) -> Tensor:
    """Chooses one token a row: logits (B, V) -> ids (B,). Temperature 0 takes the arg-max.

    Raises ValueError if the logits are not finite.
    """
    if not torch.isfinite(logits).all():
        raise ValueError(
            f"the model's logits ({logits.dtype}) hold NaN or infinity; damaged weights, or try --dtype fp32"
        )
    if temperature == 0.0:
        return logits.argmax(-1)
    logits = logits.float()
    # Shifted before the division: at a tiny temperature the quotients overflow, all but the likeliest one's, which is 0
    # (or 0 / 0, where the temperature itself vanishes in float32).
    logits = ((logits - logits.amax(-1, keepdim=True)) / temperature).nan_to_num(nan=0.0, neginf=-math.inf)
    probabilities = epsilon_filter(logits, epsilon).softmax(-1)
    return torch.multinomial(probabilities, 1, generator=generator).squeeze(-1)


def check_settings(max_new_tokens: int, temperature: float, epsilon: float) -> None:
    """Raises ValueError for a decoding setting out of its range."""
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be 0 or more")
    if not (0.0 <= temperature < math.inf):
        raise ValueError(f"temperature is {temperature}; it must be 0 (greedy) or a finite number above")
    if not 0.0 <= epsilon < 1.0:
        raise ValueError(f"epsilon is {epsilon}; it must be in [0, 1)")


@torch.no_grad()
def generate(
    model: LanguageModel,
    idx: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    epsilon: float = 0.05,
    attention_mask: Tensor | None = None,
    eos_id: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Continues every prompt of idx (B, T) by max_new_tokens: int64 (B, T + max_new_tokens).

    attention_mask: bool (B, T), True for real tokens; prompts of unequal length are padded on the left, so that each
    row's continuation follows its prompt (rotary positions are relative: a shift changes nothing). eos_id: a row that
    produced it goes on with nothing but eos_id, and decoding ends early, the rest filled in, once every row did. Past
    the model's context the window slides. Draws come from `generator` (on idx's device), else from torch's default one.

    Raises ValueError for an empty or right-padded prompt and for settings out of range.
    """
    check_settings(max_new_tokens, temperature, epsilon)
    if idx.dim() != 2 or 0 in idx.shape:
        raise ValueError(f"idx has shape {tuple(idx.shape)}; it must be (batch, tokens) with at least one of each")
    if attention_mask is not None:
        attention_mask = attention_mask.to(torch.bool)
        if not attention_mask[:, -1].all():
            raise ValueError("a prompt ends in padding; pad prompts of unequal length on the left")

    context = model.config.max_seq_len
    new = idx.new_empty(idx.shape[0], max_new_tokens)
    tokens = torch.cat((idx, new), dim=1)
    if attention_mask is not None:
        attention_mask = torch.cat((attention_mask, torch.ones_like(new, dtype=torch.bool)), dim=1)
    finished = torch.zeros(idx.shape[0], dtype=torch.bool, device=idx.device)
    for end in range(idx.shape[1], tokens.shape[1]):
        window = slice(max(0, end - context), end)
        mask = None if attention_mask is None else attention_mask[:, window]
        logits, _ = model(tokens[:, window], attention_mask=mask)
        chosen = next_token(logits[:, -1], temperature, epsilon, generator)
        if eos_id is not None:
            chosen = torch.where(finished, eos_id, chosen)
            finished |= chosen == eos_id
        tokens[:, end] = chosen
        if eos_id is not None and finished.all():
            tokens[:, end:] = eos_id
            break
    return tokens
