"""examples/walk_through.ipynb: the notebook is well-formed, runs from top to bottom, prints what is stored in it."""

from __future__ import annotations

import contextlib
import io
import json
import re
import sys

import pytest
import torch

from conftest import ROOT

NOTEBOOK = json.loads((ROOT / "examples" / "walk_through.ipynb").read_text(encoding="utf-8"))
CODE = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
NUMBER = re.compile(r"-?\d+\.\d+")


def stored(cell):
    return "".join("".join(output["text"]) for output in cell["outputs"])


def test_the_notebook_has_the_form_of_nbformat_4():
    assert (NOTEBOOK["nbformat"], NOTEBOOK["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in NOTEBOOK["cells"]}) == len(NOTEBOOK["cells"])
    for cell in NOTEBOOK["cells"]:
        code = {"execution_count", "outputs"} if cell["cell_type"] == "code" else set()
        assert cell["cell_type"] in ("code", "markdown")
        assert set(cell) == {"cell_type", "id", "metadata", "source"} | code
    assert [cell["execution_count"] for cell in CODE] == list(range(1, len(CODE) + 1))
    for output in (output for cell in CODE for output in cell["outputs"]):
        assert (output["output_type"], output["name"]) == ("stream", "stdout")


def test_the_cells_run_in_order_and_print_what_is_stored(monkeypatch):
    """Words and whole numbers to the letter; decimals, rounded as they are, to 0.02, for machines round otherwise."""
    monkeypatch.chdir(ROOT / "examples")
    space = {}
    try:
        for cell in CODE:
            source = "".join(cell["source"])
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec(compile(source, f"cell {cell['execution_count']}", "exec"), space)
            now, then = out.getvalue(), stored(cell)
            assert NUMBER.sub("#", now) == NUMBER.sub("#", then), source
            numbers = [[float(number) for number in NUMBER.findall(text)] for text in (now, then)]
            assert numbers[0] == pytest.approx(numbers[1], abs=0.02), source
    finally:
        torch.set_grad_enabled(True)


def test_each_thing_done_by_hand_agrees_with_the_program():
    said = "".join(map(stored, CODE))
    assert "False" not in said and said.count("True") == 13


def test_in_colab_the_first_cell_gets_the_project_and_elsewhere_it_does_nothing(monkeypatch, tmp_path):
    source, done = "".join(CODE[0]["source"]), []
    assert "google.colab" in source
    monkeypatch.setattr("subprocess.run", lambda words, check: done.append(words))
    exec(source, {})
    assert done == []
    monkeypatch.setitem(sys.modules, "google.colab", None)
    with pytest.raises(SystemExit, match="Write the address of the project into PROJECT"):
        exec(source, {})
    monkeypatch.chdir(tmp_path)
    filled = source.replace('PROJECT = ""', 'PROJECT = "there"').replace("/content/mini-llama", str(tmp_path))
    exec(filled, {})  # the folder is there already
    assert [words[1:4] for words in done] == [["-m", "pip", "install"]]
    monkeypatch.setattr("os.chdir", lambda folder: done.append(folder))
    exec(filled.replace(str(tmp_path), str(tmp_path / "new")), {})
    assert done[1][:2] == ["git", "clone"] and done[1][-2:] == ["there", str(tmp_path / "new")] and len(done) == 4
