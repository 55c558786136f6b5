"""The position of a run, the time it has left, and the progress bar of an epoch."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from tqdm import tqdm

from minillama.training.task import Score


@dataclass
class Progress:
    """The position of a run, and its running sums."""

    epoch: int = 1
    batch: int = 0  # batches of this epoch that are done
    step: int = 0  # optimizer steps of the whole run
    loss_sum: float = 0.0  # this and the next two: over the targets of this epoch so far
    correct: int = 0
    seen: int = 0
    best_epoch: int = 0
    best_quality: float | None = None
    best_loss: float | None = None  # on dev, of the best epoch
    finished: bool = False
    skipped: int = 0  # steps of the whole run that fp16 skipped

    def is_beaten_by(self, score: Score) -> bool:
        """Whether a score is better than the best so far. At the same quality the lower loss on dev is better.

        On few rows many epochs have the same accuracy; the first of them has often learnt least.
        """
        if self.best_epoch == 0 or self.best_quality is None:
            return True
        if score.quality is None or score.quality != self.best_quality:
            return score.quality is not None and score.quality > self.best_quality
        loss = score.metrics.get("dev_loss")
        return loss is not None and self.best_loss is not None and loss < self.best_loss

    @property
    def mean_loss(self) -> float:
        return self.loss_sum / self.seen

    @property
    def accuracy(self) -> float:
        return self.correct / self.seen


@dataclass
class Pace:
    """The durations of the steps and the evaluations that this process has done, in seconds."""

    first_step: float = 0.0  # includes the start of kernels and compilation
    later_steps: float = 0.0
    steps: int = 0
    scoring: float = 0.0
    scores: int = 0
    told: float = field(default_factory=lambda: time.perf_counter())  # when a line last told the pace

    def add_step(self, seconds: float) -> None:
        if self.steps:
            self.later_steps += seconds
        else:
            self.first_step = seconds
        self.steps += 1

    def add_score(self, seconds: float) -> None:
        self.scoring += seconds
        self.scores += 1

    def left(self, steps: int, scores: int) -> str:
        """The time for so many more steps and evaluations, such as "12:30" or "1:02:03"; "" before the first step.

        The first step counts only until there is another. Evaluations count once the first one has ended.
        """
        if not self.steps:
            return ""
        step = self.later_steps / (self.steps - 1) if self.steps > 1 else self.first_step
        score = self.scoring / self.scores if self.scores else 0.0
        return tqdm.format_interval(steps * step + scores * score)

    def is_due(self, every: float = 30.0) -> bool:
        """Whether no line was printed for `every` seconds; if so, one is printed now."""
        now = time.perf_counter()
        due = now - self.told >= every
        self.told = now if due else self.told
        return due


def epoch_bar(name: str, targets: int, progress: Progress, unit: str, shown: bool) -> tqdm[Any]:
    """The bar of an epoch of `targets`, on a terminal and if `shown`."""
    settings: dict[str, Any] = {"unit": unit, "leave": False, "disable": None if shown else True}
    return tqdm(total=targets, initial=progress.seen, desc=name, **settings)


def advance(bar: tqdm[Any], name: str, left: str, progress: Progress, targets: int, **numbers: str) -> None:
    """Moves the bar of an epoch on by `targets`. left: the time left for the whole run; numbers: more to show."""
    bar.set_description_str(f"{name}, {left} left in all", refresh=False)
    bar.update(targets)
    numbers = {"loss": f"{progress.mean_loss:.4f}", "accuracy": f"{progress.accuracy:.3f}", **numbers}
    bar.set_postfix(numbers, refresh=False)


def describe_part(name: str, progress: Progress, targets: int, unit: str, left: str) -> str:
    """A line about an epoch of `targets` under way. left: the time left for the whole run."""
    done = f"{progress.seen:,} of {targets:,} {unit}s"
    return f"{name}: {done}, loss {progress.mean_loss:.4f}, {left} left in all"


def describe_epoch(name: str, progress: Progress, score: Score, is_best: bool, left: str) -> str:
    """The line of an epoch for the log. left: the time left for the whole run, or ""."""
    line = f"{name}: loss {progress.mean_loss:.4f}, running train accuracy {progress.accuracy:.3f}, {score.text}"
    line += " (best so far)" * is_best
    line += f", {left} left" * bool(left)
    line += f", {progress.skipped} steps skipped so far" * bool(progress.skipped)
    return line + f"\n    {score.sample}" * bool(score.sample)
