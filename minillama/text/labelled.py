"""Labelled sentences: reads data files and label files, and writes prediction files."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from os import PathLike
from pathlib import Path
from typing import NamedTuple

from minillama.formats.files import atomic_file
from minillama.formats.names import path_and_fold
from tokenizer import Tokenizer

SEPARATOR = " ||| "
HEADS = ("label", "class", "class index")  # first cells of a line of column names
LINE_END = re.compile(r"\r{0,2}\n|\r")  # str.splitlines would also split sentences at U+0085 or U+2028
Labels = Sequence[str] | Mapping[str, str | None]  # names of the labels 0, 1, ..., or the class of each label


@dataclass(frozen=True)
class Row:
    """One row of a data file; `ids` are its tokens."""

    label: int
    sentence: str
    ids: tuple[int, ...] = ()


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


class Record(NamedTuple):
    """One row of a data file as text. fold: a further column, by which rows can be selected."""

    line: int
    label: str
    text: str
    fold: str | None = None


def numbered_lines(text: str) -> Iterator[tuple[int, str]]:
    """The non-blank lines of a text, with their numbers."""
    return ((number, line) for number, line in enumerate(LINE_END.split(text), start=1) if line.strip())


def _separated_records(path: Path, text: str) -> Iterator[Record]:
    """Records from lines of `label ||| text`."""
    for number, line in numbered_lines(text):
        label, separator, sentence = line.partition(SEPARATOR.rstrip())
        if not separator or not f"{sentence} ".startswith(" "):
            raise ValueError(
                f'{path}, line {number}: no "{SEPARATOR}" in {line[:60]!r}; a line is `label{SEPARATOR}sentence`'
            )
        yield Record(number, label, sentence)


def _csv_records(path: Path, text: str) -> Iterator[Record]:
    """Records of `"label","title","description"`, the format of the data sets of arXiv 1509.01626.

    The text is the cells after the label, joined by spaces; line breaks become spaces. Quotes inside a field are
    doubled, or else escaped by a backslash. If most backslashes in a file precede n or ", they are escapes, as in the
    Yelp and Amazon sets. Otherwise each means a line break, as in AG News.
    """
    try:
        records = list(_cells(path, text))
        found = re.findall(r"\\(.?)", "\n".join(cell for _, cells in records for cell in cells[1:]), re.DOTALL)
        escapes = 2 * sum(after in ("n", '"') for after in found) > len(found)
    except ValueError:
        records, escapes = [], True
        doubled = re.sub(r'\\([\\"])', lambda pair: '""' if pair[1] == '"' else pair[0], text)
        with suppress(ValueError):
            records = list(_cells(path, doubled))
        if not records:
            raise
    for number, cells in records:
        joined = " ".join(cell.strip() for cell in cells[1:])
        if escapes:
            joined = re.sub(r'\\(r\\n|["n\\])', lambda pair: pair[1] if pair[1] in '"\\' else " ", joined)
        yield Record(number, cells[0], re.sub(r"\n" if escapes else r"[\\\n]", " ", joined))


def _cells(path: Path, text: str) -> Iterator[tuple[int, list[str]]]:
    """The non-blank records of a CSV, each with the number of its first line."""
    lines = csv.reader(io.StringIO(LINE_END.sub("\n", text), newline=""), strict=True)
    width, number = 0, 1
    try:
        for cells in lines:
            if any(cell.strip() for cell in cells):
                width = width or len(cells)
                if len(cells) != width or width < 2:
                    columns = _columns(cells, width)
                    raise ValueError(f"{path}, line {number}: {columns}; a record is `label,text` or more")
                yield number, cells
            number = lines.line_num + 1
    except csv.Error as error:
        raise ValueError(f"{path}, line {number}: not CSV ({error}); fields are in double quotes") from error


def _tab_records(path: Path, text: str) -> Iterator[Record]:
    """Records from lines of label, tab, text, and possibly more columns.

    The text is the column with the most characters in the whole file. The first of the other columns is the fold.
    """
    lines = [(number, line.split("\t")) for number, line in numbered_lines(text)]
    width = len(lines[0][1])
    for number, cells in lines:
        if len(cells) != width or width < 2:
            raise ValueError(f"{path}, line {number}: {_columns(cells, width)}; a line is `label TAB text` or more")
    text_at = max(range(1, width), key=lambda n: sum(len(cells[n]) for _, cells in lines))
    fold_at = 1 if text_at > 1 else 2
    for number, cells in lines:
        yield Record(number, cells[0], cells[text_at], cells[fold_at] if fold_at < width else None)


def _columns(cells: list[str], width: int) -> str:
    return f"{len(cells)} column{'s' * (len(cells) != 1)}" + (f", not {width} as above" if width != len(cells) else "")


# The kinds of data files, by the suffixes of their names.
KINDS: dict[str, tuple[str, Callable[[Path, str], Iterator[Record]]]] = {
    ".csv": ("data file of `label,text` records", _csv_records),
    ".tsv": ("data file of `label TAB text` lines", _tab_records),
    "": ("data file of `label ||| sentence` lines", _separated_records),
}


def read_rows(path: str | PathLike[str], label_names: Labels) -> list[Row]:
    """The rows of a data file, not yet tokenized: lines of `label ||| sentence`, a .csv or a .tsv.

    `#fold=PATTERN` after the path selects rows whose fold matches the shell pattern. Blank lines are left out, and a
    first line that begins with one of `HEADS`. A row's label is the position of its class in `class_names`. Raises
    ValueError, naming file and line, for a missing separator or sentence, or an unknown label; and if no row is left.
    """
    name, pattern = path_and_fold(str(path))
    file = Path(name)
    what, records = KINDS.get(file.suffix.lower(), KINDS[""])
    labels = _as_mapping(label_names)
    ids = {name: number for number, name in enumerate(class_names(labels))}
    rows = []
    folds = set()
    text = read_text(file, what).rstrip(" \r\n")  # a tab at the end belongs to a column
    for position, (number, label, sentence, fold) in enumerate(records(file, text)):
        label = label.strip()
        if pattern is not None:
            if fold is None:
                raise ValueError(f"{file} has no column beside label and text; leave out #fold={pattern}")
            folds.add(fold)
            if not fnmatchcase(fold, pattern):
                continue
        if position == 0 and label.lower() in HEADS and label not in (*labels, *labels.values()):
            continue
        where = f"{file}, line {number}"
        found = _class_of(label, labels, where)
        if found is None:
            continue
        if not sentence.strip():
            raise ValueError(f"{where}: the sentence is empty; write one, or remove the line")
        rows.append(Row(ids[found], sentence.strip()))
    if not rows:
        some = f"; its folds include {', '.join(sorted(folds)[:5])}" if folds else ""
        raise ValueError(f"{path}: no rows are left{some}")
    return rows


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
    allowed = ", ".join(f"{known} ({name})" for known, name in zip(labels, classes, strict=True))
    if list(labels) == [str(n) for n in range(len(labels))]:
        allowed = f"0 to {len(labels) - 1} ({', '.join(classes)})"
    raise ValueError(
        f"{where}: label {label[:60]!r} is none of {allowed}; correct it, or give the label file that belongs to it "
        "(--label-names, for one of --ood --ood_label_names); where labels are not 0, 1, ... it is an object such as "
        '{"1": "bad", "2": "good"}'
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
    path: str | PathLike[str], predictions: Sequence[int], rows: Sequence[Row], labels: Labels | None = None
) -> None:
    """Writes `{label} ||| {sentence}` lines atomically. predictions: class ids; written as numbers without `labels`."""
    written = None if labels is None else class_labels(labels)
    with atomic_file(path) as file:
        for number, row in zip(predictions, rows, strict=True):
            file.write(f"{number if written is None else written[number]}{SEPARATOR}{row.sentence}\n")
