"""Attention with linear biases (ALiBi, arXiv 2108.12409): positions without a table.

Each head takes slope * distance off the score of a query and a key, so that what is far counts less, in some heads more
so than in others. The distance is that of their columns, which padding on the left does not change.
"""

from __future__ import annotations

import torch
from torch import Tensor


def alibi_slopes(heads: int) -> list[float]:
    """2^(-8 k / n) for the heads k = 1 to n, where n is a power of two. Where it is none: the slopes of the next lower
    power, then of twice that power every second one, from the first, as many as are missing (the paper's own choice).
    """
    power = 1 << (heads.bit_length() - 1)
    slopes = [2.0 ** (-8.0 * k / power) for k in range(1, power + 1)]
    return slopes + [2.0 ** (-8.0 * k / (2 * power)) for k in range(1, 2 * power, 2)][: heads - power]


def alibi_mask(
    visible: Tensor | None,
    slopes: list[float],
    start: int,
    end: int,
    max_seq_len: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """What is added to the scores of the queries at `start` to before `end` with the keys from 0 on: -slope * distance,
    or -inf where a key is not to be seen: (B or 1, H, T, S).

    visible: bool (B or 1, 1, T, S), True = attend; None: all that came before. Raises ValueError beyond max_seq_len.
    """
    if end > max_seq_len:
        raise ValueError(f"a sequence of {end} tokens is longer than the model's context of {max_seq_len}")
    positions = torch.arange(end, device=device)
    distance = positions[start:, None] - positions  # (T, S)
    hidden = distance < 0 if visible is None else ~visible
    slope = torch.tensor(slopes, dtype=dtype, device=device)
    return (-slope[:, None, None] * distance)[None].masked_fill(hidden, -torch.inf)
