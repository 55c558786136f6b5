"""Schedules of the learning rate."""

from __future__ import annotations

import math


def learning_rate(
    step: int, total_steps: int, peak: float, schedule: str = "constant", warmup_steps: int = 0, minimum: float = 0.0
) -> float:
    """The learning rate of a step from 0 to total_steps - 1: linear warm-up, then "constant" or "cosine".

    "cosine" falls from `peak` to `minimum` at total_steps.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if schedule == "constant":
        return peak
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return minimum + 0.5 * (peak - minimum) * (1 + math.cos(math.pi * min(1.0, progress)))
