"""File access: reads without executing anything, and writes atomically."""

from __future__ import annotations

import ctypes
import json
import os
import pickle
import shutil
import struct
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from os import PathLike
from pathlib import Path
from typing import IO, Any

import numpy as np
import safetensors
import torch
from torch import Tensor

from config import shown

WEIGHT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Attributes of wrappers for the wrapped model or layer: DDP, torch.compile, FSDP, activation checkpoints.
WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"}
SAFETENSORS_DTYPES = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.float64: "F64"}


def read_torch(path: Path, mapped: bool = False) -> Any:
    """The content of a torch file: tensors and plain values. Raises ValueError if it is damaged or contains code.

    mapped: memory-map the tensors if possible, so that bytes are read when they are used.
    """
    try:
        with path.open("rb") as file:
            # Only a zip can be mapped (torch 1.6 or later). torch would read a file with this suffix as safetensors.
            if mapped and file.read(4) == b"PK\x03\x04" and path.suffix != ".safetensors" and _is_stored(path):
                return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            file.seek(0)
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is refused: unpickling it would run code, or it is damaged; "
            "a checkpoint holds tensors and plain values only"
        ) from error
    except Exception as error:  # a damaged file raises many kinds: struct.error, AssertionError, OSError, ...
        raise ValueError(f"{path} is damaged or cut short; fetch or copy it again") from error


def is_torch(head: bytes) -> bool:
    """Whether a file with these first bytes is torch's: a zip, or the pickle of versions before 1.6."""
    return head.startswith((b"PK\x03\x04", b"\x80"))


def _is_stored(path: Path) -> bool:
    """Whether a zip file's entries are uncompressed, as torch writes them."""
    with zipfile.ZipFile(path) as archive:
        return all(entry.compress_type == zipfile.ZIP_STORED for entry in archive.infolist())


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises ValueError if it holds anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: it is not valid JSON; fetch or copy it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds {shown(content)}; it must be a JSON object")
    return content


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes a JSON object, indented, atomically."""
    with atomic_file(path) as file:
        json.dump(content, file, indent=2)
        file.write("\n")


def unwrapped(path: Path, names: Iterable[str]) -> dict[str, str]:
    """A mapping from tensor names to the names without `WRAPPERS`. Raises ValueError if two become the same."""
    plain: dict[str, str] = {}
    seen: dict[str, str] = {}
    for name in names:
        *parts, last = name.split(".")
        plain[name] = ".".join([*(part for part in parts if part not in WRAPPERS), last])
        if (other := seen.setdefault(plain[name], name)) != name:
            raise ValueError(f"{path} holds {shown(other)} and {shown(name)}, which are one tensor; save it again")
    return plain


def weights_of(path: Path, tensors: dict[Any, Any]) -> dict[str, Tensor]:
    """The tensors by their `unwrapped` names. Raises ValueError unless all are dense floating-point tensors."""
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor) or tensor.dtype not in WEIGHT_DTYPES:
            raise ValueError(f"{path} holds {shown(name)}, which is not a tensor of weights")
        if not is_dense(tensor):
            raise ValueError(f"{path} holds {shown(name)}, which is sparse or has no data; save it dense")
    plain = unwrapped(path, tensors)
    return {plain[name]: tensor for name, tensor in tensors.items()}


def is_dense(tensor: Tensor) -> bool:
    """Whether a tensor from a file is neither sparse, nested, expanded, nor on the device "meta"."""
    plain = tensor.layout == torch.strided and tensor.device.type == "cpu" and not tensor.is_nested
    return plain and tensor.nbytes <= tensor.untyped_storage().nbytes()


def release_pages(*tensors: Tensor) -> None:
    """Releases the memory of memory-mapped tensors. It is read from the file again when it is used again.

    Tensors that are not memory-mapped, or were changed in memory, keep it. Only Linux does this.
    """
    if sys.platform != "linux":
        return
    size = os.sysconf("SC_PAGESIZE")
    for tensor in tensors:
        first = tensor.data_ptr() // size
        count = -(-(tensor.data_ptr() + tensor.nbytes) // size) - first
        if tensor.device.type != "cpu" or tensor.nbytes == 0:
            continue
        try:  # 64 bits a page (docs.kernel.org/admin-guide/mm/pagemap.html): 63, in memory; 62, swapped; 61, a file's
            pages = np.fromfile("/proc/self/pagemap", np.uint64, count, offset=8 * first)
        except OSError:
            return
        if len(pages) == count and not ((pages >> 62 != 0) & (pages >> 61 & 1 == 0)).any():
            ctypes.CDLL(None).madvise(ctypes.c_void_p(first * size), ctypes.c_size_t(count * size), 4)  # MADV_DONTNEED


def read_safetensors(path: Path, names: Iterable[str] | None = None) -> dict[str, Tensor]:
    """The memory-mapped tensors of a file: all, or the named ones. Raises ValueError for a damaged file."""
    with _safe_open(path) as file:
        return {name: file.get_tensor(name) for name in (file.keys() if names is None else names)}


def safetensors_names(path: Path) -> list[str]:
    """The names of a file's tensors. Raises ValueError for a damaged file."""
    with _safe_open(path) as file:
        return list(file.keys())


def safetensors_metadata(path: Path) -> dict[str, str]:
    """The metadata of a file. Raises ValueError for a damaged file."""
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
    """Whether a file of `size` bytes that begins with `head` is laid out as safetensors: a length, then JSON."""
    return len(head) > 8 and head[8:9] == b"{" and struct.unpack_from("<Q", head)[0] < size


def write_safetensors_file(path: str | PathLike[str], tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Writes tensors atomically, one at a time. Format: github.com/huggingface/safetensors"""
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, tensor in sorted(tensors.items()):
        start, end = end, end + tensor.nbytes
        kind = SAFETENSORS_DTYPES[tensor.dtype]
        header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [start, end]}
    # Sorted, so that the same model gives the same bytes. The library's order of the metadata is random.
    encoded = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    encoded = encoded.ljust(-(-len(encoded) // 8) * 8)
    with atomic_file(path, "wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for _, tensor in sorted(tensors.items()):
            file.write(raw_bytes(tensor))


def raw_bytes(tensor: Tensor) -> memoryview:
    """A tensor's numbers as bytes, in row order."""
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data


def write_torch(path: str | PathLike[str], content: dict[str, Any]) -> None:
    """torch.save, atomically. Raises OSError if the disk is full."""
    try:
        with atomic_file(path, "wb") as file:
            torch.save(content, file)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):  # torch wraps it in a RuntimeError
            raise error.__context__ from None
        raise


@contextmanager
def atomic_file(path: str | PathLike[str], mode: str = "w") -> Iterator[IO[Any]]:
    """Opens a temporary file that replaces `path` when the block ends. An error leaves `path` unchanged."""
    target = Path(os.path.realpath(path))  # replaces the target of a link, not the link
    encoding = None if "b" in mode else "utf-8"
    if os.path.exists(path) and not os.path.isfile(path):  # a device or a pipe is not replaced
        with open(path, mode, encoding=encoding) as device:
            yield device
        return
    descriptor, temporary = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent)
    try:
        with open(descriptor, mode, encoding=encoding, newline=None if "b" in mode else "\n") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        _give_usual_permissions(temporary, 0o666)
        os.replace(temporary, target)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise


def _give_usual_permissions(path: str | Path, most: int) -> None:
    """Sets the permissions of a newly created file or folder. Those of tempfile allow only the owner to read."""
    umask = os.umask(0)
    os.umask(umask)
    os.chmod(path, most & ~umask)


@contextmanager
def atomic_folder(path: str | PathLike[str]) -> Iterator[Path]:
    """Creates a folder that is renamed to `path` when the block ends, or removed after an error. Raises OSError."""
    check_free(path)
    target = Path(path)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent))
    try:
        yield temporary
        _give_usual_permissions(temporary, 0o777)
        os.replace(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def check_free(path: str | PathLike[str]) -> None:
    """Raises OSError unless a folder can be created at `path`."""
    if os.path.lexists(path):
        raise FileExistsError(f"{path} already exists; give the name of a new folder")
    check_writable(path)


def link_or_copy(source: Path, target: str | PathLike[str]) -> None:
    """Makes `target` a hard link to `source`, or a copy if the file system has no links; atomically."""
    if os.path.exists(target) and os.path.samefile(source, target):
        return
    place = Path(os.path.realpath(target))
    # A link needs an unused name, and another run may have the same target; hence the temporary folder.
    with tempfile.TemporaryDirectory(prefix=f".{place.name}.", suffix=".tmp", dir=place.parent) as folder:
        temporary = Path(folder) / "file"
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)
        os.replace(temporary, place)


def check_writable(*paths: str | PathLike[str]) -> None:
    """Raises OSError, naming the path, unless each of `paths` can be written. Changes none of them."""
    for path in map(Path, paths):
        folder = path.parent
        if not folder.is_dir():
            raise FileNotFoundError(f"{path}: there is no folder {folder}; create it first (mkdir -p {folder})")
        if path.is_dir():
            raise IsADirectoryError(f"{path} is a folder; give the name of a file to write")
        try:
            with tempfile.NamedTemporaryFile(prefix=f".{path.name}.", suffix=".tmp", dir=folder):
                pass  # the name is that of atomic_file, which may be too long
        except OSError as error:
            raise PermissionError(f"{path} cannot be written: {error.strerror}; choose another folder") from error
