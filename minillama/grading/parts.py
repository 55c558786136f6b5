"""The parts of the assignment, with the points of each edition, and the probes that a part is judged with.

A probe (`Case`) is a small problem drawn from a seed. `runner.run_case` puts it to a student's modules, and
`answers.answer` solves it in NumPy, without or with known mistakes. Both give arrays of the same names.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from minillama.grading import probes_model, probes_training

Arrays = dict[str, np.ndarray]
TOLERANCE = 2e-4  # of the largest value; float32 noise is some 1e-6, known mistakes differ by more than 1e-3


@dataclass(frozen=True)
class Case:
    """A probe of one part. settings: plain values, as JSON has them. arrays: float32 inputs and weights, int64 ids."""

    part: str
    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    arrays: Arrays = field(default_factory=dict)

    @property
    def tolerance(self) -> float:
        """How far a right answer may be off, as a share of the largest value; more for half precision and draws."""
        return float(self.settings.get("tolerance", TOLERANCE))


# Points for each part, in the order in which the parts build on each other.
PARTS: dict[str, dict[str, int]] = {
    "2024": {"norm": 10, "rope": 14, "scores": 14, "attention": 8, "block": 12, "model": 8}
    | {"generate": 12, "adamw": 12, "zero_shot": 4, "classifier": 6},
    "fall2025": {"norm": 8, "rope": 12, "scores": 12, "attention": 8, "block": 10, "model": 8}
    | {"generate": 10, "adamw": 12, "zero_shot": 4, "classifier": 6, "lora": 10},
    "spring2026": {"norm": 10, "rope": 14, "scores": 14, "attention": 8, "block": 12, "model": 8}
    | {"generate": 12, "adamw": 12, "zero_shot": 4, "classifier": 6},
}


PROBES: dict[str, Callable[[str, np.random.Generator], list[tuple[str, dict[str, Any], Arrays]]]] = {
    "norm": probes_model.norm,
    "rope": probes_model.rope,
    "scores": probes_model.scores,
    "attention": probes_model.attention,
    "block": probes_model.block,
    "model": probes_model.model,
    "generate": probes_training.generate,
    "adamw": probes_training.adamw,
    "zero_shot": probes_training.zero_shot,
    "classifier": probes_training.classifier,
    "lora": probes_training.lora,
}


def cases(part: str, edition: str, seed: int) -> list[Case]:
    """The probes of a part in an edition; the same seed gives the same probes. Raises KeyError for an unknown part."""
    if part not in PARTS[edition]:
        raise KeyError(f"the edition {edition} has no part {part}; its parts are {', '.join(PARTS[edition])}")
    source = np.random.default_rng([seed, zlib.crc32(f"{edition} {part}".encode())])
    return [Case(part, *probe) for probe in PROBES[part](edition, source)]


def distance(found: Arrays, wanted: Arrays) -> float:
    """The largest difference, as a share of the largest value of that array in `wanted`.

    Infinite if names or shapes differ, or if one has NaN or infinity where the other has not.
    """
    if set(found) != set(wanted):
        return float("inf")
    largest = 0.0
    for name, right in wanted.items():
        own = np.asarray(found[name], dtype=np.float64)
        if own.shape != right.shape:
            return float("inf")
        finite = np.isfinite(right)
        if not np.array_equal(own[~finite], right[~finite], equal_nan=True) or not np.isfinite(own[finite]).all():
            return float("inf")
        scale = np.abs(right[finite]).max(initial=0.0)
        difference = np.abs(own[finite] - right[finite]).max(initial=0.0)
        largest = max(largest, float(difference / max(scale, 1e-12)))
    return largest
