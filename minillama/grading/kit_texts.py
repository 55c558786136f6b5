"""The sentences in which a kit says what is asked for: norm, rotary pairs, mask, sampling rule, places."""

from __future__ import annotations

from typing import Any

from minillama.grading.kit_setups import DEFAULTS, Setup, exercises

COS, SIN = 0.540302, 0.841471  # of 1 radian
COS_HALF, SIN_HALF = 0.877583, 0.479426  # of 0.5 radian
WHAT = {
    "norm": "normalises a vector",
    "scores": "how much each token reads from each other token",
    "attention": "projections, heads, and key/value heads that are shared",
    "block": "the residual stream: attention, then feed-forward",
    "rope": "positions, as rotations of queries and keys",
    "model": "from token ids to logits",
    "generate": "one token after another, likeliest or drawn",
    "adamw": "the optimizer",
    "zero_shot": "the label whose word is likeliest",
    "classifier": "a linear head on the last state",
    "lora": "training a small update instead of the weights",
}


def texts(setup: Setup) -> dict[str, Any]:
    """The phrases about a setup that the templates of its kit print."""
    layernorm, inside = setup.norm == "layernorm", setup.eps == "inside"
    size = "variance" if layernorm else "mean of the squares"
    root = f"the root of (the {size} + eps)" if inside else f"(the root of the {size}) + eps"
    start = "(x - mean)" if layernorm else "x"
    note = " The variance divides by the number of features, not by one less." if layernorm else ""
    outside = "" if inside else "\nMind the place of eps: it is added after the root."
    partner = "2i and 2i + 1" if setup.pairing == "interleaved" else "i and i + hd / 2"
    minus = "" if setup.sign == "plus" else "minus "
    sense = "" if setup.sign == "plus" else " Mind the sign: later positions turn backwards."
    return {
        "norm_class": f"{start} over {root}, times weight{', plus bias' if layernorm else ''}; over the last axis.",
        "norm": f"{start} is divided by {root},\nthen multiplied by weight"
        f"{' and shifted by bias' if layernorm else ''}.{note}{outside}",
        "rope": f"Features {partner} of a head are a point (a, b) of a plane,\n"
        f"turned by the angle {minus}position * theta^(-2i/hd).{sense}",
        "rope_exercise": f"Pair i is (a, b) = features {partner}. Turned by the angle t, a becomes a cos t - b sin t, "
        f"and b\nbecomes a sin t + b cos t; here t is {minus}position times theta to the power of -2i / hd.",
        "causal": causal_text(setup),
        "sampling": sampling_text(setup),
        "drawn_from": "all tokens."
        if setup.sampling == "temperature"
        else "the tokens\nthat are kept; the likeliest one always is.",
        "sampling_argument": sampling_argument(setup),
        "options": '("generate", "prompt", "finetune", "lora")' if setup.lora else '("generate", "prompt", "finetune")',
        "places": {
            part: f"{file}: {', '.join(name.removesuffix('.__init__') for name in names)}"
            for part, (file, names) in exercises(setup).items()
        },
        "what": WHAT,
        "model": model_text(setup),
        **rope_numbers(setup),
    }


def causal_text(setup: Setup) -> str:
    """The keys that a query may see, in words."""
    if setup.causal_argument:
        return (
            "Attention is causal, unless it was made with Attention(config, causal=False):\n"
            "a query sees its own key and those before it, no later one. (self.causal says which.)"
        )
    return (
        "By default a query sees the keys of the whole row, before and after it.\n"
        "If self.causal is True, it sees its own key and those before it, no later one. The bundled model is causal."
    )


def sampling_text(setup: Setup) -> str:
    """Which tokens can be drawn."""
    return {
        "temperature": "No token is left out.",
        "epsilon": "Tokens with a probability below epsilon are dropped\n(epsilon sampling, arXiv 2210.15191).",
        "top_p": "The fewest tokens whose probabilities add up to top_p or more are kept, the\nlikeliest first "
        "(nucleus sampling, arXiv 1904.09751).",
        "min_p": "Tokens with a probability below min_p times the largest one are dropped\n(min-p sampling, "
        "arXiv 2407.01082).",
    }[setup.sampling]


def sampling_argument(setup: Setup) -> str:
    """The last parameter of `generate`, after a comma; nothing if the rule has none."""
    default = DEFAULTS.get(setup.sampling)
    return "" if default is None else f", {setup.sampling}: float = {default}"


def model_text(setup: Setup) -> str:
    """How the bundled model was changed for this setup."""
    changes = []
    if (setup.pairing, setup.sign) != ("interleaved", "plus"):
        changes.append("The rows of its query and key weights are in the order that this rotation needs.")
    if setup.norm == "layernorm":
        changes.append(
            "It was trained with RMSNorm. With LayerNorm, which also takes the mean away, it writes a little worse "
            "than it did; it is good enough to see whether your code is right."
        )
    return " ".join(changes) or "The bundled model is mini-llama's own."


def rope_numbers(setup: Setup) -> dict[str, list[float]]:
    """The numbers that the public test of `rope` expects: features 0, 2 and 3 turned by hand, in lists of four."""
    sign = 1.0 if setup.sign == "plus" else -1.0
    if setup.pairing == "interleaved":  # pairs (0, 1) and (2, 3)
        first, third = [COS, sign * SIN, 0.0, 0.0], [0.0, 0.0, COS_HALF, sign * SIN_HALF]
        last = [0.0, 0.0, -sign * SIN, COS]
    else:  # pairs (0, 2) and (1, 3)
        first, third = [COS, 0.0, sign * SIN, 0.0], [-sign * SIN, 0.0, COS, 0.0]
        last = [0.0, -sign * SIN, 0.0, COS]
    return {"rope_first": first, "rope_third": third, "rope_last": last}
