"""The hand-in zip: the record of each prediction file."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

import prepare_submit
from conftest import SENTENCES
from prepare_submit import GENERATED, check, main, required_outputs


def add_record(project: Path, name: str, **changes: object) -> None:
    """The record that run_llama.py leaves beside a prediction file."""
    folder = project / "runs" / "predictions"
    folder.mkdir(parents=True, exist_ok=True)
    source = project / "data" / f"{'-'.join(name.split('-')[:2])}.txt"
    record = {
        "file": name,
        "sha256": hashlib.sha256((project / name).read_bytes()).hexdigest(),
        "checkpoint": "models/stories42M.pt",
        "bundled_model": False,
        "model_substituted": False,
        "data": f"data/{source.name}",
        "rows": 3,
        "data_sha256": hashlib.sha256(source.read_bytes()).hexdigest() if source.exists() else None,
        "accuracy": 0.4567,
    }
    (folder / f"{name}.json").write_text(json.dumps(record | changes))


@pytest.fixture
def recorded(project: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The project, each prediction file with its own content and its record."""
    for number, name in enumerate(required_outputs()):
        if name in GENERATED:
            (project / name).write_text(f"text {number}\n")
        else:
            labels = [number // 2**bit % 2 for bit in range(3)] if name.startswith("cfimdb") else [number % 5] * 3
            rows = zip(labels, SENTENCES, strict=True)
            (project / name).write_bytes("".join(f"{label} ||| {one}\n" for label, one in rows).encode())
        add_record(project, name)
    monkeypatch.chdir(project.parent)
    return project


def test_the_table_says_what_each_prediction_was_made_from(recorded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ada", "--folder", "project"]) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert err == "" and lines[0].endswith("made from")
    (line,) = (line for line in lines if "sst-dev-lora-output.txt" in line)
    assert line.endswith("  stories42M.pt, accuracy 0.457")
    (line,) = (line for line in lines if "llama.py" in line and "run_" not in line)
    assert line.split()[-1].isdigit()


@pytest.mark.parametrize(
    "changes, warning, said",
    [
        (
            {"bundled_model": True},
            "made by the bundled model; `python fetch_data.py` brings stories42M.pt",
            "(bundled)",
        ),
        ({"bundled_model": True, "model_substituted": True}, "because the course's was missing", "(bundled)"),
        (
            {"data": "mine.txt", "rows": 60, "data_sha256": "0" * 64},
            "mine.txt (60 rows), which is not the course's sst-dev",
            "0.457",
        ),
        ({"sha256": "0" * 64}, "no record of its origin", "  no record"),
    ],
)
@pytest.mark.parametrize("source_is_there", [True, False])
def test_predictions_from_elsewhere_are_packed_with_a_warning(
    recorded: Path,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, object],
    warning: str,
    said: str,
    source_is_there: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name, source = "sst-dev-lora-output.txt", recorded / "data" / "sst-dev.txt"
    add_record(recorded, name, **changes)
    if not source_is_there:  # then the course's own checksum is compared
        known = hashlib.sha256(source.read_bytes()).hexdigest()
        monkeypatch.setitem(prepare_submit.COURSE_DATA, "sst-dev.txt", known)
        source.unlink()
    assert main(["ada", "--folder", "project"]) == 0
    out, err = capsys.readouterr()
    assert err.count("\n") == 1 and err.startswith(f"prepare_submit.py: warning: ada/{name}: ") and warning in err
    assert said in next(line for line in out.splitlines() if name in line)
    assert main(["--check", "ada.zip", "--folder", "project"]) == 0
    assert capsys.readouterr() == (out, err)


def test_the_table_costs_no_zip_where_nobody_reads_it(
    recorded: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise BrokenPipeError(32, "Broken pipe")

    with monkeypatch.context() as patched:
        patched.setattr("sys.stdout.write", broken)
        assert main(["ada", "--folder", "project"]) == 0
    assert "warning: the standard output failed (Broken pipe)" in capsys.readouterr().err
    assert check(Path("ada.zip"), "ada", recorded / "data")
