"""The accuracy of counting words: logistic regression on TF-IDF."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

from tqdm import tqdm

from minillama.text.labelled import has_gold_labels, read_labels, read_rows
from minillama.training.evaluation import WORD_COUNTS, counting_words


def compare(args: argparse.Namespace) -> None:
    """Prints the accuracy on dev for each way to count words, and on test for the best of them."""
    labels = read_labels(args.label_names)
    rows = {split: read_rows(getattr(args, split), labels) for split in ("train", "dev", "test")}
    if not has_gold_labels(rows["dev"]):
        raise ValueError(
            f"{args.dev} has no gold labels (one value in the whole label column), so nothing can be chosen"
        )
    tried = [asdict(way) | counting_words(rows, way) for way in tqdm(WORD_COUNTS, desc="counting words", leave=False)]
    print("n-grams  tokens      sublinear  C    dev")
    for one in tried:
        tokens = "with signs" if one["pattern"] == r"\S+" else "words"
        ways = f"1 to {one['ngrams']}   {tokens:<10}  {'yes' if one['sublinear'] else 'no':<9}"
        print(f"{ways}  {one['C']:<3g}  {one['dev']:.3f}")
    best = max(tried, key=lambda one: one["dev"])
    test = "has no gold labels" if best["test"] is None else f"{best['test']:.3f}"
    print(f"best on dev of {3 * len(tried)} settings: dev {best['dev']:.3f}, test {test}")
    print(json.dumps({"options": vars(args), "best": best, "tried": tried}))
