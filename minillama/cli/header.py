"""Lines about a run on stderr, and the header that says what runs, on what, from and to which files."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from minillama.cli.options import PROGRAM, Options
from minillama.environment import HERE, this_process

if TYPE_CHECKING:
    import torch

    from llama import Llama
    from tokenizer import Tokenizer


def report(line: str) -> None:
    """Prints a line about the run to stderr, in the main process only; stdout is for results."""
    if this_process().rank == 0:
        print(line, file=sys.stderr, flush=True)


def report_next(*arguments: str) -> None:
    """Prints a command of run_llama.py that uses what was just made, to be typed or pasted."""
    report(f"next        {shlex.join(['python', display_path(HERE / PROGRAM), *arguments])}")


def warn(problem: str | None) -> None:
    """Reports a problem that stops nothing, if there is one."""
    if problem is not None:
        report(f"warning: {problem}")


def display_path(path: Path) -> str:
    """A path of the project as one would type it in the working directory."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def print_header(
    options: Options,
    llama: Llama,
    kind: str,
    tokenizer: Tokenizer,
    device: torch.device,
    dtype: torch.dtype,
    *,
    name: str | None = None,
    data: str = "",
) -> None:
    """Prints the header. kind: of the checkpoint; name: of the model, by default its path; data: the files of data."""
    config = llama.config
    size = sum(parameter.numel() for parameter in llama.parameters())
    report(f"option      {options.option}, seed {options.seed}")
    report(f"model       {name or options.pretrained_model_path} ({kind}), {size:,} parameters")
    report(
        f"size        {config.n_layers} layers, dim {config.dim}, {config.n_heads} heads, {config.kv_heads} key/value "
        f"heads, vocabulary {config.vocab_size}, context {config.max_seq_len}"
    )
    report(f"convention  {config.convention}")
    products = f"matrix products in {str(dtype).removeprefix('torch.')}"
    if options.quantize is not None:
        products = "weights of 8 bits, matrix products in bfloat16"
    report(f"device      {device}, {products}")
    if options.adapter is not None:
        report(f"adapter     {options.adapter}")
    report(f"tokenizer   {tokenizer.path} ({tokenizer.kind})")
    if count := len(tokenizer.unused_ids):
        what = "id of the model has no piece; it is" if count == 1 else "ids of the model have no piece; they are"
        report(f"unused      {count} {what} never generated")
    if data:
        report(f"data        {data}")
    for path in options.command.outputs(options):
        report(f"writes      {path}{' (replaces the existing file)' if Path(path).is_file() else ''}")
    if names := options.ignored():
        report(f"ignored     {', '.join(names)}: without effect for --option {options.option}")
    if options.command.trains:
        processes = f", {options.processes} processes" if options.processes > 1 else ""
        report(f"run         {options.run_dir}{processes}")
