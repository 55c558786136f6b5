"""Labelled sentences: the classes of data files, label files, and prediction files."""

from __future__ import annotations

import codecs
import csv
import difflib
import json
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from os import PathLike
from pathlib import Path
from typing import Any

from minillama.formats.files import atomic_file
from minillama.formats.names import COLUMNS_EXAMPLE, PREDICTED, PROBABILITY, is_table, path_and_fold
from minillama.text.tables import LINE_END, SEPARATOR, Table, as_text, read_table
from tokenizer import Tokenizer

Labels = Sequence[str] | Mapping[str, str | None]  # names of the labels 0, 1, ..., or the class of each label


@dataclass(frozen=True)
class Row:
    """One row of a data file. ids: its tokens; cells: the columns of its table, by name; line: its first line."""

    label: int
    sentence: str
    ids: tuple[int, ...] = ()
    cells: Mapping[str, Any] | None = field(default=None, compare=False, repr=False)
    line: int = field(default=0, compare=False, repr=False)


def read_text(path: str | PathLike[str], what: str) -> str:
    """The text of a UTF-8 file. Raises FileNotFoundError or ValueError. what: the expected content, for messages."""
    path = Path(path)
    if not path.exists():
        brings = ", or `python fetch_data.py` brings the course's" if path.name.startswith(("sst-", "cfimdb-")) else ""
        raise FileNotFoundError(f"{path}: no such {what}; give another path{brings}")
    if path.is_dir():
        raise ValueError(f"{path} is not a file; it should be a {what}")
    return decoded_text(path.read_bytes(), str(path), what)


def decoded_text(content: bytes, name: str, what: str) -> str:
    """UTF-8 bytes as text. Raises ValueError if they are invalid or blank. name, what: for messages."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = len(LINE_END.split(error.object[: error.start].decode("latin-1")))
        raise ValueError(f"{name}, line {line}: not UTF-8; save the {what} as UTF-8 text") from error
    if not text.strip():
        raise ValueError(f"{name} is empty; it should be a {what}")
    return text


def read_labels(path: str | PathLike[str]) -> dict[str, str | None]:
    """The class of each label in the data files; None for a label whose rows are left out.

    The file has this as a JSON object, or as a JSON list with the names of the labels 0, 1, ... Raises ValueError for
    fewer than two classes, for a name twice in a list, or for a label twice in an object.
    """
    wanted = 'a JSON list of names such as ["bad", "good"], or an object such as {"neg": "bad", "pos": "good"}'
    text = read_text(path, "label file (a JSON list of class names, or an object from label to name)")
    try:
        found = json.loads(text, object_pairs_hook=tuple)  # a dict would hide a second entry for a label
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}); it should be {wanted}") from error
    is_list = isinstance(found, list)
    if not is_list and not isinstance(found, tuple):
        raise ValueError(f"{path} should be {wanted}")
    pairs = [(str(n), name) for n, name in enumerate(found)] if is_list else [(k.strip(), name) for k, name in found]
    names = [name for _, name in pairs if is_list or name is not None]
    if not all(isinstance(name, str) and name.strip() for name in names):
        raise ValueError(f"{path} should be {wanted}")
    if len(set(names)) < (max(2, len(names)) if is_list else 2):
        raise ValueError(f"{path} names {names}; a classifier needs at least two names, each once in a list")
    if len(dict(pairs)) < len(pairs):
        raise ValueError(f"{path} has a label twice; give each label one class")
    return dict(pairs)


def class_names(labels: Mapping[str, str | None]) -> list[str]:
    """The classes in the order of their ids, which is the order of their first labels."""
    return list(dict.fromkeys(name for name in labels.values() if name is not None))


def read_file(
    path: str | PathLike[str],
    columns: Mapping[str, str] | None = None,
    labels: Collection[str] = (),
    labelled: bool = True,
) -> Table:
    """The table in a data file: a .csv, .tsv, .jsonl or .json, or lines of `label ||| sentence`.

    `#fold=PATTERN` after the path selects rows whose fold matches the shell pattern. The other arguments are those of
    `read_table`. Raises FileNotFoundError or ValueError.
    """
    name, pattern = path_and_fold(str(path))
    file = Path(name)
    texts = "texts and labels" if labelled else "texts"
    kind = f"data file (a table of {texts})" if is_table(name) else "data file of `label ||| sentence` records"
    text = read_text(file, kind).rstrip(" \r\n")  # a tab at the end belongs to a column
    with file.open("rb") as content:
        marked = content.read(3) == codecs.BOM_UTF8
    table = replace(read_table(file, text, columns, labels, labelled), marked=marked)
    if pattern is None:
        return table
    folds = {record.fold for record in table.records if record.fold is not None}
    if not folds:
        raise ValueError(f"{file} has no column beside label and text; leave out #fold={pattern}")
    records = [record for record in table.records if record.fold is not None and fnmatchcase(record.fold, pattern)]
    if not records:
        raise ValueError(f"{path}: no rows are left; its folds include {', '.join(sorted(folds)[:5])}")
    return replace(table, records=records)


def infer_labels(table: Table, named: bool = False) -> dict[str, str | None]:
    """The class of each label in a training file: the label itself. Numbers are in numeric order, other labels sorted.

    Raises ValueError if the labels are no classes: many for few rows (unless the user `named` the column), only one, or
    two that differ only in case.
    """
    counts = Counter(record.label for record in table.records if record.label is not None)
    where = f"{table.path}{f', {table.label}' if table.label else ''}"
    rows = sum(counts.values())
    if (len(counts) > max(20, rows / 4) and not named) or len(counts) == rows > 2:
        raise ValueError(
            f"{where} has {len(counts):,} different labels in {rows:,} rows, so it holds no classes; say which columns "
            f"hold text and label: {COLUMNS_EXAMPLE}, or list the classes in a file for --label-names"
        )
    if len(counts) < 2:
        one = f'one class, "{next(iter(counts))}"' if counts else "no label"
        raise ValueError(f"{where} has {one}; a classifier needs rows of two classes or more")
    spellings: dict[str, list[str]] = {}
    for label in counts:
        spellings.setdefault(" ".join(label.casefold().split()), []).append(label)
    for same in spellings.values():
        if len(same) > 1:
            shown = " and ".join(f'"{label}" ({counts[label]:,})' for label in same)
            example = json.dumps(dict.fromkeys(same, same[0]) | {"...": "..."}, ensure_ascii=False)
            raise ValueError(f"{where} has {shown}; make them one label, or name classes with --label-names: {example}")
    numeric = all(re.fullmatch(r"[-+]?[0-9]{1,15}(\.[0-9]{1,15})?", label) for label in counts)
    return {label: label for label in sorted(counts, key=float if numeric else str)}


def near_misses(table: Table, labels: Mapping[str, str | None]) -> list[str]:
    """Rare labels that look like common ones, in words: `"postive" (1 row) is close to "positive" (812 rows)`."""
    counts = Counter(record.label for record in table.records if record.label in labels)
    found = []
    for label, count in counts.items():
        common = [str(other) for other, n in counts.items() if n >= 20 * count and not str(label).isdigit()]
        if near := difflib.get_close_matches(str(label), common, n=1, cutoff=0.8):
            rows = f"{count} row{'s' * (count > 1)}"
            found.append(f'"{label}" ({rows}) is close to "{near[0]}" ({counts[near[0]]:,} rows)')
    return found


def rows_of(table: Table, label_names: Labels, may_lack_labels: bool = True) -> list[Row]:
    """The rows of a table, not yet tokenized. A row's label is the position of its class in `class_names`.

    A file without labels, or with one unknown label for all rows, has label 0 in all of them: see `has_gold_labels`.
    Raises ValueError, naming file and line, for an unknown or missing label; and if no row is left.
    """
    labels = _as_mapping(label_names)
    ids = {name: number for number, name in enumerate(class_names(labels))}
    values = {record.label for record in table.records}
    unlabelled = values == {None} or (len(values) == 1 and values <= {"-1", "?"})  # -1: as in GLUE's test files
    if may_lack_labels and table.names and unlabelled:
        return [Row(0, record.text, cells=record.cells, line=record.line) for record in table.records]
    rows = []
    for record in table.records:
        where = f"{table.path}, line {record.line}"
        if record.label is None:
            raise ValueError(f"{where}: the label is missing; write one, or remove the row")
        found = _class_of(record.label, labels, where)
        if found is not None:
            rows.append(Row(ids[found], record.text, cells=record.cells, line=record.line))
    if not rows:
        raise ValueError(f"{table.path}: no rows are left")
    return rows


def read_rows(path: str | PathLike[str], label_names: Labels, columns: Mapping[str, str] | None = None) -> list[Row]:
    """The rows of a labelled data file, not yet tokenized: `read_file` and `rows_of`."""
    labels = _as_mapping(label_names)
    known = {*labels, *(name for name in labels.values() if name is not None)}
    return rows_of(read_file(path, columns, known), labels, may_lack_labels=False)


def _as_mapping(labels: Labels) -> Mapping[str, str | None]:
    return labels if isinstance(labels, Mapping) else {str(n): name for n, name in enumerate(labels)}


def _class_of(label: str, labels: Mapping[str, str | None], where: str) -> str | None:
    """The class of a label or a class's own name (00 counts as 0); None if left out. Raises ValueError if unknown."""
    if label in labels:
        return labels[label]
    if label in labels.values():
        return label
    is_number = re.fullmatch(r"-?[0-9]{1,20}", label) is not None  # int refuses thousands of digits
    if is_number and str(int(label)) in labels:
        return labels[str(int(label))]
    classes = ["left out" if name is None else name for name in labels.values()]
    pairs = zip(labels, classes, strict=True)
    allowed = ", ".join(known if known == name else f"{known} ({name})" for known, name in pairs)
    if list(labels) == [str(n) for n in range(len(labels))]:
        allowed = f"0 to {len(labels) - 1} ({', '.join(classes)})"
    known = {one.casefold(): one for one in [*labels, *(name for name in labels.values() if name is not None)]}
    close = [] if is_number else difflib.get_close_matches(label.casefold(), known, n=1, cutoff=0.6)
    nearest = f'; the nearest is "{known[close[0]]}"' if close else ""
    raise ValueError(
        f"{where}: label {label[:60]!r} is none of {allowed}{nearest}; correct it, or give the label file that belongs "
        "to it (--label-names, for one of --ood --ood_label_names); where labels are not 0, 1, ... it is an object "
        'such as {"1": "bad", "2": "good"}'
    )


def has_gold_labels(rows: Sequence[Row]) -> bool:
    """Whether the labels are real. A column with a single value is a placeholder, as in CFIMDB's test set."""
    return len({row.label for row in rows}) > 1


def class_labels(labels: Labels) -> list[str]:
    """The first label of each class in a data file, in the order of the class ids."""
    first: dict[str, str] = {}
    for label, name in _as_mapping(labels).items():
        if name is not None:
            first.setdefault(name, label)
    return list(first.values())


def missing_classes(path: str | PathLike[str], rows: Sequence[Row], label_names: Sequence[str]) -> list[str]:
    """The class names without a training row. Raises ValueError if the last is one: it belongs to another data set."""
    found = {row.label for row in rows}
    if max(found) + 1 < len(label_names):
        raise ValueError(
            f"{path} has the labels {', '.join(map(str, sorted(found)))}, but --label-names has {len(label_names)} "
            f"names ({', '.join(label_names)}); give the mapping that belongs to this file"
        )
    return [name for label, name in enumerate(label_names) if label not in found]


def beginning(tokenizer: Tokenizer, ids: Sequence[int]) -> list[int]:
    """The ids before a text: bos if the tokenizer adds it, or if the text is empty."""
    return [tokenizer.bos_id] if getattr(tokenizer, "adds_bos", True) or not ids else []


def write_predictions(
    path: str | PathLike[str],
    predictions: Sequence[int],
    rows: Sequence[Row],
    labels: Labels | None = None,
    probabilities: Sequence[Sequence[float]] | None = None,
    separator: str = ",",
    marked: bool = False,
) -> None:
    """Writes the predicted class ids atomically, as the ending of `path` says.

    .csv, .jsonl: the columns of the row's file, the label, and the probability of each class (with `labels`). Others:
    lines of `{label} ||| {sentence}`, with class ids as numbers without `labels`. probabilities: (rows, classes).
    separator: between the cells of a .csv; marked: whether it begins with a byte order mark, as Excel likes.
    """
    kind = Path(path).suffix.lower()
    if kind not in (".csv", ".jsonl"):
        with atomic_file(path) as file:
            for label, row in zip(labels_of(predictions, labels), rows, strict=True):
                file.write(f"{label}{SEPARATOR}{row.sentence}\n")
        return
    records = prediction_records(predictions, rows, labels, probabilities)
    with atomic_file(path) as file:
        if kind == ".jsonl":
            file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
            return
        names = list(dict.fromkeys(name for record in records for name in record))
        file.write("\ufeff" * marked)
        writer = csv.writer(file, delimiter=separator, lineterminator="\n")
        writer.writerow(f"column {name}" if name.isdigit() else name for name in names)
        writer.writerows([as_text(record.get(name)) for name in names] for record in records)


def labels_of(predictions: Sequence[int], labels: Labels | None) -> list[str]:
    """The labels of predicted class ids; the ids themselves without `labels`."""
    written = None if labels is None else class_labels(labels)
    return [str(n) if written is None else written[n] for n in predictions]


def prediction_records(
    predictions: Sequence[int],
    rows: Sequence[Row],
    labels: Labels | None,
    probabilities: Sequence[Sequence[float]] | None,
) -> list[dict[str, Any]]:
    """For each row its own columns (or its text), the predicted label, and the probability of each class."""
    classes = [] if labels is None or probabilities is None else class_names(_as_mapping(labels))
    records = []
    for i, (label, row) in enumerate(zip(labels_of(predictions, labels), rows, strict=True)):
        ours: dict[str, Any] = {PREDICTED: json_label(label)}
        if probabilities is not None and classes:
            ours |= {f"{PROBABILITY}{name}": round(p, 6) for name, p in zip(classes, probabilities[i], strict=True)}
        own = {"text": row.sentence} if row.cells is None else row.cells
        records.append({name: value for name, value in own.items() if name not in ours} | ours)
    return records


def json_label(label: str) -> int | str:
    """A label for JSON output: an int if the text is a plain decimal integer, else the text."""
    return int(label) if re.fullmatch(r"0|-?[1-9][0-9]{0,17}", label) else label
