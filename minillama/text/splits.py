"""Held-out rows: divides labelled rows into training and development rows. Imports no torch."""

from __future__ import annotations

import random
from collections.abc import Sequence

from minillama.text.labelled import Row


def hold_out(rows: Sequence[Row], share: float, seed: int) -> tuple[list[Row], list[Row]]:
    """The training rows and the held-out ones, both in the order of the file.

    Of each class, about `share` of the rows is held out, at least one. Rows with the same text (but for case and
    spaces) stay together, so that no held-out text was trained on. A class with one text stays in training. Raises
    ValueError if nothing could be held out.
    """
    texts: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        texts.setdefault(" ".join(row.sentence.casefold().split()), []).append(i)
    classes: dict[int, list[list[int]]] = {}
    for same in texts.values():
        classes.setdefault(rows[same[0]].label, []).append(same)
    draw = random.Random(seed)
    held: set[int] = set()
    for _, groups in sorted(classes.items()):
        wanted = max(1, round(share * sum(map(len, groups))))
        draw.shuffle(groups)
        taken = 0
        for same in groups[1:]:  # one text of each class is trained on
            if taken >= wanted:
                break
            if taken and taken + len(same) > wanted:
                continue
            held.update(same)
            taken += len(same)
    if not held:
        raise ValueError("no class has two different texts, so no rows can be held out; give --dev FILE, or more rows")
    return [row for i, row in enumerate(rows) if i not in held], [row for i, row in enumerate(rows) if i in held]
