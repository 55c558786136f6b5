"""fetch_data.py against a small mirror, as a folder and over a local HTTP server that counts what it sends."""

from __future__ import annotations

import errno
import hashlib
import http.server
import io
import re
import threading
import urllib.error
import urllib.parse
import zipfile
from pathlib import Path

import pytest

import fetch_data
from fetch_data import Entry, FetchError

ASSETS = Path(__file__).resolve().parent.parent.parent / "shared" / "assets"
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
        self.wfile.write(body)
        self.server.sent.append(len(body))


@pytest.fixture(autouse=True)
def table(monkeypatch):
    """A table of our own, so that no test depends on the real files; and no proxy in between."""
    monkeypatch.setattr(fetch_data, "ENTRIES", (TRAIN, LABEL, MODEL, CHECKPOINT))
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def mirror(tmp_path) -> Path:
    root = tmp_path / "mirror"
    (root / "course" / "data").mkdir(parents=True)
    (root / "course/data/train.txt").write_bytes(BODY)
    (root / "course/data/labels.json").write_bytes(LABELS)
    (root / "course/tokenizer.model").write_bytes(b"pieces")
    (root / "model.pt").write_bytes(WEIGHTS)  # the other spot a mirror may use
    return root


@pytest.fixture
def server(mirror):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.root, server.mode, server.ranges, server.sent = mirror, "", [], []
    server.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def into(tmp_path) -> Path:
    folder = tmp_path / "project"
    (folder / "data").mkdir(parents=True)
    return folder


def run(capsys, *argv: object) -> tuple[int, list[str], list[str]]:
    """Exit code, lines of stdout, lines of stderr."""
    code = fetch_data.main([str(arg) for arg in argv])
    out, err = capsys.readouterr()
    return code, out.splitlines(), err.splitlines()


def test_a_server_fills_the_project_and_a_second_call_keeps_everything(server, into, capsys):
    code, out, err = run(capsys, "--source", server.url, "--into", into)
    assert (code, err) == (0, [])
    assert [line.split()[:2] for line in out] == [["fetched", e.target] for e in fetch_data.ENTRIES]
    assert (into / TRAIN.target).read_bytes() == BODY
    assert not list(into.rglob("*.part"))
    requests = len(server.ranges)
    code, out, err = run(capsys, "--source", server.url, "--into", into)
    assert (code, err) == (0, [])
    assert {line.split()[0] for line in out} == {"ok"}
    assert len(server.ranges) == requests


@pytest.mark.parametrize("as_url", [False, True])
def test_a_folder_is_a_mirror_too_and_so_is_another_project_folder(mirror, into, tmp_path, capsys, as_url):
    source = mirror.as_uri() if as_url else mirror
    assert run(capsys, "--source", source, "--into", into)[0] == 0
    assert (into / TRAIN.target).read_bytes() == BODY
    assert run(capsys, "--source", into, "--into", tmp_path / "second")[0] == 0
    assert (tmp_path / "second" / CHECKPOINT.target).read_bytes() == WEIGHTS


def test_only_the_groups_named_are_fetched(mirror, into, capsys):
    code, out, _ = run(capsys, "tokenizer", "--source", mirror, "--into", into)
    assert (code, out) == (0, ["fetched  data/tokenizer.model"])
    assert not (into / TRAIN.target).exists()


def test_a_partial_file_is_resumed_and_only_the_missing_bytes_travel(server, into):
    (into / "data/train.txt.part").write_bytes(BODY[:300_000])
    assert fetch_data.fetch(TRAIN, into, server.url).startswith("fetched")
    assert server.ranges == ["bytes=300000-"]
    assert server.sent == [len(BODY) - 300_000]
    assert (into / TRAIN.target).read_bytes() == BODY


@pytest.mark.parametrize(
    ("mode", "requests"), [("no ranges", ["bytes=9-"]), ("wrong range", ["bytes=9-", None])], ids=["200", "206"]
)
def test_without_the_right_range_the_download_starts_afresh(server, into, mode, requests):
    server.mode = mode
    (into / "data/train.txt.part").write_bytes(b"Z" * 9)
    fetch_data.fetch(TRAIN, into, server.url)
    assert server.ranges == requests
    assert (into / TRAIN.target).read_bytes() == BODY


def test_a_complete_partial_file_is_taken_and_one_that_is_too_long_starts_afresh(server, into):
    part = into / "data/train.txt.part"
    part.write_bytes(BODY)
    fetch_data.fetch(TRAIN, into, server.url)
    assert sum(server.sent) == 0
    (into / TRAIN.target).unlink()
    part.write_bytes(BODY + b"more")
    fetch_data.fetch(TRAIN, into, server.url)
    assert (into / TRAIN.target).read_bytes() == BODY
    assert server.ranges[1:] == [f"bytes={len(BODY) + 4}-", None]


def test_a_truncated_transfer_is_refused_and_the_next_call_goes_on_from_there(server, into, capsys):
    server.mode = "truncated"
    code, out, err = run(capsys, "data", "--source", server.url, "--into", into)
    assert code == 2
    assert "100,000 of 512,000 bytes; run the same command again to resume" in err[0]
    assert not (into / TRAIN.target).exists()
    assert (into / "data/train.txt.part").stat().st_size == 100_000
    server.mode = ""
    assert run(capsys, "data", "--source", server.url, "--into", into)[0] == 0
    assert "bytes=100000-" in server.ranges
    assert (into / TRAIN.target).read_bytes() == BODY


def test_a_corrupted_file_leaves_nothing_behind_and_the_others_still_come(server, into, capsys):
    (server.root / TRAIN.mirror).write_bytes(b"corrupted")
    code, out, err = run(capsys, "--source", server.url, "--into", into)
    assert code == 2 and len(err) == 1
    assert sha256(b"corrupted") in err[0] and sha256(BODY) in err[0] and TRAIN.target in err[0]
    assert not (into / TRAIN.target).exists() and not list(into.rglob("*.part"))
    assert (into / MODEL.target).exists()


def test_a_file_with_the_wrong_checksum_is_kept_until_forced(mirror, into, capsys):
    target = into / MODEL.target
    target.write_bytes(b"mine")
    code, _, err = run(capsys, "tokenizer", "--source", mirror, "--into", into)
    assert code == 2 and len(err) == 1
    assert sha256(b"mine") in err[0] and sha256(b"pieces") in err[0] and "--force" in err[0]
    assert target.read_bytes() == b"mine"
    assert run(capsys, "tokenizer", "--source", mirror, "--into", into, "--force")[0] == 0
    assert target.read_bytes() == b"pieces"


def test_a_forced_fetch_that_fails_keeps_the_old_file(mirror, into):
    (into / MODEL.target).write_bytes(b"mine")
    (mirror / MODEL.mirror).write_bytes(b"corrupted")
    with pytest.raises(FetchError, match="thrown away"):
        fetch_data.fetch(MODEL, into, str(mirror), force=True)
    assert (into / MODEL.target).read_bytes() == b"mine"


def test_a_label_file_counts_by_its_content_not_its_layout(into):
    (into / LABEL.target).write_text('[\n\t"bad",\n\t"good"\n]\n')
    assert fetch_data.fetch(LABEL, into) == "ok       data/labels.json"
    (into / LABEL.target).write_text('["good", "bad"]\n')
    with pytest.raises(FetchError, match="pinned is"):
        fetch_data.fetch(LABEL, into)


def test_an_unpinned_checksum_is_recorded_and_compared_from_then_on(mirror, into):
    line = fetch_data.fetch(CHECKPOINT, into, str(mirror))
    assert "not pinned" in line and sha256(WEIGHTS) in line
    assert (into / fetch_data.RECORD).read_text() == f"{sha256(WEIGHTS)}  model.pt\n"
    assert "not pinned" in fetch_data.fetch(CHECKPOINT, into)
    (into / "model.pt").write_bytes(b"bit rot")
    with pytest.raises(FetchError, match="recorded in data/SHA256SUMS.local, not pinned"):
        fetch_data.fetch(CHECKPOINT, into)
    (into / "model.pt").unlink()
    (mirror / "model.pt").write_bytes(OTHER_WEIGHTS)
    with pytest.raises(FetchError, match="--force accepts it"):
        fetch_data.fetch(CHECKPOINT, into, str(mirror))
    assert not (into / "model.pt").exists()
    fetch_data.fetch(CHECKPOINT, into, str(mirror), force=True)
    assert (into / fetch_data.RECORD).read_text() == f"{sha256(OTHER_WEIGHTS)}  model.pt\n"


DAMAGED = {
    "empty": b"",
    "cut short": OTHER_WEIGHTS[:-100],
    "mixed up": OTHER_WEIGHTS[:5000] + b"?" + OTHER_WEIGHTS[5001:],
    "no zip": b"weights",
    "packed in an unknown way": OTHER_WEIGHTS.replace(
        b"PK\x01\x02\x14\x03\x14\0\0\0\0\0", b"PK\x01\x02\x14\x03\x14\0\0\0\x63\0"
    ),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_an_unpinned_file_that_cannot_be_whole_is_not_taken(mirror, into, damage):
    (mirror / "course/model.pt").write_bytes(OTHER_WEIGHTS)
    assert fetch_data.fetch(CHECKPOINT, into, str(mirror)).startswith("fetched")
    (into / "model.pt").unlink()
    (into / fetch_data.RECORD).unlink()
    assert DAMAGED[damage] != OTHER_WEIGHTS
    (mirror / "course/model.pt").write_bytes(DAMAGED[damage])
    with pytest.raises(FetchError, match="came empty, cut short or mixed up"):
        fetch_data.fetch(CHECKPOINT, into, str(mirror))
    assert not list(into.glob("model.pt*")) and not (into / fetch_data.RECORD).exists()


@pytest.mark.parametrize("damage", DAMAGED)
def test_an_unpinned_file_that_is_there_and_cannot_be_whole_is_not_recorded(mirror, into, capsys, damage):
    (into / "model.pt").write_bytes(DAMAGED[damage])
    code, out, err = run(capsys, "checkpoint", "--source", mirror, "--into", into)
    assert (code, out, len(err)) == (2, [], 1)
    assert "model.pt: is empty, cut short or mixed up" in err[0] and "--force replaces it" in err[0]
    assert (into / "model.pt").read_bytes() == DAMAGED[damage] and not (into / fetch_data.RECORD).exists()
    assert run(capsys, "checkpoint", "--source", mirror, "--into", into, "--force")[0] == 0
    assert (into / "model.pt").read_bytes() == WEIGHTS
    assert run(capsys, "checkpoint", "--into", into)[0] == 0


def test_a_file_that_only_a_mirror_has_is_skipped_in_one_line(into, capsys):
    code, out, err = run(capsys, "tokenizer", "--into", into)
    assert (code, err) == (0, [])
    assert out == ["skipped  data/tokenizer.model: not published, only a mirror has it (--source)"]


def test_a_missing_file_is_one_line_that_names_both_spots(server, mirror, into, capsys):
    (mirror / MODEL.mirror).unlink()
    for source in (server.url, str(mirror)):
        code, _, err = run(capsys, "tokenizer", "--source", source, "--into", into)
        assert code == 2 and len(err) == 1
        assert f"not found at {source}/{MODEL.mirror} or {source}/{MODEL.target}" in err[0]
    assert not list(into.rglob("*.part"))


@pytest.mark.parametrize(
    ("mode", "says"),
    [("web page", "web page"), ("unlabelled web page", "web page"), ("busy", "503 Service Unavailable")],
)
def test_an_answer_that_is_not_the_file_costs_no_partial_bytes(server, into, capsys, mode, says):
    server.mode = mode
    part = into / "data/train.txt.part"
    part.write_bytes(BODY[:5])
    code, _, err = run(capsys, "data", "--source", server.url, "--into", into)
    assert code == 2 and len(err) == 2
    assert says in err[0] and "--source" in err[0]
    assert part.read_bytes() == BODY[:5]


def test_a_redirect_is_followed_but_never_to_another_protocol(server, into):
    server.mode, server.location = "elsewhere", f"{server.url}/moved/{MODEL.mirror}"
    assert fetch_data.fetch(MODEL, into, server.url).startswith("fetched")
    server.location = "ftp://example.org/a"
    with pytest.raises(FetchError, match="redirects to ftp://example.org/a, which is not https"):
        fetch_data.fetch(TRAIN, into, server.url)
    secure = fetch_data.urllib.request.Request("https://example.org/a")
    with pytest.raises(FetchError, match="not https"):
        fetch_data.SafeRedirects().redirect_request(secure, io.BytesIO(), 302, "", {}, "http://example.org/a")


def test_a_source_may_name_its_protocol_in_capitals(server, mirror, into, tmp_path, capsys):
    assert run(capsys, "--source", server.url.replace("http", "HTTP"), "--into", into)[0] == 0
    assert run(capsys, "--source", mirror.as_uri().replace("file", "File"), "--into", tmp_path / "second")[0] == 0


@pytest.mark.parametrize(
    "location",
    ["http://[::1", "http://a..b/x", f"http://{'a' * 64}.org", "http://127.0.0.1:99999/x", "http://127.0.0.1:x/"],
)
def test_a_redirect_to_no_address_is_one_line(server, into, capsys, location):
    server.mode, server.location = "elsewhere", location
    code, out, err = run(capsys, "tokenizer", "--source", server.url, "--into", into)
    assert (code, out, len(err)) == (2, [], 1)
    assert "--source" in err[0]


@pytest.mark.parametrize(
    "answer",
    [b"garbage\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: \xb2\r\n\r\n", b"HTTP/1.1 999\r\n\r\n", b""],
    ids=["status", "length", "number", "nothing"],
)
def test_an_answer_that_is_no_http_is_one_line(server, into, capsys, monkeypatch, answer):
    monkeypatch.setattr(Handler, "do_GET", lambda handler: handler.wfile.write(answer))
    monkeypatch.setattr(Handler, "close_connection", True, raising=False)
    code, out, err = run(capsys, "tokenizer", "--source", server.url, "--into", into)
    assert (code, out, len(err)) == (2, [], 1)
    assert "data/tokenizer.model" in err[0]


@pytest.mark.parametrize("content", [b"\xff\xfe", b"\xe4" * 64 + b"  model.pt\n"])
def test_a_record_that_is_no_text_is_one_line_and_concerns_unpinned_files_only(mirror, into, capsys, content):
    (into / fetch_data.RECORD).write_bytes(content)
    code, out, err = run(capsys, "--source", mirror, "--into", into)
    assert (code, len(out), len(err)) == (2, 4, 1)
    assert f"model.pt: {into / fetch_data.RECORD} is not UTF-8 text; remove it" in err[0]
    assert (into / fetch_data.RECORD).read_bytes() == content


def test_a_label_file_nested_too_deeply_has_the_wrong_checksum(into):
    (into / LABEL.target).write_text("[" * 100_000)
    with pytest.raises(FetchError, match="pinned is"):
        fetch_data.fetch(LABEL, into)


def test_advice_that_was_given_is_not_repeated(server, into, capsys):
    server.shutdown()
    server.server_close()
    _, _, err = run(capsys, "--source", server.url, "--into", into)
    assert len(err) == 4 and "--source" in err[0]
    for entry, line in zip(fetch_data.ENTRIES[1:], err[1:], strict=True):
        assert re.fullmatch(rf"fetch_data.py: {entry.target}: connection failed \([^;]*refused.*\)", line)


def test_an_unreachable_host_is_one_line_a_file(server, into, capsys):
    server.shutdown()
    server.server_close()
    code, out, err = run(capsys, "data", "--source", server.url, "--into", into)
    assert (code, out, len(err)) == (2, [], 2)
    assert "connection failed" in err[0] and "refused" in err[0] and "--source" in err[0]


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "no space left"),
        (PermissionError(errno.EACCES, "Permission denied", "/data"), "cannot use /data: Permission denied"),
        (TimeoutError("timed out"), r"connection failed \(timed out\)"),
        (OSError(errno.ENETUNREACH, "Network is unreachable"), "connection failed"),
        (urllib.error.URLError(TimeoutError("timed out")), r"connection failed \(timed out\)"),
        (fetch_data.http.client.IncompleteRead(b"x"), "connection failed"),
    ],
)
def test_a_failure_of_the_machine_or_the_network_is_one_line(mirror, into, capsys, monkeypatch, error, says):
    def fail(*args):
        raise error

    monkeypatch.setattr(fetch_data.os, "fsync", fail)
    code, _, err = run(capsys, "tokenizer", "--source", mirror, "--into", into)
    assert code == 2 and len(err) == 1
    with pytest.raises(FetchError, match=says):
        raise FetchError(err[0])


def test_a_file_in_place_of_the_folder_is_one_line(mirror, tmp_path, capsys):
    (tmp_path / "taken").write_text("a file")
    code, _, err = run(capsys, "tokenizer", "--source", mirror, "--into", tmp_path / "taken")
    assert code == 2 and len(err) == 1
    assert "cannot use" in err[0] and "taken" in err[0] and "--into" in err[0]


def test_an_interrupt_keeps_the_partial_file_and_says_that_it_resumes(server, into, capsys, monkeypatch):
    class Interrupted(fetch_data.tqdm):
        def update(self, n=1):
            raise KeyboardInterrupt

    monkeypatch.setattr(fetch_data, "tqdm", Interrupted)
    code, out, err = run(capsys, "data", "--source", server.url, "--into", into)
    assert (code, out) == (130, [])
    assert err == ["fetch_data.py: data/train.txt: interrupted; the same command resumes it"]
    part = into / "data/train.txt.part"
    assert part.read_bytes() == BODY[: fetch_data.CHUNK]


def test_a_link_in_place_of_the_partial_file_is_not_written_through(mirror, into, tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("mine")
    (into / "data/train.txt.part").symlink_to(precious)
    with pytest.raises(FetchError, match="is a link"):
        fetch_data.fetch(TRAIN, into, str(mirror))
    assert precious.read_text() == "mine"


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["tokeniser"], "unknown group tokeniser; choose from data, tokenizer, references, checkpoint, stories260K"),
        (["--source", "/no/such/folder"], "--source /no/such/folder: no such folder"),
        (["--source", "ftp://example.org/x"], "--source ftp://example.org/x: no such folder"),
        (["--source", ""], "no such folder"),
        (["--source", "a\nb"], "--source a b: no such folder"),
        (["--source", "http://[::1"], "--source http://[::1: no address (Invalid IPv6 URL)"),
        (["--source", "file://[::1"], "--source file://[::1: no address (Invalid IPv6 URL)"),
        (["--source", "http://a..b"], "--source http://a..b: no address ("),
        (["--source", f"http://{'a' * 64}.org"], "no address ("),
        (["--source", "http://host:99999/x"], "no address (Port out of range 0-65535)"),
        (["--source", "http:///x"], "no address (it names no host)"),
        (["--source", "http://127.0.0.1/\u00e4"], "no address (write '/\u00e4' as '/%C3%A4')"),
        (["--source", "http://127.0.0.1/a b"], "no address (write '/a b' as '/a%20b')"),
    ],
)
def test_a_wrong_argument_is_one_line(into, capsys, argv, says):
    code, out, err = run(capsys, *argv, "--into", into)
    assert (code, out, len(err)) == (2, [], 1)
    assert says in err[0]


def test_the_list_shows_every_file_and_fetches_none(into, capsys):
    code, out, err = run(capsys, "--list", "--into", into)
    assert (code, err, len(out)) == (0, [], 4)
    assert TRAIN.sha256 in out[0] and "not pinned" in out[3]
    assert not list((into / "data").iterdir())


def test_the_real_table_is_https_only_stays_in_the_project_and_knows_its_groups(monkeypatch):
    monkeypatch.undo()
    assert {entry.group for entry in fetch_data.ENTRIES} == set(fetch_data.GROUPS)
    assert len({entry.target for entry in fetch_data.ENTRIES}) == len(fetch_data.ENTRIES)
    for entry in fetch_data.ENTRIES:
        assert entry.url is None or entry.url.startswith("https://")
        assert entry.sha256 is None or len(bytes.fromhex(entry.sha256)) == 32
        for path in (Path(entry.target), Path(entry.mirror)):
            assert not path.is_absolute() and ".." not in path.parts


def test_the_real_files_match_the_pinned_checksums(monkeypatch):
    monkeypatch.undo()
    home, checked = Path(fetch_data.__file__).parent, 0
    for entry in fetch_data.ENTRIES:
        found = next((path for path in (home / entry.target, ASSETS / entry.mirror) if path.is_file()), None)
        if found and entry.sha256:
            assert fetch_data.checksum(found, entry) == entry.sha256, found
            checked += 1
    if not checked:
        pytest.skip("neither data/ nor ../shared/assets holds the course's files; `python fetch_data.py` brings them")


def test_two_calls_for_one_folder_take_turns(server, into, capsys):
    outcomes = []
    arguments = ["data", "tokenizer", "--source", server.url, "--into", str(into)]
    with fetch_data.alone(into):
        other = threading.Thread(target=lambda: outcomes.append(fetch_data.main(arguments)))
        other.start()
        other.join(0.3)
        assert other.is_alive() and server.ranges == []  # it has not asked for a byte
    other.join(30)
    assert outcomes == [0] and (into / TRAIN.target).read_bytes() == BODY
    assert f"another process is fetching into {into}; waiting until it ends" in capsys.readouterr().err


def test_the_record_of_checksums_goes_by_no_fixed_name_before_it_is_whole(into):
    bystander = into / f"{fetch_data.RECORD}.part"
    bystander.write_text("half of another's", encoding="utf-8")
    fetch_data.write_record(into, {"a": "0" * 64})
    assert fetch_data.read_record(into) == {"a": "0" * 64}
    assert bystander.read_text(encoding="utf-8") == "half of another's" and len(list((into / "data").iterdir())) == 2
