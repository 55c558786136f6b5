"""Loading for the commands: device, precision, tokenizer and model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minillama.cli.flags import LORA_TARGETS
from minillama.cli.header import print_header, report
from minillama.cli.options import Options
from minillama.cli.provenance import BUNDLED_MODEL
from minillama.environment import this_process
from minillama.formats.names import tokenizer_beside

if TYPE_CHECKING:
    import torch
    from torch import nn

    from config import LlamaConfig
    from llama import Llama
    from minillama.formats.checkpoint import Checkpoint
    from tokenizer import Tokenizer

MORE_IDS = 8  # a model may have this many more ids than its tokenizer, for added tokens
ROUND_UNITS = tuple(8 << n for n in range(8))  # 8 to 1024; a vocabulary may be rounded up to a multiple of one
CHAT_NAMES = ("chat", "instruct")  # parts of the names of chat models
LARGE = 500_000_000  # parameters; by default, larger models are not converted to float32


def check_alone(options: Options) -> None:
    """Raises ValueError if there are several processes."""
    if options.processes > 1:
        raise ValueError(f"--option {options.option} runs in a single process; start it without torchrun")


def choose_device(options: Options) -> torch.device:
    """The requested device, set up for this program. Raises ValueError if it is not available.

    "cuda" is the card with the number of this process, the first one if there is a single process.
    """
    import torch

    from minillama.layers.precision import set_up_cuda

    name = options.device if options.device is not None else "cuda" if options.use_gpu else "cpu"
    process = this_process()
    if name.startswith("cuda:") and process.world > 1:
        raise ValueError(
            f"--device {name} would put {process.world} processes on one card; give --device cuda, and CUDA_VISIBLE_"
            "DEVICES to choose among the cards"
        )
    if name == "cuda":
        name = f"cuda:{process.local_rank}"
    if name.startswith("cuda"):
        set_up_cuda(options.deterministic)
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        if name.startswith("cuda") and not torch.cuda.is_available():
            flag = "--use_gpu" if options.device is None else f"--device {options.device}"
            raise ValueError(f"{flag}: no CUDA device is available here; leave it out to use the CPU") from error
        if process.world > 1:
            raise ValueError(
                f"{name}: each process needs a CUDA device of its own, and there are {torch.cuda.device_count()}; "
                "start fewer processes (--nproc_per_node)"
            ) from error
        raise ValueError(f"--device {name} is not available here; give cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda", "mps"):
        raise ValueError(f"--device {name} is not supported; give cpu, cuda, cuda:N or mps")
    if device.type == "mps":
        if process.world > 1:
            raise ValueError("--device mps runs in a single process; start it without torchrun")
        report("notice: --device mps is untested; leave it out to use the CPU if something fails")
    return device


def choose_dtype(options: Options, device: torch.device, checkpoint: Checkpoint | None = None) -> torch.dtype:
    """The precision of the matrix products. checkpoint: given for inference only."""
    from minillama.layers.precision import DTYPES, bf16_is_native

    if options.dtype != "auto":
        return DTYPES[options.dtype]
    if checkpoint is not None and device.type == "cpu":
        weights = sum(tensor.numel() for tensor in checkpoint.state.values())
        stored = checkpoint.dtype if weights > LARGE else None
        return stored if stored is not None and stored in DTYPES.values() else DTYPES["fp32"]
    return DTYPES["bf16" if bf16_is_native(device) else "fp32"]


# The tokenizer


def load_tokenizer(
    options: Options, *, new: bool = False, for_gguf: bool = False, finetuned: str | None = None
) -> Tokenizer:
    """The tokenizer of --tokenizer, else that of the checkpoint, else the default one, else the bundled one (only for a
    new model). finetuned: the file of a model that was fine-tuned with the tokenizer.
    """
    from minillama.formats.checkpoint import folder_vocabulary, read_checkpoint
    from tokenizer import Tokenizer, default_tokenizer_path

    path = options.tokenizer
    model = Path(options.pretrained_model_path)
    folder = Path(path or model)
    if folder.is_dir() and not new:
        size = folder_vocabulary(model) if model.is_dir() else None
        if found := tokenizer_of_folder(folder, size, for_gguf):
            return found
    if path is None and not new:
        likely = Path(tokenizer_beside(str(model)))
        if model.is_dir():
            likely = model.resolve().parent / "tokenizer.model"  # Llama 1 and 2: one tokenizer for all model folders
        path = likely if likely.is_file() else None
    if path is None:
        try:
            path = default_tokenizer_path()
        except FileNotFoundError:
            if finetuned is not None:
                raise FileNotFoundError(
                    f"{finetuned} was trained with the tokenizer beside {model}, which is missing; name it "
                    "with --tokenizer"
                ) from None
            if not new:
                read_checkpoint(model)  # a problem with the model itself is reported first
                raise FileNotFoundError(
                    f"there is not a tokenizer beside {model}; name one with --tokenizer (for the course's, "
                    "`python fetch_data.py tokenizer` downloads it)"
                ) from None
            path = tokenizer_beside(str(BUNDLED_MODEL))
    return Tokenizer(tokenizer_model=path)


def tokenizer_of_folder(folder: Path, size: int | None, for_gguf: bool = False) -> Tokenizer | None:
    """The tokenizer in a folder that fits a model with `size` ids: one of that size, else the largest smaller one, else
    one whose ids for text are all below `size`. None if there is none. Raises ValueError if none is readable.

    for_gguf: a tokenizer.json comes last, because a GGUF file cannot use it.
    """
    from minillama.formats.tokenizers import IN_FOLDER
    from tokenizer import Tokenizer

    names = sorted(IN_FOLDER, key=lambda name: for_gguf and name == "tokenizer.json")
    found: list[Tokenizer] = []
    error: ValueError | None = None
    for file in (folder / name for name in names if (folder / name).is_file()):
        try:
            tokenizer = Tokenizer(tokenizer_model=file)
        except ValueError as one:  # damaged, or its package is not installed
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
    """Fits the tokenizer to a model. Returns False if it does not fit."""
    try:
        tokenizer.fit_to_model(vocab_size)
    except ValueError:
        return False
    return True


def put_tokenizer_beside(model_out: str, tokenizer: Tokenizer, content: bytes) -> list[str]:
    """Writes the tokenizer's file, with `content`, beside the model. A tokenizer.json stays where it is, because it
    needs the other files of its folder. Reports the path; returns the arguments that open the model with this
    tokenizer.
    """
    from minillama.formats.files import atomic_file

    beside = Path(tokenizer_beside(model_out))
    if tokenizer.kind == "huggingface":
        report(f"the tokenizer is not copied; name it with --tokenizer {tokenizer.path}")
        return ["--pretrained-model-path", model_out, "--tokenizer", str(tokenizer.path)]
    if not (beside.exists() and beside.samefile(tokenizer.path)):
        with atomic_file(beside, "wb") as file:
            file.write(content)
    report(f"its tokenizer is {beside}")
    return ["--pretrained-model-path", model_out]


def fit_tokenizer(
    path: str | Path, config: LlamaConfig, tokenizer: Tokenizer, stop_ids: Sequence[int] = (), lies_with: str = ""
) -> None:
    """Fits the tokenizer to the model at `path`, and adds the model's stop ids to the tokenizer's.

    The model may have more ids than the tokenizer has pieces: a few added ones, or a size rounded up, or any number if
    the tokenizer is beside the model (at `lies_with`, by default `path`). It may have fewer ids if the tokenizer never
    gives the missing ones for text. Raises ValueError for a tokenizer of another model.
    """
    size, pieces = config.vocab_size, tokenizer.n_words
    model = Path(lies_with or path)
    own = {model.resolve(), Path(tokenizer_beside(str(model))).resolve()}
    near = abs(size - pieces) <= MORE_IDS or any(size == -(-pieces // unit) * unit for unit in ROUND_UNITS)
    if not (near or own & {tokenizer.path.resolve(), tokenizer.path.resolve().parent}) or not fits(tokenizer, size):
        raise ValueError(
            f"{path} has a vocabulary of {size} tokens, but {tokenizer.path} "
            f"has {pieces}; give the --tokenizer that the model was trained with"
        )
    tokenizer.fit_to_model(size, stop_ids)


# The model


def overrides(options: Options) -> dict[str, Any]:
    """The config fields that the command line overrides, with their values."""
    causal = None if options.attention is None else options.attention == "causal"
    given = {"norm": options.norm, "causal": causal, "dropout": options.dropout}
    return {name: value for name, value in given.items() if value is not None}


def open_checkpoint(options: Options, tokenizer: Tokenizer) -> Checkpoint:
    """Reads --pretrained-model-path and fits the tokenizer to it. Raises ValueError if the tokenizer is another
    model's.
    """
    from minillama.formats.checkpoint import read_checkpoint

    checkpoint = read_checkpoint(options.pretrained_model_path)
    fit_tokenizer(options.pretrained_model_path, checkpoint.config, tokenizer, checkpoint.stop_ids)
    return checkpoint


def load_llama(options: Options, checkpoint: Checkpoint, dtype: torch.dtype, mapped: bool = False) -> Llama:
    """The backbone, with the overrides of the command line and the adapter merged. dtype: of the matrix products.
    Weights are float32 for training; for inference in half precision they keep the half precision of the file.

    mapped: keep the tensors of the file, which are memory-mapped, unless an adapter is merged into them.
    """
    import torch

    from llama import llama_from_checkpoint
    from lora import merge_lora_weights
    from minillama.formats.adapters import read_adapter

    half = checkpoint.dtype in (torch.bfloat16, torch.float16)
    wide = options.command.trains or (dtype == torch.float32 and options.quantize is None) or not half
    wide = wide and not (mapped and options.adapter is None)
    llama = llama_from_checkpoint(checkpoint, dtype=torch.float32 if wide else None, **overrides(options))
    if options.adapter is not None:
        read_adapter(Path(options.adapter), llama.config).apply(llama)
        merge_lora_weights(llama)
    return llama


def is_chat_model(checkpoint: Checkpoint, tokenizer: Tokenizer) -> bool:
    """Whether a model was probably trained to chat: its name says so, its folder has a chat template, or its texts end
    with Llama 3's mark for the end of a turn.
    """
    from minillama.formats.files import read_json

    path = checkpoint.path.resolve()
    config = path / "tokenizer_config.json"
    return (
        any(word in path.name.lower() for word in CHAT_NAMES)
        or bool(list(path.glob("chat_template.*")))
        or (config.is_file() and "chat_template" in read_json(config))
        or tokenizer.special_ids.get("<|eot_id|>") in checkpoint.stop_ids
    )


def load_for_inference(options: Options) -> tuple[Llama, Tokenizer, torch.device, torch.dtype]:
    """Loads the model and its tokenizer for a command that only runs it, and prints the header."""
    check_alone(options)
    tokenizer = load_tokenizer(options)
    device = choose_device(options)
    checkpoint = open_checkpoint(options, tokenizer)
    if options.chat and not is_chat_model(checkpoint, tokenizer):
        report(
            f"warning: {checkpoint.path} seems to be no chat model, so --chat may get no sensible answer; leave out "
            "--chat to continue a text, or name a model that was trained to chat"
        )
    dtype = choose_dtype(options, device, checkpoint)
    llama = load_llama(options, checkpoint, dtype)
    print_header(options, llama, checkpoint.kind, tokenizer, device, dtype)
    return llama.to(device), tokenizer, device, dtype


def check_causal(llama: Llama) -> None:
    """Raises ValueError if the model's attention is not causal."""
    if not llama.config.causal:
        raise ValueError(
            "this model's attention is bidirectional: it would see the tokens to predict; add --attention causal"
        )


def training_window(options: Options, config: LlamaConfig) -> int:
    """The most tokens of a training row: --window, else the model's context. Raises ValueError if it is longer."""
    window = options.window or config.max_seq_len
    if window > config.max_seq_len:
        raise ValueError(f"--window {window} is longer than the model's context of {config.max_seq_len}")
    return window


def lora_settings(options: Options) -> dict[str, Any]:
    """The arguments of `lora.apply_lora`, from the options."""
    targets = [name for target in options.lora_targets for name in LORA_TARGETS.get(target, (target,))]
    settings = {"rank": options.lora_rank, "alpha": options.lora_alpha, "targets": targets}
    return settings | {"rslora": options.rslora, "dora": options.dora}


def add_lora(options: Options, model: nn.Module, beside: str = "") -> None:
    """Freezes the model, adds LoRA layers as the options ask, and reports their size. Raises ValueError if the rank is
    above the model's width. beside: names other trained parts in that report.
    """
    from lora import apply_lora, count_lora_parameters

    width = getattr(model, "llama", model).config.dim  # type: ignore[union-attr]
    if options.lora_rank > width:
        raise ValueError(f"--lora_rank is {options.lora_rank}, above the model's width of {width}")
    apply_lora(model, **lora_settings(options))
    adapters, total, percent = count_lora_parameters(model)
    report(f"LoRA        {adapters:,} of {total:,} parameters ({percent:.2f} %){beside}")
