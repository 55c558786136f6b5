"""Faster kernels for attention and for the product of a Linear: dense, packed or int8. Shapes as in llama.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

Product = Callable[[Tensor], Tensor]  # (..., in) -> (..., out)
FEW_ROWS = 4  # most rows for torch's int8 kernel on the CPU; for more rows, weights are first converted to bfloat16
INT8_WIDTH = 16  # torch's int8 kernel reads past the end of a row if its length is not a multiple of this


def kernel_mask(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A mask for torch's kernels: bool, or float in the dtype of the queries."""
    return mask if mask is None or mask.dtype == torch.bool else mask.to(dtype)


def fused_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, causal: bool, dropout: float = 0.0
) -> Tensor:
    """torch's fused attention: query (B, H, T, hd), key and value (B, H or K, S, hd) -> (B, H, T, hd).

    causal: whether attention is causal if `mask` is None.
    """
    if not takes_groups(query, mask):
        key, value = repeated(key, query.shape[1]), repeated(value, query.shape[1])
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=kernel_mask(mask, query.dtype),
        dropout_p=dropout,
        is_causal=causal and mask is None,
        enable_gqa=query.shape[1] != key.shape[1],
    )


def takes_groups(query: Tensor, mask: Tensor | None) -> bool:
    """Whether torch's fused kernels take fewer key/value heads than query heads.

    On CUDA only flash attention does, which takes half precision and no mask. For other inputs, torch 2.6 to 2.10 would
    compute all scores in memory.
    """
    return query.device.type == "cpu" or (mask is None and query.dtype in (torch.float16, torch.bfloat16))


def repeated(heads: Tensor, count: int) -> Tensor:
    """Key/value heads (B, K, S, hd), each as often as query heads share it -> (B, count, S, hd)."""
    return heads if heads.shape[1] == count else heads.repeat_interleave(count // heads.shape[1], dim=1)


def single_token_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Attention for one new token: query (B, H, 1, hd), key and value (B, K, S, hd) -> (B, H, 1, hd).

    The heads of a group are rows of one product, so each key is read once. mask: see `masks.build_mask`.
    """
    B, K = key.shape[:2]
    grouped = query.reshape(B, K, -1, query.shape[-1])  # (B, K, H / K, hd)
    if mask is not None and mask.shape[1] > 1:  # a mask for each head
        mask = mask.reshape(len(mask), K, -1, mask.shape[-1])  # (B or 1, K, H / K, S)
    mixed = F.scaled_dot_product_attention(grouped, key, value, attn_mask=kernel_mask(mask, query.dtype))
    return mixed.reshape(*query.shape[:-1], -1)


# The product of a Linear


def dense_product(weight: Tensor) -> Product:
    """x W^T, W (out, in), in W's dtype."""
    return lambda x: F.linear(x.to(weight.dtype), weight)


def packed_product(weight: Tensor) -> Product:
    """x W^T on the CPU with W in oneDNN's blocked layout, by the kernels of torch.compile.

    For few rows it takes half the time of torch's usual product (docs/performance.md).
    """
    width, dtype = weight.shape[1], weight.dtype
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, 16)  # a layout for about 16 rows
    linear = torch.ops.mkldnn._linear_pointwise

    def product(x: Tensor) -> Tensor:
        x = x.to(dtype)
        if x.numel() > width:
            return linear(x, packed, None, "none", [], "")
        # One row is repeated to four, because that kernel reads weights a fifth faster than the kernel for one row.
        return linear(x.view(1, width).expand(4, -1), packed, None, "none", [], "")[:1].view(*x.shape[:-1], -1)

    return product


def int8_weights(weight: Tensor) -> tuple[Tensor, Tensor]:
    """W (out, in) as int8 from -127 to 127, and the float32 scale of each row (out,): its largest weight / 127."""
    wide = weight.float()
    scale = wide.abs().amax(1).clamp(min=1e-30) / 127
    return (wide / scale[:, None]).round().to(torch.int8), scale


def int8_product(whole: Tensor, scale: Tensor, few_rows: int = FEW_ROWS) -> Product:
    """x W^T with W as `int8_weights` and x in bfloat16; the sums are float32, and on a GPU rounded to bfloat16.

    few_rows: most rows for torch's int8 kernel.
    """
    on_cpu = whole.device.type == "cpu"
    has_kernel = not on_cpu or whole.shape[1] % INT8_WIDTH == 0
    ones = torch.ones_like(scale, dtype=torch.bfloat16)  # torch's kernel for the CPU has no float32 scales

    def product(x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).to(torch.bfloat16)
        if has_kernel and len(rows) <= few_rows:
            out = torch._weight_int8pack_mm(rows, whole, ones)
        else:
            out = F.linear(rows, whole.to(torch.bfloat16))
        out = out * scale
        return (out if on_cpu else out.to(torch.bfloat16)).view(*x.shape[:-1], -1)

    return product


def int8_is_fast(weight: Tensor, rows: int) -> bool:
    """Whether `int8_product` is the fastest product of an int8 weight with `rows` rows; on the CPU always True.

    On a GPU it is measured against bfloat16, once for each shape: the kernel of torch 2.13 or earlier may take longer
    than a product of twice the bytes, or not exist.
    """
    return weight.device.type == "cpu" or _int8_is_fast(*weight.shape, rows, weight.device)


@cache
def _int8_is_fast(out: int, width: int, rows: int, device: torch.device) -> bool:
    if device.type == "mps":
        return False  # nobody has measured it
    draw = torch.Generator(device).manual_seed(0)
    weight = torch.randn(out, width, device=device, generator=draw)
    x = torch.randn(rows, width, device=device, generator=draw)
    whole, scale = int8_weights(weight)
    products = dense_product(dequantized(whole, scale)), int8_product(whole, scale, rows)
    return fastest(products, x, partial(gpu_seconds, device=device)) == 1


def dequantized(whole: Tensor, scale: Tensor) -> Tensor:
    """W of `int8_weights` in bfloat16."""
    return (whole * scale[:, None]).to(torch.bfloat16)


def fastest(products: Sequence[Product], x: Tensor, seconds: Callable[[Callable[[], object]], float]) -> int:
    """The index of the fastest product of x. One that fails, or differs by 2 % from the first one, does not count.

    seconds(run): the time that a run takes.
    """
    wanted, times = products[0](x).float(), {}
    for index, product in enumerate(products):
        try:
            error = (product(x).float() - wanted).norm()
        except RuntimeError:  # among them NotImplementedError: torch has no such kernel for the device
            continue
        if error <= 0.02 * wanted.norm():
            times[index] = seconds(partial(product, x))
    return min(times, key=lambda index: times[index])


def gpu_seconds(run: Callable[[], object], device: torch.device) -> float:
    """The seconds of a run on a GPU, the median of nine, with weights from its memory and not from its caches."""
    other = torch.empty(2**28, dtype=torch.uint8, device=device)
    times = []
    with torch.cuda.device(device):
        for _ in range(9):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            other.zero_()  # replaces what the caches hold, and takes longer than it takes to launch the run
            start.record()
            run()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end) / 1e3)
    return median(times)


def product_of(weight: Tensor, scale: Tensor | None = None, pack: bool = True, rows: int = 1) -> Product:
    """The fastest product for a weight on its device. scale: of `int8_weights`. pack: whether a copy may be made.

    rows: how many a GPU multiplies with it at once. Where int8 is not fast there, the weight is kept in bfloat16.
    """
    if scale is not None and int8_is_fast(weight, rows):
        return int8_product(weight, scale, FEW_ROWS if weight.device.type == "cpu" else rows)
    if scale is not None:
        return dense_product(dequantized(weight, scale))
    return packed_product(weight) if pack and can_pack(weight) else dense_product(weight)


def can_pack(weight: Tensor) -> bool:
    """Whether torch has a oneDNN layout for the weight on this processor."""
    if weight.device.type != "cpu" or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    bf16 = weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return bf16 or weight.dtype == torch.float32
