"""Files of labelled rows, of every kind."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from conftest import ROOT
from minillama.text.labelled import (
    Row,
    class_names,
    has_gold_labels,
    missing_classes,
    read_labels,
    read_rows,
)
from models import CFIMDB, SST, written

# Reading


@pytest.mark.parametrize(
    "text, sentences",
    [
        (b"0 ||| one\n1 ||| two\n", ["one", "two"]),
        (b"0 ||| one\n1 ||| two", ["one", "two"]),
        (b"0 ||| one\r\n1 ||| two\r\n", ["one", "two"]),
        (b"0 ||| one\r1 ||| two\r", ["one", "two"]),
        (b"0 ||| one\r\r\n1 ||| two\r\r\n", ["one", "two"]),
        (b"0 ||| one\n1 ||| two\r\n\r", ["one", "two"]),
        (b"\xef\xbb\xbf0 ||| one\n1 ||| two\n\n\n", ["one", "two"]),
        (b"0 |||   one  \n1 ||| a ||| b\n", ["one", "a ||| b"]),
        (
            "0 ||| one\u2028more\x85 and\x0bmore\n1 ||| zwölf 映画\n".encode(),
            ["one\u2028more\x85 and\x0bmore", "zwölf 映画"],
        ),
    ],
    ids=[
        "plain",
        "no last newline",
        "CRLF",
        "CR",
        "CRCRLF",
        "mixed",
        "byte-order mark, blank end",
        "spaces and separators",
        "odd line breaks",
    ],
)
def test_rows_of_every_kind_of_text_file(tmp_path, text, sentences):
    rows = read_rows(written(tmp_path / "rows.txt", text), CFIMDB)
    assert [row.sentence for row in rows] == sentences
    assert [row.label for row in rows] == [0, 1]


@pytest.mark.parametrize(
    "text, message",
    [
        ("0 ||| one\n1 two\n", r'rows.txt, line 2: no " \|\|\| " in \'1 two\''),
        ("0 ||| one\n1 |||two\n", r"line 2: no"),
        ("0 ||| one\n\n \n1 two\n", r"line 4: no"),
        ("0 ||| one\nx ||| two\n", "line 2: label 'x' is none of"),
        ("0 ||| one\nx ||| two\n", r"is none of 0 to 1 \(bad, good\); correct it"),
        ("0 ||| one\n" + "9" * 5000 + " ||| two\n", r"line 2: label '9{20,60}' is none of 0 to 1 \(bad, good\)"),
        ("0 ||| one\n" + "9" * 5000 + "x ||| two\n", r"line 2: label '9{20,60}' is none of"),
        ("0 ||| one\r1 ||| \r0 ||| x", "line 2: the sentence is empty"),
        ("0 ||| one\n1_0 ||| two\n", "line 2: label '1_0' is none of"),
        ("0 ||| one\n1.0 ||| two\n", "line 2: label '1.0' is none of"),
        ("0 ||| one\n2 ||| two\n", r"line 2: label '2' is none of 0 to 1 \(bad, good\)"),
        ("-1 ||| one\n", "line 1: label '-1' is none of 0 to 1"),
        ("0 ||| one\n1 ||| \n0 ||| x", "line 2: the sentence is empty"),
        ("0 ||| one\n1 |||", "line 2: the sentence is empty"),
        ("", "rows.txt is empty"),
        (" \n\n", "rows.txt is empty"),
        (b"0 ||| one\n1 ||| \xff\xfe\n", "line 2: not UTF-8"),
        (b"0 ||| one\r\n1 ||| two\r0 ||| \xff\xfe\n", "line 3: not UTF-8"),
    ],
)
def test_a_bad_line_is_named(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        read_rows(written(tmp_path / "rows.txt", text), CFIMDB)


@pytest.mark.parametrize("label", ["0", "00", " 1 ", "+1", "١", "-0"])
def test_a_label_is_plain_digits(tmp_path, label):
    path = written(tmp_path / "rows.txt", f"{label} ||| one\n")
    if label in ("+1", "١"):
        with pytest.raises(ValueError, match="is none of"):
            read_rows(path, CFIMDB)
    else:
        assert read_rows(path, CFIMDB)[0].label == int(label)


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.txt: no such data file"):
        read_rows(tmp_path / "none.txt", CFIMDB)
    with pytest.raises(ValueError, match="is not a file"):
        read_rows(tmp_path, CFIMDB)


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[" + "9" * 5000 + "]", "is not JSON|should be a JSON list"),
        ('{"bad": 0}', "should be a JSON list of names"),
        ('["bad", 1]', "should be a JSON list of names"),
        ('["bad", " "]', "should be a JSON list of names"),
        ('["bad"]', "at least two names"),
        ('["bad", "bad"]', "each once"),
    ],
)
def test_label_names_are_a_list_of_distinct_names(tmp_path, content, message):
    path = tmp_path / "names.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        class_names(read_labels(path))
    path.write_text(json.dumps(SST), encoding="utf-8")
    assert class_names(read_labels(path)) == SST


# Other files, other labels


def named(tmp_path, name, text):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8"))
    return path


def mapping(tmp_path, content):
    return read_labels(named(tmp_path, "mapping.json", content if isinstance(content, str) else json.dumps(content)))


def test_ag_news_is_read_as_it_is_published(asset):
    """Against another way to take it apart: in this file each record is one line, and all its fields are quoted."""
    path = asset("agnews/test.csv")
    names = asset("agnews/classes.txt").read_text(encoding="utf-8").split("\n")[:4]
    labels = read_labels(ROOT / "data" / "agnews-label-mapping.json")
    assert class_names(labels) == names
    rows = read_rows(path, labels)
    assert Counter(row.label for row in rows) == dict.fromkeys(range(4), 1900)
    for row, line in zip(rows, path.read_text(encoding="utf-8").split("\n"), strict=False):
        label, title, description = line.removeprefix('"').removesuffix('"').split('","')
        text = f"{title.strip()} {description.strip()}".replace('""', '"').replace("\\", " ").strip()
        assert (row.label, row.sentence) == (int(label) - 1, text)


def test_the_text_of_a_tab_separated_file_is_its_longest_column(asset):
    ag_news = read_labels(ROOT / "data" / "agnews-label-mapping.json")
    path = asset("agnews/train_subset.tsv")
    assert len(read_rows(path, ag_news)) == 8690
    balanced = read_rows(f"{path}#fold=lst*", ag_news)
    assert len(balanced) == 4925 and max(Counter(row.label for row in balanced).values()) < 1260
    assert balanced[0].sentence.startswith("BEA buzzing") and balanced[0].sentence.endswith("by Eclipse.")
    for name, count in (("product_reviews_sentences", 3734), ("subjectivity_10000", 10000)):
        rows = read_rows(asset(f"reviews/{name}.tsv"), CFIMDB)
        assert len(rows) == count and {row.label for row in rows} == {0, 1}


def test_folds_of_the_film_reviews(asset):
    path = asset("reviews/movie_reviews_2000.tsv")
    folds = [read_rows(f"{path}#fold=cv{n}*", CFIMDB) for n in ("9", "[0-8]", "")]
    assert [len(rows) for rows in folds] == [200, 1800, 2000]
    assert all(Counter(row.label for row in rows) == dict.fromkeys((0, 1), len(rows) // 2) for rows in folds)
    wanted = [line.split("\t") for line in path.read_text(encoding="utf-8").split("\n") if line[1:].startswith("\tcv9")]
    assert [(row.label, row.sentence) for row in folds[0]] == [(int(label), text) for label, _, text in wanted]
    assert folds[2] == read_rows(path, CFIMDB)


@pytest.mark.parametrize("split, count", [("train", 6920), ("dev", 872), ("test", 1821)])
def test_two_classes_made_of_five_are_the_published_sst_2(asset, split, count):
    path = asset(f"course/data/sst-{split}.txt")
    rows = read_rows(path, read_labels(ROOT / "data" / "sst-binary-label-mapping.json"))
    assert len(rows) == count
    assert [row for row in read_rows(path, SST) if row.label == 3][0].sentence in {r.sentence for r in rows if r.label}


def test_class_ids_go_by_first_mention_and_null_leaves_rows_out(tmp_path):
    labels = mapping(tmp_path, {"pos": "good", "meh": None, "neg": "bad", "very neg": "bad"})
    assert class_names(labels) == class_names(read_labels(tmp_path / "mapping.json")) == ["good", "bad"]
    path = named(tmp_path, "a.tsv", "neg\tone\nmeh\ttwo\npos\tthree\nvery neg\tfour\n")
    assert read_rows(path, labels) == [Row(1, "one"), Row(0, "three"), Row(1, "four")]
    assert mapping(tmp_path, ["bad", "good"]) == {"0": "bad", "1": "good"}
    one = named(tmp_path, "b.txt", "03 ||| a\n1 ||| b")
    assert read_rows(one, mapping(tmp_path, {"3": "x", "1": "y"})) == [Row(0, "a"), Row(1, "b")]
    with pytest.raises(ValueError, match="b.txt: no rows are left"):
        read_rows(one, {"3": None, "1": None, "2": "x", "4": "y"})


def test_a_csv_field_may_hold_quotes_commas_and_line_breaks(tmp_path):
    text = b'"1","a, ""b""","c\\d\r\ne"\r\n2,f,g\n'
    assert read_rows(named(tmp_path, "a.CSV", text), {"1": "x", "2": "y"}) == [Row(0, 'a, "b" c d e'), Row(1, "f g")]


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("a.csv", "1,a\n2,b,c\n", "a.csv, line 2: 3 columns, not 2 as above"),
        ("a.csv", '1,"a\nb"\n2,b\n3,c', r"a.csv, line 4: label '3' is none of 1 \(bad\), 2 \(good\)"),
        ("a.csv", '1,a\n2,"b\n', "a.csv, line 2: not CSV"),
        ("a.csv", '1,a\n2,"b"c\n', "a.csv, line 2: not CSV"),
        ("a.csv", "1,a\n\n3,c\n", r"a.csv, line 3: label '3' is none of 1"),
        ("a.tsv", "1\ta\n\n3\tc\n", r"a.tsv, line 3: label '3' is none of 1"),
        ("a.csv", "1 a\n", "a.csv, line 1: 1 column; a record is `label,text`"),
        ("a.csv", "", "a.csv is empty; it should be a data file"),
        ("a.tsv", "1\ta\n2 b\n", "a.tsv, line 2: 1 column, not 2 as above"),
        ("a.tsv", "1\ta\nx\tb\n", "a.tsv, line 2: label 'x' is none of 1"),
        ("a.tsv", "1 ||| a\n", "a.tsv, line 1: 1 column; a line is `label TAB text`"),
        ("a.tsv#fold=1", "1\ta\n", "a.tsv has no column beside label and text; leave out #fold=1"),
        ("a.tsv#fold=d*", "1\tc0\ta good film\n", r"a.tsv#fold=d\*: no rows are left; its folds include c0"),
        ("a.tsv#fold=", "1\ta\n", "lacks a file or a fold"),
        ("b.tsv#fold=1", "1\ta\n", "b.tsv: no such data file"),
    ],
)
def test_a_bad_line_of_any_kind_of_file_is_named(tmp_path, name, text, message):
    named(tmp_path, name.partition("#")[0].replace("b", "a"), text)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        read_rows(f"{tmp_path}/{name}", {"1": "bad", "2": "good"})


@pytest.mark.parametrize("end", ["", "\n", "\r\n", "\n\n", " \n  \n"])
def test_the_last_row_may_end_in_an_empty_column(tmp_path, end):
    path = named(tmp_path, "a.tsv", "0\ta good film\tx\n1\tbad\t" + end)
    assert [row.sentence for row in read_rows(path, CFIMDB)] == ["a good film", "bad"]


@pytest.mark.parametrize("label", ["pos", "4"])
def test_what_names_the_labels_of_a_file_is_said_where_one_does_not_fit(tmp_path, label):
    path = named(tmp_path, "a.txt", f"0 ||| a\n{label} ||| b\n")
    with pytest.raises(ValueError, match=r"give the label file that belongs to it .*of --ood --ood_label_names\)"):
        read_rows(path, CFIMDB)


def test_a_file_may_have_a_number_sign_in_its_name(tmp_path):
    assert read_rows(named(tmp_path, "a.tsv#fold=1", "0 ||| a"), CFIMDB) == [Row(0, "a")]


@pytest.mark.parametrize(
    "content, message",
    [
        ('{"1": "bad"}', "at least two names"),
        ('{"1": "bad", "2": "bad", "3": null}', "at least two names"),
        ('{"1": "bad", "2": ["good"]}', "should be a JSON list of names"),
        ('{"1": "bad", "2": {"3": "good"}}', "or an object such as"),
        ('{"1": "bad", "1": "good"}', "has a label twice"),
        ('{"1": "bad", " 1": "good"}', "has a label twice"),
        ('["bad", null, "good"]', "should be a JSON list of names"),
        ("5", "should be a JSON list of names"),
        ("{}", "at least two names"),
        ("[]", "at least two names"),
    ],
)
def test_a_bad_mapping_is_told(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        mapping(tmp_path, content)


def test_a_label_may_be_its_classs_name_and_a_line_of_column_names_is_no_row(tmp_path):
    names = ["happy", "sad", "angry"]
    (tmp_path / "a.txt").write_text("sad ||| one\n0 ||| two\n")
    assert [row.label for row in read_rows(tmp_path / "a.txt", names)] == [1, 0]
    (tmp_path / "a.csv").write_text("Label,text\nangry,one\n")
    (tmp_path / "a.tsv").write_text("class\tfold\ttext\n2\tx\tone\n")
    for name in ("a.csv", "a.tsv"):
        assert [(row.label, row.sentence) for row in read_rows(tmp_path / name, names)] == [(2, "one")]
    (tmp_path / "b.csv").write_text("label,text\nclass,one\n")  # here they are classes
    assert [row.label for row in read_rows(tmp_path / "b.csv", ["class", "label"])] == [1, 0]
    (tmp_path / "c.csv").write_text("sad,one\nlabel,two\n")
    with pytest.raises(ValueError, match="c.csv, line 2: label 'label' is none of"):
        read_rows(tmp_path / "c.csv", names)


def test_training_labels_must_reach_the_last_name():
    assert missing_classes("t", [Row(0, "a"), Row(4, "b")], SST) == ["bad", "average", "good"]
    with pytest.raises(ValueError, match="t has the labels 0, 1, but --label-names has 5 names"):
        missing_classes("t", [Row(0, "a"), Row(1, "b")], SST)


@pytest.mark.parametrize("labels, gold", [([0, 0], False), ([1], False), ([0, 1, 0], True)])
def test_a_label_column_of_one_value_is_no_gold(labels, gold):
    assert has_gold_labels([Row(label, "x") for label in labels]) is gold


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r", " \n", "\t\r\n"])
@pytest.mark.parametrize(
    "name, lines",
    [
        ("a.txt", ["", "0 ||| one", "", "  ", "1 ||| two", "", ""]),
        ("a.csv", ["", "label,text", "", "0,one", "", "   ", "1,two", "", ""]),
        ("a.csv", ['"0","one"', "", '"1","two"', ""]),
        ("a.tsv", ["", "label\ttext", "", "0\tone", "", "   ", "1\ttwo", "", ""]),
    ],
)
def test_blank_lines_are_left_out_of_every_kind_of_file(tmp_path, name, lines, end, mark):
    if end.startswith("\t") and name.endswith(".tsv"):
        pytest.skip("there a tab ends a column")
    if end.strip("\r\n") and '"' in lines[0]:
        pytest.skip("nothing may follow the quotes of a field")
    path = named(tmp_path, name, mark + end.join(lines))
    assert read_rows(path, CFIMDB) == [Row(0, "one"), Row(1, "two")]
    bad = named(tmp_path, name, mark + end.join([*lines, lines[-3].replace("1", "7"), ""]))
    if "7" in lines[-3].replace("1", "7"):
        with pytest.raises(ValueError, match=rf"{name}, line {len(lines) + 1}: label '7'"):
            read_rows(bad, CFIMDB)


@pytest.mark.parametrize(
    "text, sentences",
    [
        # Yelp and Amazon: a line break is a backslash and an n, a quote is doubled, often behind a backslash.
        ('"1","so good\\nso cheap\\n\\nreally"\n"2","he said \\""wow\\"" twice"\n', ["so good so cheap  really",
                                                                                'he said "wow" twice']),
        ('"1","a\\nb \\""c\\"""\n"2","either\\or"\n', ['a b "c"', "either\\or"]),
        # AG News: a backslash is a line break, whatever follows.
        ('"1","the\\nation of\\two \\and"\n"2","so""it"" is\\"\n', ["the nation of two  and", 'so"it" is']),
        # Quotes behind a backslash and not doubled.
        ('"1","he said \\"hi\\"\\nand \\\\ left"\n"2","\\"all\\""\n', ['he said "hi" and \\ left', '"all"']),
        ('"1","a\nb"\r\n"2","c\rd"\r\n', ["a b", "c d"]),
    ],
    ids=["escapes", "few escapes", "line breaks", "escaped quotes", "real line breaks"],
)  # fmt: skip
def test_what_a_backslash_is_in_a_csv_is_decided_by_the_file(tmp_path, text, sentences):
    rows = read_rows(named(tmp_path, "a.csv", text), {"1": "bad", "2": "good"})
    assert rows == [Row(n, sentence) for n, sentence in enumerate(sentences)]


def test_a_csv_with_escapes_that_is_broken_otherwise_is_told_as_it_stands(tmp_path):
    path = named(tmp_path, "a.csv", '"1","he said \\"hi\\""\n"2","b" c\n')
    with pytest.raises(ValueError, match=r"a.csv, line 1: not CSV"):
        read_rows(path, {"1": "bad", "2": "good"})


def test_the_backslashes_of_ag_news_are_line_breaks(asset):
    rows = read_rows(asset("agnews/test.csv"), {str(n): str(n) for n in range(1, 5)})
    assert len(rows) == 7600 and not any("\\" in row.sentence for row in rows)
