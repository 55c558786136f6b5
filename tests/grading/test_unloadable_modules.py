"""A module that does not load costs its own parts only; the others are judged with ours in its place."""

from __future__ import annotations

import shutil

import pytest

from conftest import ROOT
from course_student import SOURCE
from minillama.grading import judge as judging
from minillama.grading.confinement import Limits
from minillama.grading.judge import ERROR, RIGHT, STOPPED
from minillama.grading.kit import code_files, solved_text
from minillama.grading.kit_setups import PARTS, PLAIN, Assignment, Setup, find_setup
from minillama.grading.sandbox import Sandbox

EDITION = PLAIN["fall2025"]
VARIANT = find_setup("fall2025", 7301)  # other rotary pairs, eps outside the root
FILES = ("config.py", "rope.py", "lora.py", "optimizer.py", "llama.py", "classifier.py", "tokenizer.py")
LOOP, SYNTAX = "while True: pass\n", "def f(:\n"


@pytest.fixture(scope="module")
def box(tmp_path_factory):
    """A sandbox whose process serves all tests."""
    with Sandbox(tmp_path_factory.mktemp("empty"), EDITION) as shared:
        yield shared


@pytest.fixture
def judged(box, tmp_path, monkeypatch):
    """Judges our own modules, or a variant's solution, with some replaced by these texts, or left out.

    Gives the verdicts and the runs.
    """
    runs = []

    class Shared(Sandbox):
        def __init__(self, folder, setup, limits):
            super().__init__(folder, setup, limits)
            self.start = box.start
            self.wait_until_ready = box.wait_until_ready

        def run(self, part, cases, stand_ins=()):
            box.start()
            box.wait_until_ready()
            self.process, self.channel, self.ready = box.process, box.channel, True
            runs.append((part, super().run(part, cases, stand_ins)))
            if self.process is None:
                box.process = None
            return runs[-1][1]

        def __exit__(self, *_):
            shutil.rmtree(self.place, ignore_errors=True)

    monkeypatch.setattr(judging, "Sandbox", Shared)

    def judge(texts, *parts, setup=EDITION, seconds=10):
        for name, ours in files_of(setup).items():
            if (text := texts.get(name, ours)) is not None:
                (tmp_path / name).write_text(text)
        limits = Limits(seconds=seconds, wall=6.0 * seconds)
        judgement = judging.judge(tmp_path, Assignment(setup, 0, PARTS["fall2025"]).only(parts), limits)
        return {one.part: one for one in judgement.verdicts}, runs

    return judge


def files_of(setup: Setup) -> dict[str, str]:
    """Our own modules for the edition; for a variant, its solution."""
    if setup == EDITION:
        return {name: (ROOT / name).read_text() for name in FILES}
    return {name: solved_text(setup, name) for name in code_files(setup)}


def test_rope_that_hangs_costs_one_time_limit_and_its_own_points(judged):
    found, runs = judged({"rope.py": LOOP}, "norm", "rope", "attention", "model", "adamw", "zero_shot", seconds=5)
    assert {part for part, one in found.items() if one.word != RIGHT} == {"rope"}
    assert (found["rope"].word, found["rope"].points) == (STOPPED, 0)
    assert found["rope"].sentence == "Stopped while rope.py was loading: it computed for more than 5 seconds."
    assert [part for part, run in runs if run.end] == ["norm"]
    assert found["attention"].hint("full") == "judged with our rope.py and scores"
    assert found["adamw"].hint("full") == ""


def test_rope_with_a_syntax_error(judged):
    found, runs = judged({"rope.py": SYNTAX}, "norm", "rope", "attention", "block", "lora")
    assert {part for part, one in found.items() if one.word != RIGHT} == {"rope"}
    assert (found["rope"].word, found["rope"].place) == (ERROR, "rope.py, line 1")
    assert found["rope"].sentence.startswith("rope.py does not load: SyntaxError: ")
    assert len(runs) == 5  # norm a second time, rope not at all


def test_an_optimizer_that_raises(judged):
    found, _ = judged({"optimizer.py": "raise ValueError('no idea')\n"}, "norm", "adamw", "classifier")
    assert {part for part, one in found.items() if one.word != RIGHT} == {"adamw"}
    assert found["adamw"].sentence == "optimizer.py does not load: ValueError: no idea, at optimizer.py, line 1."


def test_lora_that_exits(judged):
    found, _ = judged({"lora.py": "import sys\nsys.exit(0)\n"}, "model", "zero_shot", "classifier", "lora")
    assert {part for part, one in found.items() if one.word != RIGHT} == {"lora"}
    assert found["lora"].sentence == "Stopped while lora.py was loading: it calls sys.exit."
    assert found["classifier"].stand_ins[0] == "lora.py"  # our classifier.py imports it


def test_llama_with_a_syntax_error_keeps_the_parts_of_other_modules(judged):
    found, _ = judged({"llama.py": SYNTAX}, "norm", "rope", "scores", "adamw", "zero_shot", "classifier", "lora")
    assert {part for part, one in found.items() if one.word != RIGHT} == {"norm", "scores"}
    assert all("llama.py does not load: SyntaxError" in found[part].sentence for part in ("norm", "scores"))
    assert found["zero_shot"].stand_ins == ("llama.py",)


def test_ours_is_not_taken_for_the_rope_that_is_judged(judged):
    source = (ROOT / "rope.py").read_text()
    wrong = source.replace("return rotate(query, table), rotate(key, table)", "return query, key")
    found, _ = judged({"llama.py": SYNTAX, "rope.py": wrong}, "norm", "rope", "lora")
    assert {part for part, one in found.items() if one.word == RIGHT} == {"lora"}


@pytest.mark.parametrize("loads", ["import os\nos._exit(0)\n", "x = bytearray(10**10)\n", None])
def test_other_ways_not_to_load(judged, loads):
    found, _ = judged({"rope.py": loads}, "norm", "rope")
    assert (found["norm"].word, found["rope"].points) == (RIGHT, 0)
    words = {None: "there is no rope.py"}.get(loads, "Stopped while rope.py was loading: ")
    assert words in found["rope"].sentence


def test_two_modules_that_do_not_load(judged):
    found, _ = judged({"rope.py": SYNTAX, "llama.py": "import rope\n1 / 0\n"}, "norm", "rope", "adamw", "lora")
    assert {part for part, one in found.items() if one.word == RIGHT} == {"adamw", "lora"}
    assert "llama.py does not load: ZeroDivisionError: division by zero, at llama.py, line 2." in found["norm"].sentence
    assert "rope.py does not load: SyntaxError" in found["rope"].sentence


def test_a_config_that_does_not_load_costs_nothing(judged):
    found, _ = judged({"config.py": SYNTAX}, "norm", "rope")
    assert {one.word for one in found.values()} == {RIGHT}
    assert found["norm"].stand_ins == ("config.py",)


@pytest.mark.parametrize(
    ("module", "own"), [("rope", {"rope"}), ("llama", {"norm", "scores", "attention"}), ("lora", {"lora"})]
)
def test_in_a_variant_the_module_that_replaces_one_has_its_conventions(judged, module, own):
    parts = ("norm", "rope", "scores", "attention", "zero_shot", "classifier", "lora")
    found, runs = judged({f"{module}.py": SYNTAX}, *parts, setup=VARIANT)
    assert {part for part, one in found.items() if one.word != RIGHT} == own, found
    assert all(f"{module}.py does not load: SyntaxError" in found[part].sentence for part in own)


def test_in_a_variant_the_rope_of_the_edition_is_still_wrong(judged):
    """Although the hand-in's llama.py does not load and is replaced by one of the variant."""
    texts = {"llama.py": SYNTAX, "rope.py": solved_text(EDITION, "rope.py")}
    found, _ = judged(texts, "norm", "rope", "lora", setup=VARIANT)
    assert {part for part, one in found.items() if one.word == RIGHT} == {"lora"}
    assert found["rope"].mistakes == ("rope.interleaved",)


@pytest.mark.parametrize("module", ["config", "rope", "llama"])
def test_a_solution_of_the_edition_is_judged_with_our_modules(judged, module):
    """Their form is not ours: they take no caches and masks."""
    texts = {name: solved_text(EDITION, name) for name in code_files(EDITION)} | {f"{module}.py": SYNTAX}
    found, _ = judged(texts, "norm", "rope", "attention", "zero_shot", "classifier", "lora")
    own = {"rope": {"rope"}, "llama": {"norm", "attention"}}.get(module, set())
    assert {part for part, one in found.items() if one.word != RIGHT} == own


def test_a_classifier_in_the_form_of_the_course_is_judged_with_our_llama(judged):
    start = SOURCE.index("class LlamaZeroShotClassifier")
    classes = SOURCE[start : SOURCE.index("class LoRALayer")]
    head = "import torch\nfrom torch import nn\nimport torch.nn.functional as F\nfrom config import LlamaConfig\n"
    text = f"{head}from llama import load_pretrained\n\n{classes}"
    found, _ = judged({"classifier.py": text, "llama.py": SYNTAX}, "norm", "zero_shot", "classifier")
    assert {part for part, one in found.items() if one.word != RIGHT} == {"norm"}
