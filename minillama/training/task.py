"""A task: its batches, its loss, and its score. The training loop uses nothing else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from minillama.training.distributed import Processes
from minillama.training.regularizers import MovingAverage


@dataclass(frozen=True)
class Score:
    """How good a model is: the larger `quality` the better; None where there is nothing to judge by."""

    quality: float | None
    text: str
    metrics: dict[str, float | None]
    sample: str = ""  # text that the model wrote


class Task(Protocol):
    """The interface of the training loop. A position is the index of a row; the loss is a mean over targets."""

    unit: str  # of targets, for the progress bar
    judged_by: str
    batch_size: int

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
        """The batches of an epoch; a function of seed and epoch."""

    def targets(self, positions: list[int]) -> int:
        """How many targets these rows have."""

    def tokens(self, positions: list[int]) -> int:
        """How many tokens these rows have."""

    def losses(self, model: nn.Module, positions: list[int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The summed loss of each row (B,), and the number of its correctly predicted targets (B,)."""

    def score(
        self, model: nn.Module, dtype: torch.dtype, processes: Processes, check: Callable[[], None], name: str
    ) -> Score:
        """The score of the model. Every process calls this, and this calls check() now and then."""
