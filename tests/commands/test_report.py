"""--option report: the page shows the content of the runs' files, shows any text as text, and survives damaged runs."""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path

import pytest

from minillama.cli.finished_runs import find_runs, read_curves, read_run
from minillama.commands import COMMANDS
from minillama.commands.report import grouped, page
from reported_runs import GOLD, GUESS, NAMES, Page, a_run, confused, with_last_line
from run_llama import main

NASTY = '<script>alert("1")</script> & \x00 <b>'


def shown(*folders):
    return Page(page([read_run(path, path.name, COMMANDS) for path in folders]))


def test_runs_that_differ_in_seed_only_make_one_line_of_mean_and_deviation(tmp_path):
    best = [0.5, 0.75, 0.625]
    folders = [a_run(tmp_path / f"s{i}", [0.25, value], seed=i) for i, value in enumerate(best)]
    other = a_run(tmp_path / "other", [0.4, 0.3], seed=1, lr=2e-3)
    found = shown(*folders, other)
    line = next(row for row in found.rows if "0, 1, 2" in row[0])
    assert line[1] == f"{statistics.fmean(best):.3f} ({statistics.stdev(best):.3f})"
    assert "lr 0.001" in line[0]  # what tells the groups apart
    line = next(row for row in found.rows if "lr 0.002" in row[0])
    assert line[1] == "0.400"  # the best epoch, not the last; one seed has no deviation
    assert found.links == {"#g0", "#g1"} == {f"#{name}" for name in found.ids}


def test_the_command_of_a_run_has_its_zeros_and_all_digits(tmp_path):
    folder = a_run(
        tmp_path / "run", [0.5], seed=0, lr=0.00012345678, dora=False, option="lora", lora_targets=["mlp", "wo"]
    )
    command = read_run(folder, "run", COMMANDS).command
    assert command.startswith("python run_llama.py --option lora --seed 0 ") and "--dora" not in command
    assert " --lr 0.00012345678" in command and " --lora_targets mlp wo" in command


def test_a_part_of_what_was_off_does_not_tell_runs_apart(tmp_path):
    """Its default may have been another then."""
    off = [a_run(tmp_path / f"s{i}", [0.5], seed=i, smart=0.0, smart_eps=eps) for i, eps in ((1, 1e-3), (2, 1e-5))]
    on = [a_run(tmp_path / f"t{i}", [0.5], seed=i, smart=1.0, smart_eps=eps) for i, eps in ((1, 1e-3), (2, 1e-5))]
    heads = [row[0] for row in shown(*off, *on).rows if row[0].startswith("finetune")]
    assert sorted(re.sub(r".*seeds? ", "", head) for head in heads) == ["1", "1, 2", "2"]


def test_a_model_made_for_each_seed_counts_as_one_and_another_model_does_not(tmp_path):
    folders = [a_run(tmp_path / f"s{i}", [0.5], seed=i, pretrained_model_path=f"random-{i}.pt") for i in (1, 2)]
    folders += [a_run(tmp_path / f"t{i}", [0.5], seed=i, pretrained_model_path=f"random{i}.pt") for i in (1, 2)]
    heads = [row[0] for row in shown(*folders).rows if row[0].startswith("finetune")]
    assert [re.sub(r".*seed ", "", head) for head in sorted(heads)] == ["1, 2", "1", "2"]


def test_the_numbers_of_a_run_are_those_of_its_metrics(tmp_path):
    folder = with_last_line(a_run(tmp_path / "run", [0.625, 0.5]), **confused("dev", GUESS) | confused("test", GOLD))
    line = next(row for row in shown(folder).rows if row[-1] == "run" and row[0] == "1")
    assert line == ["1", "1 of 2", "0.625", "0.312", "1.000", "2.0", "run"]


def test_the_confusion_matrices_of_the_last_line_are_drawn(tmp_path):
    scores = confused("dev", GUESS) | confused("test", GOLD)
    found = shown(with_last_line(a_run(tmp_path / "run", [0.625]), **scores))
    for split in ("dev", "test"):
        for name, counts in zip(NAMES, scores[f"{split}_confusion"], strict=True):
            assert [name, *map(str, counts)] in found.rows
    assert "dev, seed 1: accuracy 0.625" in found.text and "test, seed 1: accuracy 1.000" in found.text
    assert "No confusion matrix" not in found.text


def test_a_missing_confusion_matrix_is_told_in_one_line_with_the_reason(tmp_path):
    no_gold = {"test_accuracy": None, "test_confusion": None}
    finished = with_last_line(a_run(tmp_path / "s1", [0.5]), **confused("dev", GUESS) | no_gold)
    assert "test: no gold labels (1 of 1 runs)" in shown(finished).text
    going = a_run(tmp_path / "s2", [0.5], seed=2)
    older = with_last_line(a_run(tmp_path / "s3", [0.5], seed=3), dev_accuracy=0.5, test_accuracy=0.5)
    text = shown(finished, going, older).text
    assert text.count("dev and test: the run has not finished, or an older version made it (2 of 3 runs)") == 1


def test_text_stays_text_wherever_it_comes_from(tmp_path):
    folder = tmp_path / "run"
    a_run(folder, [], option="pretrain", corpus=[NASTY], preset=NASTY, norm=NASTY, seed=NASTY, continued=False)
    line = {"step": 3, "epoch": NASTY, "train_loss": 1.0, "bits_per_byte": 2.0, f"bits_per_byte_{NASTY}": 1.5}
    line["sample"] = NASTY
    (folder / "metrics.jsonl").write_text(json.dumps(line) + "\n", encoding="utf-8")
    curve = tmp_path / "curve.csv"
    curve.write_text(f'alpha,"{NASTY.replace(chr(34), "")}"\n0,0.5\n1,0.75\n', encoding="utf-8")
    runs = [read_run(folder, NASTY, COMMANDS)]
    found = Page(page(runs, [(NASTY, *read_curves(str(curve)))]))
    assert not found.tags & {"script", "b ", "img"}
    assert found.text.count('<script>alert("1")</script> & \ufffd <b>') >= 8
    assert "\x00" not in page(runs)


def test_damaged_and_half_written_runs_get_a_line_and_the_others_are_shown(tmp_path):
    a_run(tmp_path / "good", [0.5])
    a_run(tmp_path / "cut", [0.25])
    with (tmp_path / "cut" / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('[1]\n{"step": NaN, "loss": 1}\n{"step": 5, "loss": NaN}\n{"step": 3, "lo')
    for name, content in (("no", "{"), ("list", "[]"), ("odd", '{"options": {"option": 3}}'), ("bytes", "\xff")):
        a_run(tmp_path / name, [0.125])
        (tmp_path / name / "options.json").write_text(content, encoding="latin-1")
    (a_run(tmp_path / "deep", [0.5]) / "metrics.jsonl").write_text("[" * 5000, encoding="utf-8")
    (a_run(tmp_path / "new", []) / "metrics.jsonl").unlink()
    folders = [*find_runs([str(tmp_path)]), *find_runs([str(tmp_path / "good")])]
    (tmp_path / "empty").mkdir()
    folders += find_runs([str(tmp_path / "empty")])
    found = shown(*folders)
    for line in (
        "cut: 4 lines of metrics.jsonl skipped: damaged",
        *(f"{name}: options.json is damaged" for name in ("no", "list", "odd", "bytes")),
        "deep: 1 line of metrics.jsonl",
        "new: no metrics.jsonl",
        "empty: no options.json; no metrics.jsonl",
    ):
        assert line in found.text
    assert "good:" not in found.text


FIRST = {"step": 1, "epoch": 1, "train_loss": 1.0}
ODD = {
    "no exact match": ({"option": "sft"}, [FIRST | {"dev_f1": 0.5}]),
    "exact match null": ({"option": "sft"}, [FIRST | {"dev_f1": 0.5, "dev_exact_match": None}]),
    "accuracy a text": ({}, [FIRST | {"dev_accuracy": "0.5"}, FIRST | {"dev_accuracy": True, "step": [2]}]),
    "digits": ({}, [{"step": 1, "loss": 10**400}, {"step": 10**400, "loss": 1.0}, FIRST | {"dev_accuracy": 10**400}]),
    "too large to add": ({}, [{"step": n, "loss": 1.7e308} for n in range(200)]),
    "too small to divide": ({}, [{"step": n, "loss": n * 5e-324} for n in range(2)]),
    "no corpus": ({"option": "pretrain", "continued": False, "corpus": None}, [FIRST | {"bits_per_byte": 2.0}]),
    "a number for a corpus": ({"option": "pretrain", "corpus": 3}, [FIRST | {"bits_per_byte": 2.0}]),
}


@pytest.mark.parametrize("changes, lines", ODD.values(), ids=ODD)
def test_a_run_with_odd_values_does_not_end_the_page(tmp_path, changes, lines):
    a_run(tmp_path / "good", [0.5])
    (a_run(tmp_path / "odd", [], **changes) / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    found = shown(tmp_path / "good", tmp_path / "odd")
    assert ["1", "1 of 1", "0.500", "0.250", "1.0", "good"] in found.rows, "without a column of dashes"
    assert any(row[-1] == "odd" for row in found.rows) or "odd: " in found.text


@pytest.mark.parametrize("damage", [3, [1, 2, 3], [[1, 2]], [[1, 2, 3], [1, 2, 3], ["a", 2, 3]], [[10**400] * 3] * 3])
def test_a_damaged_confusion_matrix_costs_its_line_alone(tmp_path, damage):
    scores = confused("dev", GUESS) | {"test_confusion": damage}
    found = shown(with_last_line(a_run(tmp_path / "run", [0.5]), **scores))
    assert "run: 1 line of metrics.jsonl skipped: damaged" in found.text and "the run has not finished" in found.text


def test_a_mean_says_of_how_many_runs_it_is_where_not_of_all(tmp_path):
    tested = [with_last_line(a_run(tmp_path / f"s{i}", [0.5], seed=i), **confused("test", GUESS)) for i in (1, 2)]
    silent = a_run(tmp_path / "s3", [0.75], seed=3)
    half = a_run(tmp_path / "s4", [], seed=4)
    for folders, dev, test in (
        (tested, "0.500 (0.000)", "0.625 (0.000)"),
        ([*tested, silent], "0.583 (0.144)", "0.625 (0.000), 2 of 3 runs"),
        ([*tested, silent, half], "0.583 (0.144), 3 of 4 runs", "0.625 (0.000), 2 of 4 runs"),
        ([silent, half], "0.750, 1 of 2 runs", None),
    ):
        (line,) = [row for row in shown(*folders).rows if row and row[0].startswith("finetune")]
        assert line[1:] == [dev, test] if test else [dev], "no column of dashes"


def test_groups_are_told_apart_by_their_settings_as_they_would_be_typed(tmp_path):
    kind = {"option": "lora", "lora_targets": ["mlp", "compute_query"], "dora": True, "lr": 3e-4}
    folders = [a_run(tmp_path / "a", [0.5], **kind), a_run(tmp_path / "b", [0.5], option="lora", lora_targets=["mlp"])]
    heads = sorted(row[0] for row in shown(*folders).rows if row[0].startswith("lora"))
    assert heads == [
        "lora sst, model, lr 0.0003, dora on, lora_targets mlp compute_query seed 1",
        "lora sst, model, lr 0.001, lora_targets mlp seed 1",
    ]


def test_the_last_line_of_a_finished_run_is_neither_damage_nor_an_epoch(tmp_path):
    today = with_last_line(a_run(tmp_path / "s1", [0.5, 0.25], seed=1), dev_accuracy=0.5, dev_loss=0.7, test_accuracy=1)
    older = a_run(tmp_path / "s2", [0.25], seed=2)
    run = read_run(today, "run", COMMANDS)
    assert run.problems == [] and len(run.scores) == 2 and run.best()["epoch"] == 1
    shown = Page(page([read_run(path, path.name, COMMANDS) for path in (today, older)]))
    (head, *_) = (row for row in shown.rows if row[0] == "seed")
    assert "macro-F1" in head and "exact match" not in head  # a classifier, though it has a loss on dev
    assert "Loss on dev after each epoch" in shown.text


def test_what_was_typed_and_substituted_does_not_tell_runs_apart(tmp_path):
    new = a_run(tmp_path / "s1", [0.5], seed=1, typed=["seed"], substituted=["pretrained_model_path"])
    old = a_run(tmp_path / "s2", [0.5], seed=2)
    ((_, members),) = grouped([read_run(path, path.name, COMMANDS) for path in (new, old)])
    assert len(members) == 2


def test_samples_and_bits_per_byte_of_pretraining_are_shown(tmp_path):
    folder = a_run(tmp_path / "run", [], option="pretrain", corpus=["a.txt=2"], continued=False)
    lines = [
        {"step": i, "epoch": i, "train_loss": 1.0, "bits_per_byte": 2.0 - i / 116, "bits_per_byte_a": 1.0}
        | {"sample": f"text {i}!"}
        for i in range(1, 30)
    ]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    found = shown(folder)
    assert any(row[-1:] == ["1.750"] for row in found.rows)
    assert found.text.count("!") == 6 and "text 1!" in found.text and "text 29!" in found.text


@pytest.mark.parametrize("answered", [True, False])
def test_exact_match_and_f1_of_answers_are_shown(tmp_path, answered):
    for seed, best in ((1, 0.5), (2, 0.7)):
        folder = a_run(tmp_path / f"s{seed}", [], option="sft", seed=seed, train="data/demo-qa-train.jsonl", epochs=4)
        scores = [{"dev_loss": 1.0, "dev_exact_match": 0.1, "dev_f1": 0.2}]
        scores += [{"dev_loss": 1.25, "dev_exact_match": best, "dev_f1": best + 0.1}]
        lines = [{"step": n, "epoch": n, "train_loss": 1.0} | score for n, score in enumerate(scores, start=1)]
        if not answered:
            lines = [
                {name: value for name, value in line.items() if name[:5] not in ("dev_e", "dev_f")} for line in lines
            ]
        (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    found = shown(tmp_path / "s1", tmp_path / "s2")
    (means,) = [row[1:] for row in found.rows if row and row[0].startswith("sft demo-qa")] or [None]
    assert means == (["0.600 (0.141)", "0.700 (0.141)"] if answered else None)
    kept = ["2 of 2", "0.500", "0.600", "1.250"] if answered else ["1 of 2", "1.000"]  # by F1, else by loss
    assert ["1", *kept, "0.0", "s1"] in found.rows
    assert "epochs" not in found.text  # 4 is sft's default


# Charts


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    a_run(Path("runs/a"), [0.5])
    return tmp_path


def test_the_command_writes_the_page_and_takes_a_curve(runs, capsys):
    Path("curve.csv").write_text("alpha,sst,cfimdb\n1,0.5,0.9\n0,0.25,\n", encoding="utf-8")
    assert main(["--option", "report", "--curves", "curve.csv"]) == 0
    assert capsys.readouterr().err == "wrote report.html: 1 run\n"
    found = Page(Path("report.html").read_text(encoding="utf-8"))
    assert ["0", "0.250", "–"] in found.rows and ["1", "0.500", "0.900"] in found.rows


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--runs", "nowhere"], "--runs nowhere does not exist"),
        (["--runs", "file.txt"], "--runs file.txt is a file"),
        (["--runs", "other"], "there is no run under other"),
        (["--report_out", "runs/a/metrics.jsonl"], "its name must end in .html"),
        (["--report_out", "no/a.html"], "there is no folder no"),
        (
            ["--curves", "nowhere.csv"],
            "--curves nowhere.csv cannot be read (No such file or directory); give the CSV that --option wise_ft wrote",
        ),
        (["--curves", "other"], "--curves other cannot be read (Is a directory); give the CSV"),
        (["--curves", "file.txt"], "--curves file.txt: it needs a header (alpha, "),
        (["--curves", "bad.csv"], "--curves bad.csv, row 3: 'x, 0.5'; it must be 2 numbers"),
        (["--run_dir", "runs/a"], "--run_dir belongs to"),
    ],
)
def test_nonsense_gets_one_line_and_no_page(runs, capsys, arguments, message):
    Path("file.txt").write_text("a\n1\n", encoding="utf-8")
    Path("bad.csv").write_text("alpha,sst\n0,0.5\nx,0.5\n", encoding="utf-8")
    Path("other/inner").mkdir(parents=True)
    assert main(["--option", "report", *arguments]) == 2
    line = capsys.readouterr().err
    assert message in line and line.count("\n") == 1
    assert not list(runs.rglob("*.html"))
