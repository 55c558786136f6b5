"""benchmark.py: the table, the JSON line, and the measurements behind them."""

from __future__ import annotations

import json
import subprocess
import sys

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


@pytest.mark.parametrize("more", [[], pytest.param(["--lora"], marks=pytest.mark.slow)])
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
    assert result["ratios"]["ours against course"]["step"] == pytest.approx(a["train_seconds"] / b["train_seconds"])


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


def test_the_parent_process_imports_no_torch():
    code = "import sys, benchmark; from minillama.benchmarks import tables, turns; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=benchmark.__file__.rpartition("/")[0]).returncode == 0


@pytest.mark.parametrize("contender", ["ours", pytest.param("transformers", marks=pytest.mark.slow)])
def test_pretraining_steps_are_measured_in_their_process(capsys, contender):
    if contender == "transformers":
        pytest.importorskip("transformers")
    options = ["pretrain", "--preset", "stories260K", "--batch_size", "1", "--dtype", "fp32"]
    assert benchmark.main([*options, "--contender", contender]) == 0
    found = json.loads(capsys.readouterr().out)
    weights = 64 * 64 * 3 * 5 + 172 * 64 * 3 * 5 + 32000 * 64  # query, output, key and value; feed-forward; vocabulary
    assert found["tokens"] == found["steps"] * 512 and found["operations"] == 6 * weights * found["tokens"]
    assert min(found["train_seconds"], found["peak_bytes"], found["ceiling"]) > 0
