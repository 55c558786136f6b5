"""Plans of memory and time: what is measured, and what is predicted from it."""

from __future__ import annotations

import mmap
import subprocess
import sys

import pytest
import torch

from conftest import ROOT
from fitting import Bag, a_task, an_instruction, settings, some_rows, split
from minillama.training import planning
from minillama.training.distributed import Processes
from minillama.training.loop import Training
from minillama.training.memory import forget_peak, memory_limit, peak_memory, used_memory
from minillama.training.planning import Planner, measure, row_counts
from minillama.training.run_directory import RunDirectory

CPU = torch.device("cpu")


@pytest.fixture
def start(tmp_path):
    """A training that has not begun, for rows and settings."""

    def start(rows, **changes):
        task, chosen = split(settings(**changes), rows, some_rows(6))
        return Training(Bag(), task, chosen, RunDirectory(tmp_path, writes=False), Processes(), lambda line: None)

    return start


class Machine:
    """A machine with a made-up memory, of which each token takes 1,000 bytes, and a clock that only steps move."""

    def __init__(self, monkeypatch, limit, seconds=lambda rows, tokens: 0.0):
        self.peak = self.base = 50_000
        self.time, self.seconds, self.limit, self.most = 0.0, seconds, limit, 0
        monkeypatch.setattr(planning, "used_memory", lambda device: self.base)
        monkeypatch.setattr(planning, "peak_memory", lambda device: self.peak)
        monkeypatch.setattr(planning, "memory_limit", lambda device: self.limit)
        monkeypatch.setattr(planning, "forget_peak", lambda device: None)
        monkeypatch.setattr(planning.time, "perf_counter", lambda: self.time)

    def step(self, planner):
        """Replaces the step of the training."""

        def step(positions, lr):
            for piece in planner._planned(positions).pieces:
                rows, tokens = planner.task.shape(piece)
                self.peak = max(self.peak, self.base + 1000 * rows * tokens + 3 * 4 * 60)
                self.most = max(self.most, rows)
                self.time += self.seconds(rows, tokens)
            return 0.0, 0

        planner.training.step = step


def test_rows_are_tried_in_doublings():
    assert row_counts(1) == [1]
    assert row_counts(8) == [1, 2, 4, 8]
    assert row_counts(11) == [1, 2, 4, 8, 11]


def test_the_parts_of_the_memory_are_those_of_the_model(start):
    memory, duration = measure(start(some_rows(20)))
    assert (memory.weights, memory.gradients, memory.moments) == ((60 + 2) * 4, 60 * 4, 2 * 60 * 4)
    assert memory.fits and memory.peak >= used_memory(CPU) > memory.weights
    assert duration.steps == 2 * 5 and duration.evaluations == 2 and duration.training > 0


@pytest.mark.parametrize("rows", [3, 5, 7])
def test_a_piece_that_does_not_fit_is_never_tried_and_the_rows_that_do_are_found(start, monkeypatch, rows):
    planner = Planner(start(some_rows(40, seed=1), batch_size=8))
    piece, tokens = planner.largest, planner.task.shape(planner.largest)[1]
    assert len(piece) == 8
    machine = Machine(monkeypatch, limit=0)
    machine.step(planner)
    machine.limit = int((machine.base + 720 + 1000 * tokens * rows + 500) / planning.WELL_FILLED)
    monkeypatch.setattr(planning, "MOST_FILLED", 0.81)
    memory = planner.memory()
    assert not memory.fits and memory.fitting_rows == rows
    assert machine.most == rows  # the most that was ever computed at once
    assert memory.peak == pytest.approx(machine.base + 720 + 1000 * tokens * 8, abs=10)


def test_a_piece_that_fits_is_measured(start, monkeypatch):
    planner = Planner(start(some_rows(40, seed=1), batch_size=8))
    machine = Machine(monkeypatch, limit=10**7)
    machine.step(planner)
    memory = planner.memory()
    rows, tokens = planner.task.shape(planner.largest)
    assert memory.fits and memory.activations == 1000 * rows * tokens
    assert memory.estimate == memory.peak == machine.base + 720 + 1000 * rows * tokens


def test_weights_that_do_not_fit_are_not_tried(start, monkeypatch):
    planner = Planner(start(some_rows(40)))
    machine = Machine(monkeypatch, limit=50_500)
    machine.step(planner)
    assert planner.memory().fitting_rows == 0 and machine.most == 0


def test_memory_that_later_steps_need_counts(start, monkeypatch):
    """A step with the largest piece just fits, but not what comes after it."""
    training = start(some_rows(40, seed=1), batch_size=8)
    machine = Machine(monkeypatch, limit=0)
    make = planning.Planner

    def prepared(training):
        planner = make(training)
        machine.step(planner)
        rows, tokens = planner.task.shape(planner.largest)
        machine.limit = int((machine.base + 720 + 1000 * rows * tokens + 500) / planning.MOST_FILLED)
        explore = planner.explore
        planner.explore = lambda: (explore()[0], 10_000)
        return planner

    monkeypatch.setattr(planning, "Planner", prepared)
    memory, duration = measure(training)
    assert duration is None and not memory.fits and 0 < memory.fitting_rows < memory.rows
    assert memory.peak > memory.limit


def test_memory_that_torch_cannot_get_does_not_end_the_plan(start, monkeypatch):
    planner = Planner(start(some_rows(40, seed=1), batch_size=8))
    machine = Machine(monkeypatch, limit=10**9)
    machine.step(planner)
    works = planner.training.step

    def step(positions, lr):
        if len(positions) > 4:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")
        return works(positions, lr)

    planner.training.step = step
    assert planner.memory().fitting_rows == 4


def test_the_time_is_that_of_all_steps(start, monkeypatch):
    """Padding, pieces and new shapes have a cost here; the plan adds up to that of every step."""
    seen = set()

    def seconds(rows, tokens):
        new = (rows, tokens) not in seen
        seen.add((rows, tokens))
        return 1e-3 * (rows * tokens + planning.PIECE_COST["cpu"]) + 0.5 * new

    training = start(some_rows(200, seed=2), batch_size=7, epochs=3)
    planner = Planner(training)
    machine = Machine(monkeypatch, 10**9, seconds)
    machine.step(planner)
    duration, _ = planner.explore()
    seen.clear()
    begun = machine.time
    for epoch in range(1, 4):
        for batch in training.task.plan(epoch):
            training.step(batch, 0.0)
    assert duration.steps == 3 * 29 and duration.measured < 40
    assert duration.training == pytest.approx(machine.time - begun, rel=0.02)


def test_long_runs_are_planned_from_part_of_their_shapes(start, monkeypatch):
    monkeypatch.setattr(planning, "MOST_SECONDS", 3.0)
    training = start(some_rows(200, seed=2), batch_size=7, epochs=3)
    planner = Planner(training)
    machine = Machine(monkeypatch, 10**9, lambda rows, tokens: 1.0)
    machine.step(planner)
    duration, _ = planner.explore()
    assert duration.measured <= 4 + planning.STEPS
    assert duration.step == pytest.approx(1.0, rel=0.3)


@pytest.mark.parametrize("kind", ["classification", "instruction", "language modelling"])
def test_the_shape_of_a_piece_is_that_of_the_tensor(kind, tokenizer, start):
    if kind == "classification":
        task = start(some_rows(40)).task
        model = Bag()
        task.losses(model, task.plan(1)[0], torch.float32)
        ids = model.seen[-1][1]
        assert task.shape(task.plan(1)[0]) == (len(ids), len(ids[0]))
        return
    task = an_instruction(tokenizer) if kind == "instruction" else a_task(tokenizer)
    seen = []

    class Spy(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, ids, *rest, **more):
            seen.append(tuple(ids.shape))
            zeros = torch.zeros(ids.shape)
            return (zeros, zeros), None

    for batch in task.plan(1)[:3]:
        task.losses(Spy(), batch, torch.float32)
        assert task.shape(batch) == seen[-1]


def test_a_sample_stands_for_all_rows_that_are_scored(tokenizer, start):
    task = start(some_rows(40)).task
    task.dev_rows = some_rows(90)
    some, times = task.sample(10)
    assert len(some.dev_rows) == 10 and len(task.dev_rows) == 90
    tokens = [sum(len(row.ids) for row in one.dev_rows) for one in (task, some)]
    assert times == pytest.approx(tokens[0] / tokens[1]) and 7 < times < 12
    asked = an_instruction(tokenizer)
    some, times = asked.sample(2)
    assert len(some.dev_examples) <= 2 and times == len(asked._judged or asked.dev_examples) / len(some.dev_examples)
    assert some.max_new_tokens <= asked.max_new_tokens


# The memory of this process


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_peak_holds_what_was_used_and_can_be_forgotten():
    before = peak_memory(CPU)
    used = used_memory(CPU)
    block = mmap.mmap(-1, max(1, before - used) + 200_000_000)  # 200 MB above the peak so far; never reused memory
    block.write(bytes(len(block)))
    assert used_memory(CPU) - used > 190e6 and peak_memory(CPU) - before > 190e6
    block.close()
    forget_peak(CPU)
    assert peak_memory(CPU) - used_memory(CPU) < 50e6 and memory_limit(CPU) > used_memory(CPU)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_limit_of_the_shell_counts():
    code = "import torch, resource; from minillama.training.memory import *; cpu = torch.device('cpu'); "
    code += "size = kilobytes(PROCESS, 'VmSize'); resource.setrlimit(resource.RLIMIT_AS, (size + 10**8, -1)); "
    code += "print(memory_limit(cpu) - used_memory(cpu))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert 0 < int(done.stdout) <= 10**8
