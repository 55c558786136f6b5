"""Speed of generation, measured in its process."""

from __future__ import annotations

import json

import pytest

import benchmark
from minillama.benchmarks import decoding as decoding_speed


@pytest.mark.slow
@pytest.mark.parametrize("contender", ["ours", "ours-int8", "transformers-bf16"])
def test_a_way_to_generate_is_measured_in_its_process(tmp_path, capsys, contender):
    pytest.importorskip("transformers")
    decoding_speed.write_random_model(tmp_path, 0)
    capsys.readouterr()
    assert benchmark.main(["generate", "--contender", contender, "--pretrained-model-path", str(tmp_path)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["decode_seconds"] < found["decode_16_seconds"] < 16 * found["decode_seconds"]
    assert found["first_token_seconds"] > 0 and found["weight_bytes"] > 41e6
