"""Schedules of the learning rate."""

from __future__ import annotations

import math


def learning_rate(
    step: int,
    total_steps: int,
    peak: float,
    schedule: str = "constant",
    warmup_steps: int = 0,
    minimum: float = 0.0,
    decay_share: float = 1.0,
) -> float:
    """The learning rate of a step from 0 to total_steps - 1: linear warm-up, then "constant", "cosine" or "linear".

    "cosine" falls from `peak` to `minimum` at total_steps. "linear" does so along a line, in the last `decay_share` of
    the steps, and never before the warm-up ends. With a share below 1 it is warmup-stable-decay (arXiv 2404.06395).
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if schedule == "constant":
        return peak
    begin = max(warmup_steps, (1 - decay_share) * total_steps) if schedule == "linear" else warmup_steps
    progress = min(1.0, max(0.0, step - begin) / max(1, total_steps - begin))
    left = 1 - progress if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return minimum + (peak - minimum) * left
