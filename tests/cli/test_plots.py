"""--option report --plots: each picture is one SVG file that stands alone, and a PNG where matplotlib is."""

from __future__ import annotations

import re
import sys
import xml.etree.ElementTree as ElementTree

import pytest

from minillama.cli.charts import Chart, Matrix
from minillama.cli.plots import file_name, palette, write_plots
from reported_runs import GUESS, NAMES, a_run, confused, with_last_line
from run_llama import main

SVG = "{http://www.w3.org/2000/svg}"
NASTY = '<script>alert("1")</script> & \x00 ' + "long words " * 12
LINES = [("one", [(0, 0.0), (50, 1.0), (100, 0.5)], "c0"), (NASTY, [(0, 0.25), (100, 0.75)], "c1 dashed")]
CURVES = Chart("Accuracy", "step", LINES)
COUNTS = Matrix("dev", [NASTY, "b"], [[3, 1], [0, 12345]])


@pytest.fixture
def no_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # importing it fails, as if it were missing


def parsed(path):
    tree = ElementTree.parse(path)
    assert tree.getroot().tag == f"{SVG}svg"
    return tree


def words(tree):
    return ["".join(one.itertext()) for one in tree.iter(f"{SVG}text")]


def test_a_chart_has_its_points_names_and_colours_on_white(tmp_path, no_matplotlib):
    line = write_plots(tmp_path / "new" / "plots", {("two runs", "accuracy"): CURVES})
    assert line.endswith("plots: 1 plot as SVG (PNG needs matplotlib: pip install matplotlib)")
    (path,) = (tmp_path / "new" / "plots").iterdir()
    assert path.name == "two-runs-accuracy.svg"
    tree = parsed(path)
    first, second = (one.get("points") for one in tree.iter(f"{SVG}polyline"))
    page = re.findall(r'points="([^"]*)"', CURVES.svg())
    assert [first, second] == page  # the same drawing as on the page
    (x0, bottom), (x1, top), (x2, middle) = (tuple(map(float, pair.split(","))) for pair in first.split())
    assert x1 - x0 == pytest.approx(x2 - x1) and middle == pytest.approx((top + bottom) / 2)
    assert {"Accuracy", "two runs", "step", "one"} <= set(words(tree))
    assert " ".join(words(tree)).count('<script>alert("1")</script>') == 1
    assert tree.getroot()[2].get("fill") == "#fff" and tree.getroot()[2].get("width") == "100%"


def test_a_drawing_needs_nothing_else(tmp_path, no_matplotlib):
    write_plots(tmp_path, {("t", "c"): CURVES, ("t", "m"): COUNTS})
    for path in tmp_path.iterdir():
        content = path.read_text(encoding="utf-8")
        assert not re.search(r"var\(|url\(|@import|href|<script", content.replace("&lt;script", ""))
    colours = palette()
    assert len(colours) == 8 and set(re.findall(r"\.(c\d) polyline", content)) == set(colours)
    assert all(f".{name} circle{{fill:{colour}}}" in content for name, colour in colours.items())


def test_a_matrix_has_its_counts_in_order_each_shaded_by_its_share(tmp_path, no_matplotlib):
    write_plots(tmp_path, {("t", "m"): COUNTS})
    tree = parsed(tmp_path / "t-m.svg")
    assert [word for word in words(tree) if word.isdigit()] == ["3", "1", "0", "12345"]
    cells = [one for one in tree.iter(f"{SVG}rect") if one.get("fill-opacity")]
    assert [float(cell.get("fill-opacity")) for cell in cells] == pytest.approx([0.4875, 0.1625, 0.0, 0.65], abs=1e-3)
    width, height = (float(tree.getroot().get(name)) for name in ("width", "height"))
    assert all(float(cell.get("x")) + float(cell.get("width")) <= width for cell in cells)
    assert all(float(cell.get("y")) + float(cell.get("height")) <= height for cell in cells)


def test_names_are_for_any_system_and_none_is_used_twice(tmp_path, no_matplotlib):
    assert file_name("finetune sst, a/b\\c: lr 0.001") == "finetune-sst-a-b-c-lr-0.001" and file_name("../..") == "plot"
    titles = ["a b", "a,b", "A B", "\u00e9"]
    write_plots(tmp_path, {(title, "loss"): CURVES for title in titles})
    names = [path.name for path in tmp_path.iterdir()]
    assert len({name.lower() for name in names}) == 4 and all(re.fullmatch(r"[\w.-]+\.svg", name) for name in names)
    write_plots(tmp_path, {("a b", "loss"): CURVES})
    assert len(list(tmp_path.iterdir())) == 4  # replaced


def test_what_has_no_curve_is_left_out(tmp_path, no_matplotlib):
    line = write_plots(tmp_path, {("t", "c"): Chart("c", "step", [("one", [(1, 0.5)], "c0"), ("none", [], "c1")])})
    assert line.startswith(f"wrote {tmp_path}: 0 plots as SVG") and not list(tmp_path.iterdir())


def test_a_broken_matplotlib_costs_only_the_png(tmp_path, monkeypatch):
    (tmp_path / "matplotlib").mkdir()
    (tmp_path / "matplotlib" / "__init__.py").write_text("raise RuntimeError('no display')", encoding="utf-8")
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    line = write_plots(tmp_path / "plots", {("t", "c"): CURVES, ("t", "m"): COUNTS})
    assert "2 plots as SVG (PNG needs matplotlib, because matplotlib is broken here (RuntimeError: no display))" in line
    assert len(list((tmp_path / "plots").iterdir())) == 2


def test_png_files_hold_pictures(tmp_path):
    pytest.importorskip("matplotlib")
    assert write_plots(tmp_path, {("$x", "c"): CURVES, ("t", "m"): COUNTS}).endswith("2 plots as SVG and PNG")
    from matplotlib.image import imread

    for path in tmp_path.glob("*.png"):
        picture = imread(path)
        assert picture.shape[0] > 400 and picture.std() > 0.01
    assert len(list(tmp_path.glob("*.png"))) == 2


# The command


def test_the_report_writes_the_curves_the_matrices_and_the_alpha_curve(tmp_path, monkeypatch, capsys, no_matplotlib):
    monkeypatch.chdir(tmp_path)
    for seed in (1, 2):
        with_last_line(a_run(tmp_path / "runs" / f"s{seed}", [0.5, 0.6], seed=seed), **confused("dev", GUESS))
    (tmp_path / "alpha.csv").write_text("alpha,dev\n0,0.5\n1,0.75\n", encoding="utf-8")
    assert main(["--option", "report", "--curves", "alpha.csv", "--plots", "plots"]) == 0
    assert "plots as SVG (PNG needs matplotlib: pip install matplotlib)" in capsys.readouterr().err
    trees = {path.stem: parsed(path) for path in (tmp_path / "plots").iterdir()}
    kinds = {re.sub(r"^finetune-\w+-model-", "", name) for name in trees}
    assert kinds >= {"loss", "accuracy", "confusion-dev-s1", "confusion-dev-s2", "alpha-alpha"}
    assert set(NAMES) <= set(words(next(tree for name, tree in trees.items() if name.endswith("dev-s1"))))
    assert "Accuracy by alpha" in words(trees["alpha-alpha"])


@pytest.mark.parametrize("value", ["a-file", ""])
def test_a_file_is_no_folder_for_plots(value, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    a_run(tmp_path / "runs" / "s1", [0.5])
    (tmp_path / "a-file").write_text("kept", encoding="utf-8")
    assert main(["--option", "report", "--plots", value]) == 2
    assert re.search(r"--plots (a-file|has no name): give a folder for the plots", capsys.readouterr().err)
    assert not (tmp_path / "report.html").exists() and (tmp_path / "a-file").read_text(encoding="utf-8") == "kept"
