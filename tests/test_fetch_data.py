"""fetch_data.py against a small mirror, as a folder and over a local HTTP server that counts what it sends."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

import fetch_data
from conftest import ASSETS
from fetch_data import FetchError
from small_mirror import BODY, CHECKPOINT, LABEL, MODEL, OTHER_WEIGHTS, TRAIN, WEIGHTS, run, sha256


@pytest.fixture(autouse=True)
def table(monkeypatch):
    """A table of our own, so that no test depends on the real files; and no proxy in between."""
    monkeypatch.setattr(fetch_data, "ENTRIES", (TRAIN, LABEL, MODEL, CHECKPOINT))
    monkeypatch.setenv("no_proxy", "127.0.0.1")


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
    with pytest.raises(FetchError, match="was deleted"):
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
    with pytest.raises(FetchError, match="the download is empty, cut short or damaged"):
        fetch_data.fetch(CHECKPOINT, into, str(mirror))
    assert not list(into.glob("model.pt*")) and not (into / fetch_data.RECORD).exists()


@pytest.mark.parametrize("damage", DAMAGED)
def test_an_unpinned_file_that_is_there_and_cannot_be_whole_is_not_recorded(mirror, into, capsys, damage):
    (into / "model.pt").write_bytes(DAMAGED[damage])
    code, out, err = run(capsys, "checkpoint", "--source", mirror, "--into", into)
    assert (code, out, len(err)) == (2, [], 1)
    assert "model.pt: the file is empty, cut short or damaged" in err[0] and "--force replaces it" in err[0]
    assert (into / "model.pt").read_bytes() == DAMAGED[damage] and not (into / fetch_data.RECORD).exists()
    assert run(capsys, "checkpoint", "--source", mirror, "--into", into, "--force")[0] == 0
    assert (into / "model.pt").read_bytes() == WEIGHTS
    assert run(capsys, "checkpoint", "--into", into)[0] == 0


def test_a_file_that_only_a_mirror_has_is_skipped_in_one_line(into, capsys):
    code, out, err = run(capsys, "tokenizer", "--into", into)
    assert (code, err) == (0, [])
    assert out == ["skipped  data/tokenizer.model: not published, only a mirror has it (--source)"]


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
    with fetch_data.folder_lock(into):
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
