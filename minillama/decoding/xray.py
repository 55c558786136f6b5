"""X-ray of one forward pass: what each part of a model computes for one text, and what follows from it.

`trace` runs the model itself and watches it with hooks, so the numbers are the model's own. It needs only the names of
the write-up (tok_embeddings, layers, compute_query, compute_query_key_value_scores, ..., norm, output), so it also
traces a model whose classes a student wrote. Everything else here is computed from a trace.

Shapes as in llama.py, for one row: T tokens, H query heads, K key/value heads. M is the number of heads that write into
the residual stream: H, or H / 2 for differential attention, where two maps form one head.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from config import LlamaConfig
from minillama.layers.masks import default_mask
from minillama.layers.precision import at_least_float32

TOLERANCE = 1e-3  # two models differ in a value if the difference exceeds this share of the largest value


@dataclass
class LayerTrace:
    """The numbers of one layer. Everything that is added to the residual stream has its width, D."""

    attention_input: Tensor  # (T, D), after the first norm
    query: Tensor  # (H, T, hd), before rotary positions
    key: Tensor  # (K, T, hd), before rotary positions
    value: Tensor  # (H, T, hd or 2 hd), repeated for the query heads
    placed_query: Tensor  # (H, T, hd), with rotary positions
    placed_key: Tensor  # (H, T, hd), with rotary positions, repeated for the query heads
    mask: Tensor | None  # broadcasts to (H, T, T); bool, True = attend, or float, added to the scores
    mixed: Tensor  # (H, T, hd or 2 hd): each map's weighted values
    heads: Tensor  # (M, T, D): what each head adds to the stream
    attention: Tensor  # (T, D): their sum
    feed_forward_input: Tensor  # (T, D), after the second norm
    feed_forward: Tensor  # (T, D): what the feed-forward layer adds to the stream

    @cached_property
    def scores(self) -> Tensor:
        """The scores before the softmax, (H, T, T): query key^T / sqrt(hd), with the mask; -inf where it hides."""
        return masked_scores(self.placed_query, self.placed_key, self.mask)

    @cached_property
    def maps(self) -> Tensor:
        """The attention weights (H, T, T). Each row sums to 1: the shares of the tokens that a token reads."""
        return self.scores.softmax(-1)

    def maps_without_positions(self) -> Tensor:
        """The weights (H, T, T) that the same queries and keys give without rotary positions or ALiBi's biases."""
        key = self.key.repeat_interleave(len(self.query) // len(self.key), dim=0)
        hidden = self.mask if self.mask is None or self.mask.dtype == torch.bool else self.mask > -math.inf
        return masked_scores(self.query, key, hidden).softmax(-1)


@dataclass
class Trace:
    """One forward pass of `model` over `tokens` (T,)."""

    model: Any
    tokens: Tensor
    embedding: Tensor  # (T, D)
    layers: list[LayerTrace]
    hidden: Tensor  # (T, D), after the final norm
    logits: Tensor  # (T, V)

    def stream(self) -> list[Tensor]:
        """The residual stream (T, D) after the embedding and after each layer: L + 1 states."""
        states = [self.embedding]
        for layer in self.layers:
            states.append(states[-1] + layer.attention + layer.feed_forward)
        return states


def masked_scores(query: Tensor, key: Tensor, mask: Tensor | None) -> Tensor:
    """query key^T / sqrt(hd) with the mask: two (H, T, hd) -> (H, T, T), float32 or wider."""
    wide = torch.promote_types(query.dtype, torch.float32)
    scores = query.to(wide) / math.sqrt(query.shape[-1]) @ key.to(wide).transpose(-2, -1)
    if mask is None:
        return scores
    return scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask


class Watcher:
    """Remembers the inputs and outputs of a model's modules while it is open, by name."""

    def __init__(self) -> None:
        self.outputs: dict[str, Tensor] = {}
        self.inputs: dict[str, Tensor] = {}
        self.calls: dict[str, tuple[Tensor, ...]] = {}  # arguments and result of compute_query_key_value_scores

    @contextmanager
    def open(self, model: Any) -> Iterator[Watcher]:
        """Watches the modules of `model`; its attention takes the readable path."""
        with ExitStack() as stack:
            for name, module in [("tok_embeddings", model.tok_embeddings), ("norm", model.norm)]:
                stack.enter_context(self._watched(name, module))
            for i, layer in enumerate(model.layers):
                attention = layer.attention
                for part in ("compute_query", "compute_key", "compute_value", "compute_output"):
                    stack.enter_context(self._watched(f"{i}.{part}", getattr(attention, part)))
                stack.enter_context(self._watched(f"{i}.feed_forward", layer.feed_forward))
                stack.enter_context(self._readable_path(str(i), attention))
            yield self

    @contextmanager
    def _watched(self, name: str, module: nn.Module) -> Iterator[None]:
        def keep(module: nn.Module, inputs: Any, output: Any) -> None:
            self.inputs[name], self.outputs[name] = inputs[0].detach(), output.detach()

        handle = module.register_forward_hook(keep)
        try:
            yield
        finally:
            handle.remove()

    @contextmanager
    def _readable_path(self, name: str, attention: Any) -> Iterator[None]:
        """Lets an attention call its `compute_query_key_value_scores`, and remembers the call."""
        compute = attention.compute_query_key_value_scores
        config = getattr(attention, "config", None)

        def keep(query: Tensor, key: Tensor, value: Tensor, *more: Any, **others: Any) -> Tensor:
            mixed = compute(query, key, value, *more, **others)
            mask = more[0] if more else others.get("mask")
            self.calls[name] = (query, key, value, mixed) if mask is None else (query, key, value, mixed, mask)
            return mixed

        attention.compute_query_key_value_scores = keep  # hides the method of the class
        if isinstance(config, LlamaConfig):
            attention.config = replace(config, attention_kernel="manual")
        try:
            yield
        finally:
            del attention.compute_query_key_value_scores
            if isinstance(config, LlamaConfig):
                attention.config = config


@torch.no_grad()
def trace(model: Any, tokens: Sequence[int] | Tensor) -> Trace:
    """One forward pass of a `Llama` over tokens (T,), in evaluation mode. Raises ValueError if they do not fit.

    The model is as it was afterwards. It may also be another class with the names of the write-up, whose forward takes
    (tokens, targets) and returns logits (1, T, V) and hidden states.
    """
    ids = torch.as_tensor(tokens, dtype=torch.long).flatten().to(model.tok_embeddings.weight.device)
    if not len(ids):
        raise ValueError("there is no token to trace; give a text")
    context = getattr(getattr(model, "config", None), "max_seq_len", len(ids))
    if len(ids) > context:
        raise ValueError(f"{len(ids)} tokens do not fit into the model's context of {context}; give a shorter text")
    was_training = model.training
    model.eval()
    try:
        with Watcher().open(model) as seen:
            logits, hidden = model(ids[None], ids[None])
        layers = [layer_trace(seen, i, layer) for i, layer in enumerate(model.layers)]
    finally:
        model.train(was_training)
    return Trace(model, ids, seen.outputs["tok_embeddings"][0], layers, hidden[0], logits[0])


def layer_trace(seen: Watcher, i: int, layer: Any) -> LayerTrace:
    """The trace of layer i from what was seen."""
    query, key, value, mixed, *mask = (one[0] for one in seen.calls[str(i)])  # (H, T, hd)
    H, T, hd = query.shape
    joined = seen.inputs[f"{i}.compute_output"][0]  # (T, H hd): the heads side by side
    M = joined.shape[-1] // mixed.shape[-1]
    alone = joined.new_zeros(M, T, M, mixed.shape[-1])  # each head, with zeros for the others
    alone[range(M), :, range(M)] = joined.view(T, M, -1).transpose(0, 1)
    return LayerTrace(
        attention_input=seen.inputs[f"{i}.compute_query"][0],
        query=by_head(seen.outputs[f"{i}.compute_query"][0], hd),
        key=by_head(seen.outputs[f"{i}.compute_key"][0], hd),
        value=value,
        placed_query=query,
        placed_key=key,
        mask=mask[0] if mask else likely_mask(layer.attention, query, key, value, mixed),
        mixed=mixed,
        heads=layer.attention.compute_output(alone.flatten(-2)),
        attention=seen.outputs[f"{i}.compute_output"][0],
        feed_forward_input=seen.inputs[f"{i}.feed_forward"][0],
        feed_forward=seen.outputs[f"{i}.feed_forward"][0],
    )


def by_head(x: Tensor, hd: int) -> Tensor:
    """(T, heads hd) -> (heads, T, hd)."""
    return x.unflatten(-1, (-1, hd)).transpose(0, 1)


def likely_mask(attention: Any, query: Tensor, key: Tensor, value: Tensor, mixed: Tensor) -> Tensor | None:
    """The mask of an attention that got none: that of its config. Without a `LlamaConfig`, none or the causal one.

    Of these two it is the one that gives `mixed` (H, T, vd).
    """
    T, config = query.shape[1], getattr(attention, "config", None)
    if isinstance(config, LlamaConfig):
        mask = default_mask(T, config, query.dtype, query.device)
        return None if mask is None else mask[0]
    causal = torch.ones(1, T, T, dtype=torch.bool, device=query.device).tril()

    def error(mask: Tensor | None) -> float:
        return float((masked_scores(query, key, mask).softmax(-1) @ value - mixed).abs().max())

    return causal if error(causal) < error(None) else None


# What follows from a trace


@dataclass
class Shares:
    """Shares of each part in a logit, at each position. All sum to the logit (T,), see `total`."""

    embedding: Tensor  # (T,)
    heads: Tensor  # (L, M, T)
    feed_forward: Tensor  # (L, T)
    bias: Tensor  # (T,): the bias of a LayerNorm and of a classifier's head

    def total(self) -> Tensor:
        return self.embedding + self.heads.sum((0, 1)) + self.feed_forward.sum(0) + self.bias


def shares(found: Trace, direction: Tensor, bias: Tensor | float = 0.0) -> Shares:
    """The share of each head and feed-forward layer in a logit.

    direction (T, D): the row of the output matrix whose logit is taken, for each position; bias: added to the logit.
    The stream is a sum, so the logit is one too, once the scale of the final norm is held fixed at its value for the
    whole sum. (A part that shrinks the stream thus gets no credit for making the others larger.)
    """
    norm = found.model.norm
    offset = norm.bias if getattr(norm, "bias", None) is not None else None
    stream = found.stream()[-1]

    def centred(x: Tensor) -> Tensor:
        return x if offset is None else x - x.mean(-1, keepdim=True)

    direction = direction.to(stream.dtype)
    shift = torch.zeros_like(direction[:, 0]) if offset is None else direction @ offset.to(stream.dtype)
    # The norm is a factor for each position: read from what it did, so that no eps has to be known.
    plain = centred(stream) * norm.weight.to(stream.dtype)
    scaled = found.hidden - (0.0 if offset is None else offset)
    factor = (scaled * plain).sum(-1, keepdim=True) / (plain * plain).sum(-1, keepdim=True).clamp(min=1e-30)
    reader = factor * direction * norm.weight.to(stream.dtype)  # (T, D)

    def share(added: Tensor) -> Tensor:
        return (centred(added) * reader).sum(-1)

    return Shares(
        embedding=share(found.embedding),
        heads=torch.stack([share(layer.heads) for layer in found.layers]),
        feed_forward=torch.stack([share(layer.feed_forward) for layer in found.layers]),
        bias=shift + bias,
    )


Readout = Callable[[Tensor], Tensor]  # hidden states (T, D) after the final norm -> logits (T, classes or V)


@dataclass
class Lens:
    """The logit lens: the readout of the stream after the embedding and after each layer (L + 1 lines)."""

    ids: Tensor  # (L + 1, T, n): the likeliest tokens or classes
    probabilities: Tensor  # (L + 1, T, n)
    answer: Tensor  # (L + 1, T): the probability of the answer
    rank: Tensor  # (L + 1, T): its rank, 1 = the likeliest

    def first(self) -> Tensor:
        """For each position the first line from which on the answer is the likeliest, (T,); L + 1 if it never is."""
        at_top = (self.rank == 1).flip(0).cumprod(0)
        return len(self.rank) - at_top.sum(0)


def logit_lens(found: Trace, answers: Tensor, readout: Readout | None = None, n: int = 5) -> Lens:
    """Reads every state of the stream as if it were the last one (nostalgebraist, "interpreting GPT", 2020).

    answers (T,): the token or class whose probability and rank are followed. readout: by default the output matrix.
    The last line is the model's own distribution.
    """
    readout = readout or found.model.output
    ids, best, answer, rank = [], [], [], []
    for state in found.stream():
        probabilities = at_least_float32(readout(found.model.norm(state))).softmax(-1)
        top = probabilities.topk(min(n, probabilities.shape[-1]), dim=-1)
        own = probabilities.gather(-1, answers[:, None])
        ids.append(top.indices)
        best.append(top.values)
        answer.append(own[:, 0])
        rank.append((probabilities > own).sum(-1) + 1)
    return Lens(torch.stack(ids), torch.stack(best), torch.stack(answer), torch.stack(rank))


def score_by_distance(layer: LayerTrace) -> Tensor:
    """The mean score of each head by the distance of query and earlier key: (H, T), NaN where the mask hides all."""
    scores = layer.scores
    means = []
    for distance in range(scores.shape[-1]):
        line = scores.diagonal(-distance, dim1=-2, dim2=-1)  # (H, T - distance)
        seen = line > -math.inf
        means.append(line.masked_fill(~seen, 0.0).sum(-1) / seen.sum(-1))  # 0 / 0 is NaN
    return torch.stack(means, dim=-1)


# Two models


@dataclass
class Difference:
    """How far two models are apart in one value: the largest difference, as a share of the largest value of `b`."""

    stage: str  # in words, such as "queries with positions"
    layer: int | None  # from 0
    share: float
    index: list[int] = field(default_factory=list)  # where the largest difference is, for each axis

    def __str__(self) -> str:
        return self.stage if self.layer is None else f"layer {self.layer + 1}: {self.stage}"


STAGES = (
    ("attention_input", "input of the attention"),
    ("query", "queries"),
    ("key", "keys"),
    ("placed_query", "queries with positions"),
    ("placed_key", "keys with positions"),
    ("value", "values"),
    ("maps", "attention maps"),
    ("mixed", "weighted values"),
    ("attention", "output of the attention"),
    ("feed_forward_input", "input of the feed-forward layer"),
    ("feed_forward", "output of the feed-forward layer"),
)


def difference(stage: str, layer: int | None, one: Tensor, other: Tensor) -> Difference:
    """How far two values are apart. Raises ValueError if their shapes differ."""
    if one.shape != other.shape:
        raise ValueError(f"{stage}: one model has the shape {tuple(one.shape)}, the other {tuple(other.shape)}")
    one, other = one.detach().double(), other.detach().double()
    gap = (one - other).abs()
    index = [int(place) for place in torch.unravel_index(gap.argmax(), gap.shape)]
    return Difference(stage, layer, float(gap.max() / other.abs().max().clamp(min=1e-30)), index)


def differences(a: Trace, b: Trace) -> list[Difference]:
    """How far two traces of the same tokens are apart, in the order of the computation.

    Raises ValueError if the tokens or the sizes of the models differ.
    """
    if a.tokens.tolist() != b.tokens.tolist():
        raise ValueError("the two models were given different tokens")
    if len(a.layers) != len(b.layers):
        raise ValueError(f"one model has {len(a.layers)} layers and the other {len(b.layers)}; they must be the same")

    found = [difference("embedding", None, a.embedding, b.embedding)]
    for i, (one, other) in enumerate(zip(a.layers, b.layers, strict=True)):
        found += [difference(words, i, getattr(one, name), getattr(other, name)) for name, words in STAGES]
    found.append(difference("final norm", None, a.hidden, b.hidden))
    return [*found, difference("logits", None, a.logits, b.logits)]


def first_difference(found: Sequence[Difference], tolerance: float = TOLERANCE) -> Difference | None:
    """The first value in which the models differ by more than `tolerance`, a share of its largest value."""
    return next((one for one in found if not one.share <= tolerance), None)  # NaN differs, too
