"""The judge: names known mistakes, locates unknown ones, and judges later parts although an early one fails."""

from __future__ import annotations

import numpy as np
import pytest

from conftest import ROOT
from minillama.grading import judge as judging
from minillama.grading.differences import compared, described, only_where
from minillama.grading.judge import EMPTY, ERROR, RIGHT, STOPPED, WRONG, Judgement, verdict_on
from minillama.grading.kit_setups import PARTS, PLAIN, Assignment
from minillama.grading.mistakes import MISTAKES
from minillama.grading.parts import Case
from minillama.grading.reading import unimplemented
from minillama.grading.sandbox import Problem, Run

EDITION, SEED = "fall2025", 0
ASSIGNMENT = Assignment(PLAIN[EDITION], SEED, PARTS[EDITION])


def answers_with(part, *mistakes, noise=1e-6):
    """The answers of a student with these mistakes, in float32."""
    source = np.random.default_rng(1)
    run = Run(done=True)
    for i in range(len(judging.probes(part, PLAIN[EDITION], SEED)[0])):
        arrays = judging.mistaken(part, PLAIN[EDITION], SEED, i, frozenset(mistakes))
        run.answers[i] = {
            name: (array * (1 + noise * source.standard_normal(array.shape) * (array.size > 9))).astype(np.float32)
            for name, array in arrays.items()
        }
    return run


def verdict(part, run, folder=ROOT, replaced=()):
    return verdict_on(part, ASSIGNMENT, run, folder, replaced)


@pytest.mark.parametrize("part", PARTS[EDITION])
def test_right_answers_get_all_points(part):
    found = verdict(part, answers_with(part))
    assert (found.word, found.points) == (RIGHT, PARTS[EDITION][part])


@pytest.mark.parametrize(
    "names",
    [
        ("norm.unbiased",),
        ("rope.split_halves",),
        ("scores.softmax_over_queries",),
        ("block.post_norm",),
        ("adamw.decay_first",),
        ("lora.scale_alpha",),
        ("norm.unbiased", "norm.weight_left_out"),
        ("rope.split_halves", "rope.from_one"),
    ],
)
def test_known_mistakes_are_named_alone_and_in_pairs(names):
    part = MISTAKES[names[0]].part
    found = verdict(part, answers_with(part, *names))
    assert (found.word, found.points, set(found.mistakes)) == (WRONG, 0, set(names))
    assert all(MISTAKES[name].sentence in found.hint("full") for name in names)
    assert found.formula in found.hint("full") and found.place in found.hint("full")
    assert found.hint("area") == f"look at {found.place}"
    assert found.hint("none") == ""


def test_an_unknown_mistake_is_located():
    run = answers_with("rope")
    run.answers[0]["query"] = run.answers[0]["query"].copy()
    run.answers[0]["query"][:, 3:, :, 1] += 0.5
    found = verdict("rope", run)
    assert (found.word, found.mistakes) == (WRONG, ())
    assert "'query' is" in found.sentence and "instead of" in found.sentence
    assert "only at feature 1 and from position 3 on (counted from 0)" in found.sentence
    run.answers[0]["query"] = run.answers[0]["query"] * np.nan
    assert "'query' is nan at index (0, 0, 0, 0)" in verdict("rope", run).sentence
    run.answers[0]["query"] = run.answers[0]["query"][0]
    assert "'query' has the shape" in verdict("rope", run).sentence


def test_what_an_unknown_mistake_depends_on_is_told():
    run = answers_with("attention")
    found = judging.probes("attention", PLAIN[EDITION], SEED)[0]
    for i, case in enumerate(found):
        if case.settings["n_kv_heads"] < case.settings["n_heads"]:
            run.answers[i] = {name: array + 0.3 * (array > 0.2) for name, array in run.answers[i].items()}
    assert "only with grouped heads (n_kv_heads < n_heads)" in verdict("attention", run).sentence


def test_a_factor_is_recognised():
    right = {"output": np.arange(1.0, 7.0).reshape(2, 3)}
    difference = compared({"output": right["output"] * 0.5}, right, 1e-4)
    assert "right answer times 0.5" in described(difference, Case("norm", "x"))
    assert compared({"output": right["output"] + 1e-5}, right, 1e-4) is None
    assert compared({}, right, 1e-4).problem == "is missing"


def test_settings_that_separate_probes():
    def cases(*values):
        return [Case("adamw", str(value), {"weight_decay": value, "correct_bias": value > 1}) for value in values]

    assert only_where(cases(0.5, 0.7), cases(0.0, 0.1)) == (
        "This happens only with weight_decay of 0.5 or more (0.1 is right)."
    )
    assert only_where(cases(0.5, 0.0), cases(0.1)) == "The probe '0.1' is right."
    assert only_where(cases(0.5), []) == ""


def test_a_stopped_run_gets_no_points_and_a_sentence():
    run = answers_with("norm")
    run.end, run.at, run.done = "it computed for more than 20 seconds", 1, False
    found = verdict("norm", run)
    probe = judging.probes("norm", PLAIN[EDITION], SEED)[0][1].name
    assert (found.word, found.points) == (STOPPED, 0)
    assert found.sentence == f"Stopped on the probe '{probe}': it computed for more than 20 seconds."
    run.loading = "llama"
    found = verdict("norm", run)
    assert "while llama.py was loading" in found.sentence and found.place == "llama.py"


def test_an_error_is_told_with_its_line():
    run = answers_with("norm")
    del run.answers[0]
    run.problems[0] = Problem("ValueError", "too few", "llama.py", 7, "forward")
    found = verdict("norm", run)
    assert found.word == ERROR and "It ends with ValueError: too few, at llama.py, line 7 (forward)" in found.sentence
    run.problems[0] = Problem("SyntaxError", "invalid", "llama.py", 7, module="llama")
    assert "llama.py does not load: SyntaxError: invalid" in verdict("norm", run).sentence
    run.problems[0] = Problem("SystemExit", "0", "llama.py", 7, "forward", rule="it calls sys.exit")
    assert (verdict("norm", run).word, verdict("norm", run).sentence) == (STOPPED, "Stopped: it calls sys.exit.")


@pytest.mark.parametrize("body", ["raise NotImplementedError", "pass", '"""Doc."""', "...", "return None"])
def test_an_empty_body_is_not_implemented_yet(tmp_path, body):
    (tmp_path / "llama.py").write_text(f"class LayerNorm:\n    def forward(self, x):\n        {body}\n")
    assert unimplemented(tmp_path, "norm") == ["llama.py, LayerNorm.forward"]
    run = Run(problems={0: Problem("AttributeError", "'NoneType' object has no attribute 'shape'")}, done=True)
    found = verdict("norm", run, tmp_path)
    assert (found.word, found.points) == (EMPTY, 0)
    assert found.sentence == "llama.py, LayerNorm.forward is not implemented yet."


def test_our_own_modules_have_no_empty_body():
    assert [part for part in PARTS[EDITION] if unimplemented(ROOT, part)] == []


class FakeSandbox:
    """Answers without a process: the parts in `wrong` have this mistake unless they are replaced."""

    wrong: dict[str, str] = {}
    asked: list[tuple[str, tuple[str, ...]]] = []

    def __init__(self, *_):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def run(self, part, probes, stand_ins=()):
        self.asked.append((part, tuple(stand_ins)))
        return answers_with(part, *([self.wrong[part]] if part in self.wrong else []))


def test_later_parts_are_judged_with_ours_in_the_place_of_failing_ones(monkeypatch, tmp_path):
    monkeypatch.setattr(judging, "Sandbox", FakeSandbox)
    monkeypatch.setattr(FakeSandbox, "wrong", {"norm": "norm.unbiased", "rope": "rope.split_halves"})
    monkeypatch.setattr(FakeSandbox, "asked", [])
    found = judging.judge(tmp_path, ASSIGNMENT)
    words = {one.part: one.word for one in found.verdicts}
    assert [part for part, word in words.items() if word != RIGHT] == ["norm", "rope"]
    assert dict(FakeSandbox.asked)["block"] == ("norm", "rope")
    assert dict(FakeSandbox.asked)["attention"] == ("rope",)
    assert found.points == found.out_of - PARTS[EDITION]["norm"] - PARTS[EDITION]["rope"]
    assert Judgement.from_dict(found.to_dict()) == found
    assert judging.frequencies([found, found]) == [("norm.unbiased", 2), ("rope.split_halves", 2)]


def test_parts_that_are_not_asked_for_are_ours(monkeypatch, tmp_path):
    monkeypatch.setattr(judging, "Sandbox", FakeSandbox)
    monkeypatch.setattr(FakeSandbox, "asked", [])
    found = judging.judge(tmp_path, ASSIGNMENT.only(["attention"]))
    assert [one.part for one in found.verdicts] == ["attention"]
    assert FakeSandbox.asked == [("attention", ("rope", "scores"))]
