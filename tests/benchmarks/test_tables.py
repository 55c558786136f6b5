"""The tables of the benchmarks, from given measurements."""

from __future__ import annotations

import json

import pytest

from minillama.benchmarks.tables import KINDS, print_tables, summary

GENERATION = {"first_token_seconds": 2.0, "prefill_seconds": 0.5, "decode_seconds": 0.01, "decode_16_seconds": 0.04}
GENERATION |= {"early_seconds": 0.01, "late_seconds": 0.012, "weight_bytes": 10**8, "ceiling": 2e10, "threads": 2}
TRAINING = {"train_seconds": 5.0, "evaluation_seconds": 1.0, "steps": 10, "rows": 800, "tokens": 20_000}
TRAINING |= {"peak_bytes": 2**30, "operations": 4e12, "ceiling": 1e12}


def slower(measurement, times=2):
    return {name: times * value if name.endswith("_seconds") else value for name, value in measurement.items()}


def test_figures_and_ratios_of_generation():
    rounds = {"ours": [GENERATION] * 2, "transformers": [slower(GENERATION)] * 2}
    table, ratios = summary(KINDS["generate"], rounds)
    figures = {"first_token_seconds": 2.0, "prefill_tokens_a_second": 1024.0, "tokens_a_second": 100.0}
    figures |= {"tokens_a_second_of_16_rows": 400.0, "position_1000_against_10": 1.2, "of_the_bandwidth": 0.5}
    assert table["ours"] == pytest.approx(figures) and set(figures) < set(KINDS["generate"].heads)
    assert ratios == {"ours against transformers": pytest.approx({"prefill": 2.0, "decode": 2.0, "decode_16": 2.0})}


def test_a_contender_may_lack_figures(capsys):
    rounds = {"ours": [GENERATION | {"sampled_seconds": 0.0125}], "llama2c": [{"decode_seconds": 0.013}]}
    print_tables(KINDS["generate"], rounds, {})
    _, ours, theirs, ratios, _ = capsys.readouterr().out.splitlines()
    assert ours.split() == ["ours", "2.000", "1,024", "100", "0.800", "400", "1.200", "0.500"]
    assert theirs.split() == ["llama2c", "-", "-", "77", "-", "-", "-", "-"]
    assert ratios == "ours against llama2c: 1.30x a token"


def test_figures_and_ratios_of_training():
    theirs = slower(TRAINING) | {"peak_bytes": 4 * 2**30}
    table, ratios = summary(KINDS["train"], {"ours": [TRAINING], "course": [theirs]})
    assert list(table["ours"].values()) == pytest.approx([0.5, 160.0, 4000.0, 6.0, 1024.0, 0.8])
    assert ratios == {"ours against course": pytest.approx({"step": 2.0, "epoch": 2.0, "memory": 0.25})}
    table, ratios = summary(KINDS["pretrain"], {"ours": [TRAINING], "transformers": [theirs]})
    assert list(table["transformers"].values()) == pytest.approx([1.0, 2000.0, 4096.0, 0.4])
    assert ratios == {"ours against transformers": pytest.approx({"tokens": 2.0, "memory": 0.25})}


def test_ratios_are_of_the_rounds_and_figures_medians():
    """A slow round of the machine, with both contenders in it, changes no ratio."""
    ours = [TRAINING, slower(TRAINING, 10), slower(TRAINING, 1.5)]
    theirs = [slower(one, times) for one, times in zip(ours, (3, 2, 4), strict=True)]
    table, ratios = summary(KINDS["train"], {"ours": ours, "transformers": theirs})
    assert table["ours"]["seconds_a_step"] == pytest.approx(0.75)
    assert ratios["ours against transformers"]["step"] == pytest.approx(3.0)


def test_what_is_printed_ends_in_json(capsys):
    print_tables(KINDS["pretrain"], {"ours": [TRAINING], "transformers": [slower(TRAINING)]}, {"seed": 1})
    heads, *rows, ratios, last = capsys.readouterr().out.splitlines()
    assert heads.split() == ["s/step", "tokens/s", "peak", "MiB", "utilisation"]
    assert [row.split() for row in rows] == [
        ["ours", "0.500", "4,000", "1,024", "0.800"],
        ["transformers", "1.000", "2,000", "1,024", "0.400"],
    ]
    assert ratios == "ours against transformers: 2.00x the tokens a second, 1.00 of the memory"
    assert json.loads(last)["options"] == {"seed": 1} and json.loads(last)["rounds"]["ours"] == [TRAINING]
