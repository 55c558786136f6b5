"""The command line: `python run_llama.py --option COMMAND`. Each command is a module of minillama/commands."""

from __future__ import annotations

import os
import re
import signal
import sys
import traceback
from collections.abc import Sequence
from contextlib import ExitStack

from minillama.cli.checks import check_options
from minillama.cli.display import Display, report_loss, safe_display
from minillama.cli.header import report
from minillama.cli.options import Options, parse_options, requested_help
from minillama.cli.session import create_run, resume_options
from minillama.commands import COMMANDS
from minillama.environment import Process, this_process

OVERVIEW = f"""\
usage: python run_llama.py --option COMMAND [flags]

A Llama model that generates text, classifies sentences and trains on your data. data/ holds a small model
and sample data to start with.

{"".join(f"  {command.name:12}{command.summary}" + chr(10) for command in COMMANDS)}
The most common flags:
  --prompt TEXT                the text to continue, or the sentence to classify
  --temperature T              0: always the most likely token; 1: sample from the model
  --max_new_tokens N           length of the new text in tokens
  --pretrained-model-path P    the model: a file or folder from this program, llama2.c, Meta or Hugging Face
  --train, --dev, --test FILE  labelled sentences; --label-names FILE has the class names
  --epochs N, --lr RATE        how long and how fast to train
  --batch_size N               rows per step
  --run_dir DIR, --resume      folder of a run; continue a run that stopped
  --use_gpu, --dtype bf16      device and precision
  --seed N                     random seed

All flags of a command, with examples:  python run_llama.py --option finetune --help
All flags on one page:                  docs/options.md
"""
LOST = (
    "the connection to another process broke: it printed its own error, or it was killed (out of memory?); a run that "
    "has saved its state goes on with --resume"
)


def parse(argv: Sequence[str], processes: int = 1) -> Options:
    """The options of a command line. Prints the help and exits with code 0 if `--help` is among them."""
    if (asked := requested_help(COMMANDS, argv, OVERVIEW)) is not None:
        print(asked)
        raise SystemExit(0)
    return parse_options(COMMANDS, argv, processes=processes)


def run_command(options: Options, argv: Sequence[str], out: Display) -> None:
    """Resolves defaults, checks the options, and runs the command. out: the stream for stdout."""
    with ExitStack() as held:  # the run's lock
        options = resume_options(options, argv, held) if options.resume else options.command.resolve(options)
        check_options(options)
        command = options.command
        if command.only_prints(options) or options.plan:
            out.require()
        from minillama.formats.files import check_writable  # from here on torch is imported

        if not options.plan:
            check_writable(*command.outputs(options))
        if command.trains and not options.resume and not options.plan:
            options = create_run(options, held)
        command.run(options)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command. Returns the exit code: 0, 2 for bad input (one line on stderr), 3 if --plan finds too little
    memory, or 128 + the signal number if a signal stopped it (Ctrl-C: 130).

    An error of stdout stops only a command that has no other result (141 if the reader closed the pipe).
    """
    argv = sys.argv[1:] if argv is None else argv
    with safe_display() as out:
        process = Process(0, 1, 0)  # until the options are parsed, so that --help works in any environment
        try:
            try:
                options = parse(argv)
                process = this_process()
                run_command(options.replace(processes=process.world), argv, out)
            finally:
                out.flush()
        except BrokenPipeError:  # the reader closed the pipe
            return 128 + getattr(signal, "SIGPIPE", 13)  # Windows has no such signal
        except (ValueError, OSError) as error:
            # Every process prints its error, because the cause may be in only one of them.
            who = f" (process {process.rank})" if process.rank else ""
            print(f"run_llama.py: error{who}: {error}", file=sys.stderr, flush=True)
            return getattr(error, "code", 2)
        except ImportError as error:  # a required package is missing or broken; optional ones raise ValueError
            reason = " ".join(str(error).split())[:300]
            print(f"run_llama.py: error: {reason}; type `pip install -r requirements.txt`", file=sys.stderr)
            return 2
        except RuntimeError as error:
            if process.world == 1 or not re.search("gloo|nccl|connection", str(error), re.IGNORECASE):
                raise
            print(f"run_llama.py: error (process {process.rank}): {LOST}", file=sys.stderr)
            return 2
        except KeyboardInterrupt as stop:  # or Stopped, its subclass
            report(f"run_llama.py: {str(stop) or 'stopped by Ctrl-C'}")
            return 128 + getattr(stop, "number", 2)
        report_loss(out)
        return 0


def leave(code: int) -> None:
    """Ends this process, at once if it failed among several: others may wait for it, and a usual end for them."""
    if code and os.environ.get("WORLD_SIZE", "1") != "1":
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    try:
        leave(main())
    except Exception:  # a fault of the program
        traceback.print_exc()
        leave(1)
