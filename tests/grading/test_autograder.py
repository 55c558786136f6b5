"""examples/course/: Gradescope's autograder always leaves a valid result, and a student's repository shows points."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import zipfile

import pytest

import course
from conftest import ROOT
from minillama.grading.hand_ins import MODULES
from minillama.grading.kit_setups import PARTS

COURSE = ROOT / "examples" / "course"
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the scripts are for Linux")


def loaded():
    """examples/course/make_zip.py as a module."""
    spec = importlib.util.spec_from_file_location("make_zip", COURSE / "make_zip.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_zip(*arguments):
    return loaded().main([str(argument) for argument in arguments])


def our_python(path):
    """A program that is our interpreter, with our packages."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n', encoding="utf-8")
    path.chmod(0o755)


def judge(root, **environment):
    """The results.json that run_autograder leaves, and what it prints."""
    done = subprocess.run(
        ["bash", str(COURSE / "run_autograder")],
        env={**os.environ, "AUTOGRADER_ROOT": str(root), **environment},
        capture_output=True,
        encoding="utf-8",
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    return json.loads((root / "results" / "results.json").read_text(encoding="utf-8")), done.stdout


@pytest.fixture
def root(tmp_path):
    """Gradescope's folders with a grader that runs `body`; its python is ours."""

    def make(body):
        (tmp_path / "source").mkdir()
        (tmp_path / "submission").mkdir()
        our_python(tmp_path / "venv" / "bin" / "python")
        (tmp_path / "source" / "grade.py").write_text(f"import json, sys, time\npath = sys.argv[-1]\n{body}\n")
        return tmp_path

    return make


WRITE = "open(path, 'w').write(json.dumps({0}, indent=2)); sys.exit(1)"


def test_the_results_of_one_hand_in_are_taken_as_they_are(root):
    results, _ = judge(root(WRITE.format("{'score': 12, 'tests': [{'words': sys.argv[1:-1]}]}")))
    assert results["score"] == 12
    folder, *options = results["tests"][0]["words"]
    assert folder.endswith("/submission") and options == ["--seconds", "12", "--json"]


@pytest.mark.parametrize(
    ("files", "judged"),
    [
        (["llama.py", "old/llama.py"], "submission"),
        (["hw/code/rope.py", "hw/data/x.txt", "other/notes.txt"], "submission/hw/code"),
        (["a/llama.py", "b/llama.py"], "submission"),
        ([], "submission"),
    ],
)
def test_the_modules_may_lie_deeper(root, files, judged):
    folder = root(WRITE.format("{'score': 1, 'tests': [sys.argv[1]]}"))
    for name in files:
        (folder / "submission" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "submission" / name).write_text("")
    assert judge(folder)[0]["tests"] == [str(folder / judged)]


def test_the_options_of_the_zip_are_given_to_the_grader(root):
    folder = root(WRITE.format("{'score': 1, 'tests': [sys.argv[2:-2]]}"))
    (folder / "source" / "grade_options.txt").write_text("--seed\n48\n--hints\narea\n")
    assert judge(folder)[0]["tests"] == [["--seconds", "12", "--seed", "48", "--hints", "area"]]


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ("raise ValueError('a secret')", "The grader itself failed. This is not your fault: please tell your teacher."),
        ("sys.exit(0)", "The grader itself failed."),
        ("import os; os.kill(os.getpid(), 11)", "The grader itself failed."),
        ("import os; os.kill(os.getpid(), 9)", "The grader was stopped: time or memory ran out."),
        ("time.sleep(60)", "The grader stopped after 1 seconds. Look for a loop in your code that never ends."),
        (WRITE.format("{'students': {}}"), "The hand-in has several folders with modules. Put llama.py"),
        ("sys.exit('grade.py: error: no')", "The grader itself failed."),
        ("sys.stderr.write('grade.py: error: --hidden x: a secret\\n')\nsys.exit(2)", "The grader itself failed."),
        (
            "sys.stderr.write('grade.py: error: ' + sys.argv[1] + ': no \"x\"\\t\\\\; see python grade.py --help\\n')\n"
            "sys.exit(2)",
            'Nothing could be judged. Your hand-in: no "x" \\.',
        ),
    ],
    ids=["exception", "nothing", "signal", "memory", "time", "several", "other status", "option", "message"],
)
def test_without_results_there_is_a_sentence_and_no_points(root, body, sentence):
    results, printed = judge(root(body), AUTOGRADER_SECONDS="1" if "sleep" in body else "60")
    assert results["score"] == 0 and results["output"].startswith(sentence) and "tests" not in results
    assert "Traceback" not in results["output"] and "secret" not in results["output"]
    assert "raise" not in body or "ValueError: a secret" in printed  # for the teacher


def test_the_zip_has_the_scripts_at_its_top_and_what_the_grader_needs(tmp_path, capsys):
    path = tmp_path / "autograder.zip"
    assert make_zip(path, "--seed", "48", "--torch-index", "here") == 0
    assert "MB" in capsys.readouterr().out
    with zipfile.ZipFile(path) as archive:
        assert all(
            stat.S_IMODE(archive.getinfo(name).external_attr >> 16) == 0o755 for name in ("setup.sh", "run_autograder")
        )
        assert archive.read("grade_options.txt") == b"--seed\n48\n" and archive.read("torch_index.txt") == b"here\n"
        archive.extractall(tmp_path / "source")
        names = archive.namelist()
    assert path.stat().st_size < 5 << 20 and not [name for name in names if name.startswith(("tests/", "data/"))]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    for program in ("grade.py", "course.py"):
        subprocess.run([sys.executable, program, "--help"], cwd=tmp_path / "source", env=environment, check=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a.zip", "--edition", "2023"], "invalid choice: '2023'"),
        (["a.zip", "--json", "results.json"], "give neither --json, --report nor a folder"),
        (["a.zip", "another"], "nor a folder"),
        (["autograder"], "it must be the name of a zip"),
        (["a.zip", "--hidden", "missing.json"], "--hidden missing.json: No such file"),
        (["a.zip", "--parts", "norm,foo"], "--parts 'foo': the parts of fall2025 are"),
    ],
)
def test_wrong_options_are_found_before_the_zip_is_written(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="^2$"):
        make_zip(*arguments)
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not list(tmp_path.iterdir())


def test_files_that_an_option_names_go_into_the_zip(tmp_path):
    (tmp_path / "points.json").write_text("{}")
    words = ["--seed", "3", "--one", f"{tmp_path}/points.json", f"--two={tmp_path}/points.json"]
    moved = ["--seed", "3", "--one", "points.json", "--two=points.json"]
    assert loaded().with_files(words) == (moved, {"points.json": b"{}"})


@pytest.mark.parametrize("index", ["", "a place"])
def test_setup_makes_an_environment_with_an_allowed_pytorch(tmp_path, index):
    """setup.sh with a python3 that writes down what it is asked for."""
    (tmp_path / "source").mkdir()
    shutil.copyfile(ROOT / "requirements.txt", tmp_path / "source" / "requirements.txt")
    if index:
        (tmp_path / "source" / "torch_index.txt").write_text(f"{index}\n")
    pip = f"""#!/bin/sh\nprintf '%s;' "$@" >>{tmp_path}/asked.txt; echo >>{tmp_path}/asked.txt\n"""
    venv = f"""#!/bin/sh\n[ "$1" = -c ] || {{ mkdir -p "$3/bin"; cp {tmp_path}/bin/pip "$3/bin/python"; }}\n"""
    for name, text in (("pip", pip), ("python3", venv)):
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "AUTOGRADER_ROOT": str(tmp_path)}
    done = subprocess.run(["bash", str(COURSE / "setup.sh")], env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and ("CUDA comes along" in done.stdout) == (not index), done.stderr
    torch, rest = (tmp_path / "asked.txt").read_text().splitlines()
    (allowed,) = re.findall(r"^torch\S+", (ROOT / "requirements.txt").read_text(encoding="utf-8"), re.M)
    assert torch == "-m;pip;install;" + (f"--index-url;{index};" if index else "") + f"{allowed};"
    assert rest == f"-m;pip;install;-r;{tmp_path}/source/requirements.txt;"


def test_the_shell_scripts_have_no_faults():
    scripts = [str(COURSE / name) for name in ("setup.sh", "run_autograder")]
    for script in scripts:
        subprocess.run(["bash", "-n", script], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", *scripts], check=True)


@pytest.mark.slow
def test_gradescope_in_small(tmp_path):
    """The true grader in Gradescope's folders: right modules, one folder deeper, and code that never ends."""
    our_python(tmp_path / "venv" / "bin" / "python")
    make_zip(tmp_path / "autograder.zip", "--parts", "norm,rope")
    with zipfile.ZipFile(tmp_path / "autograder.zip") as archive:
        archive.extractall(tmp_path / "source")
    folder = tmp_path / "submission" / "hw"
    folder.mkdir(parents=True)
    assert "it holds none of llama.py" in judge(tmp_path)[0]["output"]
    for name in MODULES:
        shutil.copyfile(ROOT / name, folder / name)
    results, _ = judge(tmp_path)
    assert results["score"] == 20 and [test["status"] for test in results["tests"]] == ["passed"] * 2
    (folder / "rope.py").write_text("while True:\n    pass\n")
    results, _ = judge(tmp_path)
    assert results["score"] == 0 and "while rope.py was loading" in results["tests"][1]["output"]


# A student's repository


@pytest.fixture(scope="module")
def workflow():
    yaml = pytest.importorskip("yaml")  # comes with pre-commit
    text = (COURSE / "classroom.yml").read_text(encoding="utf-8")
    return text, yaml.safe_load(text)["jobs"]["checklist"]["steps"]


def points_in(text):
    return {part: int(points) for part, points in re.findall(r"(\w+)=(\d+)", text)}


def test_the_workflow_has_the_points_of_the_grader_and_pinned_actions(workflow):
    text, steps = workflow
    assert points_in(steps[-1]["env"]["POINTS"]) == PARTS["fall2025"]
    (others,) = re.findall(r"# fall2025\. For 2024 and spring2026: (.*)", text)
    assert points_in(others) == PARTS["2024"] == PARTS["spring2026"]
    used = [step["uses"] for step in steps if "uses" in step]
    assert len(used) == 2 and all(re.fullmatch(r"actions/[\w-]+@v\d+\.\d+\.\d+", action) for action in used)


def test_the_workflow_shows_points_and_the_reason_of_each_part(workflow, tmp_path):
    arguments = ["kit", "--edition", "fall2025", "--keep", "norm", "--into", str(tmp_path / "kit")]
    assert course.main(arguments) == 0
    our_python(tmp_path / "python")
    environment = {**os.environ, "GITHUB_STEP_SUMMARY": str(tmp_path / "summary.md")}
    environment |= {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": "", "POINTS": "norm=8 rope=12"}
    command = ["bash", "-e", "-c", workflow[1][-1]["run"]]
    done = subprocess.run(command, cwd=tmp_path / "kit", env=environment, capture_output=True, encoding="utf-8")
    assert done.returncode == 1 and "::notice title=Points::8 of 20" in done.stdout, done.stderr
    summary = (tmp_path / "summary.md").read_text(encoding="utf-8")
    assert "| norm | 8/8 | |\n| rope | 0/12 | apply_rotary_emb is not implemented yet |" in summary
    assert summary.endswith("| **total** | **8/20** | |\n")
    environment |= {"POINTS": "norm=8"}
    assert subprocess.run(command, cwd=tmp_path / "kit", env=environment, capture_output=True).returncode == 0
