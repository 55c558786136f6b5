"""Files as people have them: one command trains on each and predicts, or one line says what to type."""

from __future__ import annotations

import csv
import io
import json

import pytest

from minillama.formats.checkpoint import write_checkpoint
from models import tiny_llama
from programs import Program

TEXTS = ["a bad dull film", "one good day", "what a dull story", "such a good end"]
WANTED = "--columns text=NAME,label=NAME"
ROWS = [(("neg", "pos")[i % 2], f"{TEXTS[i % 4]} {i}") for i in range(40)]


def table(names, rows, separator=",", end="\r\n"):
    """A CSV as the standard library writes it."""
    stream = io.StringIO(newline="")
    writer = csv.writer(stream, delimiter=separator, lineterminator=end)
    writer.writerows([names, *rows] if names else rows)
    return stream.getvalue()


def own(*names, of=None):
    """A table with these names, of rows of label and text."""
    return table(list(names), ROWS if of is None else of)


def objects(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


class Case:
    """A file, and what the training of it says. taken: what is read; error: the end of the one line; more: typed."""

    def __init__(self, name, content, taken="", *, rows=40, error="", warning="", more=()):
        self.name, self.content, self.taken = name, content, taken
        self.rows, self.error, self.warning, self.more = rows, error, warning, list(more)


TWO = "(2 classes: neg, pos)"
BY_NAME = 'text = "text", label = "label"'
CASES = {
    "label first": Case("a.csv", own("label", "text"), f"{BY_NAME} {TWO}"),
    "text first": Case("a.csv", table(["text", "label"], [(text, label) for label, text in ROWS]), f"{BY_NAME} {TWO}"),
    "semicolons": Case(
        "a.csv",
        table(["Review", "Sentiment"], [(f"{t}, {t}", n) for n, t in ROWS], ";"),
        'text = "Review", label = "Sentiment"',
    ),
    "tabs in a csv": Case("a.csv", table(["label", "text"], ROWS, "\t"), BY_NAME),
    "quotes and newlines inside": Case(
        "a.csv", own("label", "text", of=[(n, f'he said "{t}",\nand\r\nleft') for n, t in ROWS]), BY_NAME
    ),
    "byte order mark": Case("a.csv", "\ufeff" + own("label", "text"), BY_NAME),
    "CRLF and Excel's line": Case("a.csv", "sep=;\r\n" + table(["label", "text"], ROWS, ";"), BY_NAME),
    "further columns": Case(
        "a.csv",
        table(
            ["id", "date", "url", "review", "stars"],
            [(i, "2024-01-02", "http://x/y", t, 1 + (n == "pos") * 4) for i, (n, t) in enumerate(ROWS)],
        ),
        'text = "review", label = "stars" (2 classes: 1, 5)',
    ),
    "JSON lines": Case(
        "a.jsonl",
        objects({"id": i, "sentence": t, "label": n == "pos"} for i, (n, t) in enumerate(ROWS)),
        'text = "sentence", label = "label" (2 classes: false, true)',
    ),
    "a JSON list": Case(
        "a.json", json.dumps([{"text": t, "category": n} for n, t in ROWS], indent=1), 'label = "category"'
    ),
    "GLUE's SST-2": Case(
        "train.tsv",
        "sentence\tlabel\n" + "".join(f'{t} "so \t{int(n == "pos")}\n' for n, t in ROWS),
        'text = "sentence", label = "label" (2 classes: 0, 1)',
    ),
    "AG News as published": Case(
        "a.csv",
        table(None, [(1 + (n == "pos"), "Title", f"{t}\\band") for n, t in ROWS]),
        "text = column 2 + column 3, label = column 1",
    ),
    "AG News with names": Case(
        "a.csv",
        table(["Class Index", "Title", "Description"], [(1 + (n == "pos"), "Title", t) for n, t in ROWS]),
        'text = "Title" + "Description", label = "Class Index"',
    ),
    "Yelp": Case(
        "a.csv",
        "".join(f'"{1 + (n == "pos")}","{t}\\n\\nHe said ""no"" \\""yes\\"""\n' for n, t in ROWS),
        "text = column 2, label = column 1",
    ),
    "IMDB": Case(
        "a.csv",
        table(["review", "sentiment"], [(f"{t}<br /><br />The end.", n) for n, t in ROWS]),
        'text = "review", label = "sentiment"',
    ),
    "emoji": Case("a.csv", own("label", "text", of=[(n, f"{t} 😀 é \u2028 日本") for n, t in ROWS]), BY_NAME),
    "a field of a million characters": Case(
        "a.csv",
        own("label", "text", of=[*ROWS, ("pos", "good " * 200_000)]),
        BY_NAME,
        rows=41,
        warning="sentences were cut",
    ),
    "one class": Case(
        "a.csv",
        own("label", "text", of=[("pos", t) for _, t in ROWS]),
        error='has one class, "pos"; a classifier needs rows of two classes or more',
    ),
    "95 to 5": Case(
        "a.csv",
        own("label", "text", of=[("pos" if i == 7 or i == 27 else "neg", t) for i, (_, t) in enumerate(ROWS)]),
        f"{BY_NAME} {TWO}",
    ),
    "duplicates": Case("a.csv", own("label", "text", of=ROWS[:20] + ROWS[:20]), BY_NAME),
    "some empty texts": Case(
        "a.csv",
        own("label", "text", of=[*ROWS, ("pos", ""), ("neg", " ")]),
        BY_NAME,
        warning="2 rows have no text and are left out (lines 42, 43)",
    ),
    "an empty label": Case(
        "a.csv",
        own("label", "text", of=[*ROWS, ("", "a good day")]),
        error="a.csv, line 42: the label is missing; write one, or remove the row",
    ),
    "unlabelled": Case(
        "a.csv", table(["text"], [(t,) for _, t in ROWS]), error="line 1: 1 column; a record is `label,text` or more"
    ),
    "columns without usual names": Case(
        "a.csv",
        table(["Bewertung", "Meinung", "Ort"], [(n, t, "x") for n, t in ROWS]),
        error="--columns text=NAME,label=NAME",
    ),
    "the same, named": Case(
        "a.csv",
        table(["Bewertung", "Meinung", "Ort"], [(n, t, "x") for n, t in ROWS]),
        'text = "Meinung", label = "Bewertung"',
        more=["--columns", "text=Meinung,label=Bewertung"],
    ),
    "numbers of columns": Case(
        "a.csv",
        table(None, [(t, "x", n) for n, t in ROWS]),
        "text = column 1, label = column 3",
        more=["--columns", "text=1,label=3"],
    ),
    "text first, no names": Case(
        "a.csv",
        table(None, [(t, n) for n, t in ROWS]),
        error="a.csv, column 1 has 40 different labels in 40 rows, so it holds no classes; say which columns hold text "
        "and label: --columns text=NAME,label=NAME, or list the classes in a file for --label-names",
    ),
    "labels of two spellings": Case(
        "a.csv",
        own("label", "text", of=[*ROWS, ("Pos", "a good one")]),
        error='has "pos" (20) and "Pos" (1); make them one label, or name classes with --label-names: {"pos": "pos", '
        '"Pos": "pos", "...": "..."}',
    ),
    "a slip of the pen": Case(
        "a.csv",
        own("label", "text", of=[*((n.replace("pos", "positive"), t) for n, t in ROWS), ("postive", "good")]),
        BY_NAME,
        rows=41,
        warning='"postive" (1 row) is close to "positive" (20 rows)',
    ),
    "uneven rows": Case(
        "a.csv",
        own("label", "text", of=[*ROWS[:3], ("pos", "a", "b")]),
        error='a.csv, line 5: 3 columns, not 2 as above; a text with "," in it needs double quotes around it',
    ),
    "a broken object": Case(
        "a.jsonl",
        '{"text": "a", "label": 1}\n{"text": \n',
        error="a.jsonl, line 2: not JSON (Expecting value: line 1 column 9 (char 8)); a line is an object such as "
        '{"text": "...", "label": "..."}',
    ),
    "lines": Case("mine.txt", "".join(f"{n} ||| {t}\n" for n, t in ROWS), f"mine.txt: 40 rows {TWO}"),
}


@pytest.fixture
def program(asset, tmp_path, monkeypatch, capsys):
    """A folder with a tiny model."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(asset("stories260K/tok512.model").read_bytes())
    model = tiny_llama(vocab_size=512, max_seq_len=64)
    write_checkpoint(tmp_path / "model.pt", model.state_dict(), model.config)
    return Program(tmp_path, capsys)


MODEL = ["--pretrained-model-path", "model.pt", "--tokenizer", "tokenizer.model", "--dtype", "fp32"]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_one_command_trains_on_a_file_and_another_one_labels_it(program, case):
    (program.folder / case.name).write_bytes(case.content.encode())
    before = program.files()
    training = ["--option", "finetune", "--epochs", "1", "--batch_size", "8", "--run_dir", "run", *MODEL]
    code, out, err = program(*training, "--train", case.name, *case.more)
    if case.error:
        assert code == 2 and err.splitlines()[-1].startswith("run_llama.py: error: ") and out == ""
        assert err.rstrip().endswith(case.error) or case.error in err.splitlines()[-1], err
        assert program.files() == before and "Traceback" not in err
        return
    assert code == 0, err
    assert case.taken in err and f"{case.name}: {case.rows} rows" in err and case.warning in err
    assert out.startswith("dev accuracy ")
    if case.name.endswith(".txt"):
        return
    more = [word.replace(",label=Bewertung", "").replace(",label=3", "") for word in case.more]
    code, out, err = program("--option", "classify", "--finetuned", "run", "--prompt_file", case.name, *more)
    assert code == 0, err
    made = err.rstrip().splitlines()[-1].removeprefix("wrote ")
    assert out.startswith(f"{case.rows} rows: ")
    lines = (program.folder / made).read_text(encoding="utf-8")
    if made.endswith(".jsonl"):
        rows = [json.loads(line) for line in lines.splitlines()]
        own = (
            [json.loads(line) for line in case.content.splitlines()]
            if case.name == "a.jsonl"
            else json.loads(case.content)
        )
    else:
        csv.field_size_limit(10_000_000)
        head = lines.lstrip("\ufeff").partition("\n")[0]
        separator = max(",;\t", key=head.count)
        rows = list(csv.DictReader(io.StringIO(lines.lstrip("\ufeff"), newline=""), delimiter=separator))
        own = None
    assert len(rows) == case.rows
    for row in rows:
        shares = {name: float(value) for name, value in row.items() if name.startswith("p_")}
        assert sum(shares.values()) == pytest.approx(1, abs=1e-5)
        assert (
            max(shares, key=shares.get)
            == f"p_{json.dumps(row['predicted']) if isinstance(row['predicted'], bool) else row['predicted']}"
        )
    if own is not None:
        assert [{name: row[name] for name in one} for one, row in zip(own, rows, strict=True)] == own


def test_the_columns_of_a_table_come_back_as_they_were(program):
    rows = [(i, f'"{text}",\nmore; é 😀', label) for i, (label, text) in enumerate(ROWS)]
    (program.folder / "all.csv").write_text(table(["id", "review", "stars"], rows), encoding="utf-8", newline="")
    assert program("--option", "lora", "--epochs", "1", "--train", "all.csv", "--run_dir", "run", *MODEL)[0] == 0
    assert (program.folder / "all-lora-1-2e-05.pt").exists()
    new = table(["id", "review"], [row[:2] for row in rows], ";")
    (program.folder / "new.csv").write_text(new, encoding="utf-8-sig", newline="")
    code, _, err = program("--option", "classify", "--finetuned", "run", "--prompt_file", "new.csv", "--out", "n.csv")
    assert code == 0, err
    assert (program.folder / "n.csv").read_bytes().startswith(b"\xef\xbb\xbfid;review;predicted")
    with (program.folder / "n.csv").open(encoding="utf-8-sig", newline="") as file:
        found = list(csv.DictReader(file, delimiter=";"))
    assert [(int(row["id"]), row["review"]) for row in found] == [row[:2] for row in rows]
    assert list(found[0]) == ["id", "review", "predicted", "p_neg", "p_pos"]


def test_predictions_are_not_written_over_those_for_other_data(program):
    for folder in (".", "other"):
        (program.folder / folder).mkdir(exist_ok=True)
        (program.folder / folder / "a.csv").write_text(table(["label", "text"], ROWS), encoding="utf-8", newline="")
    assert program("--option", "finetune", "--epochs", "1", "--train", "a.csv", "--run_dir", "run", *MODEL)[0] == 0
    assert (program.folder / "a-dev-finetuning-output.csv").exists()
    classify = ["--option", "classify", "--finetuned", "run", "--prompt_file"]
    assert program(*classify, "a.csv")[0] == program(*classify, "a.csv")[0] == 0
    before = program.files()
    code, out, err = program(*classify, "other/a.csv")
    assert code == 2 and "a-classified.csv already exists and holds predictions for a.csv; name another" in err
    code, _, err = program("--option", "finetune", "--epochs", "1", "--train", "other/a.csv", *MODEL)
    assert code == 2 and "a-dev-finetuning-output.csv already exists and holds predictions for a.csv" in err
    (program.folder / "new.csv").write_text(table(["text", "predicted"], [("good", "x")]), encoding="utf-8", newline="")
    code, _, err = program(*classify, "new.csv")
    assert code == 0 and "warning: new.csv: the columns predicted are replaced by the new predictions" in err
    (program.folder / "new-classified.csv").write_text("unpredicted sales\n1\n", encoding="utf-8")
    code, _, err = program(*classify, "new.csv")
    assert code == 2 and "new-classified.csv already exists and holds no predictions as written" in err
    assert {name: program.files()[name] for name in before} == before


def test_mixing_knows_which_rows_were_held_out(program):
    (program.folder / "a.csv").write_text(table(["label", "text"], ROWS), encoding="utf-8", newline="")
    train = ["--option", "finetune", "--epochs", "1", "--train", "a.csv", "--dev", "0.2", "--seed", "3", *MODEL]
    code, out, _ = program(*train, "--run_dir", "run")
    told = out.split(",")[0]
    mix = ["--option", "wise_ft", "--finetuned", "run", "--alphas", "1"]
    code, out, err = program(*mix)
    assert code == 0 and f"\n{told}," in out and "(8 rows)" in out and "ignored" not in err
    code, _, err = program(*mix, "--dev", "0.5")
    assert code == 2 and "--dev 0.5 would hold out rows that run/best.pt was trained on; give a file" in err
    code, _, err = program(*mix, "--dev_out", "a.csv")
    assert code == 2 and "a.csv is both input and output" in err


@pytest.mark.parametrize("share", ["0", "1", "20%", "1.5"])
def test_a_number_that_is_no_share_is_refused(program, share):
    (program.folder / "a.csv").write_text(table(["label", "text"], ROWS), encoding="utf-8", newline="")
    code, _, err = program("--option", "lora", "--train", "a.csv", "--dev", share, *MODEL)
    assert code == 2 and f"--dev {share} is neither a file nor a share of --train between 0 and 1, as in 0.2" in err


def test_a_test_file_may_lack_the_label_that_was_named(program):
    names = ["Bewertung", "Meinung", "Ort"]
    (program.folder / "a.csv").write_text(table(names, [(*row, "x") for row in ROWS]), encoding="utf-8", newline="")
    (program.folder / "t.csv").write_text(
        table(names[1:], [(row[1], "x") for row in ROWS]), encoding="utf-8", newline=""
    )
    columns = ["--columns", "text=Meinung,label=Bewertung"]
    run = ["--option", "finetune", "--epochs", "1", "--train", "a.csv", "--test", "t.csv", "--run_dir", "run", *MODEL]
    code, out, err = program(*run, *columns)
    assert code == 0 and "test has no gold labels" in out, err
    code, _, err = program("--option", "evaluate", "--finetuned", "run", "--test", "t.csv")
    assert code == 2 and "t.csv has no labels, or the same one in all rows" in err


def test_numbers_of_columns_are_of_their_file_alone_and_names_of_others_are_found(program):
    rows = [(i, text, label) for i, (label, text) in enumerate(ROWS)]
    (program.folder / "a.csv").write_text(table(None, rows), encoding="utf-8", newline="")
    run = ["--option", "finetune", "--epochs", "1", "--train", "a.csv", "--run_dir", "run", *MODEL]
    assert program(*run, "--columns", "text=2,label=3")[0] == 0
    new = table(["day", "id", "text"], [("x", i, text) for i, text, _ in rows])
    (program.folder / "new.csv").write_text(new, encoding="utf-8", newline="")
    code, _, err = program("--option", "classify", "--finetuned", "run", "--prompt_file", "new.csv")
    assert code == 0 and 'text = "text"' in err
    (program.folder / "t.csv").write_text(table(["label", "text"], ROWS), encoding="utf-8", newline="")
    code, out, err = program("--option", "evaluate", "--finetuned", "run", "--test", "t.csv")
    assert code == 0 and 'text = "text", label = "label"' in err and "rows      40" in out


def test_many_classes_are_allowed_if_their_column_was_named(program):
    rows = [(f"class {i % 30}", f"{TEXTS[i % 4]} {i}") for i in range(90)]
    (program.folder / "a.csv").write_text(table(["label", "text"], rows), encoding="utf-8", newline="")
    run = ["--option", "lora", "--epochs", "1", "--train", "a.csv", *MODEL]
    code, _, err = program(*run)
    assert code == 2 and "has 30 different labels in 90 rows" in err
    assert program(*run, "--columns", "label=label")[0] == 0


def test_a_model_reads_other_tables_by_the_columns_of_its_training(program):
    rows = [(label, "So", text) for label, text in ROWS]
    first = table(["label", "title", "description"], rows)
    (program.folder / "a.csv").write_text(first, encoding="utf-8", newline="")
    assert program("--option", "lora", "--epochs", "1", "--train", "a.csv", "--run_dir", "run", *MODEL)[0] == 0
    new = table(["id", "description", "text", "title"], [(1, "good day", "other", "So")])
    (program.folder / "new.csv").write_text(new, encoding="utf-8", newline="")
    classify = ["--option", "classify", "--finetuned", "run", "--prompt_file"]
    code, _, err = program(*classify, "new.csv")
    assert code == 0 and 'text = "title" + "description"' in err
    (program.folder / "t.csv").write_text(table(["review"], [("good day",)]), encoding="utf-8", newline="")
    code, _, err = program(*classify, "t.csv")
    assert code == 0 and 'text = "review"' in err


def test_nothing_that_is_read_is_written_over(program):
    rows = table(["fold", "label", "text"], [("dev" if i % 2 else "x", *row) for i, row in enumerate(ROWS)])
    (program.folder / "a.csv").write_text(rows, encoding="utf-8", newline="")
    assert program("--option", "finetune", "--epochs", "1", "--train", "a.csv", "--run_dir", "run", *MODEL)[0] == 0
    before = {path: path.read_bytes() for path in program.folder.rglob("*") if path.is_file()}
    for command in (
        ["classify", "--prompt_file", "a.csv#fold=dev", "--out", "a.csv"],
        ["evaluate", "--test", "a.csv", "--test_out", "run/best.pt"],
        ["evaluate", "--test", "a.csv", "--test_out", "run/options.json"],
        ["wise_ft", "--alphas", "1", "--dev_out", "a.csv"],
        ["wise_ft", "--alphas", "1", "--curve_out", "a.csv"],
    ):
        code, out, err = program("--option", *command, "--finetuned", "run")
        assert code == 2 and "is both input and output" in err, command
    assert {path: path.read_bytes() for path in program.folder.rglob("*") if path.is_file()} == before
    (program.folder / "a.csv").write_text(rows + "x,pos,more\r\n", encoding="utf-8", newline="")
    code, _, err = program("--option", "wise_ft", "--alphas", "1", "--finetuned", "run")
    assert code == 2 and "a.csv is missing or has changed since run/best.pt was trained" in err


def test_json_of_a_table_keeps_the_labels_that_it_has(program):
    (program.folder / "a.csv").write_text(table(["label", "text"], ROWS), encoding="utf-8", newline="")
    run = ["--option", "finetune", "--epochs", "1", "--train", "a.csv", "--run_dir", "run", *MODEL]
    code, _, err = program(*run)
    assert "data        train a.csv, dev 0.1 of train, labels those of train" in err
    assert err.rstrip().endswith("--prompt_file new.csv")
    code, out, _ = program("--option", "classify", "--finetuned", "run", "--prompt_file", "a.csv", "--json")
    found = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and [(row["label"], row["text"]) for row in found] == ROWS
    assert all(list(row)[2:] == ["predicted", "p_neg", "p_pos"] for row in found)
    code, _, err = program("--option", "evaluate", "--finetuned", "run", "--test", "a.csv")
    assert code == 0 and "warning: run/best.pt was trained on a.csv, so these scores say nothing" in err
