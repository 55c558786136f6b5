"""--option convert: writes a checkpoint or an adapter in the format of another program."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

from minillama.cli import flags
from minillama.cli.bundled import use_bundled_model
from minillama.cli.checks import check_model_out, model_files
from minillama.cli.header import report
from minillama.cli.loading import check_alone, fit_tokenizer, load_tokenizer, overrides, put_tokenizer_beside
from minillama.cli.options import Command, Flag, Group, Options
from minillama.formats.names import without_ending

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from config import LlamaConfig
    from minillama.formats.checkpoint import Checkpoint

FILE_FORMATS = ("safetensors", "llama2c-v0", "llama2c-v1", "llama2c-v2", "gguf")
FOLDER_FORMATS = ("huggingface", "peft")
ADAPTER_FORMATS = ("adapter", "peft")  # for an adapter without its model
TO = Flag(
    "--to",
    "format of --model_out: safetensors is ours, llama2c-v0 to -v2 (int8) are for llama2.c, gguf for llama.cpp, "
    "huggingface for transformers; for an --adapter without its model: adapter (ours) or peft",
    (*FILE_FORMATS, *FOLDER_FORMATS, "adapter"),
    "safetensors",
)

# Of a config: what does not change the numbers, and the sizes that the shapes of the weights show.
MAY_DIFFER = ("dropout", "max_seq_len", "use_cache", "attention_kernel", "hidden_dim", "multiple_of")
AVERAGE = Flag(
    "--average FILE",
    "other checkpoints with the same sizes: the mean of all weights is written. A file named twice counts "
    "twice. Runs that began with the same weights are often better together (model soup)",
    default=[],
    nargs="+",
)


def check(options: Options) -> None:
    if options.average and options.adapter is not None:
        raise ValueError(
            "--average and --adapter cannot be combined; merge the adapter first, in a conversion of its own"
        )
    if options.to in ADAPTER_FORMATS and options.adapter is None:
        raise ValueError(f"--to {options.to} writes an adapter; name it with --adapter")


def outputs(options: Options) -> list[str]:
    if options.to == "safetensors":
        return model_files(options)
    path = check_model_out(options)
    return [] if options.to in FOLDER_FORMATS else [path]  # the command creates a new folder


def run(options: Options) -> None:
    """Writes a checkpoint in the format of --to, with --adapter merged; or writes only the adapter."""
    from config import check_rmsnorm
    from minillama.formats.adapters import read_adapter, write_peft
    from minillama.formats.checkpoint import read_checkpoint
    from minillama.formats.files import atomic_folder, check_free

    check_alone(options)
    if options.to in FOLDER_FORMATS:
        check_free(options.model_out)
    checkpoint = read_checkpoint(options.pretrained_model_path)
    config = replace(checkpoint.config, **overrides(options))
    report(f"model       {options.pretrained_model_path} ({checkpoint.kind}), {config.convention}")
    if options.average:
        report(f"average     with {', '.join(options.average)}")
    if options.adapter is not None:
        report(f"adapter     {options.adapter}{'' if options.to in ADAPTER_FORMATS else ', merged into the model'}")
    if options.to == "adapter":
        write_own_adapter(options, config, checkpoint)
    elif options.to == "peft":
        check_rmsnorm(config, "the base of a peft adapter")
        adapter = read_adapter(Path(options.adapter), config)
        with atomic_folder(options.model_out) as folder:
            write_peft(folder, adapter, config, base=options.pretrained_model_path)
        if adapter.head:
            name = f"classifier_head.safetensors (pooling {adapter.pooling})"
            report(f"head        the classifier head is in {name}; peft does not read it")
    else:
        write_model(options, config, whole_state(options, checkpoint, config), checkpoint.stop_ids)
    report(f"wrote       {options.model_out} ({options.to})")
    if options.to.startswith("llama2c"):
        report("tokenizer   none is written; to open the model here, name one with --tokenizer")


def write_own_adapter(options: Options, config: LlamaConfig, checkpoint: Checkpoint) -> None:
    """Writes the adapter, with the classes and the base's checksum if it is of a classifier, as our file."""
    from minillama.formats.adapters import read_adapter, write_adapter
    from minillama.formats.checkpoint import read_fine_tuned
    from minillama.formats.files import read_torch
    from minillama.layers.precision import DTYPES

    base, path = options.pretrained_model_path, Path(options.adapter)
    adapter = read_adapter(path, config)
    is_classifier = path.is_file() and "label_names" in read_torch(path, mapped=True)
    classifier = read_fine_tuned(path, base) if is_classifier else None
    if classifier is not None and not classifier.has_base(checkpoint.complete_state(config)):
        raise ValueError(f"{path} was trained on another model than {base}; name its base with --pretrained-model-path")
    dtype = None if options.out_dtype is None else DTYPES[options.out_dtype]
    write_adapter(options.model_out, adapter, config, base, classifier, dtype)
    if classifier is not None:
        report(f"classes     {', '.join(classifier.label_names)}; --option classify --finetuned {options.model_out}")


def whole_state(options: Options, checkpoint: Checkpoint, config: LlamaConfig) -> dict[str, Tensor]:
    """The complete state dict, with the adapter merged, in the precision of --out_dtype."""
    from llama import llama_from_checkpoint
    from lora import merge_lora_weights
    from minillama.formats.adapters import read_adapter
    from minillama.formats.checkpoint import fits_float32
    from minillama.layers.precision import DTYPES

    if options.average:
        state = mean_of_states(options, checkpoint, config)
    elif options.adapter is None:
        state = checkpoint.complete_state(config)
    else:
        llama = llama_from_checkpoint(checkpoint, dtype=None, **overrides(options))
        read_adapter(Path(options.adapter), config).apply(llama)
        state = merge_lora_weights(llama).state_dict()
    if options.out_dtype is not None:
        state = {name: tensor.to(DTYPES[options.out_dtype]) for name, tensor in state.items()}
        if too_large := [name for name, tensor in state.items() if not fits_float32(tensor)]:
            raise ValueError(f"{too_large[0]} has values too large for {options.out_dtype}; give another --out_dtype")
    return state


def mean_of_states(options: Options, checkpoint: Checkpoint, config: LlamaConfig) -> dict[str, Tensor]:
    """The mean of the weights of `checkpoint` and --average (model soup, arXiv 2203.05482), in the first's precision.

    Raises ValueError if a model computes something else.
    """
    import torch

    from minillama.formats.checkpoint import read_checkpoint

    others = [read_checkpoint(path) for path in options.average]
    for other in others:
        theirs = replace(other.config, **overrides(options), **{name: getattr(config, name) for name in MAY_DIFFER})
        for name in (field.name for field in fields(config)):
            if getattr(theirs, name) != getattr(config, name):
                raise ValueError(
                    f"--average {other.path}: its {name} is {getattr(theirs, name)}, that of {checkpoint.path} is "
                    f"{getattr(config, name)}; name models of one kind"
                )
    states = [one.complete_state(config) for one in (checkpoint, *others)]
    return {
        name: torch.stack([state[name].float() for state in states]).mean(0).to(tensor.dtype)
        for name, tensor in states[0].items()
    }


def write_model(options: Options, config: LlamaConfig, state: dict[str, Tensor], stop_ids: Sequence[int]) -> None:
    """Writes a complete model in the format of --to."""
    from config import check_rmsnorm
    from minillama.formats.checkpoint import write_safetensors
    from minillama.formats.files import atomic_folder
    from minillama.formats.gguf import import_gguf, write_gguf
    from minillama.formats.huggingface import write_huggingface
    from minillama.formats.llama2c import write_llama2c
    from minillama.formats.tokenizer_json import write_huggingface_tokenizer

    path = options.model_out
    if options.to.startswith("llama2c"):
        write_llama2c(path, config, state, int(options.to[-1]))
        return
    if options.to == "gguf":
        check_rmsnorm(config, "GGUF's llama")
        import_gguf()
    tokenizer = load_tokenizer(options, for_gguf=options.to == "gguf")
    fit_tokenizer(options.pretrained_model_path, config, tokenizer)
    if options.to == "gguf":
        write_gguf(path, config, state, tokenizer, Path(without_ending(options.pretrained_model_path)).name)
    elif options.to == "huggingface":
        with atomic_folder(path) as folder:
            write_huggingface(folder, config, state, tokenizer.bos_id, stop_ids or tokenizer.eos_id)
            write_huggingface_tokenizer(tokenizer, folder)
    else:
        content = tokenizer.path.read_bytes()
        write_safetensors(path, state, config, stop_ids=stop_ids)
        put_tokenizer_beside(path, tokenizer, content)


COMMAND = Command(
    "convert",
    "write a checkpoint in the format of another program",
    (Group("the result", (TO, AVERAGE, flags.OUT_DTYPE, flags.MODEL_OUT)), flags.MODEL),
    run,
    """
python run_llama.py --option convert --out_dtype fp16 --pretrained-model-path data/mini-llama.safetensors \\
    --model_out half.safetensors
python run_llama.py --option convert --pretrained-model-path run-1.safetensors \\
    --average run-2.safetensors --model_out mean.safetensors
python run_llama.py --option pretrain --norm rmsnorm --corpus README.md --dim 64 --n_layers 2 --max_seq_len 128 \\
    --batch_size 4 --warmup_steps 5 --model_out mine.safetensors
python run_llama.py --option convert --to huggingface --pretrained-model-path mine.safetensors --model_out mine
""",
    default_texts={"out_dtype": "the checkpoint's own"},
    resolve=use_bundled_model,
    check=check,
    inputs=lambda options: [options.pretrained_model_path, *options.average],
    outputs=outputs,
)
