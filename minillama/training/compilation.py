"""Training with torch.compile: few graphs for all lengths, and text written without it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from minillama.layers.precision import autocast, cast_once
from rope import rotary_table


def compile_model(model: nn.Module, device: torch.device, dynamic: bool, backend: str = "inductor") -> None:
    """Compiles a model in place at its first call. device: of training. dynamic: whether row lengths vary.

    Training and evaluation have one graph each, and one more each for a batch of one row. The usual rotary table has a
    size that depends on the number of tokens, for which torch would compile anew. So all layers get one for the whole
    context, made here.
    """
    llama: Any = getattr(model, "llama", model)
    config = llama.config
    if config.position_embedding_type == "rotary":
        sizes = (config.head_dim, config.max_seq_len, config.rope_theta)
        table = torch.view_as_real(rotary_table(*sizes, device, config.rope_scaling))
        for layer in llama.layers:
            layer.attention.rotary_table = table
    # The notice concerns causal_mask, which gives the same result with and without its cache.
    warnings.filterwarnings("ignore", message=r"(?s).*call to a `functools\.lru_cache`-wrapped function")
    model.compile(dynamic=dynamic, backend=backend)


@contextmanager
def writing(model: nn.Module, dtype: torch.dtype, sharded: bool = False) -> Iterator[Any]:
    """A context with the model that writes text, without torch.compile. dtype: of the matrix products.

    A text gets longer with each token, and torch would compile for many lengths of the cache. sharded: whether FSDP
    divides the model; it copies requires_grad, which `cast_once` changes.
    """
    compiled, model._compiled_call_impl = model._compiled_call_impl, None
    try:
        with autocast(next(model.parameters()).device, dtype), nullcontext() if sharded else cast_once(model):
            yield model
    finally:
        model._compiled_call_impl = compiled
