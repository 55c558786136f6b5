"""Files, read and written safely: nothing in them is executed, none is left half written."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from os import PathLike
from pathlib import Path
from typing import IO, Any

import safetensors
import torch
from torch import Tensor

from config import shown

WEIGHT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Modules that hold a model, or one of its layers, as their only part: DDP, torch.compile, FSDP, activation checkpoints.
WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"}
SAFETENSORS_DTYPES = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.float64: "F64"}


def read_torch(path: Path, mapped: bool = False) -> Any:
    """The content of a torch file: tensors and plain values, nothing that runs. `mapped`: read a tensor's bytes only as
    it is used, where the file allows. Raises ValueError for all else.
    """
    try:
        with path.open("rb") as file:
            # What torch wrote before 1.6 is no zip file and cannot be mapped; and by this name it would read another
            # format, whatever the content.
            if mapped and file.read(4) == b"PK\x03\x04" and path.suffix != ".safetensors" and _is_stored(path):
                return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            file.seek(0)
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is refused: unpickling it would run code, or it is damaged; "
            "a checkpoint holds tensors and plain values only"
        ) from error
    except Exception as error:  # damage surfaces anywhere in torch's reader: struct.error, AssertionError, OSError, ...
        raise ValueError(f"{path} is damaged or cut short; fetch or copy it again") from error


def is_torch(head: bytes) -> bool:
    """Whether a file that begins so is one that torch writes, or wrote before 1.6."""
    return head.startswith((b"PK\x03\x04", b"\x80"))


def _is_stored(path: Path) -> bool:
    """Whether a zip file's entries stand in it as they are, as torch writes them, and not compressed."""
    with zipfile.ZipFile(path) as archive:
        return all(entry.compress_type == zipfile.ZIP_STORED for entry in archive.infolist())


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises ValueError if it holds anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: it holds no JSON; fetch or copy it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds {shown(content)}; it must be a JSON object")
    return content


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes a JSON object, indented, atomically."""
    with atomic_file(path) as file:
        json.dump(content, file, indent=2)
        file.write("\n")


def unwrapped(path: Path, names: Iterable[str]) -> dict[str, str]:
    """Each name of a file's tensors with its name in the bare model, without what wrappers put into it. Raises
    ValueError if two names become the same.
    """
    plain: dict[str, str] = {}
    seen: dict[str, str] = {}
    for name in names:
        *parts, last = name.split(".")
        plain[name] = ".".join([*(part for part in parts if part not in WRAPPERS), last])
        if (other := seen.setdefault(plain[name], name)) != name:
            raise ValueError(
                f"{path} holds {shown(other)} and {shown(name)}, which are one tensor; save the model anew"
            )
    return plain


def weights_of(path: Path, tensors: dict[Any, Any]) -> dict[str, Tensor]:
    """The tensors by the names of the bare model (`unwrapped`), if all are weights under names. Raises ValueError for
    integers, lists, sparse tensors, two names of one tensor, ...
    """
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor) or tensor.dtype not in WEIGHT_DTYPES:
            raise ValueError(f"{path} holds {shown(name)}, which is no tensor of weights")
        if not is_dense(tensor):
            raise ValueError(f"{path} holds {shown(name)}, which is sparse or has no data; save it dense")
    plain = unwrapped(path, tensors)
    return {plain[name]: tensor for name, tensor in tensors.items()}


def is_dense(tensor: Tensor) -> bool:
    """Whether a tensor read from a file has one shape and a value for each of its places: not sparse, not nested, not
    on the device "meta", no value standing for many places.
    """
    plain = tensor.layout == torch.strided and tensor.device.type == "cpu" and not tensor.is_nested
    return plain and tensor.nbytes <= tensor.untyped_storage().nbytes()


def read_safetensors(path: Path, names: Iterable[str] | None = None) -> dict[str, Tensor]:
    """The tensors of a file, or those of the names given; mapped, so that one's bytes are read as it is used. Raises
    ValueError if the file is damaged or has no such name.
    """
    with _safe_open(path) as file:
        return {name: file.get_tensor(name) for name in (file.keys() if names is None else names)}


def safetensors_names(path: Path) -> list[str]:
    """The names of a file's tensors. Raises ValueError if it is damaged."""
    with _safe_open(path) as file:
        return list(file.keys())


def safetensors_metadata(path: Path) -> dict[str, str]:
    """The texts that a safetensors file says of itself. Raises ValueError if it is damaged."""
    with _safe_open(path) as file:
        return file.metadata() or {}


@contextmanager
def _safe_open(path: Path) -> Iterator[Any]:
    try:
        with safetensors.safe_open(path, "pt") as file:
            yield file
    except (safetensors.SafetensorError, TypeError) as error:
        raise ValueError(f"{path} is damaged or cut short; fetch or copy it again") from error


def is_safetensors(head: bytes, size: int) -> bool:
    """Whether a file of `size` bytes that begins with `head` has the form of one: a length, then JSON."""
    return len(head) > 8 and head[8:9] == b"{" and struct.unpack_from("<Q", head)[0] < size


def write_safetensors_file(path: str | PathLike[str], tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Writes tensors atomically, one after the other, so that no second copy of them is in memory.

    The library puts the metadata in an order of chance; here the same model is the same bytes
    (format: github.com/huggingface/safetensors).
    """
    header: dict[str, Any] = {"__metadata__": metadata}
    offset = 0
    for name, tensor in sorted(tensors.items()):
        behind = offset + tensor.numel() * tensor.element_size()
        kind = SAFETENSORS_DTYPES[tensor.dtype]
        header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [offset, behind]}
        offset = behind
    encoded = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    encoded = encoded.ljust(-(-len(encoded) // 8) * 8)
    with atomic_file(path, "wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for _, tensor in sorted(tensors.items()):
            file.write(raw_bytes(tensor))


def raw_bytes(tensor: Tensor) -> memoryview:
    """A tensor's numbers as they stand in memory, little-endian as files have them."""
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data


def write_torch(path: str | PathLike[str], content: dict[str, Any]) -> None:
    """torch.save, atomically. Raises OSError if the disk is full."""
    try:
        with atomic_file(path, "wb") as file:
            torch.save(content, file)
    except RuntimeError as error:
        # torch's writer, as it closes, covers up why it could not write with an error of its own.
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


@contextmanager
def atomic_file(path: str | PathLike[str], mode: str = "w") -> Iterator[IO[Any]]:
    """Opens a temporary file beside `path` that takes its place when the block ends; on an error nothing is touched."""
    target = Path(os.path.realpath(path))  # a link keeps pointing where it points
    encoding = None if "b" in mode else "utf-8"
    if os.path.exists(path) and not os.path.isfile(path):  # a device or a pipe is written to, never replaced
        with open(path, mode, encoding=encoding) as device:
            yield device
        return
    descriptor, temporary = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent)
    try:
        with open(descriptor, mode, encoding=encoding, newline=None if "b" in mode else "\n") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp makes files that only their owner can read
        os.replace(temporary, target)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise


@contextmanager
def atomic_folder(path: str | PathLike[str]) -> Iterator[Path]:
    """Makes a folder that gets the name `path` when the block ends; on an error nothing is left. Raises FileExistsError
    if there is something at `path`.
    """
    check_free(path)
    target = Path(path)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent))
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o777 & ~umask)  # mkdtemp makes folders that only their owner can read
        os.replace(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def check_free(path: str | PathLike[str]) -> None:
    """Raises OSError unless a folder could be made at `path`."""
    if os.path.lexists(path):
        raise FileExistsError(f"{path} is there already; give the name of a new folder")
    check_writable(path)


def link_or_copy(source: Path, target: str | PathLike[str]) -> None:
    """Makes the file at `source` known at `target`, too, atomically; a copy where the file system knows no links."""
    if os.path.exists(target) and os.path.samefile(source, target):
        return
    place = Path(os.path.realpath(target))
    # In a folder of its own, for a link needs a name that is free, and another run may have the same target.
    with tempfile.TemporaryDirectory(prefix=f".{place.name}.", suffix=".tmp", dir=place.parent) as folder:
        temporary = Path(folder) / "file"
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)
        os.replace(temporary, place)


def check_writable(*paths: str | PathLike[str]) -> None:
    """Raises OSError, naming the path, unless a file could be written at every one of `paths`. Touches none of them."""
    for path in map(Path, paths):
        folder = path.parent
        if not folder.is_dir():
            raise FileNotFoundError(f"{path}: there is no folder {folder}; make it first (mkdir -p {folder})")
        if path.is_dir():
            raise IsADirectoryError(f"{path} is a folder; give the name of a file to write")
        try:
            with tempfile.NamedTemporaryFile(prefix=f".{path.name}.", suffix=".tmp", dir=folder):
                pass  # under the kind of name that atomic_file takes, which may be too long
        except OSError as error:
            raise PermissionError(f"{path} cannot be written: {error.strerror}; choose another folder") from error
