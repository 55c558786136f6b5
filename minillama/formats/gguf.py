"""Checkpoints for llama.cpp (github.com/ggml-org/llama.cpp, docs/gguf.md), written with the gguf package."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from config import LlamaConfig, parameter_shapes
from minillama.environment import optional_package
from minillama.formats.files import atomic_file, raw_bytes
from minillama.formats.keys import renamed
from minillama.formats.tokenizer_json import byte_pair_parts, sentencepiece_parts, space_flags
from minillama.formats.tokenizers import BytePairModel
from rope import rotary_frequencies, scaled

NEEDS_GGUF = "--to gguf needs the gguf package"


def import_gguf() -> ModuleType:
    """The gguf package. Raises ValueError if it is missing or broken."""
    with optional_package("gguf", NEEDS_GGUF):
        import gguf
    return gguf


def write_gguf(path: str, config: LlamaConfig, state: dict[str, Tensor], tokenizer: Any, name: str) -> None:
    """Writes a model for llama.cpp, with query and key in our layout, and norms in float32. name: the model's."""
    gguf = import_gguf()
    types = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
    names = renamed(state, "ours", "gguf")
    target = Path(path)
    with (
        tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as folder,
        optional_package("gguf", NEEDS_GGUF, passes=(OSError, ValueError)),
    ):
        writer = gguf.GGUFWriter(Path(folder) / "model.gguf", "llama")
        writer.add_name(name)
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
        if config.rope_scaling is not None:  # the divisor of each pair's frequency
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


def add_gguf_tokens(gguf: ModuleType, writer: Any, tokenizer: Any, count: int) -> None:
    """Adds the vocabulary for llama.cpp's tokenizer. count: rows of the embedding; ids without a token are unused."""
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
        sentencepiece_parts(tokenizer.path, proto)  # raises ValueError unless it is a BPE with byte pieces
        strips, prefixes = space_flags(proto)
        writer.add_remove_extra_whitespaces(strips)
        writer.add_add_space_prefix(prefixes)
        checks = {pieces.is_unknown: kinds.UNKNOWN, pieces.is_control: kinds.CONTROL, pieces.is_byte: kinds.BYTE}
        types = [next((kind for is_kind, kind in checks.items() if is_kind(i)), kinds.NORMAL) for i in ids]
    else:
        raise ValueError(f"GGUF is written with a SentencePiece or tiktoken tokenizer, not {tokenizer.path}")
    unused = range(len(tokens), count)
    writer.add_token_list([*tokens[:count], *(f"[PAD{i}]" for i in unused)])
    writer.add_token_types([*types[:count], *(kinds.UNUSED for _ in unused)])
    writer.add_bos_token_id(tokenizer.bos_id)
    writer.add_eos_token_id(tokenizer.eos_id)
    writer.add_add_bos_token(tokenizer.adds_bos)
    writer.add_add_eos_token(False)
