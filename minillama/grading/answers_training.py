"""Generation, AdamW, the classifiers and LoRA in NumPy, float64, with a switch for each known mistake.

As in answers_model.py, each function solves the probes of one part.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from minillama.grading.answers_model import Arrays, Settings, Switches, hidden_states, one_of, softmax
from minillama.grading.kit_setups import DEFAULTS


def generate(settings: Settings, arrays: Arrays, on: Switches) -> Arrays:
    """Greedy: the ids (B, T + new). Else, for each row: the probability of each token, and which can be drawn."""
    if settings["temperature"] == 0.0:
        return {"tokens": greedy(settings, arrays, on)}
    rows = arrays["table"][arrays["prompt"][:, -1]] + arrays["first"][arrays["prompt"][:, 0]]
    probabilities = np.stack([next_probabilities(logits, settings, on) for logits in rows])
    return {"frequencies": probabilities, "drawn": (probabilities > 0).astype(float)}


def greedy(settings: Settings, arrays: Arrays, on: Switches) -> np.ndarray:
    prompt = arrays["prompt"]
    new, context = settings["max_new_tokens"], settings["max_seq_len"]
    tokens = prompt
    for _ in range(new - ("one_too_few" in on) + ("one_too_many" in on)):
        window = one_of(
            on,
            right=tokens[:, -context:],
            context_from_start=tokens[:, :context],
            no_context_cut=tokens,
            last_token_only=tokens[:, -1:],
        )
        logits = arrays["table"][window[:, -1]] + arrays["first"][window[:, 0]]
        chosen = logits.argmin(-1) if "least_likely" in on else logits.argmax(-1)
        if "one_token_for_all_rows" in on:
            chosen = np.full_like(chosen, chosen[0])
        tokens = np.concatenate((tokens, chosen[:, None]), axis=1)
    return tokens[:, prompt.shape[1] :] if "prompt_left_out" in on else tokens


def next_probabilities(logits: np.ndarray, settings: Settings, on: Switches) -> np.ndarray:
    """The probabilities (V,) that the next token is drawn with."""
    T = settings["temperature"]
    scaled = one_of(
        on,
        right=logits / T,
        no_temperature=logits,
        temperature_multiplied=logits * T,
        temperature_on_probabilities=logits,
    )
    p = softmax(scaled)
    if "temperature_on_probabilities" in on:
        p = p / T
    judged = softmax(logits) if "filter_before_temperature" in on else p
    kept = kept_tokens(judged, scaled, settings, on)
    if not kept.any():
        kept[p.argmax()] = True
    if "dropped_logits_zero" in on:
        p = softmax(np.where(kept, scaled, 0.0))
    elif "softmax_twice" in on:
        p = softmax(np.where(kept, p, 0.0))
    else:
        p = np.where(kept, p, 0.0)
    if "uniform" in on:
        p = (p > 0).astype(float)
    if "arg_max" in on:
        p = (np.arange(len(p)) == p.argmax()).astype(float)
    return p / p.sum()


def kept_tokens(p: np.ndarray, scaled: np.ndarray, settings: Settings, on: Switches) -> np.ndarray:
    """Whether each token can be drawn by the rule of the settings, or by the default of a rule that is on instead."""
    rule = next((rule for rule in DEFAULTS if f"{rule}_sampling" in on), settings["sampling"])
    number, every = settings.get(rule, DEFAULTS.get(rule, 0.0)), np.ones_like(p, dtype=bool)
    if rule == "top_p":
        return nucleus(p, number, on)
    if rule == "epsilon":
        return one_of(
            on,
            right=p >= number - 1e-12,
            no_epsilon=every,
            strictly_above=p > number + 1e-12,
            epsilon_on_logits=scaled >= number,
            epsilon_of_largest=p >= number * p.max(),
            epsilon_below=p < number,
        )
    if rule == "min_p":
        least = number * p.max()
        return one_of(on, right=p >= least, no_min_p=every, min_p_absolute=p >= number, min_p_below=p < least)
    return every  # temperature alone


def nucleus(p: np.ndarray, top_p: float, on: Switches) -> np.ndarray:
    """Whether each token is among the fewest with total probability top_p."""
    order = np.argsort(p) if "top_p_ascending" in on else np.argsort(-p)
    total = np.cumsum(p[order])
    before = total - p[order]
    kept_in_order = one_of(
        on,
        right=before < top_p,
        no_top_p=np.ones_like(p, dtype=bool),
        crossing_left_out=total <= top_p,
        one_more=np.concatenate(([True], (before < top_p)[:-1])),
    )
    if "order_not_restored" in on:
        return kept_in_order
    kept = np.empty_like(kept_in_order)
    kept[order] = kept_in_order
    return kept


def adamw(settings: Settings, arrays: Arrays, on: Switches) -> Arrays:
    """The parameters after each step, (steps, P, ...), as the gradients."""
    parameters = arrays["parameters"].copy()
    m, v, steps = np.zeros_like(parameters), np.zeros_like(parameters), np.zeros(len(parameters), dtype=int)
    after = []
    for k, gradients in enumerate(arrays["gradients"]):
        start, without = 0, {*settings["without_gradient"], *(settings["late"] if k == 0 else ())}
        for index, own in enumerate(settings["groups"]):
            members = [i for i in range(start, start + own["count"]) if i not in without]
            start += own["count"]
            if index and "first_group_only" in on:
                continue
            group = settings["defaults"] if "group_settings_ignored" in on else settings["defaults"] | own
            clipped = clip(gradients, members, group["max_grad_norm"], on)
            for i in members:
                if "state_not_kept" in on:
                    m[i], v[i], steps[i] = 0.0, 0.0, 0
                state = 0 if "state_shared" in on else i
                counter = 0 if on & {"state_shared", "step_shared"} else i
                steps[counter] += 1
                t = int(steps[counter]) + ("step_one_ahead" in on)
                parameters[i], m[state], v[state] = one_step(
                    parameters[i], clipped[i], m[state], v[state], t, group, on
                )
        if "nothing_moves" in on:
            parameters = arrays["parameters"].copy()
        after.append(parameters.copy())
    return {"parameters": np.stack(after)}


def clip(gradients: np.ndarray, members: list[int], limit: float | None, on: Switches) -> np.ndarray:
    """Gradients scaled so that the 2-norm of a group's members is at most the limit."""
    if limit is None or "clip_left_out" in on or not members:
        return gradients
    if "clip_by_value" in on:
        return np.clip(gradients, -limit, limit)
    if "clip_each_parameter" in on:
        norms = np.sqrt((gradients**2).sum(tuple(range(1, gradients.ndim)), keepdims=True))
    else:
        counted = gradients if "clip_over_groups" in on else gradients[members]
        norms = np.sqrt((counted**2).sum())
    share = limit / (norms + 1e-6)
    return gradients * (share if "clip_always" in on else np.minimum(share, 1.0))


def one_step(
    p: np.ndarray, g: np.ndarray, m: np.ndarray, v: np.ndarray, t: int, group: dict[str, Any], on: Switches
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One step for one parameter: the new parameter and moving averages."""
    lr, decay, eps, (b1, b2) = group["lr"], group["weight_decay"], group["eps"], group["betas"]
    if "betas_swapped" in on:
        b1, b2 = b2, b1
    if "decay_into_gradient" in on:
        g = g + decay * p
    m = b1 * m + (1.0 if "m_not_averaged" in on else 1 - b1) * g
    v = b2 * v + (1.0 if "v_not_averaged" in on else 1 - b2) * g**2
    corrected = (group["correct_bias"] or "always_corrected" in on) and "no_correction" not in on
    c1 = 1 - b1**t if corrected and "only_v_corrected" not in on else 1.0
    c2 = 1 - b2**t if corrected and "only_m_corrected" not in on else 1.0
    size = lr * c2**0.5 / c1
    root = v if "no_root" in on else np.sqrt(v)
    if "eps_on_corrected" in on:
        step = lr / c1 * m / (np.sqrt(v / c2) + eps)
    elif "eps_inside_root" in on:
        step = size * m / np.sqrt(v + eps)
    else:
        step = size * m / (root + (0.0 if "no_eps" in on else eps))
    if "ascent" in on:
        step = -step
    if "decay_first" in on:
        return p * (1 - lr * decay) - step, m, v
    p = p - step
    share = one_of(
        on,
        right=lr * decay,
        no_decay=0.0,
        decay_into_gradient=0.0,
        decay_without_lr=decay,
        decay_sign=-lr * decay,
        decay_by_step_size=size * decay,
    )
    return p * (1 - share), m, v


def zero_shot(settings: Settings, arrays: Arrays, on: Switches) -> Arrays:
    """Ids (B, T) -> a score for each label (B, labels)."""
    logits, _ = hidden_states(settings, arrays, arrays["tokens"])
    if "softmax_over_rows" in on:
        scored = np.log(softmax(logits, 0))
    else:
        scored = logits if on & {"raw_logits", "over_labels_only"} else np.log(softmax(logits))
    if "probabilities" in on:
        scored = np.exp(scored)
    scored = one_of(
        on,
        right=scored[:, -1],
        first_position=scored[:, 0],
        mean_of_positions=scored.mean(1),
        second_last=scored[:, -2],
    )
    if "over_labels_only" in on:
        scored = scored - np.log(np.exp(scored[:, settings["label_ids"]]).sum(-1, keepdims=True))
    found = scored[:, settings["label_ids"]]
    extra = one_of(on, right=0.0, bos_counted=scored[:, [1]], eos_counted=scored[:, [2]])
    found = found + extra
    if "labels_reversed" in on:
        found = found[:, ::-1]
    return {"scores": -found if "negated" in on else found}


def classifier(settings: Settings, arrays: Arrays, on: Switches) -> Arrays:
    """Ids (B, T) -> log-probabilities (B, labels); and the share of trainable weights in backbone and head."""
    _, hidden = hidden_states(settings, arrays, arrays["tokens"])
    pooled = one_of(
        on,
        right=hidden[:, -1],
        first_position=hidden[:, 0],
        mean_of_positions=hidden.mean(1),
        second_last=hidden[:, -2],
    )
    if "tanh" in on:
        pooled = np.tanh(pooled)
    acts = settings["hidden_dropout_prob"] > 0 and (settings["training"] or "dropout_at_eval" in on)
    acts = acts and "no_dropout" not in on  # the runner's dropout drops everything
    if acts and "dropout_on_logits" not in on:
        pooled = pooled * 0.0
    logits = pooled @ arrays["classifier_head.weight"].T
    if "no_head_bias" not in on:
        logits = logits + arrays["classifier_head.bias"]
    if acts and "dropout_on_logits" in on:
        logits = logits * 0.0
    shifted = np.log(softmax(logits, 0 if "softmax_over_rows" in on else -1))
    found = one_of(on, right=shifted, probabilities=softmax(logits), raw_logits=logits)
    trained = one_of(
        on,
        right=settings["option"] == "finetune",
        never_frozen=True,
        always_frozen=False,
        frozen_reversed=settings["option"] == "pretrain",
    )
    return {"log_probabilities": found, "trainable": np.array([float(trained), float("head_frozen" not in on)])}


def lora(settings: Settings, arrays: Arrays, on: Switches) -> Arrays:
    """A LoRALayer alone, or a Llama with LoRA before and after merging."""
    rank, alpha = settings["rank"], settings["alpha"]
    scale = one_of(
        on,
        right=alpha / rank,
        scale_alpha=alpha,
        scale_alpha_times_rank=alpha * rank,
        scale_rank_over_alpha=rank / alpha,
        scale_root_of_rank=alpha / rank**0.5,
        no_scale=1.0,
    )
    if "x" in arrays:
        update = arrays["lora_B"] @ arrays["lora_A"] * scale
        if "update_transposed" in on:
            update = update.T
        base = 0.0 if "base_left_out" in on else arrays["weight"]
        b_zero, a_zero = one_of(on, right=(1, 0), b_random=(0, 0), a_zero=(1, 1), init_swapped=(0, 1))
        return {
            "output": arrays["x"] @ (base + (-update if "update_subtracted" in on else update)).T,
            "starts_at_zero": np.array([float(b_zero), float(a_zero)]),
            "trainable": np.array([float("base_not_frozen" in on), 1.0, 1.0]),
        }
    return lora_model(settings, arrays, scale, on)


def lora_model(settings: Settings, arrays: Arrays, scale: float, on: Switches) -> Arrays:
    names = [name.removesuffix(".lora_A") for name in arrays if name.endswith(".lora_A")]
    wrapped = [name for name in names if name.endswith(("query", "value")) or "wraps_query_value" not in on]
    updated, merged = dict(arrays), dict(arrays)
    in_merge = one_of(
        on,
        right=scale,
        merge_without_scale=1.0,
        merge_twice=2 * scale,
        merge_subtracts=-scale,
        merge_adds_again=2 * scale,
    )
    if "merge_drops_update" in on:
        in_merge = 0.0
    for name in wrapped:
        product = arrays[f"{name}.lora_B"] @ arrays[f"{name}.lora_A"]
        forward = -scale if "update_subtracted" in on else scale
        base = 0.0 if "base_left_out" in on else arrays[f"{name}.weight"]
        updated[f"{name}.weight"] = base + forward * (product.T if "update_transposed" in on else product)
        merge = product.T if "merge_transposed" in on else product
        merged[f"{name}.weight"] = arrays[f"{name}.weight"] + in_merge * merge
    kinds = [1.0, float("wraps_query_value" not in on), 1.0, float("wraps_query_value" not in on)]
    ffn = float("wraps_feed_forward" in on)
    trains = 0.0 if "adapters_frozen" in on else 1.0
    listed = one_of(
        on,
        right=[1.0, 1.0, 0.0],
        optimizer_gets_a=[1.0, 0.0, 0.0],
        optimizer_gets_b=[0.0, 1.0, 0.0],
        optimizer_gets_all=[1.0] * 3,
    )
    return {
        "hidden": hidden_states(settings, updated, arrays["tokens"])[1],
        "merged_hidden": hidden_states(settings, merged, arrays["tokens"])[1],
        "wrapped": np.array([*kinds, ffn, ffn, ffn]),
        "trainable": np.array([float("model_not_frozen" in on), trains, trains]),
        "optimizer": np.array(listed),
        "plain_after_merge": np.array(0.0 if on & {"merge_keeps_layers", "merge_adds_again"} else 1.0),
    }
