"""What a training run learns: from what batches, with what loss, and how it is judged. The loop knows no more of it."""

from __future__ import annotations

import itertools
import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import generation
from corpus import Corpus, evenly, to_tensor
from dataset import Row, cut_in_batches, shuffled_batches, to_batch
from distributed import Processes
from evaluation import answer_prompts, answer_scores, describe, describe_answers, evaluate, forward, precision
from instruction_data import NO_TARGET, Example, pack
from smart import MovingAverage, Smart, random_state, replayed, symmetric_kl
from tokenizer import Tokenizer


@dataclass(frozen=True)
class Score:
    """How good a model is: `quality` is to be as large as possible, None where there is nothing to judge by."""

    quality: float | None
    text: str
    metrics: dict[str, float | None]
    remark: str = ""  # what follows in the log


class Task(Protocol):
    """What the training loop needs to know. A position is the number of a training row; a target is what the loss is a
    mean over.
    """

    unit: str  # of targets, for the progress bar
    judged_by: str
    batch_size: int

    @property
    def epochs(self) -> int:
        """How often the loop goes through a plan, and has the model scored."""

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""

    @property
    def average(self) -> MovingAverage | None:
        """Of the weights, where the losses ask for one; the loop keeps it up to date and saves it."""

    def checksum(self) -> int:
        """Of all the data: a run goes on only with the same."""

    def plan(self, epoch: int) -> list[list[int]]:
        """The batches of an epoch; a function of seed and epoch."""

    def targets(self, positions: list[int]) -> int:
        """How many targets these rows have."""

    def tokens(self, positions: list[int]) -> int:
        """How many tokens these rows have."""

    def losses(self, model: nn.Module, positions: list[int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The summed loss of each row (B,), and how many of its targets the model would have guessed (B,)."""

    def score(
        self, model: nn.Module, dtype: torch.dtype, processes: Processes, check: Callable[[], None], name: str
    ) -> Score:
        """Judges the model. Every process calls this, and check() now and then."""


def row_losses(log_probs: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    """Cross-entropy of each row (B,), its target smoothed: 1 - smoothing on the label, and smoothing spread evenly over
    all classes (arXiv 1512.00567, section 7).
    """
    losses = F.nll_loss(log_probs, labels, reduction="none")
    return losses if smoothing == 0 else (1 - smoothing) * losses - smoothing * log_probs.mean(-1)


@dataclass
class Classification:
    """Rows with labels, for any model that maps (ids, mask) to log-probabilities; judged by accuracy on dev."""

    rows: Sequence[Row]
    dev_rows: Sequence[Row]
    epochs: int
    batch_size: int
    seed: int
    pad_id: int = 0
    bucketed: bool = True  # rows of like length share a batch; else random batches, and evaluation in file order
    label_smoothing: float = 0.0
    evaluate_train: bool = False  # score the whole training set after each epoch
    smart: Smart | None = None
    average: MovingAverage | None = None  # the Bregman penalty's
    r_drop: float = 0.0  # how much the divergence of two passes, under dropout, counts (arXiv 2106.14448)

    unit = "row"
    judged_by = "dev accuracy"

    @property
    def steps(self) -> int:
        return self.epochs * -(-len(self.rows) // self.batch_size)

    def checksum(self) -> int:
        rows = [[(row.label, row.ids) for row in split] for split in (self.rows, self.dev_rows)]
        return zlib.crc32(repr(rows).encode())

    def plan(self, epoch: int) -> list[list[int]]:
        return shuffled_batches(self.rows, self.batch_size, self.seed, epoch, self.bucketed)

    def targets(self, positions: list[int]) -> int:
        return len(positions)

    def tokens(self, positions: list[int]) -> int:
        return sum(len(self.rows[i].ids) for i in positions)

    def losses(self, model: nn.Module, positions: list[int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        batch = to_batch(self.rows, positions, self.pad_id)
        device = next(model.parameters()).device
        compared = self.smart is not None or self.average is not None
        before = random_state(device) if compared else []
        log_probs = forward(model, batch.ids, batch.mask, dtype)
        labels = batch.labels.to(log_probs.device)
        losses, right = row_losses(log_probs, labels, self.label_smoothing), log_probs.argmax(-1) == labels
        bare: nn.Module = getattr(model, "module", model)  # DDP counts its own passes, and is to see one a step
        if self.r_drop:
            second = forward(bare, batch.ids, batch.mask, dtype)
            losses = losses + row_losses(second, labels, self.label_smoothing)
            losses = losses + self.r_drop / 2 * symmetric_kl(log_probs, second)

        def again(model: nn.Module = bare, dtype: torch.dtype = torch.float32) -> Tensor:
            """Another pass, under the dropout of the first."""
            with replayed(before, device):
                return forward(model, batch.ids, batch.mask, dtype)

        if self.average is not None:
            losses = losses + self.average.penalty(bare, lambda average: again(average, dtype), log_probs)
        if self.smart is not None:
            clean = log_probs if dtype == torch.float32 else again()
            losses = losses + self.smart.penalty(bare, batch.ids.shape, again, clean)
        return losses, right

    def score(
        self, model: nn.Module, dtype: torch.dtype, processes: Processes, check: Callable[[], None], name: str
    ) -> Score:
        splits = {"train": self.rows} if self.evaluate_train else {}
        found = {
            split: evaluate(
                model,
                rows,
                self.batch_size,
                pad_id=self.pad_id,
                dtype=dtype,
                bucketed=self.bucketed,
                processes=processes,
                check=check,
                name=f"{split}, {name}",
            )
            for split, rows in (splits | {"dev": self.dev_rows}).items()
        }
        metrics: dict[str, float | None] = {f"{split}_accuracy": one.accuracy for split, one in found.items()}
        metrics |= {f"{split}_macro_f1": one.macro_f1 for split, one in found.items()}
        metrics["dev_loss"] = found["dev"].loss  # "train_loss" is the epoch's running mean, under dropout
        text = ", ".join(f"{split} {describe(one, with_loss=True)}" for split, one in found.items())
        return Score(found["dev"].accuracy, text, metrics)


@dataclass
class LanguageModelling:
    """Predicting each next token of a corpus, for a `Llama`; judged by bits per byte of the held-out documents.

    An epoch here is `eval_every` steps: the passes over the corpus follow one another without a seam.
    """

    corpus: Corpus
    tokenizer: Tokenizer
    steps: int
    batch_size: int
    eval_every: int
    eval_windows: int = 64  # of each text
    sample_prompt: str = "Once upon a time"
    sample_tokens: int = 60
    seed: int = 0

    average = None
    unit = "token"
    judged_by = "bits per byte"
    _length: int = field(init=False)
    _prompt: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self._length = self.corpus.texts[0].train.length
        self._prompt = self.tokenizer.encode(self.sample_prompt, bos=True, eos=False)

    @property
    def epochs(self) -> int:
        return math.ceil(self.steps / self.eval_every)

    def checksum(self) -> int:
        return zlib.crc32(repr([(text.weight, text.checksum) for text in self.corpus.texts]).encode())

    def plan(self, epoch: int) -> list[list[int]]:
        steps = range((epoch - 1) * self.eval_every, min(epoch * self.eval_every, self.steps))
        return [self.corpus.batch(step, self.batch_size) for step in steps]

    def targets(self, positions: list[int]) -> int:
        return len(positions) * self._length

    tokens = targets

    def losses(self, model: nn.Module, positions: list[int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return self._losses(model, to_tensor([self.corpus.window(i) for i in positions]), dtype)

    def _losses(self, model: nn.Module, windows: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Of windows (B, length + 1): every token but the first is a target."""
        device = next(model.parameters()).device
        inputs, targets = windows[:, :-1].to(device), windows[:, 1:].to(device)
        with precision(device, dtype):
            logits, _ = model(inputs, targets)
        losses = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")
        return losses.view(targets.shape).sum(-1), (logits.argmax(-1) == targets).sum(-1)

    @torch.no_grad()
    def score(
        self, model: nn.Module, dtype: torch.dtype, processes: Processes, check: Callable[[], None], name: str
    ) -> Score:
        """Bits per byte and perplexity of evenly spread held-out windows, each text's by itself and their mean; and a
        sample of what the model writes.
        """
        model.eval()
        bits, perplexity = {}, {}
        judged = [text for text in self.corpus.texts if text.held_out_windows]
        for text in judged:
            windows = to_tensor(evenly(text.held_out, self.eval_windows))
            loss = 0.0
            for start in range(0, len(windows), self.batch_size):
                check()
                for mine, counted in processes.share(list(range(start, min(start + self.batch_size, len(windows))))):
                    losses, _ = self._losses(model, windows[mine], dtype)
                    loss += float(losses[:counted].sum())
            nats = processes.sum(loss)[0] / (len(windows) * self._length)
            perplexity[text.name] = math.exp(min(nats, 700.0))
            bits[text.name] = nats / math.log(2) * text.held_out_tokens / text.held_out_bytes
        sample = self._sample(model, dtype)
        model.train()
        if not judged:
            return Score(None, "nothing held out to judge by", {}, f"\n    {sample}")
        mean = sum(bits.values()) / len(bits)
        each = "; ".join(f"{name} {bits[name]:.3f} (perplexity {perplexity[name]:.1f})" for name in bits)
        metrics: dict[str, Any] = {"bits_per_byte": mean}
        metrics |= {f"bits_per_byte_{name}": value for name, value in bits.items()}
        return Score(-mean, f"held-out bits per byte {mean:.4f}: {each}", metrics, f"\n    {sample}")

    def _sample(self, model: nn.Module, dtype: torch.dtype) -> str:
        llama: Any = getattr(model, "module", model)  # as it is without DDP around it
        device = next(llama.parameters()).device
        prompt = torch.tensor([self._prompt], device=device)
        with precision(device, dtype):
            ids = generation.generate(
                llama,
                prompt,
                self.sample_tokens,
                temperature=0.8,
                epsilon=0.01,
                eos_ids=self.tokenizer.stop_ids,
                banned_ids=self.tokenizer.unused_ids,
                generator=torch.Generator(device).manual_seed(self.seed),
            )
        new = itertools.takewhile(lambda i: i not in self.tokenizer.stop_ids, ids[0, len(self._prompt) :].tolist())
        return " ".join(self.tokenizer.decode([*self._prompt, *new]).split())


@dataclass
class Instruction:
    """Answering prompts, for a causal `Llama`: the loss is on the answer's tokens and the end mark, given the prompt.
    Judged by the token F1 of greedy answers on dev, or, where none are to be made, by the loss.

    A batch is so many examples, whichever rows they are packed into: attention stays inside each, and rotary scores
    depend on the distance of two tokens only, so an example counts in a row of several as it does alone.
    """

    examples: Sequence[Example]
    dev_examples: Sequence[Example]
    tokenizer: Tokenizer
    epochs: int
    batch_size: int
    window: int  # tokens of a row at most
    seed: int = 0
    max_new_tokens: int = 32  # of an answer
    answer_rows: int = 200  # of dev, evenly spread, to be answered; 0: none

    average = None
    unit = "token"
    judged_by: str = field(init=False)

    def __post_init__(self) -> None:
        self.judged_by = "dev F1" if self.answer_rows else "dev loss"

    @property
    def steps(self) -> int:
        return self.epochs * -(-len(self.examples) // self.batch_size)

    def checksum(self) -> int:
        both = [[(one.ids, one.prompt_length) for one in split] for split in (self.examples, self.dev_examples)]
        return zlib.crc32(repr(both).encode())

    def plan(self, epoch: int) -> list[list[int]]:
        return shuffled_batches(self.examples, self.batch_size, self.seed, epoch, bucketed=False)

    def targets(self, positions: list[int]) -> int:
        return sum(self.examples[i].targets for i in positions)

    def tokens(self, positions: list[int]) -> int:
        return sum(len(self.examples[i].ids) - 1 for i in positions)

    def losses(self, model: nn.Module, positions: list[int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return self._losses(model, [self.examples[i] for i in positions], dtype)

    def _losses(self, model: nn.Module, examples: list[Example], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        device = next(model.parameters()).device
        ids, targets, segments = (tensor.to(device) for tensor in pack(examples, self.window))
        same = segments[:, :, None] == segments[:, None, :]  # (rows, T, T): attention stays inside an example
        with precision(device, dtype):
            logits, _ = model(ids, targets, same)
        losses = F.cross_entropy(
            logits.float().flatten(0, 1), targets.flatten(), ignore_index=NO_TARGET, reduction="none"
        )
        right = (logits.argmax(-1) == targets).flatten().long()  # no token is NO_TARGET
        sums = [
            each.new_zeros(len(examples) + 1).index_add(0, segments.flatten(), each)[1:] for each in (losses, right)
        ]
        return sums[0], sums[1]

    @torch.no_grad()
    def score(
        self, model: nn.Module, dtype: torch.dtype, processes: Processes, check: Callable[[], None], name: str
    ) -> Score:
        """The loss on the answers of dev, and exact match and token F1 of what the model answers itself."""
        model.eval()
        dev, loss = self.dev_examples, 0.0
        for positions in cut_in_batches(range(len(dev)), self.batch_size):
            check()
            for mine, counted in processes.share(positions):
                losses, _ = self._losses(model, [dev[i] for i in mine], dtype)
                loss += float(losses[:counted].sum())
        nats = processes.sum(loss)[0] / sum(example.targets for example in dev)
        metrics: dict[str, float | None] = {"dev_loss": nats}
        text, quality = f"dev loss {nats:.4f}", -nats
        if self.answer_rows:
            judged = dev[:: math.ceil(len(dev) / self.answer_rows)]
            answers = answer_prompts(
                model,
                judged,
                self.tokenizer,
                self.batch_size,
                self.max_new_tokens,
                dtype=dtype,
                processes=processes,
                check=check,
                name=f"dev, {name}",
            )
            found = answer_scores(answers, judged)
            metrics |= {f"dev_{name}": value for name, value in found.items()}
            quality = found["f1"]
            text += f", {describe_answers(answers, judged)}"
        model.train()
        return Score(quality, text, metrics)
