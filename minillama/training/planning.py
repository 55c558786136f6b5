"""Memory and time of a training run, measured by a few of its real steps before it starts.

The measured steps change the model, so it cannot be trained afterwards.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from minillama.formats.files import write_torch
from minillama.training.loop import Training
from minillama.training.memory import forget_peak, memory_limit, peak_memory, used_memory
from minillama.training.task import PIECE_COST, cut_batch

STEPS = 10  # batches whose steps are timed
MOST_SECONDS = 30.0  # for steps with new shapes of a batch
KEPT_SHAPES = 100  # whose kernels oneDNN keeps; memory was seen to grow up to about this number
SCORED_ROWS = 64  # rows of dev that are scored to measure the time of an evaluation
MOST_BATCHES = 5000  # batches that are searched for the largest piece
MOST_FILLED = 0.95  # of the memory, by a step that is tried
WELL_FILLED = 0.8  # by a step that is advised: evaluations, and batches of other lengths, need more


@dataclass(frozen=True)
class Memory:
    """Memory of a run, in bytes; None if the system does not tell it.

    program: before the first step, without the weights. activations: what a step with the largest piece of a batch, of
    `rows` rows and `tokens` tokens, needs beside the rest. later: what steps with other batches and the evaluation
    add. estimate: the peak of that one step as it was estimated from fewer rows. peak: of the run, as measured, or the
    estimate if the piece does not fit into `limit`. fitting_rows: only if it does not fit, the most rows at once that
    do; 0: none.
    """

    weights: int
    gradients: int
    moments: int
    rows: int
    tokens: int
    program: int | None = None
    activations: int | None = None
    later: int | None = None
    estimate: int | None = None
    peak: int | None = None
    limit: int | None = None
    fitting_rows: int | None = None

    @property
    def fits(self) -> bool:
        return self.fitting_rows is None


@dataclass(frozen=True)
class Duration:
    """Seconds of a run. step, evaluation and save: of one. first: what the first step with one of the shapes takes
    more. measured: the number of measured steps.
    """

    step: float
    steps: int
    evaluation: float
    evaluations: int
    save: float
    saves: int
    first: float
    shapes: int
    measured: int

    @property
    def training(self) -> float:
        return self.step * self.steps + self.first * self.shapes + self.save * self.saves

    @property
    def evaluating(self) -> float:
        return self.evaluation * self.evaluations


class Planned(NamedTuple):
    """A batch of the run: its rows, the pieces that they are computed in, and its cost in tokens."""

    positions: list[int]
    pieces: list[list[int]]
    shapes: list[tuple[int, int]]
    cost: int


class Planner:
    """Measures the steps of `training`, which must not have begun."""

    def __init__(self, training: Training) -> None:
        self.training, self.task, self.device = training, training.task, training.device
        self.batches: list[Planned] = []  # of the first epochs
        for epoch in range(1, self.task.epochs + 1):
            self.batches += [self._planned(batch) for batch in self.task.plan(epoch)]
            if len(self.batches) >= MOST_BATCHES:
                break
        self.largest = max((piece for batch in self.batches for piece in batch.pieces), key=self._tokens)
        self.shapes = {shape for batch in self.batches for shape in batch.shapes}
        self.seen: set[tuple[int, int]] = set()
        self.per_row = 0.0  # bytes that one more row of the largest piece takes, as far as is known

    def _planned(self, batch: list[int]) -> Planned:
        pieces = cut_batch(self.task, batch, self.device, 1, self.training.settings.micro_batch_size)
        shapes = [self.task.shape(piece) for piece in pieces]
        piece_cost = PIECE_COST["cpu" if self.device.type == "cpu" else "cuda"]
        return Planned(batch, pieces, shapes, sum(rows * tokens + piece_cost for rows, tokens in shapes))

    def _tokens(self, piece: list[int]) -> int:
        rows, tokens = self.task.shape(piece)
        return rows * tokens

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
        state, most = before + 3 * trained, int(limit * MOST_FILLED)
        if state > most:
            return replace(found, estimate=state, peak=state, fitting_rows=0)
        forget_peak(self.device)
        done, peak, estimate = 0, state, state
        for rows in row_counts(len(piece)):
            estimate = int(peak + self.per_row * (rows - done))
            reached = self._peak(piece[:rows]) if estimate <= most else None
            if reached is None or reached > most:
                whole = int(peak + self.per_row * (len(piece) - done))
                found = replace(found, estimate=whole, peak=max(whole, most))
                return replace(found, fitting_rows=self._fitting(piece, done, peak, limit))
            self.per_row = max(0.0, (reached - peak) / (rows - done))
            done, peak = rows, max(peak, reached)
        return replace(found, estimate=estimate, peak=max(peak, earlier), activations=peak - state)

    def _fitting(self, piece: list[int], done: int, peak: int, limit: int) -> int:
        """The rows of a piece that fit well, estimated from `peak` with `done` rows, and checked by a step."""
        rows = min(fewer_rows(done, peak, self.per_row, limit), len(piece) - 1)
        while rows > done:
            reached = self._peak(piece[:rows])
            if reached is not None and reached <= limit * MOST_FILLED:
                break
            rows = (done + rows) // 2
        return rows

    def explore(self) -> tuple[Duration, int]:
        """The time of the run, and the memory that it will need beside the peak so far.

        First takes a step with each new shape of a batch, in the order of the run, while there is time: on the CPU in
        half precision, oneDNN compiles kernels for each shape. It keeps those of about `KEPT_SHAPES`, and memory grows
        until then, also because they lie between freed tensors. Then times steps with batches of all costs.
        """
        new: list[tuple[Planned, float]] = []
        peaks = [peak_memory(self.device) or 0]
        for batch in self.batches:
            if sum(seconds for _, seconds in new) > MOST_SECONDS:
                break
            if not self.seen.issuperset(batch.shapes):
                new.append((batch, self._step(batch.positions)))
                self.seen.update(batch.shapes)
                peaks.append(peak_memory(self.device) or 0)
        ordered = sorted(
            (batch for batch in self.batches if self.seen.issuperset(batch.shapes)), key=lambda batch: batch.cost
        )
        count = min(STEPS, len(ordered))
        timed = [
            (batch, self._step(batch.positions))
            for batch in ordered[len(ordered) // count // 2 :: len(ordered) // count]
        ]
        per_cost = sum(seconds for _, seconds in timed) / sum(batch.cost for batch, _ in timed)
        extra = sum(max(0.0, seconds - batch.cost * per_cost) for batch, seconds in new) / len(self.seen)
        mean_cost = sum(batch.cost for batch in self.batches) / len(self.batches)
        duration = Duration(
            step=per_cost * mean_cost,
            steps=self.task.steps,
            evaluation=self._evaluation(),
            evaluations=self.task.epochs,
            save=self._saving(),
            saves=self.task.epochs + self.task.steps // self.training.settings.save_every,
            shapes=len(self.shapes),
            first=extra,
            measured=len(new) + len(timed),
        )
        growth = (peaks[-1] - peaks[0]) / max(1, len(peaks) - 1)
        remaining = max(0, min(len(self.shapes), KEPT_SHAPES) - len(self.seen))
        return duration, int(growth * remaining)

    def _saving(self) -> float:
        """The seconds of saving the state and the best model, but for the disk."""
        start = time.perf_counter()
        state = self.training.state()
        write_torch(os.devnull, state)
        write_torch(os.devnull, {"model": state["model"]})
        return time.perf_counter() - start

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


def fewer_rows(rows: int, peak: int, per_row: float, limit: int) -> int:
    """The rows with which the memory is well filled, estimated from the peak with `rows` rows; 0: none."""
    if not per_row:
        return rows
    return max(0, int(rows + (limit * WELL_FILLED - peak) / per_row))


def row_counts(most: int) -> list[int]:
    """1, 2, 4, ... and `most`."""
    return [1 << n for n in range(most.bit_length()) if 1 << n < most] + [most]


def size_of(tensors: Sequence[Tensor]) -> int:
    """The bytes of tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def measure(training: Training) -> tuple[Memory, Duration | None]:
    """The memory and the time of a run; the time is None if the memory does not suffice. Changes the model."""
    planner = Planner(training)
    memory = planner.memory()
    if not memory.fits:
        return memory, None
    duration, growth = planner.explore()
    peak = peak_memory(training.device)
    if peak is not None and memory.peak is not None:
        peak = max(memory.peak, peak) + growth
        memory = replace(memory, peak=peak, later=peak - memory.peak)
        if memory.limit is not None and peak > memory.limit and memory.rows > 1:
            rows = fewer_rows(memory.rows, peak, planner.per_row, memory.limit)
            memory = replace(memory, fitting_rows=min(rows, memory.rows - 1))
    return memory, duration if memory.fits else None
