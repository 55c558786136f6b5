"""Status lines on stderr, and the header: model, sizes, device, input and output files of a command."""

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
    """Prints the next command to type, which uses the result of this one."""
    report(f"next        {shlex.join(['python', display_path(HERE / PROGRAM), *arguments])}")


def warn(problem: str | None) -> None:
    """Prints a warning unless `problem` is None."""
    if problem is not None:
        report(f"warning: {problem}")


def display_path(path: Path) -> str:
    """A path for display, relative to the working directory if it is inside."""
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
    """Prints the header. kind: the checkpoint's format; name: the model's (default: its path); data: the data files."""
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
        products = "8-bit weights"
    report(f"device      {device}, {products}")
    if options.adapter is not None:
        report(f"adapter     {options.adapter}")
    report(f"tokenizer   {tokenizer.path} ({tokenizer.kind})")
    if count := len(tokenizer.unused_ids):
        what = "id of the model has no piece and is" if count == 1 else "ids of the model have no piece and are"
        report(f"unused      {count} {what} never generated")
    if data:
        report(f"data        {data}")
    for path in () if options.plan else options.command.outputs(options):
        report(f"writes      {path}{' (replaces the existing file)' if Path(path).is_file() else ''}")
    if names := options.ignored():
        report(f"ignored     {', '.join(names)}: no effect with --option {options.option}")
    if options.command.trains and not options.plan:
        processes = f", {options.processes} processes" if options.processes > 1 else ""
        report(f"run         {options.run_dir}{processes}")
