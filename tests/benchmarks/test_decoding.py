"""Speed of generation: rates and ratios from the measurements, and one measurement in its process."""

from __future__ import annotations

import json

import pytest

import benchmark
from minillama.benchmarks import decoding as decoding_speed


def test_rates_and_ratios_of_generation_are_those_of_the_measurements():
    steps = {"first_token_seconds": 2.0, "prefill_seconds": 0.5, "decode_seconds": 0.01, "decode_16_seconds": 0.04}
    steps |= {"early_seconds": 0.01, "late_seconds": 0.012, "weight_bytes": 10**8, "ceiling": 2e10, "threads": 2}
    slower = {name: 2 * value if name.endswith("_seconds") else value for name, value in steps.items()}
    table, ratios = decoding_speed.summary({"ours": [steps, steps], "transformers": [slower, slower]})
    assert table["ours"] == pytest.approx(
        {
            "first_token_seconds": 2.0,
            "prefill_tokens_a_second": 1024.0,
            "tokens_a_second": 100.0,
            "tokens_a_second_of_16_rows": 400.0,
            "position_1000_against_10": 1.2,
            "of_the_bandwidth": 0.5,
        }
    )
    assert set(ratios.values()) == {2.0} and len(ratios) == 3


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
