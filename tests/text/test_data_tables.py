"""Tables whose columns are not plain: which one is the text, which one the label."""

from __future__ import annotations

import pytest

from minillama.text.labelled import infer_labels, read_file, read_rows
from minillama.text.tables import Record


def written(folder, content, name="a.csv"):
    (folder / name).write_text(content, encoding="utf-8", newline="")
    return str(folder / name)


def test_numbers_name_columns_of_a_file_with_or_without_names(tmp_path):
    rows = "".join(f"{i},text {i},{i % 2 + 1}\n" for i in range(12))
    columns = {"text": "2", "label": "3"}
    for head in ("", "Nummer,Meinung,Note\n", "id,text,label\n"):
        table = read_file(written(tmp_path, head + rows), columns)
        assert [record.text for record in table.records] == [f"text {i}" for i in range(12)], head
        assert list(infer_labels(table)) == ["1", "2"]


def test_columns_of_one_name_are_told_apart(tmp_path):
    table = read_file(written(tmp_path, "label,text,note,note\na,one,x,y\nb,two,z,w\n"))
    assert table.records[0].cells == {"label": "a", "text": "one", "note": "x", "note 2": "y"}


def test_a_name_may_be_a_number_or_long(tmp_path):
    table = read_file(written(tmp_path, f"text,2024,label,{'x' * 80}\nsome,1,a,b\nmore,2,b,c\n"))
    assert (table.text, table.label) == ('"text"', '"label"') and [r.text for r in table.records] == ["some", "more"]


@pytest.mark.parametrize("content", ["id,Kommentar\n1,gut\n2,schlecht\n", "7,gut\n8,schlecht\n"])
def test_of_a_file_without_labels_and_names_it_is_asked_which_column_has_the_text(tmp_path, content):
    with pytest.raises(ValueError, match="seems to have columns .*; say which ones to read: --columns text=NAME"):
        read_file(written(tmp_path, content), labels=("good", "bad"), labelled=False)
    table = read_file(written(tmp_path, content), {"text": "2"}, ("good", "bad"), labelled=False)
    assert table.records[-1].text == "schlecht"


def test_without_names_known_labels_say_where_the_label_is(tmp_path):
    table = read_file(written(tmp_path, "good,fine day\nbad,rain\n"), labels=("good", "bad"), labelled=False)
    assert [record[1:3] for record in table.records] == [("good", "fine day"), ("bad", "rain")]


def test_whole_numbers_with_a_point_are_whole_numbers(tmp_path):
    rows = read_rows(written(tmp_path, "text,label\na,1.0\nb,2\nc,2.00\nd,1\n"), {"1": "bad", "2": "good"})
    assert [row.label for row in rows] == [0, 1, 1, 0]
    table = read_file(written(tmp_path, '{"text": "a", "label": 1.5}\n{"text": "b", "label": 2.0}\n', "a.jsonl"))
    assert [record.label for record in table.records] == ["1.5", "2"]


def test_a_record_of_lines_has_no_columns(tmp_path):
    table = read_file(written(tmp_path, "label ||| text\n1 ||| one\n", "a.txt"))
    assert table.records == [Record(2, "1", "one")] and table.names == ()


def test_separators_within_quotes_are_text(tmp_path):
    table = read_file(written(tmp_path, "".join(f'{i % 2},"a; b; {i}"\n' for i in range(6))))
    assert [(record.label, record.text) for record in table.records][:2] == [("0", "a; b; 0"), ("1", "a; b; 1")]


def test_a_class_may_have_the_name_of_a_column(tmp_path):
    content = "question,label\nwhat,question\nso,statement\n"
    table = read_file(written(tmp_path, content), labels=("question", "statement"))
    assert [record[1:3] for record in table.records] == [("question", "what"), ("statement", "so")]


def test_half_a_character_is_refused(tmp_path):
    with pytest.raises(ValueError, match="line 1: half of a character"):
        read_file(written(tmp_path, '{"text": "a \\ud800", "label": 1}\n', "a.jsonl"))
