"""The training loop of every mode, and evaluation. Takes any model that maps (ids, mask) to log-probabilities."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.metrics import accuracy_score, f1_score
from torch import Tensor, nn
from tqdm import tqdm

from dataset import Row, batches, has_gold_labels
from optimizer import AdamW

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Settings:
    """How to train: one optimizer step per batch, at a constant learning rate."""

    epochs: int
    batch_size: int
    lr: float
    seed: int
    dtype: torch.dtype = torch.float32  # of the matrix products; the weights themselves stay float32
    pad_id: int = 0
    in_file_order: bool = False  # evaluate batches of rows as they stand, see `evaluate`


@dataclass(frozen=True)
class Evaluation:
    """Predicted class ids in the order of the rows; accuracy and macro-F1, None where there are no gold labels."""

    predictions: list[int]
    accuracy: float | None
    macro_f1: float | None


def bf16_is_native(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 matrices itself: AMX or AVX512-BF16 on x86, the bf16 extension on Arm,
    compute capability 8.0 on CUDA. Emulated, bfloat16 is slower than float32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    # Public from torch 2.13 on; where torch cannot tell, float32 is the safe answer.
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(capabilities.get(name) for name in ("amx_bf16", "avx512_bf16", "bf16"))


def precision(device: torch.device, dtype: torch.dtype) -> AbstractContextManager:
    """Autocast to `dtype` where it is narrower than float32: matrix products in dtype, norms, softmax, losses in
    float32.
    """
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def forward(model: nn.Module, ids: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The model's log-probabilities (B, labels) for a batch from the CPU, on the model's own device, in `dtype`."""
    device = next(model.parameters()).device
    mask = None if mask is None else mask.to(device)
    with precision(device, dtype):
        return model(ids.to(device), mask)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    rows: Sequence[Row],
    batch_size: int,
    *,
    pad_id: int = 0,
    dtype: torch.dtype = torch.float32,
    in_file_order: bool = False,
    name: str = "evaluating",
) -> Evaluation:
    """The class with the highest log-probability for every row.

    Rows of like length share a batch, so that little is computed on padding; `in_file_order` leaves them as they stand,
    for the course's reading, whose answers depend on it.
    """
    was_training = model.training
    model.eval()
    order = list(range(len(rows)))
    if not in_file_order:
        order.sort(key=lambda i: len(rows[i].ids), reverse=True)
    predictions = [0] * len(rows)
    with tqdm(total=len(rows), desc=name, unit="row", leave=False, disable=None) as bar:
        for batch in batches(rows, batch_size, pad_id, order):
            log_probs = forward(model, batch.ids, batch.mask, dtype)
            if not torch.isfinite(log_probs).all():
                raise ValueError(f"{name}: the model's scores hold NaN or infinity in {dtype}; try --dtype fp32")
            for position, label in zip(batch.positions, log_probs.argmax(-1).tolist(), strict=True):
                predictions[position] = label
            bar.update(len(batch.positions))
    model.train(was_training)
    if not has_gold_labels(rows):
        return Evaluation(predictions, None, None)
    gold = [row.label for row in rows]
    macro_f1 = f1_score(gold, predictions, average="macro", zero_division=0)
    return Evaluation(predictions, float(accuracy_score(gold, predictions)), float(macro_f1))


def train(
    model: nn.Module,
    train_rows: Sequence[Row],
    dev_rows: Sequence[Row],
    settings: Settings,
    *,
    save_best: Callable[[int, Evaluation], None] = lambda epoch, evaluation: None,
    log: Callable[[str], None] = print,
) -> Evaluation:
    """Trains the parameters of `model` that require gradients, evaluates on dev after each epoch, and leaves the
    model as it was after the best one (ties go to the earlier epoch; without gold labels the last epoch counts as the
    best).

    save_best(epoch, evaluation) is called each time an epoch is the best so far. Returns the best evaluation on dev.
    Raises ValueError if the loss is NaN or infinite, naming step and learning rate.
    """
    generator = torch.Generator().manual_seed(settings.seed)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = AdamW(trained, lr=settings.lr)
    device = next(model.parameters()).device
    # fp16 gradients underflow without a scaled loss; bf16 has float32's range.
    scaler = torch.amp.GradScaler(device.type, enabled=settings.dtype == torch.float16)
    best: Evaluation | None = None
    best_weights: list[Tensor] = []

    for epoch in range(1, settings.epochs + 1):
        model.train()
        loss_sum, correct, seen = 0.0, 0, 0
        order = torch.randperm(len(train_rows), generator=generator).tolist()
        with tqdm(total=len(train_rows), desc=f"epoch {epoch}", unit="row", leave=False, disable=None) as bar:
            for batch in batches(train_rows, settings.batch_size, settings.pad_id, order):
                log_probs = forward(model, batch.ids, batch.mask, settings.dtype)
                labels = batch.labels.to(device)
                loss = F.nll_loss(log_probs, labels)  # the mean over the rows there are, in a short last batch too
                if not math.isfinite(loss.item()):
                    raise ValueError(
                        f"the loss is {loss.item()} in epoch {epoch}, row {seen}, at learning rate {settings.lr}; "
                        "try a lower --lr or --dtype fp32"
                    )
                optimizer.zero_grad(set_to_none=True)
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
                loss_sum += loss.item() * len(labels)
                correct += int((log_probs.argmax(-1) == labels).sum())
                seen += len(labels)
                bar.update(len(labels))
                bar.set_postfix(loss=f"{loss_sum / seen:.4f}", accuracy=f"{correct / seen:.3f}")

        dev = evaluate(
            model,
            dev_rows,
            settings.batch_size,
            pad_id=settings.pad_id,
            dtype=settings.dtype,
            in_file_order=settings.in_file_order,
            name=f"dev, epoch {epoch}",
        )
        is_best = best is None or best.accuracy is None or (dev.accuracy is not None and dev.accuracy > best.accuracy)
        log(
            f"epoch {epoch}: loss {loss_sum / len(train_rows):.4f}, "
            f"running train accuracy {correct / len(train_rows):.3f}, dev {describe(dev)}{' (best so far)' * is_best}"
        )
        if is_best:
            best, best_weights = dev, [p.detach().clone() for p in trained]
            save_best(epoch, dev)
    assert best is not None, "epochs is at least 1"
    with torch.no_grad():
        for parameter, weight in zip(trained, best_weights, strict=True):
            parameter.copy_(weight)
    model.eval()
    return best


def describe(evaluation: Evaluation) -> str:
    """The scores in words."""
    if evaluation.accuracy is None:
        return "has no gold labels (one value in the whole label column): no accuracy"
    return f"accuracy {evaluation.accuracy:.3f}, macro-F1 {evaluation.macro_f1:.3f}"
