""".devcontainer/devcontainer.json: it is JSON, and the files and commands that it names exist."""

from __future__ import annotations

import json
import re
import shutil
import subprocess

import pytest

from conftest import ROOT

SETTINGS = json.loads((ROOT / ".devcontainer" / "devcontainer.json").read_text(encoding="utf-8"))


def test_the_files_that_it_names_exist():
    assert SETTINGS["image"] == "python:3.11"
    assert all((ROOT / name).is_file() for name in SETTINGS["customizations"]["codespaces"]["openFiles"])
    named = re.findall(r"(?:-r |\^torch )([\w.-]+)", SETTINGS["postCreateCommand"])
    assert set(named) == {"requirements.txt", "requirements-dev.txt"}
    assert all((ROOT / name).is_file() for name in named)


@pytest.mark.parametrize("index", ["", "a place"])
@pytest.mark.skipif(shutil.which("sh") is None, reason="it needs a shell")
def test_it_installs_an_allowed_pytorch_and_then_the_rest(index):
    """Its command, with a function in the place of pip."""
    script = f'python() {{ for word in "$@"; do printf "%s;" "$word"; done; echo; }}\n{SETTINGS["postCreateCommand"]}'
    done = subprocess.run(
        ["sh", "-c", script],
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", "TORCH_INDEX": index},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    torch, rest = done.stdout.splitlines()
    (allowed,) = re.findall(r"^torch\S+", (ROOT / "requirements.txt").read_text(encoding="utf-8"), re.M)
    assert torch == "-m;pip;install;" + (f"--index-url;{index};" if index else "") + f"{allowed};"
    assert rest == "-m;pip;install;-r;requirements.txt;-r;requirements-dev.txt;ipykernel;"
