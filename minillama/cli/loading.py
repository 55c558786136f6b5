"""Device, precision, tokenizer and model of a run, and the header that names them."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Container, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minillama.cli.checks import output_files
from minillama.cli.flags import DEFAULT_PRESET, OPTIONS_FROM_FINE_TUNED, OUTPUT_ENDINGS, TRAINING
from minillama.cli.options import flag, lora_settings, unused
from minillama.cli.provenance import BUNDLED_MODEL
from minillama.environment import HERE, this_process
from minillama.formats.names import tokenizer_beside

if TYPE_CHECKING:
    import torch
    from torch import nn

    from classifier import LlamaEmbeddingClassifier, LlamaPromptClassifier
    from config import LlamaConfig
    from llama import Llama
    from minillama.formats.checkpoint import Checkpoint, FineTuned
    from minillama.text.labelled import Row
    from minillama.training.distributed import Processes
    from minillama.training.loop import Settings
    from minillama.training.run_directory import RunDirectory
    from tokenizer import Tokenizer


MORE_IDS = 8  # that a model may have beyond its tokenizer's: tokens that were added
ROUND_UNITS = tuple(8 << n for n in range(8))  # to whose multiples a vocabulary is rounded up: 8 to 1024
LARGE = 500_000_000  # weights; a model of more is not widened to float32 unasked
DEMO_DATA = {
    "train": "demo-train.txt",
    "dev": "demo-dev.txt",
    "test": "demo-test.txt",
    "label_names": "demo-label-mapping.json",
}


def report(line: str) -> None:
    """Prints a line about the run to stderr, once however many processes there are; stdout is for its result."""
    if this_process().rank == 0:
        print(line, file=sys.stderr, flush=True)


def report_next(*arguments: str) -> None:
    """Tells how to use what was just made: a command of run_llama.py with these arguments, to be typed or pasted."""
    report(f"next        {shlex.join(['python', display_path(HERE / 'run_llama.py'), *arguments])}")


def warn(problem: str | None) -> None:
    """Reports a problem that stops nothing, if there is one."""
    if problem is not None:
        report(f"warning: {problem}")


def log_of(run: RunDirectory | None) -> Callable[[str], None]:
    """A function that reports a line, and adds it to the log of the run if there is one."""

    def log(line: str) -> None:
        report(line)
        if run is not None:
            run.log(line)

    return log


def check_alone(args: argparse.Namespace) -> None:
    """Raises ValueError if there are several processes, for an option that has no use for them."""
    if args.processes > 1:
        raise ValueError(f"--option {args.option} runs in one process; start it without torchrun")


def agree_on_run(args: argparse.Namespace, processes: Processes) -> None:
    """Takes the run's folder from the main process, which made it. Raises ValueError if another process has read the
    options of another run.
    """
    folder, *others = processes.gather(args.run_dir)
    if other := next((other for other in others if other not in (None, folder)), None):
        raise ValueError(f"one process would resume {folder}, another {other}; name the run's folder with --run_dir")
    args.run_dir = folder


def choose_device(args: argparse.Namespace) -> torch.device:
    """The device asked for. Raises ValueError if there is no such device here."""
    import torch

    name = args.device if args.device is not None else "cuda" if args.use_gpu else "cpu"
    if name == "cuda" and this_process().world > 1:
        name = f"cuda:{this_process().local_rank}"  # a device for each process
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        if name.startswith("cuda") and not torch.cuda.is_available():
            raise ValueError(
                f"{name}: no CUDA device is available here; leave out --use_gpu, or give --device cpu"
            ) from error
        raise ValueError(f"--device {name} is not available here; give cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device {name} is not supported; give cpu, cuda or cuda:N")
    return device


def choose_dtype(args: argparse.Namespace, device: torch.device, checkpoint: Checkpoint | None = None) -> torch.dtype:
    """The precision of the matrix products, for the model of `checkpoint`."""
    from minillama.layers.precision import DTYPES, bf16_is_native

    if args.dtype != "auto":
        return DTYPES[args.dtype]
    if args.option in ("generate", "perplexity") and device.type == "cpu":
        weights = 0 if checkpoint is None else sum(tensor.numel() for tensor in checkpoint.state.values())
        stored = None if checkpoint is None or weights <= LARGE else checkpoint.dtype
        return stored if stored is not None and stored in DTYPES.values() else DTYPES["fp32"]
    return DTYPES["bf16" if bf16_is_native(device) else "fp32"]


def use_bundled_defaults(args: argparse.Namespace, typed: Container[str]) -> None:
    """Puts what ships in the place of a default file that is not here, says so, and notes it in args.substituted. What
    was typed stays. For wise_ft and classify what was not typed is None: the file of the fine-tuned model will say it.
    """
    if args.option in OPTIONS_FROM_FINE_TUNED:
        judges = ("label_names", "dev_out", "test_out") if args.option == "wise_ft" else ()
        for name in (*OPTIONS_FROM_FINE_TUNED[args.option], *judges):
            if name not in typed:
                setattr(args, name, None)
        return
    if "pretrained_model_path" not in typed and not Path(args.pretrained_model_path).exists():
        if args.option not in ("pretrain", "tokenizer", "report"):
            report(
                f"{args.pretrained_model_path} is not here (python fetch_data.py brings it); "
                f"taking the bundled model, {display_path(BUNDLED_MODEL)}"
            )
            args.pretrained_model_path = display_path(BUNDLED_MODEL)
            args.substituted.append("pretrained_model_path")
    if args.option == "sft" and not (args.train or args.dev):
        report(f"no --train and --dev were named; taking the demo data, {display_path(HERE / 'data')}/demo-qa-*")
        for split in ("train", "dev", *(() if args.test else ("test",))):
            setattr(args, split, display_path(HERE / "data" / f"demo-qa-{split}.jsonl"))
            args.substituted.append(split)
    if args.option in OUTPUT_ENDINGS:
        needed = [name for name in DEMO_DATA if name != "train" or args.option != "prompt"]
        missing = [getattr(args, name) for name in needed if not Path(getattr(args, name)).exists()]
        demo = bool(missing) and not any(name in typed for name in DEMO_DATA)
        if demo:
            report(
                f"{missing[0]} is not here (python fetch_data.py brings it); taking the demo data, "
                f"{display_path(HERE / 'data')}/demo-*"
            )
            for name, file in DEMO_DATA.items():
                setattr(args, name, display_path(HERE / "data" / file))
            args.substituted += DEMO_DATA
        own = [name for name in ("dev", "test") if name in typed and f"{name}_out" not in typed]
        left = [name for name in needed if name not in typed]
        if 0 < len(left) < len(needed):
            defaults = ", ".join(f"{flag(name)} {getattr(args, name)}" for name in left)
            report(f"warning: {defaults} by default: do they belong to the files you named?")
        for split in ("dev", "test"):
            if f"{split}_out" not in typed:
                name = f"{'demo' if demo else 'cfimdb'}-{split}-{OUTPUT_ENDINGS[args.option]}"
                setattr(args, f"{split}_out", name)
        if any(not Path(getattr(args, split)).name.startswith("cfimdb") for split in own):
            report(
                f"warning: predictions go to {args.dev_out} and {args.test_out}; --dev_out and --test_out name others"
            )


def display_path(path: Path) -> str:
    """A path of ours as one would type it here."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def load_tokenizer(args: argparse.Namespace) -> Tokenizer:
    """The tokenizer asked for, else the one that came with the checkpoint, else the default one; for a new model, if
    there is none of these, the bundled one.
    """
    from minillama.formats.checkpoint import folder_vocabulary, read_checkpoint
    from tokenizer import Tokenizer, default_tokenizer_path

    path = args.tokenizer
    new = args.option == "pretrain" and not args.continued
    model = Path(args.pretrained_model_path)
    folder = Path(path or model)
    if folder.is_dir() and not new:
        size = folder_vocabulary(model) if model.is_dir() else None
        if found := tokenizer_of_folder(folder, size, args.option == "convert" and args.to == "gguf"):
            return found
    if path is None and not new:
        likely = Path(tokenizer_beside(str(model)))
        if model.is_dir():
            likely = model.resolve().parent / "tokenizer.model"  # Llama 1 and 2 came with one for all their folders
        path = likely if likely.is_file() else None
    if path is None:
        try:
            path = default_tokenizer_path()
        except FileNotFoundError:
            if args.option in OPTIONS_FROM_FINE_TUNED:
                raise FileNotFoundError(
                    f"{args.finetuned} was trained with the tokenizer that lies with {args.pretrained_model_path}, and "
                    "there is none; name it with --tokenizer"
                ) from None
            if not new:
                read_checkpoint(args.pretrained_model_path)  # what is wrong with the model itself is told first
                raise FileNotFoundError(
                    f"no tokenizer lies with {args.pretrained_model_path}; name its own with --tokenizer (for the "
                    "course's, `python fetch_data.py tokenizer` brings it)"
                ) from None
            path = tokenizer_beside(str(BUNDLED_MODEL))
    return Tokenizer(tokenizer_model=path)


def tokenizer_of_folder(folder: Path, size: int | None, for_gguf: bool = False) -> Tokenizer | None:
    """The tokenizer in a folder that fits a model with `size` ids: with as many pieces, else the largest with fewer,
    else one that gives text no id that the model lacks. None if there is none; raises ValueError if none can be read.

    for_gguf: a tokenizer.json, which GGUF cannot be written with, comes last.
    """
    from minillama.formats.tokenizers import IN_FOLDER
    from tokenizer import Tokenizer

    names = sorted(IN_FOLDER, key=lambda name: for_gguf and name == "tokenizer.json")
    found: list[Tokenizer] = []
    error: ValueError | None = None
    for file in (folder / name for name in names if (folder / name).is_file()):
        try:
            tokenizer = Tokenizer(tokenizer_model=file)
        except ValueError as one:  # damaged, or of a package that is not installed
            error = error or one
            continue
        if size in (None, tokenizer.n_words) or (for_gguf and tokenizer.kind != "huggingface"):
            return tokenizer
        found.append(tokenizer)
    if not found and error is not None:
        raise error
    below = [tokenizer for tokenizer in found if size is not None and tokenizer.n_words <= size]
    if size is None or not found:
        return next(iter(found), None)
    return max(below, key=lambda one: one.n_words) if below else next((t for t in found if fits(t, size)), found[0])


def fits(tokenizer: Tokenizer, vocab_size: int) -> bool:
    """Fits the tokenizer to a model, and tells whether that could be."""
    try:
        tokenizer.fit_to_model(vocab_size)
    except ValueError:
        return False
    return True


def put_tokenizer_beside(model_out: str, tokenizer: Tokenizer, content: bytes) -> list[str]:
    """Writes `content`, of the tokenizer's file, beside the model of which it is; a tokenizer.json, which says itself
    what its marks are only with other files beside it, stays where it is. Tells where to look for it; returns the
    arguments that open the model with it.
    """
    from minillama.formats.files import atomic_file

    beside = Path(tokenizer_beside(model_out))
    if tokenizer.kind == "huggingface":
        report(f"its tokenizer stays where it is; name it with --tokenizer {tokenizer.path}")
        return ["--pretrained-model-path", model_out, "--tokenizer", str(tokenizer.path)]
    if not (beside.exists() and beside.samefile(tokenizer.path)):
        with atomic_file(beside, "wb") as file:
            file.write(content)
    report(f"its tokenizer is {beside}")
    return ["--pretrained-model-path", model_out]


def tokenize_data(
    args: argparse.Namespace,
    data: dict[str, list[Row]],
    tokenizer: Tokenizer,
    context: int,
    before: str = "",
    question: str | None = None,
) -> dict[str, list[Row]]:
    """The rows of each split with their ids; one warning if sentences had to be cut to the model's context."""
    from minillama.text.batches import tokenize_rows

    done, cut = {}, 0
    for split, rows in data.items():
        done[split], cut_here = tokenize_rows(
            rows, tokenizer, context, before=before, question=question, max_sentence_len=args.max_sentence_len
        )
        cut += cut_here
    if cut:
        total = sum(map(len, data.values()))
        report(f"warning: {cut} of {total} sentences were cut; the model's context has room for {context} tokens a row")
    return done


def overrides(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of the model's config that the command line overrides."""
    causal = None if args.attention is None else args.attention == "causal"
    given = {"norm": args.norm, "causal": causal, "dropout": args.dropout}
    return {name: value for name, value in given.items() if value is not None}


def fit_tokenizer(
    path: str | Path, config: LlamaConfig, tokenizer: Tokenizer, stop_ids: Sequence[int] = (), lies_with: str = ""
) -> None:
    """Fits the tokenizer to the model at `path`, whose own stop ids join the tokenizer's.

    The model may have more ids than the tokenizer has pieces: a few that were added, or up to a round number, or, if
    the tokenizer lies with the model (`lies_with`: where that is, by default `path`), any number. It may have fewer, if
    text gives none of the others. Raises ValueError for a tokenizer of another model.
    """
    size, pieces = config.vocab_size, tokenizer.n_words
    model = Path(lies_with or path)
    own = {model.resolve(), Path(tokenizer_beside(str(model))).resolve()}
    near = abs(size - pieces) <= MORE_IDS or any(size == -(-pieces // unit) * unit for unit in ROUND_UNITS)
    if not (near or own & {tokenizer.path.resolve(), tokenizer.path.resolve().parent}) or not fits(tokenizer, size):
        raise ValueError(
            f"{path} has a vocabulary of {size}, {tokenizer.path} one of "
            f"{pieces}; give the --tokenizer that the model was trained with"
        )
    tokenizer.fit_to_model(size, stop_ids)


def open_checkpoint(args: argparse.Namespace, tokenizer: Tokenizer) -> Checkpoint:
    """The checkpoint at --pretrained-model-path, to which the tokenizer is fitted. Raises ValueError if it is
    another's.
    """
    from minillama.formats.checkpoint import read_checkpoint

    checkpoint = read_checkpoint(args.pretrained_model_path)
    fit_tokenizer(args.pretrained_model_path, checkpoint.config, tokenizer, checkpoint.stop_ids)
    return checkpoint


def adopt(args: argparse.Namespace, found: FineTuned) -> None:
    """Takes what was not typed from the run that made the file; what ships is found wherever one is. Raises ValueError
    if the file does not say it.
    """
    from config import shown

    inherited = found.options.get("substituted")
    if isinstance(inherited, list):
        args.substituted = [name for name in inherited if name not in args.typed]
    for name in OPTIONS_FROM_FINE_TUNED[args.option]:
        if getattr(args, name) is None:
            value = found.options.get(name)
            kind = int if name in ("max_sentence_len", "batch_size") else str
            optional = name in ("tokenizer", "max_sentence_len") and value is None
            if not optional and (type(value) is not kind or not value):
                raise ValueError(f"{found.path} says of {name} {shown(value)}; give it with --{name.replace('_', '-')}")
            if kind is str and name != "pooling" and value and not Path(value).exists():
                value = display_path(HERE / value) if (HERE / value).exists() else value
                if name == "tokenizer" and not Path(value).exists():
                    raise FileNotFoundError(
                        f"{found.path} was trained with the tokenizer {value}, which is not here; name it with "
                        "--tokenizer"
                    )
            setattr(args, name, value)


def load_classifier(
    args: argparse.Namespace, found: FineTuned, device: torch.device, dtype: torch.dtype, base: str = "not read"
) -> tuple[LlamaEmbeddingClassifier | LlamaPromptClassifier, Tokenizer, tuple[str, ...]]:
    """The fine-tuned classifier, on the CPU, announced by the header; its tokenizer; and what stands before and behind
    a sentence, if the model is asked. base: what is told of the model that it came from.
    """
    from classifier import classifier_of
    from minillama.text.batches import prompt_parts

    tokenizer = load_tokenizer(args)
    fit_tokenizer(found.path, found.config, tokenizer, lies_with=args.pretrained_model_path)
    model = classifier_of(found, tokenizer)
    model.pooling = args.pooling
    prompt = prompt_parts(found.template, found.words, args.pooling) if found.head == "prompt" else ()
    report(f"finetuned   {found.path} ({found.options.get('option')}, {found.head} head)")
    print_header(args, model.llama, base, tokenizer, device, dtype)
    if prompt:
        report(f"prompt      {'{sentence}'.join(prompt)}")
    return model, tokenizer, prompt


def load_llama(args: argparse.Namespace, checkpoint: Checkpoint, dtype: torch.dtype) -> Llama:
    """The backbone, with the overrides of the command line, and the adapter. dtype: of the matrix products; weights
    that are trained are float32 all the same, and to run a model in half precision they stay as the file has them.
    """
    import torch

    from llama import llama_from_checkpoint
    from lora import merge_lora_weights
    from minillama.formats.adapters import read_adapter

    half = checkpoint.dtype in (torch.bfloat16, torch.float16)
    wide = args.option in TRAINING or (dtype == torch.float32 and args.quantize is None) or not half
    llama = llama_from_checkpoint(checkpoint, dtype=torch.float32 if wide else None, **overrides(args))
    if args.adapter is not None:
        read_adapter(Path(args.adapter), llama.config).apply(llama)
        merge_lora_weights(llama)
    return llama


def print_header(
    args: argparse.Namespace, llama: Llama, kind: str, tokenizer: Tokenizer, device: torch.device, dtype: torch.dtype
) -> None:
    """Prints what is about to run, on what, from and to which files."""
    config = llama.config
    size = sum(parameter.numel() for parameter in llama.parameters())
    report(f"option      {args.option}, seed {args.seed}")
    new = args.option == "pretrain" and not args.continued
    name = args.preset or DEFAULT_PRESET if new else args.pretrained_model_path
    report(f"model       {name} ({kind}), {size:,} parameters")
    report(
        f"size        {config.n_layers} layers, dim {config.dim}, {config.n_heads} heads, {config.kv_heads} key/value "
        f"heads, vocabulary {config.vocab_size}, context {config.max_seq_len}"
    )
    report(f"convention  {config.convention}")
    products = f"matrix products in {str(dtype).removeprefix('torch.')}"
    if args.quantize is not None:
        products = "weights of 8 bits, matrix products in bfloat16"
    report(f"device      {device}, {products}")
    if args.adapter is not None:
        report(f"adapter     {args.adapter}")
    report(f"tokenizer   {tokenizer.path} ({tokenizer.kind})")
    if count := len(tokenizer.unused_ids):
        what = "id of the model has no piece; it is" if count == 1 else "ids of the model have no piece; they are"
        report(f"unused      {count} {what} never generated")
    if args.option in OUTPUT_ENDINGS:
        files = ([("train", args.train)] if args.option != "prompt" else []) + [("dev", args.dev), ("test", args.test)]
        report(f"data        {', '.join(f'{split} {path}' for split, path in files)}, labels {args.label_names}")
    if args.option == "sft":
        splits = [split for split in ("train", "dev", "test") if getattr(args, split)]
        report(f"data        {', '.join(f'{split} {getattr(args, split)}' for split in splits)}")
    for path in output_files(args):
        report(f"writes      {path}{' (in the place of what is there)' if Path(path).is_file() else ''}")
    if names := unused(args):
        report(f"ignored     {', '.join(names)}: without effect for --option {args.option}")
    if args.option in TRAINING:
        report(f"run         {args.run_dir}{f', {args.processes} processes' if args.processes > 1 else ''}")


def check_causal(llama: Llama) -> None:
    """Raises ValueError if a token sees what follows it."""
    if not llama.config.causal:
        raise ValueError(
            "this model's attention is bidirectional: it would see what it is to predict; add --attention causal"
        )


def add_lora(args: argparse.Namespace, model: nn.Module, beside: str = "") -> None:
    """Freezes the model and adds the LoRA layers that the options ask for. Raises ValueError if the rank is above
    the model's width. beside: what else is trained, for the line that tells of it.
    """
    from lora import apply_lora, count_lora_parameters

    width = getattr(model, "llama", model).config.dim  # type: ignore[union-attr]
    if args.lora_rank > width:
        raise ValueError(f"--lora_rank is {args.lora_rank}; the model is {width} wide")
    apply_lora(model, **lora_settings(args))
    adapters, total, percent = count_lora_parameters(model)
    report(f"LoRA        {adapters:,} of {total:,} parameters ({percent:.2f} %){beside}")


def load_for_inference(args: argparse.Namespace) -> tuple[Llama, Tokenizer, torch.device, torch.dtype]:
    """All that an option needs which only runs a model, in one process: the model on its device, announced by the
    header.
    """
    check_alone(args)
    tokenizer = load_tokenizer(args)
    device = choose_device(args)
    checkpoint = open_checkpoint(args, tokenizer)
    dtype = choose_dtype(args, device, checkpoint)
    llama = load_llama(args, checkpoint, dtype)
    print_header(args, llama, checkpoint.kind, tokenizer, device, dtype)
    return llama.to(device), tokenizer, device, dtype


def settings_of(args: argparse.Namespace, dtype: torch.dtype) -> Settings:
    """How to train, from the options."""
    from minillama.training.loop import Settings

    return Settings(
        lr=args.lr,
        dtype=dtype,
        betas=(0.9, args.adam_beta2),
        micro_batch_size=args.micro_batch_size,
        schedule=args.schedule,
        warmup_steps=args.warmup_steps,
        min_lr=args.min_lr,
        lr_multipliers={"lora_B": args.lora_plus},
        weight_decay=args.weight_decay,
        max_grad_norm=args.max_grad_norm,
        patience=args.patience,
        save_every=args.save_every,
    )
