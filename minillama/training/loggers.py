"""Loggers: TensorBoard's events, written beside a run's own metrics."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from minillama.environment import PackageError, optional_package


class TensorBoard:
    """The events of a run, if the package is installed. A broken package is reported once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.writer: Any = None
        self.works = True

    def metric(self, step: int, numbers: dict[str, float]) -> None:
        """Adds the numbers of a step. The first call removes older events of this step and later ones."""
        if not self.works:
            return
        try:
            with optional_package("tensorboard", f"{self.folder}/events.* is left out"):
                if self.writer is None:
                    from torch.utils.tensorboard import SummaryWriter

                    self.writer = SummaryWriter(str(self.folder), purge_step=step)
                for name, value in numbers.items():
                    self.writer.add_scalar(name, value, step)
        except PackageError as error:
            self.works = False
            if not error.missing:
                print(f"notice: {error}", file=sys.stderr, flush=True)
