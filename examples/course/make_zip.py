"""Packs the grader for Gradescope: setup.sh, run_autograder and the project, in one zip to upload.

examples:
  python examples/course/make_zip.py autograder.zip --torch-index ADDRESS
  python examples/course/make_zip.py autograder.zip --torch-index ADDRESS --edition spring2026 --seed 48 --hints area

ADDRESS is what pytorch.org/get-started shows after --index-url for Linux, pip and CPU. Without it pip brings CUDA. All
other options are those of grade.py, and each hand-in is judged with them; a file that one of them names is packed, too.
"""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(ROOT))

import grade  # noqa: E402
from minillama.cli.display import displayed  # noqa: E402
from minillama.cli.parser import OneLineParser  # noqa: E402

SCRIPTS = ("setup.sh", "run_autograder")


def main(arguments: list[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    return displayed(make_zip, arguments)


def make_zip(arguments: list[str] | None) -> int:
    """Writes the zip and prints what is in it."""
    parser = OneLineParser(prog="make_zip.py", description=__doc__)
    parser.add_argument("zip", type=Path, metavar="ZIP", help="the file to write, such as autograder.zip")
    parser.add_argument("--torch-index", default="", metavar="ADDRESS", help="where pip finds PyTorch for the CPU")
    options, for_grade = parser.parse_known_args(arguments)
    grader, judged = grade.options_of(["hand-in", *for_grade])
    grade.assignment_of(grader, judged)  # both leave with one line if an option or --hidden's file is wrong
    if judged.json is not None or judged.report is not None or len(judged.folders) > 1:
        parser.error("give neither --json, --report nor a folder: run_autograder sets them")
    if options.zip.suffix != ".zip" or not options.zip.absolute().parent.is_dir():
        parser.error(f"{options.zip}: it must be the name of a zip in a folder that exists")
    words, more = with_files(for_grade)
    more["grade_options.txt"] = "".join(f"{word}\n" for word in words).encode()
    if options.torch_index:
        more["torch_index.txt"] = f"{options.torch_index}\n".encode()
    with zipfile.ZipFile(options.zip, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in SCRIPTS:
            entry = zipfile.ZipInfo(name, (2000, 1, 1, 0, 0, 0))
            entry.external_attr = 0o100755 << 16  # Gradescope starts them as programs
            archive.writestr(entry, (HERE / name).read_bytes())
        for name, content in more.items():
            archive.writestr(name, content)
        for path in project_files():
            archive.write(path, path.relative_to(ROOT).as_posix())
        count = len(archive.namelist())
    print(f"wrote {options.zip}: {count} files, {options.zip.stat().st_size / 1e6:.1f} MB")
    if not options.torch_index:
        print("without --torch-index Gradescope installs PyTorch with CUDA: several gigabytes", file=sys.stderr)
    return 0


def with_files(words: list[str]) -> tuple[list[str], dict[str, bytes]]:
    """Options for the place where the zip is unpacked, and the files that they name, which the zip takes along."""
    moved, files = [], {}
    for word in words:
        flag, equals, value = word.rpartition("=")
        if Path(value).is_file():
            files[Path(value).name] = Path(value).read_bytes()
            value = Path(value).name
        moved.append(f"{flag}{equals}{value}")
    return moved, files


def project_files() -> list[Path]:
    """The files that grade.py needs: the modules, the package, the requirements and the licence."""
    package = [path for path in (ROOT / "minillama").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    return sorted([*ROOT.glob("*.py"), ROOT / "requirements.txt", ROOT / "LICENSE", *package])


if __name__ == "__main__":
    sys.exit(main())
