"""The workflow of the continuous integration: three systems, an allowed PyTorch, pinned actions."""

from __future__ import annotations

import re
import shlex

import pytest

import run_llama
from conftest import ROOT

yaml = pytest.importorskip("yaml")  # comes with pre-commit


@pytest.fixture(scope="module")
def job():
    content = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))
    assert content["permissions"] == {"contents": "read"}
    (job,) = content["jobs"].values()
    return job


def test_the_matrix_has_three_systems_and_the_oldest_python(job):
    rows = job["strategy"]["matrix"]["include"]
    assert {row["system"] for row in rows} == {"ubuntu", "macos", "windows"}
    assert len({row["python"] for row in rows if row["system"] == "ubuntu"}) == 2
    oldest = re.search(r'^target-version = "py3(\d+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.M)[1]
    assert f"3.{oldest}" in {row["python"] for row in rows} and all(isinstance(row["python"], str) for row in rows)


def test_actions_are_pinned_and_an_allowed_pytorch_is_installed(job):
    used = [step["uses"] for step in job["steps"] if "uses" in step]
    assert used and all(re.fullmatch(r"[\w-]+/[\w-]+@v\d+\.\d+\.\d+", action) for action in used)
    allowed = re.search(r"^torch\S+", (ROOT / "requirements.txt").read_text(encoding="utf-8"), re.M)[0]
    (install,) = [step["run"] for step in job["steps"] if "torch>" in step.get("run", "")]
    assert f'pip install "{allowed}"\n' in install


def test_its_commands_are_understood_and_its_tests_exist(job, monkeypatch):
    monkeypatch.chdir(ROOT)
    lines = [shlex.split(line) for step in job["steps"] for line in step.get("run", "").splitlines()]
    commands = [line[2:] for line in lines if line[1:2] == ["run_llama.py"] and "--help" not in line]
    assert len(commands) >= 4
    for command in commands:
        run_llama.parse(command)
    tests = [word for line in lines if "pytest" in line for word in line if word.startswith("tests/")]
    assert tests and all((ROOT / name).exists() for name in tests)
