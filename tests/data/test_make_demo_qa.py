"""data/make_demo_qa.py: the demo questions are what the script makes, and need reading."""

from __future__ import annotations

import importlib.util
import re
from collections import Counter

import pytest

from conftest import ROOT
from minillama.text.examples import read_examples

SPLITS = {"train": 1700, "dev": 150, "test": 150}


def load_script():
    spec = importlib.util.spec_from_file_location("make_demo_qa", ROOT / "data" / "make_demo_qa.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


make_demo_qa = load_script()


@pytest.fixture(scope="module")
def rows():
    return {split: read_examples(ROOT / "data" / f"demo-qa-{split}.jsonl") for split in SPLITS}


def story_of(row):
    return row.prompt.removesuffix(make_demo_qa.question_of(row.prompt))


def test_the_files_are_what_the_script_makes(tmp_path):
    make_demo_qa.write_files(tmp_path, make_demo_qa.make_rows(seed=0))
    names = [f"demo-qa-{split}.jsonl" for split in SPLITS]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
    for name in names:
        assert (tmp_path / name).read_bytes() == (ROOT / "data" / name).read_bytes(), f"{name}: run the script again"
    assert sum((ROOT / "data" / name).stat().st_size for name in names) < 300_000
    assert make_demo_qa.make_rows(1) != make_demo_qa.make_rows(0)


def test_every_answer_is_in_its_story_and_no_question_comes_twice(rows):
    for split, size in SPLITS.items():
        assert len(rows[split]) == size == len({row.prompt for row in rows[split]})
        for row in rows[split]:
            story, question = story_of(row), make_demo_qa.question_of(row.prompt)
            assert re.search(rf"\b{row.answer}\b", story) and question.endswith("?") and len(story) > 25, row
            assert not set("{}/*") & set(row.prompt) and "  " not in row.prompt, row
            assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", row.prompt), row


def test_no_story_is_in_two_splits_and_dev_and_test_have_words_that_train_lacks(rows):
    stories = {split: {story_of(row) for row in rows[split]} for split in rows}
    assert len(set().union(*stories.values())) == sum(map(len, stories.values()))
    words = {split: set(re.findall(r"\w+", " ".join(row.prompt for row in rows[split]))) for split in rows}
    held_out = {"Daisy", "Peter", "train", "robot", "owl"}
    assert not held_out & words["train"] and held_out <= words["dev"] | words["test"]
    names = {name for kind in ("girl", "boy") for name in make_demo_qa.items(make_demo_qa.FILLERS[kind], held_out=True)}
    toys = make_demo_qa.items(make_demo_qa.FILLERS["toy"], held_out=True)
    had = re.compile(rf"({'|'.join(names)}) [^.]*({'|'.join(toys)})")
    pairs = {split: {pair for story in stories[split] for pair in had.findall(story)} for split in stories}
    assert len(pairs["dev"] - pairs["train"]) >= 5


def test_every_kind_of_question_is_asked_of_every_split(rows):
    for found in rows.values():
        kinds = Counter(" ".join(make_demo_qa.question_of(row.prompt).split()[:2]) for row in found)
        assert len(kinds) == 10


def test_who_does_not_read_does_not_know(rows):
    as_lines = {split: [{"prompt": row.prompt, "answer": row.answer} for row in rows[split]] for split in rows}
    for split in ("dev", "test"):
        frequent, nearest = make_demo_qa.baselines(as_lines, split).values()
        assert frequent < 0.15 and nearest < 0.2


@pytest.mark.parametrize("options, complaint", [(["--seed", "-1"], "0 or more"), (["--into", "nowhere"], "no such")])
def test_a_wrong_option_is_told_in_one_line(options, complaint, capsys):
    with pytest.raises(SystemExit, match="2"):
        make_demo_qa.main(options)
    error = capsys.readouterr().err
    assert complaint in error and error.count("\n") == 1
