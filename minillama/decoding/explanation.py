"""The candidates of each generated token, kept and cut by the filters, as a table for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minillama.decoding.filters import Filter, distribution
from minillama.text.token_texts import token_text
from tokenizer import Tokenizer

SHOWN = 8  # candidates shown for each token, both of those kept and of those cut


@dataclass(frozen=True)
class Candidate:
    """A possible token, with its probability before and after the filters."""

    text: str
    before: float
    after: float


@dataclass(frozen=True)
class Step:
    """One step: the chosen token, the most probable kept and cut tokens, and how many were kept and cut in all."""

    chosen: Candidate
    kept: list[Candidate]
    cut: list[Candidate]
    kept_count: int
    cut_count: int
    cut_mass: float  # total probability, before the filters, of the cut tokens


class Explanation:
    """A record of the steps of `sampling.stream`; its `watch` argument is this `watch`.

    At temperature 0 all tokens except the arg-max are cut, and probabilities are those at temperature 1.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: Sequence[int],
        temperature: float,
        filters: Sequence[Filter],
    ) -> None:
        self.tokenizer, self.temperature, self.filters = tokenizer, temperature, filters
        self.ids = list(prompt)
        self.steps: list[Step] = []

    def watch(self, logits: Tensor, chosen: Tensor) -> None:
        """Records a step: logits (1, V), chosen (1,)."""
        before = distribution(logits, self.temperature or 1.0, ())[0]
        if self.temperature > 0:
            after = distribution(logits, self.temperature, self.filters)[0]
        else:
            after = torch.zeros_like(before).index_fill(0, chosen, 1.0)
        cut = (after == 0) & (before > 0)
        self.steps.append(
            Step(
                self._candidate(int(chosen), before, after),
                self._most_probable(before * ~cut, before, after, int(chosen)),
                self._most_probable(before * cut, before, after),
                int((after > 0).sum()),
                int(cut.sum()),
                float(before[cut].sum()),
            )
        )
        self.ids.append(int(chosen))

    def _most_probable(
        self, among: Tensor, before: Tensor, after: Tensor, chosen: int | None = None
    ) -> list[Candidate]:
        """The most probable tokens, and at the end the chosen one if it is not among them."""
        best = among.topk(min(SHOWN, len(among))).indices.tolist()
        best += [chosen] if chosen is not None and chosen not in best else []
        return [self._candidate(token, before, after) for token in best if among[token] > 0]

    def _candidate(self, token: int, before: Tensor, after: Tensor) -> Candidate:
        text = token_text(self.tokenizer, token, self.ids[-8:])  # which depends on the tokens before it
        return Candidate(text, float(before[token]), float(after[token]))

    def table(self) -> str:
        """A line for each token: its probability before and after, and some kept and cut candidates."""
        lines = [f"{'token':14} {'before':>7} {'after':>7}  kept | removed"]
        for step in self.steps:
            kept = ", ".join(f"{one.text} {one.before:.3f}" for one in step.kept[:4])
            cut = f"{step.cut_count:,} with {step.cut_mass:.3f}"
            likeliest = ", ".join(f"{one.text} {one.before:.3f}" for one in step.cut[:3])
            what = f"{step.chosen.text:14} {step.chosen.before:7.3f} {step.chosen.after:7.3f}"
            lines.append(f"{what}  {step.kept_count:,}: {kept} | {f'{cut}: {likeliest}' if step.cut else 'none'}")
        return "\n".join(lines)
