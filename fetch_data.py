"""Fetches the course's files from their published addresses or a mirror, and checks each against its SHA-256.

groups:
  data          SST and CFIMDB with their label names
  tokenizer     the SentencePiece model of Llama 2
  references    the outputs that sanity_check.py and the tests compare with
  checkpoint    stories42M.pt, 167 MB
  stories260K   a Llama of 260 thousand parameters with its own tokenizer

examples:
  python fetch_data.py                              data, tokenizer, references and checkpoint
  python fetch_data.py --source /mnt/usb/assets     the same from a folder, without a network
  python fetch_data.py --source http://host:8000 data stories260K

A file with the right checksum is kept. A download goes to NAME.part and is renamed when it is complete and verified.
The next call resumes an incomplete download. Two calls for the same folder take turns, file by file.
Without --source, unpublished files are skipped. Exit code: 0 for success, 2 if a file failed, 130 if interrupted.
"""

from __future__ import annotations

import errno
import hashlib
import http.client
import io
import json
import os
import re
import sys
import tempfile
import urllib.error
import urllib.parse
import urllib.request
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from tqdm import tqdm

from minillama.cli.display import displayed
from minillama.cli.parser import OneLineParser
from minillama.environment import try_lock

HERE = Path(__file__).resolve().parent
COURSE = "https://raw.githubusercontent.com/cmu-l3/anlp-fall2025-hw1/main"
COURSE_2024 = "https://raw.githubusercontent.com/neubig/minllama-assignment/master"
TINYLLAMAS = "https://huggingface.co/karpathy/tinyllamas/resolve/main"
REFS = "course/reference"  # in a mirror
RECORD = "data/SHA256SUMS.local"  # checksums of the first downloads of files without a published one
TIMEOUT = 30.0  # seconds without a byte
CHUNK = 1 << 18
WEB = ("https://", "http://")  # other places are paths on this machine


@dataclass(frozen=True)
class Entry:
    """One file to fetch."""

    group: str
    target: str  # its path below --into
    url: str | None  # None: only a mirror has it
    mirror: str  # its path below --source; `target` is tried too, so a project folder can be a mirror
    sha256: str | None  # None: recorded at the first download


COURSE_DATA = {
    "sst-train.txt": "7aeac81f2a387f2ce7fab98ed8f40ef85cc9c8ad11bcbb63b122e95665cb1f35",
    "sst-dev.txt": "11963c76cd073e68006da0390620aadf5a4b8f775e2f900e92a50b3002e39b9b",
    "sst-test.txt": "bdcc8352d37bdc82113e4a4dd887b824144201539d5a1e49be566232d306a4ba",
    "sst-label-mapping.json": "831e6914e25d9b9eb56ff9095b3f035bdaf1b9568d385a70ef481c82af0382b3",
    "cfimdb-train.txt": "278e200499d1d68a1a9d80e3947a2203cc97130632d8a53f2b9c11de9cb6c699",
    "cfimdb-dev.txt": "b38f0c095c4624e85927116728140e96d0221969b34146f65eae5b5bb24752b8",
    "cfimdb-test.txt": "8ad2f6da7bfb0e8fc36cf89eda47c574cc9c35d6347e665f31bc904d9ecfe0a7",
    "cfimdb-label-mapping.json": "afeac43f5a5fe8758469078418519df4c8503c2e30e2fcf6c61464fce3d44a36",
}
# fmt: off
ENTRIES = (
    *(Entry("data", f"data/{n}", f"{COURSE}/data/{n}", f"course/data/{n}", s) for n, s in COURSE_DATA.items()),
    Entry("tokenizer", "data/tokenizer.model", f"{COURSE}/tokenizer.model", "course/tokenizer.model",
          "9e556afd44213b6bd1be2b850ebbbd98f5481437a8021afaf58ee7fb1818d347"),
    Entry("references", "data/reference/sanity_check_2024.data", f"{COURSE_2024}/sanity_check.data",
          f"{REFS}/sanity_check_2024.data", "34f7c763a3bb025940029bd970594e985bf69b7ed6e693a8f5cccbef0cee55b0"),
    Entry("references", "data/reference/sanity_check_fall2025.data", f"{COURSE}/sanity_check.data",
          f"{REFS}/sanity_check_fall2025.data", "94f5f19530f4bdffe7502d44004f3ac6334cf0f97059c82e1705196fea027a44"),
    Entry("references", "data/reference/sanity_check_spring2026.data", None,
          f"{REFS}/sanity_check_spring2026.data", "2dcdc958f99d49830e52524f05cedb71f7a9a752c14fa4eae0d26643e6b058d4"),
    Entry("references", "data/reference/optimizer_test.npy", f"{COURSE}/optimizer_test.npy",
          f"{REFS}/optimizer_test.npy", "5e66b55c2c6784e120e422e40bc2cd27ffdd00ac3fd9515035d846ddea1cb118"),
    Entry("references", "data/reference/rotary_embedding_actual.data", f"{COURSE}/rotary_embedding_actual.data",
          f"{REFS}/rotary_embedding_actual.data", "57b5f9defc9489955829a935d972b85a5fa69f482c7aabdd496e24ffc1b082ee"),
    Entry("checkpoint", "stories42M.pt", "https://www.cs.cmu.edu/~vijayv/stories42M.pt", "course/stories42M.pt", None),
    Entry("stories260K", "data/stories260K/stories260K_v0.bin", f"{TINYLLAMAS}/stories260K/stories260K.bin",
          "stories260K/stories260K_v0.bin", "b0a507e7ad0f626624f17112325e66691f9076d622e1d3274d103d00299f2696"),
    Entry("stories260K", "data/stories260K/stories260K_v1.bin", None, "stories260K/stories260K_v1.bin",
          "9ab1bf3d0c9900ce357fb38b0f42c3252e0ad478400bf7093efa133c8fa60723"),
    Entry("stories260K", "data/stories260K/tok512.model", f"{TINYLLAMAS}/stories260K/tok512.model",
          "stories260K/tok512.model", "fec6aa960a1fb3ebf71d26f9b0e486afcbd76c34cf0fbfb93e21126ca9f778d3"),
    Entry("stories260K", "data/stories260K/greedy_200.txt", None, "stories260K/greedy_200.txt",
          "f5a0e67db7424051520e7d8db9880b3dc2aa13577db570c28805c1b51c42eaf0"),
)
# fmt: on
DEFAULT_GROUPS = ("data", "tokenizer", "references", "checkpoint")
GROUPS = (*DEFAULT_GROUPS, "stories260K")


class FetchError(Exception):
    """Failure to fetch a file; the message is one line."""


class SafeRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect handler that follows redirects to https, and from http to http."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        scheme = urllib.parse.urlsplit(newurl).scheme
        if scheme != "https" and not (scheme == req.type == "http"):
            fp.close()
            raise FetchError(f"{req.full_url} redirects to {newurl}, which is not https; try a mirror with --source")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def parse_source(text: str) -> str:
    """The http(s) URL or existing folder given as --source. Raises ValueError for anything else."""
    folder = text
    if text.lower().startswith((*WEB, "file://")):
        try:
            url = urllib.parse.urlsplit(text)
            if url.scheme != "file":
                if not url.hostname:
                    raise ValueError("it has no host")
                url.hostname.encode("idna")
                _ = url.port  # raises ValueError for a wrong one
                if not re.fullmatch("[!-~]*", url.path):
                    raise ValueError(f"write {url.path!r} as {urllib.parse.quote(url.path, safe='/%')!r}")
                return url.geturl().rstrip("/")
        except ValueError as error:
            raise ValueError(f"--source {text}: not a URL ({error}); give one such as http://host:8000") from error
        folder = urllib.request.url2pathname(url.path)
    if not folder or not Path(folder).is_dir():
        raise ValueError(f"--source {text}: no such folder; give a mirror's folder or its http, https or file URL")
    return folder


def open_place(place: str, start: int) -> tuple[IO[bytes], int, int | None]:
    """Opens a URL or path at byte `start` if possible, else at 0: (stream, its first byte, full size if known).

    Raises FileNotFoundError, including for status 404.
    """
    if not place.startswith(WEB):
        stream = open(place, "rb")
        return stream, 0, os.fstat(stream.fileno()).st_size
    # identity: a compressed response cannot be resumed
    request = urllib.request.Request(place, headers={"User-Agent": "fetch_data.py", "Accept-Encoding": "identity"})
    if start:
        request.add_header("Range", f"bytes={start}-")
    try:
        response = urllib.request.build_opener(SafeRedirects).open(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 404:
            raise FileNotFoundError(place) from None
        if error.code != 416 or not start:
            raise
        if error.headers.get("Content-Range") == f"bytes */{start}":  # already complete
            return io.BytesIO(), start, start
        return open_place(place, 0)
    head = response.peek(64).lstrip().lower()
    if response.headers.get_content_type() == "text/html" or head.startswith((b"<!doctype html", b"<html")):
        response.close()
        raise FetchError(f"{place} answered with a web page, not the file; try a mirror with --source")
    if response.status != 206:
        length = response.headers.get("Content-Length", "")
        return response, 0, int(length) if length.isdigit() else None
    span = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
    if span and int(span[1]) == start:
        return response, start, None if span[2] == "*" else int(span[2])
    response.close()
    return open_place(place, 0)


def download(place: str, part: Path, label: str) -> None:
    """Downloads `place` to `part`, or resumes it. Raises FetchError, and keeps `part`, if bytes are missing."""
    if part.is_symlink():
        raise FetchError(f"{part} is a symbolic link; remove it")
    stream, start, total = open_place(place, part.stat().st_size if part.exists() else 0)
    bar = tqdm(desc=label, initial=start, total=total, unit="B", unit_scale=True, disable=None, leave=False)
    with stream, open(part, "ab" if start else "wb") as out, bar:
        while chunk := stream.read(CHUNK):
            out.write(chunk)
            bar.update(len(chunk))
        out.flush()
        os.fsync(out.fileno())
        size = out.tell()
    if total is not None and size != total:
        raise FetchError(f"{place} broke off at {size:,} of {total:,} bytes; run the same command again to resume")


def download_first(entry: Entry, source: str | None, part: Path) -> None:
    """Downloads from the published address, or from the first of two places in the mirror where the file exists."""
    places = [f"{source}/{entry.mirror}", f"{source}/{entry.target}"] if source else [str(entry.url)]
    for place in places:
        with suppress(FileNotFoundError):
            return download(place, part, entry.target)
    advice = f"without --source it comes from {entry.url}" if source and entry.url else "try a mirror with --source"
    raise FetchError(f"not found at {' or '.join(places)}; {advice}")


def is_complete_zip(path: Path) -> bool:
    """Whether a file is a complete zip with correct checksums inside. Torch's files are zips."""
    with path.open("rb") as file:
        if file.read(4) != b"PK\x03\x04":
            return False
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, RuntimeError):  # RuntimeError: encrypted
        return False


def checksum(path: Path, entry: Entry) -> str:
    """SHA-256 of the file at `path` in hex. JSON is first put on one line, so its layout does not matter."""
    content = path.read_bytes()
    if entry.target.endswith(".json"):
        with suppress(ValueError, RecursionError):
            content = (json.dumps(json.loads(content)) + "\n").encode()
    return hashlib.sha256(content).hexdigest()


def read_record(into: Path) -> dict[str, str]:
    """The recorded checksums by target. Raises FetchError if the record is not UTF-8."""
    record = into / RECORD
    try:
        lines = record.read_text("utf-8").splitlines() if record.exists() else []
    except UnicodeDecodeError as error:
        raise FetchError(f"{record} is not UTF-8 text; remove it, and the checksums are recorded again") from error
    return {line[66:]: line[:64] for line in lines if re.match(r"[0-9a-f]{64}  \S", line)}


def write_record(into: Path, sums: dict[str, str]) -> None:
    """Replaces the record atomically, in the format of `sha256sum -c data/SHA256SUMS.local`."""
    record = into / RECORD
    record.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{record.name}.", dir=record.parent) as folder:
        fresh = Path(folder) / record.name
        fresh.write_text("".join(f"{sha256}  {target}\n" for target, sha256 in sorted(sums.items())), encoding="utf-8")
        os.replace(fresh, record)


@contextmanager
def folder_lock(into: Path) -> Iterator[None]:
    """Locks the folder, because two processes must not write the same NAME.part; waits for another process."""
    into.mkdir(parents=True, exist_ok=True)
    try:
        folder = os.open(into, os.O_RDONLY)
    except OSError:  # Windows cannot open folders
        yield
        return
    try:
        if not try_lock(folder):
            print_error(f"another process is fetching into {into}; waiting until it ends")
            try_lock(folder, wait=True)
        yield
    finally:
        os.close(folder)


def fetch(entry: Entry, into: Path, source: str | None = None, force: bool = False) -> str:
    """Fetches and verifies the file of `entry`; returns a line about it. Raises FetchError, OSError, HTTPException."""
    target, record = into / entry.target, {} if entry.sha256 else read_record(into)
    part = target.with_name(target.name + ".part")
    expected = entry.sha256 or record.get(entry.target)
    kind = "pinned" if entry.sha256 else f"recorded in {RECORD}, not pinned"
    keep = target.exists() and not force
    if not keep:
        if not source and not entry.url:
            return f"skipped  {entry.target}: not published, only a mirror has it (--source)"
        target.parent.mkdir(parents=True, exist_ok=True)
        download_first(entry, source, part)
        if entry.sha256 is None and not is_complete_zip(part):
            part.unlink()
            raise FetchError("the download is empty, cut short or damaged and was deleted; run the command again")
    elif not expected and not is_complete_zip(target):
        raise FetchError("the file is empty, cut short or damaged; --force replaces it")
    actual = checksum(target if keep else part, entry)
    if expected and actual != expected and (entry.sha256 or not force):
        if keep:
            raise FetchError(f"sha256 is {actual}, {kind} is {expected}; the file is kept, --force replaces it")
        part.unlink()
        advice = "run the command again or try a mirror with --source" if entry.sha256 else "--force accepts it"
        raise FetchError(f"the download had sha256 {actual}, {kind} is {expected}, and was deleted; {advice}")
    if not keep:
        os.replace(part, target)
    if entry.sha256 is None and actual != expected:
        write_record(into, record | {entry.target: actual})
    return f"{'ok' if keep else 'fetched':8} {entry.target}" + ("" if entry.sha256 else f" (sha256 {actual}, {kind})")


def explain(error: Exception) -> str:
    """One line with the failure and the next step."""
    if isinstance(error, urllib.error.HTTPError):
        return f"{error.url} answered {error.code} {error.reason}; try again later, or a mirror with --source"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "the disk is full; free space and run the same command again to resume, or choose a folder with --into"
    if isinstance(error, OSError) and error.filename:
        return f"cannot use {error.filename}: {error.strerror}; choose another folder with --into or --source"
    if isinstance(error, FetchError):
        return str(error)
    if isinstance(error, (ValueError, http.client.InvalidURL)):
        return f"the server sent an invalid answer or address ({error}); try a mirror with --source"
    reason = getattr(error, "reason", None) or error or type(error).__name__
    return f"connection failed ({reason}); run the same command again to resume, or try a mirror with --source"


def build_parser() -> OneLineParser:
    """The parser of the command line."""
    parser = OneLineParser(prog="fetch_data.py", description=__doc__)
    parser.add_argument("groups", nargs="*", metavar="GROUP", help=f"default: {' '.join(DEFAULT_GROUPS)}")
    parser.add_argument("--source", metavar="DIR_OR_URL", help="a mirror: its folder, or an http, https or file URL")
    parser.add_argument("--into", type=Path, default=HERE, metavar="DIR", help="project folder (default: %(default)s)")
    parser.add_argument("--list", action="store_true", help="list the files of the groups (default: all) and stop")
    parser.add_argument("--force", action="store_true", help="fetch again and replace existing files")
    return parser


def print_error(text: str) -> None:
    """Prints one line to stderr, without the control characters of a server's answer or an argument."""
    line = "".join(character if character.isprintable() else " " for character in text.rstrip())
    print(f"fetch_data.py: {line}", file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns its exit code; downloads continue if standard output fails."""
    return displayed(fetch_all, argv)


def fetch_all(argv: list[str] | None) -> int:
    """Fetches the files that the arguments select; returns the exit code."""
    args = build_parser().parse_args(argv)
    try:
        if unknown := [group for group in args.groups if group not in GROUPS]:
            raise ValueError(f"unknown group {', '.join(unknown)}; choose from {', '.join(GROUPS)}")
        source = None if args.source is None else parse_source(args.source)
    except ValueError as error:
        print_error(str(error))
        return 2
    entries = [e for e in ENTRIES if e.group in (args.groups or (GROUPS if args.list else DEFAULT_GROUPS))]
    if args.list:
        rows = ((e.group, e.target, e.sha256 or "not pinned", e.url or f"a mirror's {e.mirror}") for e in entries)
        print("\n".join(f"{group:11} {target:43} {sha256:64} {place}" for group, target, sha256, place in rows))
        return 0
    printed: set[str] = set()
    failed = 0
    for entry in entries:
        try:
            with folder_lock(args.into):
                print(fetch(entry, args.into, source, args.force), flush=True)
        except (FetchError, OSError, http.client.HTTPException, ValueError) as error:
            message = explain(error)
            # Without a network every file fails with the same message. Its advice is printed once.
            print_error(f"{entry.target}: {message.partition('; ')[0] if message in printed else message}")
            printed.add(message)
            failed += 1
        except KeyboardInterrupt:
            print_error(f"{entry.target}: interrupted; the same command resumes it")
            return 130
    if 0 < failed < len(entries):
        print(f"{len(entries) - failed} of {len(entries)} files are there")
    return 2 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
