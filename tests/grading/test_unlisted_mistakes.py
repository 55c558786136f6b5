"""Mistakes that are not in the table of known ones: the grader says truthfully where they are and what they depend on.

Each is one textual change of our own modules, judged in the sandbox, together with a part that builds on it.
"""

from __future__ import annotations

import shutil

import pytest

from conftest import ROOT
from minillama.grading import judge as judging
from minillama.grading.judge import FORERUNNERS, RIGHT, judge
from minillama.grading.kit_setups import PARTS, PLAIN, Assignment
from minillama.grading.sandbox import Sandbox
from unlisted_mistakes import CHANGES

ASSIGNMENT = Assignment(PLAIN["fall2025"], 0, PARTS["fall2025"])
FILES = ("config.py", "rope.py", "lora.py", "optimizer.py", "llama.py", "classifier.py", "tokenizer.py")
# A part that builds on each: it is judged with ours, and keeps its points.
NEXT = {"norm": "block", "rope": "attention", "scores": "attention", "attention": "block", "block": "model"}
NEXT |= {"model": "zero_shot", "generate": "scores", "adamw": "rope", "zero_shot": "classifier"}
NEXT |= {"classifier": "zero_shot", "lora": "classifier"}
SLOW = [change.name for change in CHANGES if change.part == "generate"][1:]  # 100,000 rows are drawn four times


@pytest.fixture(scope="module")
def box(tmp_path_factory):
    """A sandbox whose process serves all tests."""
    with Sandbox(tmp_path_factory.mktemp("empty"), ASSIGNMENT.setup) as shared:
        yield shared


@pytest.fixture
def judged(box, tmp_path, monkeypatch):
    """Judges these parts of our own modules, with one change."""

    class Shared:
        def __init__(self, folder, *_):
            box.folder, box.ours = folder, set()

        def __enter__(self):
            return box

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(judging, "Sandbox", Shared)

    def judge_change(change, parts):
        for name in FILES:
            shutil.copyfile(ROOT / name, tmp_path / name)
        text = (ROOT / change.file).read_text()
        assert text.count(change.old) == 1, f"{text.count(change.old)} times in {change.file}: {change.old}"
        (tmp_path / change.file).write_text(text.replace(change.old, change.new))
        return {one.part: one for one in judge(tmp_path, ASSIGNMENT.only(parts)).verdicts}

    return judge_change


def check(change, found):
    """The part alone loses its points, no known mistake is named, and the sentence has the words."""
    assert [part for part, one in found.items() if one.word != RIGHT] == [change.part]
    verdict = found[change.part]
    assert (verdict.points, verdict.mistakes) == (0, ())
    for words in change.words.split("|"):
        assert words in verdict.sentence


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(one, marks=pytest.mark.slow if one.name in SLOW else [], id=f"{one.part} {one.name}")
        for one in CHANGES
    ],
)
def test_an_unlisted_mistake_is_located(judged, change):
    own = FORERUNNERS["model"] if change.part == "model" else ()  # an attention of ours would ignore its masks
    check(change, judged(change, [*own, change.part, NEXT[change.part]]))


@pytest.mark.slow
@pytest.mark.parametrize("change", [pytest.param(one, id=f"{one.part} {one.name}") for one in CHANGES])
def test_an_unlisted_mistake_costs_no_other_part(judged, change):
    check(change, judged(change, [part for part in ASSIGNMENT.points if part != "generate" or change.part == part]))


def test_each_part_has_an_unlisted_mistake():
    assert {change.part for change in CHANGES} == set(ASSIGNMENT.points)
    assert len({change.name for change in CHANGES}) == len(CHANGES) >= 25
