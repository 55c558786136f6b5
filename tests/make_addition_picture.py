"""Draws the training loss of runs in one chart: `make_addition_picture.py FILE.svg NAME=RUN ...` (docs/results.md)."""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from minillama.cli.charts import Chart, colour, downsample  # noqa: E402
from minillama.cli.plots import chart_svg  # noqa: E402


def losses(run: Path) -> list[tuple[float, float]]:
    """Step and loss, in means of consecutive steps."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    points, _ = downsample([(line["step"], line["loss"]) for line in lines if "loss" in line])
    return points


def main() -> None:
    into, *named = sys.argv[1:]
    runs = [argument.split("=", 1) for argument in named]
    lines = [
        (name, losses(Path(run)), colour(number, dashed=number % 2 == 1)) for number, (name, run) in enumerate(runs)
    ]
    chart = Chart("loss on the answer, nats a token", "step", lines, dots=False)
    Path(into).write_text(chart_svg("sums of 4 digits", chart), encoding="utf-8")


if __name__ == "__main__":
    main()
