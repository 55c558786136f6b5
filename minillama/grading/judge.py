"""The judge: compares a student's answers with the right ones, and looks wrong ones up among known mistakes.

Parts are judged in the order in which they build on each other. A part whose forerunner fails is judged with ours in
the forerunner's place, so that one early mistake does not cost what follows.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from minillama.grading import reading
from minillama.grading.answers import answer
from minillama.grading.confinement import Limits
from minillama.grading.differences import Difference, compared, described, only_at, only_where, right_outputs
from minillama.grading.kit_setups import Assignment, Setup
from minillama.grading.loading import NAMES
from minillama.grading.mistakes import MISTAKES, PLACES, mistakes_of, pairs_of, right_formula
from minillama.grading.parts import Case, cases
from minillama.grading.reading import HOMES
from minillama.grading.sandbox import DEFAULT_LIMITS, Problem, Run, Sandbox

Arrays = dict[str, np.ndarray]
# The parts that a part calls, directly or not.
FORERUNNERS: dict[str, tuple[str, ...]] = {
    "attention": ("rope", "scores"),
    "block": ("norm", "rope", "scores", "attention"),
    "model": ("norm", "rope", "scores", "attention", "block"),
}
FORERUNNERS |= {part: (*FORERUNNERS["model"], "model") for part in ("zero_shot", "classifier", "lora")}
TITLES = {
    "norm": "norm",
    "rope": "rotary positions",
    "scores": "attention scores",
    "attention": "attention",
    "block": "block",
    "model": "whole model",
    "generate": "generation",
    "adamw": "AdamW",
    "zero_shot": "zero-shot classifier",
    "classifier": "fine-tuned classifier",
    "lora": "LoRA",
}
RIGHT, WRONG, ERROR, STOPPED, EMPTY = "right", "wrong", "error", "stopped", "not implemented yet"


@dataclass(frozen=True)
class Verdict:
    """A part's result. word: one of the five above. sentence: what is wrong; formula: the right one, if a mistake is
    known. place: where to look. mistakes: names of the known mistakes. stand_ins: parts that were replaced by ours.
    """

    part: str
    points: int
    out_of: int
    word: str
    sentence: str = ""
    place: str = ""
    formula: str = ""
    mistakes: tuple[str, ...] = ()
    stand_ins: tuple[str, ...] = ()

    def hint(self, level: str) -> str:
        """The text that the student may read: nothing, the place ("area"), or all that is known ("full")."""
        if self.word == RIGHT:
            return f"judged with our {listed(self.stand_ins)}" if self.stand_ins and level == "full" else ""
        if level == "none":
            return ""
        if level == "area" and self.word in (WRONG, ERROR):
            return f"look at {self.place}"
        right = f" Right: {self.formula}." if self.formula else ""
        place = f" ({self.place})" if self.place and self.place not in self.sentence else ""
        aside = f" Judged with our {listed(self.stand_ins)}." if self.stand_ins and level == "full" else ""
        return f"{self.sentence}{place}{right if level == 'full' else ''}{aside}"


@dataclass(frozen=True)
class Judgement:
    """The verdicts on one hand-in. note: why it could not be judged, if so."""

    name: str
    title: str  # of the assignment
    verdicts: tuple[Verdict, ...] = ()
    seconds: float = 0.0
    note: str = ""

    @property
    def points(self) -> int:
        return sum(verdict.points for verdict in self.verdicts)

    @property
    def out_of(self) -> int:
        return sum(verdict.out_of for verdict in self.verdicts)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Judgement:
        verdicts = []
        for one in values["verdicts"]:
            fields: dict[str, Any] = {
                key: tuple(value) if isinstance(value, list) else value for key, value in one.items()
            }
            verdicts.append(Verdict(**fields))
        return cls(**{**values, "verdicts": tuple(verdicts)})


def judge(
    folder: Path,
    assignment: Assignment,
    limits: Limits = DEFAULT_LIMITS,
    name: str = "",
    progress: Callable[[str], None] = lambda part: None,
) -> Judgement:
    """Judges the modules of a folder. Parts without points are ours. progress: called with each part."""
    started, asked = time.monotonic(), assignment.points
    verdicts: dict[str, Verdict] = {}
    broken: dict[str, tuple[str, str, str]] = {}  # modules that do not load: word, sentence and place
    with Sandbox(folder, assignment.setup, limits) as sandbox:
        for part in asked:
            progress(part)
            found, _ = probes(part, assignment.setup, assignment.seed)
            needed = FORERUNNERS.get(part, ())
            home, run, replaced = HOMES[part], Run(), []
            while home not in broken:
                replaced = [one for one in needed if one not in asked or verdicts[one].word != RIGHT]
                replaced = [one for one in replaced if HOMES[one] not in broken]
                run = sandbox.run(part, found, replaced)
                module = unloadable(run)
                if not module or module in broken:
                    break
                broken[module] = load_failure(module, run)
                sandbox.put_ours(module)  # once more, with ours
            if home in broken:
                word, sentence, place = broken[home]
                verdicts[part] = Verdict(part, 0, asked[part], word, sentence, place)
                continue
            ours = [f"{module}.py" for module in broken if module in run.loads]
            verdict = verdict_on(part, assignment, run, folder, [*ours, *replaced])
            if replaced and verdict.word != RIGHT and not run.end:
                alone = sandbox.run(part, found)
                second = verdict_on(part, assignment, alone, folder, ours)
                verdict = second if second.word == RIGHT or run.stand_ins else verdict
            if (
                verdict.word == WRONG
                and not verdict.mistakes
                and is_right_alone(sandbox, part, assignment, run, replaced)
            ):
                text = "Alone this probe is right: something is kept from an earlier call."
                verdict = replace(verdict, sentence=f"{verdict.sentence} {text}")
            verdicts[part] = verdict
    seconds = time.monotonic() - started
    return Judgement(name or folder.name, assignment.title, tuple(verdicts.values()), seconds)


def is_right_alone(sandbox: Sandbox, part: str, assignment: Assignment, run: Run, replaced: Sequence[str]) -> bool:
    """Whether the probe with the largest difference is right in a process of its own."""
    found, right = probes(part, assignment.setup, assignment.seed)
    differences = differences_of(part, assignment, run)
    if not differences or 0 in differences:  # the first has none before it
        return False
    worst = max(differences, key=lambda i: differences[i].size)
    alone = sandbox.run(part, [found[worst]], replaced)
    return 0 in alone.answers and compared(alone.answers[0], right[worst], found[worst].tolerance) is None


def differences_of(part: str, assignment: Assignment, run: Run) -> dict[int, Difference]:
    """The largest difference of each probe that is wrong, by its index."""
    found, right = probes(part, assignment.setup, assignment.seed)
    differences = {i: compared(arrays, right[i], found[i].tolerance) for i, arrays in run.answers.items()}
    return {i: difference for i, difference in differences.items() if difference is not None}


def unloadable(run: Run) -> str:
    """The module that did not load in a run; "" if all did."""
    if run.end:
        return run.loading if run.loading in NAMES else ""
    return next((problem.module for problem in run.problems.values() if problem.module in NAMES), "")


def load_failure(module: str, run: Run) -> tuple[str, str, str]:
    """Why a module did not load in a run: word, sentence and place."""
    problem = next((problem for problem in run.problems.values() if problem.module == module), None)
    if run.end or problem is None or problem.rule:
        reason = run.end if run.end or problem is None else problem.rule
        return STOPPED, f"Stopped while {module}.py was loading: {reason}.", f"{module}.py"
    return ERROR, not_loaded(problem), problem.place or f"{module}.py"


@lru_cache(maxsize=64)
def probes(part: str, setup: Setup, seed: int) -> tuple[list[Case], list[Arrays]]:
    """The probes of a part and their right answers."""
    found = cases(part, setup, seed)
    return found, [answer(case) for case in found]


@lru_cache(maxsize=20000)
def mistaken(part: str, setup: Setup, seed: int, index: int, names: frozenset[str]) -> Arrays | None:
    """The answer to a probe with known mistakes; None if they cannot be made there."""
    try:
        with np.errstate(all="ignore"):
            return answer(probes(part, setup, seed)[0][index], names)
    except (ValueError, IndexError, KeyError):
        return None


def verdict_on(part: str, assignment: Assignment, run: Run, folder: Path, replaced: Sequence[str]) -> Verdict:
    """The verdict on what came back from a run."""
    found, right = probes(part, assignment.setup, assignment.seed)
    out_of, place, stand_ins = assignment.points[part], PLACES[part], tuple(replaced)

    def zero(word: str, sentence: str, where: str = place, **more: Any) -> Verdict:
        return Verdict(part, 0, out_of, word, sentence, where, stand_ins=stand_ins, **more)

    if run.end:
        where = f" while {run.loading}.py was loading" if run.loading else ""
        if not where and run.at is not None:
            where = f" on the probe '{found[run.at].name}'"
        return zero(STOPPED, f"Stopped{where}: {run.end}.", f"{run.loading}.py" if run.loading else place)
    problems = list(run.problems.values())
    if broke := next((problem for problem in problems if problem.rule), None):
        return zero(STOPPED, f"Stopped: {broke.rule}.", broke.place or place)
    differences = differences_of(part, assignment, run)
    if not problems and not differences and len(run.answers) == len(found):
        return Verdict(part, out_of, out_of, RIGHT, stand_ins=stand_ins)
    raised = next((problem for problem in problems if problem.type == "NotImplementedError"), None)
    if raised is not None and raised.place:
        return zero(EMPTY, f"{raised.place} is not implemented yet.", raised.place)
    if empty := reading.unimplemented(folder, part):
        return zero(EMPTY, f"{listed(empty)} is not implemented yet.", empty[0])
    if raised is not None:
        return zero(EMPTY, "This part is not implemented yet.")
    names = look_up(part, assignment, run, differences) if differences else ()
    if problems:
        failing = [found[i] for i in run.problems]
        where = only_where(failing, [found[i] for i in run.answers])
        sentence = told(problems[0], found[min(run.problems)]) + (f" {where}" if where else "")
        return zero(ERROR, sentence, problems[0].place or place, mistakes=names)
    if names:
        known = [MISTAKES[name] for name in names]
        sentence = " And: ".join(mistake.sentence for mistake in known)
        return zero(WRONG, sentence, formula=right_formula(part, assignment.setup), mistakes=names)
    worst = max(differences, key=lambda i: differences[i].size)
    failing, wrong = [found[i] for i in differences], list(differences.values())
    outputs = {difference.output for difference in wrong}
    passing = [case for i, case in enumerate(found) if i not in differences and outputs & set(right[i])]
    where = only_where(failing, passing)
    sentence = described(differences[worst], found[worst])
    sentences = (sentence, only_at(wrong, failing, part), right_outputs(wrong), where)
    return zero(WRONG, " ".join(filter(None, sentences)))


def look_up(part: str, assignment: Assignment, run: Run, differences: dict[int, Difference]) -> tuple[str, ...]:
    """The names of the known mistake, or the pair, whose answers these are; empty if there is none.

    If several fit, the nearest one, and a single before a pair.
    """
    setup, seed = assignment.setup, assignment.seed
    found, _ = probes(part, setup, seed)
    order = [*differences, *(i for i in run.answers if i not in differences)]  # the wrong ones decide sooner
    singles = [(mistake,) for mistake in mistakes_of(part, setup)]
    for candidates in (singles, pairs_of(part, setup)):
        best: tuple[float, tuple[str, ...]] | None = None
        for candidate in candidates:
            names = tuple(mistake.name for mistake in candidate)
            far = 0.0
            for i in order:
                wrong = mistaken(part, setup, seed, i, frozenset(names))
                difference = None if wrong is None else compared(run.answers[i], wrong, 0.0)
                size = np.inf if wrong is None else difference.size if difference else 0.0
                far = max(far, size / found[i].tolerance)
                if far > 1.0:
                    break
            if far <= 1.0 and (best is None or far < best[0]):
                best = far, names
        if best is not None:
            return best[1]
    return ()


def told(problem: Problem, case: Case) -> str:
    """An exception as a sentence for the student."""
    what = problem.words
    if problem.module:
        return not_loaded(problem)
    if problem.type == "KeptBetweenCalls":
        return f"On the probe '{case.name}' {problem.text}: something is kept from the call before."
    if not problem.place:
        return f"What it gives cannot be used on the probe '{case.name}': {what}."
    return f"It ends with {what}, at {problem.place}, on the probe '{case.name}'."


def not_loaded(problem: Problem) -> str:
    """The exception that ended an import, as a sentence for the student."""
    return f"{problem.module}.py does not load: {problem.words}{f', at {problem.place}' if problem.place else ''}."


def listed(words: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return " and ".join(filter(None, (", ".join(words[:-1]), *words[-1:])))


def frequencies(judgements: Sequence[Judgement]) -> list[tuple[str, int]]:
    """How many hand-ins made each known mistake, the most frequent first."""
    made = list(chain.from_iterable(verdict.mistakes for one in judgements for verdict in one.verdicts))
    return sorted(((name, made.count(name)) for name in set(made)), key=lambda item: (-item[1], item[0]))
