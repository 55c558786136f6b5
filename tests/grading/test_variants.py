"""Variants of the course: each one's solution gets all points for it, and none for what another asks otherwise.

Three ways, from cheap to dear: answers in NumPy for all pairs of variants, hand-ins that run in this process, and
hand-ins in the sandbox.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest

import grade
from conftest import ROOT
from course_student import student_modules
from minillama.grading import judge as judging
from minillama.grading.answers import answer
from minillama.grading.harness import load_ours
from minillama.grading.judge import EMPTY, RIGHT, WRONG, verdict_on
from minillama.grading.kit import code_files, solved_text
from minillama.grading.kit_cut import cut_bodies
from minillama.grading.kit_setups import (
    EDITIONS,
    PARTS,
    PLAIN,
    VARIANTS,
    Assignment,
    Setup,
    exercises,
    find_setup,
    hidden_part,
    read_hidden,
)
from minillama.grading.mistakes import MISTAKES, mistakes_of
from minillama.grading.parts import cases, distance
from minillama.grading.runner import run_case
from minillama.grading.sandbox import OURS, Problem, Run
from minillama.grading.stand_ins import NORMS, put_in

FILES = ("config", "rope", "lora", "optimizer", "llama", "tokenizer", "classifier")  # each after what it imports
CHANGING = ("norm", "rope", "generate")  # parts that a variant changes
FAR = 5.0  # tolerances between two variants' answers, on one probe at least


def between(setup: Setup, other: Setup) -> dict[str, set[str]]:
    """The known mistakes that the solution of another setup makes in this one, by part."""
    found: dict[str, set[str]] = {part: set() for part in CHANGING}
    for part, field, names in (
        ("norm", "norm", {"layernorm": "layer_norm", "rmsnorm": "rms_norm"}),
        ("norm", "eps", {"inside": "eps_inside", "outside": "eps_outside"}),
        ("rope", "pairing", {"interleaved": "interleaved", "halves": "split_halves"}),
        ("rope", "sign", {"plus": "plus_sign", "minus": "wrong_sign"}),
        ("generate", "sampling", {"temperature": f"no_{setup.sampling}"}),
    ):
        if (given := getattr(other, field)) != getattr(setup, field):
            found[part].add(f"{part}.{names.get(given, f'{given}_sampling')}")
    return found


@cache
def far(part: str, setup: Setup, names: frozenset[str]) -> float:
    """The largest difference of answers with mistakes from the right ones, in tolerances."""
    probes, right = judging.probes(part, setup, 1)
    return max(distance(answer(case, names), one) / case.tolerance for case, one in zip(probes, right, strict=True))


def alone(part: str, setup: Setup) -> Setup:
    """The plain edition with the setup's choices for this part alone: its probes and answers are the same."""
    fields = {"norm": ("norm", "eps"), "rope": ("pairing", "sign"), "generate": ("norm", "sampling")}[part]
    return replace(PLAIN[setup.edition], **{name: getattr(setup, name) for name in fields})


@pytest.mark.parametrize("edition", EDITIONS)
def test_the_answers_of_all_48_variants_differ_in_each_part_that_they_ask_otherwise(edition):
    setups = [find_setup(edition, n) for n in range(VARIANTS)]
    for setup in setups:
        known = {one.name for part in CHANGING for one in mistakes_of(part, setup)}
        for other in setups:
            mistakes = between(setup, other)
            assert any(mistakes.values()) == (setup != other)
            for part, names in mistakes.items():
                assert names <= known, (setup, other)
                if names:
                    assert far(part, alone(part, setup), frozenset(names)) > FAR, (setup, other, part)


def test_what_the_solutions_of_all_other_variants_do_is_named():
    """By the look-up of the judge, alone and together with the other convention of the part."""
    setups, seen = [find_setup("fall2025", n) for n in range(VARIANTS)], set()
    for setup in setups:
        for other in setups:
            for part, names in between(setup, other).items():
                asked = {"norm": (setup.norm, setup.eps), "rope": (setup.pairing, setup.sign)}.get(part, setup.sampling)
                if not names or (asked, frozenset(names)) in seen:
                    continue
                seen.add((asked, frozenset(names)))
                assignment = Assignment(setup, 1, PARTS["fall2025"])
                answers = dict(enumerate(answer(case, names) for case in cases(part, setup, 1)))
                found = verdict_on(part, assignment, Run(answers=answers, done=True), ROOT, ())
                assert (found.word, set(found.mistakes)) == (WRONG, names), (setup, other)
                assert all(MISTAKES[name].sentence in found.sentence for name in names)
    assert len(seen) == 12 + 12 + 6


def test_a_solution_in_the_form_of_the_course_gives_the_right_answer_in_each_convention():
    for n in (1, 2, 7):
        setup = find_setup("fall2025", n)
        modules = student_modules(setup)
        for part in ("norm", "rope", "attention", "block", "model", "classifier", "lora"):
            for case in cases(part, setup, seed=4):
                assert distance(run_case(case, modules), answer(case)) < case.tolerance / 5, (setup, case.name)


@contextlib.contextmanager
def fresh(names: Iterable[str], folder: Path = ROOT) -> Iterator[None]:
    """A context in which the modules of these names are imported anew, from the folder."""
    known = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for name in names:
            sys.modules.pop(name, None)
        sys.modules.update(known)


def modules_in(folder: Path) -> dict[str, ModuleType]:
    with fresh(FILES, folder):
        return {name: importlib.import_module(name) for name in FILES if (folder / f"{name}.py").exists()}


def put_ours(parts: Sequence[str], modules: dict[str, ModuleType], setup: Setup) -> None:
    """Exchanges these parts for ours, as the process that runs a student's code does."""
    with fresh(OURS):
        ours = load_ours({name: solved_text(setup, f"{name}.py") for name in OURS})
    put_in(parts, modules, ours, setup.causal_argument)


@pytest.mark.parametrize("form", ["kit", "kit with another norm", "course", "ours"])
def test_what_replaces_a_failing_part_is_ours_in_the_conventions_of_the_variant(tmp_path, form):
    """In the modules of another setup, all six parts fail and are replaced."""
    setup = find_setup("fall2025", 7301)
    if form == "course":
        modules = student_modules(PLAIN["fall2025"])
    else:
        seed = {"kit": 0, "kit with another norm": 1}.get(form)
        kit = None if seed is None else write_hand_in(tmp_path / "kit", find_setup("fall2025", seed), seed)
        modules = modules_in(kit or ROOT)

    def fails(*_, **__):
        raise RuntimeError("the student's own")

    llama = modules["llama"]
    norms = [getattr(llama, name) for name in NORMS if hasattr(llama, name)]
    for owner in (*norms, llama.Attention, llama.FeedForward, llama.LlamaLayer, llama.Llama):
        owner.forward = fails
    llama.Attention.compute_query_key_value_scores = llama.apply_rotary_emb = modules["rope"].apply_rotary_emb = fails
    parts = ("norm", "rope", "scores", "attention", "block", "model")
    put_ours(parts, modules, setup)
    for part in (*parts[2:], "zero_shot", "classifier", "lora"):
        for case in cases(part, setup, seed=3):
            assert distance(run_case(case, modules), answer(case)) < case.tolerance, (part, case.name)


def write_hand_in(
    folder: Path, setup: Setup, seed: int | None, keep: tuple[str, ...] = (), empty: bool = False
) -> Path:
    """The modules of a solution or, with the parts not kept cut out, of a kit; and hidden.json."""
    folder.mkdir()
    cut: dict[str, list[str]] = {name: [] for name in code_files(setup)}
    for part, (file, names) in exercises(setup).items():
        cut[file] += names if empty and part not in keep else ()
    for name in code_files(setup):
        (folder / name).write_text(cut_bodies(solved_text(setup, name), cut[name]))
    (folder / "hidden.json").write_text(json.dumps(hidden_part(setup, seed, tuple(keep))))
    return folder


class InThisProcess:
    """Stands in for the sandbox: runs a folder's modules right here."""

    def __init__(self, folder, setup, limits):
        self.folder, self.setup = folder, setup

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def run(self, part, probes, stand_ins=()):
        modules = modules_in(self.folder)
        put_ours(stand_ins, modules, self.setup)
        run = Run(done=True)
        for i, case in enumerate(probes):
            try:
                run.answers[i] = run_case(case, modules)
            except Exception as error:
                run.problems[i] = Problem(type(error).__name__, str(error))
        return run


def judged(folder: Path, hidden: Path, *more: str) -> tuple[int, dict[str, str], str]:
    """The exit code of grade.py, the verdicts by part, and what it says about them."""
    results = folder.parent / "results.json"
    code = grade.main([str(folder), "--hidden", str(hidden), "--json", str(results), *more])
    tests = json.loads(results.read_text())["tests"]
    words = [test["output"].partition(":")[0] for test in tests]
    titles = {title: part for part, title in judging.TITLES.items()}
    parts = [titles[test["name"]] for test in tests]
    return code, dict(zip(parts, words, strict=True)), "\n".join(test["output"] for test in tests)


def check_variant(tmp_path: Path, edition: str, seed: int, others: list[int | None], parts: str) -> None:
    """Its own solution is right in these parts; others' are wrong where they differ, and the mistakes are named."""
    setup = find_setup(edition, seed)
    own = write_hand_in(tmp_path / "own", setup, seed)
    code, words, _ = judged(own, own / "hidden.json", "--parts", parts)
    assert (code, set(words.values())) == (0, {RIGHT}), (seed, words)
    for other in others:
        folder = write_hand_in(tmp_path / f"other{other}", find_setup(edition, other), other)
        code, words, said = judged(folder, own / "hidden.json", "--parts", parts)
        mistakes = between(setup, find_setup(edition, other))
        wrong = {part for part, names in mistakes.items() if names}
        assert code == 1 and {part for part, word in words.items() if word != RIGHT} == wrong, (seed, other, words)
        for names in mistakes.values():
            assert all(MISTAKES[name].sentence in said for name in names), (seed, other, said)


@pytest.mark.parametrize(
    ("edition", "seed", "others"),
    [("fall2025", 7, [6, None]), ("2024", 12, [13, None]), ("spring2026", 10, [11, None])],
)
def test_a_variant_is_passed_by_its_own_solution_and_by_no_other(tmp_path, monkeypatch, edition, seed, others):
    monkeypatch.setattr(judging, "Sandbox", InThisProcess)
    check_variant(tmp_path, edition, seed, others, "norm,rope,attention,block,generate,classifier")


@pytest.mark.slow
@pytest.mark.parametrize("edition", EDITIONS)
@pytest.mark.parametrize("seed", range(VARIANTS))
def test_each_variant_is_passed_by_its_own_solution_and_by_no_other(tmp_path, monkeypatch, edition, seed):
    monkeypatch.setattr(judging, "Sandbox", InThisProcess)
    others = [(seed + 1) % VARIANTS, (7 * seed + 5) % VARIANTS, None]
    different = [other for other in others if find_setup(edition, other) != find_setup(edition, seed)]
    check_variant(tmp_path, edition, seed, different, ",".join(PARTS[edition]))


def test_the_chosen_variants_have_every_convention():
    chosen = [("fall2025", 7), ("2024", 12), ("spring2026", 10), ("fall2025", 9)]  # their own solutions are right
    words = frozenset().union(*(find_setup(*one).words for one in chosen))
    assert words == frozenset().union(*(find_setup(edition, n).words for edition in EDITIONS for n in range(VARIANTS)))


def test_a_variant_in_the_sandbox(tmp_path):
    own = write_hand_in(tmp_path / "own", find_setup("fall2025", 9), 9)
    code, words, _ = judged(own, own / "hidden.json")
    assert code == 0 and list(words) == list(PARTS["fall2025"]) and set(words.values()) == {RIGHT}


def test_last_years_solution_fails_by_name_in_the_sandbox(tmp_path):
    own = write_hand_in(tmp_path / "own", setup := find_setup("spring2026", 11), 11)
    last_year = write_hand_in(tmp_path / "old", PLAIN["spring2026"], None)
    code, words, said = judged(last_year, own / "hidden.json", "--parts", "norm,rope,block,generate")
    assert code == 1 and [part for part, word in words.items() if word == RIGHT] == ["block"], words
    for names in between(setup, PLAIN["spring2026"]).values():
        assert names and all(MISTAKES[name].sentence in said for name in names)


def test_an_empty_kit_gets_no_points_and_its_kept_parts_are_ours(tmp_path, capsys):
    setup, keep = find_setup("2024", 5), ("norm", "scores", "adamw")
    kit = write_hand_in(tmp_path / "kit", setup, 5, keep, empty=True)
    code, words, _ = judged(kit, kit / "hidden.json")
    assert code == 1 and set(words) == set(PARTS["2024"]) - set(keep) and set(words.values()) == {EMPTY}
    assert f" 0/{100 - sum(PARTS['2024'][part] for part in keep)}  in " in capsys.readouterr().out


def test_a_kept_part_is_not_judged_and_ours_takes_its_place(tmp_path, monkeypatch):
    """Whatever the hand-in has there: here it is another variant's."""
    monkeypatch.setattr(judging, "Sandbox", InThisProcess)
    setup, other = find_setup("fall2025", 4), find_setup("fall2025", 7)
    assert all(between(setup, other)[part] for part in ("norm", "rope"))
    (hidden := tmp_path / "hidden.json").write_text(json.dumps(hidden_part(setup, 4, ("norm", "rope"))))
    folder = write_hand_in(tmp_path / "other", other, 7)
    code, words, said = judged(folder, hidden, "--parts", "attention,block,model")
    assert code == 0 and words == dict.fromkeys(("attention", "block", "model"), RIGHT)
    assert "judged with our norm, rope" in said


def hidden_file(folder: Path, **changes: object) -> Path:
    path = folder / "hidden.json"
    path.write_text(json.dumps(hidden_part(find_setup("fall2025", 7301), 7301, ("norm",)) | changes))
    return path


def test_a_hidden_file_says_what_is_judged(tmp_path):
    points = {part: 2 * value for part, value in PARTS["fall2025"].items() if part != "norm"}
    found = read_hidden(hidden_file(tmp_path, points=points))
    assert (found.setup, found.points) == (find_setup("fall2025", 7301), points)
    assert found.seed == hidden_part(found.setup, 7301, ())["probe_seed"]
    assert found.title.startswith("edition fall2025, norm layernorm, eps outside, pairing halves, sign plus, sampling")
    assert list(found.only(["adamw", "rope"]).points) == ["rope", "adamw"]
    assert Assignment(PLAIN["2024"], 0, PARTS["2024"]).title == "edition 2024, seed 0"


PLAIN_POINTS = {part: value for part, value in PARTS["fall2025"].items() if part != "norm"}


@pytest.mark.parametrize(
    ("changes", "arguments", "words"),
    [
        (None, [], "hidden.json: No such file or directory"),
        ("{", [], "it is no JSON"),
        ("[" * 100000, [], "it is no JSON"),
        ("[]", [], "it is no hidden.json of a kit"),
        ("\xff", [], "it is no JSON"),
        ({"edition": "fall2023"}, [], "it names no edition (2024, fall2025, spring2026)"),
        ({"edition": "2024"}, [], "its probe_seed is"),
        ({"seed": -1}, [], "its seed -1 is no whole number"),
        ({"seed": 7300}, [], "its probe_seed is"),
        ({"probe_seed": 5}, [], "its probe_seed is 5, which does not belong to its edition and seed"),
        (
            {"variant": {"norm": "rmsnorm"}},
            [],
            "its variant is {'norm': 'rmsnorm'}, which does",
        ),
        ({"switches": []}, [], "its switches is []"),
        ({"kept": ["foo"]}, [], "its kept parts ['foo'] are not parts of fall2025"),
        ({"kept": 3}, [], "its kept parts 3 are not parts"),
        ({"kept": []}, [], "its points must be those of norm, rope"),
        ({"points": {}}, [], "its points must be those of rope, scores"),
        ({"points": PLAIN_POINTS | {"rope": 1.5}}, [], "its points of rope are 1.5, no whole number"),
        ({"points": PLAIN_POINTS | {"rope": True}}, [], "its points of rope are True, no whole number"),
        ({}, ["--edition", "2024"], "--edition 2024: "),
        ({}, ["--seed", "7301"], "says 3993649194; leave --seed out"),
        ({}, ["--parts", "norm"], "--parts 'norm': the parts of fall2025 are rope, scores"),
    ],
)
def test_a_bad_or_contradicted_hidden_file_is_one_line_and_exit_code_2(tmp_path, capsys, changes, arguments, words):
    path = tmp_path / "hidden.json"
    if isinstance(changes, str):
        path.write_bytes(changes.encode("latin-1"))
    elif changes is not None:
        hidden_file(tmp_path, **changes)
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "llama.py").write_text("")
    with pytest.raises(SystemExit, match="^2$"):
        grade.main([str(tmp_path / "own"), "--hidden", str(path), *arguments])
    error = capsys.readouterr().err
    assert error.startswith("grade.py: error: ") and words in error and error.count("\n") == 1


def test_the_help_imports_neither_numpy_nor_torch():
    code = """
import sys
import grade
try:
    grade.main(["--help"])
except SystemExit:
    print(sorted({"numpy", "torch"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert "--hidden" in done.stdout and done.stdout.endswith("[]\n")
