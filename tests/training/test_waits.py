"""How often a step waits for its device, and what fp16 does with a step that overflows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fitting import Bag, a_classifier, metrics, settings, some_rows, split
from minillama.training import classification
from minillama.training.distributed import Processes
from minillama.training.loop import Training
from minillama.training.settings import learning_rate
from minillama.training.task import PIECE_COST, cut_batch

READS = ("item", "tolist", "cpu", "numpy", "__float__", "__int__", "__bool__", "__index__")


@pytest.fixture
def reads(monkeypatch) -> list[str]:
    """The reads of tensors that would be on a GPU, where each of them waits. Batches are made on the CPU."""
    found: list[str] = []
    make = classification.to_batch

    def made(*arguments: Any) -> Any:
        before = list(found)
        batch = make(*arguments)
        found[:] = before
        return batch

    monkeypatch.setattr(classification, "to_batch", made)

    def noted(name: str, really: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *arguments: found.append(name) or really(*arguments)

    for name in READS:
        monkeypatch.setattr(torch.Tensor, name, noted(name, getattr(torch.Tensor, name)))
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_of_several_pieces_reads_its_device_once(dtype, fit, monkeypatch, reads):
    monkeypatch.setitem(PIECE_COST, "cpu", 2)
    rows = some_rows(16)
    task, chosen = split(settings(epochs=1, batch_size=16, dtype=dtype, max_grad_norm=1.0), rows, rows)
    training = Training(a_classifier(), task, chosen, fit.run(), Processes(), lambda line: None)
    assert len(cut_batch(task, list(range(16)), torch.device("cpu"))) > 2
    training.step(list(range(16)), 1e-2)
    reads.clear()
    training.step(list(range(16)), 1e-2)
    assert reads == ["tolist"]


class Overflows(Bag):
    """Its loss is infinite in fp16's scale at the given steps, through a gradient that overflows."""

    def __init__(self, steps: set[int]) -> None:
        super().__init__()
        self.steps, self.calls = steps, 0

    def forward(self, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        found = super().forward(ids, mask)
        if self.training:
            if self.calls in self.steps:
                found.register_hook(lambda gradient: gradient * torch.inf)
            self.calls += 1
        return found


def test_skipped_steps_do_not_advance_the_schedule_and_are_told(fit):
    rows, lines = some_rows(8), []
    chosen = settings(epochs=3, batch_size=4, lr=0.1, schedule="cosine", dtype=torch.float16)
    model = Overflows({0, 3})
    run = fit(model, rows, rows, chosen, log=lines.append)
    steps = [line for line in metrics(run) if "lr" in line]
    taken = [0, 0, 1, 2, 2, 3]  # before each step
    assert [line["lr"] for line in steps] == [learning_rate(n, 6, 0.1, "cosine", 0, 0.0) for n in taken]
    assert [line.get("skipped", False) for line in steps] == [True, False, False, True, False, False]
    told = [line for line in lines if "is skipped" in line]
    assert told == [
        "step 1 is skipped: its gradient overflowed in fp16; the loss scale is halved now, and later skips are counted"
    ]
    assert lines[1].endswith("1 steps skipped so far") and "2 steps skipped so far" in lines[3]


def test_the_number_of_skipped_steps_is_resumed_and_older_states_have_none(fit):
    rows = some_rows(8)
    chosen = {"batch_size": 4, "lr": 0.1, "dtype": torch.float16, "schedule": "cosine"}
    whole = fit(Overflows({1}), rows, rows, settings(epochs=2, **chosen))
    task, values = split(settings(epochs=2, **chosen), rows, rows)
    training = Training(Overflows({1}), task, values, fit.run("a"), Processes(), lambda line: None)
    training.run.create({})
    training.epoch()
    training.save()
    saved = torch.load(fit.run("a").last_path, weights_only=True)
    assert saved["progress"].pop("skipped") == 1
    again = fit(Overflows(set()), rows, rows, settings(epochs=2, **chosen), name="a")
    rates = [[line["lr"] for line in metrics(run) if "lr" in line] for run in (whole, again)]
    assert rates[0] == rates[1] and len(rates[0]) == 4
    training.run.save(saved)  # as an older version of the program saved it
    fresh = Training(Overflows(set()), task, values, fit.run("a"), Processes(), lambda line: None)
    fresh.restore()
    assert fresh.progress.skipped == 0
