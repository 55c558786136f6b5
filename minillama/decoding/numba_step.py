"""One decoding step of a Llama on the CPU, as plain loops that Numba compiles. Shapes as in llama.py.

A token costs the time to read all weights from memory. These loops read them at nearly the memory's speed; torch's
kernels for one row do not, and between them is other work. Weights are float32, bfloat16, or int8 with a float32 scale
for each row. Activations and sums are float32.
"""

from __future__ import annotations

from typing import NamedTuple

import numba
import numpy as np
from numba.extending import overload
from numpy.typing import NDArray

Array = NDArray[np.float32]
# Sums may be reordered, so that the compiler uses vector instructions. NaN and infinity keep their meaning, because
# damaged weights must be noticed.
fast = {"reassoc", "contract", "nsz", "arcp", "afn"}


class Block(NamedTuple):
    """The arrays of a `LlamaLayer`. A matrix is (rows, columns) of `dot`'s types, its float32 scale is (rows,)."""

    attention_norm: Array
    attention_bias: Array  # of LayerNorm; zeros for RMSNorm
    query_key_value: NDArray  # ((H + 2 K) hd, D)
    query_key_value_scale: Array
    output: NDArray  # (D, H hd)
    output_scale: Array
    ffn_norm: Array
    ffn_bias: Array
    gate_up: NDArray  # (2 F, D)
    gate_up_scale: Array
    down: NDArray  # (D, F)
    down_scale: Array


@numba.njit(fastmath=fast, cache=True)
def normalize(x, weight, bias, eps, centred, out):
    """LayerNorm if `centred`, else RMSNorm: (D,) -> out (D,)."""
    mean = np.float32(0)
    if centred:
        for i in range(x.size):
            mean += x[i]
        mean /= np.float32(x.size)
    squares = np.float32(0)
    for i in range(x.size):
        squares += (x[i] - mean) * (x[i] - mean)
    scale = np.float32(1) / np.sqrt(squares / np.float32(x.size) + np.float32(eps))
    for i in range(x.size):
        out[i] = (x[i] - mean) * scale * weight[i] + bias[i]


def as_float32(weight):
    """A weight as float32. NumPy has no bfloat16: a uint16 holds its bits, which are the upper half of a float32's."""


@overload(as_float32, inline="always")
def _as_float32(weight):
    if weight == numba.uint16:
        return lambda weight: np.uint32(np.uint32(weight) << np.uint32(16)).view(np.float32)
    return lambda weight: np.float32(weight)


@numba.njit(fastmath=fast, cache=True)
def dot(row, x):
    """The sum of row[i] * x[i]; row is float32, int8, or bfloat16 as uint16."""
    total = np.float32(0)
    for i in range(x.size):
        total += as_float32(row[i]) * x[i]
    return total


@numba.njit(fastmath=fast, cache=True, parallel=True)
def project(weight, scale, x, out):
    """W x: W (rows, columns), x (columns,) -> out (rows,)."""
    for i in numba.prange(out.size):
        out[i] = dot(weight[i], x) * scale[i]


@numba.njit(fastmath=fast, cache=True, parallel=True)
def project_into(weight, scale, x, out):
    """Adds W x to out (rows,), the residual stream."""
    for i in numba.prange(out.size):
        out[i] += dot(weight[i], x) * scale[i]


@numba.njit(fastmath=fast, cache=True, parallel=True)
def gate_and_up(weight, scale, x, out):
    """silu(W1 x) * W3 x: W = (W1, W3) of (2 F, D), x (D,) -> out (F,)."""
    F = out.size
    for i in numba.prange(F):
        gate = dot(weight[i], x) * scale[i]
        up = dot(weight[F + i], x) * scale[F + i]
        out[i] = gate / (np.float32(1) + np.exp(-gate)) * up


@numba.njit(fastmath=fast, cache=True)
def rotate(x, heads, turn):
    """Rotates the interleaved pairs of the first `heads` heads of x in place; turn (hd / 2, 2): cos and sin."""
    half = turn.shape[0]
    for pair in range(heads * half):
        cos, sin = turn[pair % half, 0], turn[pair % half, 1]
        even, odd = x[2 * pair], x[2 * pair + 1]
        x[2 * pair] = even * cos - odd * sin
        x[2 * pair + 1] = even * sin + odd * cos


@numba.njit(fastmath=fast, cache=True, parallel=True)
def attend(query, keys, values, end, heads, out):
    """Attention of one token: query (H hd,), keys and values (K, capacity, hd) up to `end` -> out (H hd,)."""
    kv_heads, _, hd = keys.shape
    group = heads // kv_heads
    root = np.float32(1) / np.sqrt(np.float32(hd))
    for head in numba.prange(heads):
        q = query[head * hd : (head + 1) * hd]
        mixed = out[head * hd : (head + 1) * hd]
        k, v = keys[head // group], values[head // group]
        weights = np.empty(end, np.float32)
        largest = np.float32(-np.inf)
        for t in range(end):
            weights[t] = dot(k[t], q) * root
            largest = max(largest, weights[t])
        total = np.float32(0)
        mixed[:] = 0
        for t in range(end):
            weight = np.exp(weights[t] - largest)
            total += weight
            for i in range(hd):
                mixed[i] += weight * v[t, i]
        for i in range(hd):
            mixed[i] /= total


@numba.njit(fastmath=fast, cache=True)
def block_step(x, turn, length, heads, eps, centred, layer, keys, values):
    """A `LlamaLayer` for one token, x (D,) in place. Writes position `length` of keys and values (K, capacity, hd)."""
    kv_heads, _, hd = keys.shape
    normed, mixed = np.empty_like(x), np.empty(heads * hd, np.float32)
    normalize(x, layer.attention_norm, layer.attention_bias, eps, centred, normed)
    qkv = np.empty((heads + 2 * kv_heads) * hd, np.float32)
    project(layer.query_key_value, layer.query_key_value_scale, normed, qkv)
    rotate(qkv, heads + kv_heads, turn)
    for head in range(kv_heads):
        at = (heads + head) * hd
        keys[head, length] = qkv[at : at + hd]
        at += kv_heads * hd
        values[head, length] = qkv[at : at + hd]
    attend(qkv, keys, values, length + 1, heads, mixed)
    project_into(layer.output, layer.output_scale, mixed, x)
    normalize(x, layer.ffn_norm, layer.ffn_bias, eps, centred, normed)
    gated = np.empty(layer.down.shape[1], np.float32)
    gate_and_up(layer.gate_up, layer.gate_up_scale, normed, gated)
    project_into(layer.down, layer.down_scale, gated, x)
