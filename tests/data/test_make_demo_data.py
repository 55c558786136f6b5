"""data/make_demo_data.py: the demo data is what the script makes, and needs more than counting words."""

from __future__ import annotations

import importlib.util
from collections import Counter

import pytest

from conftest import ROOT
from minillama.text.labelled import class_names, read_labels, read_rows

FILES = [f"demo-{split}.txt" for split in ("train", "dev", "test")] + ["demo-label-mapping.json"]


def load_script():
    spec = importlib.util.spec_from_file_location("make_demo_data", ROOT / "data" / "make_demo_data.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


make_demo_data = load_script()


@pytest.fixture(scope="module")
def rows():
    names = class_names(read_labels(ROOT / "data" / "demo-label-mapping.json"))
    return {split: read_rows(ROOT / "data" / f"demo-{split}.txt", names) for split in ("train", "dev", "test")}


def test_the_files_are_what_the_script_makes(tmp_path):
    make_demo_data.write_files(tmp_path, make_demo_data.make_rows(seed=0))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(FILES)
    for name in FILES:
        assert (tmp_path / name).read_bytes() == (ROOT / "data" / name).read_bytes(), f"{name}: run the script again"


def test_another_seed_gives_other_rows():
    assert make_demo_data.make_rows(1) != make_demo_data.make_rows(0)


def test_the_labels_are_those_of_sst():
    names = [class_names(read_labels(ROOT / "data" / f"{corpus}-label-mapping.json")) for corpus in ("demo", "sst")]
    assert names[0] == names[1]


def test_every_class_has_as_many_rows(rows):
    for split, each in (("train", 120), ("dev", 30), ("test", 30)):
        assert Counter(row.label for row in rows[split]) == dict.fromkeys(range(5), each)


def test_no_sentence_comes_twice(rows):
    sentences = [row.sentence for split in rows.values() for row in split]
    assert len(set(sentences)) == len(sentences) == 900


def test_sentences_are_whole_and_of_moderate_length(rows):
    for row in (row for split in rows.values() for row in split):
        assert 8 <= len(row.sentence.split()) <= 40
        assert row.sentence.lstrip('"')[0].isupper() and row.sentence.endswith((".", '."')), row.sentence
        assert not set("{}*_/") & set(row.sentence) and "  " not in row.sentence, row.sentence


def test_dev_and_test_have_wordings_that_train_lacks(rows):
    text = {split: " ".join(row.sentence for row in rows[split]) for split in rows}
    for held_out in ("lacklustre", "sublime", "Had I left", "So much for"):
        assert held_out not in text["train"]
        assert held_out in text["dev"] + text["test"]


def test_counting_words_beats_chance_but_does_not_solve_the_task(rows):
    scores = make_demo_data.baseline({split: [(row.label, row.sentence) for row in rows[split]] for split in rows})
    assert 0.35 < scores["dev"] < 0.65
    assert 0.35 < scores["test"] < 0.65


@pytest.mark.parametrize("options, complaint", [(["--seed", "-1"], "0 or more"), (["--into", "nowhere"], "no such")])
def test_a_wrong_option_is_told_in_one_line(options, complaint, capsys):
    with pytest.raises(SystemExit, match="2"):
        make_demo_data.main(options)
    error = capsys.readouterr().err
    assert complaint in error and error.count("\n") == 1
