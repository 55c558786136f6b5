"""The second implementation: our modules, and a solution in the course's form, give its answers to every probe."""

from __future__ import annotations

from importlib import import_module

import numpy as np
import pytest

from course_student import student_modules
from minillama.grading.answers import answer
from minillama.grading.calls import rule_arguments
from minillama.grading.kit_setups import PARTS, PLAIN
from minillama.grading.parts import TOLERANCE, Case, cases, distance
from minillama.grading.runner import run_case

OURS = ("config", "rope", "llama", "optimizer", "classifier", "lora")
NOISE = 2e-5  # of float32; half precision and draws have tolerances of their own
EVERY = [(edition, part) for edition in PARTS for part in PARTS[edition]]
RUNS = [  # of torch; draws take seconds
    pytest.param(*one, marks=pytest.mark.slow if one[1] == "generate" and one[0] != "fall2025" else []) for one in EVERY
]


@pytest.mark.parametrize(("edition", "part"), RUNS)
def test_our_modules_give_the_right_answer(edition, part):
    modules = {name: import_module(name) for name in OURS}
    for case in cases(part, PLAIN[edition], seed=3):
        bound = NOISE if case.tolerance == TOLERANCE else case.tolerance
        assert distance(run_case(case, modules), answer(case)) < bound, case.name


@pytest.mark.parametrize(("edition", "part"), RUNS)
def test_a_solution_in_the_form_of_the_course_gives_the_right_answer(edition, part):
    modules = student_modules(PLAIN[edition])
    for case in cases(part, PLAIN[edition], seed=4):
        bound = NOISE if case.tolerance == TOLERANCE else case.tolerance
        assert distance(run_case(case, modules), answer(case)) < bound, case.name


@pytest.mark.parametrize(
    ("signature", "rule", "wanted"),
    [
        ("epsilon=0.05, **more", "temperature", {"epsilon": 0.0}),
        ("epsilon=0.05, **more", "top_p", {"top_p": 0.4, "epsilon": 0.0}),
        ("epsilon=0.05, **more", "epsilon", {"epsilon": 0.4}),
        ("epsilon=0.05, top_p=0.9, min_p=0.1", "top_p", {"top_p": 0.4, "epsilon": 0.0, "min_p": 0.0}),
        ("epsilon=0.05, top_p=0.9", "min_p", {"epsilon": 0.0, "top_p": 1.0}),
        ("**more", "min_p", {"min_p": 0.4}),
        ("epsilon=0.05", "epsilon", {"epsilon": 0.4}),
        ("epsilon=0.05", "temperature", {}),  # a solution of another variant, which must fail
        ("top_p=0.95", "epsilon", {}),
        ("top_k=None", "temperature", {}),
    ],
)
def test_a_generate_that_knows_several_rules_is_told_which_applies(signature, rule, wanted):
    names = {}
    exec(f"def generate(idx, max_new_tokens, temperature=1.0, {signature}): ...", names)
    assert rule_arguments(names["generate"], {"sampling": rule, rule: 0.4}) == wanted


@pytest.mark.parametrize(("edition", "part"), EVERY)
def test_the_seed_decides_the_probes(edition, part):
    first, again, other = (cases(part, PLAIN[edition], seed) for seed in (1, 1, 2))
    for one, same in zip(first, again, strict=True):
        assert (one.name, one.settings) == (same.name, same.settings)
        assert all(np.array_equal(one.arrays[name], same.arrays[name]) for name in one.arrays)
    changed = [
        any(not np.array_equal(one.arrays[name], two.arrays.get(name)) for name in one.arrays)
        for one, two in zip(first, other, strict=True)
    ]
    assert sum(changed) > len(changed) / 2


def test_points_of_each_edition_are_a_hundred():
    assert {edition: sum(points.values()) for edition, points in PARTS.items()} == dict.fromkeys(PARTS, 100)


def test_an_unknown_part_is_refused():
    with pytest.raises(KeyError, match="has no part lora"):
        cases("lora", PLAIN["2024"], 0)


def test_a_mistake_of_another_part_is_refused():
    with pytest.raises(ValueError, match="a mistake of the part rope"):
        answer(cases("norm", PLAIN["fall2025"], 0)[0], {"rope.swapped"})


def test_distance_is_relative_and_infinite_for_other_shapes():
    right = {"output": np.array([1.0, -4.0])}
    assert distance({"output": np.array([1.0, -3.0])}, right) == 0.25
    assert distance({"output": np.zeros((1, 2))}, right) == np.inf
    assert distance({"output": np.array([np.nan, -4.0])}, right) == np.inf
    assert distance({"output": np.array([np.nan, 1.0])}, {"output": np.array([np.nan, 1.0])}) == 0.0
    assert distance({}, right) == np.inf


def test_an_answer_that_is_no_tensor_is_told():
    changed = student_modules(PLAIN["fall2025"], ("return output.type_as(input)", "pass"))
    with pytest.raises((TypeError, AttributeError), match="NoneType"):
        run_case(cases("norm", PLAIN["fall2025"], 0)[0], changed)


def test_a_parameter_of_another_name_is_told():
    changed = student_modules(PLAIN["fall2025"], ("self.bias = nn.Parameter(torch.zeros(dim))", "self.bias = 0.0"))
    with pytest.raises(AttributeError, match="LayerNorm has no parameter bias"):
        run_case(Case("norm", "one", *_norm_probe()), changed)


def _norm_probe():
    case = cases("norm", PLAIN["fall2025"], 0)[0]
    return case.settings, case.arrays
