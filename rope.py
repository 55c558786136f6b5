"""Rotary position embedding (arXiv 2104.09864).

Convention: the pair (2i, 2i+1) of a head's features is one complex number, turned by the angle position *
theta^(-2i/hd):

    even' = even * cos - odd * sin        odd' = even * sin + odd * cos

Meta and llama2.c store query and key weights for these interleaved pairs; Hugging Face stores them for split halves.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

Scaling = tuple[float, float, float, int]  # config.RopeScaling


def rotary_frequencies(head_dim: int, theta: float, device: torch.device | None = None) -> Tensor:
    """theta^(-2i/head_dim), radians a position, of each pair i: (head_dim / 2,), float32."""
    return 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim)


def scaled(frequencies: Tensor, scaling: Scaling) -> Tensor:
    """The frequencies (radians a position) of a model whose context was stretched after its training, as Llama 3.1's.

    A pair that turns round high_freq_factor times or more within the original context keeps its frequency, one that
    turns low_freq_factor times or less is slowed down by the factor, and between the two it is a mean of both that
    moves from one to the other (github.com/meta-llama/llama-models, models/llama3).
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

    float32 whatever the model's dtype: bfloat16 cannot tell position 256 from 257. Being no module's buffer, the table
    stays out of state dicts and out of reach of `.to(dtype)`.
    """
    with torch.inference_mode(False):  # a table first made under inference_mode could never serve training
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
    """The table's rows for the positions from `start` to before `end`. Raises ValueError beyond max_seq_len."""
    if end > max_seq_len:
        raise ValueError(f"a sequence of {end} tokens is longer than the model's context of {max_seq_len}")
    # A power of two: few tables, and none of a size that only the checkpoint's word stands for.
    return rotary_table(head_dim, 1 << (end - 1).bit_length(), theta, device, scaling)[start:end]


def reshape_for_broadcast(freqs_cis: Tensor, x: Tensor) -> Tensor:
    """Views a table (seq, features) as (1, seq, 1, features), to be multiplied with x (batch, seq, heads, features)."""
    if freqs_cis.shape != (x.shape[1], x.shape[-1]):
        raise ValueError(f"table of shape {tuple(freqs_cis.shape)} does not fit x of shape {tuple(x.shape)}")
    return freqs_cis[None, :, None, :]


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Turns the interleaved pairs of x (batch, seq, heads, head_dim) by a table (seq, head_dim / 2); keeps x's
    dtype.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32)).contiguous()
    pairs = torch.view_as_complex(wide.unflatten(-1, (-1, 2)))  # (batch, seq, heads, head_dim / 2)
    return torch.view_as_real(pairs * reshape_for_broadcast(table, pairs)).flatten(-2).to(x.dtype)


def apply_rotary_emb(
    query: Tensor,
    key: Tensor,
    head_dim: int,
    max_seq_len: int,
    theta: float = 10000.0,
    scaling: Scaling | None = None,
    start: int = 0,
) -> tuple[Tensor, Tensor]:
    """Turns query (batch, seq, heads, head_dim) and key (batch, seq, kv_heads, head_dim) by their positions, `start`
    and those that follow.

    Raises ValueError if they go beyond max_seq_len.
    """
    table = rotary_rows(start, start + query.shape[1], head_dim, max_seq_len, theta, query.device, scaling)
    return rotate(query, table), rotate(key, table)
