"""Packs the hand-in zip, or checks one: `python prepare_submit.py ID [--folder DIR] [--out ID.zip] [--check ZIP]`.

--edition says for which course: its prediction files and its size.
"""

from __future__ import annotations

import os
import re
import stat
import sys
import tempfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from fetch_data import COURSE_DATA
from minillama.cli.display import displayed
from minillama.cli.parser import OneLineParser
from minillama.cli.provenance import PROMPT, find_record
from minillama.environment import file_sha256

SIZE_LIMIT = 10_000_000  # bytes: the stricter meaning of "under 10 MB"
UNPACKED_LIMIT = 100_000_000  # bytes; a zip that claims more is not unpacked
SHOWN = 40  # problems printed at most
CODE = ("run_llama.py", "llama.py", "optimizer.py", "classifier.py", "rope.py")
PACKAGE = "minillama"
GENERATED = ("generated-sentence-temp-0.txt", "generated-sentence-temp-1.txt")
LABELS = {"sst": 5, "cfimdb": 2}  # data set: number of its labels
FORBIDDEN_FOLDERS = {"__pycache__", "data", "runs", "tests", "venv"}  # and all names that begin with a dot
FORBIDDEN_SUFFIXES = {".bin", ".ckpt", ".data", ".model", ".npy", ".npz", ".pt", ".pth", ".pyc", ".safetensors", ".zip"}
SOURCE_DATA = re.compile(r"(sst|cfimdb)-(train|dev|test)\.txt")
PREDICTIONS = re.compile(r"(sst|cfimdb)-(dev|test)-(prompting|finetuning|lora|advanced)-output\.txt")
ROW = re.compile(r"([0-9]{1,9}) \|\|\| (.*)", re.DOTALL)
LINE_END = re.compile(r"\r{0,2}\n|\r")  # as in minillama/text/labelled.py, which would import torch


class Edition(NamedTuple):
    """The demands of an edition: kinds of prediction files; the largest zip in bytes, None: SIZE_LIMIT."""

    kinds: tuple[str, ...]
    most_bytes: int | None = None

    def size_problem(self, size: int) -> str | None:
        """Why a zip of this size is too large; None if it is not."""
        if self.most_bytes is None:
            return f"it must stay under {SIZE_LIMIT:,}" if size >= SIZE_LIMIT else None
        return f"it may have {self.most_bytes:,} at most" if size > self.most_bytes else None


EDITIONS = {
    "2024": Edition(("prompting", "finetuning")),
    "fall2025": Edition(("prompting", "finetuning", "lora")),
    "spring2026": Edition(("prompting",), most_bytes=15_000_000),  # its addition task has no file of a fixed name
}
DEFAULT_EDITION = "fall2025"
STUDENT_ID = re.compile(r"[a-z0-9_-]+")  # also the name of the top folder


class Rejected(Exception):
    """Refusal of a hand-in; `args` are its problems."""


def required_outputs(edition: str = DEFAULT_EDITION) -> dict[str, str]:
    """The text files that an edition requires, each with the command that makes it."""
    outputs = dict.fromkeys(GENERATED, "python run_llama.py --option generate")
    for corpus in LABELS:
        training = f"--epochs 5 --lr 2e-5 --batch_size {80 if corpus == 'sst' else 10}"
        sources = " ".join(f"--{split} data/{corpus}-{split}.txt" for split in ("train", "dev", "test"))
        sources += f" --label-names data/{corpus}-label-mapping.json"
        for option, kind, settings in (
            ("prompt", "prompting", "--batch_size 10"),
            ("finetune", "finetuning", training),
            ("lora", "lora", f"{training} --lora_rank 4 --lora_alpha 1.0"),
        ):
            if kind not in EDITIONS[edition].kinds:
                continue
            dev, test = (f"{corpus}-{split}-{kind}-output.txt" for split in ("dev", "test"))
            command = f"python run_llama.py --option {option} {settings} {sources} --dev_out {dev} --test_out {test}"
            outputs |= {dev: command, test: command}
    return outputs


def prediction_problem(name: str, text: str, data: Path) -> str | None:
    """The first problem of a prediction file. Its sentences are compared with the source file in `data`, if any."""
    corpus, split, kind = name.split("-")[:3]
    sentences = []
    for number, line in enumerate(text.removesuffix("\n").split("\n"), 1):  # splitlines() would split sentences
        row = ROW.fullmatch(line)
        if row is None:
            return f"{name}, line {number}: {line[:60]!r} is not '{{label}} ||| {{sentence}}' with a whole-number label"
        if int(row[1]) >= LABELS[corpus]:
            return f"{name}, line {number}: label {row[1]}; the labels of {corpus} are 0 to {LABELS[corpus] - 1}"
        sentences.append(row[2].strip())
    source = data / f"{corpus}-{split}.txt"
    if not source.is_file():
        return None
    rows = [line for line in LINE_END.split(source.read_bytes().decode("utf-8-sig", "replace")) if line.strip()]
    if len(rows) != len(sentences):
        return f"{name} has {len(sentences)} rows, {source} has {len(rows)}; predict the whole file"
    for number, (row_text, sentence) in enumerate(zip(rows, sentences, strict=True), 1):
        expected = row_text.partition(" ||| ")[2].strip()
        if sentence != expected and not (kind == "prompting" and sentence.startswith(expected + PROMPT)):
            return f"{name}, line {number}: {sentence[:40]!r} is not the sentence of {source}, {expected[:40]!r}"
    return None


def content_problems(files: Mapping[str, bytes], data: Path, edition: str = DEFAULT_EDITION) -> list[str]:
    """Problems of all missing and malformed files of a hand-in. files: content by name."""
    problems = [f"missing {name}, a module of the project" for name in CODE if name not in files]
    imports_package = any(f"from {PACKAGE}".encode() in files.get(name, b"") for name in CODE)
    if imports_package and not any(name.startswith(f"{PACKAGE}/") for name in files):
        problems.append(f"missing {PACKAGE}/, which the modules import")
    missing: dict[str, list[str]] = {}
    required = required_outputs(edition)
    for name, command in required.items():
        if name not in files:
            missing.setdefault(command, []).append(name)
    problems += [f"missing {', '.join(names)}; make it: {command}" for command, names in missing.items()]
    for name, raw in files.items():
        try:
            text = raw.decode("utf-8") if name.endswith(".txt") else ""
        except UnicodeDecodeError as error:
            problems.append(f"{name} is not UTF-8 text: {error}; save it as UTF-8")
            continue
        if not raw.strip() and (name in CODE or name.endswith((".txt", ".pdf"))):
            problems.append(f"{name} is empty")
        elif PREDICTIONS.fullmatch(name) and (problem := prediction_problem(name, text, data)):
            record = find_record(data.parent, name, raw)
            source = f"; it was made from {record['data']}" if record is not None and record.get("data") else ""
            problems.append(f"{problem}{source}; make it: {required.get(name, 'as before')}")
    return problems


def member_problem(info: zipfile.ZipInfo) -> str | None:
    """The problem of an entry's path or type in a zip; None without one."""
    parts = info.filename.rstrip("/").split("/")
    if parts[0] == "" or "\\" in info.filename or ":" in parts[0]:
        return f"{info.filename!r} is an absolute or a Windows path"
    if ".." in parts or "." in parts:
        return f"{info.filename!r} points outside its folder"
    if stat.S_ISLNK(info.external_attr >> 16):
        return f"{info.filename!r} is a symbolic link"
    if info.flag_bits & 1 or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return f"{info.filename!r} is encrypted or packed in an unusual way"
    hidden = any(part.startswith(".") for part in parts)
    data = Path(parts[-1].lower()).suffix in FORBIDDEN_SUFFIXES or SOURCE_DATA.fullmatch(parts[-1])
    if hidden or data or FORBIDDEN_FOLDERS & set(parts[1:]):
        return f"{info.filename!r} must not be in it: no data, weights, caches, tests or git folder"
    if len(parts) < 2 and not info.is_dir():
        return f"{info.filename!r} is outside the top folder"
    report = f"{parts[0]}/{parts[0]}-report.pdf"
    if info.filename.lower().endswith(".pdf") and info.filename != report:
        return f"{info.filename!r} must not be in it: the only PDF is {report}"
    return None


def check(path: Path, student: str | None, data: Path, edition: str = DEFAULT_EDITION) -> list[zipfile.ZipInfo]:
    """The files of the hand-in zip at `path`. student: its id; None accepts any. Raises Rejected with all problems."""
    if not path.is_file():
        raise Rejected(f"there is no file {path}")
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            problems = [problem for info in entries if (problem := member_problem(info))]
            size = path.stat().st_size
            if too_large := EDITIONS[edition].size_problem(size):
                largest = max(entries, key=lambda info: info.compress_size, default=None)
                what = f"; {largest.filename} takes {largest.compress_size:,}" if largest else ""
                problems.append(f"the zip has {size:,} bytes; {too_large}{what}")
            folders = sorted({info.filename.split("/")[0] for info in entries})
            if len(folders) != 1:
                problems.append(f"it must hold one top folder, not {len(folders)}: {', '.join(folders[:5])}")
            elif student is not None and folders[0] != student:
                problems.append(f"its top folder is {folders[0]!r}, not {student!r}")
            elif not STUDENT_ID.fullmatch(folders[0]):
                problems.append(f"its top folder {folders[0]!r} is not an id: lowercase letters, digits, _ and - only")
            if twice := [name for name, count in Counter(info.filename for info in entries).items() if count > 1]:
                problems.append(f"it holds {', '.join(twice[:5])} more than once")
            if (unpacked := sum(info.file_size for info in entries)) > UNPACKED_LIMIT:
                problems.append(f"it unpacks to {unpacked:,} bytes")
            if problems:
                raise Rejected(*problems)
            files = [info for info in entries if not info.is_dir()]
            contents = {info.filename.partition("/")[2]: archive.read(info) for info in files}
    except (zipfile.BadZipFile, NotImplementedError, EOFError, ValueError, zlib.error) as error:
        raise Rejected(f"{path} is not a valid zip: {error}") from error
    if problems := content_problems(contents, data, edition):
        raise Rejected(*problems)
    return files


def pack(student: str, folder: Path, out: Path, edition: str = DEFAULT_EDITION) -> list[zipfile.ZipInfo]:
    """Writes the zip of `folder` to `out`, the same bytes for the same files. Raises Rejected with all problems."""
    package = [path for path in (folder / PACKAGE).rglob("*") if path.suffix in (".py", ".css", ".html", ".js")]
    code = [path.relative_to(folder) for path in (*folder.glob("*.py"), *package)]
    hidden = [path for path in code if any(part.startswith(".") or part in FORBIDDEN_FOLDERS for part in path.parts)]
    wanted = [path.as_posix() for path in code if path not in hidden]
    wanted += [f"{corpus}-{split}-advanced-output.txt" for corpus in LABELS for split in ("dev", "test")]
    wanted += [*required_outputs(edition), "feedback.txt", f"{student}-report.pdf"]
    contents = {name: (folder / name).read_bytes() for name in sorted(wanted) if (folder / name).is_file()}
    if problems := content_problems(contents, folder / "data", edition):
        raise Rejected(*problems)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as temporary:
        part = Path(temporary) / out.name
        with zipfile.ZipFile(part, "w") as archive:
            for name, raw in contents.items():
                info = zipfile.ZipInfo(f"{student}/{name}", date_time=(1980, 1, 1, 0, 0, 0))
                info.compress_type, info.create_system = zipfile.ZIP_DEFLATED, 3
                info.external_attr = (stat.S_IFREG | 0o644) << 16
                archive.writestr(info, raw)
        files = check(part, student, folder / "data", edition)
        os.replace(part, out)
    return files


def find_records(path: Path, files: list[zipfile.ZipInfo], folder: Path) -> dict[str, dict[str, Any] | None]:
    """The record of each prediction file and generated text, from `folder`, by its name in the zip; None if missing."""
    found = {}
    with zipfile.ZipFile(path) as archive:
        for info in files:
            name = info.filename.partition("/")[2]
            if PREDICTIONS.fullmatch(name) or name in GENERATED:
                found[info.filename] = find_record(folder, name, archive.read(info))
    return found


def origin_problems(name: str, record: Mapping[str, Any] | None, data: Path) -> list[str]:
    """Warnings about a record: a model other than the course's, or data other than the file's name says."""
    if record is None:
        return ["no record of its origin: it was changed by hand, copied from elsewhere, or made by an older version"]
    problems = []
    if record.get("bundled_model"):
        missing = ", because the course's was missing" if record.get("model_substituted") else ""
        problems.append(f"made by the bundled model{missing}; `python fetch_data.py` brings stories42M.pt")
    if parts := PREDICTIONS.fullmatch(name):
        source = f"{parts[1]}-{parts[2]}.txt"
        expected = {COURSE_DATA[source], file_sha256(data / source)}
        if record.get("data_sha256") not in expected - {None}:
            rows = f" ({record['rows']} rows)" if record.get("rows") else ""
            problems.append(f"predicted from {record.get('data')}{rows}, which is not the course's {source}")
    return problems


def print_table(
    path: Path, files: list[zipfile.ZipInfo], records: Mapping[str, Mapping[str, Any] | None], edition: str
) -> None:
    """Prints the files of the zip at `path`: sizes in bytes, and the model that made each prediction file."""
    width = max(len(info.filename) for info in files)
    print(f"{'file':<{width}}  {'bytes':>11}  {'packed':>11}  made from")
    for info in files:
        source = ""
        if record := records.get(info.filename):
            bundled = " (bundled)" if record.get("bundled_model") else ""
            accuracy = record.get("accuracy")
            score = f", accuracy {accuracy:.3f}" if isinstance(accuracy, float) else ""
            source = f"  {Path(str(record.get('checkpoint'))).name}{bundled}{score}"
        elif info.filename in records:
            source = "  no record"
        print(f"{info.filename:<{width}}  {info.file_size:>11,}  {info.compress_size:>11,}{source}")
    limit = EDITIONS[edition].most_bytes or SIZE_LIMIT
    print(f"{path}: {len(files)} files, {path.stat().st_size:,} bytes, within the limit of {limit:,}")


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns 0, or 2 if the hand-in or an option is wrong."""
    return displayed(pack_or_check, arguments)


def pack_or_check(arguments: list[str] | None) -> int:
    """Packs or checks a zip and prints its table; returns the exit status."""
    parser = OneLineParser(prog="prepare_submit.py", description="Pack the hand-in zip and check it.")
    parser.add_argument("student", metavar="ID", nargs="?", help="your id in lowercase; names the zip's top folder")
    parser.add_argument("--folder", type=Path, default=Path("."), metavar="DIR", help="the project (default: here)")
    parser.add_argument("--out", type=Path, metavar="ZIP", help="the zip to write (default: ID.zip)")
    parser.add_argument("--check", type=Path, metavar="ZIP", help="check this zip and write nothing")
    which = "for which course (default: %(default)s)"
    parser.add_argument("--edition", choices=EDITIONS, default=DEFAULT_EDITION, help=which)
    options = parser.parse_args(arguments)
    if options.student is None and options.check is None:
        parser.error("give your ID, or --check ZIP")
    if options.student is not None and not STUDENT_ID.fullmatch(options.student):
        parser.error(f"the ID {options.student!r} may hold lowercase letters, digits, _ and - only")
    if not options.folder.is_dir():
        parser.error(f"--folder {options.folder}: there is no such folder")
    if options.check is not None and options.out is not None:
        parser.error("--check writes nothing; leave out --out")
    path = options.check or options.out or Path(f"{options.student}.zip")
    if options.check is None and (path.suffix != ".zip" or path.is_dir() or not path.parent.is_dir()):
        parser.error(f"--out {path}: it must name a file that ends in .zip, in a folder that exists")
    try:
        if options.check is not None:
            files = check(path, options.student, options.folder / "data", options.edition)
        else:
            files = pack(options.student, options.folder, path, options.edition)
        records = find_records(path, files, options.folder)
        for full_name, record in records.items():
            if problems := origin_problems(full_name.partition("/")[2], record, options.folder / "data"):
                print(f"{parser.prog}: warning: {full_name}: {'; '.join(problems)}", file=sys.stderr)
        print_table(path, files, records, options.edition)
    except Rejected as rejected:
        more = [f"and {len(rejected.args) - SHOWN} more problems"] if len(rejected.args) > SHOWN else []
        for problem in (*rejected.args[:SHOWN], *more):
            print(f"{parser.prog}: error: {problem}", file=sys.stderr)
        return 2
    except OSError as error:
        parser.error(f"{error.filename or path}: {error.strerror or error}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
