"""The candidates of each generated token, kept and cut by the filters: a table for the terminal, and an HTML page."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from html import escape
from pathlib import Path

import torch
from torch import Tensor

from minillama.decoding.filters import Filter, distribution
from tokenizer import Tokenizer

STYLE = Path(__file__).with_name("explanation.css")
SHOWN = 8  # candidates shown for each token, both of those kept and of those cut
CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")  # not tab and newline


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
        repetition_penalty: float = 1.0,
    ) -> None:
        self.tokenizer, self.temperature, self.filters = tokenizer, temperature, filters
        self.repetition_penalty = repetition_penalty
        self.ids = list(prompt)
        self.prompt = tokenizer.decode(self.ids)
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
        context = self.ids[-8:]  # the text of a token depends on the tokens before it
        if token in self.tokenizer.stop_ids:
            text = "<end>"
        else:
            text = self.tokenizer.decode([*context, token])[len(self.tokenizer.decode(context)) :]
        if not text or "\ufffd" in text:  # a part of a character
            text = f"<{token}>"
        return Candidate(text, float(before[token]), float(after[token]))

    @property
    def settings(self) -> str:
        """Temperature, repetition penalty and filters in words."""
        penalty = [f"repetition penalty {self.repetition_penalty:g}"] if self.repetition_penalty != 1.0 else []
        filters = (
            f"{kept.func.__name__.removesuffix('_filter').replace('_', '-')} {value:g}"
            for kept in (self.filters if self.temperature > 0 else ())
            if isinstance(kept, partial)
            for value in kept.keywords.values()
        )
        return ", ".join((f"Temperature {self.temperature:g}", *penalty, *filters))

    def _pieces(self) -> Iterator[str]:
        """The text that each token added; a character of several tokens comes with the last one."""
        before = self.prompt
        start = len(self.ids) - len(self.steps)
        for end in range(start + 1, len(self.ids) + 1):
            text = self.tokenizer.decode(self.ids[:end])
            if not text.endswith("\ufffd") or end == len(self.ids):
                yield text[len(before) :]
                before = text

    def table(self) -> str:
        """A line for each token: its probability before and after, and some kept and cut candidates."""
        lines = [f"{'token':14} {'before':>7} {'after':>7}  kept | removed"]
        for step in self.steps:
            kept = ", ".join(f"{shown(one)} {one.before:.3f}" for one in step.kept[:4])
            cut = f"{step.cut_count:,} with {step.cut_mass:.3f}"
            likeliest = ", ".join(f"{shown(one)} {one.before:.3f}" for one in step.cut[:3])
            what = f"{shown(step.chosen):14} {step.chosen.before:7.3f} {step.chosen.after:7.3f}"
            lines.append(f"{what}  {step.kept_count:,}: {kept} | {f'{cut}: {likeliest}' if step.cut else 'none'}")
        return "\n".join(lines)

    def page(self) -> str:
        """A self-contained HTML page: a bar for each candidate, as long as its probability."""
        rows = "\n".join(
            f"<section><h2><code>{escape(shown(step.chosen))}</code> <small>{step.chosen.before:.3f} → "
            f"{step.chosen.after:.3f}</small></h2>\n<div class=sides><div><h3>kept: {step.kept_count:,}</h3>"
            f"{bars(step.kept, step.chosen)}</div><div class=cut><h3>cut: {step.cut_count:,}, with "
            f"{step.cut_mass:.3f} of the probability</h3>{bars(step.cut, None)}</div></div></section>"
            for step in self.steps
        )
        pieces = "".join(f"<span>{escape(without_controls(piece))}</span>" for piece in self._pieces())
        text = escape(without_controls(self.prompt)) + pieces
        return (
            f"<!doctype html>\n<html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
            f"<title>What each token was chosen from</title>\n<style>{STYLE.read_text(encoding='utf-8')}</style>\n"
            f"<h1>What each token was chosen from</h1>\n<p class=text>{text}</p>\n"
            f"<p>{escape(self.settings)}. Each bar is a candidate's probability: the pale one before the "
            f"filters, the dark one after them, rescaled to sum to 1. The {SHOWN} "
            f"likeliest of each side; the chosen one in bold.</p>\n{rows}\n</html>\n"
        )


def shown(candidate: Candidate) -> str:
    """The text of a token on one line, with visible spaces and unprintable characters as numbers."""
    text = candidate.text.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥")
    return "".join(one if one.isprintable() else by_number(one) for one in text)


def by_number(character: str) -> str:
    """A character written as its number, such as <0x1B>."""
    return f"<0x{ord(character):02X}>"


def without_controls(text: str) -> str:
    """A text with control characters and surrogates written as numbers."""
    return CONTROLS.sub(lambda found: by_number(found[0]), text)


def bars(candidates: Sequence[Candidate], chosen: Candidate | None) -> str:
    """A line with two bars for each candidate."""
    return "".join(
        f"<div class='line{' chosen' if one == chosen else ''}'><code>{escape(shown(one))}</code><i><b "
        f"style='width:{100 * one.before:.2f}%'></b><u style='width:{100 * one.after:.2f}%'></u></i>"
        f"<span>{one.before:.3f}</span></div>"
        for one in candidates
    )
