"""Attention with linear biases (ALiBi, arXiv 2108.12409): positions without a rotary table.

Each head subtracts slope * distance from the score of a query and a key, with a slope of its own, so that distant keys
count less. The distance is that of their columns, which padding on the left does not change.
"""

from __future__ import annotations

import torch
from torch import Tensor


def alibi_slopes(heads: int) -> list[float]:
    """2^(-8 k / n) for the heads k = 1 to n, if n is a power of two. If not, as in the paper: the slopes of the next
    lower power of two, then every second slope of twice that power.
    """
    power = 1 << (heads.bit_length() - 1)
    slopes = [2.0 ** (-8.0 * k / power) for k in range(1, power + 1)]
    return slopes + [2.0 ** (-8.0 * k / (2 * power)) for k in range(1, 2 * power, 2)][: heads - power]


def alibi_mask(
    mask: Tensor | None,
    slopes: list[float],
    start: int,
    end: int,
    max_seq_len: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """The biases of the queries at positions `start` to `end` - 1 over the keys before `end`: -slope * distance, or
    -inf where the mask hides a key; float (B or 1, H, T, S), to be added to the scores.

    mask: bool (B or 1, 1, T, S), True = attend; None: causal. Raises ValueError beyond max_seq_len.
    """
    if end > max_seq_len:
        raise ValueError(f"a sequence of {end} tokens is longer than the model's context of {max_seq_len}")
    positions = torch.arange(end, device=device)
    distance = positions[start:, None] - positions  # (T, S)
    hidden = distance < 0 if mask is None else ~mask
    slope = torch.tensor(slopes, dtype=dtype, device=device)
    return (-slope[:, None, None] * distance)[None].masked_fill(hidden, -torch.inf)
