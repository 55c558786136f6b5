"""The tables of the benchmarks: figures of each contender, and how ours compares. Imports no torch."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from minillama.benchmarks.turns import Measurement

Figures = dict[str, float]
LONG_PROMPT, ROWS = 512, 16  # of `generate`: tokens of the long prompt, rows of the large batch


class Kind(NamedTuple):
    """What a benchmark shows.

    heads: the heading of each figure. figures: those of one measurement, in the order of the headings. pairs: which
    contenders are compared. ratios: of the first of a pair to the second, each with its name and its words.
    """

    heads: Sequence[str]
    figures: Callable[[Measurement], Figures]
    pairs: Sequence[tuple[str, str]]
    ratios: Mapping[str, tuple[str, Callable[[Figures, Figures], float]]]


def training_figures(one: Measurement) -> Figures:
    return {
        "seconds_a_step": one["train_seconds"] / one["steps"],
        "rows_a_second": one["rows"] / one["train_seconds"],
        "tokens_a_second": one["tokens"] / one["train_seconds"],
        "epoch_seconds": one["train_seconds"] + one["evaluation_seconds"],
        "peak_mib": one["peak_bytes"] / 2**20,
        "utilisation": one["operations"] / one["train_seconds"] / one["ceiling"],
    }


def pretraining_figures(one: Measurement) -> Figures:
    figures = training_figures(one | {"evaluation_seconds": 0.0})
    return {name: figures[name] for name in ("seconds_a_step", "tokens_a_second", "peak_mib", "utilisation")}


def generation_figures(one: Measurement) -> Figures:
    return {
        "first_token_seconds": one["first_token_seconds"],
        "prefill_tokens_a_second": LONG_PROMPT / one["prefill_seconds"],
        "tokens_a_second": 1 / one["decode_seconds"],
        "tokens_a_second_of_16_rows": ROWS / one["decode_16_seconds"],
        "position_1000_against_10": one["late_seconds"] / one["early_seconds"],
        "of_the_bandwidth": one["weight_bytes"] / one["decode_seconds"] / one["ceiling"],
    }


def ratio(figure: str) -> Callable[[Figures, Figures], float]:
    """Ours divided by theirs."""
    return lambda ours, theirs: ours[figure] / theirs[figure]


def inverse_ratio(figure: str) -> Callable[[Figures, Figures], float]:
    """Theirs divided by ours, for seconds."""
    return lambda ours, theirs: theirs[figure] / ours[figure]


KINDS = {
    "train": Kind(
        ("s/step", "rows/s", "tokens/s", "epoch s", "peak MiB", "utilisation"),
        training_figures,
        (("ours", "transformers"), ("ours", "course")),
        {
            "step": ("{:.2f}x a step", inverse_ratio("seconds_a_step")),
            "epoch": ("{:.2f}x an epoch with its evaluations", inverse_ratio("epoch_seconds")),
            "memory": ("{:.2f} of the memory", ratio("peak_mib")),
        },
    ),
    "pretrain": Kind(
        ("s/step", "tokens/s", "peak MiB", "utilisation"),
        pretraining_figures,
        (("ours", "transformers"),),
        {
            "tokens": ("{:.2f}x the tokens a second", ratio("tokens_a_second")),
            "memory": ("{:.2f} of the memory", ratio("peak_mib")),
        },
    ),
    "generate": Kind(
        ("first token s", "prefill tok/s", "tok/s", "tok/s of 16", "1000 : 10", "of bandwidth"),
        generation_figures,
        (("ours", "transformers"), ("ours-bf16", "transformers-bf16"), ("ours-int8", "transformers")),
        {
            "prefill": ("{:.2f}x a prompt", ratio("prefill_tokens_a_second")),
            "decode": ("{:.2f}x a token", ratio("tokens_a_second")),
            "decode_16": ("{:.2f}x a token of 16 rows", ratio("tokens_a_second_of_16_rows")),
        },
    ),
}


def summary(
    kind: Kind, found: Mapping[str, Sequence[Measurement]]
) -> tuple[dict[str, Figures], dict[str, dict[str, float]]]:
    """Each contender's figures, and the ratios of each pair; both are medians over the rounds."""
    figures = {name: list(map(kind.figures, rounds)) for name, rounds in found.items()}
    table = {
        name: {figure: statistics.median(one[figure] for one in rounds) for figure in rounds[0]}
        for name, rounds in figures.items()
    }
    ratios = {
        f"{ours} against {theirs}": {
            name: statistics.median(map(divide, figures[ours], figures[theirs]))
            for name, (_, divide) in kind.ratios.items()
        }
        for ours, theirs in kind.pairs
        if ours in found and theirs in found
    }
    return table, ratios


def print_tables(kind: Kind, found: Mapping[str, Sequence[Measurement]], options: dict[str, Any]) -> None:
    """Prints the table and the ratios, and as the last line all of it as a JSON object."""
    table, ratios = summary(kind, found)
    print(f"{'':18}" + "".join(f"{head:>15}" for head in kind.heads))
    for name, values in table.items():
        print(
            f"{name:18}" + "".join(f"{value:15.3f}" if value < 20 else f"{value:15,.0f}" for value in values.values())
        )
    for pair, values in ratios.items():
        words = ", ".join(kind.ratios[name][0].format(value) for name, value in values.items())
        print(f"{pair}: {words}")
    print(json.dumps({"options": options, "table": table, "ratios": ratios, "rounds": found}))
