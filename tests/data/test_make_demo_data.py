"""data/make_demo_data.py: the demo data is what the script makes, and needs more than counting words."""

from __future__ import annotations

import importlib.util
import random
from collections import Counter
from pathlib import Path

import pytest

from conftest import ROOT, find_asset
from minillama.text.labelled import class_names, read_labels, read_rows

FILES = [f"demo-{split}.txt" for split in ("train", "dev", "test")] + ["demo-label-mapping.json"]


def load_script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "data" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


make_demo_data, make_corpora = load_script("make_demo_data"), load_script("make_corpora")


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


def test_every_class_has_as_many_rows_of_dev_and_test(rows):
    for split in ("dev", "test"):
        assert Counter(row.label for row in rows[split]) == dict.fromkeys(range(5), 40)
    counts = Counter(row.label for row in rows["train"])
    assert min(counts[label] for label in (0, 1, 3, 4)) > 2_500 and counts[2] > 1_000


def test_no_sentence_comes_twice(rows):
    sentences = [row.sentence.lower() for split in rows.values() for row in split]
    assert len(set(sentences)) == len(sentences) > 12_000


def test_tricky_sentences_are_whole_and_of_moderate_length():
    tricky = make_demo_data.tricky_rows(random.Random(0))
    assert {split: len(rows) for split, rows in tricky.items()} == {"train": 500, "dev": 100, "test": 100}
    for _, sentence in (row for rows in tricky.values() for row in rows):
        assert 8 <= len(sentence.split()) <= 40
        assert sentence.lstrip('"')[0].isupper() and sentence.endswith((".", '."')), sentence
        assert not set("{}*_/") & set(sentence) and "  " not in sentence, sentence


def test_the_sentences_from_reviews_are_those_that_make_corpora_finds(tmp_path):
    source = Path(find_asset("reviews/movie_reviews_2000.tsv"))
    films = [(int(label), fold, text) for label, fold, text in make_corpora.table(source)]
    learnt = [(label, text) for label, fold, text in films if not fold.startswith(make_corpora.HELD_OUT_FOLD)]
    every = [make_corpora.as_written(text) for _, text in learnt]
    for label, sentence in make_demo_data.sentences("review_sentences.txt"):
        sides = {positive for (positive, _), text in zip(learnt, every, strict=True) if sentence in text}
        assert (label > 2) in sides, sentence


def test_a_tokenized_text_is_written_as_people_write():
    found = make_corpora.as_written("well , i think ( as you do ) that it is n't bad . it 's good ! is it ?")
    assert found == "Well, I think (as you do) that it isn't bad. It's good! Is it?"


def test_dev_and_test_have_wordings_that_train_lacks(rows):
    text = {split: " ".join(row.sentence for row in rows[split]) for split in rows}
    for held_out in ("Had I left", "So much for", "does not change the verdict"):
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
