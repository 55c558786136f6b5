"""Files of predictions, written and read back as rows."""

from __future__ import annotations

import json

import pytest

from minillama.text.labelled import (
    Row,
    class_labels,
    class_names,
    read_labels,
    read_rows,
    write_predictions,
)
from models import CFIMDB, SST, written


@pytest.mark.parametrize("end", ["\n", "\r", "\r\n", "\r\r\n"])
def test_predictions_have_as_many_lines_as_rows_for_every_reader(tmp_path, end):
    rows = read_rows(written(tmp_path / "rows.txt", end.join(["0 ||| one", "1 ||| two", "0 ||| three", ""])), CFIMDB)
    write_predictions(tmp_path / "out.txt", [row.label for row in rows], rows)
    with open(tmp_path / "out.txt", encoding="utf-8", newline=None) as file:
        assert len(file.readlines()) == len(rows) == 3


def test_predictions_are_read_back_as_rows(tmp_path):
    rows = [Row(0, "eins ||| zwei"), Row(1, "映画")]
    path = tmp_path / "out.txt"
    write_predictions(path, [1, 0], rows)
    assert path.read_bytes() == "1 ||| eins ||| zwei\n0 ||| 映画\n".encode()
    assert [row.label for row in read_rows(path, CFIMDB)] == [1, 0]
    with pytest.raises(ValueError, match="longer"):
        write_predictions(path, [1], rows)
    assert path.read_bytes().count(b"\n") == 2


MAPPINGS = {
    "numbers from 1": {"1": "bad", "2": "good"},
    "words": {"neg": "bad", "pos": "good"},
    "several labels of a class, and one left out": {"0": "bad", "1": "bad", "2": None, "3": "good"},
    "the second first": {"5": "good", "-1": "bad"},
    "written in full": {"01": "bad", "02": "good"},
}


@pytest.mark.parametrize("name", MAPPINGS)
def test_predictions_are_read_back_with_the_label_file_of_the_data(tmp_path, name):
    labels = MAPPINGS[name]
    rows, path = [Row(0, "eins"), Row(1, "zwei"), Row(1, "class ||| drei")], tmp_path / "out.txt"
    write_predictions(path, [row.label for row in rows], rows, labels)
    assert read_rows(path, labels) == rows
    (tmp_path / "labels.json").write_text(json.dumps(labels), encoding="utf-8")
    assert read_rows(path, read_labels(tmp_path / "labels.json")) == rows
    first = [next(label for label, name in labels.items() if name == one) for one in class_names(labels)]
    assert class_labels(labels) == first
    assert path.read_text(encoding="utf-8").startswith(f"{first[0]} ||| eins\n{first[1]} ||| zwei\n")


def test_predictions_of_a_list_of_names_have_their_positions(tmp_path):
    write_predictions(tmp_path / "a.txt", [2, 0], [Row(0, "a"), Row(0, "b")], SST)
    write_predictions(tmp_path / "b.txt", [2, 0], [Row(0, "a"), Row(0, "b")])
    assert (tmp_path / "a.txt").read_bytes() == (tmp_path / "b.txt").read_bytes() == b"2 ||| a\n0 ||| b\n"
