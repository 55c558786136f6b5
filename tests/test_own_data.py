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
        "and label: --columns text=NAME,label=NAME",
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
        error="a.csv, line 5: 3 columns, not 2 as above; a record is `label,text` or more",
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
        rows = list(csv.DictReader(io.StringIO(lines, newline="")))
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
    (program.folder / "new.csv").write_text(
        table(["id", "review"], [row[:2] for row in rows], ";"), encoding="utf-8", newline=""
    )
    code, _, err = program("--option", "classify", "--finetuned", "run", "--prompt_file", "new.csv", "--out", "n.csv")
    assert code == 0, err
    with (program.folder / "n.csv").open(encoding="utf-8", newline="") as file:
        found = list(csv.DictReader(file))
    assert [(int(row["id"]), row["review"]) for row in found] == [row[:2] for row in rows]
    assert list(found[0]) == ["id", "review", "predicted", "p_neg", "p_pos"]
