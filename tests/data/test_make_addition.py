"""data/make_addition.py: right sums, no pair in two splits, one token for each character."""

from __future__ import annotations

import importlib.util
import json

import pytest

from conftest import ROOT
from run_llama import main
from tokenizer import Tokenizer

spec = importlib.util.spec_from_file_location("make_addition", ROOT / "data" / "make_addition.py")
make_addition = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make_addition)


def read(folder, split):
    lines = (folder / f"addition-{split}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("addition")
    assert make_addition.main(["--into", str(folder), "--rows", "5000"]) == 0
    return folder


def test_every_sum_is_right_and_no_pair_is_in_two_splits(folder):
    seen = set()
    for split, count in (("train", 5000), ("dev", 1000), ("test", 1000)):
        rows = read(folder, split)
        assert len(rows) == count
        for row in rows:
            a, b = map(int, row["prompt"].removesuffix("=").split("+"))
            assert a + b == int(row["answer"]) and max(a, b) < 10_000
            assert (min(a, b), max(a, b)) not in seen
            seen.add((min(a, b), max(a, b)))


def test_numbers_of_every_length_occur_in_both_places(folder):
    sizes = {tuple(map(len, row["prompt"].removesuffix("=").split("+"))) for row in read(folder, "train")}
    assert sizes == {(a, b) for a in range(1, 5) for b in range(1, 5)}


def test_the_tokenizer_has_a_token_for_each_character_and_no_other(folder):
    tokenizer = Tokenizer(folder / "addition.model")
    assert tokenizer.n_words == 15
    ids = tokenizer.encode("417+2950=3367", bos=False, eos=False)
    assert len(ids) == 13 and tokenizer.decode(ids) == "417+2950=3367"
    assert len({tokenizer.encode(one, bos=False, eos=False)[0] for one in make_addition.CHARACTERS}) == 12


def test_padded_and_reversed_answers():
    assert make_addition.example(7, 39, 4, True, True) == {"prompt": "0007+0039=", "answer": "64000"}
    assert make_addition.example(9999, 1, 4, True, False)["answer"] == "10000"


@pytest.mark.parametrize(
    "options, complaint",
    [
        (["--digits", "1", "--rows", "99"], "at most 27"),
        (["--into", "nowhere"], "no such"),
        (["--digits", "0"], "1 or more"),
    ],
)
def test_a_wrong_option_is_told_in_one_line(options, complaint, capsys):
    with pytest.raises(SystemExit, match="2"):
        make_addition.main(options)
    error = capsys.readouterr().err
    assert complaint in error and error.count("\n") == 1


def test_sft_trains_a_new_model_on_sums(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    data = [
        argument for split in ("train", "dev") for argument in (f"--{split}", str(folder / f"addition-{split}.jsonl"))
    ]
    sizes = ["--dim", "32", "--n_layers", "1", "--n_heads", "2", "--n_kv_heads", "1", "--max_seq_len", "32"]
    more = [
        "--tokenizer",
        str(folder / "addition.model"),
        "--epochs",
        "1",
        "--answer_rows",
        "0",
        "--max_new_tokens",
        "6",
    ]
    assert (
        main(["--option", "sft", *data, *sizes, *more, "--batch_size", "256", "--model_out", "adds.safetensors"]) == 0
    )
    assert "new, random weights" in capsys.readouterr().err
    assert main(["--pretrained-model-path", "adds.safetensors", "--prompt", "12+34=", "--temperature", "0"]) == 0
    taken = ["--pretrained-model-path", "adds.safetensors", "--model_out", "more.safetensors"]
    assert main(["--option", "sft", *data, *sizes, *taken]) == 2
    assert "is for a new model" in capsys.readouterr().err
