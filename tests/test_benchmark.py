"""benchmark.py: the table, the JSON line, and the measurements behind them."""

from __future__ import annotations

import json

import pytest

import benchmark
from minillama.formats.checkpoint import write_checkpoint
from models import tiny_llama


@pytest.fixture
def arguments(asset, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = [f"{i % 2} ||| {'a bad dull film ' if i % 2 == 0 else 'one good day ' * (1 + i % 4)}" for i in range(12)]
    for split in ("train", "dev"):
        (tmp_path / f"{split}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (tmp_path / "names.json").write_text('["bad", "good"]', encoding="utf-8")
    model = tiny_llama(vocab_size=512, max_seq_len=64)
    write_checkpoint(tmp_path / "model.pt", model.state_dict(), model.config)
    fixed = ["train", "--train", "train.txt", "--dev", "dev.txt", "--label-names", "names.json", "--rounds", "1"]
    fixed += ["--pretrained-model-path", "model.pt", "--tokenizer", str(asset("stories260K/tok512.model"))]
    return [*fixed, "--rows", "12", "--batch_size", "5", "--dtype", "fp32"]


@pytest.mark.parametrize("more", [[], ["--lora"]])
def test_it_prints_a_table_and_ends_in_json(arguments, capsys, more):
    assert benchmark.main([*arguments, *more, "--without", "transformers"]) == 0
    out = capsys.readouterr().out
    result = json.loads(out.splitlines()[-1])
    assert result["options"]["lora"] == bool(more)
    assert "s/step" in out and "ours against course: " in out
    for name in ("ours", "course"):
        (one,) = result["rounds"][name]
        assert one["steps"] == 3 and one["rows"] == 12 and one["tokens"] > 60
        assert min(one["train_seconds"], one["evaluation_seconds"], one["peak_bytes"], one["ceiling"]) > 0
    a, b = result["rounds"]["course"][0], result["rounds"]["ours"][0]
    assert result["ratios"]["course"]["step"] == pytest.approx(a["train_seconds"] / b["train_seconds"])


@pytest.mark.slow
def test_transformers_goes_through_the_same_batches(arguments, capsys):
    pytest.importorskip("transformers")
    assert benchmark.main([*arguments, "--without", "course"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    ours, theirs = (result["rounds"][name][0] for name in ("ours", "transformers"))
    assert (ours["steps"], ours["tokens"]) == (theirs["steps"], theirs["tokens"])


def test_a_missing_file_is_named(arguments, capfd):
    with pytest.raises(SystemExit, match="2"):
        benchmark.main([*arguments, "--train", "none.txt"])
    assert "benchmark.py: error: none.txt: no such data file" in capfd.readouterr().err
