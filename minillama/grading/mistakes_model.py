"""Rows of the table of known mistakes for the model's parts: name, slots, sentence for the student.

A slot is a place in the code that holds one thing; two mistakes of one slot cannot be made together. A row may end with
words: it is a mistake in the setups that have one of them (`Setup.words`; default: in all).
"""

from __future__ import annotations

Row = tuple[str, str, str] | tuple[str, str, str, str]
BIDIRECTIONAL, CAUSAL, LAYER_NORM, RMS_NORM = "bidirectional", "causal", "layernorm", "rmsnorm"

NORM: list[Row] = [
    ("no_eps", "eps", "eps is missing in the divisor."),
    ("eps_outside", "eps root", "eps is added after the root; it belongs under it, to the variance.", "inside"),
    ("eps_inside", "eps root", "eps is added under the root; this variant wants it after the root.", "outside"),
    ("eps_clamp", "eps", "eps is a lower bound; it should be added."),
    ("eps_1e5", "eps", "eps is always 1e-5; use the eps that the constructor was given."),
    ("eps_1e6", "eps", "eps is always 1e-6; use the eps that the constructor was given."),
    ("no_root", "root", "The root is missing: x is divided by the variance, not by the standard deviation."),
    ("unbiased", "count", "The variance is divided by n - 1 (torch.var's default); use n (unbiased=False)."),
    ("no_mean", "centre", "The mean is not subtracted from x.", LAYER_NORM),
    ("rms", "centre", "This is RMSNorm with a bias: LayerNorm subtracts the mean first.", LAYER_NORM),
    ("rms_norm", "centre bias", "This is RMSNorm: LayerNorm subtracts the mean first, and adds a bias.", LAYER_NORM),
    ("raw_variance", "centre", "The variance is taken of x itself, without its mean subtracted.", LAYER_NORM),
    ("layer_norm", "centre", "This is LayerNorm: RMSNorm does not subtract the mean.", RMS_NORM),
    ("centred_variance", "centre", "The mean is subtracted before the squares; RMSNorm takes mean(x^2).", RMS_NORM),
    ("axis_sequence", "axis", "Mean and variance go over the positions (axis 1); they go over the features (axis -1)."),
    ("axis_batch", "axis", "Mean and variance go over the rows of the batch; they go over the features (axis -1)."),
    ("axis_row", "axis", "Mean and variance go over a whole row; each position has its own (axis -1)."),
    ("axis_all", "axis", "Mean and variance go over the whole tensor; each position has its own (axis -1)."),
    ("weight_left_out", "weight affine", "The result is not multiplied by the weight."),
    ("weight_before", "weight affine", "x is multiplied by the weight before it is normalised; that comes last."),
    ("weight_plus_one", "weight", "The result is multiplied by 1 + weight; here the weight itself starts at 1."),
    ("bias_left_out", "bias", "The bias is not added.", LAYER_NORM),
    ("bias_first", "bias affine", "The bias is added before the multiplication by the weight.", LAYER_NORM),
    ("no_upcast", "upcast", "The norm is computed in half precision, where squares overflow; compute it in float32."),
    ("keeps_float32", "result", "The result stays float32; give it the dtype of x."),
]

ROPE: list[Row] = [
    (
        "split_halves",
        "pairs",
        "Features i and i + hd/2 are a pair (split halves); right are pairs (2i, 2i + 1), side by side.",
        "interleaved",
    ),
    (
        "interleaved",
        "pairs",
        "It rotates pairs (2i, 2i + 1); this variant wants split halves, pairs (i, i + hd/2).",
        "halves",
    ),
    (
        "concatenated",
        "pairs",
        "The pairs are right, but the results are put one half after the other; interleave them.",
        "interleaved",
    ),
    (
        "stacked",
        "pairs",
        "The pairs are right, but the results are interleaved; put one half after the other.",
        "halves",
    ),
    ("wrong_sign", "signs", "The rotation goes the wrong way: both signs of the sine are reversed.", "plus"),
    (
        "plus_sign",
        "signs",
        "It turns by plus the angle; this variant turns by minus the angle, position theta^(-2i/hd).",
        "minus",
    ),
    ("missing_minus", "signs", "A minus is missing: one of a pair's two sines is subtracted, the other one added."),
    ("no_sin", "signs", "Only the cosine is used; a rotation mixes both features of a pair."),
    ("cos_sin_swapped", "table", "Cosine and sine are swapped."),
    ("from_one", "start", "Positions count from 1; the first position is 0 and is not rotated."),
    (
        "over_heads",
        "axis range",
        "The position is taken from the axis of the heads; it is axis 1 of (batch, seq, heads, hd).",
    ),
    ("bfloat16_positions", "range", "Angles lose precision at far positions; compute them in float32."),
    ("exponent_without_2", "exponent", "The exponent is -i/hd; it is -2i/hd for pair i."),
    ("exponent_doubled", "exponent", "The exponent is -4i/hd: divide 2i by the head's size, not by its half."),
    ("exponent_from_one", "exponent", "The exponent counts pairs from 1; the first pair has the exponent 0."),
    ("exponent_sign", "exponent", "The exponent's sign is wrong: frequencies fall from 1, theta^(-2i/hd)."),
    ("exponent_model_width", "exponent", "The exponent is divided by the model's width; divide by the head's size."),
    ("theta_fixed", "theta", "theta is always 10000; use the argument."),
    ("query_only", "which", "Only the query is rotated; the key is rotated, too."),
    ("key_only", "which", "Only the key is rotated; the query is rotated, too."),
    ("swapped", "which", "The results are in the wrong order: return query, then key."),
]

SCORES: list[Row] = [
    ("no_scale", "scale", "The products are not divided by sqrt(hd)."),
    ("scale_model_width", "scale", "The products are divided by the root of the model's width; use the head's, hd."),
    ("scale_without_root", "scale", "The products are divided by hd; divide by sqrt(hd)."),
    ("scale_multiplied", "scale", "The products are multiplied by sqrt(hd); divide."),
    ("scale_by_length", "scale", "The products are divided by the root of the number of positions; use sqrt(hd)."),
    ("scale_after_softmax", "scale softmax", "The division by sqrt(hd) comes after the softmax; it comes before."),
    (
        "softmax_over_queries",
        "softmax transpose",
        "The softmax goes over the queries (dim -2); it goes over keys (-1).",
    ),
    ("softmax_over_heads", "softmax", "The softmax goes over the heads (dim 1); it goes over the keys (dim -1)."),
    ("no_softmax", "softmax", "The softmax is missing."),
    ("key_query_swapped", "transpose", "key query^T is computed; it is query key^T."),
    ("weights_transposed", "transpose", "The weights are transposed before they meet the values."),
    ("key_as_value", "value", "The keys are averaged; average the values."),
    (
        "causal",
        "mask",
        "A causal mask hides later positions; this edition's attention sees the whole row.",
        BIDIRECTIONAL,
    ),
    ("not_causal", "mask", "The causal mask is missing: a position sees later ones.", CAUSAL),
    (
        "mask_strict",
        "mask softmax transpose",
        "The mask hides a position from itself; it hides only later ones (diagonal=1).",
        CAUSAL,
    ),
    (
        "mask_strict_finite",
        "mask softmax transpose",
        "The mask hides a position from itself (with a large number); it hides only later ones (diagonal=1).",
        CAUSAL,
    ),
    ("mask_reversed", "mask", "The mask is upside down: it hides earlier positions instead of later ones.", CAUSAL),
    ("mask_as_factor", "mask", "Hidden products become 0; they must become -inf before the softmax.", CAUSAL),
    ("mask_after_softmax", "mask softmax", "The mask comes after the softmax, so weights do not sum to 1.", CAUSAL),
    ("dropout_at_eval", "dropout", "The weights' dropout acts in evaluation, too; pass self.training."),
    ("output_transposed", "output", "The result has the axes (batch, seq, heads, hd); keep (batch, heads, seq, hd)."),
]

ATTENTION: list[Row] = [
    ("tile", "groups", "Key/value heads are repeated in turn (repeat); use repeat_interleave: neighbours share one."),
    ("first_kv_head", "groups", "All query heads read the first key/value head."),
    ("no_rope", "rope", "Query and key are not rotated by position: call apply_rotary_emb before the transposition."),
    ("rope_on_value", "rope", "The value is rotated, too; only query and key are."),
    ("rope_query_only", "rope", "The rotated key is not used; only the query is rotated."),
    ("key_value_swapped", "projections", "Key and value are swapped."),
    ("no_output_projection", "output", "compute_output is not applied."),
    ("query_key_swapped", "order", "Query and key are swapped in the call of compute_query_key_value_scores."),
    ("heads_by_view", "heads", "view(batch, heads, seq, hd) mixes positions and heads; view, then transpose(1, 2)."),
    ("output_by_view", "merge", "The heads are merged without transposing back: transpose(1, 2) before the view."),
    ("features_first", "split", "The projections are viewed as (hd, heads); the heads come first."),
    ("scale_again", "scale", "The query is divided by sqrt(hd) once more."),
    ("dropout_at_eval", "dropout", "The dropout on the result acts in evaluation, too."),
    ("adds_input", "residual", "The input is added to the result; that is the block's task."),
    ("causal_argument_ignored", "causal", "Attention(config, causal=False) still hides later positions.", CAUSAL),
]

BLOCK: list[Row] = [
    (
        "post_norm",
        "norm1 norm2 first second source",
        "The norms come after the sums (post-norm); here they come first.",
    ),
    (
        "norm_after_sublayer",
        "norm1 norm2 first second source",
        "The norms are applied to the results of attention and feed-forward; apply them to their inputs.",
    ),
    ("ffn_first", "norm1 norm2 first second source", "The feed-forward layer comes before attention."),
    ("no_attention_norm", "norm1", "Attention reads x without attention_norm."),
    ("no_ffn_norm", "norm2", "The feed-forward layer reads h without ffn_norm."),
    ("norms_swapped", "norm1 norm2", "attention_norm and ffn_norm are swapped."),
    ("attention_norm_twice", "norm2", "attention_norm is used a second time in the place of ffn_norm."),
    ("no_first_residual", "first", "x is not added to attention's result (first residual)."),
    ("first_from_normed", "first", "The normed x is added to attention's result; add x itself."),
    ("no_attention", "norm1 first second source", "Attention's result is not used."),
    ("no_second_residual", "second", "h is not added to the feed-forward result (second residual)."),
    ("second_from_normed", "second", "The normed h is added to the feed-forward result; add h itself."),
    ("second_from_input", "second source", "The block's input is added at the end; add h, with attention in it."),
    ("no_ffn", "norm2 second source ffn gate activation product", "The feed-forward result is not used."),
    ("ffn_on_input", "source", "The feed-forward layer reads the block's input; it reads h = x + attention."),
    (
        "ffn_on_attention",
        "source first second",
        "The feed-forward layer reads attention's result alone; it reads h = x + attention.",
    ),
    ("gate_up_swapped", "gate", "silu is on w3; it is on w1, the gate."),
    ("sigmoid_gate", "activation", "The gate is sigmoid(w1 x); silu is w1 x * sigmoid(w1 x)."),
    ("relu_gate", "activation", "The gate is relu(w1 x); it is silu(w1 x)."),
    ("no_activation", "activation gate product", "The gate has no silu."),
    ("gate_added", "product", "Gate and w3 x are added; multiply them."),
    ("gate_alone", "product gate", "w3 is not used: multiply silu(w1 x) by w3 x."),
]

MODEL: list[Row] = [
    ("embedding_scaled", "embedding", "The embeddings are multiplied by sqrt(dim); Llama takes them as they are."),
    ("dropout_at_eval", "dropout", "The embedding's dropout acts in evaluation, too."),
    ("layers_reversed", "layers", "The layers run from last to first."),
    ("last_layer_left_out", "layers", "The last layer is not used."),
    ("first_layer_repeated", "layers", "Layer 0 is used in the place of every layer."),
    ("no_final_norm", "norm", "The final norm is missing."),
    ("final_norm_twice", "norm", "The final norm is applied twice."),
    ("logits_before_norm", "norm logits", "The logits come from the states before the final norm."),
    ("hidden_before_norm", "norm hidden", "The hidden states are returned without the final norm."),
    ("probabilities", "scale", "Probabilities are returned; return logits, without softmax."),
    ("log_probabilities", "scale", "Log-probabilities are returned; return logits, without log-softmax."),
    ("first_position", "position", "The logits are those of the first position; the last one predicts the next token."),
    ("mean_of_positions", "position", "The logits are averaged over the positions; take the last one's."),
    ("all_positions", "position targets", "Without targets all positions' logits are returned; return the last one's."),
    ("targets_ignored", "targets", "With targets the logits of all positions are wanted, not only the last one's."),
]

# Pairs of (part, name, name) that are in different places but show as one mistake: one hides the other.
APART: frozenset[tuple[str, str, str]] = frozenset(
    {
        ("norm", "no_root", "no_upcast"),
        ("norm", "rms", "bias_left_out"),  # this is rms_norm
        # With these two, both transpositions are the same.
        ("scores", "weights_transposed", "no_softmax"),
        ("scores", "weights_transposed", "softmax_over_heads"),
        ("block", "no_attention_norm", "first_from_normed"),
        ("block", "no_ffn_norm", "second_from_normed"),
    }
)
