"""Filters, each a pure function of logits, and the distribution that a token is drawn from.

A filter removes a token by setting its logit to -inf. It keeps at least one token in each row: the arg-max, or in
typical sampling the token whose surprise is nearest to the entropy. The order is: repetition penalty, temperature,
filters, softmax, draw.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from config import DEFAULT_EPSILON
from minillama.layers.precision import sum_dtype

Filter = Callable[[Tensor], Tensor]  # logits (..., V) -> (..., V)
Allowed = tuple[str, Callable[[float], bool]]  # the values of a setting, in words and as a test
NUCLEUS = (256, 4096, sys.maxsize)  # tokens that top-p sorts: more only if these do not reach p
BANNED = -1e30  # a logit below all others; it is finite, because infinity indicates damaged weights


def filters_by_name(
    epsilon: float = DEFAULT_EPSILON,
    eta: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    typical_p: float | None = None,
) -> list[Filter]:
    """The filters with these settings, epsilon first; None and an epsilon of 0 are no filter.

    The default epsilon is 0.05, and 0 with another filter. Raises ValueError for a setting out of its range.
    """
    if epsilon is DEFAULT_EPSILON and not {eta, top_k, top_p, min_p, typical_p} <= {None}:
        epsilon = 0.0
    fraction: Allowed = "in [0, 1)", lambda value: 0 <= value < 1
    share: Allowed = "above 0 and at most 1", lambda value: 0 < value <= 1
    count: Allowed = "a whole number, 1 or more", lambda value: isinstance(value, int) and value >= 1
    table: tuple[tuple[str, float | None, Allowed, Callable[..., Tensor], str], ...] = (
        ("epsilon", epsilon or None, fraction, epsilon_filter, "epsilon"),
        ("eta", eta, fraction, eta_filter, "eta"),
        ("top_k", top_k, count, top_k_filter, "k"),
        ("top_p", top_p, share, top_p_filter, "p"),
        ("min_p", min_p, share, min_p_filter, "p"),
        ("typical_p", typical_p, share, typical_filter, "mass"),
    )
    chosen: list[Filter] = []
    for name, value, (wanted, allows), keep, argument in table:
        if value is not None:
            if not allows(value):
                raise ValueError(f"{name} is {value}; it must be {wanted}")
            chosen.append(partial(keep, **{argument: value}))
    return chosen


def cut(logits: Tensor, dropped: Tensor) -> Tensor:
    """The logits, with -inf where `dropped` (bool, the same shape). A row that would lose all keeps its arg-max."""
    kept = torch.where(dropped, -math.inf, logits)
    if logits.device.type == "cpu" and bool((kept.amax(-1) > -math.inf).all()):
        return kept  # the usual case; torch's argmax is slow, and on a GPU this question is
    return kept.scatter(-1, logits.argmax(-1, keepdim=True), logits.amax(-1, keepdim=True))


def epsilon_filter(logits: Tensor, epsilon: float) -> Tensor:
    """Keeps the tokens with probability >= epsilon (arXiv 2210.15191); logits (..., V) -> (..., V).

    The course's 0.05 keeps at most 20 tokens; the paper suggests 3e-4 to 9e-4. 0 keeps everything.
    """
    return cut(logits, logits.softmax(-1) < epsilon)


def eta_filter(logits: Tensor, eta: float) -> Tensor:
    """Keeps tokens with probability >= min(eta, sqrt(eta) exp(-H)), where H is the row's entropy in nats.

    The paper (arXiv 2210.15191) suggests 3e-4 to 4e-3.
    """
    log_probabilities = logits.log_softmax(-1)
    bar = (math.sqrt(eta) * torch.exp(-entropy(log_probabilities))).clamp(max=eta)
    return cut(logits, log_probabilities.exp() < bar)


def top_k_filter(logits: Tensor, k: int) -> Tensor:
    """Keeps the k most probable tokens, and tokens tied with the last of them. Raises ValueError for k below 1."""
    if k < 1:
        raise ValueError(f"k is {k}; it must be 1 or more")
    if k >= logits.shape[-1]:
        return logits
    return cut(logits, logits < logits.topk(k, dim=-1).values[..., -1:])


def top_p_filter(logits: Tensor, p: float) -> Tensor:
    """Keeps the fewest most probable tokens with total probability p (nucleus sampling, arXiv 1904.09751), and ties."""
    probabilities = logits.softmax(-1)
    sizes = NUCLEUS if logits.device.type == "cpu" else NUCLEUS[-1:]  # on a GPU a question costs more than a sort
    for size in sizes:
        largest = probabilities.topk(min(size, logits.shape[-1]), dim=-1).values
        before = running_total(largest) - largest  # total of all more probable tokens
        if size >= logits.shape[-1] or bool((before[..., -1] >= p).all()):
            break
    last = ((before < p).sum(-1, keepdim=True) - 1).clamp(min=0)
    return cut(logits, probabilities < largest.gather(-1, last))


def min_p_filter(logits: Tensor, p: float) -> Tensor:
    """Keeps tokens with probability >= p times that of the most probable token (arXiv 2407.01082)."""
    return cut(logits, logits < logits.amax(-1, keepdim=True) + math.log(p))


def typical_filter(logits: Tensor, mass: float) -> Tensor:
    """Keeps the tokens whose surprise -log p is nearest to the row's entropy (typical sampling, arXiv 2202.00666).

    The kept tokens are the fewest with total probability `mass`, and ties. The arg-max may be removed.
    """
    log_probabilities = logits.log_softmax(-1)
    distance = (-log_probabilities - entropy(log_probabilities)).abs()
    ordered, order = distance.sort(-1)
    reached = running_total(logits.gather(-1, order).softmax(-1))
    last = (reached < mass).sum(-1, keepdim=True).clamp(max=logits.shape[-1] - 1)
    return logits.masked_fill(distance > ordered.gather(-1, last), -math.inf)


def entropy(log_probabilities: Tensor) -> Tensor:
    """The entropy in nats, (..., V) -> (..., 1); impossible tokens add nothing."""
    return -(log_probabilities.exp() * log_probabilities).nan_to_num(nan=0.0).sum(-1, keepdim=True)


def repetition_penalised(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Logits (B, V) with a penalty on the tokens that each row has seen (B, T) (arXiv 1909.05858).

    Positive logits are divided by the penalty, negative ones are multiplied by it.
    """
    before = logits.gather(-1, seen)
    return logits.scatter(-1, seen, torch.where(before > 0, before / penalty, before * penalty))


def distribution(logits: Tensor, temperature: float, filters: Sequence[Filter]) -> Tensor:
    """The probabilities to draw from, float32 (..., V): logits (..., V) after temperature (above 0) and filters."""
    logits = F.threshold(logits.float(), BANNED / 2, -math.inf)  # banned at any temperature
    # Shifted before the division: at a tiny temperature all other quotients overflow to -inf, and the arg-max has 0.
    # Below the bound, float32 could round the temperature to 0.
    logits = (logits - logits.amax(-1, keepdim=True)).div_(max(temperature, 1e-30))
    for keep in filters:
        logits = keep(logits)
    return logits.softmax(-1)


def draw(probabilities: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Draws a token for each row: probabilities (B, V), which need not sum to 1 -> ids (B,).

    It is the first token at which the running total exceeds a random share of the whole. So a row takes one random
    number, and torch.multinomial V of them. In float64 the share is below the whole, and a token of probability 0 is
    never drawn.
    """
    device = probabilities.device
    dtype = sum_dtype(device)
    share = torch.rand(len(probabilities), 1, dtype=dtype, device=device, generator=generator)
    if dtype != torch.float64:  # the CPU has it
        probabilities, share = probabilities.cpu(), share.cpu().double()
    totals = running_total(probabilities, torch.float64)
    return torch.searchsorted(totals, share * totals[:, -1:], right=True).squeeze(-1).to(device)


def running_total(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The cumulative sum over the last axis.

    torch has no deterministic one for CUDA, so the CPU computes it if only deterministic kernels are allowed.
    """
    if x.is_cuda and torch.are_deterministic_algorithms_enabled():
        return x.cpu().cumsum(-1, dtype=dtype).to(x.device)
    return x.cumsum(-1, dtype=dtype)


def all_finite(logits: Tensor) -> Tensor:
    """Whether all logits are finite: a bool () on their device, which the caller reads when it must."""
    return logits.sum(dtype=torch.float32).isfinite()  # the sum of NaN or infinity is not finite


def check_finite(logits: Tensor, finite: Tensor | None = None) -> None:
    """Raises ValueError if the logits are not finite. finite: the result of `all_finite`, if it is known."""
    if not (all_finite(logits) if finite is None else finite):
        raise ValueError(
            f"the model's logits ({logits.dtype}) hold NaN or infinity; damaged weights, or try --dtype fp32"
        )
