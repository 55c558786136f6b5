"""The task of predicting each next token of a corpus."""

from __future__ import annotations

import itertools
import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from minillama.decoding import sampling
from minillama.layers.precision import autocast, to_device
from minillama.text.corpus import Corpus, Text, evenly, to_tensor
from minillama.training.compilation import writing
from minillama.training.distributed import Processes
from minillama.training.evaluation import summed_loss
from minillama.training.task import Score
from tokenizer import Tokenizer


def evaluations(steps: int, every: int, passes: int | None, pass_length: int, batch_size: int) -> dict[int, str]:
    """The names of a run's evaluations in the log, by the number of steps before them; the last is after `steps`.

    They lie `every` steps apart. With `passes` there is one at the end of each pass over the corpus instead, and others
    evenly between, at most `every` steps apart. pass_length: the windows of a pass.
    """
    if passes is None:
        return {end: f"step {end}" for end in (*range(every, steps, every), steps)}
    found, end = {}, 0
    for number in range(1, passes + 1):
        start, end = end, min(steps, -(-number * pass_length // batch_size))
        parts = -(-(end - start) // every)
        for part in range(1, parts):
            step = start + (end - start) * part // parts
            found[step] = f"epoch {number}, step {step}"
        found[end] = f"epoch {number}"  # of the last of several passes that end in the same step
    return found


@dataclass
class LanguageModelling:
    """Predicting each next token of a corpus, for a `Llama`; the score is bits per byte of the held-out documents.

    An epoch of the training loop is here the steps between two evaluations, see `evaluations`.
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
    passes: int | None = None  # over the corpus, each with an evaluation at its end

    average = None
    pads = False  # the windows have one length
    unit = "token"
    judged_by = "bits per byte"
    _length: int = field(init=False)
    _names: dict[int, str] = field(init=False)  # of the epochs, by the number of steps at their end
    _ends: list[int] = field(init=False)
    _prompt: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self._length = self.corpus.texts[0].train.length
        self._prompt = self.tokenizer.encode(self.sample_prompt, bos=True, eos=False)
        per_pass = (self.corpus.pass_length, self.batch_size)
        self._names = evaluations(self.steps, self.eval_every, self.passes, *per_pass)
        self._ends = list(self._names)

    @property
    def epochs(self) -> int:
        return len(self._ends)

    def first_step(self, epoch: int) -> int:
        return self._ends[epoch - 2] if epoch > 1 else 0

    def name(self, epoch: int) -> str:
        return self._names[self._ends[epoch - 1]]

    def checksum(self) -> int:
        return zlib.crc32(repr([(text.weight, text.checksum) for text in self.corpus.texts]).encode())

    def plan(self, epoch: int) -> list[list[int]]:
        steps = range(self.first_step(epoch), self.first_step(epoch + 1))
        return [self.corpus.batch(step, self.batch_size) for step in steps]

    def targets(self, positions: list[int]) -> int:
        return len(positions) * self._length

    tokens = targets

    def shape(self, positions: list[int]) -> tuple[int, int]:
        return len(positions), self._length

    def losses(self, model: nn.Module, positions: list[int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return self._losses(model, to_tensor([self.corpus.window(i) for i in positions]), dtype)

    def _losses(self, model: nn.Module, windows: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The losses of windows (B, length + 1), in which every token except the first is a target."""
        device = next(model.parameters()).device
        windows = to_device(windows, device)
        inputs, targets = windows[:, :-1], windows[:, 1:]
        with autocast(device, dtype):
            (losses, hits), _ = model(inputs, targets, losses=True)
        return losses.sum(-1), hits.sum(-1)

    def sample(self, rows: int) -> tuple[LanguageModelling, float]:
        return self, 1.0  # which reads at most `eval_windows` of each text anyway

    @torch.no_grad()
    def score(
        self, model: nn.Module, dtype: torch.dtype, processes: Processes, check: Callable[[], None], name: str
    ) -> Score:
        """Bits per byte and perplexity of each text's evenly spread held-out windows, and a sample."""
        model.eval()
        bits, perplexity = {}, {}
        judged = [text for text in self.corpus.texts if text.held_out_windows]
        for text in judged:
            nats = self._held_out_loss(model, text, dtype, processes, check)
            perplexity[text.name] = math.exp(min(nats, 700.0))
            bits[text.name] = nats / math.log(2) * text.held_out_tokens / text.held_out_bytes
        sample = self._sample(model, dtype, processes)
        model.train()
        if not judged:
            return Score(None, "no held-out documents, so no score", {}, sample)
        mean = sum(bits.values()) / len(bits)
        each = "; ".join(f"{name} {bits[name]:.3f} (perplexity {perplexity[name]:.1f})" for name in bits)
        metrics: dict[str, Any] = {"bits_per_byte": mean}
        metrics |= {f"bits_per_byte_{name}": value for name, value in bits.items()}
        return Score(-mean, f"held-out bits per byte {mean:.4f}: {each}", metrics, sample)

    def _held_out_loss(
        self, model: nn.Module, text: Text, dtype: torch.dtype, processes: Processes, check: Callable[[], None]
    ) -> float:
        """The mean loss per token, in nats, over evenly spread held-out windows of a text."""
        windows = to_tensor(evenly(text.held_out, self.eval_windows))

        def losses(positions: list[int]) -> Tensor:
            return self._losses(model, windows[positions], dtype)[0]

        return summed_loss(len(windows), self.batch_size, processes, check, losses) / (len(windows) * self._length)

    def _sample(self, model: nn.Module, dtype: torch.dtype, processes: Processes) -> str:
        device = next(model.parameters()).device
        prompt = torch.tensor([self._prompt], device=device)
        settings: dict[str, Any] = {"temperature": 0.8, "epsilon": 0.01, "tokenizer": self.tokenizer}
        settings["generator"] = torch.Generator(device).manual_seed(self.seed)
        with writing(model, dtype, sharded=processes.fsdp) as llama:
            ids = sampling.generate(llama, prompt, self.sample_tokens, **settings)
        new = itertools.takewhile(lambda i: i not in self.tokenizer.stop_ids, ids[0, len(self._prompt) :].tolist())
        return " ".join(self.tokenizer.decode([*self._prompt, *new]).split())
