"""Differences between a student's answer and the right one: how large, where, and what they depend on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from minillama.grading.parts import Case

# Names of the axes of outputs, by output, by part or by the number of axes. Other axes have numbers.
AXES: dict[str | int, tuple[str, ...]] = {
    "frequencies": ("row", "token"),
    "drawn": ("row", "token"),
    "tokens": ("row", "position"),
    "rope": ("row", "position", "head", "feature"),
    "scores": ("row", "head", "position", "feature"),
    "adamw": ("step", "parameter"),
    "zero_shot": ("row", "label"),
    "log_probabilities": ("row", "label"),
    3: ("row", "position", "feature"),
}
# Outputs that say nothing when they are right.
SIDE = ("bytes", "input_afterwards", "trainable")
# Settings that say nothing, or follow from others.
UNTOLD = ("tolerance", "dim", "hidden_dim", "vocab_size", "multiple_of", "draws", "at_epsilon")
MOST = 3  # features to tell
HALVES = {"bfloat16": 8, "float16": 11}  # significant bits


class Difference(NamedTuple):
    """The largest difference of an answer. size: as a share of the largest right value; infinite if the answer has
    another shape or is not finite. problem: that, in words. place: the index where it is. wrong: all places that
    differ. factor: got is right times this, if so. rounded: the half precision that all values of the answer have, if
    so. others: outputs that are right.
    """

    output: str
    size: float
    problem: str = ""
    place: tuple[int, ...] = ()
    got: float = 0.0
    right: float = 0.0
    wrong: np.ndarray | None = None
    factor: float | None = None
    rounded: str = ""
    others: tuple[str, ...] = ()


def compared(got: dict[str, np.ndarray], right: dict[str, np.ndarray], tolerance: float) -> Difference | None:
    """The largest difference of the outputs, of gradients only if no other is wrong; None if all are right."""
    differences = {
        name: _difference(name, got.get(name), np.asarray(wanted), tolerance) for name, wanted in right.items()
    }
    found = [difference for difference in differences.values() if difference is not None]
    if not found:
        return None
    others = [name for name, one in differences.items() if one is None and name not in SIDE]
    worst = max(found, key=lambda one: (not one.output.startswith("gradient_of_"), one.size))
    return worst._replace(others=tuple(name for name in others if not name.startswith("gradient_of_")))


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
    factor = _factor(wide, wanted, scale, tolerance)
    return Difference(name, size, problem, index, *values, away > tolerance, factor, _rounded(wide, wanted, size))


def _factor(got: np.ndarray, right: np.ndarray, scale: float, tolerance: float) -> float | None:
    """The number c for which got = c * right, if there is one and the output has several values."""
    if got.size < 3 or not np.isfinite(got).all() or not np.isfinite(right).all():
        return None
    factor = float((got * right).sum() / max((right * right).sum(), 1e-300))
    fits = np.abs(got - factor * right).max() <= max(tolerance, 1e-6) * scale
    return factor if fits and abs(factor) > 1e-9 else None


def _rounded(got: np.ndarray, right: np.ndarray, size: float) -> str:
    """The half precision in which all values of an answer are, if it is near the right one and that is not."""

    def all_in(values: np.ndarray, bits: int) -> bool:
        fractions = np.frexp(values)[0] * 2.0**bits
        return bool((fractions == np.round(fractions)).all())

    if got.size < 4 or size > 0.02 or not np.isfinite(got).all():
        return ""
    return next((name for name, bits in HALVES.items() if all_in(got, bits) and not all_in(right, bits)), "")


def described(difference: Difference, case: Case) -> str:
    """The largest difference of a probe, as a sentence for the student."""
    output, probe = f"'{difference.output}'", f"on the probe '{case.name}'"
    if difference.problem:
        return f"{output} {difference.problem}, {probe}."
    if difference.factor is not None:
        return f"{output} is the right answer times {difference.factor:.4g}, {probe}."
    place = f" at index {shown_index(difference.place)}" if difference.place else ""
    text = f"{output} is {difference.got:.5g} instead of {difference.right:.5g}{place}, {probe}"
    text += f" (the largest difference, {difference.size:.1e} of the largest value)."
    if difference.rounded:
        text += f" All its values are numbers of {difference.rounded}: compute it in float32."
    return text


def only_at(differences: Sequence[Difference], failing: Sequence[Case], part: str) -> str:
    """Where the wrong values are, if they are not everywhere, as a sentence. It is true of all failing probes."""
    if not differences or any(difference.wrong is None for difference in differences):
        return ""
    said = [places(difference, case, part) for difference, case in zip(differences, failing, strict=True)]
    found = []
    for name in said[0]:
        shares = [one[name][0] for one in said if name in one]
        words = [words for words in said[0][name][1] if all(name in one and words in one[name][1] for one in said)]
        if words and min(shares) < 1.0:
            found.append((min(shares), words[0]))
    return f"It is wrong only {' and '.join(words for _, words in sorted(found))} (counted from 0)." if found else ""


def places(difference: Difference, case: Case, part: str) -> dict[str, tuple[float, list[str]]]:
    """For each axis, by name: the share of its indices that are wrong, and all that is true of these."""
    wrong = difference.wrong
    assert wrong is not None
    keys = (part, difference.output, wrong.ndim)
    names = next((AXES[key] for key in keys if key in AXES and len(AXES[key]) <= wrong.ndim), ())
    names = (*names, *(f"axis {i}, index" for i in range(len(names), wrong.ndim)))
    found = {}
    for axis, name in enumerate(names):
        hit = np.asarray(wrong.any(tuple(i for i in range(wrong.ndim) if i != axis)))
        found[name] = float(hit.mean()), sentences_about(np.flatnonzero(hit).tolist(), len(hit), name, case)
    return found


def sentences_about(at: list[int], length: int, name: str, case: Case) -> list[str]:
    """All that is true of these of `length` indices, the simplest first."""
    said = []
    if name == "parameter":
        start = 0
        for i, group in enumerate(case.settings["groups"]):
            if at == list(range(start, start + group["count"])):
                said.append(f"in parameter group {i}")
            start += group["count"]
    said += [f"at {name} {at[0]}"] if len(at) == 1 else []
    said += [f"at the last {name}"] if at == [length - 1] else []
    said += [f"from {name} {at[0]} on"] if at == list(range(at[0], length)) else []
    said += [f"up to {name} {at[-1]}"] if at == list(range(at[-1] + 1)) else []
    said += [f"at the last {len(at)} {name}s"] if at == list(range(at[0], length)) else []
    for word, first in (("even", 0), ("odd", 1)):
        said += [f"at {word} {name}s"] if length > 2 and at == list(range(first, length, 2)) else []
    return [*said, f"at {name} {', '.join(map(str, at[:6]))}{' ...' if len(at) > 6 else ''}"]


def right_outputs(differences: Sequence[Difference]) -> str:
    """The outputs that are right on all failing probes, as a sentence."""
    first = differences[0].others if differences else ()
    names = [f"'{name}'" for name in first if all(name in one.others for one in differences)]
    words = " and ".join(filter(None, (", ".join(names[:-1]), *names[-1:])))
    return f"{words} {'are' if len(names) > 1 else 'is'} right." if names else ""


def only_where(failing: Sequence[Case], passing: Sequence[Case]) -> str:
    """Features that the failing probes have in common that the others lack, as a sentence.

    Probes in which dropout drops everything say nothing, so they do not count as others.
    """
    passing = [case for case in passing if not case.settings.get("training")]
    if not passing:
        return ""
    first, second = ([features(case) for case in group] for group in (failing, passing))
    found = []
    for name in first[0]:
        if not all(name in one for one in (*first, *second)):
            continue
        bad, good = [one[name] for one in first], [one[name] for one in second]
        if isinstance(bad[0], bool | str):
            if len(set(bad)) == 1 and bad[0] not in good:
                word = "with" if bad[0] else "without"
                found.append(f"{word} {name} {bad[0]}" if isinstance(bad[0], str) else f"{word} {name}")
        elif min(bad) > max(good):
            found.append(f"with {name} of {min(bad):g} or more ({max(good):g} is right)")
        elif max(bad) < min(good):
            found.append(f"with {name} of {max(bad):g} or less ({min(good):g} is right)")
    if found:
        which = "; the probes do not tell which" if len(found) > 1 else ""
        return f"This happens only {' or only '.join(found[:MOST])}{which}."
    names = ", ".join(f"'{case.name}'" for case in passing[:4])
    return f"The probes {names} are right." if len(passing) > 1 else f"The probe {names} is right."


def features(case: Case) -> dict[str, Any]:
    """Features of a probe that may matter: settings, and what follows from them and from the shapes."""
    settings = case.settings | case.settings.get("defaults", {})
    found: dict[str, Any] = {}
    if isinstance(heads := settings.get("n_heads"), int) and isinstance(shared := settings.get("n_kv_heads"), int):
        found["grouped heads (n_kv_heads < n_heads)"] = shared < heads
        found["several key/value heads, each of several heads"] = 1 < shared < heads
    if isinstance(groups := settings.get("groups"), list):
        found["more than one parameter group"] = len(groups) > 1
    if isinstance(without := settings.get("without_gradient"), list):
        found["a parameter without gradient"] = bool(without or settings["late"])
        found["a parameter without its first gradient"] = bool(settings["late"])
        found["parameters that are vectors"] = case.arrays["parameters"].ndim == 2
    if "max_grad_norm" in settings:
        found["max_grad_norm"] = settings["max_grad_norm"] is not None
    if isinstance(labels := settings.get("label_ids"), list):
        found["number of labels"] = len(labels)
    given = next((case.arrays[name] for name in ("x", "query", "tokens", "prompt") if name in case.arrays), None)
    if given is not None and "draws" not in settings:
        if given.dtype.kind == "i":
            found["the token 0 in the input"] = bool((given == 0).any())
        else:
            found["a standard deviation of the input"] = float(f"{given.std():.1g}")
        found["more than one row in the batch"] = given.shape[0] > 1
        at = 2 if case.part == "scores" else 1
        found["an odd number of positions"] = given.shape[at] % 2 == 1
        found["number of positions"] = given.shape[at]
    for name, value in settings.items():
        if name not in UNTOLD and isinstance(value, bool | int | float | str):
            found.setdefault(name, value)
    return found


def shape(array: np.ndarray) -> str:
    return str(tuple(array.shape))


def shown_index(index: tuple[int, ...]) -> str:
    return f"({', '.join(map(str, index))})" if len(index) != 1 else str(index[0])
