"""Messages between the processes of the grader: a JSON header and named arrays, as a plain npz.

No pickle is read. What a student's process sends is untrusted: the length is bounded, and every size is checked before
memory is taken.
"""

from __future__ import annotations

import io
import json
import math
import os
import re
import select
import struct
import time
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np

LARGEST = 64 << 20  # bytes of the arrays of one message
MARGIN = 1 << 20  # bytes of its header
MEMBERS = 200  # arrays in one message
NAME = re.compile(r"[A-Za-z0-9_.\-]{1,100}")
KINDS = "biuf"  # bool, integers, floats
LENGTH = struct.Struct("<Q")


class BadMessage(ValueError):
    """A message that is not one of ours."""


def packed(header: Mapping[str, Any], arrays: Mapping[str, np.ndarray] | None = None) -> bytes:
    """The bytes of a message, without its length."""
    members = {f"a.{name}": np.asarray(array, order="C") for name, array in (arrays or {}).items()}
    for name, array in members.items():
        if array.dtype.kind not in KINDS:
            raise BadMessage(f"{name[2:]} holds {array.dtype}, no numbers")
    if (size := sum(array.nbytes for array in members.values())) > LARGEST:
        raise BadMessage(f"it gives {size:,} bytes, too many")
    text = np.frombuffer(json.dumps(header).encode(), np.uint8)
    out = io.BytesIO()
    np.savez(out, header=text, **members)  # type: ignore[arg-type]
    return out.getvalue()


def unpacked(raw: bytes) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Header and arrays of a message. Raises BadMessage for anything that `packed` would not write."""
    try:
        with zipfile.ZipFile(io.BytesIO(raw)) as archive:
            entries = archive.infolist()
            stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
            if len(entries) > MEMBERS or not stored or sum(entry.file_size for entry in entries) > len(raw):
                raise BadMessage("not a plain npz")
            members = {entry.filename.removesuffix(".npy"): _array(archive.read(entry)) for entry in entries}
        header = json.loads(members.pop("header").tobytes())
    except (zipfile.BadZipFile, KeyError, ValueError, EOFError, NotImplementedError, RecursionError) as error:
        raise BadMessage(f"not a message: {error}") from error
    if not isinstance(header, dict):
        raise BadMessage("the header is no object")
    arrays = {}
    for name, array in members.items():
        if not name.startswith("a.") or not NAME.fullmatch(name):
            raise BadMessage("an array has a strange name")
        arrays[name[2:]] = array
    return header, arrays


def _array(raw: bytes) -> np.ndarray:
    """The array of a .npy file's bytes, without pickle; the bytes must be exactly as many as its shape says."""
    file = io.BytesIO(raw)
    if np.lib.format.read_magic(file) != (1, 0):
        raise BadMessage("an array has an unknown format")
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
    count = math.prod(shape)
    if dtype.kind not in KINDS or dtype.hasobject or count * dtype.itemsize != len(raw) - file.tell():
        raise BadMessage("an array has a wrong size or kind")
    array = np.frombuffer(raw, dtype, count, file.tell())
    return array.reshape(shape, order="F" if fortran else "C")


def send(fd: int, raw: bytes, before: bytes = b"") -> None:
    """Writes `before`, the length, and a message."""
    rest = memoryview(before + LENGTH.pack(len(raw)) + raw)
    while rest:
        rest = rest[os.write(fd, rest) :]


def receive(fd: int, deadline: float = math.inf, before: bytes = b"") -> bytes | None:
    """The next message; None at the end of the channel. Raises TimeoutError at `deadline` (time.monotonic), BadMessage
    if it does not begin with `before`.
    """
    start = _exactly(fd, len(before) + LENGTH.size, deadline)
    if start is None:
        return None
    (length,) = LENGTH.unpack(start[len(before) :])
    if start[: len(before)] != before or length > LARGEST + MARGIN:
        raise BadMessage("something else was written to the channel")
    raw = _exactly(fd, length, deadline)
    if raw is None:
        raise BadMessage("the message is cut short")
    return raw


def _exactly(fd: int, count: int, deadline: float) -> bytes | None:
    """The next `count` bytes; None if there is none. Raises BadMessage if there are fewer."""
    parts, left = [], count
    while left:
        wait = None if deadline == math.inf else max(0.0, deadline - time.monotonic())
        if not select.select([fd], [], [], wait)[0]:
            raise TimeoutError
        part = os.read(fd, min(left, 1 << 20))
        if not part:
            if left == count:
                return None
            raise BadMessage("the message is cut short")
        parts.append(part)
        left -= len(part)
    return b"".join(parts)
