"""The project is not a package: pip refuses it in one line and leaves no file behind."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest

from conftest import ROOT


@pytest.mark.parametrize("how", [["."], ["-e", "."]], ids=["install", "editable"])
def test_pip_refuses_the_folder_in_one_line_and_leaves_nothing_behind(tmp_path, how):
    pytest.importorskip("pip")
    copy = tmp_path / "copy"
    for folder in ("", "build_backend", "data"):
        (copy / folder).mkdir()
        for path in (ROOT / folder).iterdir():
            if path.suffix in (".py", ".toml", ".md"):
                shutil.copy(path, copy / folder)
    before = sorted(path.relative_to(copy) for path in copy.rglob("*"))
    pip = [sys.executable, "-B", "-m", "pip", "--disable-pip-version-check", "--no-input", "install", "--no-index"]
    target = ["--no-deps", "--no-build-isolation", "--target", str(tmp_path / "target")] if how == ["."] else []
    done = subprocess.run(
        [*pip, *(target or ["--no-deps", "--no-build-isolation"]), *how], cwd=copy, capture_output=True, text=True
    )
    said = done.stdout + done.stderr
    assert done.returncode != 0 and "Traceback" not in said
    assert said.count("mini-llama is not installed as a package, it runs from its folder") == 1
    after = sorted(path.relative_to(copy) for path in copy.rglob("*") if "__pycache__" not in path.parts)
    assert after == before and not (tmp_path / "target").exists()
