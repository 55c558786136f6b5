"""The classifier that ships: small, of this bundled model, and right about plain sentences that are new to it."""

from __future__ import annotations

import json

import pytest

from conftest import ROOT
from run_llama import main

ADAPTER = ROOT / "data" / "mini-llama-opinions.pt"
GOOD, BAD = ("good", "excellent"), ("awful", "bad")


@pytest.fixture
def ask(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)

    def ask(*arguments):
        assert main(["--option", "classify", "--json", *arguments]) == 0
        out, err = capsys.readouterr()
        return [json.loads(line) for line in out.splitlines()], err

    return ask


def test_it_is_small():
    assert ADAPTER.stat().st_size < 1_000_000


def test_it_answers_with_nothing_trained_and_says_what_it_is(ask):
    (found,), err = ask("--prompt", "A terrible movie.")
    assert found["class"] in BAD and sum(found["probabilities"][name] for name in BAD) > 0.9
    assert "the bundled classifier of opinions, data/mini-llama-opinions.pt" in err


def test_it_is_on_the_right_side_of_nine_of_ten_plain_sentences(ask, tmp_path):
    """`opinions.tsv`: 480 opinions, 1 good and 0 bad, by seven writers who had not seen the demo data."""
    rows = [line.split("\t") for line in (ROOT / "tests" / "opinions.tsv").read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 480 and sum(label == "1" for label, _ in rows) == 240
    (tmp_path / "sentences.txt").write_text("".join(f"{text}\n" for _, text in rows), encoding="utf-8")
    answers, _ = ask("--prompt_file", str(tmp_path / "sentences.txt"))
    right = 0
    for (label, _), answer in zip(rows, answers, strict=True):
        good, bad = (sum(answer["probabilities"][name] for name in side) for side in (GOOD, BAD))
        right += (good > bad) == (label == "1")
    assert right >= 432
