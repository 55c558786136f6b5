"""fetch_data.py where the mirror, the network or an argument is wrong: one line for each failure."""

from __future__ import annotations

import errno
import io
import re
import urllib.error
import urllib.parse

import pytest

import fetch_data
from fetch_data import FetchError
from small_mirror import BODY, CHECKPOINT, LABEL, MODEL, TRAIN, Handler, run


@pytest.fixture(autouse=True)
def table(monkeypatch):
    """A table of our own, so that no test depends on the real files; and no proxy in between."""
    monkeypatch.setattr(fetch_data, "ENTRIES", (TRAIN, LABEL, MODEL, CHECKPOINT))
    monkeypatch.setenv("no_proxy", "127.0.0.1")


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
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full"),
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
    with pytest.raises(FetchError, match="is a symbolic link"):
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
        (["--source", "http://[::1"], "--source http://[::1: not a URL (Invalid IPv6 URL)"),
        (["--source", "file://[::1"], "--source file://[::1: not a URL (Invalid IPv6 URL)"),
        (["--source", "http://a..b"], "--source http://a..b: not a URL ("),
        (["--source", f"http://{'a' * 64}.org"], "not a URL ("),
        (["--source", "http://host:99999/x"], "not a URL (Port out of range 0-65535)"),
        (["--source", "http:///x"], "not a URL (it has no host)"),
        (["--source", "http://127.0.0.1/\u00e4"], "not a URL (write '/\u00e4' as '/%C3%A4')"),
        (["--source", "http://127.0.0.1/a b"], "not a URL (write '/a b' as '/a%20b')"),
    ],
)
def test_a_wrong_argument_is_one_line(into, capsys, argv, says):
    code, out, err = run(capsys, *argv, "--into", into)
    assert (code, out, len(err)) == (2, [], 1)
    assert says in err[0]
