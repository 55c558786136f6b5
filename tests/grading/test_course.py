"""`course.py kit`: its options, its errors in one line, and that nothing is half-written."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import course
from conftest import umask
from minillama.grading import kit


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_writes_the_kit_and_the_solution_apart(tmp_path, capsys):
    arguments = ["kit", "--edition", "fall2025", "--seed", "5", "--keep", "norm, adamw"]
    (tmp_path / "kit").mkdir()  # an empty folder may be there
    assert course.main([*arguments, "--into", str(tmp_path / "kit"), "--solution", str(tmp_path / "solved")]) == 0
    out = capsys.readouterr().out
    assert "9 of 11 parts to do" in out and "hidden.json" in out
    assert course.main([*arguments, "--into", str(tmp_path / "again")]) == 0
    student, solved = contents(tmp_path / "kit"), contents(tmp_path / "solved")
    assert student == contents(tmp_path / "again")
    assert set(solved) - set(student) == {"hidden.json"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "kit", "solved"]
    if os.name == "posix":
        assert (tmp_path / "kit").stat().st_mode & 0o777 == 0o777 & ~umask()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: command, --edition, --into"),
        (["kit", "--edition", "fall2025"], "required: --into"),
        (["kit", "--edition", "fall2024", "--into", "new"], "invalid choice: 'fall2024'; the nearest is fall2025"),
        (["set", "--edition", "2024", "--into", "new"], "invalid choice: 'set'"),
        (["kit", "--edition", "2024", "--into", "full"], "--into full: it is not empty"),
        (["kit", "--edition", "2024", "--into", "full/file"], "--into full/file: it exists and is not a folder"),
        (["kit", "--edition", "2024", "--into", "no/where"], "--into no/where: the folder above it does not exist"),
        (["kit", "--edition", "2024", "--into", "new", "--keep", "lora"], "--keep lora: no such part of 2024"),
        (["kit", "--edition", "fall2025", "--into", "new", "--keep", "atention"], "the nearest is attention"),
        (["kit", "--edition", "2024", "--into", "new", "--seed", "-3"], "'-3' is not allowed"),
        (["kit", "--edition", "2024", "--into", "new", "--solution", "full"], "--solution full: it is not empty"),
        (["kit", "--edition", "2024", "--into", "new", "--solution", "new"], "must not be in the student's folder"),
        (["kit", "--edition", "2024", "--into", "empty", "--solution", "empty/s"], "must not be in the student's"),
        (["kit", "--edition", "2024", "--into", "empty/k", "--solution", "empty"], "not be in the folder of the"),
    ],
)
def test_errors_are_one_line_and_write_nothing(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    Path("full").mkdir()
    Path("empty").mkdir()
    Path("full/file").write_text("text")
    with pytest.raises(SystemExit, match="^2$"):
        course.main(arguments)
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1
    assert sorted(contents(tmp_path)) == ["full/file"] and not Path("new").exists()


@pytest.mark.parametrize("failing", [3, 40])
def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch, capsys, failing):
    written = []

    def write(path, content):
        written.append(path)
        if len(written) == failing:
            raise OSError(28, "No space left on device", str(path))
        return len(content)

    files = {f"{n}.txt": b"text" for n in range(30)}
    monkeypatch.setattr(kit, "kit_files", lambda *more: files)
    monkeypatch.setattr(kit, "solved_files", lambda *more: files)
    monkeypatch.setattr(Path, "write_bytes", write)
    arguments = ["kit", "--edition", "2024", "--into", str(tmp_path / "a"), "--solution", str(tmp_path / "b")]
    with pytest.raises(SystemExit, match="^2$"):
        course.main(arguments)
    assert "No space left on device" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_folders_are_written_all_or_none(tmp_path, monkeypatch):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "late").write_text("put there by somebody else in the meantime")
    with pytest.raises(OSError, match="b"):
        kit.write_folders({tmp_path / "a": {"x": b"1"}, tmp_path / "b": {"x": b"1"}})
    assert contents(tmp_path) == {"b/late": b"put there by somebody else in the meantime"}
    assert [path.name for path in tmp_path.iterdir()] == ["b"]
