"""Input texts from the keyboard, a pipe or a file, for generate and classify."""

from __future__ import annotations

import codecs
import os
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from types import ModuleType

from minillama.cli.header import report
from minillama.cli.options import Options
from minillama.environment import PackageError, optional_package

HISTORY = ".mini-llama-history"  # in the home folder: lines typed with --interactive
ENDS = ("quit", "exit", ":q")  # lines that end an interactive session
HOW_TO_END = "Ctrl-D ends, and so does the line quit, exit or :q"
STDIN = ("-", "/dev/stdin", "/dev/fd/0", "/proc/self/fd/0")  # names of stdin; opening one fails if it is a socket


def check_stdin(options: Options) -> None:
    """Raises ValueError if an option reads the standard input, but it is closed."""
    if sys.stdin is None and (options.interactive or options.prompt_file in STDIN):
        source = "--interactive" if options.interactive else f"--prompt_file {options.prompt_file}"
        raise ValueError(f"{source} reads the standard input, which is closed; open it, or use --prompt")


def show(piece: str) -> None:
    """Prints a piece of text without a line end, and flushes."""
    sys.stdout.write(piece)
    sys.stdout.flush()


def stdout_is_utf8() -> bool:
    """Whether the encoding of stdout is UTF-8."""
    return codecs.lookup(sys.stdout.encoding or "ascii").name == "utf-8"


def read_prompts(options: Options) -> list[str]:
    """The prompts of --prompt or --prompt_file."""
    from minillama.text.labelled import LINE_END, read_text

    texts = [options.prompt]
    if options.prompt_file is not None:
        what = "file of prompts (one per line)"
        text = read_stdin(what) if options.prompt_file in STDIN else read_text(options.prompt_file, what)
        lines = LINE_END.split(text)
        texts = [line for line in lines if line.strip()]
        if skipped := len(lines) - len(texts) - (lines[-1] == ""):
            report(f"warning: {skipped} empty lines of {options.prompt_file} are skipped")
    return texts


def read_stdin(what: str) -> str:
    """The rest of the standard input, which may be a pipe, a socket or a partly read file. Decodes UTF-8 in any locale.
    Raises ValueError if it cannot be read; the message names `what` was expected.
    """
    from minillama.text.labelled import decoded_text

    name = "the standard input"
    stream = getattr(sys.stdin, "buffer", None)
    with suppress(OSError, ValueError, AttributeError):  # no file descriptor, or no such function (Windows)
        os.set_blocking(sys.stdin.fileno(), True)  # a non-blocking stream would end before all data came
    try:
        content = sys.stdin.read().encode("utf-8", "surrogateescape") if stream is None else stream.read()
    except (OSError, ValueError) as error:  # open for writing only, or closed
        raise ValueError(f"{name} cannot be read ({error}); give the name of a {what}") from error
    return decoded_text(content, name, what)


def open_history() -> tuple[ModuleType | None, Path | None]:
    """The readline module with the lines of earlier sessions, and the path of that history; None for each if it is
    unavailable. Prints a notice if readline is broken or the history cannot be kept.
    """
    try:
        with optional_package("readline", "typed lines have no history"):
            import readline

            readline.get_current_history_length()
    except PackageError as error:
        if not error.missing:
            report(f"notice: {error.short}")
        return None, None
    try:
        path = Path.home() / HISTORY
        if path.exists():
            readline.read_history_file(path)
    except Exception as error:  # no home folder, an unreadable file, a broken readline
        report(f"notice: typed lines are not saved for the next session: {error}")
        return readline, None
    return readline, path


def typed_lines() -> Iterable[str]:
    """The typed lines, until Ctrl-D or a line of `ENDS`. A terminal gets a history, saved for the next session."""
    input_prompt = "> " if sys.stdin.isatty() else ""
    readline, history = open_history() if input_prompt else (None, None)
    if hasattr(sys.stdin, "reconfigure"):
        # Prompts are UTF-8 in any locale. A line that is not UTF-8 is refused, and the loop continues.
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")
    try:
        while True:
            try:
                line = input(input_prompt)
                if line.strip().lower() in ENDS:
                    return
                yield line
            except EOFError:
                show("\n" if input_prompt else "")
                return
            except KeyboardInterrupt:
                show("\n")
                report(f"Ctrl-C stops an answer; {HOW_TO_END}")
    finally:
        if readline is not None and history is not None:
            try:
                readline.set_history_length(1000)
                readline.write_history_file(history)
            except Exception as error:  # a full disk, a missing home folder, a broken readline
                report(f"warning: the history cannot be saved: {error}")
