"""The known mistakes: a student who makes one gives its answer, and their answers can be told apart."""

from __future__ import annotations

import numpy as np
import pytest

from minillama.grading import mistakes_model, mistakes_training
from minillama.grading.answers import answer
from minillama.grading.kit_setups import PARTS, PLAIN, VARIANTS, Setup, find_setup
from minillama.grading.mistakes import MISTAKES, PLACES, can_be_together, mistakes_of, pairs_of, right_formula
from minillama.grading.parts import TOLERANCE, Case, cases, distance
from minillama.grading.runner import run_case
from student_mistakes import CHANGES, student_with

NEWEST = "fall2025"
# Setups that differ from the plain editions in a part: the place of eps, the rotation, the rule min_p.
OTHERS = [
    (Setup("fall2025", "layernorm", "outside", "halves", "plus", "min_p"), ("norm", "rope", "generate")),
    (Setup("2024", "rmsnorm", "outside", "interleaved", "minus", "epsilon"), ("norm", "rope")),
    (Setup("fall2025", "layernorm", "inside", "halves", "minus", "epsilon"), ("rope",)),
]
OF_VARIANTS = [(setup, part) for setup, parts in OTHERS for part in parts]
EVERY = (
    [(PLAIN[NEWEST], part) for part in PARTS[NEWEST]]
    + OF_VARIANTS
    + [
        pytest.param(PLAIN[edition], part, marks=[] if part in ("norm", "scores", "generate") else pytest.mark.slow)
        for edition in PARTS
        if edition != NEWEST
        for part in PARTS[edition]
    ]
)
STUDENTS = [  # each mistake of generation draws 100,000 rows four times
    pytest.param(setup, part, marks=pytest.mark.slow if part == "generate" or slow else [])
    for setup, part, slow in [(PLAIN[edition], part, edition != NEWEST) for edition in PARTS for part in PARTS[edition]]
    + [(setup, part, False) for setup, part in OF_VARIANTS]
]
KNOWN_WORDS = frozenset().union(*(find_setup(edition, n).words for edition in PARTS for n in range(VARIANTS)))
APART = 5.0  # tolerances between two answers, so that one of them alone fits a student's
APART_OF_DRAWS = 2.1


def same_answers(part: str, setup: Setup, seed: int) -> list[tuple[tuple[str, ...], tuple[str, ...]]]:
    """The pairs of mistakes, sets of none, one or two, whose answers are too near to each other on every probe."""
    probes = cases(part, setup, seed)
    known = [(), *((one.name,) for one in mistakes_of(part, setup))]
    known += [(one.name, other.name) for one, other in pairs_of(part, setup)]
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


@pytest.mark.parametrize(("setup", "part"), EVERY, ids=str)
def test_mistakes_and_pairs_of_them_differ_from_the_right_answer_and_from_each_other(setup, part):
    assert same_answers(part, setup, seed=1) == []


def named(case_answers, part, setup, probes) -> list[tuple[str, ...]]:
    """The known mistakes that give these answers."""
    found = []
    for one in mistakes_of(part, setup):
        if all(
            distance(own, answer(case, {one.name})) <= case.tolerance
            for own, case in zip(case_answers, probes, strict=True)
        ):
            found.append(one.name)
    return found


@pytest.mark.parametrize(("setup", "part"), STUDENTS, ids=str)
def test_a_student_who_makes_the_mistake_gives_its_answer_and_no_other(setup, part):
    probes = cases(part, setup, seed=5)
    wrong = {}
    for mistake in mistakes_of(part, setup):
        if not is_written_down(mistake.name, setup):
            continue
        answers = [run_case(case, student_with(mistake, setup)) for case in probes]
        if (found := named(answers, part, setup, probes)) != [mistake.name]:
            wrong[mistake.name] = found
    assert wrong == {}


def is_written_down(name: str, setup: Setup) -> bool:
    """Whether a mistake's change fits a setup's text. Those of the norm are in LayerNorm's, but for two; `over_heads`
    is in the text of interleaved pairs that turn forwards.
    """
    if name.startswith("norm.") and setup.norm == "rmsnorm":
        return name in ("norm.layer_norm", "norm.centred_variance")
    return name != "rope.over_heads" or (setup.pairing, setup.sign) == ("interleaved", "plus")


def test_each_mistake_is_written_down_as_a_student_would():
    assert set(CHANGES) == {name for name in MISTAKES if not name.endswith("_sampling")}


def test_each_mistake_has_what_a_student_needs():
    for mistake in MISTAKES.values():
        assert mistake.sentence.endswith(".") and 20 < len(mistake.sentence) < 160, mistake.name
        assert mistake.sentence.isascii() and ".py" in PLACES[mistake.part] and mistake.slots
        assert mistake.words <= KNOWN_WORDS, mistake.name


def test_a_mistake_belongs_to_a_setup_by_its_words():
    names = {one.name for setup in map(PLAIN.get, PARTS) for part in setup.parts for one in mistakes_of(part, setup)}
    assert set(MISTAKES) - names == {
        *("norm.eps_inside", "rope.interleaved", "rope.stacked", "rope.plus_sign"),
        *("generate.no_min_p", "generate.min_p_absolute", "generate.min_p_below"),
    }
    other = Setup("2024", "layernorm", "outside", "halves", "minus", "min_p")
    names = {one.name for part in other.parts for one in mistakes_of(part, other)}
    assert {"norm.rms_norm", "norm.eps_inside", "rope.interleaved", "rope.plus_sign", "generate.no_min_p"} <= names
    assert not {"norm.layer_norm", "norm.eps_outside", "rope.split_halves", "rope.wrong_sign"} & names
    assert not {"generate.no_epsilon", "generate.no_top_p", "generate.min_p_sampling", "scores.not_causal"} & names


def test_formulas_are_those_of_the_setup():
    setup = Setup("spring2026", "rmsnorm", "outside", "halves", "minus", "min_p")
    assert right_formula("norm", setup) == "x / (sqrt(mean(x^2)) + eps) * weight over the last axis"
    assert right_formula("norm", PLAIN["fall2025"]) == (
        "(x - mean) / sqrt(variance + eps) * weight + bias over the last axis"
    )
    assert "features i and i + hd/2" in right_formula("rope", setup) and "-position" in right_formula("rope", setup)
    assert "min_p times the largest" in right_formula("generate", setup) and "mask" in right_formula("scores", setup)
    assert all(right_formula(part, PLAIN[edition]) for edition in PARTS for part in PARTS[edition])


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
    assert all(isinstance(case, Case) and case.tolerance <= 0.025 for case in cases("generate", PLAIN[NEWEST], 0))
