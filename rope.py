"""Rotary position embedding (arXiv 2104.09864).

Convention: features (2i, 2i+1) of a head are one complex number, rotated by the angle position * theta^(-2i/hd):

    even' = even * cos - odd * sin        odd' = even * sin + odd * cos

Meta and llama2.c store query and key weights for these interleaved pairs, Hugging Face for split halves.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

Scaling = tuple[float, float, float, int]  # config.RopeScaling


def rotary_frequencies(head_dim: int, theta: float, device: torch.device | None = None) -> Tensor:
    """The frequency theta^(-2i/head_dim) of each pair i, in radians per position: (head_dim / 2,), float32."""
    return 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim)


def scaled(frequencies: Tensor, scaling: Scaling) -> Tensor:
    """Rotary frequencies for a context extended after training, as in Llama 3.1.

    A pair with high_freq_factor or more turns within the original context keeps its frequency. With low_freq_factor
    turns or fewer, the frequency is divided by the factor. Between the two it is interpolated
    (github.com/meta-llama/llama-models, models/llama3).
    """
    factor, low, high, original_context = scaling
    turns = frequencies * original_context / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return (1.0 - kept) * frequencies / factor + kept * frequencies


@lru_cache(maxsize=8)
def rotary_table(
    head_dim: int, seq_len: int, theta: float, device: torch.device, scaling: Scaling | None = None
) -> Tensor:
    """e^(i angle) for every position and pair: (seq_len, head_dim / 2), complex64.

    Always float32: bfloat16 cannot distinguish positions 256 and 257. The table is not a module's buffer: state dicts
    do not contain it, and `.to(dtype)` does not change it.
    """
    with torch.inference_mode(False):  # a table made under inference_mode could not be used in training
        frequencies = rotary_frequencies(head_dim, theta, device)
        if scaling is not None:
            frequencies = scaled(frequencies, scaling)
        angles = torch.outer(torch.arange(seq_len, dtype=torch.float32, device=device), frequencies)
        return torch.complex(angles.cos(), angles.sin())


def rotary_rows(
    start: int,
    end: int,
    head_dim: int,
    max_seq_len: int,
    theta: float,
    device: torch.device,
    scaling: Scaling | None = None,
) -> Tensor:
    """The rows of the table for positions `start` to `end` - 1. Raises ValueError beyond max_seq_len."""
    if end > max_seq_len:
        raise ValueError(f"a sequence of {end} tokens is longer than the model's context of {max_seq_len}")
    # The length is a power of two, so few tables are made. It is not max_seq_len, which may be huge in a damaged file.
    return rotary_table(head_dim, 1 << (end - 1).bit_length(), theta, device, scaling)[start:end]


def reshape_for_broadcast(freqs_cis: Tensor, x: Tensor) -> Tensor:
    """Views a table (seq, features) as (1, seq, 1, features), to be multiplied with x (batch, seq, heads, features)."""
    if freqs_cis.shape != (x.shape[1], x.shape[-1]):
        raise ValueError(f"table of shape {tuple(freqs_cis.shape)} does not fit x of shape {tuple(x.shape)}")
    return freqs_cis[None, :, None, :]


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Rotates the interleaved pairs of x (batch, seq, heads, head_dim) by a table (seq, head_dim / 2), in float32."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32)).contiguous()
    pairs = torch.view_as_complex(wide.unflatten(-1, (-1, 2)))  # (batch, seq, heads, head_dim / 2)
    return torch.view_as_real(pairs * reshape_for_broadcast(table, pairs)).flatten(-2).to(x.dtype)


def rotate_in_real_numbers(x: Tensor, table: Tensor) -> Tensor:
    """`rotate` for compiled code, because torch.compile makes no code for complex numbers.

    table: cosines and sines, (seq, head_dim / 2, 2).
    """
    even, odd = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = table[None, :, None].unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).to(x.dtype)


def apply_rotary_emb(
    query: Tensor,
    key: Tensor,
    head_dim: int,
    max_seq_len: int,
    theta: float = 10000.0,
    scaling: Scaling | None = None,
    start: int = 0,
) -> tuple[Tensor, Tensor]:
    """Rotates query (batch, seq, heads, head_dim) and key (batch, seq, kv_heads, head_dim) from `start` on."""
    table = rotary_rows(start, start + query.shape[1], head_dim, max_seq_len, theta, query.device, scaling)
    return rotate(query, table), rotate(key, table)
