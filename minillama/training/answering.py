"""The task of answering prompts."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from minillama.layers.precision import autocast, to_device
from minillama.text.batches import shuffled_batches, spread
from minillama.text.examples import Example, pack, shared_rows
from minillama.training.distributed import Processes
from minillama.training.evaluation import answer_prompts, answer_scores, summed_loss
from minillama.training.task import Score
from tokenizer import Tokenizer


@dataclass
class Instruction:
    """Answering prompts, for a causal `Llama`. The loss is on the tokens of the answer and </s>, given the prompt.

    The score is the token F1 of greedy answers on dev, or the negative loss if answer_rows is 0. A batch packs several
    examples into each row. Attention stays inside an example, and rotary scores depend only on the distance of two
    tokens, so an example's loss is the same as in its own row.
    """

    examples: Sequence[Example]
    dev_examples: Sequence[Example]
    tokenizer: Tokenizer
    epochs: int
    batch_size: int
    window: int  # the most tokens in a row
    seed: int = 0
    max_new_tokens: int = 32  # of an answer
    answer_rows: int = 200  # rows of dev to answer, evenly spread; 0: none

    average = None
    pads = False  # a batch is packed
    unit = "token"
    judged_by: str = field(init=False)

    def __post_init__(self) -> None:
        self.judged_by = "dev F1" if self.answer_rows else "dev loss"

    @property
    def steps(self) -> int:
        return self.first_step(self.epochs + 1)

    def first_step(self, epoch: int) -> int:
        return (epoch - 1) * -(-len(self.examples) // self.batch_size)

    def name(self, epoch: int) -> str:
        return f"epoch {epoch}"

    def checksum(self) -> int:
        splits = [[(one.ids, one.prompt_length) for one in split] for split in (self.examples, self.dev_examples)]
        return zlib.crc32(repr(splits).encode())

    def plan(self, epoch: int) -> list[list[int]]:
        return shuffled_batches(self.examples, self.batch_size, self.seed, epoch, bucketed=False)

    def targets(self, positions: list[int]) -> int:
        return sum(self.examples[i].targets for i in positions)

    def tokens(self, positions: list[int]) -> int:
        return sum(len(self.examples[i].ids) - 1 for i in positions)

    def shape(self, positions: list[int]) -> tuple[int, int]:
        lengths = [len(self.examples[i].ids) - 1 for i in positions]
        rows = shared_rows(lengths, self.window)
        return len(rows), max(sum(lengths[i] for i in row) for row in rows)

    def losses(self, model: nn.Module, positions: list[int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return self._losses(model, [self.examples[i] for i in positions], dtype)

    def _losses(self, model: nn.Module, examples: list[Example], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        device = next(model.parameters()).device
        ids, targets, segments = (to_device(tensor, device) for tensor in pack(examples, self.window))
        same = segments[:, :, None] == segments[:, None, :]  # (rows, T, T): attention stays inside an example
        with autocast(device, dtype):
            (losses, hits), _ = model(ids, targets, same, losses=True)  # a target NO_TARGET has loss 0
        losses, right, segments = losses.flatten(), hits.flatten().long(), segments.flatten()
        shape = len(examples) + 1
        loss_sums = losses.new_zeros(shape).index_add(0, segments, losses)[1:]  # [0]: padding
        return loss_sums, right.new_zeros(shape).index_add(0, segments, right)[1:]

    @property
    def _judged(self) -> Sequence[Example]:
        """The examples of dev to answer."""
        return self.dev_examples[:: math.ceil(len(self.dev_examples) / self.answer_rows)] if self.answer_rows else ()

    def sample(self, rows: int) -> tuple[Instruction, float]:
        """Answers may be as long as the longest of dev: an untrained model does not stop, a trained one does."""
        some = spread(self.dev_examples, rows)
        longest = min(self.max_new_tokens, max(example.targets for example in self.dev_examples))
        answer_rows = len(some) if self.answer_rows else 0
        task = replace(self, dev_examples=some, answer_rows=answer_rows, max_new_tokens=longest)
        return task, len(self._judged or self.dev_examples) / len(some)

    @torch.no_grad()
    def score(
        self, model: nn.Module, dtype: torch.dtype, processes: Processes, check: Callable[[], None], name: str
    ) -> Score:
        """The loss on dev, and the exact match and token F1 of the model's answers."""
        model.eval()
        dev = self.dev_examples

        def losses(positions: list[int]) -> Tensor:
            return self._losses(model, [dev[i] for i in positions], dtype)[0]

        loss = summed_loss(len(dev), self.batch_size, processes, check, losses)
        nats = loss / sum(example.targets for example in dev)
        metrics: dict[str, float | None] = {"dev_loss": nats}
        text, quality = f"dev loss {nats:.4f}", -nats
        if self.answer_rows:
            judged = self._judged
            settings: dict[str, Any] = {"dtype": dtype, "processes": processes, "check": check, "name": f"dev, {name}"}
            limits = (self.batch_size, self.max_new_tokens)
            found = answer_scores(answer_prompts(model, judged, self.tokenizer, *limits, **settings), judged)
            metrics |= {f"dev_{name}": value for name, value in found.items()}
            quality = found["f1"]
            text += f", exact match {found['exact_match']:.3f}, F1 {found['f1']:.3f}"
        model.train()
        return Score(quality, text, metrics)
