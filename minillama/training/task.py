"""A task: its batches, its loss, and its score. The training loop uses nothing else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from minillama.text.batches import cut_by_length, cut_in_batches
from minillama.training.distributed import Processes
from minillama.training.regularizers import MovingAverage

# The cost of one more piece of a batch, in tokens (docs/performance.md): each piece reads all weights and adds to all
# gradients. On CUDA a piece also waits for hundreds of kernels to start, so a batch usually stays whole.
PIECE_COST = {"cpu": 300, "cuda": 20_000}


@dataclass(frozen=True)
class Score:
    """The score of a model: larger `quality` is better; None without data to compute it."""

    quality: float | None
    text: str
    metrics: dict[str, float | None]
    sample: str = ""  # text that the model wrote
    warning: str = ""  # a fault of the predictions, and what to try


class Task(Protocol):
    """The training loop's interface to a task. A position is the index of a row; the loss is a mean over targets."""

    unit: str  # of targets, for the progress bar
    judged_by: str
    batch_size: int

    @property
    def pads(self) -> bool:
        """Whether a batch is padded to its longest row, so that pieces of similar length save work."""

    @property
    def epochs(self) -> int:
        """The number of plans; the model is scored after each."""

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""

    @property
    def average(self) -> MovingAverage | None:
        """The moving average of the weights, if the losses need one; the loop updates and saves it."""

    def checksum(self) -> int:
        """A checksum of all data; a resumed run needs the same."""

    def plan(self, epoch: int) -> list[list[int]]:
        """The batches of an epoch, determined by seed and epoch."""

    def first_step(self, epoch: int) -> int:
        """Optimizer steps before this epoch."""

    def name(self, epoch: int) -> str:
        """The name of an epoch in the log."""

    def targets(self, positions: list[int]) -> int:
        """Number of targets in these rows."""

    def tokens(self, positions: list[int]) -> int:
        """Number of tokens in these rows."""

    def shape(self, positions: list[int]) -> tuple[int, int]:
        """The tensor that these rows make: its rows, and its tokens per row, padding included."""

    def losses(self, model: nn.Module, positions: list[int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The summed loss of each row (B,), and the number of its correctly predicted targets (B,)."""

    def sample(self, rows: int) -> tuple[Task, float]:
        """This task with at most `rows` of the rows that `score` reads, of all lengths, to measure its time; and how
        many times as long `score` takes with all rows.
        """

    def score(
        self, model: nn.Module, dtype: torch.dtype, processes: Processes, check: Callable[[], None], name: str
    ) -> Score:
        """The score of the model. Every process calls this. It calls check() regularly, which may stop the run."""


def cut_batch(
    task: Task, positions: list[int], device: torch.device, world: int = 1, micro_batch_size: int | None = None
) -> list[list[int]]:
    """A batch in the pieces that are computed one after the other; `world` processes share the rows of each.

    If the task pads, rows of similar length form a piece. In a piece each process has at most `micro_batch_size` rows.
    """
    most_rows = world * (micro_batch_size or len(positions))
    if not task.pads:
        return cut_in_batches(positions, most_rows)
    lengths = [task.tokens([i]) for i in positions]
    cost = PIECE_COST["cpu" if device.type == "cpu" else "cuda"]
    return cut_by_length(positions, lengths, world * cost, most_rows)
