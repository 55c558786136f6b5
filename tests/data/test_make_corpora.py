"""data/make_corpora.py: the bundled model is trained on nothing that its figures are measured on."""

from __future__ import annotations

import re
import sys

import pytest

from conftest import ROOT
from minillama.text.documents import DOCUMENT_END, read_documents

sys.path.insert(0, str(ROOT / "data"))

import make_corpora  # noqa: E402


@pytest.fixture
def made(tmp_path, monkeypatch):
    """The texts made from small collections of the same form."""
    monkeypatch.setattr(make_corpora, "HELD_OUT_STORIES", 3)
    source, into = tmp_path / "source", tmp_path / "into"
    texts = {
        "corpora/tinystories.txt": [f"story {i} ." for i in range(10)],
        "corpora/tinystories_recased.txt": ["Story recased ."],
        "corpora/books/a.txt": ["book a", "book b"],
        "corpora/prose/a.txt": ["prose a"],
        "corpora/prose/b.txt": ["prose b"],
    }
    for name, documents in texts.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text("".join(f"{document}\n{DOCUMENT_END}\n" for document in documents), encoding="utf-8")
    (source / "reviews").mkdir()
    reviews = []
    for fold in range(10):
        for i in range(4):
            name = f"film {fold} {i}"
            text = f"{name} was seen by many . {name} came to an end . {name} is what it is ."
            reviews.append(f"{i % 2}\tcv{fold}{i:02}_1\t{text}\n")
    (source / "reviews" / "movie_reviews_2000.tsv").write_text("".join(reviews), encoding="utf-8")
    (source / "reviews" / "pros_cons.tsv").write_text("1\ta good lens\n0\ttoo heavy\n", encoding="utf-8")
    assert make_corpora.main(["--source", str(source), "--into", str(into)]) == 0
    return {path.stem: list(read_documents(path)) for path in into.iterdir()}


def test_what_is_held_out_is_in_nothing_that_is_trained_on(made):
    assert made["stories-held-out"] == [f"story {i} ." for i in (7, 8, 9)]
    assert made["stories"] == [*(f"story {i} ." for i in range(7)), "Story recased ."]
    assert len(made["reviews-held-out"]) == 4 and all(text.startswith("film 9 ") for text in made["reviews-held-out"])
    assert len(made["reviews"]) == 36 and not any(
        "film 9 " in text.lower() for text in made["reviews"] + made["opinions"] + made["films"]
    )
    assert sum("film" in text.lower() for text in made["opinions"]) >= 36


def test_each_opinion_ends_in_the_verdict_of_its_label(made):
    for text in made["reviews"] + made["opinions"]:
        if "film" in text.lower():
            label = int(text.split()[2]) % 2
            assert text.endswith(tuple(f" {word}." for word in make_corpora.WORDS[label]))
    assert sorted(text.rpartition(" This is ")[0] for text in made["opinions"] if "film" not in text.lower()) == [
        "a good lens",
        "too heavy",
    ]


def test_each_review_comes_twice_in_films_once_without_a_verdict(made):
    without = [text for text in made["films"] if text.endswith("is what it is .")]
    endings = tuple(f" {word}." for words in make_corpora.WORDS for word in words)
    assert sorted(text.partition(" was seen")[0] for text in without) == [
        f"film {fold} {i}" for fold in range(9) for i in range(4)
    ]
    assert len(made["films"]) == 72 and all(text.endswith(endings) for text in made["films"] if text not in without)


def test_own_reviews_come_twice_and_a_verdict_is_of_their_label(made):
    path = ROOT / "data" / make_corpora.OWN_REVIEWS
    rows = [line.split(" ||| ", 1) for line in path.read_text(encoding="utf-8").splitlines()]
    assert len(made["own"]) == 2 * len(rows) and len({text for _, text in rows}) == len(rows)
    documents = set(made["own"])
    asked = 0
    for label, text in rows:
        assert make_corpora.tokenized(text) in documents
        ends = {f"{text}{question}{make_corpora.CLASSES[int(label)]}." for question in make_corpora.QUESTIONS[1:]}
        assert len(documents & {text, *ends}) == 1
        assert text in documents or re.search(r"\b(?:film|movie)s?\b", text)
        asked += text not in documents
    assert 0.08 < asked / len(rows) < 0.17  # one in six of those on films


def test_a_tokenized_text_has_the_form_of_the_film_reviews():
    assert make_corpora.tokenized("I said: \"It's good, isn't it?\" (No.)") == (
        "i said : \" it's good , isn't it ? \" ( no . )"
    )


def test_books_and_prose_are_kept_as_they_are(made):
    assert made["books"] == ["book a", "book b"] and made["prose"] == ["prose a", "prose b"]


def test_a_missing_collection_is_one_line(tmp_path, capsys):
    assert make_corpora.main(["--source", str(tmp_path), "--into", str(tmp_path / "into")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "tinystories.txt" in lines[0]
