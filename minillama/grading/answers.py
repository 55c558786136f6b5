"""The right answer of every probe, and the answer with known mistakes: a second implementation in NumPy.

It shares no code with the model. Names of inputs and results are those of `runner.run_case`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import numpy as np

from minillama.grading import answers_model, answers_training
from minillama.grading.gradients import derivatives
from minillama.grading.mistakes import MISTAKES
from minillama.grading.parts import Arrays, Case

ANSWERS: dict[str, Callable[..., Arrays]] = {
    part: getattr(answers_model, part, None) or getattr(answers_training, part)
    for part in ("norm", "rope", "scores", "attention", "block", "model")
    + ("generate", "adamw", "zero_shot", "classifier", "lora")
}


def answer(case: Case, mistakes: Collection[str] = frozenset()) -> Arrays:
    """The answer of a probe with the named mistakes. Raises KeyError for an unknown one, ValueError for another part's.

    Infinity and NaN in an answer are what the mistake makes.
    """
    for name in mistakes:
        if MISTAKES[name].part != case.part:
            raise ValueError(f"{name} is a mistake of the part {MISTAKES[name].part}, not of {case.part}")
    switches = answers_model.right_switches(case.settings, case.part)
    switches |= {MISTAKES[name].short_name for name in mistakes}
    arrays = {
        name: value if value.dtype.kind == "i" else value.astype(np.float64) for name, value in case.arrays.items()
    }
    with np.errstate(all="ignore"):
        found = ANSWERS[case.part](case.settings, arrays, switches)
        if names := case.settings.get("gradients"):

            def solve(changed: Arrays) -> Arrays:
                return ANSWERS[case.part](case.settings, changed, switches)

            found |= derivatives(solve, arrays, case.part, names)
    return {name: np.asarray(value, dtype=np.float64) for name, value in found.items()}
