"""The model in NumPy, float64, written from the formulas and not from llama.py, with a switch for each known mistake.

Each function solves the probes of one part: settings, arrays, and the switches that are on, by the short names of the
mistakes. A variant has some on that are right there (settings["switches"]). Shapes: B rows, T positions, D width,
H query heads, K key/value heads, hd width of a head.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Arrays = dict[str, np.ndarray]
Settings = dict[str, Any]
Switches = frozenset[str]
NONE: Switches = frozenset()


def one_of(on: Switches, **values: Any) -> Any:
    """The value whose name is on; else the value `right`."""
    return next((value for name, value in values.items() if name in on), values["right"])


def right_switches(settings: Settings, part: str) -> Switches:
    """The switches of a part that are right in the variant: the short names."""
    names = (name.partition(".") for name in settings["switches"])
    return frozenset(short_name for of_part, _, short_name in names if of_part == part)


def softmax(x: np.ndarray, axis: int = -1) -> np.ndarray:
    powers = np.exp(x - x.max(axis, keepdims=True))
    return powers / powers.sum(axis, keepdims=True)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1.0 / (1.0 + np.exp(-x))


def norm(settings: Settings, arrays: Arrays, on: Switches) -> Arrays:
    """x (B, T, D) -> the normed x, the bytes of one number of the result, and x, which must not change."""
    x, weight = arrays["x"], arrays["weight"]
    bias = arrays["bias"] if settings["norm"] == "layernorm" else np.zeros_like(weight)
    if "weight_before" in on:
        x = x * weight
    axis = one_of(on, right=(-1,), axis_sequence=(1,), axis_batch=(0,), axis_row=(1, 2), axis_all=(0, 1, 2))
    centred = x - x.mean(axis, keepdims=True)
    if settings["norm"] == "layernorm":
        top, under = one_of(
            on,
            right=(centred, centred),
            no_mean=(x, centred),
            rms=(x, x),
            rms_norm=(x, x),
            raw_variance=(centred, x),
        )
    else:
        top, under = one_of(on, right=(x, x), layer_norm=(centred, centred), centred_variance=(x, centred))
    size = np.prod([x.shape[i] for i in axis])
    variance = (under**2).sum(axis, keepdims=True) / (size - 1 if "unbiased" in on else size)
    eps = one_of(on, right=settings["eps"], no_eps=0.0, eps_1e5=1e-5, eps_1e6=1e-6)
    with_eps, outside = np.maximum if "eps_clamp" in on else np.add, "eps_outside" in on and "eps_inside" not in on
    divisor = variance if outside else with_eps(variance, eps)
    divisor = divisor if "no_root" in on else np.sqrt(divisor)
    divisor = with_eps(divisor, eps) if outside else divisor
    if "no_upcast" in on and settings.get("dtype") == "float16":
        divisor = np.full_like(divisor, np.inf)  # the squares are beyond float16's 65504
    normed = top / divisor
    factor = one_of(on, right=weight, weight_left_out=1.0, weight_before=1.0, weight_plus_one=1.0 + weight)
    shift = one_of(on, right=bias, bias_left_out=0.0, rms_norm=0.0)
    out = (normed + shift) * factor if "bias_first" in on else normed * factor + shift
    half = settings.get("dtype") == "float16" and "keeps_float32" not in on
    return {"output": out, "bytes": np.array(2.0 if half else 4.0), "input_afterwards": arrays["x"]}


def rounded_to_bfloat16(x: np.ndarray) -> np.ndarray:
    """Whole numbers below 2^16 with 8 significant bits, ties to even."""
    unit = 2.0 ** np.maximum(np.floor(np.log2(np.maximum(x, 1.0))) - 7, 0)
    return np.round(x / unit) * unit


def rotated(x: np.ndarray, theta: float, on: Switches = NONE, positions_axis: int = 1, heads: int = 1) -> np.ndarray:
    """x (B, T, H, hd) with the pairs of its last axis rotated by the angle position * theta^(-2i/hd).

    heads: of the query, for a mistake.
    """
    hd = x.shape[-1]
    positions_axis = 2 if "over_heads" in on else 1
    positions = np.arange(x.shape[positions_axis], dtype=float) + ("from_one" in on)
    if "bfloat16_positions" in on:
        positions = rounded_to_bfloat16(positions)
    pair = np.arange(hd // 2)
    exponent = one_of(
        on,
        right=2 * pair / hd,
        exponent_without_2=pair / hd,
        exponent_doubled=4 * pair / hd,
        exponent_from_one=2 * (pair + 1) / hd,
        exponent_sign=-2 * pair / hd,
        exponent_model_width=2 * pair / (hd * heads),
    )
    base = 10000.0 if "theta_fixed" in on else theta
    angle = np.outer(positions, base**-exponent)
    if "wrong_sign" in on and "plus_sign" not in on:
        angle = -angle
    shape = [1, 1, 1, hd // 2]
    shape[positions_axis] = x.shape[positions_axis]
    cos, sin = np.cos(angle).reshape(shape), np.sin(angle).reshape(shape)
    if "cos_sin_swapped" in on:
        cos, sin = sin, cos
    halves = "split_halves" in on and "interleaved" not in on
    first, second = (x[..., : hd // 2], x[..., hd // 2 :]) if halves else (x[..., 0::2], x[..., 1::2])
    sign_first, sign_second = one_of(on, right=(-1, 1), missing_minus=(1, 1), no_sin=(0, 0))
    turned = first * cos + sign_first * second * sin, second * cos + sign_second * first * sin
    if one_of(on, right=halves, concatenated=True, stacked=False):
        return np.concatenate(turned, axis=-1)
    return np.stack(turned, axis=-1).reshape(x.shape)


def rope(settings: Settings, arrays: Arrays, on: Switches) -> Arrays:
    """Query (B, T, H, hd) and key (B, T, K, hd), rotated; and the bytes of one number of them."""
    heads = arrays["query"].shape[2]
    query, key = (rotated(arrays[name], settings["theta"], on, heads=heads) for name in ("query", "key"))
    if "query_only" in on:
        key = arrays["key"]
    if "key_only" in on:
        query = arrays["query"]
    rotations = {"query": key, "key": query} if "swapped" in on else {"query": query, "key": key}
    return rotations | {"bytes": np.array(4.0)}


def scores(settings: Settings, arrays: Arrays, on: Switches) -> Arrays:
    """Query, key, value (B, H, T, hd) -> (B, H, T, hd)."""
    return {"output": mixed(arrays["query"], arrays["key"], arrays["value"], settings, on)}


def mixed(query: np.ndarray, key: np.ndarray, value: np.ndarray, settings: Settings, on: Switches = NONE) -> np.ndarray:
    """softmax(query key^T / sqrt(hd) + mask) value."""
    _, heads, T, hd = query.shape
    if "key_as_value" in on:
        value = key
    products = query @ key.swapaxes(-1, -2)
    if "key_query_swapped" in on:
        products = products.swapaxes(-1, -2)
    factor = one_of(
        on,
        right=hd**-0.5,
        no_scale=1.0,
        scale_model_width=(hd * heads) ** -0.5,
        scale_without_root=1.0 / hd,
        scale_multiplied=hd**0.5,
        scale_by_length=T**-0.5,
        scale_after_softmax=1.0,
    )
    products = products * factor
    seen, hidden = np.tril(np.ones((T, T), dtype=bool)), -1e9 if "mask_strict_finite" in on else -np.inf
    causal = (settings["causal"] or "causal" in on) and "not_causal" not in on
    if on & {"mask_strict", "mask_strict_finite"}:
        seen = np.tril(seen, -1)
    if "mask_reversed" in on:
        seen = seen.T
    if causal and "mask_after_softmax" not in on:
        products = products * seen if "mask_as_factor" in on else np.where(seen, products, hidden)
    axis = one_of(on, right=-1, softmax_over_queries=-2, softmax_over_heads=1)
    weights = products if "no_softmax" in on else softmax(products, axis)
    if causal and "mask_after_softmax" in on:
        weights = weights * seen
    if "scale_after_softmax" in on:
        weights = weights * hd**-0.5
    if "weights_transposed" in on:
        weights = weights.swapaxes(-1, -2)
    if "dropout_at_eval" in on and settings.get("dropout"):
        weights = weights * 0.0  # the runner's dropout drops everything
    out = weights @ value
    return out.swapaxes(1, 2) if "output_transposed" in on else out


def attention(settings: Settings, arrays: Arrays, on: Switches) -> Arrays:
    """x (B, T, D) -> (B, T, D), with the weights of one Attention."""
    return {"output": attended(arrays["x"], arrays, "", settings, on)}


def attended(x: np.ndarray, weights: Arrays, name: str, settings: Settings, on: Switches = NONE) -> np.ndarray:
    """Attention of x (B, T, D) with the weights whose names begin with `name`: (B, T, D)."""
    B, T, D = x.shape
    H, K = settings["n_heads"], settings["n_kv_heads"]
    hd = D // H
    query, key, value = (x @ weights[f"{name}compute_{part}.weight"].T for part in ("query", "key", "value"))
    if "key_value_swapped" in on:
        key, value = value, key

    def split(projected: np.ndarray, heads: int) -> np.ndarray:  # (B, T, heads * hd) -> (B, T, heads, hd)
        if "features_first" in on:
            return projected.reshape(B, T, hd, heads).swapaxes(2, 3)
        return projected.reshape(B, T, heads, hd)

    query, key, value = split(query, H), split(key, K), split(value, K)
    groups = one_of(on, right=np.arange(H) // (H // K), tile=np.arange(H) % K, first_kv_head=np.zeros(H, dtype=int))
    key, value = key[:, :, groups], value[:, :, groups]  # (B, T, H, hd)

    def turned(x: np.ndarray) -> np.ndarray:
        return rotated(x, settings["rope_theta"], right_switches(settings, "rope"))

    if "no_rope" not in on:
        query = turned(query)
        if "rope_query_only" not in on:
            key = turned(key)
    if "rope_on_value" in on:
        value = turned(value)
    if "heads_by_view" in on:
        query, key, value = (part.reshape(B, H, T, hd) for part in (query, key, value))
    else:
        query, key, value = (part.swapaxes(1, 2) for part in (query, key, value))
    if "query_key_swapped" in on:
        query, key = key, query
    if "scale_again" in on:
        query = query * hd**-0.5
    causal = settings["causal"] or "causal_argument_ignored" in on
    out = mixed(query, key, value, settings | {"causal": causal})
    out = (out if "output_by_view" in on else out.swapaxes(1, 2)).reshape(B, T, D)
    if "no_output_projection" not in on:
        out = out @ weights[f"{name}compute_output.weight"].T
    if "dropout_at_eval" in on and settings.get("dropout"):
        out = out * 0.0
    return x + out if "adds_input" in on else out


def normed(x: np.ndarray, weights: Arrays, name: str, settings: Settings) -> np.ndarray:
    """The norm of x (..., D) with the weights of that name, without mistakes."""
    own = {"x": x, "weight": weights[f"{name}.weight"]}
    if settings["norm"] == "layernorm":
        own["bias"] = weights[f"{name}.bias"]
    own_settings = {"norm": settings["norm"], "eps": settings["layer_norm_eps"]}
    return norm(own_settings, own, right_switches(settings, "norm"))["output"]


def swiglu(x: np.ndarray, weights: Arrays, name: str, on: Switches = NONE) -> np.ndarray:
    """w2(silu(w1 x) * w3 x)."""
    gate, up = (x @ weights[f"{name}{part}.weight"].T for part in ("w1", "w3"))
    if "gate_up_swapped" in on:
        gate, up = up, gate
    if "sigmoid_gate" in on:
        gate = sigmoid(gate)
    elif "relu_gate" in on:
        gate = np.maximum(gate, 0.0)
    elif "no_activation" not in on:
        gate = gate * sigmoid(gate)
    hidden = one_of(on, right=gate * up, gate_added=gate + up, gate_alone=gate)
    return hidden @ weights[f"{name}w2.weight"].T


def block(settings: Settings, arrays: Arrays, on: Switches) -> Arrays:
    """x (B, T, D) -> (B, T, D), with the weights of one layer."""
    return {"output": layer(arrays["x"], arrays, "", settings, on)}


def layer(x: np.ndarray, weights: Arrays, name: str, settings: Settings, on: Switches = NONE) -> np.ndarray:
    """h = x + attention(attention_norm(x)); then h + feed_forward(ffn_norm(h))."""

    def first_norm(x: np.ndarray) -> np.ndarray:
        which = "ffn_norm" if "norms_swapped" in on else "attention_norm"
        return normed(x, weights, name + which, settings)

    def second_norm(x: np.ndarray) -> np.ndarray:
        which = "attention_norm" if on & {"norms_swapped", "attention_norm_twice"} else "ffn_norm"
        return normed(x, weights, name + which, settings)

    def attend(x: np.ndarray) -> np.ndarray:
        return attended(x, weights, f"{name}attention.", settings)

    def feed(x: np.ndarray) -> np.ndarray:
        return swiglu(x, weights, f"{name}feed_forward.", on)

    if "post_norm" in on:
        h = first_norm(x + attend(x))
        return second_norm(h + feed(h))
    if "norm_after_sublayer" in on:
        h = x + first_norm(attend(x))
        return h + second_norm(feed(h))
    if "ffn_first" in on:
        h = x + feed(second_norm(x))
        return h + attend(first_norm(h))
    inner = x if "no_attention_norm" in on else first_norm(x)
    mix = attend(inner)
    h = one_of(on, right=x + mix, no_first_residual=mix, first_from_normed=inner + mix, no_attention=x)
    source = one_of(on, right=h, ffn_on_input=x, ffn_on_attention=mix)
    inner = source if "no_ffn_norm" in on else second_norm(source)
    fed = feed(inner)
    return one_of(
        on, right=h + fed, no_second_residual=fed, second_from_normed=inner + fed, second_from_input=x + fed, no_ffn=h
    )


def model(settings: Settings, arrays: Arrays, on: Switches) -> Arrays:
    """Ids (B, T) -> logits (B, 1, V), hidden (B, T, D) and, with targets, logits of all positions (B, T, V)."""
    x = arrays["tok_embeddings.weight"][arrays["tokens"].astype(int)]
    if "embedding_scaled" in on:
        x = x * x.shape[-1] ** 0.5
    if "dropout_at_eval" in on and settings.get("dropout"):
        x = x * 0.0
    order = list(range(settings["n_layers"]))
    if "layers_reversed" in on:
        order.reverse()
    if "last_layer_left_out" in on:
        order = order[:-1]
    if "first_layer_repeated" in on:
        order = [0] * len(order)
    for i in order:
        x = layer(x, arrays, f"layers.{i}.", settings)
    hidden = x if "no_final_norm" in on else normed(x, arrays, "norm", settings)
    if "final_norm_twice" in on:
        hidden = normed(hidden, arrays, "norm", settings)
    every = (x if "logits_before_norm" in on else hidden) @ arrays["tok_embeddings.weight"].T
    if "probabilities" in on:
        every = softmax(every)
    if "log_probabilities" in on:
        every = np.log(softmax(every))
    last = one_of(
        on,
        right=every[:, -1:],
        first_position=every[:, :1],
        mean_of_positions=every.mean(1, keepdims=True),
        all_positions=every,
    )
    all_logits = last if "targets_ignored" in on else every
    return {"logits": last, "hidden": x if "hidden_before_norm" in on else hidden, "logits_all": all_logits}


def hidden_states(settings: Settings, arrays: Arrays, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Logits (B, T, V) and hidden states (B, T, D) of the model, without mistakes."""
    found = model(settings, arrays | {"tokens": tokens}, NONE)
    return found["logits_all"], found["hidden"]
