"""The lines of a plan (see plan.py)."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

SHOWN = 3  # pairs of rows
WIDTH = 110


def plan_lines(plan: Mapping[str, Any]) -> Iterator[str]:
    """The plan as text."""
    data = plan["data"]
    if "texts" in data:
        yield from corpus_lines(data)
    for split in ("train", "dev", "test"):
        if split in data:
            yield from split_lines(split, data[split], "answer" if plan["option"] == "sft" else "label")
    for row in data.get("sample", ()):
        yield ""
        yield from shown(f"line {row['row']} ({row['label']}): {row['text']}", 2)
        yield from shown(f"{len(row['tokens'])} tokens: {' '.join(row['tokens'])}", 4)
    yield ""
    yield from memory_lines(plan["memory"])
    if plan["time"] is not None:
        yield from time_lines(plan["time"])
    if plan["bar"] is not None:
        yield from bar_lines(plan["bar"], data["dev"]["rows"])


def shown(text: str, indent: int) -> list[str]:
    """A text of any length, in at most three lines."""
    space = " " * indent
    return textwrap.wrap(
        text, WIDTH, initial_indent=space, subsequent_indent=space + "  ", max_lines=3, placeholder=" ..."
    ) or [space]


def split_lines(split: str, facts: Mapping[str, Any], label: str) -> Iterator[str]:
    """The lines of a split. label: what a row has beside its text."""
    rows = facts["rows"]
    yield f"{split:12}{facts['path']}: {counted(rows, 'row')}"
    if facts.get("placeholder_labels"):
        yield "  labels    one value in the whole column: placeholders, so there is no accuracy"
    elif "classes" in facts:
        shares = ", ".join(f"{name} {n:,} ({n / rows:.1%})" for name, n in facts["classes"].items())
        yield f"  classes   {shares}"
    quantiles = ", ".join(f"{name} {value:g}" for name, value in facts["tokens"].items())
    yield f"  tokens    {quantiles}"
    longer = ", ".join(f"{limit}: {n:,}" for limit, n in facts["longer_than"].items())
    yield f"  longer    than {longer}"
    if cut := facts.get("cut"):
        limits = {"the context of": cut["context"], "--max_sentence_len": cut["max_sentence_len"]}
        named = " and ".join(f"{name} {value}" for name, value in limits.items() if value is not None)
        yield f"  cut       {counted(cut['rows'], 'row')}" + f" ({named})" * bool(named)
    if repeats := facts.get("repeats"):
        yield from pair_lines("repeated", repeats, "an earlier row", label)
    if leaks := facts.get("in_train"):
        yield from pair_lines("in train", leaks, "a row of train", label)
    groups = facts["contradictions"]
    if groups:
        some = "; ".join(f"lines {', '.join(map(str, rows[:5]))}" for rows in groups[:SHOWN])
        more = "; ..." * (len(groups) > SHOWN)
        yield f"  {label}s{' ' * (9 - len(label))}{counted(len(groups), 'text')} with several {label}s: {some}{more}"


def pair_lines(name: str, pairs: Mapping[str, Any], of_what: str, label: str) -> Iterator[str]:
    exact, near = len(pairs["exact"]), len(pairs["near"])
    if not exact + near:
        yield f"  {name:10}none"
        return
    other = f", {pairs['other_label']:,} of them with another {label}" if pairs["other_label"] else ""
    yield f"  {name:10}{counted(exact + near, 'row')} like {of_what}: {exact:,} exact, {near:,} near{other}"
    for kind in ("exact", "near"):
        if pairs[kind]:
            some = ", ".join(f"line {row} like {earlier}" for row, earlier in pairs[kind][:SHOWN])
            yield f"            {kind}: {some}{', ...' * (len(pairs[kind]) > SHOWN)}"


def corpus_lines(data: Mapping[str, Any]) -> Iterator[str]:
    for name, text in data["texts"].items():
        yield (
            f"{name:12}{counted(text['documents'], 'document')}, {text['tokens']:,} tokens to train on, "
            f"{counted(text['windows'], 'window')}, weight {text['weight']:g}"
        )
        yield (
            f"  held out  {counted(text['held_out_documents'], 'document')}, {text['held_out_tokens']:,} tokens, "
            f"{counted(text['held_out_windows'], 'window')}"
        )
    yield f"passes      {data['passes']:g} over {data['windows_of_a_pass']:,} windows of {data['window']} tokens"


def memory_lines(memory: Mapping[str, Any]) -> Iterator[str]:
    names = ("program", "weights", "gradients", "moments", "activations", "later")
    parts = {name: memory[name] for name in names if memory[name] is not None}
    peak, limit = memory["peak"], memory["limit"]
    if peak is None:
        yield "memory      unknown: this system does not say how much a process has"
    else:
        room = "" if limit is None else f" of {size(limit)} that are free"
        how = "measured by a step with" if memory["fits"] else "estimated for"
        piece = f"{counted(memory['rows'], 'row')}, {memory['tokens']:,} tokens"
        yield f"memory      peak {size(peak)}{room}; {how} the largest piece of a batch: {piece}"
    yield f"            {', '.join(f'{name} {size(value)}' for name, value in parts.items())}"
    if memory["fits"] and memory["estimate"] is not None:
        yield f"            a step, estimated from fewer rows: {size(memory['estimate'])}"
    if memory["fitting_rows"]:
        yield f"            {counted(memory['fitting_rows'], 'row')} at once fit"


def time_lines(found: Mapping[str, Any]) -> Iterator[str]:
    yield (
        f"time        {duration(found['total'])} in all, from {found['measured_steps']} measured steps: start "
        f"{duration(found['start'])}, training {duration(found['training'])}, predictions "
        f"{duration(found['predictions'])}"
    )
    yield (
        f"            {counted(found['steps'], 'step')} of {found['step']:.3g} s, "
        f"{counted(found['evaluations'], 'evaluation')} of {found['evaluation']:.3g} s, "
        f"{counted(found['saves'], 'save')} of {found['save']:.2g} s"
    )


def bar_lines(bar: Mapping[str, Any], rows: int) -> Iterator[str]:
    common, words = bar["commonest"], bar.get("counting_words")
    line = f"bar         on dev: always {common['label']!r} {common['accuracy']:.3f}"
    yield line + (f", counting words {words:.3f}" if words is not None else "")
    smallest = bar["smallest_difference"]
    shares = (5, 10, 20)
    paired = ", ".join(f"{smallest[f'same_rows_{share}']:.3f}" for share in shares)
    count = counted(rows, "row")
    yield f"            the smallest difference that {count} can show (95 %): {paired} between two models"
    line = f"            that disagree on {', '.join(map(str, shares))} % of these rows"
    if smallest["different_rows"]:  # 0 if the bar is 1
        line += f"; {smallest['different_rows']:.3f} against an accuracy on other rows"
    yield line


def counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'s' * (count != 1)}"


def size(count: int) -> str:
    """Bytes in MB or GB."""
    return f"{count / 1e6:,.0f} MB" if count < 1e9 else f"{count / 1e9:,.2f} GB"


def duration(seconds: float) -> str:
    """Seconds in the unit that fits."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
