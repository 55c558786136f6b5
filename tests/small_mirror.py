"""A mirror of a few small files for the tests of fetch_data.py."""

from __future__ import annotations

import hashlib
import http.server
import io
import urllib.error
import urllib.parse
import zipfile

import fetch_data
from fetch_data import Entry

BODY = bytes(range(256)) * 2000  # 512,000 bytes, several chunks
LABELS = b'["bad", "good"]\n'


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def zipped(content: bytes) -> bytes:
    """A zip, as torch's files are."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr(zipfile.ZipInfo("data.pkl"), content)
    return packed.getvalue()


WEIGHTS, OTHER_WEIGHTS = zipped(b"weights"), zipped(bytes(range(256)) * 40)

TRAIN = Entry("data", "data/train.txt", None, "course/data/train.txt", sha256(BODY))
LABEL = Entry("data", "data/labels.json", None, "course/data/labels.json", sha256(LABELS))
MODEL = Entry("tokenizer", "data/tokenizer.model", None, "course/tokenizer.model", sha256(b"pieces"))
CHECKPOINT = Entry("checkpoint", "model.pt", None, "course/model.pt", None)


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves `server.root` with byte ranges; `server.mode` names one way to misbehave."""

    def log_message(self, *args):
        pass

    def do_GET(self):
        server, asked = self.server, self.headers.get("Range")
        server.ranges.append(asked)
        if server.mode == "elsewhere" and not self.path.startswith("/moved"):
            return self.answer(302, b"", [("Location", server.location)])
        path = server.root / urllib.parse.unquote(self.path.removeprefix("/moved")).lstrip("/")
        if not path.is_file():
            return self.answer(404, b"nothing here")
        body = path.read_bytes()
        if server.mode == "web page":
            return self.answer(200, b"<!DOCTYPE html><p>Log in</p>", [("Content-Type", "text/html; charset=utf-8")])
        if server.mode == "unlabelled web page":
            return self.answer(200, b"\n<!DOCTYPE html><p>Log in</p>")
        if server.mode == "busy":
            return self.answer(503, b"later")
        if server.mode == "truncated":
            return self.answer(200, body[:100_000], length=len(body))
        if not asked or server.mode == "no ranges":
            return self.answer(200, body)
        start = int(asked.removeprefix("bytes=").rstrip("-"))
        if start >= len(body):
            return self.answer(416, b"", [("Content-Range", f"bytes */{len(body)}")])
        first = 0 if server.mode == "wrong range" else start
        return self.answer(206, body[first:], [("Content-Range", f"bytes {first}-{len(body) - 1}/{len(body)}")])

    def answer(self, status, body, headers=(), length=None):
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        self.server.sent.append(len(body))  # before the client can have read it all and looked
        self.wfile.write(body)


def run(capsys, *argv: object) -> tuple[int, list[str], list[str]]:
    """Exit code, lines of stdout, lines of stderr."""
    code = fetch_data.main([str(arg) for arg in argv])
    out, err = capsys.readouterr()
    return code, out.splitlines(), err.splitlines()
