"""The hand-in zip: its content, the files that are refused, and that nothing is written after an error."""

from __future__ import annotations

import random
import shutil
import stat
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import prepare_submit
from conftest import MORE_CODE, ROOT, SENTENCES, write_rows
from prepare_submit import CODE, GENERATED, Rejected, check, main, pack, required_outputs


def rewrite(source: Path, target: Path, *extra: tuple[str | zipfile.ZipInfo, bytes], drop: str = "-") -> Path:
    """Copies a zip with more entries, and without those whose name contains `drop`."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for info in old.infolist():
            if drop == "-" or drop not in info.filename:
                new.writestr(info, old.read(info))
        for name, raw in extra:
            new.writestr(name, raw)
    return target


@pytest.fixture
def packed(project: Path, tmp_path: Path) -> Path:
    pack("ada", project, tmp_path / "ada.zip")
    return tmp_path / "ada.zip"


def test_packs_code_predictions_and_options_and_nothing_else(project: Path, tmp_path: Path) -> None:
    for name in ("feedback.txt", "ada-report.pdf", "bob-report.pdf", "stories42M.pt", "notes.md", "cfimdb-dev.txt"):
        (project / name).write_text("text")
    write_rows(project / "sst-dev-advanced-output.txt", SENTENCES)
    (project / "tests").mkdir()
    (project / "tests" / "test_llama.py").write_text("")
    pack("ada", project, tmp_path / "ada.zip")
    options = {"feedback.txt", "ada-report.pdf", "sst-dev-advanced-output.txt"}
    expected = {*CODE, *MORE_CODE, *required_outputs(), *options}
    with zipfile.ZipFile(tmp_path / "ada.zip") as archive:
        assert archive.namelist() == sorted(f"ada/{name}" for name in expected)
        assert archive.read("ada/llama.py") == b'"""llama.py"""\n'


def test_the_code_that_is_packed_is_all_that_it_imports(project: Path, tmp_path: Path) -> None:
    for path in project.rglob("*.py"):
        path.unlink()
    package = [path for path in (ROOT / "minillama").rglob("*.*") if path.suffix in (".py", ".css")]
    for path in [*ROOT.glob("*.py"), *package]:
        target = project / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    pack("ada", project, tmp_path / "ada.zip")
    with zipfile.ZipFile(tmp_path / "ada.zip") as archive:
        archive.extractall(tmp_path)
    assert {path.suffix for path in package if (tmp_path / "ada" / path.relative_to(ROOT)).is_file()} == {".py", ".css"}
    program = tmp_path / "ada" / "run_llama.py"
    imports = "import classifier, llama, minillama.commands.generate, minillama.commands.wise_ft"
    for command in ([str(program), "--help"], ["-c", imports]):
        done = subprocess.run([sys.executable, *command], cwd=program.parent, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_code_that_imports_a_package_needs_it(project: Path, tmp_path: Path) -> None:
    shutil.rmtree(project / "minillama", ignore_errors=True)
    (project / "llama.py").write_text("from minillama.layers import kernels\n")
    with pytest.raises(Rejected, match="missing minillama/, which the modules import"):
        pack("ada", project, tmp_path / "ada.zip")


def test_hidden_folders_of_the_package_are_left_out(project: Path, tmp_path: Path) -> None:
    for name in ("minillama/.ipynb_checkpoints/x.py", "minillama/venv/x.py"):
        (project / name).parent.mkdir(parents=True)
        (project / name).write_text("x = 1\n")
    pack("ada", project, tmp_path / "ada.zip")
    with zipfile.ZipFile(tmp_path / "ada.zip") as archive:
        assert not any(name.endswith("/x.py") for name in archive.namelist())


def test_the_same_files_give_the_same_bytes(project: Path, tmp_path: Path, packed: Path) -> None:
    for path in project.iterdir():
        path.touch()
    pack("ada", project, tmp_path / "again.zip")
    assert (tmp_path / "again.zip").read_bytes() == packed.read_bytes()


def test_command_prints_a_table_and_leaves_only_the_zip(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["ada", "--folder", "project"]) == 0
    out = capsys.readouterr().out
    assert "ada/llama.py" in out and "ada.zip: 22 files" in out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ada.zip", "project"]
    assert main(["--check", "ada.zip", "--folder", "project"]) == 0
    assert capsys.readouterr().out == out


def test_every_missing_file_is_named_at_once_with_its_command(
    project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("rope.py", *required_outputs()):
        (project / name).unlink()
    out = tmp_path / "ada.zip"
    assert main(["ada", "--folder", str(project), "--out", str(out)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 + 1 + 6 and not out.exists()
    assert "missing rope.py" in lines[0]
    assert f"missing {', '.join(GENERATED)}; make it: python run_llama.py --option generate" in lines[1]
    (lora,) = (line for line in lines if "missing sst-dev-lora-output.txt, sst-test-lora-output.txt" in line)
    for part in ("--option lora", "--train data/sst-train.txt", "--label-names data/sst-label-mapping.json"):
        assert part in lora
    assert "--dev_out sst-dev-lora-output.txt --test_out sst-test-lora-output.txt" in lora


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (b"", "is empty"),
        (b"1 ||| fine\ngood ||| a film\n", r"line 2: 'good .* whole-number label"),
        (b"1|||close\n", r"line 1: '1\|\|\|close' is not"),
        (b"1 ||| fine\n\n", "line 2: '' is not"),
        (b"5 ||| past the last label\n", "label 5; the labels of sst are 0 to 4"),
        (b"9" * 5000 + b" ||| a long number\n", "whole-number label"),
        (b"1 ||| \xff\n", "is not UTF-8"),
        (b"1 ||| A warm , funny film .\n", "has 1 rows, .*sst-dev.txt has 3; predict the whole file"),
        (b"1 ||| b\n1 ||| a\n1 ||| c\n", "line 1: 'b' is not the sentence"),
    ],
)
def test_malformed_predictions_are_refused_and_the_old_zip_stays(
    project: Path, packed: Path, text: bytes, problem: str
) -> None:
    before = packed.read_bytes()
    (project / "sst-dev-lora-output.txt").write_bytes(text)
    with pytest.raises(Rejected, match=rf"^sst-dev-lora-output.txt.*{problem}"):
        pack("ada", project, packed)
    assert packed.read_bytes() == before


def test_sentences_are_compared_only_where_the_source_is_there(project: Path, tmp_path: Path) -> None:
    write_rows(project / "sst-dev-lora-output.txt", ["another one"])
    (project / "data" / "sst-dev.txt").unlink()
    pack("ada", project, tmp_path / "ada.zip")


def test_only_a_prompting_file_may_go_on_with_the_prompt(project: Path, tmp_path: Path) -> None:
    prompted = [sentence + " Is this movie bad or good? This movie is " for sentence in SENTENCES]
    write_rows(project / "cfimdb-dev-prompting-output.txt", prompted)
    pack("ada", project, tmp_path / "ada.zip")
    write_rows(project / "cfimdb-dev-finetuning-output.txt", prompted)
    with pytest.raises(Rejected, match="cfimdb-dev-finetuning-output.txt, line 1"):
        pack("ada", project, tmp_path / "ada.zip")


@pytest.mark.parametrize("end", ["\r", "\r\n"])
def test_a_source_may_have_line_ends_of_another_system(project: Path, tmp_path: Path, end: str) -> None:
    source = project / "data" / "sst-dev.txt"
    source.write_bytes(source.read_bytes().replace(b"\n", end.encode()))
    pack("ada", project, tmp_path / "ada.zip")


@pytest.mark.parametrize("name", [*GENERATED, "feedback.txt"])
def test_text_that_is_not_utf_8_is_refused(project: Path, packed: Path, tmp_path: Path, name: str) -> None:
    (project / name).write_bytes("caf\u00e9".encode("latin-1"))
    with pytest.raises(Rejected, match=f"{name} is not UTF-8 text: .*; save it as UTF-8"):
        pack("ada", project, tmp_path / "new.zip")
    assert not (tmp_path / "new.zip").exists()
    bad = rewrite(packed, tmp_path / "bad.zip", (f"ada/{name}", b"\xff"), drop=name)
    with pytest.raises(Rejected, match=f"{name} is not UTF-8 text"):
        check(bad, "ada", tmp_path)


def test_an_oversize_report_is_refused_and_named(project: Path, tmp_path: Path) -> None:
    (project / "ada-report.pdf").write_bytes(random.Random(0).randbytes(prepare_submit.SIZE_LIMIT))
    with pytest.raises(Rejected, match=r"must stay under 10,000,000; ada/ada-report.pdf takes"):
        pack("ada", project, tmp_path / "ada.zip")
    assert [path.name for path in tmp_path.iterdir()] == ["project"]


def test_the_limit_itself_is_too_much(packed: Path, project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare_submit, "SIZE_LIMIT", packed.stat().st_size)
    with pytest.raises(Rejected, match="must stay under"):
        check(packed, "ada", project / "data")
    monkeypatch.setattr(prepare_submit, "SIZE_LIMIT", packed.stat().st_size + 1)
    assert len(check(packed, "ada", project / "data")) == 22


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("ada/stories42M.pt", "must not be in it"),
        ("ada/model.SAFETENSORS", "must not be in it"),
        ("ada/tokenizer.model", "must not be in it"),
        ("ada/__pycache__/llama.cpython-311.pyc", "must not be in it"),
        ("ada/.git/HEAD", "must not be in it"),
        ("ada/data/notes.txt", "must not be in it"),
        ("ada/sst-train.txt", "must not be in it"),
        ("ada/other-report.pdf", "'ada/other-report.pdf' must not be in it: the only PDF is ada/ada-report.pdf"),
        ("ada/docs/ada-report.pdf", "the only PDF is ada/ada-report.pdf"),
        ("ada/ADA-report.PDF", "the only PDF is ada/ada-report.pdf"),
        ("ada/tests/test_llama.py", "must not be in it"),
        ("/ada/a.py", "absolute"),
        ("C:/ada/a.py", "absolute or a Windows path"),
        ("ada/../a.py", "points outside its folder"),
        ("a.py", "outside the top folder"),
        ("bob/a.py", "one top folder, not 2: ada, bob"),
    ],
)
def test_check_refuses_what_must_not_be_inside(packed: Path, tmp_path: Path, name: str, problem: str) -> None:
    bad = rewrite(packed, tmp_path / "bad.zip", (name, b"x"))
    with pytest.raises(Rejected, match=problem):
        check(bad, "ada", tmp_path)


def test_check_takes_the_report(packed: Path, project: Path, tmp_path: Path) -> None:
    good = rewrite(packed, tmp_path / "good.zip", ("ada/ada-report.pdf", b"%PDF-1.7"))
    assert len(check(good, None, project / "data")) == 23


def test_check_refuses_links_doubles_and_gaps(packed: Path, tmp_path: Path) -> None:
    link = zipfile.ZipInfo("ada/link.py")
    link.create_system, link.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
    with pytest.raises(Rejected, match="'ada/link.py' is a symbolic link"):
        check(rewrite(packed, tmp_path / "link.zip", (link, b"/etc/hosts")), None, tmp_path)
    with pytest.warns(UserWarning, match="Duplicate name"):
        double = rewrite(packed, tmp_path / "double.zip", ("ada/llama.py", b"x"))
    with pytest.raises(Rejected, match="ada/llama.py more than once"):
        check(double, None, tmp_path)
    with pytest.raises(Rejected, match="missing rope.py"):
        check(rewrite(packed, tmp_path / "gap.zip", drop="rope.py"), None, tmp_path)
    with pytest.raises(Rejected, match="feedback.txt is empty"):
        check(rewrite(packed, tmp_path / "empty.zip", ("ada/feedback.txt", b"")), None, tmp_path)


def test_check_knows_whose_zip_it_is(project: Path, packed: Path, tmp_path: Path) -> None:
    with pytest.raises(Rejected, match="top folder is 'ada', not 'bob'"):
        check(packed, "bob", tmp_path)
    with pytest.raises(Rejected, match="'Ada' is not an id"):
        pack("Ada", project, tmp_path / "upper.zip")
    assert not (tmp_path / "upper.zip").exists()


def test_check_survives_files_that_are_no_sound_zip(packed: Path, tmp_path: Path) -> None:
    raw = packed.read_bytes()
    damaged = bytearray(raw)
    damaged[60] ^= 0xFF
    for name, content in (("text", b"hello"), ("nothing", b""), ("cut", raw[:-30]), ("damaged", bytes(damaged))):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(Rejected, match="is not a valid zip"):
            check(tmp_path / name, None, tmp_path)
    with zipfile.ZipFile(tmp_path / "empty.zip", "w"):
        pass
    with pytest.raises(Rejected, match="one top folder, not 0"):
        check(tmp_path / "empty.zip", None, tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give your ID"),
        ([], "error: give your ID, or --check ZIP; see python prepare_submit.py --help\n"),
        (["Ada"], "the ID 'Ada' may hold lowercase letters"),
        (["../ada"], "may hold lowercase letters"),
        (["ada\n"], "may hold lowercase letters"),
        (["ada", "--folder", "nowhere"], "--folder nowhere: there is no such folder"),
        (["ada", "--out", "llama.py"], "--out llama.py: it must name a file that ends in .zip"),
        (["ada", "--out", "nowhere/ada.zip"], "in a folder that exists"),
        (["ada", "--check", "ada.zip", "--out", "ada.zip"], "--check writes nothing"),
        (["ada", "--size", "3"], "unrecognized arguments: --size 3"),
    ],
)
def test_bad_options_are_one_line_and_exit_status_2(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="^2$"):
        main(arguments)
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


def test_check_of_a_missing_zip_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--check", "nowhere.zip"]) == 2
    assert capsys.readouterr().err == "prepare_submit.py: error: there is no file nowhere.zip\n"


def test_blank_lines_of_a_source_are_no_rows(project: Path, tmp_path: Path) -> None:
    source = project / "data" / "sst-dev.txt"
    source.write_bytes(b"\xef\xbb\xbf\n" + source.read_bytes().replace(b"\n", b"\r\n \r\n"))
    assert pack("me", project, tmp_path / "me.zip")


def test_the_command_imports_no_torch() -> None:
    code = "import sys, prepare_submit, fetch_data; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
