"""Memory and time of a training run, measured by a few of its real steps before it starts.

The measured steps change the model, so it cannot be trained afterwards.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from minillama.training.loop import Training
from minillama.training.memory import forget_peak, memory_limit, peak_memory, used_memory
from minillama.training.task import PIECE_COST, cut_batch

STEPS = 8  # batches whose steps are timed, if there is time
MOST_SECONDS = 30.0  # for timing steps; at least 3 are timed
SCORED_ROWS = 64  # rows of dev that are scored to measure the time of an evaluation
MOST_BATCHES = 5000  # batches that are searched for the largest piece
RESERVE = 0.95  # of the memory that may be filled


@dataclass(frozen=True)
class Memory:
    """Memory of a run, in bytes; None if the system does not tell it.

    program: before the first step, without the weights. activations: what a step with the largest piece of a batch, of
    `rows` rows and `tokens` tokens, needs beside the rest. estimate: the peak as it was estimated from fewer rows.
    peak: as measured, or the estimate if the piece does not fit into `limit`. fitting_rows: only if it does not fit,
    the most rows at once that do; 0: none.
    """

    weights: int
    gradients: int
    moments: int
    rows: int
    tokens: int
    program: int | None = None
    activations: int | None = None
    estimate: int | None = None
    peak: int | None = None
    limit: int | None = None
    fitting_rows: int | None = None

    @property
    def fits(self) -> bool:
        return self.fitting_rows is None


@dataclass(frozen=True)
class Duration:
    """Seconds of a run. step and evaluation: of one. measured: the number of measured steps."""

    step: float
    steps: int
    evaluation: float
    evaluations: int
    measured: int

    @property
    def training(self) -> float:
        return self.step * self.steps

    @property
    def evaluating(self) -> float:
        return self.evaluation * self.evaluations


class Planner:
    """Measures the steps of `training`, which must not have begun."""

    def __init__(self, training: Training) -> None:
        self.training, self.task, self.device = training, training.task, training.device
        self.batches: list[list[int]] = []  # of the first epochs
        for epoch in range(1, self.task.epochs + 1):
            self.batches += self.task.plan(epoch)
            if len(self.batches) >= MOST_BATCHES:
                break
        piece_cost = PIECE_COST["cpu" if self.device.type == "cpu" else "cuda"]
        self.costs, self.largest, most = [], self.batches[0], 0  # costs of the batches in tokens, padding included
        for batch in self.batches:
            pieces = cut_batch(self.task, batch, self.device, 1, training.settings.micro_batch_size)
            sizes = [self._tokens(piece) for piece in pieces]
            self.costs.append(sum(sizes) + piece_cost * len(pieces))
            if max(sizes) > most:
                most = max(sizes)
                self.largest = pieces[sizes.index(most)]

    def _tokens(self, piece: list[int]) -> int:
        """The tokens of a piece, padding included."""
        if not self.task.pads:
            return self.task.tokens(piece)
        return len(piece) * max(self.task.tokens([row]) for row in piece)

    def _step(self, positions: list[int]) -> float:
        """The seconds of a step with these rows."""
        self.training.model.train()
        self._wait()
        start = time.perf_counter()
        self.training.step(positions, self.training.settings.lr / 1000)
        self._wait()
        return time.perf_counter() - start

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _peak(self, piece: list[int]) -> int | None:
        """The peak after a step with these rows; infinite if the memory was too small."""
        try:
            self._step(piece)
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
                raise
            self.training.optimizer.zero_grad(set_to_none=True)
            return sys.maxsize
        return peak_memory(self.device)

    def memory(self) -> Memory:
        """The memory of a step with the largest piece. Tries 1, 2, 4, ... of its rows, and stops before the memory is
        full: twice as many rows need twice as much more as the last doubling did.
        """
        parameters = list(self.training.model.parameters())
        weights = size_of(parameters)
        trained = size_of([parameter for parameter in parameters if parameter.requires_grad])
        earlier, before, limit = peak_memory(self.device), used_memory(self.device), memory_limit(self.device)
        piece = self.largest
        found = Memory(weights, trained, 2 * trained, rows=len(piece), tokens=self._tokens(piece), limit=limit)
        if before is None or earlier is None or limit is None:
            return replace(found, peak=self._peak(piece))
        found = replace(found, program=max(0, before - weights))
        state, most = before + 3 * trained, int(limit * RESERVE)
        if state > most:
            return replace(found, estimate=state, peak=state, fitting_rows=0)
        forget_peak(self.device)
        done, peak, per_row = 0, state, 0.0
        estimate = state
        for rows in row_counts(len(piece)):
            estimate = int(peak + per_row * (rows - done))
            reached = self._peak(piece[:rows]) if estimate <= most else None
            if reached is None or reached > most:
                whole = int(peak + per_row * (len(piece) - done))
                found = replace(found, estimate=whole, peak=whole)
                return replace(found, fitting_rows=self._fitting(piece, done, peak, per_row, most))
            per_row = max(0.0, (reached - peak) / (rows - done))
            done, peak = rows, max(peak, reached)
        return replace(found, estimate=estimate, peak=max(peak, earlier), activations=peak - state)

    def _fitting(self, piece: list[int], done: int, peak: int, per_row: float, most: int) -> int:
        """The most rows of a piece that fit, estimated from `peak` with `done` rows, and checked by a step."""
        rows = min(int(done + (most - peak) / per_row), len(piece) - 1) if per_row else done
        while rows > done:
            reached = self._peak(piece[:rows])
            if reached is not None and reached <= most:
                return rows
            rows = (done + rows) // 2
        return done

    def duration(self) -> Duration:
        """The time of the run, from steps with batches of all sizes and from one evaluation of some rows."""
        ordered = sorted(range(len(self.batches)), key=self.costs.__getitem__)
        count = min(STEPS, len(ordered))
        chosen = [ordered[int((n + 0.5) / count * len(ordered))] for n in range(count)]
        cost, seconds, measured = 0, 0.0, 0
        for batch in (*chosen[1::2], *chosen[::2]):
            seconds += self._step(self.batches[batch])
            cost += self.costs[batch]
            measured += 1
            if seconds > MOST_SECONDS and measured >= 3:
                break
        step = seconds / cost * sum(self.costs) / len(self.costs)
        return Duration(step, self.task.steps, self._evaluation(), self.task.epochs, measured)

    def _evaluation(self) -> float:
        """The seconds of one evaluation."""
        training = self.training
        task, times = self.task.sample(max(SCORED_ROWS, 4 * self.task.batch_size))
        start = 0.0
        for _ in range(2):  # the first one also imports packages
            start = time.perf_counter()
            task.score(training.model, training.settings.dtype, training.processes, lambda: None, "measuring")
            self._wait()
        return (time.perf_counter() - start) * times


def row_counts(most: int) -> list[int]:
    """1, 2, 4, ... and `most`."""
    return [1 << n for n in range(most.bit_length()) if 1 << n < most] + [most]


def size_of(tensors: list[Tensor]) -> int:
    """The bytes of tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def measure(training: Training) -> tuple[Memory, Duration | None]:
    """The memory and the time of a run; the time is None if the memory does not suffice. Changes the model."""
    planner = Planner(training)
    memory = planner.memory()
    if not memory.fits:
        return memory, None
    duration = planner.duration()
    peak = peak_memory(training.device)
    if peak is not None and memory.peak is not None:
        memory = replace(memory, peak=max(memory.peak, peak))
    return memory, duration
