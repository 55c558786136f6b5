"""Attention with linear biases (ALiBi, arXiv 2108.12409): positions without a rotary table.

Each head subtracts its slope times the distance from the score of a query and a key, so that distant keys count less.
The distance is measured in columns, so padding on the left does not change it.
"""

from __future__ import annotations

import torch
from torch import Tensor


def alibi_slopes(heads: int) -> list[float]:
    """2^(-8 k / n) for heads k = 1 to n, a power of two; else the slopes for the next lower power of two, followed by
    every second slope for twice that power, as in the paper.
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
    """The float mask (B or 1, H, T, S) for queries `start` to `end` - 1 and keys 0 to `end` - 1, added to the scores:
    -slope * distance, or -inf where `mask` hides a key.

    mask: bool (B or 1, 1, T, S), True = attend; None: causal. Raises ValueError beyond max_seq_len.
    """
    if end > max_seq_len:
        raise ValueError(f"a sequence of {end} tokens is longer than the model's context of {max_seq_len}")
    positions = torch.arange(end, device=device)
    distance = positions[start:, None] - positions  # (T, S)
    hidden = distance < 0 if mask is None else ~mask
    slope = torch.tensor(slopes, dtype=dtype, device=device)
    return (-slope[:, None, None] * distance)[None].masked_fill(hidden, -torch.inf)
