"""Checks of the options before any input is read. Imports no torch."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from minillama.cli.data_files import share_of
from minillama.cli.options import Options, all_flags
from minillama.cli.parser import POSITIVE
from minillama.formats.names import RUN_FILES, RUNS, path_and_fold, tokenizer_beside

CORPUS_ENDINGS = (".txt", ".tokens")


def check_options(options: Options) -> None:
    """Raises ValueError for options that contradict each other. Reads and writes no file."""
    check_paths(options)
    if options.use_gpu and options.device and not options.device.startswith("cuda"):
        raise ValueError(f"--use_gpu contradicts --device {options.device}; give one of them")
    check_foreign_flags(options)
    options.command.check(options)


def check_paths(options: Options) -> None:
    """Raises ValueError if an output is also an input, or would be written into a folder that is read."""
    outputs = options.command.outputs(options)
    texts = path_and_fold(options.prompt_file)[0] if options.prompt_file else None
    read = [options.config, options.tokenizer, options.adapter, texts, *options.command.inputs(options)]
    inputs = {str(Path(path).resolve()) for path in read if path}
    run = options.finetuned if options.finetuned and Path(options.finetuned).is_dir() else None
    inputs |= {str(Path(run, name).resolve()) for name in RUN_FILES if run}
    corpora = options.corpus if "corpus" in options.command.keys else []
    inputs |= {str(Path(text_and_weight(text)[0]).resolve()) for text in corpora}
    named = (options.pretrained_model_path, options.adapter, options.tokenizer)
    folders = {Path(path).resolve() for path in named if path}
    for path in outputs:
        if around := folders & set(Path(path).resolve().parents):
            raise ValueError(f"{path} is inside {around.pop()}, which is an input; write it elsewhere")
        if str(Path(path).resolve()) in inputs:
            raise ValueError(f"{path} is both input and output; give another name for the output")
    for text in corpora:
        folder = Path(text_and_weight(text)[0]).resolve()
        for path in outputs:
            inside = folder in Path(path).resolve().parents
            if inside and Path(path).suffix.lower() in CORPUS_ENDINGS:
                raise ValueError(f"{path} would be one of the texts of --corpus {text}; write it elsewhere")
        run = options.run_dir or RUNS
        if options.command.trains and folder in Path(run, "a").resolve().parents:
            raise ValueError(
                f"the run's folder, {run}, is inside --corpus {text}, and its log would be one of the texts; put "
                "the texts into a separate folder, or give a --run_dir elsewhere"
            )
    if options.run_dir is not None:
        for path in outputs:
            if Path(path).resolve().parent == Path(options.run_dir).resolve() and Path(path).name in RUN_FILES:
                raise ValueError(f"{path} is one of the run's own files; give another name")


def check_foreign_flags(options: Options) -> None:
    """Raises ValueError for a flag of another command. The header lists flags that merely have no effect."""
    known = all_flags(options.commands)
    for key in options.changed(*known):
        flag = known[key]
        if flag.elsewhere and key not in options.command.keys:
            users = [command.name for command in options.commands if key in command.keys]
            why = flag.elsewhere.format(users=", ".join(users))
            raise ValueError(f"{flag.name} {why}; leave it out for --option {options.option}")


def text_and_weight(text: str) -> tuple[str, float]:
    """The path and the weight of one text of --corpus. Raises ValueError if the path is missing, or the weight after
    the last `=` is not a number above 0.
    """
    path, sign, weight = text.rpartition("=")
    if not text or (sign and not path):
        raise ValueError(f"--corpus {text!r} names no text; give a text file or a folder of text files")
    if not sign or Path(text).exists():
        return text, 1.0
    try:
        return path, POSITIVE(weight)
    except argparse.ArgumentTypeError as error:
        raise ValueError(f"--corpus {text}: the weight {error}") from error


def check_corpus(options: Options, weights: bool = False) -> None:
    """Raises ValueError if --corpus is missing, or a text has a weight that the command does not use."""
    if not options.corpus:
        raise ValueError(f"--option {options.option} needs --corpus: text files, or folders of text files")
    if not weights and any(text_and_weight(text)[1] != 1.0 for text in options.corpus):
        raise ValueError(f"--option {options.option} reads each text once; leave out the weights of --corpus")


def check_differ(paths: Iterable[str]) -> None:
    """Raises ValueError if two of the paths are the same file."""
    paths = list(paths)
    files = [Path(path).resolve() for path in paths if Path(path).resolve() != Path(os.devnull)]
    if len(set(files)) < len(files):
        raise ValueError(f"two of {', '.join(paths)} are the same file; give each its own name")


def check_model_out(options: Options) -> str:
    """The path of --model_out. Raises ValueError if it is missing."""
    if not options.model_out:
        raise ValueError(f"--option {options.option} needs --model_out, the file to write")
    return options.model_out


FEW_ROWS = 50


def weak_dev(options: Options, data: Mapping[str, Sequence[Any]]) -> str | None:
    """A warning if the rows of --dev are those of --train, or too few to choose by; None if neither.

    The interval of an accuracy p on n rows is 1.96 sqrt(p (1 - p) / n) wide on each side: at most 0.98 / sqrt(n).
    """
    if not data.get("train") or not data.get("dev"):
        return None
    count = len(data["dev"])
    if data["train"] != data["dev"]:
        unlabelled = len({getattr(row, "label", row) for row in data["dev"]}) == 1  # a placeholder: no score
        if count >= FEW_ROWS or unlabelled:
            return None
        luck = " and the best epoch on them is partly luck;" if options.epochs > 1 else ""
        share = share_of(options.dev)
        hold_out = "hold out more, for example --dev 0.3, or " if share is not None and share < 0.3 else ""
        more = f"{hold_out}label more rows" if share is not None else "give --dev more rows"
        off = f"a share of them that is right can be off by {min(1, count**-0.5):.2f} (95 %);"
        return f"dev has {count} {'row' if count == 1 else 'rows'}: {off}{luck} {more}"
    files = options.train if options.train == options.dev else f"{options.train} and {options.dev}"
    return (
        f"--train and --dev have the same {len(data['dev'])} rows ({files}): the dev scores show what was learnt by "
        "heart, and choose the wrong epoch; give --dev rows that are not in --train"
    )


def model_files(options: Options) -> list[str]:
    """The paths of the model and its tokenizer. Raises ValueError if both have the same name."""
    beside = tokenizer_beside(check_model_out(options))
    if beside == str(Path(options.model_out)):
        raise ValueError(f"--model_out {options.model_out} is its tokenizer's name; give one that ends in .safetensors")
    stays = options.tokenizer and Path(options.tokenizer).resolve() == Path(beside).resolve()
    return [options.model_out, *([] if stays else [beside])]


def refuse(options: Options, names: Iterable[str], why: str) -> None:
    """Raises ValueError, with the reason `why`, if one of the flags is not at its default."""
    if changed := options.changed(*names):
        raise ValueError(f"{why}; leave out --{changed[0]}")


def check_prompts(options: Options, *others: str) -> None:
    """Raises ValueError if prompts have two sources. others: more flags that --interactive excludes."""
    if options.interactive:
        refuse(
            options, ("prompt", "prompt_file", *others), "--interactive asks for prompts and answers each one at once"
        )
    if options.prompt_file is not None:
        refuse(options, ["prompt"], "--prompt_file contains the prompts")


def check_training(options: Options) -> None:
    """Raises ValueError for training settings that contradict each other."""
    if options.json and not options.plan:
        raise ValueError("--json prints a plan as JSON; add --plan, or leave it out")
    if options.plan and options.processes > 1:
        raise ValueError("--plan measures a single process; start it without torchrun")
    if options.fsdp and options.dtype == "fp16":
        raise ValueError("--fsdp does not go with --dtype fp16 (each shard would choose its own loss scale); give bf16")
    if options.changed("decay_share") and options.schedule != "linear":
        raise ValueError(f"--decay_share is for --schedule linear, not {options.schedule}; give only one of them")
    if options.min_lr > options.lr:
        raise ValueError(f"--min_lr {options.min_lr:g} is above --lr {options.lr:g}; give at most that")


def check_template(options: Options) -> None:
    """Raises ValueError if the template has an unknown field, or not exactly one {sentence}."""
    fields = re.findall(r"\{\w*\}", options.template)
    if unknown := set(fields) - {"{sentence}", "{labels}"}:
        raise ValueError(f"--template has {min(unknown)}; it allows {{sentence}} and {{labels}}")
    if fields.count("{sentence}") != 1:
        raise ValueError(f"--template {options.template!r} must contain {{sentence}} exactly once")
