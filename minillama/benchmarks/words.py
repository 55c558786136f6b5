"""The accuracy of counting words, alone and beside a model's predictions."""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from minillama.formats.names import PROBABILITY
from minillama.text.labelled import Row, has_gold_labels, read_labels, read_rows
from minillama.training.word_counts import WORD_COUNTS, fit_word_counts, score_word_counts

if TYPE_CHECKING:
    from sklearn.pipeline import Pipeline


def compare(args: argparse.Namespace) -> None:
    """Prints the accuracy on dev for each way to count words, and on test for the best of them; with a model's
    predictions, also theirs and that of the average.
    """
    labels = read_labels(args.label_names)
    rows = {split: read_rows(getattr(args, split), labels) for split in ("train", "dev", "test")}
    if not has_gold_labels(rows["dev"]):
        raise ValueError(
            f"{args.dev} has no gold labels (one value in the whole label column), so nothing can be chosen"
        )
    files = {"dev": args.dev_predictions, "test": args.test_predictions}
    predicted = {
        split: np.mean([read_probabilities(Path(path), rows[split]) for path in paths], axis=0)
        for split, paths in files.items()
        if paths
    }
    ways = tqdm(WORD_COUNTS, desc="counting words", leave=False)
    fits = [(way, fit_word_counts(rows, way)) for way in ways]
    tried = [(fitted, asdict(way) | score_word_counts(fitted, rows)) for way, fitted in fits]
    print("n-grams  tokens      sublinear  C    dev")
    for _, one in tried:
        tokens = "with signs" if one["pattern"] == r"\S+" else "words"
        counted = f"1 to {one['ngrams']}   {tokens:<10}  {'yes' if one['sublinear'] else 'no':<9}"
        print(f"{counted}  {one['C']:<3g}  {one['dev']:.3f}")
    fitted, best = max(tried, key=lambda one: one[1]["dev"])
    print(f"best on dev of {3 * len(tried)} settings: dev {best['dev']:.3f}, test {shown(best['test'])}")
    found = {"options": vars(args), "best": best, "tried": [one for _, one in tried]}
    if predicted:
        found |= beside(rows, fitted, predicted)
    print(json.dumps(found))


def shown(accuracy: float | None) -> str:
    return "has no gold labels" if accuracy is None else f"{accuracy:.3f}"


def beside(
    rows: Mapping[str, Sequence[Row]], fitted: Pipeline, predicted: Mapping[str, np.ndarray]
) -> dict[str, dict[str, float | None]]:
    """Prints and returns the accuracy of the predictions, and of their mean with the probabilities of the counts."""
    found: dict[str, dict[str, float | None]] = {"predictions": {}, "average": {}}
    for split, probabilities in predicted.items():
        counted = np.zeros_like(probabilities)
        counted[:, fitted.classes_] = fitted.predict_proba([row.sentence for row in rows[split]])
        gold = np.array([row.label for row in rows[split]])
        for name, mixed in (("predictions", probabilities), ("average", (probabilities + counted) / 2)):
            right = float((mixed.argmax(1) == gold).mean())
            found[name][split] = right if has_gold_labels(rows[split]) else None
    for name, words in (("predictions", "the predictions"), ("average", "the mean of both")):
        print(f"{words}: " + ", ".join(f"{split} {shown(one)}" for split, one in found[name].items()))
    return found


def read_probabilities(path: Path, rows: Sequence[Row]) -> np.ndarray:
    """The probabilities (rows, classes) in a .csv of predictions. Raises ValueError if it is of other rows."""
    with path.open(encoding="utf-8", newline="") as file:
        records = list(csv.DictReader(file))
    names = [name for name in (records[0] if records else ()) if name.startswith(PROBABILITY)]
    if not names:
        raise ValueError(f"{path} has no probabilities; name a .csv as --dev_out or --test_out to have them")
    if len(records) != len(rows):
        raise ValueError(f"{path} has {len(records)} rows, but the data have {len(rows)}; it is of other data")
    for number, (record, row) in enumerate(zip(records, rows, strict=True), start=1):
        if record.get("text", row.sentence) != row.sentence:
            raise ValueError(f"{path}: row {number} is {record['text'][:40]!r}, but in the data {row.sentence[:40]!r}")
    return np.array([[float(record[name]) for name in names] for record in records])
