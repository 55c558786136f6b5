"""The known mistakes as a student writes them: for each, the texts to replace in course_student.SOURCE."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from course_student import student_modules
from minillama.grading.kit_setups import Setup
from minillama.grading.mistakes import Mistake

Changes = list[tuple[str, str]]

ROOT, ROOT_OUTSIDE = "torch.sqrt(variance + self.eps)", "(torch.sqrt(variance) + self.eps)"
MEAN, VARIANCE = "mean = x.mean(-1, keepdim=True)", "variance = centred.pow(2).mean(-1, keepdim=True)"
AFFINE, SQUARE = "normed * self.weight + self.bias", "square = x.pow(2).mean(-1, keepdim=True)"
NORM: dict[str, Changes] = {
    "no_eps": [(ROOT, "torch.sqrt(variance)")],
    "eps_outside": [(ROOT, "(torch.sqrt(variance) + self.eps)")],
    "eps_inside": [(ROOT_OUTSIDE, ROOT)],
    "rms_norm": [("centred = x - mean", "centred = x"), (AFFINE, "normed * self.weight")],
    "eps_clamp": [(ROOT, "torch.sqrt(variance.clamp_min(self.eps))")],
    "eps_1e5": [(ROOT, "torch.sqrt(variance + 1e-5)")],
    "eps_1e6": [(ROOT, "torch.sqrt(variance + 1e-6)")],
    "no_root": [(ROOT, "(variance + self.eps)")],
    "unbiased": [(VARIANCE, "variance = x.var(-1, keepdim=True)")],
    "no_mean": [("normed = centred /", "normed = x /")],
    "rms": [("centred = x - mean", "centred = x")],
    "raw_variance": [(VARIANCE, "variance = x.pow(2).mean(-1, keepdim=True)")],
    "layer_norm": [(SQUARE, f"x = x - x.mean(-1, keepdim=True)\n{SQUARE}")],
    "centred_variance": [(SQUARE, "square = x.var(-1, keepdim=True, unbiased=False)")],
    "axis_sequence": [(MEAN, MEAN.replace("-1", "1")), (VARIANCE, VARIANCE.replace("-1", "1"))],
    "axis_batch": [(MEAN, MEAN.replace("-1", "0")), (VARIANCE, VARIANCE.replace("-1", "0"))],
    "axis_row": [(MEAN, MEAN.replace("-1", "(1, 2)")), (VARIANCE, VARIANCE.replace("-1", "(1, 2)"))],
    "axis_all": [(MEAN, "mean = x.mean()"), (VARIANCE, "variance = centred.pow(2).mean()")],
    "weight_left_out": [(AFFINE, "normed + self.bias")],
    "weight_before": [(MEAN, f"x = x * self.weight\n{MEAN}"), (AFFINE, "normed + self.bias")],
    "weight_plus_one": [(AFFINE, "normed * (1 + self.weight) + self.bias")],
    "bias_left_out": [(AFFINE, "normed * self.weight")],
    "bias_first": [(AFFINE, "(normed + self.bias) * self.weight")],
    "no_upcast": [("x = input.float()\n        mean", "x = input\n        mean")],
    "keeps_float32": [("return output.type_as(input)", "return output")],
}

SPLIT = "even, odd = x.float().reshape(*x.shape[:-1], -1, 2).unbind(-1)"
JOIN, CONCATENATED = "torch.stack((first, second), dim=-1).flatten(-2)", "torch.cat((first, second), dim=-1)"
FIRST, SECOND = "first = even * cos - odd * sin", "second = even * sin + odd * cos"
POSITIONS, EXPONENT = "positions = torch.arange(seqlen).float()", "exponent = i / head_dim"
ROPE: dict[str, Changes] = {
    "split_halves": [(SPLIT, "even, odd = x.float().chunk(2, dim=-1)"), (JOIN, CONCATENATED)],
    "interleaved": [("even, odd = x.float().chunk(2, dim=-1)", SPLIT), (CONCATENATED, JOIN)],
    "concatenated": [(JOIN, CONCATENATED)],
    "stacked": [(CONCATENATED, JOIN)],
    "wrong_sign": [(FIRST, "first = even * cos + odd * sin"), (SECOND, "second = odd * cos - even * sin")],
    "plus_sign": [("angles = -torch.outer", "angles = torch.outer")],
    "missing_minus": [(FIRST, "first = even * cos + odd * sin")],
    "no_sin": [(FIRST, "first = even * cos"), (SECOND, "second = odd * cos")],
    "cos_sin_swapped": [("cos, sin = angles.cos()", "sin, cos = angles.cos()")],
    "from_one": [(POSITIONS, "positions = torch.arange(1, seqlen + 1).float()")],
    "over_heads": [
        (
            SPLIT,
            "angle = torch.outer(torch.arange(x.shape[2]).float(), frequencies)\n"
            f"cos, sin = angle.cos()[None, None], angle.sin()[None, None]\n{SPLIT}",
        )
    ],
    "bfloat16_positions": [(POSITIONS, "positions = torch.arange(seqlen).bfloat16().float()")],
    "exponent_without_2": [(EXPONENT, "exponent = torch.arange(head_dim // 2) / head_dim")],
    "exponent_doubled": [(EXPONENT, "exponent = i / (head_dim // 2)")],
    "exponent_from_one": [(EXPONENT, "exponent = (i + 2) / head_dim")],
    "exponent_sign": [(EXPONENT, "exponent = -i / head_dim")],
    "exponent_model_width": [(EXPONENT, "exponent = i / (heads * head_dim)")],
    "theta_fixed": [("1.0 / theta ** exponent", "1.0 / 10000.0 ** exponent")],
    "query_only": [("key_out = rotate(key)", "key_out = key")],
    "key_only": [("query_out = rotate(query)", "query_out = query")],
    "swapped": [("return query_out, key_out", "return key_out, query_out")],
}

SCALE, SOFTMAX = "scores = scores / math.sqrt(self.head_dim)", "weights = F.softmax(scores, dim=-1)"
DROP, MIX, PRODUCT = "weights = self.attn_dropout(weights)", "output = weights @ value", "scores = query @ key"
IS_CAUSAL, HIDE = "self.causal = CAUSAL if causal is None else causal", 'scores.masked_fill(later, float("-inf"))'
LATER = "torch.triu(torch.ones(seqlen, seqlen, dtype=torch.bool), diagonal=1)"
SCORES: dict[str, Changes] = {
    "no_scale": [(SCALE, "pass")],
    "scale_model_width": [(SCALE, "scores = scores / math.sqrt(self.head_dim * self.n_heads)")],
    "scale_without_root": [(SCALE, "scores = scores / self.head_dim")],
    "scale_multiplied": [(SCALE, "scores = scores * math.sqrt(self.head_dim)")],
    "scale_by_length": [(SCALE, "scores = scores / math.sqrt(seqlen)")],
    "scale_after_softmax": [(SCALE, "pass"), (SOFTMAX, f"{SOFTMAX} / math.sqrt(self.head_dim)")],
    "softmax_over_queries": [(SOFTMAX, "weights = F.softmax(scores, dim=-2)")],
    "softmax_over_heads": [(SOFTMAX, "weights = F.softmax(scores, dim=1)")],
    "no_softmax": [(SOFTMAX, "weights = scores")],
    "key_query_swapped": [(f"{PRODUCT}.transpose", "scores = key @ query.transpose")],
    "weights_transposed": [(MIX, "output = weights.transpose(-2, -1) @ value")],
    "key_as_value": [(MIX, "output = weights @ key")],
    "causal": [(IS_CAUSAL, "self.causal = True")],
    "not_causal": [(IS_CAUSAL, "self.causal = False")],
    "mask_strict": [(LATER, LATER.replace("=1", "=0"))],
    "mask_strict_finite": [(LATER, LATER.replace("=1", "=0")), (HIDE, "scores.masked_fill(later, -1e9)")],
    "mask_reversed": [(LATER, LATER.replace("triu", "tril").replace("=1", "=-1"))],
    "mask_as_factor": [(HIDE, "scores * ~later")],
    "mask_after_softmax": [(HIDE, "scores"), (SOFTMAX, f"{SOFTMAX}.masked_fill(later, 0.0)")],
    "dropout_at_eval": [(DROP, "weights = F.dropout(weights, self.dropout)")],
    "output_transposed": [(MIX, "output = (weights @ value).transpose(1, 2)")],
}

KEYS, VALUES = (f"torch.repeat_interleave({name}, self.n_rep, dim=2)" for name in ("key", "value"))
TURN = "query, key = apply_rotary_emb(query, key, self.head_dim, self.max_seq_len)"
HEADS = "query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)"
CALL, OUT = "output = self.compute_query_key_value_scores(query", "self.resid_dropout(self.compute_output(output))"
ATTENTION: dict[str, Changes] = {
    "tile": [(KEYS, "key.repeat(1, 1, self.n_rep, 1)"), (VALUES, "value.repeat(1, 1, self.n_rep, 1)")],
    "first_kv_head": [
        (KEYS, "key[:, :, :1].expand(-1, -1, self.n_heads, -1)"),
        (VALUES, "value[:, :, :1].expand(-1, -1, self.n_heads, -1)"),
    ],
    "no_rope": [(TURN, "pass")],
    "rope_on_value": [(TURN, f"{TURN}\nvalue, _ = apply_rotary_emb(value, value, self.head_dim, self.max_seq_len)")],
    "rope_query_only": [(TURN, TURN.replace("query, key =", "query, _ ="))],
    "key_value_swapped": [("query, key, value = self.compute_query(x)", "query, value, key = self.compute_query(x)")],
    "no_output_projection": [(OUT, "self.resid_dropout(output)")],
    "query_key_swapped": [(f"{CALL}, key, value)", CALL.replace("(query", "(key, query, value)"))],
    "heads_by_view": [
        (HEADS, "query, key, value = (z.reshape(batch, self.n_heads, seqlen, -1) for z in (query, key, value))")
    ],
    "output_by_view": [("output = output.transpose(1, 2).contiguous()", "output = output.contiguous()")],
    "features_first": [
        (
            f"{name}.view(batch, seqlen, self.{heads}, self.head_dim)",
            f"{name}.view(batch, seqlen, self.head_dim, self.{heads}).transpose(2, 3)",
        )
        for name, heads in (("query", "n_heads"), ("key", "n_kv_heads"), ("value", "n_kv_heads"))
    ],
    "scale_again": [(f"{CALL},", f"{CALL} / math.sqrt(self.head_dim),")],
    "dropout_at_eval": [(OUT, "F.dropout(self.compute_output(output), self.dropout)")],
    "adds_input": [(OUT, f"x + {OUT}")],
    "causal_argument_ignored": [(IS_CAUSAL, "self.causal = True")],
}

INNER, ATTEND, H = "inner = self.attention_norm(x)", "mix = self.attention(inner)", "h = x + mix"
NEXT, END, GATE = "second = self.ffn_norm(h)", "return h + self.feed_forward(second)", "F.silu(self.w1(x)) * self.w3(x)"
BODY = f"\n{' ' * 8}".join((INNER, ATTEND, H, NEXT, END))
BLOCK: dict[str, Changes] = {
    "post_norm": [
        (BODY, "h = self.attention_norm(x + self.attention(x))\n        return self.ffn_norm(h + self.feed_forward(h))")
    ],
    "norm_after_sublayer": [
        (BODY, "h = x + self.attention_norm(self.attention(x))\n        return h + self.ffn_norm(self.feed_forward(h))")
    ],
    "ffn_first": [
        (BODY, "h = x + self.feed_forward(self.ffn_norm(x))\n        return h + self.attention(self.attention_norm(h))")
    ],
    "no_attention_norm": [(INNER, "inner = x")],
    "no_ffn_norm": [(NEXT, "second = h")],
    "norms_swapped": [(INNER, "inner = self.ffn_norm(x)"), (NEXT, "second = self.attention_norm(h)")],
    "attention_norm_twice": [(NEXT, "second = self.attention_norm(h)")],
    "no_first_residual": [(H, "h = mix")],
    "first_from_normed": [(H, "h = inner + mix")],
    "no_attention": [(H, "h = x")],
    "no_second_residual": [(END, "return self.feed_forward(second)")],
    "second_from_normed": [(END, "return second + self.feed_forward(second)")],
    "second_from_input": [(END, "return x + self.feed_forward(second)")],
    "no_ffn": [(END, "return h")],
    "ffn_on_input": [(NEXT, "second = self.ffn_norm(x)")],
    "ffn_on_attention": [(NEXT, "second = self.ffn_norm(mix)")],
    "gate_up_swapped": [(GATE, "self.w1(x) * F.silu(self.w3(x))")],
    "sigmoid_gate": [(GATE, "torch.sigmoid(self.w1(x)) * self.w3(x)")],
    "relu_gate": [(GATE, "F.relu(self.w1(x)) * self.w3(x)")],
    "no_activation": [(GATE, "self.w1(x) * self.w3(x)")],
    "gate_added": [(GATE, "F.silu(self.w1(x)) + self.w3(x)")],
    "gate_alone": [(GATE, "F.silu(self.w1(x))")],
}

EMBED, LAYERS, FINAL = "embedded = self.tok_embeddings(tokens)", "for layer in self.layers:", "h = self.norm(h)"
LAST, RETURN = "self.output(h[:, [-1], :])", "return logits, h"
EVERY = "if targets is not None:\n            logits = self.output(h)"
MODEL: dict[str, Changes] = {
    "embedding_scaled": [(EMBED, f"{EMBED} * math.sqrt(self.config.dim)")],
    "dropout_at_eval": [("h = self.dropout(embedded)", "h = F.dropout(embedded, self.config.dropout)")],
    "layers_reversed": [(LAYERS, "for layer in reversed(list(self.layers)):")],
    "last_layer_left_out": [(LAYERS, "for layer in self.layers[:-1]:")],
    "first_layer_repeated": [(LAYERS, "for layer in [self.layers[0]] * len(self.layers):")],
    "no_final_norm": [(FINAL, "pass")],
    "final_norm_twice": [(FINAL, "h = self.norm(self.norm(h))")],
    "logits_before_norm": [(LAST, "self.output(stream[:, [-1], :])"), (EVERY, EVERY.replace("(h)", "(stream)"))],
    "hidden_before_norm": [(RETURN, "return logits, stream")],
    "probabilities": [(RETURN, "return F.softmax(logits, dim=-1), h")],
    "log_probabilities": [(RETURN, "return F.log_softmax(logits, dim=-1), h")],
    "first_position": [(LAST, "self.output(h[:, [0], :])")],
    "mean_of_positions": [(LAST, "self.output(h.mean(1, keepdim=True))")],
    "all_positions": [(LAST, "self.output(h)")],
    "targets_ignored": [(EVERY, EVERY.replace("(h)", "(h[:, -1:])"))],
}

GREEDY, CUT = "logits.argmax(dim=-1, keepdim=True)", "idx if idx.size(1) <= context else idx[:, -context:]"
SCALED, PROBS, KEPT = "scaled = logits / temperature", "probs = F.softmax(scaled, dim=-1)", "kept = probs >= epsilon"
AGAIN, DRAW = "probs = probs / probs.sum(-1, keepdim=True)", "idx_next = torch.multinomial(probs, num_samples=1)"
KEPT_BY_MIN_P = "kept = probs >= min_p * probs.max(-1, keepdim=True).values"
IN_ORDER = "kept_in_order = total - ordered < top_p"
RESTORED = "kept = torch.zeros_like(kept_in_order).scatter(-1, order, kept_in_order)"
GENERATE: dict[str, Changes] = {
    "least_likely": [(GREEDY, GREEDY.replace("argmax", "argmin"))],
    "one_token_for_all_rows": [(GREEDY, "logits[:1].argmax(dim=-1, keepdim=True).expand(len(idx), 1)")],
    "prompt_left_out": [("return idx\n", "return idx[:, start:]\n\n    ")],
    "one_too_few": [("range(max_new_tokens)", "range(max_new_tokens - 1)")],
    "one_too_many": [("range(max_new_tokens)", "range(max_new_tokens + 1)")],
    "context_from_start": [(CUT, "idx[:, :context]")],
    "no_context_cut": [(CUT, "idx")],
    "last_token_only": [(CUT, "idx[:, -1:]")],
    "no_temperature": [(SCALED, "scaled = logits")],
    "temperature_multiplied": [(SCALED, "scaled = logits * temperature")],
    "temperature_on_probabilities": [(SCALED, "scaled = logits"), (PROBS, f"{PROBS} / temperature")],
    "filter_before_temperature": [(KEPT, "kept = F.softmax(logits, dim=-1) >= epsilon")],
    "no_epsilon": [(KEPT, "kept = probs >= 0.0")],
    "strictly_above": [(KEPT, "kept = probs > epsilon")],
    "epsilon_on_logits": [(KEPT, "kept = scaled >= epsilon")],
    "epsilon_of_largest": [(KEPT, "kept = probs >= epsilon * probs.max(-1, keepdim=True).values")],
    "epsilon_below": [(KEPT, "kept = probs < epsilon")],
    "no_min_p": [(KEPT_BY_MIN_P, "kept = probs >= 0.0")],
    "min_p_absolute": [(KEPT_BY_MIN_P, "kept = probs >= min_p")],
    "min_p_below": [(KEPT_BY_MIN_P, KEPT_BY_MIN_P.replace(">=", "<"))],
    "no_top_p": [(IN_ORDER, "kept_in_order = total > -1.0")],
    "crossing_left_out": [(IN_ORDER, "kept_in_order = total <= top_p")],
    "one_more": [(IN_ORDER, "kept_in_order = torch.cat((total[:, :1] > 0, (total - ordered < top_p)[:, :-1]), -1)")],
    "top_p_ascending": [("descending=True", "descending=False")],
    "order_not_restored": [(RESTORED, "kept = kept_in_order")],
    "softmax_twice": [(AGAIN, "probs = F.softmax(probs, dim=-1)")],
    "dropped_logits_zero": [(AGAIN, "probs = F.softmax(torch.where(kept, scaled, torch.zeros_like(scaled)), dim=-1)")],
    "uniform": [(DRAW, "idx_next = torch.multinomial((probs > 0).float(), num_samples=1)")],
    "arg_max": [(DRAW, "idx_next = probs.argmax(-1, keepdim=True)")],
}

CORRECTED, BOTH = 'if group["correct_bias"]:', "c1, c2 = 1 - beta1 ** t, 1 - beta2 ** t"
UPDATE, DENOMINATOR = 'update = size * m / (v.sqrt() + group["eps"])', '(v.sqrt() + group["eps"])'
DECAY, MOVE = 'p.data.add_(p.data, alpha=-alpha * group["weight_decay"])', "p.data.add_(-update)"
GRADIENT, CLIP = "grad = p.grad.data", "torch.nn.utils.clip_grad_norm_(members, limit)"
ADAMW: dict[str, Changes] = {
    "no_correction": [(CORRECTED, "if False:")],
    "only_m_corrected": [(BOTH, "c1 = 1 - beta1 ** t")],
    "only_v_corrected": [(BOTH, "c2 = 1 - beta2 ** t")],
    "always_corrected": [(CORRECTED, "if True:")],
    "step_one_ahead": [('t, m, v = state["t"],', 't, m, v = state["t"] + 1,')],
    "step_shared": [('state["t"] += 1', 'self.shared["t"] = state["t"] = self.shared.get("t", 0) + 1')],
    "eps_inside_root": [(DENOMINATOR, '(v + group["eps"]).sqrt()')],
    "eps_on_corrected": [(UPDATE, 'update = alpha / c1 * m / ((v / c2).sqrt() + group["eps"])')],
    "no_eps": [(DENOMINATOR, "v.sqrt()")],
    "no_root": [(DENOMINATOR, '(v + group["eps"])')],
    "no_decay": [(DECAY, "pass")],
    "decay_first": [(DECAY, "pass"), (MOVE, f'p.data.mul_(1 - alpha * group["weight_decay"])\n{MOVE}')],
    "decay_into_gradient": [(DECAY, "pass"), (GRADIENT, f'{GRADIENT} + group["weight_decay"] * p.data')],
    "decay_without_lr": [(DECAY, DECAY.replace("-alpha * ", "-"))],
    "decay_sign": [(DECAY, DECAY.replace("-alpha", "alpha"))],
    "decay_by_step_size": [(DECAY, DECAY.replace("-alpha", "-size"))],
    "betas_swapped": [('beta1, beta2 = group["betas"]', 'beta2, beta1 = group["betas"]')],
    "m_not_averaged": [("alpha=1 - beta1", "alpha=1.0")],
    "v_not_averaged": [("value=1 - beta2", "value=1.0")],
    "ascent": [(MOVE, "p.data.add_(update)")],
    "first_group_only": [("for group in self.param_groups:", "for group in self.param_groups[:1]:")],
    "group_settings_ignored": [
        ('limit = group["max_grad_norm"]', 'group = self.defaults\nlimit = group["max_grad_norm"]')
    ],
    "clip_left_out": [("if limit is not None:", "if False:")],
    "clip_each_parameter": [(CLIP, "[torch.nn.utils.clip_grad_norm_([p], limit) for p in members]")],
    "clip_by_value": [(CLIP, "torch.nn.utils.clip_grad_value_(members, limit)")],
    "clip_over_groups": [
        (CLIP, CLIP.replace("members", '[p for group in self.param_groups for p in group["params"]]'))
    ],
    "clip_always": [
        (
            CLIP,
            "total = torch.stack([p.grad.norm() for p in members]).norm()\n"
            "[p.grad.mul_(limit / (total + 1e-6)) for p in members]",
        )
    ],
    "state_shared": [("state = self.state[p]", "state = self.shared")],
    "state_not_kept": [("if len(state) == 0:", "if True:")],
    "nothing_moves": [(MOVE, "p = p.data - update"), (DECAY, 'p = p - alpha * group["weight_decay"] * p')],
}

READ, LOGS = "logits, _ = self.llama(input_ids)", "log_probabilities = F.log_softmax(logits, dim=-1)"
ALL, LABEL = "logits, _ = self.llama(input_ids, input_ids)", "log_probabilities[:, -1, ids]"
ZERO_SHOT: dict[str, Changes] = {
    "first_position": [(READ, ALL), (LABEL, LABEL.replace("-1", "0"))],
    "mean_of_positions": [(READ, ALL), (LABEL, "log_probabilities.mean(1)[:, ids]")],
    "second_last": [(READ, ALL), (LABEL, LABEL.replace("-1", "-2"))],
    "probabilities": [(LOGS, "log_probabilities = F.softmax(logits, dim=-1)")],
    "raw_logits": [(LOGS, "log_probabilities = logits")],
    "over_labels_only": [
        (LOGS, "log_probabilities = logits"),
        ("return scores", "return F.log_softmax(scores, dim=-1)"),
    ],
    "softmax_over_rows": [(LOGS, "log_probabilities = F.log_softmax(logits, dim=0)")],
    "bos_counted": [("bos=False", "bos=True")],
    "eos_counted": [("eos=False", "eos=True")],
    "labels_reversed": [("scores[:, i]", "scores[:, -1 - i]")],
    "negated": [("return scores", "return -scores")],
}

POOL, DROPOUT = "pooled = hidden[:, -1]", "pooled = self.dropout(pooled)"
HEAD, RESULT = "logits = self.classifier_head(pooled)", "return F.log_softmax(logits, dim=-1)"
FREEZE, LINEAR = 'config.option == "finetune"', "nn.Linear(self.llama.config.dim, self.num_labels)"
CLASSIFIER: dict[str, Changes] = {
    "first_position": [(POOL, "pooled = hidden[:, 0]")],
    "mean_of_positions": [(POOL, "pooled = hidden.mean(1)")],
    "second_last": [(POOL, "pooled = hidden[:, -2]")],
    "tanh": [(DROPOUT, "pooled = self.dropout(torch.tanh(pooled))")],
    "no_head_bias": [(HEAD, "logits = pooled @ self.classifier_head.weight.T")],
    "probabilities": [(RESULT, "return F.softmax(logits, dim=-1)")],
    "raw_logits": [(RESULT, "return logits")],
    "softmax_over_rows": [(RESULT, "return F.log_softmax(logits, dim=0)")],
    "dropout_at_eval": [(DROPOUT, "pooled = F.dropout(pooled, self.dropout.p)")],
    "no_dropout": [(DROPOUT, "pass")],
    "dropout_on_logits": [(DROPOUT, "pass"), (HEAD, "logits = self.dropout(self.classifier_head(pooled))")],
    "never_frozen": [(FREEZE, "True")],
    "always_frozen": [(FREEZE, "False")],
    "frozen_reversed": [(FREEZE, 'config.option == "pretrain"')],
    "head_frozen": [(LINEAR, f"{LINEAR}.requires_grad_(False)")],
}

SCALING, DELTA = "self.scaling = alpha / rank", "child.scaling * delta"
A, B = "torch.randn(rank, original_layer.in_features) * 0.01", "torch.zeros(original_layer.out_features, rank)"
SUM, FLOW = "return base + self.scaling * update", "update = x @ self.lora_A.T @ self.lora_B.T"
TARGETS = 'TARGETS = ("compute_query", "compute_key", "compute_value", "compute_output")'
WRAP, CHOSEN = "LoRALayer(getattr(module, target), rank, alpha)", ' if "lora_A" in name or "lora_B" in name'
ADD, UNWRAP = "child.original_layer.weight.data += child.scaling * delta", "setattr(module, name, child.original_layer)"
LORA: dict[str, Changes] = {
    "scale_alpha": [(SCALING, "self.scaling = alpha")],
    "scale_alpha_times_rank": [(SCALING, "self.scaling = alpha * rank")],
    "scale_rank_over_alpha": [(SCALING, "self.scaling = rank / alpha")],
    "scale_root_of_rank": [(SCALING, "self.scaling = alpha / math.sqrt(rank)")],
    "no_scale": [(SCALING, "self.scaling = 1.0")],
    "update_subtracted": [(SUM, "return base - self.scaling * update")],
    "update_transposed": [(FLOW, "update = x @ self.lora_B @ self.lora_A")],
    "base_left_out": [(SUM, "return self.scaling * update")],
    "base_not_frozen": [("self.original_layer.weight.requires_grad = False", "pass")],
    "b_random": [(B, "torch.randn(original_layer.out_features, rank)")],
    "a_zero": [(A, "torch.zeros(rank, original_layer.in_features)")],
    "init_swapped": [
        (A, "torch.zeros(rank, original_layer.in_features)"),
        (B, "torch.randn(original_layer.out_features, rank)"),
    ],
    "wraps_query_value": [(TARGETS, 'TARGETS = ("compute_query", "compute_value")')],
    "wraps_feed_forward": [(TARGETS, f'{TARGETS} + ("w1", "w2", "w3")')],
    "model_not_frozen": [("param.requires_grad = False", "pass")],
    "adapters_frozen": [(WRAP, f"{WRAP}.requires_grad_(False)")],
    "optimizer_gets_a": [(CHOSEN, ' if "lora_A" in name')],
    "optimizer_gets_b": [(CHOSEN, ' if "lora_B" in name')],
    "optimizer_gets_all": [(CHOSEN, "")],
    "merge_without_scale": [(DELTA, "delta")],
    "merge_twice": [(DELTA, f"2 * {DELTA}")],
    "merge_subtracts": [(ADD, ADD.replace("+=", "-="))],
    "merge_transposed": [(DELTA, "child.scaling * delta.T")],
    "merge_drops_update": [(ADD, "pass")],
    "merge_keeps_layers": [(ADD, "pass"), (UNWRAP, "pass")],
    "merge_adds_again": [(UNWRAP, "pass")],
}

# For each known mistake, the changes that make it.
CHANGES: dict[str, Changes] = {
    f"{part}.{name}": changes
    for part, of_part in (
        ("norm", NORM),
        ("rope", ROPE),
        ("scores", SCORES),
        ("attention", ATTENTION),
        ("block", BLOCK),
        ("model", MODEL),
        ("generate", GENERATE),
        ("adamw", ADAMW),
        ("zero_shot", ZERO_SHOT),
        ("classifier", CLASSIFIER),
        ("lora", LORA),
    )
    for name, changes in of_part.items()
}
# Changes in the setups that have a word, where the lines differ.
OTHER_CHANGES: dict[tuple[str, str], Changes] = {
    ("norm.no_eps", "outside"): [(ROOT_OUTSIDE, "torch.sqrt(variance)")],
    ("norm.eps_clamp", "outside"): [(ROOT_OUTSIDE, "torch.sqrt(variance).clamp_min(self.eps)")],
    ("norm.eps_1e5", "outside"): [(ROOT_OUTSIDE, "(torch.sqrt(variance) + 1e-5)")],
    ("norm.eps_1e6", "outside"): [(ROOT_OUTSIDE, "(torch.sqrt(variance) + 1e-6)")],
    ("norm.no_root", "outside"): [(ROOT_OUTSIDE, "(variance + self.eps)")],
    ("generate.filter_before_temperature", "top_p"): [
        ("ordered, order = probs.sort", "ordered, order = F.softmax(logits, dim=-1).sort")
    ],
    ("generate.filter_before_temperature", "min_p"): [
        (KEPT_BY_MIN_P, KEPT_BY_MIN_P.replace("probs", "F.softmax(logits, dim=-1)"))
    ],
}


def student_with(mistake: Mistake, setup: Setup) -> dict[str, Any]:
    """The modules of a student who makes a mistake."""
    rule, _, ending = mistake.short_name.rpartition("_")
    if ending == "sampling":  # the rule of another setup
        return student_modules(replace(setup, sampling=rule))
    others = (OTHER_CHANGES[name, word] for name, word in OTHER_CHANGES if name == mistake.name and word in setup.words)
    return student_modules(setup, *next(others, CHANGES[mistake.name]))
