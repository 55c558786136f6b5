"""prepare_submit.py --edition: the files and the size that each edition of the course wants."""

from __future__ import annotations

import random
import zipfile
from pathlib import Path

import pytest

from prepare_submit import EDITIONS, GENERATED, Rejected, check, main, pack, required_outputs

SAVED = {"2024": ("lora",), "fall2025": (), "spring2026": ("lora", "finetuning")}  # outputs that are not wanted


@pytest.mark.parametrize(("edition", "count"), [("2024", 10), ("fall2025", 14), ("spring2026", 6)])
def test_each_edition_has_its_outputs(edition: str, count: int) -> None:
    outputs = required_outputs(edition)
    assert len(outputs) == count and set(GENERATED) <= set(outputs)
    assert not [name for name in outputs if any(f"-{kind}-" in name for kind in SAVED[edition])]


def test_the_default_is_fall_2025() -> None:
    assert required_outputs() == required_outputs("fall2025")


@pytest.mark.parametrize("edition", EDITIONS)
def test_only_wanted_outputs_are_packed_and_missed(project: Path, tmp_path: Path, edition: str) -> None:
    for kind in SAVED[edition]:
        for path in project.glob(f"*-{kind}-output.txt"):
            path.unlink()
    arguments = ["ada", "--folder", str(project), "--out", str(tmp_path / "ada.zip")]
    assert main([*arguments, "--edition", edition]) == 0
    assert main(["--check", str(tmp_path / "ada.zip"), "--folder", str(project), "--edition", edition]) == 0
    if SAVED[edition]:
        with pytest.raises(Rejected, match="missing sst-dev-.*-output.txt"):
            check(tmp_path / "ada.zip", "ada", project / "data")


def test_outputs_of_another_edition_stay_behind(project: Path, tmp_path: Path) -> None:
    pack("ada", project, tmp_path / "ada.zip", "spring2026")
    with zipfile.ZipFile(tmp_path / "ada.zip") as archive:
        names = archive.namelist()
    assert "ada/sst-dev-prompting-output.txt" in names
    assert not [name for name in names if "-lora-" in name or "-finetuning-" in name]


@pytest.mark.parametrize(("size", "editions"), [(9_000_000, EDITIONS), (12_000_000, ["spring2026"]), (15_100_000, [])])
def test_spring_2026_allows_15_megabytes(project: Path, tmp_path: Path, size: int, editions: list[str]) -> None:
    (project / "ada-report.pdf").write_bytes(random.Random(0).randbytes(size))
    for edition in EDITIONS:
        if edition in editions:
            assert pack("ada", project, tmp_path / f"{edition}.zip", edition)
        else:
            limit = "it may have 15,000,000 at most" if edition == "spring2026" else "it must stay under 10,000,000"
            with pytest.raises(Rejected, match=limit):
                pack("ada", project, tmp_path / f"{edition}.zip", edition)


def test_an_unknown_edition_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="^2$"):
        main(["ada", "--edition", "2025"])
    err = capsys.readouterr().err
    assert "invalid choice: '2025'" in err and err.count("\n") == 1
