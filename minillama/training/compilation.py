"""Training with torch.compile: few graphs for all lengths, and text written without it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from minillama.layers.precision import autocast
from minillama.training.distributed import unwrapped


def compile_model(model: nn.Module, dynamic: bool, backend: str = "inductor") -> None:
    """Compiles a model in place at its first call; it must be on its device. dynamic: whether row lengths vary.

    Training and evaluation have one graph each, and one more each for a batch of one row.
    """
    getattr(model, "llama", model).prepare_to_compile()  # type: ignore[operator]
    # The notice concerns causal_mask, which gives the same result with and without its cache.
    warnings.filterwarnings("ignore", message=r"(?s).*call to a `functools\.lru_cache`-wrapped function")
    model.compile(dynamic=dynamic, backend=backend)


@contextmanager
def writing(model: nn.Module, dtype: torch.dtype) -> Iterator[Any]:
    """A context with the model that writes text, without DDP and torch.compile. dtype: of the matrix products.

    A text gets longer with each token, and torch would compile for many lengths of the cache.
    """
    bare: Any = unwrapped(model)
    compiled, bare._compiled_call_impl = bare._compiled_call_impl, None
    try:
        with autocast(next(bare.parameters()).device, dtype):
            yield bare
    finally:
        bare._compiled_call_impl = compiled
