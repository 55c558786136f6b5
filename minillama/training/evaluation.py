"""Predictions of a model, and their scores."""

from __future__ import annotations

import itertools
import math
import re
import string
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from minillama.decoding import sampling
from minillama.layers.precision import autocast, not_finite, sum_dtype, to_device
from minillama.text.batches import by_length, cut_in_batches, pad, to_batch
from minillama.text.examples import Example
from minillama.text.labelled import Row, has_gold_labels
from minillama.training.compilation import writing
from minillama.training.distributed import Processes
from tokenizer import Tokenizer


@dataclass(frozen=True)
class Evaluation:
    """Predicted class ids in the order of the rows, and the scores, which are None without gold labels.

    loss: the mean negative log-likelihood of the gold labels. confusion: a row of counts for each true class, with a
    column for each predicted class. probabilities: of each class, for every row.
    """

    predictions: list[int]
    accuracy: float | None
    macro_f1: float | None
    loss: float | None = None
    confusion: list[list[int]] | None = None
    probabilities: list[list[float]] = field(default_factory=list, repr=False)

    @property
    def balanced_accuracy(self) -> float | None:
        """The share of rows that are right in each class that has rows, averaged over these classes."""
        if self.confusion is None:
            return None
        shares = [counts[i] / sum(counts) for i, counts in enumerate(self.confusion) if sum(counts)]
        return sum(shares) / len(shares)

    def scores(self, split: str) -> dict[str, Any]:
        """The scores by their names in a run's metrics."""
        return {f"{split}_{name}": getattr(self, name) for name in ("accuracy", "macro_f1", "loss", "confusion")}


def forward(model: nn.Module, ids: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The model's log-probabilities (B, labels) for a batch, on the model's device. dtype: of the products."""
    device = next(model.parameters()).device
    mask = None if mask is None else to_device(mask, device)
    with autocast(device, dtype):
        return model(to_device(ids, device), mask)


def shared_batches(
    model: nn.Module,
    order: Sequence[int],
    batch_size: int,
    *,
    processes: Processes,
    check: Callable[[], None],
    name: str,
    divided: bool = True,
) -> Iterator[tuple[list[int], int]]:
    """Yields this process's part of each batch (see `Processes.share`), or without `divided` the whole batch.

    The model is in evaluation mode during the iteration. check() is called before each batch.
    """
    was_training = model.training
    model.eval()
    hidden = None if processes.is_main else True  # None: shown on a terminal
    with tqdm(total=len(order), desc=name, unit="row", leave=False, disable=hidden) as bar:
        for positions in cut_in_batches(order, batch_size):
            check()
            yield processes.share(positions) if divided else (positions, len(positions))
            bar.update(len(positions))
    model.train(was_training)


def _widest(x: Tensor) -> Tensor:
    """x in the dtype of long sums on its device."""
    return x.to(sum_dtype(x.device))


def summed_loss(
    count: int, batch_size: int, processes: Processes, check: Callable[[], None], losses: Callable[[list[int]], Tensor]
) -> float:
    """The summed loss of `count` rows, divided among the processes. losses(positions): the loss of each row (B,)."""
    total: float | Tensor = 0.0
    for positions in cut_in_batches(range(count), batch_size):
        check()
        mine, counted = processes.share(positions)
        total = total + _widest(losses(mine)[:counted].sum())  # on the device, which is read once
    return processes.sum(total)[0]


@torch.no_grad()
def class_log_probs(
    model: nn.Module,
    rows: Sequence[Row],
    batch_size: int,
    *,
    pad_id: int = 0,
    dtype: torch.dtype = torch.float32,
    bucketed: bool = True,
    processes: Processes | None = None,
    check: Callable[[], None] = lambda: None,
    name: str = "evaluating",
) -> Tensor:
    """The log-probability of each class for every row: (rows, classes), float64.

    bucketed: batch rows of similar length, which saves padding. Otherwise batches follow the order of the rows, on
    which predictions with pooling "last_column" depend. check() is called before each batch.
    """
    processes = processes or Processes()
    order = by_length(rows) if bucketed else range(len(rows))
    found: dict[int, list[float]] = {}
    finite = True
    for mine, counted in shared_batches(model, order, batch_size, processes=processes, check=check, name=name):
        batch = to_batch(rows, mine, pad_id)
        log_probs = forward(model, batch.ids, batch.mask, dtype)
        values = log_probs.tolist()
        finite = finite and all(map(math.isfinite, itertools.chain.from_iterable(values)))
        found.update(zip(mine[:counted], values[:counted], strict=True))
    if not all(processes.gather(finite)):
        raise not_finite(f"{name}: the model's scores", dtype)
    for part in processes.gather(found):
        found.update(part)
    return torch.tensor([found[i] for i in range(len(rows))], dtype=torch.float64)


def evaluate(model: nn.Module, rows: Sequence[Row], batch_size: int, **settings: Any) -> Evaluation:
    """Predicts the class with the highest log-probability for every row, and scores the predictions.

    settings: those of `class_log_probs`. Macro-F1 is the mean over all classes of the model. A class without rows or
    without predictions counts as 0.
    """
    log_probs = class_log_probs(model, rows, batch_size, **settings)
    predictions, classes = log_probs.argmax(-1).tolist(), list(range(log_probs.shape[-1]))
    probabilities = log_probs.softmax(-1).tolist()  # the words of a prompt do not sum to 1
    if not has_gold_labels(rows):
        return Evaluation(predictions, None, None, probabilities=probabilities)
    from sklearn.metrics import accuracy_score, confusion_matrix, f1_score  # the import takes a second

    gold = [row.label for row in rows]
    macro_f1 = f1_score(gold, predictions, labels=classes, average="macro", zero_division=0)
    loss = F.nll_loss(log_probs, torch.tensor(gold))
    confusion = confusion_matrix(gold, predictions, labels=classes).tolist()
    accuracy = float(accuracy_score(gold, predictions))
    return Evaluation(predictions, accuracy, float(macro_f1), float(loss), confusion, probabilities)


@torch.no_grad()
def answer_prompts(
    model: nn.Module,
    examples: Sequence[Example],
    tokenizer: Tokenizer,
    batch_size: int,
    max_new_tokens: int,
    *,
    dtype: torch.dtype = torch.float32,
    processes: Processes | None = None,
    check: Callable[[], None] = lambda: None,
    name: str = "answering",
) -> list[str]:
    """Greedy answers to all prompts, up to an end token or max_new_tokens. check() is called before each batch."""
    processes = processes or Processes()
    device = next(model.parameters()).device
    order = sorted(range(len(examples)), key=lambda i: examples[i].prompt_length, reverse=True)
    divided = not processes.fsdp  # a pass of a sharded model needs all processes, so each answers all prompts
    found: dict[int, str] = {}
    for mine, counted in shared_batches(
        model, order, batch_size, processes=processes, check=check, name=name, divided=divided
    ):
        ids, mask = pad([examples[i].prompt_ids for i in mine], tokenizer.pad_id, "left")
        settings: dict[str, Any] = {"temperature": 0.0, "tokenizer": tokenizer}
        mask = None if mask is None else mask.to(device)
        with writing(model, dtype, sharded=processes.fsdp) as llama:
            made = sampling.generate(llama, ids.to(device), max_new_tokens, attention_mask=mask, **settings)
        for i, row in zip(mine[:counted], made[:counted, ids.shape[1] :].tolist(), strict=True):
            answer = itertools.takewhile(lambda token: token not in tokenizer.stop_ids, row)
            found[i] = tokenizer.decode(list(answer)).strip()
    for part in processes.gather(found):
        found.update(part)
    return [found[i] for i in range(len(examples))]


def normalised(answer: str) -> list[str]:
    """The words of an answer in SQuAD's comparison (arXiv 1606.05250): lower case, no punctuation, no articles."""
    plain = "".join(letter for letter in answer.lower() if letter not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", plain).split()


def exact_match(predicted: str, gold: str) -> float:
    """1 if the normalised answers are the same, else 0."""
    return float(normalised(predicted) == normalised(gold))


def token_f1(predicted: str, gold: str) -> float:
    """F1 of the normalised words; 1 for two answers without words, as in SQuAD 2.0 (arXiv 1806.03822)."""
    ours, theirs = Counter(normalised(predicted)), Counter(normalised(gold))
    if not ours or not theirs:
        return float(ours == theirs)
    return 2 * (ours & theirs).total() / (ours.total() + theirs.total())


def answer_scores(answers: Sequence[str], examples: Sequence[Example]) -> dict[str, float]:
    """The mean exact match and token F1."""
    pairs = [(answer, example.answer) for answer, example in zip(answers, examples, strict=True)]
    return {
        "exact_match": sum(exact_match(*pair) for pair in pairs) / len(pairs),
        "f1": sum(token_f1(*pair) for pair in pairs) / len(pairs),
    }


def describe_answers(answers: Sequence[str], examples: Sequence[Example]) -> str:
    """The scores in words."""
    found = answer_scores(answers, examples)
    return f"exact match {found['exact_match']:.3f}, F1 {found['f1']:.3f}"


@torch.no_grad()
def score_documents(
    model: Callable[..., tuple[Tensor, Tensor]],
    documents: Sequence[Sequence[int]],
    window: int,
    stride: int,
    dtype: torch.dtype = torch.float32,
    tokens_at_once: int = 8192,
    device: torch.device | None = None,
) -> tuple[float, int]:
    """The summed loss of a causal language model on documents (lists of ids), in nats, and the number of scored tokens.

    The first token of each document, which may be <s>, is not scored. A document longer than `window` is read in
    windows that start `stride` tokens apart. Each window scores the tokens after the end of the one before, with at
    least window - stride tokens of context.
    """
    device = device or torch.device("cpu")
    windows: list[tuple[Sequence[int], int]] = []  # (ids, how many of the last ones are scored)
    for ids in documents:
        done, start = 1, 0
        while done < len(ids):
            end = min(len(ids), start + window + 1)
            windows.append((ids[start:end], end - done))
            done, start = end, start + stride
    windows.sort(key=lambda one: len(one[0]), reverse=True)
    nats = torch.zeros((), dtype=torch.float64)
    total = sum(scored for _, scored in windows)
    with tqdm(total=total, desc="scoring", unit="token", leave=False, disable=None) as bar:
        while windows:
            some = windows[: max(1, tokens_at_once // len(windows[0][0]))]
            del windows[: len(some)]
            batch, _ = pad([one for one, _ in some], 0)
            targets = batch[:, 1:].clone()
            for row, (one, scored) in enumerate(some):
                targets[row, : len(one) - 1 - scored] = -100
                targets[row, len(one) - 1 :] = -100  # padding
            with autocast(device, dtype):
                logits, _ = model(batch[:, :-1].to(device), targets)
            nats += F.cross_entropy(logits.float().flatten(0, 1), targets.to(device).flatten(), reduction="sum").cpu()
            bar.update(sum(scored for _, scored in some))
    if not torch.isfinite(nats):
        raise not_finite("the model's scores", dtype)
    return float(nats), total


def describe(evaluation: Evaluation, with_loss: bool = False) -> str:
    """The scores in words. with_loss: include the loss, for log-probabilities normalised over the labels."""
    if evaluation.accuracy is None:
        return "has no gold labels (one value in the whole label column): no accuracy"
    loss = f", loss {evaluation.loss:.4f}" if with_loss and evaluation.loss is not None else ""
    return f"accuracy {evaluation.accuracy:.3f}, macro-F1 {evaluation.macro_f1:.3f}{loss}"


def wilson_interval(right: int, count: int) -> tuple[float, float]:
    """The 95 % confidence interval of an accuracy of right / count: Wilson's score interval."""
    from scipy.stats import binomtest  # a dependency of scikit-learn; slow to import

    interval = binomtest(right, count).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


def intervals(
    evaluation: Evaluation, rows: Sequence[Row], seed: int, draws: int = 1000
) -> dict[str, tuple[float, float]]:
    """95 % confidence intervals: of accuracy by Wilson's formula, of macro-F1 by the bootstrap over rows (percentiles).

    Needs gold labels.
    """
    import numpy as np

    gold, predicted = np.array([row.label for row in rows]), np.array(evaluation.predictions)
    classes = len(evaluation.confusion or [])
    generator = np.random.default_rng(seed)
    found = []
    for _ in range(draws):
        drawn = generator.integers(len(gold), size=len(gold))
        counts = np.bincount(gold[drawn] * classes + predicted[drawn], minlength=classes**2).reshape(classes, classes)
        found.append(float(np.mean(2 * counts.diagonal() / np.maximum(1, counts.sum(0) + counts.sum(1)))))
    low, high = np.percentile(found, (2.5, 97.5))
    right = int((gold == predicted).sum())
    return {"accuracy": wilson_interval(right, len(gold)), "macro_f1": (float(low), float(high))}


def commonest_class(rows: Sequence[Row]) -> tuple[int, float]:
    """The most frequent gold class (of equal ones the smallest id), and its share of the rows."""
    counts = Counter(row.label for row in rows)
    label = min(counts, key=lambda label: (-counts[label], label))
    return label, counts[label] / len(rows)


def describe_chance(evaluation: Evaluation, rows: Sequence[Row], label_names: Sequence[str]) -> str:
    """The accuracy's confidence interval, and those of chance and of the commonest class; "" without gold labels."""
    if evaluation.accuracy is None:
        return ""
    low, high = wilson_interval(round(evaluation.accuracy * len(rows)), len(rows))
    label, share = commonest_class(rows)
    chance = f"chance {1 / len(label_names):.3f}, commonest class {share:.3f} ({label_names[label]})"
    return f"95 % interval {low:.3f} to {high:.3f}, {chance}"


def describe_classes(evaluation: Evaluation, rows: Sequence[Row], label_names: Sequence[str]) -> str:
    """scikit-learn's report of each class, and the confusion matrix; "" without gold labels."""
    from sklearn.metrics import classification_report

    if evaluation.confusion is None:
        return ""
    text = classification_report(
        [row.label for row in rows],
        evaluation.predictions,
        labels=list(range(len(label_names))),
        target_names=list(label_names),
        digits=3,
        zero_division=0,
    )
    lines = [text, "confusion matrix (a line for each true class, a column for each predicted one)"]
    width = len(str(max(map(max, evaluation.confusion))))
    for name, counts in zip(label_names, evaluation.confusion, strict=True):
        lines.append("  ".join(f"{n:>{width}}" for n in counts) + f"   {name}")
    return "\n".join(lines)
