"""--option convert: a checkpoint, or an adapter, in the format of another program."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

from torch import Tensor

from adapters import read_adapter, write_peft
from checkpoint import Checkpoint, read_checkpoint, write_safetensors
from config import LlamaConfig
from environment import check_alone, check_vocabulary, load_tokenizer, overrides, report
from evaluation import DTYPES
from files import atomic_folder, check_free
from formats import check_rmsnorm, write_huggingface, write_llama2c
from llama import llama_from_checkpoint
from lora import merge_lora_weights, remove_lora
from options import FOLDER_FORMATS, tokenizer_beside
from tokenizer import Tokenizer
from tokenizer_files import write_huggingface_tokenizer

State = dict[str, Tensor]


def convert(args: argparse.Namespace) -> None:
    """convert: reads a checkpoint and writes it as --to says; with --adapter, merged, or with --to peft that alone."""
    check_alone(args)
    if args.to in FOLDER_FORMATS:
        check_free(args.model_out)
    checkpoint = read_checkpoint(args.pretrained_model_path)
    config = replace(checkpoint.config, **overrides(args))
    report(f"model       {args.pretrained_model_path} ({checkpoint.kind}), {config.convention}")
    if args.to == "peft":
        adapter = read_adapter(Path(args.adapter), config)
        with atomic_folder(args.model_out) as folder:
            write_peft(folder, adapter, config, base=args.pretrained_model_path)
    else:
        state = whole_state(args, checkpoint, config)
        if args.out_dtype is not None:
            state = {name: tensor.to(DTYPES[args.out_dtype]) for name, tensor in state.items()}
        WRITERS[args.to](args, config, state)
    report(f"wrote       {args.model_out} ({args.to})")


def whole_state(args: argparse.Namespace, checkpoint: Checkpoint, config: LlamaConfig) -> State:
    """The checkpoint's tensors, complete, with the adapter merged into them."""
    if args.adapter is None:
        return checkpoint.complete_state(config)
    llama = llama_from_checkpoint(checkpoint, config.norm, config.causal, dtype=None)
    read_adapter(Path(args.adapter), config).apply(llama)
    return remove_lora(merge_lora_weights(llama)).state_dict()


def to_safetensors(args: argparse.Namespace, config: LlamaConfig, state: State) -> None:
    tokenizer = tokenizer_of(args, config)
    beside = Path(tokenizer_beside(args.model_out))
    if not (beside.exists() and beside.samefile(tokenizer.path)) and tokenizer.path.is_file():
        shutil.copyfile(tokenizer.path, beside)
    write_safetensors(args.model_out, state, config)


def to_llama2c(version: int) -> Callable[[argparse.Namespace, LlamaConfig, State], None]:
    return lambda args, config, state: write_llama2c(args.model_out, config, state, version)


def to_huggingface(args: argparse.Namespace, config: LlamaConfig, state: State) -> None:
    tokenizer = tokenizer_of(args, config)
    with atomic_folder(args.model_out) as folder:
        write_huggingface(folder, config, state, tokenizer.bos_id, tokenizer.eos_id)
        write_huggingface_tokenizer(tokenizer, folder)


def tokenizer_of(args: argparse.Namespace, config: LlamaConfig) -> Tokenizer:
    """The model's tokenizer. Raises ValueError if it is another's."""
    tokenizer = load_tokenizer(args)
    check_vocabulary(args, config, tokenizer)
    return tokenizer


def to_gguf(args: argparse.Namespace, config: LlamaConfig, state: State) -> None:
    """For llama.cpp, which keeps query and key in pairs as this program does, and norms in float32."""
    check_rmsnorm(config, "GGUF's llama")
    gguf = import_gguf()
    tokenizer = tokenizer_of(args, config)
    # TODO
    raise NotImplementedError


def import_gguf() -> ModuleType:
    """The gguf package. Raises ValueError if it is not installed."""
    try:
        import gguf
    except ImportError as error:
        raise ValueError("--to gguf needs the gguf package: pip install gguf") from error
    return gguf


WRITERS = {
    "safetensors": to_safetensors,
    "llama2c-v0": to_llama2c(0),
    "llama2c-v1": to_llama2c(1),
    "llama2c-v2": to_llama2c(2),
    "huggingface": to_huggingface,
    "gguf": to_gguf,
}
