"""Folders of runs as finetune leaves them, and the pages of a report read back."""

from __future__ import annotations

import json
from html.parser import HTMLParser

from sklearn.metrics import accuracy_score, confusion_matrix

NAMES = ["bad", "so <i>so</i>", "3 good"]
VOID = {"meta", "br"}


class Page(HTMLParser):
    """Checks that tags nest; gathers the text by tag, the rows of tables, and what tags there are."""

    def __init__(self, source):
        super().__init__()
        self.open, self.tags, self.rows, self.texts, self.ids, self.links = [], set(), [], [], set(), set()
        self.labels = set()
        self.feed(source)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        values = dict(attributes)
        self.labels |= {values["aria-label"]} if "aria-label" in values else set()
        self.ids |= {values["id"]} if "id" in values else set()
        self.links |= {values["href"]} if "href" in values else set()
        assert not any(name.startswith("on") or name == "src" for name in values)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.texts.append(data)
        if "td" in self.open or "th" in self.open:
            self.rows[-1][-1] += data

    @property
    def text(self):
        return " ".join(self.texts)


def options(**changes):
    return {
        "option": "finetune",
        "seed": 1,
        "pretrained_model_path": "model.pt",
        "tokenizer": None,
        "train": "data/sst-train.txt",
        "dev": "dev.txt",
        "test": "test.txt",
        "label_names": "names.json",
        "dev_out": "dev-finetuning-output.txt",
        "test_out": "test-finetuning-output.txt",
        "lr": 1e-3,
        "epochs": 2,
        "run_dir": "run",
        "continued": True,
        "processes": 1,
    } | changes


def a_run(folder, accuracies, **changes):
    """A run's folder as finetune leaves it before its last line."""
    folder.mkdir(parents=True)
    (folder / "options.json").write_text(json.dumps({"options": options(**changes)}), encoding="utf-8")
    lines = []
    for epoch, value in enumerate(accuracies, start=1):
        for step in range(10 * epoch - 9, 10 * epoch + 1):
            lines.append({"step": step, "epoch": epoch, "loss": 1 / step, "lr": 1e-3, "seconds": 6.0})
        scores = {"running_train_accuracy": 0.5, "dev_accuracy": value, "dev_macro_f1": value / 2}
        lines.append({"step": 10 * epoch, "epoch": epoch, "train_loss": 0.3} | scores)
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n", encoding="utf-8")
    return folder


GOLD = [0, 0, 1, 1, 2, 2, 2, 1]
GUESS = [0, 1, 1, 1, 2, 0, 2, 2]


def with_last_line(folder, **scores):
    """The run, finished: with a loss on dev after each epoch, and a last line with the scores of dev and test."""
    path = folder / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    lines = [line | ({"dev_loss": 0.7} if "train_loss" in line else {}) for line in lines]
    lines.append({"step": lines[-1]["step"], "final": True} | scores)
    path.write_text("\n".join(map(json.dumps, lines)) + "\n", encoding="utf-8")
    return folder


def confused(split, guess):
    """A split's part of the last line, and the names of the classes."""
    matrix = confusion_matrix(GOLD, guess).tolist()
    return {"classes": NAMES, f"{split}_accuracy": accuracy_score(GOLD, guess), f"{split}_confusion": matrix}
