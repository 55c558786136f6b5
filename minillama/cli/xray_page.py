"""The X-ray page of a model and a text: everything of decoding/xray.py that the page's script shows."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from minillama.cli.pages import render

if TYPE_CHECKING:
    from torch import Tensor

    from minillama.decoding.xray import Difference, Lens, Trace
    from tokenizer import Tokenizer

MOST_TOKENS = 128
MOST_BYTES = 8_000_000
# How numbers are stored, and how many candidates of each position: the first way in which the page is small enough.
WAYS = (("f4", 1 << 30), ("i2", 1 << 30), ("i2", 2048), ("i2", 256))
SLIDERS = (
    ("temperature", "temperature", 0, 2, 0.05),
    ("epsilon", "epsilon: at least this likely", 0, 0.8, 0.01),
    ("eta", "eta: lower if many are likely", 0, 0.6, 0.01),
    ("top_k", "top-k: the k likeliest", 0, 100, 1),
    ("top_p", "top-p: the likeliest with this total", 0, 1, 0.01),
    ("min_p", "min-p: at least this share of the likeliest", 0, 1, 0.01),
    ("typical_p", "typical-p: of typical surprise, with this total", 0, 1, 0.01),
)


@dataclass
class Subject:
    """A traced model on the page. name: of its file; facts: its sizes in words.

    readout: hidden states (T, D) -> logits of the classes, if the model is a classifier; weight (classes, D) and bias
    (classes,) of its linear layer; mean: its answer, the classes and their probabilities with the likeliest first, if
    it reads the mean of all states.
    """

    name: str
    facts: str
    trace: Trace
    readout: Callable[[Tensor], Tensor] | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    borrows_head: bool = False  # whether the readout is that of another model
    mean: list[tuple[str, float]] = field(default_factory=list)

    @property
    def said(self) -> str:
        """The answer from the mean, in words: its five likeliest classes."""
        return ", ".join(f"{name} {p:.3f}" for name, p in self.mean[:5]) + ", ..." * (len(self.mean) > 5)


@dataclass
class Text:
    """The text of the page. prompt: the number of tokens that were given; the model wrote the others.

    answers: the token or class to explain at each position; classes: their names, for a classifier; settings: of the
    decoding, as in SLIDERS.
    """

    tokenizer: Tokenizer
    prompt: int
    answers: list[int]
    classes: list[str] = field(default_factory=list)
    settings: dict[str, float | None] = field(default_factory=dict)


def check_length(count: int) -> None:
    """Raises ValueError for more tokens than a page shows."""
    if count > MOST_TOKENS:
        raise ValueError(f"--xray shows at most {MOST_TOKENS} tokens, and the text has {count}; give a shorter one")


def page(subject: Subject, text: Text, against: Subject | None = None) -> str:
    """The page. against: a second model, traced on the same tokens. Raises ValueError if it would be too large."""
    for kind, candidates in WAYS:
        data, rest = page_data(subject, text, against, kind, candidates)
        found = html(subject, text, against, data, rest)
        if len(found) <= MOST_BYTES:
            return found
    raise ValueError(
        f"the X-ray page of {len(text.answers)} tokens would have {len(found) / 1e6:.0f} MB, more than "
        f"{MOST_BYTES / 1e6:.0f}; give a shorter text"
    )


def html(subject: Subject, text: Text, against: Subject | None, data: dict[str, Any], rest: int) -> str:
    """The page around its data."""
    config = subject.trace.model.config
    return render(
        "xray.html",
        script="xray.js",
        data=data,
        title=f"X-ray of {subject.name}",
        model=subject.name,
        facts=subject.facts,
        note="The numbers are those of one forward pass.",
        written=text.prompt < len(text.answers),
        classes=bool(text.classes),
        mean=subject.said,
        differential=config.attention_type == "differential",
        rest=f"{rest:,}" if rest else "",
        penalty=f"{text.settings.get('repetition_penalty') or 1:g}",
        borrowed=against is not None and against.borrows_head,
        sliders=SLIDERS,
        against=against.name if against else "",
        **(comparison(subject, against, data["tokens"]) if against else {}),
    )


def most_changed(subject: Subject, against: Subject, texts: Sequence[str], count: int = 5) -> list[dict[str, Any]]:
    """The attention maps that differ most, each with the cell where it does."""
    found = []
    for i, (ours, theirs) in enumerate(zip(subject.trace.layers, against.trace.layers, strict=True)):
        for head, (one, other) in enumerate(zip(ours.maps, theirs.maps, strict=True)):
            gap = (one - other).abs()
            t, s = divmod(int(gap.argmax()), gap.shape[1])
            if float(gap[t, s]) > 1e-3:
                choose = {"layer": i, "head": head, "t": t, "s": s, "view": "difference"}
                numbers = {"ours": f"{float(one[t, s]):.3f}", "theirs": f"{float(other[t, s]):.3f}"}
                named = {"name": f"layer {i + 1}, map {head + 1}", "reader": texts[t], "read": texts[s]}
                found.append((float(gap[t, s]), {"choose": json.dumps(choose)} | numbers | named))
    return [one for _, one in sorted(found, key=lambda pair: -pair[0])[:count]]


def comparison(subject: Subject, against: Subject, texts: Sequence[str]) -> dict[str, Any]:
    """The seventh part: a table of differences, a row for each layer, and the maps that differ most."""
    from minillama.decoding.xray import TOLERANCE, difference, differences, first_difference

    found = differences(subject.trace, against.trace)
    if subject.readout is not None and against.readout is not None:  # the logits of the classes, not of the tokens
        ours, theirs = subject.readout(subject.trace.hidden), against.readout(against.trace.hidden)
        found[-1] = difference("logits", None, ours, theirs)
    first = first_difference(found)

    def cell(one: Difference) -> dict[str, Any]:
        share = f"{100 * one.share:.2g} %" if 0 < one.share < 1e4 else f"{one.share:g}"
        return {"stage": one.stage, "share": share, "marked": one is first, "shade": f"{min(1.0, one.share):.3f}"}

    layers = range(len(subject.trace.layers))
    return {
        "first": str(first) if first else "",
        "tolerance": f"{100 * TOLERANCE:g} %",
        "changes": most_changed(subject, against, texts),
        "stages": [{"cells": [cell(one) for one in found if one.layer == i]} for i in layers],
        "ends": [cell(one) for one in found if one.layer is None],
    }


def page_data(
    subject: Subject, text: Text, against: Subject | None, kind: str, candidates: int
) -> tuple[dict[str, Any], int]:
    """The data for the script, and the number of tokens that are not among the candidates. kind: see `packed`."""
    import torch

    from minillama.text.token_texts import token_text

    found, config = subject.trace, subject.trace.model.config
    T, first = len(found.tokens), found.layers[0]
    H, _, hd = first.query.shape
    logits = readout_of(subject)(found.hidden).detach().float()  # (T, V) or (T, classes)
    if not text.classes and text.tokenizer.unused_ids:  # these are never drawn
        logits[:, list(text.tokenizer.unused_ids)] = float(logits.min()) - 50.0
    count = min(candidates, logits.shape[-1])
    rest = logits.shape[-1] - count
    if rest:
        best = logits.topk(count, dim=-1)
        shown, ranked = best.values, packed(best.indices, "f4")
        others = logits.scatter(-1, best.indices, -torch.inf)
        rest_logits = packed(others.logsumexp(-1) - torch.tensor(float(rest)).log(), "f4")
    else:
        shown, ranked, rest_logits = logits, None, None
    answers = torch.tensor(text.answers)
    rivals = logits.scatter(-1, answers[:, None], -torch.inf).argmax(-1)
    before = text.tokenizer.encode("a", bos=False, eos=False)
    names = text.classes or [token_text(text.tokenizer, token, before) for token in range(logits.shape[-1])]
    differential = config.attention_type == "differential"
    M = first.heads.shape[0]
    lens, share = subject_data(subject, answers, rivals, names, kind)
    data = {
        "kind": "classes" if text.classes else "tokens",
        "sizes": {"L": len(found.layers), "H": H, "K": first.key.shape[0], "M": M, "T": T, "hd": hd},
        "causal": config.causal,
        "window": config.sliding_window,
        "prompt": text.prompt,
        "tokens": token_texts(text.tokenizer, found.tokens.tolist()),
        "ids": found.tokens.tolist(),
        "mapNames": [
            f"head {i % M + 1}, {'second' if i >= M else 'first'} map" if differential else f"head {i + 1}"
            for i in range(H)
        ],
        "maps": maps_of([layer.maps for layer in found.layers], config.causal, kind),
        "mapsWithout": maps_of([layer.maps_without_positions() for layer in found.layers], config.causal, kind),
        "query": packed(torch.stack([layer.query for layer in found.layers]), kind),
        "key": packed(torch.stack([layer.key for layer in found.layers]), kind),
        "frequencies": frequencies_of(config),
        "slopes": slopes_of(config),
        "distance": distances(found),
        "answers": [names[one] for one in text.answers],
        "rivals": [names[one] for one in rivals.tolist()],
        "first": lens.first().tolist(),
        "lens": lens_data(lens, names),
        "shares": share,
        "hasBias": config.norm == "layernorm" or subject.bias is not None,
        "logits": packed(shown, kind),
        "ranked": ranked,
        "rest": rest,
        "restLogits": rest_logits,
        "vocabulary": names,
        "settings": {name: text.settings.get(name) for name, *_ in SLIDERS}
        | ({"temperature": 1} if text.classes else {}),
        "other": None,
    }
    if against is not None:
        other_lens, other_share = subject_data(against, answers, rivals, names, kind)
        answers_from = f"from the mean over all tokens: {against.said}" if against.mean else "at its last token"
        data["other"] = {
            "model": against.name,
            "answers": answers_from if text.classes else "",
            "maps": maps_of([layer.maps for layer in against.trace.layers], config.causal, kind),
            "lens": lens_data(other_lens, names),
            "shares": other_share,
        }
    return data, rest


def readout_of(subject: Subject) -> Callable[[Tensor], Tensor]:
    """Hidden states -> logits of tokens, or of a classifier's classes."""
    return subject.readout or subject.trace.model.output


def subject_data(
    subject: Subject, answers: Tensor, rivals: Tensor, names: Sequence[str], kind: str
) -> tuple[Lens, dict[str, Any]]:
    """The lens of a model, and its shares in the logit of the answers and in their lead over the rivals."""
    import torch

    from minillama.decoding.xray import logit_lens, shares

    weight = subject.trace.model.output.weight if subject.weight is None else subject.weight
    bias = torch.zeros(len(weight), device=weight.device) if subject.bias is None else subject.bias
    with torch.no_grad():
        lens = logit_lens(subject.trace, answers, readout_of(subject))
        found = {
            "answer": shares(subject.trace, weight[answers], bias[answers]),
            "lead": shares(subject.trace, weight[answers] - weight[rivals], bias[answers] - bias[rivals]),
        }
    return lens, {
        name: {
            "embedding": packed(one.embedding, kind),
            "heads": packed(one.heads, kind),
            "feedForward": packed(one.feed_forward, kind),
            "bias": packed(one.bias, kind),
        }
        for name, one in found.items()
    }


def lens_data(lens: Lens, names: Sequence[str]) -> dict[str, Any]:
    """A lens for the page."""
    return {
        "texts": [[[names[one] for one in ids] for ids in line] for line in lens.ids.tolist()],
        "p": packed(lens.probabilities, "f4"),
        "answer": packed(lens.answer, "f4"),
        "rank": lens.rank.tolist(),
    }


def frequencies_of(config: Any) -> list[float] | None:
    """The rotary frequencies of a head's pairs; None with ALiBi."""
    from rope import rotary_frequencies, scaled

    if config.position_embedding_type != "rotary":
        return None
    found = rotary_frequencies(config.head_dim, config.rope_theta)
    return (scaled(found, config.rope_scaling) if config.rope_scaling else found).tolist()


def slopes_of(config: Any) -> list[float] | None:
    """ALiBi's slope of each map; None with rotary positions."""
    from minillama.layers.alibi import alibi_slopes

    if config.position_embedding_type != "alibi":
        return None
    return (
        2 * alibi_slopes(config.n_heads // 2)
        if config.attention_type == "differential"
        else alibi_slopes(config.n_heads)
    )


def distances(found: Trace) -> dict[str, Any]:
    """The mean scores by distance (L, H, T) for the page."""
    import torch

    from minillama.decoding.xray import score_by_distance

    return packed(torch.stack([score_by_distance(layer) for layer in found.layers]), "f4")


def maps_of(maps: list[Tensor], causal: bool, kind: str) -> dict[str, Any]:
    """Attention maps (L, H, T, T) for the page; only the lower triangle, row by row, if attention is causal."""
    import torch

    stacked = torch.stack(maps)
    if causal:
        rows, columns = torch.tril_indices(*stacked.shape[-2:])
        stacked = stacked[..., rows, columns]
    return packed(stacked, kind)


def packed(values: Tensor, kind: str) -> dict[str, Any]:
    """Numbers as base64. kind: "f4", float32; or "i2", 16 bits, which are multiplied by `scale`."""
    import torch

    values = values.detach().float().cpu()
    scale = 1.0
    if kind == "i2":
        scale = float(values.abs().max()) / 32767 or 1.0
        array = (values / scale).round().to(torch.int16).numpy().astype("<i2")
    else:
        array = values.numpy().astype("<f4")
    return {"kind": kind, "scale": scale, "data": base64.b64encode(array.tobytes()).decode()}


def token_texts(tokenizer: Tokenizer, tokens: Sequence[int]) -> list[str]:
    """The text that each token of a sequence adds."""
    from minillama.text.token_texts import token_text

    return [token_text(tokenizer, token, tokens[max(0, i - 8) : i]) for i, token in enumerate(tokens)]
