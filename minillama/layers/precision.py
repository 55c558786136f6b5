"""Precision: the operations that run in half precision under autocast, and those that stay in float32."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def set_up_cuda(deterministic: bool = False) -> None:
    """Sets torch's switches for CUDA. Call it before the first tensor is on a card.

    cuDNN's attention is off. From torch 2.11 on it is the first choice for cards of the H100's class. It builds a plan
    for each new shape, so each token waits for one (github.com/modelscope/FunASR/issues/3704), and with a mask its
    gradients may be NaN (github.com/pytorch/pytorch/issues/196678). deterministic: only kernels that give the same bits
    in each run; without one, torch raises RuntimeError. (docs/gpu.md)
    """
    torch.backends.cuda.enable_cudnn_sdp(False)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # torch's page on reproducibility names it
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # we read no uninitialised memory


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on a device. A GPU fetches it from pinned memory while this process goes on."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager:
    """Autocast unless `dtype` is float32: matrix products run in `dtype`; norms, softmax and losses in float32."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


@contextmanager
def cast_once(model: nn.Module) -> Iterator[None]:
    """A context under autocast and no_grad in which a weight is cast in the first pass only.

    Autocast keeps the casts only of weights that require gradients. So frozen weights require them for a while, too.
    """
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    try:
        for parameter in frozen:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


def bf16_is_native(device: torch.device) -> bool:
    """Whether the device has instructions for bfloat16 products. Without them bfloat16 is slower than float32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "mps":
        return False  # nobody has tried
    # torch has get_capabilities from version 2.13 on; with older versions the result is False.
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(capabilities.get(name) for name in ("amx_bf16", "avx512_bf16", "bf16"))


def sum_dtype(device: torch.device) -> torch.dtype:
    """The dtype of long sums on a device: float64, or float32 on a Mac's GPU, which has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def at_least_float32(x: Tensor) -> Tensor:
    """x in float32, or unchanged if its dtype is wider (tests use float64)."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def downcast_under_autocast(x: Tensor) -> Tensor:
    """x in the dtype of autocast if that is enabled, so that x is cast once and not in each product."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


def upcast_under_autocast(x: Tensor) -> Tensor:
    """x in float32 if autocast is enabled, so that the residual stream is float32 for weights of any dtype."""
    return at_least_float32(x) if torch.is_autocast_enabled(x.device.type) else x


def not_finite(what: str, dtype: torch.dtype) -> ValueError:
    """An error for numbers that are not finite, with advice."""
    advice = "the weights are damaged" if dtype == torch.float32 else "try --dtype fp32"
    return ValueError(f"{what} hold NaN or infinity in {dtype}; {advice}")
