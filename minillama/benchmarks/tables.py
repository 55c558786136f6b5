"""The tables of the benchmarks: figures of each contender, and how ours compares. Imports no torch."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from minillama.benchmarks.turns import Measurement

Figures = dict[str, float]
LONG_PROMPT, ROWS = 512, 16  # of `generate`: tokens of the long prompt, rows of the large batch


class Ratio(NamedTuple):
    """A ratio of two contenders' figures, ours to theirs. inverse: theirs to ours, for seconds."""

    words: str
    figure: str
    inverse: bool = False

    def __call__(self, ours: Figures, theirs: Figures) -> float:
        divided = ours[self.figure] / theirs[self.figure]
        return 1 / divided if self.inverse else divided


class Kind(NamedTuple):
    """The contents of a benchmark's tables.

    heads: the heading of each figure. figures: those of one measurement; some contenders lack some. pairs: which
    contenders are compared. ratios: of the first of a pair to the second, if both have the figure.
    """

    heads: Mapping[str, str]
    figures: Callable[[Measurement], Figures]
    pairs: Sequence[tuple[str, str]]
    ratios: Mapping[str, Ratio]


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
    figures = {"tokens_a_second": 1 / one["decode_seconds"]}
    if "sampled_seconds" in one:
        figures["sampled_against_greedy"] = one["decode_seconds"] / one["sampled_seconds"]
    if "ceiling" not in one:  # the programs of llama2.c report their rate alone
        return figures
    return figures | {
        "first_token_seconds": one["first_token_seconds"],
        "prefill_tokens_a_second": LONG_PROMPT / one["prefill_seconds"],
        "tokens_a_second_of_16_rows": ROWS / one["decode_16_seconds"],
        "position_1000_against_10": one["late_seconds"] / one["early_seconds"],
        "of_the_bandwidth": one["weight_bytes"] / one["decode_seconds"] / one["ceiling"],
    }


TRAINING = {
    "seconds_a_step": "s/step",
    "rows_a_second": "rows/s",
    "tokens_a_second": "tokens/s",
    "epoch_seconds": "epoch s",
    "peak_mib": "peak MiB",
    "utilisation": "utilisation",
}
MEMORY = Ratio("{:.2f} of the memory", "peak_mib")
KINDS = {
    "train": Kind(
        TRAINING,
        training_figures,
        (("ours", "transformers"), ("ours", "course")),
        {
            "step": Ratio("{:.2f}x a step", "seconds_a_step", inverse=True),
            "epoch": Ratio("{:.2f}x an epoch with its evaluations", "epoch_seconds", inverse=True),
            "memory": MEMORY,
        },
    ),
    "pretrain": Kind(
        {figure: TRAINING[figure] for figure in ("seconds_a_step", "tokens_a_second", "peak_mib", "utilisation")},
        pretraining_figures,
        (("ours", "transformers"),),
        {"tokens": Ratio("{:.2f}x the tokens a second", "tokens_a_second"), "memory": MEMORY},
    ),
    "generate": Kind(
        {
            "first_token_seconds": "first token s",
            "prefill_tokens_a_second": "prefill tok/s",
            "tokens_a_second": "tok/s",
            "sampled_against_greedy": "sampled:greedy",
            "tokens_a_second_of_16_rows": "tok/s of 16",
            "position_1000_against_10": "1000 : 10",
            "of_the_bandwidth": "of bandwidth",
        },
        generation_figures,
        (
            ("ours", "transformers"),
            ("ours-bf16", "transformers-bf16"),
            ("ours-int8", "transformers"),
            ("ours", "llama2c"),
            ("ours-int8", "llama2c-int8"),
        ),
        {
            "prefill": Ratio("{:.2f}x a prompt", "prefill_tokens_a_second"),
            "decode": Ratio("{:.2f}x a token", "tokens_a_second"),
            "decode_16": Ratio("{:.2f}x a token of 16 rows", "tokens_a_second_of_16_rows"),
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
            name: statistics.median(ratio(a, b) for a, b in zip(figures[ours], figures[theirs], strict=True))
            for name, ratio in kind.ratios.items()
            if ratio.figure in table[ours] and ratio.figure in table[theirs]
        }
        for ours, theirs in kind.pairs
        if ours in found and theirs in found
    }
    return table, ratios


def print_tables(kind: Kind, found: Mapping[str, Sequence[Measurement]], options: dict[str, Any]) -> None:
    """Prints the table and the ratios, and as the last line all of it as a JSON object."""
    table, ratios = summary(kind, found)
    print(f"{'':18}" + "".join(f"{head:>15}" for head in kind.heads.values()))
    for name, values in table.items():
        cells = (values.get(figure) for figure in kind.heads)
        shown = ("-" if cell is None else f"{cell:.3f}" if cell < 20 else f"{cell:,.0f}" for cell in cells)
        print(f"{name:18}" + "".join(f"{cell:>15}" for cell in shown))
    for pair, values in ratios.items():
        words = ", ".join(kind.ratios[name].words.format(value) for name, value in values.items())
        print(f"{pair}: {words}")
    print(json.dumps({"options": options, "table": table, "ratios": ratios, "rounds": found}))
