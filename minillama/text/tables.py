"""Tables of text: .csv, .tsv, .jsonl and .json files, and lines of `label ||| text`, with the columns that are read.

Imports no torch.
"""

from __future__ import annotations

import csv
import io
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

from minillama.formats.names import COLUMNS_EXAMPLE, TABLES

SEPARATOR = " ||| "
LINE_END = re.compile(r"\r{0,2}\n|\r")  # str.splitlines would also split sentences at U+0085 or U+2028

# Usual names of columns, the surest first: lower case, words separated by spaces.
LABEL_NAMES = (
    *("label", "labels", "class", "class index", "class label", "gold label", "gold", "category", "sentiment"),
    *("polarity", "stars", "star rating", "rating", "score", "target", "intent", "topic", "emotion", "tag", "y"),
)
TEXT_NAMES = (
    *("text", "sentence", "review", "review text", "reviewtext", "content", "body", "review body", "comment"),
    *("comment text", "message", "tweet", "utterance", "question", "query", "document", "article", "description"),
    *("phrase", "abstract", "summary", "headline", "title"),
)
TITLE_NAMES = ("title", "headline", "subject")  # read before the text if a table has nothing else
FOLD_NAMES = ("fold", "split")
LONGEST_NAME = 60  # characters of a column's name


class Record(NamedTuple):
    """One row of a file as text. label: None if the file has no labels; fold: a column by which rows can be selected;
    cells: all columns by name, except of lines of `label ||| text`.
    """

    line: int
    label: str | None
    text: str
    fold: str | None = None
    cells: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Table:
    """The records of a file. text, label: where they were found, in words; names: all columns; separator: of a .csv."""

    path: str
    records: list[Record]
    text: str = ""
    label: str = ""
    names: Sequence[str] = ()
    columns: dict[str, str] | None = None  # the names that were found, as for --columns
    separator: str = ","
    marked: bool = False  # whether the file begins with a byte order mark
    left_out: list[int] = field(default_factory=list)  # lines without a text

    @property
    def is_labelled(self) -> bool:
        return any(record.label is not None for record in self.records)


def numbered_lines(text: str) -> Iterator[tuple[int, str]]:
    """The non-blank lines of a text, with their numbers."""
    return ((number, line) for number, line in enumerate(LINE_END.split(text), start=1) if line.strip())


def read_table(
    path: Path, text: str, columns: Mapping[str, str] | None = None, labels: Collection[str] = (), labelled: bool = True
) -> Table:
    """The table in `text`, the content of the file `path`.

    columns: the names (or numbers from 1) of the columns that hold "text", "label" and "fold"; a text may be several
    columns, as in "title+body". Without them, columns are found by their usual names, else by position: the label
    first, as data sets are published. labels: known ones, which are no column names. labelled: whether each record
    needs a label. Raises ValueError, naming file and line.
    """
    kind = path.suffix.lower()
    if kind not in TABLES:
        if columns:
            raise ValueError(f"--columns is for {', '.join(TABLES)}; {path} is read as lines of `label{SEPARATOR}text`")
        records = list(_separated_records(path, text))
        has_head = bool(records) and _plain(str(records[0].label)) in LABEL_NAMES[:4] and records[0].label not in labels
        return Table(str(path), records[has_head:])
    if kind in (".jsonl", ".json"):
        names, rows = _objects(path, text)
        return _by_name(path, names, rows, columns or {}, labelled)
    escapes, separator = None, ","
    if kind == ".tsv":
        rows = _tab_rows(path, text, 2 if labelled else 1)
    else:
        rows, escapes, separator = _csv_rows(path, text, 2 if labelled else 1)
    first = [str(cell).strip() for cell in rows[0][1]]
    columns = columns or {}
    names = [str(n) for n in range(1, len(first) + 1)]
    has_head = _is_head(first, labels) or any(not name.isdigit() for name in columns.values())
    if not has_head and (at := _find(path, names, columns.get("label"), ())) is not None:
        has_head = first[at] not in labels and _is_odd([as_text(cells[at]).strip() for _, cells in rows])
    if has_head:
        return replace(_by_name(path, _distinct(first), rows[1:], columns, labelled), separator=separator)
    if columns:
        return replace(_by_name(path, names, rows, columns, labelled), separator=separator)
    values = [as_text(cells[0]).strip() for _, cells in rows]
    if len(names) > 1 and first[0] not in labels and (_is_odd(values) or (not labelled and set(values) - set(labels))):
        raise ValueError(f"{path} seems to have columns {_listed(first)}; say which ones to read: {COLUMNS_EXAMPLE}")
    return replace(_by_position(path, names, rows, kind, labelled, escapes), separator=separator)


# Files to rows of cells


def _separated_records(path: Path, text: str) -> Iterator[Record]:
    """Records from lines of `label ||| text`."""
    for number, line in numbered_lines(text):
        label, separator, sentence = line.partition(SEPARATOR.rstrip())
        if not separator or not f"{sentence} ".startswith(" "):
            raise ValueError(
                f'{path}, line {number}: no "{SEPARATOR}" in {line[:60]!r}; a line is `label{SEPARATOR}sentence`, and '
                f"the name of a table ends in {', '.join(TABLES)}"
            )
        if not sentence.strip():
            raise ValueError(f"{path}, line {number}: the sentence is empty; write one, or remove the line")
        yield Record(number, label.strip(), sentence.strip())


Rows = list[tuple[int, list[Any]]]  # line numbers and cells


def _tab_rows(path: Path, text: str, least: int) -> Rows:
    """At least `least` cells between tabs. Quotes are letters like others, as in GLUE's files."""
    rows: Rows = [(number, list(line.split("\t"))) for number, line in numbered_lines(text)]
    width = len(rows[0][1])
    for number, cells in rows:
        if len(cells) != width or width < least:
            raise ValueError(f"{path}, line {number}: {_columns(cells, width)}; a line is `label TAB text` or more")
    return rows


def _csv_rows(path: Path, text: str, least: int) -> tuple[Rows, bool | None, str]:
    """At least `least` cells between commas, semicolons or tabs; True if backslashes are known to be escapes; the sign
    between cells.

    Quotes inside a field are doubled, or else escaped by a backslash.
    """
    text = LINE_END.sub("\n", text)
    marked = re.match(r"sep=([,;\t])\n", text)  # Excel's own line
    start = text.find("\n") + 1 if marked else 0
    head = text[start : text.find("\n", start) + 1 or None]
    # The sign that occurs most often in the first line is the likeliest separator: its problem would be told.
    separators = [marked[1]] if marked else sorted(",;\t", key=head.count, reverse=True)
    forms: list[tuple[str, bool | None]] = [(text[start:], None)]
    if "\\" in text:  # quotes may be escaped, which the second form undoes
        doubled = re.sub(r'\\([\\"])', lambda pair: '""' if pair[1] == '"' else pair[0], text[start:])
        forms.append((doubled, True))
    found: list[tuple[Rows, bool | None, str]] = []
    error: ValueError | None = None
    for sign in separators:
        for form, escapes in forms:
            try:
                found.append((_cells(path, form, sign, 1 + bool(marked), least), escapes, sign))
                break
            except ValueError as problem:
                error = error or problem
    if not found:
        raise error or ValueError(f"{path}: no columns")

    def likelihood(one: tuple[Rows, bool | None, str]) -> tuple[bool, int, int]:
        """Names of columns speak for a separator; quotes within cells speak against it."""
        rows = one[0]
        return _is_head(rows[0][1], ()), -sum('"' in cell for _, cells in rows for cell in cells), len(rows[0][1])

    return max(found, key=likelihood)


def _cells(path: Path, text: str, separator: str, first_line: int, least: int) -> Rows:
    """The non-blank records, each with the number of its first line. Raises ValueError if their widths differ."""
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    rows: Rows = []
    width, number = 0, first_line
    csv.field_size_limit(sys.maxsize >> 33)  # a review may be longer than csv's limit of 131,072 characters
    try:
        for cells in lines:
            if any(cell.strip() for cell in cells):
                width = width or len(cells)
                if len(cells) != width or width < least:
                    remedy = "a record is `label,text` or more"
                    if len(cells) != width:
                        remedy = f'a text with "{separator}" in it needs double quotes around it'
                    raise ValueError(f"{path}, line {number}: {_columns(cells, width)}; {remedy}")
                rows.append((number, list(cells)))
            number = lines.line_num + first_line
    except csv.Error as error:
        raise ValueError(f"{path}, line {number}: not CSV ({error}); fields are in double quotes") from error
    return rows


def _columns(cells: Sequence[Any], width: int) -> str:
    return f"{len(cells)} column{'s' * (len(cells) != 1)}" + (f", not {width} as above" if width != len(cells) else "")


def _objects(path: Path, text: str) -> tuple[list[str], Rows]:
    """The keys and values of JSON objects: one on each line, or all in one list."""
    wanted = 'a line is an object such as {"text": "...", "label": "..."}'
    objects: list[tuple[int, Any]] = []
    try:
        if path.suffix.lower() == ".json" and text.lstrip().startswith("["):
            objects = list(enumerate(json.loads(text), start=1))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}); it may be a list of objects") from error
    for number, line in numbered_lines(text) if not objects else ():
        try:
            objects.append((number, json.loads(line)))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error}); {wanted}") from error
    escapes = "\\ud" in text
    for number, found in objects:
        if not isinstance(found, dict):
            raise ValueError(f"{path}, line {number}: not an object; {wanted}")
        if escapes and re.search("[\ud800-\udfff]", json.dumps(found, ensure_ascii=False)):
            raise ValueError(f"{path}, line {number}: half of a character (\\ud800 to \\udfff); remove it")
    names = list(dict.fromkeys(str(key) for _, found in objects for key in found))
    return names, [(number, [found.get(name) for name in names]) for number, found in objects]


# Columns


def _plain(name: str) -> str:
    """A column's name in lower case, its words separated by single spaces."""
    return re.sub(r"[\s_.-]+", " ", name.strip().lower())


def _is_head(cells: Sequence[str], labels: Collection[str]) -> bool:
    """Whether the cells of a first line name columns: one is a usual name, and the first is no number and no label."""
    usual = {*LABEL_NAMES, *TEXT_NAMES} - {"y"}
    first, plain = cells[0].strip(), {_plain(cell) for cell in cells}
    text_first = _plain(first) in TEXT_NAMES and bool(plain & set(LABEL_NAMES))  # even if a class has that name
    return bool(usual & plain) and not first.isdigit() and (text_first or first not in labels)


def _distinct(names: Sequence[str]) -> list[str]:
    """Names of columns, of which later ones of the same name get a number: text, text 2."""
    found: list[str] = []
    for name in names:
        again = next(new for n in count(1) if (new := name if n == 1 else f"{name} {n}") not in found)
        found.append(again)
    return found


def _is_odd(values: Sequence[str]) -> bool:
    """Whether the first value of a column is unlike the others: it may be the column's name."""
    first, *others = values
    counts = Counter(others)
    a_number = re.compile(r"[-+]?[0-9.]+")
    alone = not a_number.fullmatch(first) and len(others) >= 2 and all(a_number.fullmatch(one) for one in counts)
    return alone or (first not in counts and len(others) >= 10 and min(counts.values()) >= 2)


def _by_name(path: Path, names: list[str], rows: Rows, columns: Mapping[str, str], labelled: bool) -> Table:
    """The table whose columns are named, or numbered by `columns`."""
    if not rows:
        raise ValueError(f"{path} has names of columns ({_listed(names)}), but no row; give a file with rows")
    wanted = columns.get("label")
    if wanted is not None and not labelled and _plain(wanted) not in map(_plain, names) and not wanted.isdigit():
        columns = {part: name for part, name in columns.items() if part != "label"}  # a file without labels
    label_at = _find(path, names, columns.get("label"), LABEL_NAMES)
    others = [n for n in range(len(names)) if n != label_at]
    if "text" in columns:
        wanted = columns["text"]
        parts = [wanted] if wanted in names else wanted.split("+")
        text_at = [n for part in parts if (n := _find(path, names, part, ())) is not None]
    else:
        one = _find(path, [names[n] if n in others else "" for n in range(len(names))], None, TEXT_NAMES)
        text_at = [others[0]] if one is None and len(others) == 1 else [] if one is None else [one]
        titles = [n for n in others if _plain(names[n]) in TITLE_NAMES and n not in text_at]
        if text_at and len(others) == 2 and titles:  # a title and a text, as in AG News
            text_at = [*titles, *text_at]
    if not text_at:
        raise ValueError(f"{path} has the columns {_listed(names)}; say which ones to read: {COLUMNS_EXAMPLE}")
    if label_at is None and labelled and len(others) - len(text_at) == 1 and "label" not in columns:
        label_at = next(n for n in others if n not in text_at)
    if label_at is None and labelled:
        raise ValueError(f"{path} has the columns {_listed(names)}; say which one has the label: --columns label=NAME")
    fold_at = _find(path, names, columns.get("fold"), FOLD_NAMES)
    if len({*text_at, label_at}) <= len(text_at) and label_at is not None:
        raise ValueError(f'{path}: "{names[label_at]}" cannot be both text and label; {COLUMNS_EXAMPLE}')
    published = len(text_at) > 1 and "text" not in columns
    read = _reader(rows, text_at, None) if published else _one_line
    return _table(path, names, rows, text_at, label_at, fold_at, read)


def _by_position(path: Path, names: list[str], rows: Rows, kind: str, labelled: bool, escapes: bool | None) -> Table:
    """The table without names, in the formats of published data sets.

    .csv (arXiv 1509.01626): the label, then texts that are joined. .tsv: the label, and other columns: the one with
    the most characters is the text, the first of the rest the fold. A table with one column has texts alone.
    """
    width = len(names)
    if width == 1:
        if labelled:
            raise ValueError(f"{path}, line {rows[0][0]}: 1 column; a record has a label and a text")
        return _table(path, names, rows, [0], None, None, _one_line)
    if kind == ".csv":
        return _table(path, names, rows, list(range(1, width)), 0, None, _reader(rows, range(1, width), escapes))
    text_at = max(range(1, width), key=lambda n: sum(len(cells[n]) for _, cells in rows))
    fold_at = 1 if text_at > 1 else 2
    return _table(path, names, rows, [text_at], 0, fold_at if fold_at < width else None, _one_line)


def _find(path: Path, names: Sequence[str], wanted: str | None, usual: Sequence[str]) -> int | None:
    """The position of the column `wanted` (a name or a number from 1), or of the first of the usual names."""
    if wanted is not None:
        for how in (lambda name: name, _plain):
            if (same := [n for n, name in enumerate(names) if how(name) == how(wanted)]) and wanted.strip():
                return same[0]
        if wanted.isdigit() and 1 <= int(wanted) <= len(names):
            return int(wanted) - 1
        raise ValueError(f'{path} has no column "{wanted}"; it has {_listed(names)}')
    plain = [_plain(name) for name in names]
    return next((plain.index(name) for name in usual if name in plain), None)


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(f'"{name[:LONGEST_NAME]}"' for name in names[:12])
    return shown + (f" and {len(names) - 12} more" if len(names) > 12 else "")


def _one_line(text: str) -> str:
    """A text with spaces instead of line breaks, also those of HTML."""
    return re.sub(r"(\n|\r|<br\s*/?>)+", " ", text)


def _reader(rows: Rows, text_at: Sequence[int], escapes: bool | None) -> Callable[[str], str]:
    """How a published CSV is read: line breaks and backslashes become spaces.

    escapes: whether backslashes are escapes, as in the Yelp and Amazon sets; None: if most of them precede n or ".
    Otherwise each means a line break, as in AG News.
    """
    found = re.findall(r"\\(.?)", "\n".join(str(cells[n]) for _, cells in rows for n in text_at), re.DOTALL)
    if not escapes and 2 * sum(after in ("n", '"') for after in found) <= len(found):
        return lambda text: _one_line(text.replace("\\", " "))
    unescaped = re.compile(r'\\(r\\n|["n\\])')
    return lambda text: _one_line(unescaped.sub(lambda pair: pair[1] if pair[1] in '"\\' else " ", text))


def _table(
    path: Path,
    names: list[str],
    rows: Rows,
    text_at: Sequence[int],
    label_at: int | None,
    fold_at: int | None,
    read: Callable[[str], str],
) -> Table:
    """The records of the rows. Rows without a text are left out."""
    records, left_out = [], []
    for number, cells in rows:
        for n in text_at:
            if isinstance(cells[n], (dict, list)):
                raise ValueError(
                    f'{path}, line {number}: "{names[n]}" is no text; give another column: {COLUMNS_EXAMPLE}'
                )
        text = read(" ".join(as_text(cells[n]).strip() for n in text_at)).strip()
        if not text:
            left_out.append(number)
            continue
        label = None if label_at is None else as_text(cells[label_at]).strip() or None
        if label is not None and (whole := re.fullmatch(r"(-?[0-9]+)\.0+", label)):
            label = whole[1]  # a spreadsheet or pandas made 3.0 of 3
        fold = None if fold_at is None else as_text(cells[fold_at])
        records.append(Record(number, label, text, fold, dict(zip(names, cells, strict=True))))
    shown = [f'"{names[n]}"' if not names[n].isdigit() else f"column {names[n]}" for n in range(len(names))]
    where = "" if label_at is None else shown[label_at]
    found = {"text": "+".join(names[n] for n in text_at)} | ({} if label_at is None else {"label": names[label_at]})
    columns = None if any(name.isdigit() for name in found.values()) else found
    return Table(str(path), records, " + ".join(shown[n] for n in text_at), where, names, columns, left_out=left_out)


def as_text(value: Any) -> str:
    """A cell as text: "" for null, true and false as JSON writes them."""
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
