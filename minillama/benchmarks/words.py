"""The accuracy of counting words: logistic regression on TF-IDF."""

from __future__ import annotations

import argparse
import json

from minillama.text.labelled import read_labels, read_rows
from minillama.training.evaluation import counting_words


def compare(args: argparse.Namespace) -> None:
    """Prints the accuracy with 1-grams, and with 1- and 2-grams."""
    labels = read_labels(args.label_names)
    rows = {split: read_rows(getattr(args, split), labels) for split in ("train", "dev", "test")}
    found = {f"1- to {n}-grams": counting_words(rows, n) for n in (1, 2)}
    for name, scores in found.items():
        parts = []
        for split in ("dev", "test"):
            accuracy = scores[split]
            parts.append(f"{split} {'no gold labels' if accuracy is None else f'{accuracy:.3f}'}")
        print(f"TF-IDF of {name}, logistic regression (C {scores['C']:g}): {', '.join(parts)}")
    print(json.dumps({"options": vars(args), "words": found}))
