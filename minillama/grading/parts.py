"""The probes that the parts of the assignment are judged with.

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
from minillama.grading.kit_setups import Setup

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


PROBES: dict[str, Callable[[Setup, np.random.Generator], list[tuple[str, dict[str, Any], Arrays]]]] = {
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


def cases(part: str, setup: Setup, seed: int) -> list[Case]:
    """The probes of a part in a setup; the same seed gives the same probes. Raises KeyError for an unknown part.

    Their setting "switches" names the known mistakes that are right in this setup.
    """
    if part not in setup.parts:
        raise KeyError(f"the edition {setup.edition} has no part {part}; its parts are {', '.join(setup.parts)}")
    source = np.random.default_rng([seed, zlib.crc32(f"{setup.edition} {part}".encode())])
    probes = PROBES[part](setup, source)
    return [Case(part, name, {"switches": setup.switches} | settings, arrays) for name, settings, arrays in probes]


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
