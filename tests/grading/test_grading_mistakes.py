"""The known mistakes: a student who makes one gives its answer, and their answers can be told apart."""

from __future__ import annotations

import numpy as np
import pytest

from course_student import student_modules
from minillama.grading import mistakes_model, mistakes_training
from minillama.grading.answers import answer
from minillama.grading.mistakes import MISTAKES, can_be_together, mistakes_of, pairs_of
from minillama.grading.parts import PARTS, TOLERANCE, Case, cases, distance
from minillama.grading.runner import run_case
from student_mistakes import CHANGES, OTHER_CHANGES

NEWEST = "fall2025"
EVERY = [(NEWEST, part) for part in PARTS[NEWEST]] + [
    pytest.param(edition, part, marks=[] if part in ("norm", "scores", "generate") else pytest.mark.slow)
    for edition in PARTS
    if edition != NEWEST
    for part in PARTS[edition]
]
STUDENTS = [  # each mistake of generation draws 100,000 rows four times
    pytest.param(edition, part, marks=pytest.mark.slow if part == "generate" or edition != NEWEST else [])
    for edition in PARTS
    for part in PARTS[edition]
]
APART = 5.0  # tolerances between two answers, so that one of them alone fits a student's
APART_OF_DRAWS = 2.1


def same_answers(part: str, edition: str, seed: int) -> list[tuple[tuple[str, ...], tuple[str, ...]]]:
    """The pairs of mistakes, sets of none, one or two, whose answers are too near to each other on every probe."""
    probes = cases(part, edition, seed)
    known = [(), *((one.name,) for one in mistakes_of(part, edition))]
    known += [(one.name, other.name) for one, other in pairs_of(part, edition)]
    answers = [[answer(case, names) for case in probes] for names in known]
    kinds: dict[tuple, list[int]] = {}  # by shape and by what is not finite; others differ anyway
    for i, found in enumerate(answers):
        kind = [(name, a.shape, np.isfinite(a).tobytes()) for one in found for name, a in sorted(one.items())]
        kinds.setdefault(tuple(kind), []).append(i)
    same = []
    for members in kinds.values():
        nearest = np.zeros((len(members), len(members)))
        for k, case in enumerate(probes):
            for name in answers[members[0]][k]:
                values = np.stack([answers[i][k][name].ravel() for i in members])
                values = np.where(np.isfinite(values), values, 0.0)
                scales = np.maximum(np.abs(values).max(1), 1e-12)
                bound = case.tolerance * (APART_OF_DRAWS if "draws" in case.settings else APART)
                for row, scale in enumerate(scales):
                    away = np.abs(values - values[row]).max(1) / np.maximum(scales, scale) / bound
                    nearest[row] = np.maximum(nearest[row], away)
        for row, column in np.argwhere(np.triu(nearest < 1.0, 1)):
            same.append((known[members[row]], known[members[column]]))
    return same


@pytest.mark.parametrize(("edition", "part"), EVERY)
def test_mistakes_and_pairs_of_them_differ_from_the_right_answer_and_from_each_other(edition, part):
    assert same_answers(part, edition, seed=1) == []


def named(case_answers, part, edition, probes) -> list[tuple[str, ...]]:
    """The known mistakes that give these answers."""
    found = []
    for one in mistakes_of(part, edition):
        if all(
            distance(own, answer(case, {one.name})) <= case.tolerance
            for own, case in zip(case_answers, probes, strict=True)
        ):
            found.append(one.name)
    return found


@pytest.mark.parametrize(("edition", "part"), STUDENTS)
def test_a_student_who_makes_the_mistake_gives_its_answer_and_no_other(edition, part):
    probes = cases(part, edition, seed=5)
    wrong = {}
    for mistake in mistakes_of(part, edition):
        if edition == "2024" and part == "norm" and mistake.name in _written_for_layer_norm():
            continue
        modules = student_modules(edition, *OTHER_CHANGES.get((mistake.name, edition), CHANGES[mistake.name]))
        answers = [run_case(case, modules) for case in probes]
        if (found := named(answers, part, edition, probes)) != [mistake.name]:
            wrong[mistake.name] = found
    assert wrong == {}


def _written_for_layer_norm() -> set[str]:
    """The mistakes whose change is in the text of LayerNorm; RMSNorm's are tested by the two of its own."""
    return {one.name for one in mistakes_of("norm", "2024")} - {"norm.layer_norm", "norm.centred_variance"}


def test_each_mistake_is_written_down_as_a_student_would():
    assert set(CHANGES) == set(MISTAKES)


def test_each_mistake_has_what_a_student_needs():
    for mistake in MISTAKES.values():
        assert mistake.sentence.endswith(".") and 20 < len(mistake.sentence) < 160, mistake.name
        assert mistake.sentence.isascii() and mistake.formula and ".py" in mistake.place
        assert mistake.slots and set(mistake.editions) <= set(PARTS)
        assert all(mistake.part in PARTS[edition] for edition in mistake.editions)


def test_pairs_that_hide_each_other_are_known_mistakes():
    for part, one, other in mistakes_model.APART | mistakes_training.APART:
        first, second = MISTAKES[f"{part}.{one}"], MISTAKES[f"{part}.{other}"]
        assert not first.slots & second.slots and not can_be_together(first, second)


def test_two_mistakes_in_one_place_are_no_pair():
    assert not can_be_together(MISTAKES["norm.no_eps"], MISTAKES["norm.eps_outside"])
    assert can_be_together(MISTAKES["norm.no_eps"], MISTAKES["norm.unbiased"])
    assert not can_be_together(MISTAKES["norm.no_eps"], MISTAKES["rope.swapped"])


def test_tolerances_are_above_the_noise():
    assert TOLERANCE >= 1e-4
    assert all(isinstance(case, Case) and case.tolerance <= 0.025 for case in cases("generate", NEWEST, 0))
