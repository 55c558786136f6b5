"""The programs of llama2.c as contenders: stand-ins for them here, because nothing of llama2.c is in this project."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch

import benchmark
from minillama.benchmarks.llama2c import check_programs, contenders, write_inputs
from minillama.formats.checkpoint import read_checkpoint, write_checkpoint
from models import tiny_llama

# Fails unless it is called as llama2.c's programs are, then reports a rate.
PROGRAM = f"""#!{sys.executable}
import sys
_, model, *flags = sys.argv
assert flags[:4] == ["-t", "0", "-n", "128"] and flags[4] == "-z"
vocabulary = open(flags[5], "rb").read()
assert vocabulary[:4] == (8).to_bytes(4, "little") and b"63 " in vocabulary
print("text")
print("achieved tok/s:", 50.0 if model.endswith("run.bin") else 80.0, file=sys.stderr)
"""


@pytest.fixture
def programs(tmp_path) -> Path:
    folder = tmp_path / "llama2.c"
    folder.mkdir()
    for name in ("run", "runq"):
        (folder / name).write_text(PROGRAM, encoding="utf-8")
        (folder / name).chmod(0o700)
    return folder


@pytest.fixture
def model(tmp_path) -> str:
    llama = tiny_llama(causal=True, norm="rmsnorm", hidden_dim=64)
    write_checkpoint(tmp_path / "model.safetensors", llama.state_dict(), llama.config)
    return str(tmp_path / "model.safetensors")


def test_the_programs_get_the_weights_and_report_their_rate(programs, model, tmp_path):
    inputs = tmp_path / "inputs"
    inputs.mkdir()
    write_inputs(inputs, model)
    found = {name: measure() for name, measure in contenders(programs, inputs).items()}
    assert found == {"llama2c": {"decode_seconds": 1 / 50}, "llama2c-int8": {"decode_seconds": 1 / 80}}
    weight = read_checkpoint(model).state["layers.1.feed_forward.w2.weight"]
    for name, tolerance in (("run.bin", 0.0), ("runq.bin", float(weight.abs().max()) / 127)):
        written = read_checkpoint(inputs / name).state["layers.1.feed_forward.w2.weight"]
        torch.testing.assert_close(written, weight, atol=tolerance, rtol=0.0)


def test_a_program_that_is_missing_or_fails_is_named(programs, model, tmp_path):
    (programs / "runq").write_text(f"#!{sys.executable}\nimport sys\nsys.exit('Bad magic number')\n", encoding="utf-8")
    write_inputs(tmp_path, model)
    with pytest.raises(ValueError, match="runq failed with exit code 1: Bad magic number"):
        contenders(programs, tmp_path)["llama2c-int8"]()
    for rate in ("0.000000", "inf", "-nan", "..."):
        said = f"import sys\nprint('achieved tok/s: {rate}', file=sys.stderr)\n"
        (programs / "runq").write_text(f"#!{sys.executable}\n{said}", encoding="utf-8")
        with pytest.raises(ValueError, match=re.escape(f"runq failed with exit code 0: achieved tok/s: {rate}")):
            contenders(programs, tmp_path)["llama2c-int8"]()
    (programs / "run").unlink()
    with pytest.raises(ValueError, match=r"run is missing; build it in .*: gcc -Ofast .* run\.c -lm -o run"):
        check_programs(programs)
    assert benchmark.main(["generate", "--llama2c", str(programs)]) == 2
