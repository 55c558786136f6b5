"""--option convert: a checkpoint, or an adapter, in the format of another program."""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from config import LlamaConfig, check_rmsnorm, parameter_shapes
from llama import llama_from_checkpoint
from lora import merge_lora_weights
from minillama.cli.flags import ADAPTER_FORMATS, FOLDER_FORMATS
from minillama.cli.loading import check_alone, fit_tokenizer, load_tokenizer, overrides, put_tokenizer_beside, report
from minillama.environment import optional_package
from minillama.formats.adapters import read_adapter, write_adapter, write_peft
from minillama.formats.checkpoint import Checkpoint, fits_float32, read_checkpoint, write_safetensors
from minillama.formats.files import atomic_file, atomic_folder, check_free, raw_bytes
from minillama.formats.huggingface import write_huggingface
from minillama.formats.keys import renamed
from minillama.formats.llama2c import write_llama2c
from minillama.formats.names import without_ending
from minillama.formats.tokenizer_json import (
    byte_pair_parts,
    sentencepiece_parts,
    space_flags,
    write_huggingface_tokenizer,
)
from minillama.formats.tokenizers import BytePairModel
from minillama.layers.precision import DTYPES
from rope import rotary_frequencies, scaled
from tokenizer import Tokenizer

State = dict[str, Tensor]
NEEDS_GGUF = "--to gguf needs the gguf package"
StopIds = Sequence[int]


def convert(args: argparse.Namespace) -> None:
    """convert: reads a checkpoint and writes it as --to says; with --adapter, merged, or that alone."""
    check_alone(args)
    if args.to in FOLDER_FORMATS:
        check_free(args.model_out)
    checkpoint = read_checkpoint(args.pretrained_model_path)
    config = replace(checkpoint.config, **overrides(args))
    report(f"model       {args.pretrained_model_path} ({checkpoint.kind}), {config.convention}")
    if args.adapter is not None:
        report(f"adapter     {args.adapter}{'' if args.to in ADAPTER_FORMATS else ', merged into the model'}")
    if args.to == "adapter":
        write_adapter(args.model_out, read_adapter(Path(args.adapter), config), config)
    elif args.to == "peft":
        check_rmsnorm(config, "the base of a peft adapter")
        adapter = read_adapter(Path(args.adapter), config)
        with atomic_folder(args.model_out) as folder:
            write_peft(folder, adapter, config, base=args.pretrained_model_path)
        if adapter.head:
            report("head        of the classifier, in classifier_head.safetensors: peft does not look at it")
    else:
        state = whole_state(args, checkpoint, config)
        if args.out_dtype is not None:
            state = {name: tensor.to(DTYPES[args.out_dtype]) for name, tensor in state.items()}
            if too_large := [name for name, tensor in state.items() if not fits_float32(tensor)]:
                raise ValueError(f"{too_large[0]} holds numbers beyond {args.out_dtype}; give another --out_dtype")
        WRITERS[args.to](args, config, state, checkpoint.stop_ids)
    report(f"wrote       {args.model_out} ({args.to})")
    if args.to.startswith("llama2c"):
        report("tokenizer   none goes with it; to open it here, name one with --tokenizer")


def whole_state(args: argparse.Namespace, checkpoint: Checkpoint, config: LlamaConfig) -> State:
    """The checkpoint's tensors, complete, with the adapter merged into them."""
    if args.adapter is None:
        return checkpoint.complete_state(config)
    llama = llama_from_checkpoint(checkpoint, dtype=None, **overrides(args))
    read_adapter(Path(args.adapter), config).apply(llama)
    return merge_lora_weights(llama).state_dict()


def to_safetensors(args: argparse.Namespace, config: LlamaConfig, state: State, stop_ids: StopIds) -> None:
    tokenizer = tokenizer_of(args, config)
    content = tokenizer.path.read_bytes()
    write_safetensors(args.model_out, state, config, stop_ids=stop_ids)
    put_tokenizer_beside(args.model_out, tokenizer, content)


def to_llama2c(version: int) -> Callable[[argparse.Namespace, LlamaConfig, State, StopIds], None]:
    return lambda args, config, state, stop_ids: write_llama2c(args.model_out, config, state, version)


def to_huggingface(args: argparse.Namespace, config: LlamaConfig, state: State, stop_ids: StopIds) -> None:
    tokenizer = tokenizer_of(args, config)
    with atomic_folder(args.model_out) as folder:
        write_huggingface(folder, config, state, tokenizer.bos_id, stop_ids or tokenizer.eos_id)
        write_huggingface_tokenizer(tokenizer, folder)


def tokenizer_of(args: argparse.Namespace, config: LlamaConfig) -> Tokenizer:
    """The model's tokenizer. Raises ValueError if it is another's."""
    tokenizer = load_tokenizer(args)
    fit_tokenizer(args.pretrained_model_path, config, tokenizer)
    return tokenizer


def to_gguf(args: argparse.Namespace, config: LlamaConfig, state: State, stop_ids: StopIds) -> None:
    """For llama.cpp, which keeps query and key in pairs as this program does, and norms in float32."""
    check_rmsnorm(config, "GGUF's llama")
    gguf = import_gguf()
    tokenizer = tokenizer_of(args, config)
    types = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
    names = renamed(state, "ours", "gguf")
    target = Path(args.model_out)
    with (
        tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as folder,
        optional_package("gguf", NEEDS_GGUF, passes=(OSError, ValueError)),
    ):
        writer = gguf.GGUFWriter(Path(folder) / "model.gguf", "llama")
        writer.add_name(Path(without_ending(args.pretrained_model_path)).name)
        writer.add_vocab_size(config.vocab_size)
        writer.add_context_length(config.max_seq_len)
        writer.add_embedding_length(config.dim)
        writer.add_block_count(config.n_layers)
        writer.add_feed_forward_length(parameter_shapes(config)["layers.0.feed_forward.w1.weight"][0])
        writer.add_head_count(config.n_heads)
        writer.add_head_count_kv(config.kv_heads)
        writer.add_rope_dimension_count(config.head_dim)
        writer.add_rope_freq_base(config.rope_theta)
        writer.add_layer_norm_rms_eps(config.layer_norm_eps)
        stored = types.get(state["tok_embeddings.weight"].dtype, "F32")
        kinds = {"F32": "ALL_F32", "F16": "MOSTLY_F16", "BF16": "MOSTLY_BF16"}
        writer.add_file_type(gguf.LlamaFileType[kinds[stored]])
        add_gguf_tokens(gguf, writer, tokenizer, config.vocab_size)
        if config.rope_scaling is not None:  # what each pair's frequency is divided by
            plain = rotary_frequencies(config.head_dim, config.rope_theta)
            writer.add_tensor("rope_freqs.weight", (plain / scaled(plain, config.rope_scaling)).numpy())
        for name, tensor in state.items():
            if name == "output.weight" and config.tie_embeddings:
                continue
            kind = "F32" if tensor.dim() == 1 else types.get(tensor.dtype, "F32")
            numbers = tensor.float() if kind == "F32" else tensor
            raw = np.frombuffer(raw_bytes(numbers), dtype=np.uint8).reshape(*tensor.shape[:-1], -1)
            writer.add_tensor(names[name], raw, raw_dtype=gguf.GGMLQuantizationType[kind])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        with (Path(folder) / "model.gguf").open("rb") as made, atomic_file(target, "wb") as file:
            shutil.copyfileobj(made, file)


def add_gguf_tokens(gguf: ModuleType, writer: Any, tokenizer: Tokenizer, count: int) -> None:
    """The vocabulary, as llama.cpp's own tokenizers of the two kinds take it: `count` tokens, as many as the embedding
    has rows, the last of them unused where the tokenizer has fewer.
    """
    special, kinds = set(tokenizer.special_ids.values()), gguf.TokenType
    if isinstance(tokenizer.model, BytePairModel):
        model = byte_pair_parts(tokenizer.model)["model"]
        tokens = [*sorted(model["vocab"], key=model["vocab"].get), *tokenizer.special_ids]
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre({"llama3": "llama-bpe", "gpt2": "gpt-2"}[tokenizer.kind])
        writer.add_token_merges([" ".join(pair) for pair in model["merges"]])
        types = [kinds.CONTROL if i in special else kinds.NORMAL for i in range(len(tokens))]
    elif tokenizer.kind == "sentencepiece":
        pieces = tokenizer.sp_model
        ids = range(tokenizer.n_words)
        tokens = [pieces.id_to_piece(i) for i in ids]
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores([pieces.get_score(i) if i < len(ids) else 0.0 for i in range(count)])
        writer.add_unk_token_id(pieces.unk_id())
        proto = tokenizer.path.read_bytes()
        sentencepiece_parts(tokenizer.path, proto)  # refuses what is no BPE with byte pieces
        strips, prefixes = space_flags(proto)
        writer.add_remove_extra_whitespaces(strips)
        writer.add_add_space_prefix(prefixes)
        types = [
            kinds.UNKNOWN
            if pieces.is_unknown(i)
            else kinds.CONTROL
            if pieces.is_control(i)
            else kinds.BYTE
            if pieces.is_byte(i)
            else kinds.NORMAL
            for i in ids
        ]
    else:
        raise ValueError(f"GGUF is written with a SentencePiece or tiktoken tokenizer, not {tokenizer.path}")
    unused = range(len(tokens), count)
    writer.add_token_list([*tokens[:count], *(f"[PAD{i}]" for i in unused)])
    writer.add_token_types([*types[:count], *(kinds.UNUSED for _ in unused)])
    writer.add_bos_token_id(tokenizer.bos_id)
    writer.add_eos_token_id(tokenizer.eos_id)
    writer.add_add_bos_token(tokenizer.adds_bos)
    writer.add_add_eos_token(False)


def import_gguf() -> ModuleType:
    """The gguf package. Raises ValueError if it is missing or broken."""
    with optional_package("gguf", NEEDS_GGUF):
        import gguf
    return gguf


WRITERS = {
    "safetensors": to_safetensors,
    "llama2c-v0": to_llama2c(0),
    "llama2c-v1": to_llama2c(1),
    "llama2c-v2": to_llama2c(2),
    "huggingface": to_huggingface,
    "gguf": to_gguf,
}
