"""Hand-ins: folders, zips of one student, and Canvas's zips of a class.

A zip is unpacked into a temporary folder, and only files that a grader reads: Python, and small texts. Paths that lead
outside, links and archives that unpack to too much are refused.
"""

from __future__ import annotations

import hashlib
import re
import stat
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from minillama.grading.sandbox import judged_files, kept

MODULES = ("llama.py", "rope.py", "optimizer.py", "classifier.py", "lora.py")
KEPT = (".py", ".json", ".txt", ".css", ".html", ".js")
LARGEST = 200 << 20  # bytes that a zip may unpack to
LARGEST_FILE = 2 << 20
MOST = 5000  # entries of a zip
DEEPEST = 4  # folders above the modules
# Canvas names a file NAME_12345_67890_original.zip, with LATE after the name if it came late.
CANVAS = re.compile(r"([^_]+)(?:_LATE)?_\d+_\d+_.+", re.IGNORECASE)


class BadHandIn(ValueError):
    """A hand-in that cannot be judged, with the reason."""


class HandIn(NamedTuple):
    """A hand-in. problem: why it cannot be judged, if so; then folder is None."""

    name: str
    folder: Path | None
    problem: str = ""


def hand_ins(path: Path, into: Path) -> Iterator[HandIn]:
    """The hand-ins at a path: a folder or zip of one student, or of many. Zips are unpacked below `into`.

    Raises BadHandIn if there is none.
    """
    if path.is_dir():
        folder = path
    elif path.is_file() and zipfile.is_zipfile(path):
        folder = unpack(path, into / f"{len(list(into.iterdir()))}")
    else:
        wrong = "it is neither a folder nor a zip" if path.exists() else "there is no such folder or zip"
        raise BadHandIn(f"{path}: {wrong}")
    if (found := modules_folder(folder)) is not None:
        yield HandIn(student_name(path), found)
        return
    inner = sorted(child for child in folder.iterdir() if kept(child.name) and not child.is_symlink())
    if len(inner) == 1 and inner[0].is_dir():  # a zip often holds one folder
        inner = sorted(child for child in inner[0].iterdir() if kept(child.name) and not child.is_symlink())
    several = [child for child in inner if child.is_dir() or child.suffix.lower() == ".zip"]
    if not several:
        raise BadHandIn(f"{path}: it holds none of {', '.join(MODULES)}, and no folders or zips of students")
    for child in several:
        yield one_hand_in(child, into)


def one_hand_in(path: Path, into: Path) -> HandIn:
    """The hand-in of one student in a class."""
    name = student_name(path)
    try:
        folder = path if path.is_dir() else unpack(path, into / f"{len(list(into.iterdir()))}")
    except BadHandIn as error:
        return HandIn(name, None, str(error))
    found = modules_folder(folder)
    return HandIn(name, found, "" if found else f"it holds none of {', '.join(MODULES)}")


def modules_folder(top: Path) -> Path | None:
    """The folder that holds the modules: `top`, or the only way down from it."""
    folder = top
    for _ in range(DEEPEST):
        if any((folder / name).is_file() for name in MODULES):
            return folder
        inner = [child for child in folder.iterdir() if child.is_dir() and not child.is_symlink() and kept(child.name)]
        inner = [child for child in inner if child.name != "__MACOSX"]
        if len(inner) != 1:
            return None
        folder = inner[0]
    return None


def student_name(path: Path) -> str:
    """The student's name out of a file's: Canvas's first part, or the stem."""
    stem = path.resolve().name.removesuffix(".zip").removesuffix(".ZIP")
    found = CANVAS.fullmatch(path.name)
    return found[1] if found else stem


def unpack(path: Path, into: Path) -> Path:
    """Unpacks the readable files of a zip into the new folder `into`. Raises BadHandIn."""
    into.mkdir()
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            if len(entries) > MOST or sum(entry.file_size for entry in entries) > LARGEST:
                raise BadHandIn(f"{path.name}: it has more than {MOST} entries or unpacks to more than 200 MB")
            for entry in entries:
                if target := place_of(entry, path, into):
                    with archive.open(entry) as source:
                        raw = source.read(LARGEST + 1 if target.suffix == ".zip" else LARGEST_FILE + 1)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(raw)
    except (zipfile.BadZipFile, NotImplementedError, EOFError, RuntimeError, OSError, zlib.error) as error:
        raise BadHandIn(f"{path.name}: the zip cannot be read: {error}") from error
    return into


def place_of(entry: zipfile.ZipInfo, path: Path, into: Path) -> Path | None:
    """Where an entry of a zip goes; None for one that is left out. Raises BadHandIn for a path that leads outside."""
    name = PurePosixPath(entry.filename)
    if name.is_absolute() or ".." in name.parts or "\\" in entry.filename or ":" in entry.filename.split("/")[0]:
        raise BadHandIn(f"{path.name}: its entry {entry.filename[:80]!r} leads outside its folder")
    suffix = name.suffix.lower()
    hidden = any(part == "__MACOSX" or not kept(part) for part in name.parts)
    if entry.is_dir() or hidden or stat.S_ISLNK(entry.external_attr >> 16):
        return None
    if suffix == ".zip" or (suffix in KEPT and entry.file_size <= LARGEST_FILE):
        return into / name
    return None


def fingerprint(folder: Path) -> str:
    """A checksum of the files that are judged."""
    total = hashlib.sha256()
    for path in judged_files(folder):
        total.update(f"{path.relative_to(folder)}\0{path.stat().st_size}\0".encode())
        total.update(path.read_bytes())
    return total.hexdigest()
