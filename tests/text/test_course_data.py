"""The course's data files against the numbers published about them."""

from __future__ import annotations

import pytest

from conftest import ROOT
from minillama.text.batches import prompt_question, tokenize_rows
from minillama.text.labelled import class_names, has_gold_labels, missing_classes, read_labels, read_rows
from models import CFIMDB, SST

NAMES = {"sst": SST, "cfimdb": CFIMDB}


@pytest.mark.parametrize("corpus, sizes", [("sst", (8544, 1101, 2210)), ("cfimdb", (1707, 245, 488))])
def test_the_courses_files_have_the_published_numbers_of_rows(asset, corpus, sizes):
    names = class_names(read_labels(ROOT / "data" / f"{corpus}-label-mapping.json"))
    assert names == NAMES[corpus]
    rows = [read_rows(asset(f"course/data/{corpus}-{split}.txt"), names) for split in ("train", "dev", "test")]
    assert tuple(map(len, rows)) == sizes
    assert [has_gold_labels(split) for split in rows] == [True, True, corpus == "sst"]
    assert missing_classes("train.txt", rows[0], names) == []


@pytest.mark.parametrize("corpus, mean, longest", [("sst", 28, 94), ("cfimdb", 240, 586)])
def test_the_courses_sentences_have_the_published_lengths(asset, llama_tokenizer, corpus, mean, longest):
    lengths = []
    for split in ("train", "dev", "test"):
        rows = read_rows(asset(f"course/data/{corpus}-{split}.txt"), NAMES[corpus])
        done, cut = tokenize_rows(rows, llama_tokenizer, 1024)
        assert cut == 0 and all(row.ids[0] == 1 and row.ids[-1] == 2 for row in done)
        lengths.append([len(row.ids) for row in done])
    assert max(map(max, lengths)) == longest
    assert round(sum(sum(split) / len(split) for split in lengths) / 3) == mean  # each split counts alike


@pytest.mark.parametrize("corpus", ["sst", "cfimdb"])
@pytest.mark.parametrize("context", [1024, 45])
def test_the_courses_question_is_the_same_ids_behind_any_sentence(asset, llama_tokenizer, corpus, context):
    rows = read_rows(asset(f"course/data/{corpus}-dev.txt"), NAMES[corpus])
    question = prompt_question(NAMES[corpus])
    for asked in (question, question.rstrip()):
        tail = llama_tokenizer.encode(asked.lstrip(), bos=False, eos=False)
        done, cut = tokenize_rows(rows, llama_tokenizer, context, question=asked)
        assert (cut > 100) == (context == 45)
        for row in done:
            sentence = llama_tokenizer.encode(row.sentence, bos=True, eos=False)
            assert list(row.ids) == sentence[: context - len(tail)] + tail


def test_the_question_is_the_courses_word_for_word(llama_tokenizer):
    assert prompt_question(SST) == " Is this movie awful, bad, average, good, or excellent? This movie is "
    assert prompt_question(CFIMDB) == " Is this movie bad or good? This movie is "
    # The trailing space would become a piece of its own, which no label follows in running text.
    assert llama_tokenizer.encode(prompt_question(SST), bos=False, eos=False)[-1] == 29871
    assert [llama_tokenizer.encode(name, bos=False, eos=False) for name in SST] == [
        [28893],
        [4319],
        [6588],
        [1781],
        [15129],
    ]
