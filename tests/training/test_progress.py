"""The time left of a run: the estimate, its place in the log and on the bar."""

from __future__ import annotations

import io

import pytest
from tqdm import tqdm

from fitting import Bag, settings, some_rows
from minillama.training import loop, progress
from minillama.training.progress import Pace, Progress, advance


class Clock:
    """A clock that only the model moves on."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now


@pytest.mark.parametrize("start", [10, 500], ids=["even steps", "a slow first step"])
def test_each_epoch_tells_the_time_that_the_rest_of_the_run_takes(fit, monkeypatch, start):
    """Steps of 10 s and evaluations of two batches of 4 s, against the time that the run then really took."""
    clock, ends, lines = Clock(), [], []

    class Slow(Bag):
        def forward(self, ids, mask=None):
            first = not self.seen
            clock.now += (start if first else 10) if self.training else 4
            return super().forward(ids, mask)

    def log(line):
        lines.append(line)
        ends.append(clock.now)

    monkeypatch.setattr(loop, "time", clock)
    fit(Slow(), some_rows(11), some_rows(8), settings(epochs=3), log=log)
    rest = [tqdm.format_interval(ends[-1] - end) for end in ends[:-1]]
    assert rest == ["01:16", "00:38"]
    assert [line.rpartition(", ")[2] for line in lines if line.startswith("epoch")][:-1] == [f"{t} left" for t in rest]
    assert "left" not in lines[-1]


def test_the_time_left_is_unknown_before_the_first_step():
    assert Pace().left(10, 2) == ""


def test_the_bar_of_an_epoch_tells_the_time_left_in_all():
    terminal = io.StringIO()
    with tqdm(total=8, file=terminal, ncols=120, mininterval=0) as bar:
        advance(bar, "epoch 2", "1:02:03", Progress(loss_sum=3.0, correct=1, seen=2), 2, lr="0.1")
    shown = terminal.getvalue()
    assert "epoch 2, 1:02:03 left in all:  25%" in shown and "loss=1.5000, accuracy=0.500, lr=0.1" in shown


def test_without_a_terminal_a_line_tells_every_half_minute_how_far_the_run_is(fit, monkeypatch):
    clock, lines = Clock(), []

    class Slow(Bag):
        def forward(self, ids, mask=None):
            clock.now += 20
            return super().forward(ids, mask)

    monkeypatch.setattr(loop, "time", clock)
    monkeypatch.setattr(progress, "time", clock)
    fit(Slow(), some_rows(40), some_rows(8), settings(epochs=1), log=lines.append)
    parts = [line for line in lines if "left in all" in line]
    assert parts[0].startswith("epoch 1: ") and " of 40 rows, loss " in parts[0] and len(parts) >= 3
    assert [line.startswith("epoch 1: loss") for line in lines].count(True) == 1
