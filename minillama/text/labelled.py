"""Labelled sentences: files in, token ids and batches out, predictions back into files."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from os import PathLike
from pathlib import Path
from typing import NamedTuple

from minillama.formats.files import atomic_file
from minillama.formats.names import path_and_fold
from tokenizer import Tokenizer

SEPARATOR = " ||| "
HEADS = ("label", "class", "class index")  # what a first line says that names the columns
# str.splitlines would also break a sentence at characters such as U+0085 or U+2028.
LINE_END = re.compile(r"\r{0,2}\n|\r")


@dataclass(frozen=True)
class Row:
    """One line of a data file; `ids` are its tokens, made once."""

    label: int
    sentence: str
    ids: tuple[int, ...] = ()


def read_text(path: str | PathLike[str], what: str) -> str:
    """The text of a UTF-8 file. Raises FileNotFoundError or ValueError, naming `what` it should have been."""
    path = Path(path)
    if not path.exists():
        brings = ", or `python fetch_data.py` brings the course's" if path.name.startswith(("sst-", "cfimdb-")) else ""
        raise FileNotFoundError(f"{path}: no such {what}; give another path{brings}")
    if path.is_dir():
        raise ValueError(f"{path} is not a file; it should be a {what}")
    return decoded_text(path.read_bytes(), str(path), what)


def decoded_text(content: bytes, name: str, what: str) -> str:
    """UTF-8 as text, without a byte order mark. Raises ValueError with the name of the source, and `what` it should
    have been, if it is something else or blank.
    """
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = len(LINE_END.split(error.object[: error.start].decode("latin-1")))
        raise ValueError(f"{name}, line {line}: not UTF-8; save the {what} as UTF-8 text") from error
    if not text.strip():
        raise ValueError(f"{name} is empty; it should be a {what}")
    return text


def read_labels(path: str | PathLike[str]) -> dict[str, str | None]:
    """The class of each label that a data file may have, None for a label whose rows are left out.

    The file is a JSON object of just that, or a JSON list: the names of the labels 0, 1, ... Raises ValueError unless
    there are two classes or more, if a list has a name twice, or an object a label.
    """
    wanted = 'a JSON list of names such as ["bad", "good"], or an object such as {"neg": "bad", "pos": "good"}'
    text = read_text(path, "label file (a JSON list of class names, or an object from label to name)")
    try:
        found = json.loads(text, object_pairs_hook=tuple)  # a dict would hide that a label is there twice
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
    """The classes, in the order of their ids: that in which the labels name them first."""
    return list(dict.fromkeys(name for name in labels.values() if name is not None))


def read_label_names(path: str | PathLike[str]) -> list[str]:
    """The class names of a label file, in the order of their ids. Raises like `read_labels`."""
    return class_names(read_labels(path))


class Record(NamedTuple):
    """One row as a data file has it; fold: what the row is marked with beside its label, for choosing rows by."""

    line: int
    label: str
    text: str
    fold: str | None = None


def numbered_lines(text: str) -> Iterator[tuple[int, str]]:
    """The lines of a text with their numbers in the file, blank ones left out."""
    return ((number, line) for number, line in enumerate(LINE_END.split(text), start=1) if line.strip())


def _separated_records(path: Path, text: str) -> Iterator[Record]:
    """Lines of `label ||| text`."""
    for number, line in numbered_lines(text):
        label, separator, sentence = line.partition(SEPARATOR.rstrip())
        if not separator or not f"{sentence} ".startswith(" "):
            raise ValueError(
                f'{path}, line {number}: no "{SEPARATOR}" in {line[:60]!r}; a line is `label{SEPARATOR}sentence`'
            )
        yield Record(number, label, sentence)


def _csv_records(path: Path, text: str) -> Iterator[Record]:
    """Records of `"label","title","description"`, as the sets of arXiv 1509.01626 are published; what follows the label
    is the text, joined by spaces. A line break in it becomes a space.

    Quotes inside a field are doubled, or where that cannot be read, behind a backslash. What else a backslash is
    differs: a line break by itself in AG News, the first half of `\\n` and `\\"` in the Yelp and Amazon sets. It is the
    latter in a file where most backslashes stand before an n or a quote.
    """
    try:
        records = list(_cells(path, text))
        found = re.findall(r"\\(.?)", "\n".join(cell for _, cells in records for cell in cells[1:]), re.DOTALL)
        escapes = 2 * sum(after in ("n", '"') for after in found) > len(found)
    except ValueError:
        if '\\"' not in text:
            raise
        try:
            records = list(_cells(path, re.sub(r'\\([\\"])', lambda pair: '""' if pair[1] == '"' else pair[0], text)))
        except ValueError:
            records = []
        if not records:
            raise  # what is wrong with the file as it stands
        escapes = True
    for number, cells in records:
        joined = " ".join(cell.strip() for cell in cells[1:])
        if escapes:
            joined = re.sub(r'\\(r\\n|["n\\])', lambda pair: pair[1] if pair[1] in '"\\' else " ", joined)
        yield Record(number, cells[0], re.sub(r"\n" if escapes else r"[\\\n]", " ", joined))


def _cells(path: Path, text: str) -> Iterator[tuple[int, list[str]]]:
    """The records of a CSV that are not blank, each with the number of the line that it begins on."""
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
        raise ValueError(f"{path}, line {number}: no CSV ({error}); fields are in double quotes") from error


def _tab_records(path: Path, text: str) -> Iterator[Record]:
    """Lines of label, tab, text, and maybe more columns before or after the text: the text is the column with the most
    characters in the whole file, and the first of the others is the fold.
    """
    lines = [(number, line.split("\t")) for number, line in numbered_lines(text)]
    width = len(lines[0][1])
    for number, cells in lines:
        if len(cells) != width or width < 2:
            raise ValueError(f"{path}, line {number}: {_columns(cells, width)}; a line is `label TAB text` or more")
    sizes = [sum(len(cells[n]) for _, cells in lines) for n in range(1, width)]
    text_at = 1 + sizes.index(max(sizes))
    fold_at = next((n for n in range(1, width) if n != text_at), None)
    for number, cells in lines:
        yield Record(number, cells[0], cells[text_at], None if fold_at is None else cells[fold_at])


def _columns(cells: list[str], width: int) -> str:
    return f"{len(cells)} column{'s' * (len(cells) != 1)}" + (f", not {width} as above" if width != len(cells) else "")


# The kinds of data files, by what their names end in.
KINDS: dict[str, tuple[str, Callable[[Path, str], Iterator[Record]]]] = {
    ".csv": ("data file of `label,text` records", _csv_records),
    ".tsv": ("data file of `label TAB text` lines", _tab_records),
    "": ("data file of `label ||| sentence` lines", _separated_records),
}


def read_rows(path: str | PathLike[str], label_names: Sequence[str] | Mapping[str, str | None]) -> list[Row]:
    """The rows of a data file, not yet tokenized: lines of `label ||| sentence`, a .csv or a .tsv. `#fold=PATTERN`
    behind the path takes those rows alone whose fold matches, as file names do in a shell. A first line of column names
    is no row, if it begins with one of `HEADS`. Blank lines are left out.

    label_names: the class of each label (`read_labels`), or the names of the labels 0, 1, ...; a row's label is its
    class's position in `class_names`. Raises ValueError, naming file and line, if a line has no separator, no
    sentence, or another label, or if no row is left.
    """
    name, pattern = path_and_fold(str(path))
    file = Path(name)
    what, records = KINDS.get(file.suffix.lower(), KINDS[""])
    labels = label_names if isinstance(label_names, Mapping) else {str(n): c for n, c in enumerate(label_names)}
    ids = {name: number for number, name in enumerate(class_names(labels))}
    rows = []
    folds = set()
    first = True
    for number, label, sentence, fold in records(file, read_text(file, what).rstrip(" \r\n")):  # a tab ends a column
        is_first, first = first, False
        if pattern is not None:
            if fold is None:
                raise ValueError(f"{file} has no column beside label and text; leave out #fold={pattern}")
            folds.add(fold)
            if not fnmatchcase(fold, pattern):
                continue
        where = f"{file}, line {number}"
        if is_first and label.strip().lower() in HEADS and label.strip() not in (*labels, *labels.values()):
            continue
        found = _class_of(label.strip(), labels, where)
        if found is None:
            continue
        if not sentence.strip():
            raise ValueError(f"{where}: the sentence is empty; write one, or take the line out")
        rows.append(Row(ids[found], sentence.strip()))
    if not rows:
        some = f"; its folds are such as {', '.join(sorted(folds)[:5])}" if folds else ""
        raise ValueError(f"{path}: no row is left of it{some}")
    return rows


def _class_of(label: str, labels: Mapping[str, str | None], where: str) -> str | None:
    """The class of a label, None if its rows are left out. A number may be written in several ways: 00 is 0; and a
    class by its name. Raises ValueError if the label is unknown.
    """
    if label in labels:
        return labels[label]
    if label in labels.values():  # written as the class's name
        return label
    is_number = re.fullmatch(r"-?[0-9]{1,20}", label) is not None  # int refuses thousands of digits
    if is_number and str(int(label)) in labels:
        return labels[str(int(label))]
    classes = ["left out" if name is None else name for name in labels.values()]
    allowed = ", ".join(f"{known} ({name})" for known, name in zip(labels, classes, strict=True))
    if list(labels) == [str(n) for n in range(len(labels))]:
        allowed = f"0 to {len(labels) - 1} ({', '.join(classes)})"
    raise ValueError(
        f"{where}: label {label[:60]!r} is none of {allowed}; mend it, or give the label file that belongs to it "
        "(--label-names, for one of --ood --ood_label_names); where labels are not 0, 1, ... it is an object such as "
        '{"1": "bad", "2": "good"}'
    )


def has_gold_labels(rows: Sequence[Row]) -> bool:
    """Whether the labels can be scored against: a column with one value (CFIMDB's test set: all 0) is a placeholder."""
    return len({row.label for row in rows}) > 1


def class_labels(labels: Sequence[str] | Mapping[str, str | None]) -> list[str]:
    """The label that a data file has for each class, in the order of the class ids: the first of those that the label
    file gives it. labels: as `read_rows` takes them.
    """
    if not isinstance(labels, Mapping):
        return [str(n) for n in range(len(labels))]
    first: dict[str, str] = {}
    for label, name in labels.items():
        if name is not None:
            first.setdefault(name, label)
    return list(first.values())


def missing_classes(path: str | PathLike[str], rows: Sequence[Row], label_names: Sequence[str]) -> list[str]:
    """The names that no training row bears, for a warning.

    Raises ValueError if the last one is among them: then the names are those of another data set, with more classes.
    """
    found = {row.label for row in rows}
    if max(found) + 1 < len(label_names):
        raise ValueError(
            f"{path} has the labels {', '.join(map(str, sorted(found)))}, but --label-names has {len(label_names)} "
            f"names ({', '.join(label_names)}); give the mapping that belongs to this file"
        )
    return [name for label, name in enumerate(label_names) if label not in found]


def beginning(tokenizer: Tokenizer, ids: Sequence[int]) -> list[int]:
    """The ids before those of a text: bos if the tokenizer adds one, or if there is nothing else."""
    return [tokenizer.bos_id] if getattr(tokenizer, "adds_bos", True) or not ids else []


# Predictions


def write_predictions(
    path: str | PathLike[str],
    predictions: Sequence[int],
    rows: Sequence[Row],
    labels: Sequence[str] | Mapping[str, str | None] | None = None,
) -> None:
    """Writes `{label} ||| {sentence}` lines, atomically. predictions: class ids. labels: as `read_rows` takes them, so
    that it reads the file with the same ones; without them a class's label is its id.
    """
    written = None if labels is None else class_labels(labels)
    with atomic_file(path) as file:
        for number, row in zip(predictions, rows, strict=True):
            file.write(f"{number if written is None else written[number]}{SEPARATOR}{row.sentence}\n")
