"""The task of classifying rows with labels."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minillama.layers.precision import to_device
from minillama.text.batches import shuffled_batches, spread, to_batch
from minillama.text.labelled import Row
from minillama.training.class_shares import one_class_warning, training_remedy
from minillama.training.distributed import Processes
from minillama.training.evaluation import describe, evaluate, forward
from minillama.training.regularizers import MovingAverage, Smart, random_state, replayed, symmetric_kl
from minillama.training.task import Score


def row_losses(log_probs: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    """Cross-entropy of each row (B,) with label smoothing (arXiv 1512.00567, section 7).

    The target is 1 - smoothing on the label, plus smoothing / classes on every class.
    """
    losses = F.nll_loss(log_probs, labels, reduction="none")
    return losses if smoothing == 0 else (1 - smoothing) * losses - smoothing * log_probs.mean(-1)


@dataclass
class Classification:
    """Classification of rows, for any model from (ids, mask) to log-probabilities; the score is accuracy on dev."""

    rows: Sequence[Row]
    dev_rows: Sequence[Row]
    epochs: int
    batch_size: int
    seed: int
    pad_id: int = 0
    bucketed: bool = True  # batch rows of similar length; else batches are random, and evaluation is in file order
    label_smoothing: float = 0.0
    evaluate_train: bool = False  # score the whole training set after each epoch
    smart: Smart | None = None
    average: MovingAverage | None = None  # for the Bregman penalty
    r_drop: float = 0.0  # weight of the divergence of two passes under dropout (arXiv 2106.14448)
    class_weights: Sequence[float] | None = None  # by class id: a row's loss, with all its terms, times its class's
    label_names: Sequence[str] = ()  # for warnings

    unit = "row"
    judged_by = "dev accuracy"

    @property
    def pads(self) -> bool:
        return self.bucketed  # else a model may read the padding, which depends on the whole batch

    @property
    def steps(self) -> int:
        return self.first_step(self.epochs + 1)

    def first_step(self, epoch: int) -> int:
        return (epoch - 1) * -(-len(self.rows) // self.batch_size)

    def name(self, epoch: int) -> str:
        return f"epoch {epoch}"

    def checksum(self) -> int:
        rows = [[(row.label, row.ids) for row in split] for split in (self.rows, self.dev_rows)]
        return zlib.crc32(repr(rows).encode())

    def plan(self, epoch: int) -> list[list[int]]:
        return shuffled_batches(self.rows, self.batch_size, self.seed, epoch, self.bucketed)

    def targets(self, positions: list[int]) -> int:
        return len(positions)

    def tokens(self, positions: list[int]) -> int:
        return sum(len(self.rows[i].ids) for i in positions)

    def shape(self, positions: list[int]) -> tuple[int, int]:
        return len(positions), max(len(self.rows[i].ids) for i in positions)

    def losses(self, model: nn.Module, positions: list[int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        batch = to_batch(self.rows, positions, self.pad_id)
        device = next(model.parameters()).device
        compared = self.smart is not None or self.average is not None
        before = random_state(device) if compared else []
        log_probs = forward(model, batch.ids, batch.mask, dtype)
        labels = to_device(batch.labels, device)
        losses, right = row_losses(log_probs, labels, self.label_smoothing), log_probs.argmax(-1) == labels
        if self.r_drop:
            second = forward(model, batch.ids, batch.mask, dtype)
            losses = losses + row_losses(second, labels, self.label_smoothing)
            losses = losses + self.r_drop / 2 * symmetric_kl(log_probs, second)

        def again(model: nn.Module = model, dtype: torch.dtype = torch.float32) -> Tensor:
            """Another pass, with the dropout mask of the first."""
            with replayed(before, device):
                return forward(model, batch.ids, batch.mask, dtype)

        if self.average is not None:
            losses = losses + self.average.penalty(model, lambda average: again(average, dtype), log_probs)
        if self.smart is not None:
            clean = log_probs if dtype == torch.float32 else again()
            losses = losses + self.smart.penalty(model, batch.ids.shape, again, clean)
        if self.class_weights is not None:
            # The loop divides by the number of rows, not by the sum of their weights: then a row counts the same in
            # every batch, piece and process. The mean weight of the training set is 1.
            losses = losses * to_device(torch.tensor(self.class_weights)[batch.labels], device)
        return losses, right

    def sample(self, rows: int) -> tuple[Classification, float]:
        judged = (*self.dev_rows, *(self.rows if self.evaluate_train else ()))
        some = spread(judged, rows)
        tokens = [sum(len(row.ids) for row in part) for part in (judged, some)]
        return replace(self, dev_rows=some, evaluate_train=False), tokens[0] / tokens[1]

    def score(
        self, model: nn.Module, dtype: torch.dtype, processes: Processes, check: Callable[[], None], name: str
    ) -> Score:
        splits = ({"train": self.rows} if self.evaluate_train else {}) | {"dev": self.dev_rows}
        settings = dict(pad_id=self.pad_id, dtype=dtype, bucketed=self.bucketed, processes=processes)
        found = {
            split: evaluate(model, rows, self.batch_size, check=check, name=f"{split}, {name}", **settings)
            for split, rows in splits.items()
        }
        metrics: dict[str, float | None] = {f"{split}_accuracy": one.accuracy for split, one in found.items()}
        metrics |= {f"{split}_macro_f1": one.macro_f1 for split, one in found.items()}
        metrics["dev_loss"] = found["dev"].loss  # the name train_loss is used for the epoch's running mean
        text = ", ".join(f"{split} {describe(one, with_loss=True)}" for split, one in found.items())
        remedy = training_remedy(weighted=self.class_weights is not None)
        warning = one_class_warning(found["dev"], self.dev_rows, self.label_names, remedy)
        return Score(found["dev"].accuracy, text, metrics, warning=warning)
