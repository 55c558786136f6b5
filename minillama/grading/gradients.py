"""Gradients of a probe: an output can be right although no gradient reaches a weight, as after `detach`.

Both sides weigh the outputs with the same random numbers and take the derivative in the same directions: the student's
by backpropagation, the right one by differences of the second implementation. So it needs no gradients of its own.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np

Arrays = dict[str, np.ndarray]
DIRECTIONS = 3
STEP = 3e-6  # in float64, so that neither curvature nor rounding shows
# The outputs of each part that are weighed.
OUTPUTS: dict[str, tuple[str, ...]] = {
    "norm": ("output",),
    "rope": ("query", "key"),
    "scores": ("output",),
    "attention": ("output",),
    "block": ("output",),
    "model": ("hidden",),
    "classifier": ("log_probabilities",),
    "lora": ("output",),
}


def directions(name: str, shape: Sequence[int]) -> np.ndarray:
    """Random numbers for an array: (3, *shape). They depend on name and shape alone."""
    source = np.random.default_rng([zlib.crc32(name.encode()), *shape])
    return source.standard_normal((DIRECTIONS, *shape))


def derivatives(solve: Callable[[Arrays], Arrays], arrays: Arrays, part: str, names: Sequence[str]) -> Arrays:
    """The derivatives of the weighed outputs by each named array, (3,) each, by central differences.

    Zero if an output is not finite.
    """

    def weighed(name: str, change: np.ndarray) -> float:
        found = solve(arrays | {name: arrays[name] + change})
        return sum(float((found[one] * directions(one, found[one].shape)[0]).sum()) for one in OUTPUTS[part])

    found = solve(arrays)
    finite = all(np.isfinite(found[one]).all() for one in OUTPUTS[part])
    slopes = {}
    for name in names:
        ways = directions(name, arrays[name].shape) if finite else ()
        along = [(weighed(name, STEP * way) - weighed(name, -STEP * way)) / (2 * STEP) for way in ways]
        slopes[f"gradient_of_{name}"] = np.array(along) if finite else np.zeros(DIRECTIONS)
    return slopes


def weights_of_outputs(shapes: Mapping[str, Sequence[int]]) -> Arrays:
    """The numbers that outputs of these shapes are weighed with."""
    return {name: directions(name, shape)[0] for name, shape in shapes.items()}
