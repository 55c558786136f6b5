"""The results of grade.py for other readers: Gradescope's JSON, and a page over a class."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from minillama.cli.pages import Table, render
from minillama.grading.judge import RIGHT, TITLES, Judgement, frequencies
from minillama.grading.mistakes import MISTAKES, PLACES


def gradescope(judgement: Judgement, hints: str) -> dict[str, Any]:
    """The results.json of Gradescope's autograder for one hand-in."""
    tests = []
    for verdict in judgement.verdicts:
        hint = verdict.hint(hints)
        test = {"name": TITLES[verdict.part], "score": verdict.points, "max_score": verdict.out_of}
        output = verdict.word + (f": {hint}" if hint else "")
        tests.append(test | {"status": "passed" if verdict.word == RIGHT else "failed", "output": output})
    return {
        "score": judgement.points,
        "execution_time": round(judgement.seconds),
        "output": judgement.note,
        "visibility": "visible",
        "tests": tests,
    }


def report_page(judgements: Sequence[Judgement]) -> str:
    """The page of a class: students by parts, which mistake how often, and what was said to each."""
    parts = list(dict.fromkeys(verdict.part for one in judgements for verdict in one.verdicts))
    first = judgements[0]
    return render(
        "grading.html",
        title="Grades",
        subtitle=f"{first.title}, hand-ins: {len(judgements)}",
        points=points_table(judgements, parts),
        mistakes=mistakes_table(judgements),
        words=words_table(judgements, parts),
        students=[(f"s{i}", one, hints_of(one)) for i, one in enumerate(judgements)],
    )


def points_table(judgements: Sequence[Judgement], parts: Sequence[str]) -> Table:
    rows = []
    for one in judgements:
        points = {verdict.part: str(verdict.points) for verdict in one.verdicts}
        rows.append([one.name, *(points.get(part, "0") for part in parts), f"{one.points}/{one.out_of}"])
    links = [f"#s{i}" for i in range(len(judgements))]
    notes = [one.note for one in judgements]
    return Table("Points", ["student", *parts, "total"], rows, links, notes)


def words_table(judgements: Sequence[Judgement], parts: Sequence[str]) -> Table:
    """How many hand-ins got which verdict, by part."""
    words = Counter((verdict.part, verdict.word) for one in judgements for verdict in one.verdicts)
    kinds = list(dict.fromkeys([RIGHT, *(word for _, word in words)]))
    rows = [[TITLES[part], *(str(words[part, word]) for word in kinds)] for part in parts]
    return Table("Verdicts", ["part", *kinds], rows)


def mistakes_table(judgements: Sequence[Judgement]) -> Table:
    rows = [
        [MISTAKES[name].sentence, PLACES[MISTAKES[name].part], str(count)]
        for name, count in frequencies(judgements)
        if name in MISTAKES
    ]
    return Table("Mistakes", ["mistake", "where", "hand-ins"], rows, words=(0, 1))


def hints_of(judgement: Judgement) -> list[tuple[str, str, str]]:
    """Parts, verdict and full hint of everything that is not right; parts of which the same is said are together."""
    together: dict[tuple[str, str], list[str]] = {}
    for verdict in judgement.verdicts:
        if verdict.word != RIGHT:
            together.setdefault((verdict.word, verdict.hint("full")), []).append(TITLES[verdict.part])
    return [(", ".join(parts), word, hint) for (word, hint), parts in together.items()]
