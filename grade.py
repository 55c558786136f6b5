"""Judges hand-ins of the course part by part, and names the mistakes.

examples:
  python grade.py my_folder                              check your own folder (15 seconds)
  python grade.py my_folder --parts rope,adamw           only these parts
  python grade.py submissions.zip --report class.html    a class: folders, zips, or Canvas's zip of zips
  python grade.py submission --json results.json         for Gradescope
  python grade.py submissions.zip --hidden solved/hidden.json
                                                         a term's variant, from `course.py kit --solution solved`

A student's code runs in processes of its own, in a copy, with limits on time, memory, files and processes, and without
a network where the system allows it. The probes are drawn from --seed. With --hidden, edition, seed, points and what is
right come from that file, and parts that the kit had solved are ours. With --json or --report, finished hand-ins are
kept in a file beside it until all are done: after an interruption, the same command goes on.

Exit code: 0 if all points were reached; 1 if not; 2 for a folder or option that cannot be used; 130 after Ctrl-C.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minillama.cli.display import displayed
from minillama.cli.parser import COUNT, SEED, OneLineParser
from minillama.environment import HERE
from minillama.grading.kit_setups import EDITIONS, PARTS, PLAIN, Assignment, read_hidden

if TYPE_CHECKING:
    import argparse

    from minillama.grading.hand_ins import HandIn
    from minillama.grading.judge import Judgement


def main(arguments: list[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    return displayed(grade, arguments)


def options_of(arguments: list[str] | None) -> tuple[OneLineParser, argparse.Namespace]:
    parser = OneLineParser(prog="grade.py", description=__doc__)
    add = parser.add_argument
    add("folders", nargs="+", type=Path, metavar="FOLDER", help="a student's folder or zip, or one with many of them")
    add("--edition", choices=EDITIONS, help="the course's edition (default: fall2025)")
    add("--seed", type=SEED, metavar="N", help="draws the probes (default: 0)")
    add("--hidden", type=Path, metavar="FILE", help="the hidden.json of a kit: judge that kit's variant")
    add("--parts", metavar="PART,...", help="judge only these; the others are then ours (default: all)")
    add("--hints", choices=("none", "area", "full"), default="full", help="what to say of a failing part")
    add("--seconds", type=COUNT, default=30, metavar="N", help="computing time of each part (default: %(default)s)")
    add("--json", type=Path, metavar="FILE", help="write the results in Gradescope's form")
    add("--report", type=Path, metavar="FILE", help="write a page: students, parts, and how often which mistake")
    return parser, parser.parse_args(arguments)


def assignment_of(parser: OneLineParser, options: argparse.Namespace) -> Assignment:
    """The assignment that the hand-ins are judged by; ends the program with a line if the options do not fit."""
    if options.hidden is None:
        edition = options.edition or "fall2025"
        assignment = Assignment(PLAIN[edition], options.seed or 0, PARTS[edition])
    else:
        try:
            assignment = read_hidden(options.hidden)
        except (OSError, ValueError) as error:
            parser.error(f"--hidden {options.hidden}: {getattr(error, 'strerror', None) or error}")
        for flag, given, own in (
            ("edition", options.edition, assignment.setup.edition),
            ("seed", options.seed, assignment.seed),
        ):
            if given not in (None, own):
                parser.error(f"--{flag} {given}: {options.hidden} says {own}; leave --{flag} out")
    if options.parts is None:
        return assignment
    parts = options.parts.split(",")
    if wrong := [part for part in parts if part not in assignment.points]:
        parser.error(
            f"--parts {wrong[0]!r}: the parts of {assignment.setup.edition} are {', '.join(assignment.points)}"
        )
    return assignment.only(parts)


def grade(arguments: list[str] | None) -> int:
    """Judges the hand-ins and prints and writes the results; returns the exit code."""
    try:
        return judge_and_write(*options_of(arguments))
    except KeyboardInterrupt as stop:
        print(f"\ngrade.py: {str(stop) or 'interrupted'}", file=sys.stderr)
        return 130
    except OSError as error:  # such as a full disk
        where = f"{error.filename}: " if error.filename else ""
        print(f"grade.py: error: {where}{error.strerror or error}", file=sys.stderr)
        return 2


def judge_and_write(parser: OneLineParser, options: argparse.Namespace) -> int:
    """Judges the hand-ins, prints and writes the results, and returns the exit code unless it is interrupted."""
    for name in ("json", "report"):
        path = getattr(options, name)
        if path is not None and (path.is_dir() or not path.parent.is_dir()):
            parser.error(f"--{name} {path}: it must name a file in a folder that exists")
    if options.json is not None and options.report is not None and options.json.resolve() == options.report.resolve():
        parser.error(f"--json and --report are both {options.json}; give two files")
    from minillama.grading.confinement import resource

    if resource is None:
        parser.error("it needs Linux or macOS, which can limit what a process does")
    from minillama.grading.hand_ins import BadHandIn, hand_ins
    from minillama.grading.sandbox import SandboxError, namespaces

    assignment = assignment_of(parser, options)
    with tempfile.TemporaryDirectory(prefix="hand-ins-") as temporary:
        try:
            found = [one for path in options.folders for one in hand_ins(path, Path(temporary))]
        except (BadHandIn, OSError) as error:
            parser.error(str(error))
        if len(found) == 1 and found[0].folder is None:
            parser.error(f"{found[0].name}: {found[0].problem}")
        if "--net" not in namespaces():
            print("grade.py: the network is not cut off: unshare is not allowed here", file=sys.stderr)
        keep = options.report or options.json
        kept_in = keep.with_name(f"{keep.name}.part") if keep is not None and len(found) > 1 else None
        try:
            judgements = judge_all(found, options, assignment, kept_in)
        except SandboxError as error:
            print(f"grade.py: error: {error}", file=sys.stderr)
            return 2
    write_results(judgements, options)
    if kept_in is not None:
        kept_in.unlink(missing_ok=True)
    return 0 if all(one.points == one.out_of and not one.note for one in judgements) else 1


def judge_all(
    found: Sequence[HandIn], options: argparse.Namespace, assignment: Assignment, kept_in: Path | None
) -> list[Judgement]:
    """Judges all hand-ins, with a line for each.

    kept_in: a file that keeps what is done, and from which a run after an interrupted one takes it.
    """
    from minillama.grading.hand_ins import fingerprint
    from minillama.grading.judge import Judgement, judge
    from minillama.grading.sandbox import DEFAULT_LIMITS

    finished = {} if kept_in is None else read_finished(kept_in)
    limits = DEFAULT_LIMITS._replace(seconds=options.seconds, wall=3.0 * options.seconds)
    settings = [assignment.title, assignment.points, version()]
    keys = [json.dumps([one.name, one.folder and fingerprint(one.folder), *settings]) for one in found]
    if known := sum(key in finished for key in keys):
        print(f"{known} of {len(found)} were judged before: taken over from {kept_in}", flush=True)
    to_judge = sum(one.folder is not None and key not in finished for one, key in zip(found, keys, strict=True))
    many, judgements, seconds = len(found) > 1, [], []

    def judge_next(hand_in: HandIn, key: str, number: int) -> None:
        """Judges one hand-in, or takes it over; keeps and prints the judgement."""
        name, folder, problem = hand_in
        start, again = f"{number}/{len(found)} {name}: ", key in finished

        def show(part: str) -> None:
            if sys.stderr.isatty():
                print(f"\r\x1b[K{start}{part} ...", end="", file=sys.stderr, flush=True)

        if folder is None:
            judgement = not_judged(name, problem, assignment)
        elif again:
            judgement = Judgement.from_dict(finished[key])
        else:
            judgement = judge(folder, assignment, limits, name, show)
        if sys.stderr.isatty():
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
        if kept_in is not None and not again and folder is not None:
            with kept_in.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"key": key, "judgement": judgement.to_dict()}) + "\n")
        judgements.append(judgement)
        if folder is not None and not again:
            seconds.append(judgement.seconds)
        if many:
            left = (to_judge - len(seconds)) * sum(seconds) / max(len(seconds), 1)
            print(start + summary(judgement, again, left), flush=True)
        else:
            print_table(judgement, options.hints)

    try:
        for number, (hand_in, key) in enumerate(zip(found, keys, strict=True), 1):
            judge_next(hand_in, key, number)
    except KeyboardInterrupt:
        rest = f"; the same command goes on, {kept_in} holds what is done" if kept_in and kept_in.exists() else ""
        raise KeyboardInterrupt(f"interrupted after {len(judgements)} of {len(found)}{rest}") from None
    return judgements


def not_judged(name: str, problem: str, assignment: Assignment) -> Judgement:
    """No points for a hand-in that cannot be read."""
    from minillama.grading.judge import ERROR, Judgement, Verdict

    sentence = f"It cannot be judged: {problem}."
    verdicts = tuple(Verdict(part, 0, points, ERROR, sentence) for part, points in assignment.points.items())
    return Judgement(name, assignment.title, verdicts, note=problem)


def read_finished(path: Path) -> dict[str, Any]:
    """The judgements of an interrupted run, by key; a line cut short is left out."""
    finished = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            record = json.loads(line)
            finished[record["key"]] = record["judgement"]
        except (ValueError, KeyError, TypeError):
            pass
    return finished


def version() -> str:
    """A checksum of the grader: judgements of another version are made again."""
    import hashlib

    files = [path for path in sorted((HERE / "minillama" / "grading").rglob("*")) if path.suffix in (".py", ".jinja")]
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16]


def summary(judgement: Judgement, again: bool = False, left: float = 0.0) -> str:
    """The line of a hand-in in a class. again: taken over; left: seconds until all are judged, 0 if not known."""
    if judgement.note:
        return f"not judged: {judgement.note}"
    failing = [verdict.part for verdict in judgement.verdicts if verdict.word != "right"]
    text = f"{judgement.points}/{judgement.out_of}" + (f", not {', '.join(failing)}" if failing else "")
    if again:
        return f"{text} (judged before)"
    rest = f"; about {f'{left:.0f} s' if left < 90 else f'{left / 60:.0f} min'} left" if left else ""
    return f"{text} ({judgement.seconds:.0f} s{rest})"


def print_table(judgement: Judgement, hints: str) -> None:
    """Prints the verdicts on a hand-in."""
    print(f"{judgement.name}, {judgement.title}")
    for verdict in judgement.verdicts:
        points = f"{verdict.points}/{verdict.out_of}"
        print(f"  {verdict.part:<12}{points:>6}  {verdict.word}")
        if hint := verdict.hint(hints):
            print(f"{'':22}{hint}")
    print(f"  {'total':<12}{f'{judgement.points}/{judgement.out_of}':>6}  in {judgement.seconds:.0f} s")


def write_results(judgements: Sequence[Judgement], options: argparse.Namespace) -> None:
    """Writes --json and --report."""
    from minillama.cli.grading_report import gradescope, report_page
    from minillama.cli.pages import write_page

    if options.json is not None:
        results = [gradescope(one, options.hints) for one in judgements]
        names = {one.name: result for one, result in zip(judgements, results, strict=True)}
        content = results[0] if len(results) == 1 else {"students": names}
        options.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    if options.report is not None:
        write_page(options.report, report_page(judgements))
    for path in filter(None, (options.json, options.report)):
        print(f"wrote {path}")


if __name__ == "__main__":
    sys.exit(main())
