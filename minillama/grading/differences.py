"""Differences between a student's answer and the right one: how large, where, and what they depend on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from minillama.grading.parts import Case

# Names of the axes of outputs, by part or by the number of axes.
AXES: dict[str | int, tuple[str, ...]] = {
    "rope": ("row", "position", "head", "feature"),
    "scores": ("row", "head", "position", "feature"),
    3: ("row", "position", "feature"),
}


class Difference(NamedTuple):
    """The largest difference of an answer. size: as a share of the largest right value; infinite if the answer has
    another shape or is not finite. problem: that, in words. place: the index where it is. wrong: all places that
    differ. factor: got is right times this, if so.
    """

    output: str
    size: float
    problem: str = ""
    place: tuple[int, ...] = ()
    got: float = 0.0
    right: float = 0.0
    wrong: np.ndarray | None = None
    factor: float | None = None


def compared(got: dict[str, np.ndarray], right: dict[str, np.ndarray], tolerance: float) -> Difference | None:
    """The largest difference of the outputs; None if none is above the tolerance."""
    worst = None
    for name, wanted in right.items():
        found = _difference(name, got.get(name), np.asarray(wanted), tolerance)
        if found is not None and (worst is None or found.size > worst.size):
            worst = found
    return worst


def _difference(name: str, got: np.ndarray | None, right: np.ndarray, tolerance: float) -> Difference | None:
    if got is None:
        return Difference(name, np.inf, "is missing")
    if got.shape != right.shape:
        return Difference(name, np.inf, f"has the shape {shape(got)}; right is {shape(right)}")
    if got.size == 0:
        return None
    wide, wanted = got.astype(np.float64), right.astype(np.float64)
    equal = (wide == wanted) | (np.isnan(wide) & np.isnan(wanted))
    finite = np.abs(wanted[np.isfinite(wanted)])
    scale = float(finite.max()) if finite.size and finite.max() > 0 else 1.0
    with np.errstate(invalid="ignore", over="ignore"):
        away = np.where(equal, 0.0, np.abs(wide - wanted) / scale)
    away = np.where(np.isnan(away), np.inf, away)
    size = float(away.max())
    if size <= tolerance:
        return None
    index = tuple(int(i) for i in np.unravel_index(int(away.argmax()), away.shape))
    problem = ""
    if not np.isfinite(wide[index]) and np.isfinite(wanted[index]):
        problem = f"is {wide[index]} at index {shown_index(index)}"
    values = float(wide[index]), float(wanted[index])
    return Difference(name, size, problem, index, *values, away > tolerance, _factor(wide, wanted, scale, tolerance))


def _factor(got: np.ndarray, right: np.ndarray, scale: float, tolerance: float) -> float | None:
    """The number c for which got = c * right, if there is one and the output has several values."""
    if got.size < 3 or not np.isfinite(got).all() or not np.isfinite(right).all():
        return None
    factor = float((got * right).sum() / max((right * right).sum(), 1e-300))
    fits = np.abs(got - factor * right).max() <= max(tolerance, 1e-6) * scale
    return factor if fits and abs(factor) > 1e-9 else None


def described(difference: Difference, case: Case, part: str) -> str:
    """The difference as sentences for the student."""
    output, probe = f"'{difference.output}'", f"on the probe '{case.name}'"
    if difference.problem:
        return f"{output} {difference.problem}, {probe}."
    if difference.factor is not None:
        return f"{output} is the right answer times {difference.factor:.4g}, {probe}."
    place = f" at index {shown_index(difference.place)}" if difference.place else ""
    text = f"{output} is {difference.got:.5g} instead of {difference.right:.5g}{place}, {probe}"
    text += f" (the largest difference, {difference.size:.1e} of the largest value)."
    return " ".join(filter(None, (text, _only_at(difference.wrong, part))))


def _only_at(wrong: np.ndarray | None, part: str) -> str:
    """Where the wrong values are, if they are not everywhere: the axis that tells most."""
    if wrong is None or wrong.all() or not wrong.ndim:
        return ""
    names = AXES.get(part, AXES.get(wrong.ndim, ()))
    names = names if len(names) == wrong.ndim else tuple(f"axis {i}, index" for i in range(wrong.ndim))
    found = []
    for axis, name in enumerate(names):
        hit = np.asarray(wrong.any(tuple(i for i in range(wrong.ndim) if i != axis)))
        if hit.all() or len(hit) < 2:
            continue
        places = np.flatnonzero(hit).tolist()
        if places == list(range(places[0], len(hit))) and len(places) > 1:
            words = f"from {name} {places[0]} on"
        elif len(places) > 1 and places == list(range(places[-1] + 1)):
            words = f"up to {name} {places[-1]}"
        else:
            words = f"at {name} {', '.join(map(str, places[:6]))}{' ...' if len(places) > 6 else ''}"
        found.append((int(hit.sum()) / len(hit), words))
    return f"It is wrong only {min(found)[1]} (counted from 0)." if found else ""


def only_where(failing: Sequence[Case], passing: Sequence[Case]) -> str:
    """What the failing probes have in common that the others lack, as a sentence."""
    if not passing:
        return ""
    first, second = ([features(case) for case in group] for group in (failing, passing))
    for name in first[0]:
        if not all(name in one for one in (*first, *second)):
            continue
        bad, good = [one[name] for one in first], [one[name] for one in second]
        if isinstance(bad[0], bool | str):
            if len(set(bad)) == 1 and bad[0] not in good:
                if isinstance(bad[0], str):
                    return f"This happens only with {name} {bad[0]}."
                return f"This happens only {'with' if bad[0] else 'without'} {name}."
        elif min(bad) > max(good):
            return f"This happens only with {name} of {min(bad):g} or more; {max(good):g} is right."
        elif max(bad) < min(good):
            return f"This happens only with {name} of {max(bad):g} or less; {min(good):g} is right."
    names = ", ".join(f"'{case.name}'" for case in passing[:4])
    return f"The probes {names} are right." if len(passing) > 1 else f"The probe {names} is right."


def features(case: Case) -> dict[str, Any]:
    """What may matter for a probe: settings, and what follows from them and from the shapes."""
    settings = case.settings
    found: dict[str, Any] = {}
    if isinstance(heads := settings.get("n_heads"), int) and isinstance(shared := settings.get("n_kv_heads"), int):
        found["grouped heads (n_kv_heads < n_heads)"] = shared < heads
    first = next((array for array in case.arrays.values() if array.ndim > 1), None)
    if first is not None:
        found["more than one row in the batch"] = first.shape[0] > 1
        found["an odd number of positions"] = first.shape[1] % 2 == 1
    for name, value in settings.items():
        if name != "tolerance" and isinstance(value, bool | int | float | str):
            found[name] = value
    return found


def shape(array: np.ndarray) -> str:
    return str(tuple(array.shape))


def shown_index(index: tuple[int, ...]) -> str:
    return f"({', '.join(map(str, index))})" if len(index) != 1 else str(index[0])
