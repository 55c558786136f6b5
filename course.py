"""Makes what a course needs: `python course.py kit --edition fall2025 --into DIR` writes the student's kit."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

from minillama.cli.display import displayed
from minillama.cli.parser import COUNT_OR_ZERO, OneLineParser, nearest
from minillama.grading.kit_setups import EDITIONS, PARTS, VARIANTS, find_setup

DESCRIPTION = f"""\
Writes a student's kit: our modules with the bodies of the exercises cut out, public tests, a checklist that ticks
itself, a README, a notebook, the bundled model and labelled sentences. It runs alone and offline.

examples:
  python course.py kit --edition fall2025 --into kit
  python course.py kit --edition fall2025 --into kit --solution solved --seed 7301 --keep norm,adamw

The parts are {", ".join(PARTS["fall2025"])}
(lora only in fall2025). A seed makes a term's variant: other rotary pairs or another sign, LayerNorm or RMSNorm,
another place of eps, another sampling rule. There are {VARIANTS}, by the seed modulo {VARIANTS};
0, {VARIANTS}, ... are the edition itself, with other probes.
Two seeds in a row differ in the norm, the rotation and the sampling rule, so a solution of last term fails.
Keep the seed to yourself: the probes of the hidden part come from it.
"""


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns 0, or 2 for an option or a folder that cannot be used."""
    return displayed(make_kit, arguments)


def make_kit(arguments: list[str] | None) -> int:
    """Writes the kit and prints what is in it; returns the exit status."""
    parser = OneLineParser(prog="course.py", description=DESCRIPTION)
    parser.add_argument("command", choices=("kit",), help="what to make")
    parser.add_argument("--edition", choices=EDITIONS, required=True, help="which course")
    parser.add_argument("--into", type=Path, required=True, metavar="DIR", help="the kit's folder: new, or empty")
    parser.add_argument("--seed", type=COUNT_OR_ZERO, metavar="N", help="make a variant (default: the edition itself)")
    parser.add_argument("--keep", default="", metavar="PARTS", help="leave these exercises solved: norm,rope")
    solution = "write the reference solution there, with the hidden part: seeds and points"
    parser.add_argument("--solution", type=Path, metavar="DIR", help=solution)
    options = parser.parse_args(arguments)
    setup = find_setup(options.edition, options.seed)
    asked = [part.strip().replace("-", "_") for part in options.keep.split(",") if part.strip()]
    for part in asked:
        if part not in setup.parts:
            known = ", ".join(setup.parts)
            parser.error(f"--keep {part}: no such part of {setup.edition}{nearest(part, setup.parts)} ({known})")
    keep = tuple(part for part in setup.parts if part in asked)
    for flag, folder in (("--into", options.into), ("--solution", options.solution)):
        if folder is not None and (problem := folder_problem(folder)):
            parser.error(f"{flag} {folder}: {problem}")
    into = options.into.absolute()
    solved = None if options.solution is None else options.solution.absolute()
    if solved is not None and (solved.resolve() == into.resolve() or into.resolve() in solved.resolve().parents):
        parser.error(f"--solution {options.solution}: it must not be in the student's folder {options.into}")
    if solved is not None and solved.resolve() in into.resolve().parents:
        parser.error(f"--into {options.into}: it must not be in the folder of the solution")
    from minillama.grading.kit import kit_files, solved_files, write_folders

    try:
        folders: dict[Path, Mapping[str, bytes]] = {into: kit_files(setup, keep)}
        if solved is not None:
            folders[solved] = solved_files(setup, options.seed, keep)
        write_folders(folders)
    except (OSError, ValueError) as error:
        name = getattr(error, "filename", None)
        parser.error(f"{name}: {error.strerror}" if isinstance(error, OSError) and name else str(error))
    print(f"{options.into}: {setup.edition}, {', '.join(f'{name} {value}' for name, value in setup.choices().items())}")
    size = sum(map(len, folders[into].values()))
    left = len(setup.parts) - len(keep)
    print(f"{len(folders[into])} files, {size / 1e6:.1f} MB; {left} of {len(setup.parts)} parts to do")
    if solved is not None:
        print(f"{options.solution}: the solution, and hidden.json (keep both from the students)")
    return 0


def folder_problem(folder: Path) -> str | None:
    """Why a folder cannot be written; None if it can: it is new, in a folder that exists, or it is empty."""
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        return "it exists and is not a folder"
    if folder.is_dir():
        return "it is not empty" if any(folder.iterdir()) else None
    return None if folder.absolute().parent.is_dir() else "the folder above it does not exist"


if __name__ == "__main__":
    sys.exit(main())
