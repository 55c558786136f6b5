"""Rows of the table of known mistakes for generation, AdamW, the classifiers and LoRA; see mistakes_model.py."""

from __future__ import annotations

from minillama.grading.mistakes_model import Row

EPSILON, TOP_P, MIN_P, FILTERED = "epsilon", "top_p", "min_p", "epsilon top_p min_p"
CLIPPED = "fall2025 spring2026"  # the AdamW of 2024 does not clip

GENERATE: list[Row] = [
    ("least_likely", "greedy", "Temperature 0 takes the token with the lowest logit; take the highest."),
    (
        "one_token_for_all_rows",
        "rows",
        "All rows of the batch get the first row's token; take argmax over the last axis.",
    ),
    ("prompt_left_out", "result", "Only the new tokens are returned; return the prompt and them."),
    ("one_too_few", "count", "One token too few is generated."),
    ("one_too_many", "count", "One token too many is generated."),
    ("context_from_start", "window", "Beyond max_seq_len the first tokens are read; read the last max_seq_len ones."),
    ("no_context_cut", "window", "The model reads more than max_seq_len tokens; cut to the last max_seq_len ones."),
    ("last_token_only", "window", "The model reads only the last token; it reads the whole text so far."),
    ("no_temperature", "temperature", "The temperature is not used."),
    ("temperature_multiplied", "temperature", "The logits are multiplied by the temperature; divide."),
    (
        "temperature_on_probabilities",
        "temperature filter order draw renormalise",
        "The probabilities are divided by the temperature; divide the logits.",
        f"{EPSILON} {TOP_P}",
    ),
    (
        "filter_before_temperature",
        "order",
        "Tokens are dropped by their probability before the temperature; after it.",
        FILTERED,
    ),
    (
        "no_epsilon",
        "filter order renormalise",
        "epsilon is not used: tokens of small probability can be drawn.",
        EPSILON,
    ),
    (
        "strictly_above",
        "filter renormalise draw",
        "A token of probability exactly epsilon is dropped; keep p >= epsilon.",
        EPSILON,
    ),
    ("epsilon_on_logits", "filter order", "epsilon is compared with logits; compare it with probabilities.", EPSILON),
    ("epsilon_of_largest", "filter", "epsilon is taken as a share of the largest probability (min-p).", EPSILON),
    ("epsilon_below", "filter", "The comparison is reversed: tokens with p < epsilon are kept.", EPSILON),
    ("no_top_p", "filter order renormalise restored", "top_p is not used: all tokens can be drawn.", TOP_P),
    (
        "crossing_left_out",
        "filter",
        "The token with which the total reaches top_p is dropped; it belongs to the kept.",
        TOP_P,
    ),
    ("one_more", "filter", "One token too many is kept: stop as soon as the total reaches top_p.", TOP_P),
    ("top_p_ascending", "filter order", "Tokens are sorted from the least likely; sort from the most likely.", TOP_P),
    (
        "order_not_restored",
        "restored",
        "The kept places of the sorted list are taken as token ids; map them back.",
        TOP_P,
    ),
    ("no_min_p", "filter order renormalise", "min_p is not used: all tokens can be drawn.", MIN_P),
    (
        "min_p_absolute",
        "filter",
        "Probabilities are compared with min_p itself; compare them with min_p times the largest one.",
        MIN_P,
    ),
    ("min_p_below", "filter", "The comparison is reversed: tokens below min_p of the largest are kept.", MIN_P),
    (
        "epsilon_sampling",
        "alone",
        "This is epsilon sampling; here another rule says which tokens can be drawn.",
        "temperature top_p min_p",
    ),
    (
        "top_p_sampling",
        "alone",
        "This is top-p (nucleus) sampling; here another rule says which tokens can be drawn.",
        "temperature epsilon min_p",
    ),
    (
        "min_p_sampling",
        "alone",
        "This is min-p sampling; here another rule says which tokens can be drawn.",
        "temperature epsilon top_p",
    ),
    (
        "softmax_twice",
        "renormalise",
        "The filtered probabilities go through softmax again, which gives dropped tokens e^0.",
    ),
    (
        "dropped_logits_zero",
        "renormalise",
        "Dropped tokens get the logit 0, which may be likely; give them -inf.",
        FILTERED,
    ),
    ("uniform", "draw renormalise", "All kept tokens are equally likely; draw them by their probabilities.", FILTERED),
    (
        "arg_max",
        "draw temperature filter order renormalise restored",
        "The most likely token is always taken, also at a temperature above 0; draw.",
    ),
]

ADAMW: list[Row] = [
    ("no_correction", "correction step", "correct_bias=True has no effect: the bias correction is missing."),
    ("only_m_corrected", "correction", "Only m is corrected: sqrt(1 - b2^t) is missing in the step size."),
    ("only_v_corrected", "correction", "Only v is corrected: 1 / (1 - b1^t) is missing in the step size."),
    ("always_corrected", "correction", "The bias is corrected with correct_bias=False, too."),
    ("step_one_ahead", "step", "The correction uses t + 1; the first step has t = 1."),
    ("step_shared", "step", "t counts the updates of all parameters together; each parameter counts its own steps."),
    ("eps_inside_root", "eps root", "eps is added to v under the root; add it to sqrt(v)."),
    (
        "eps_on_corrected",
        "eps root correction",
        "eps is added to the corrected root sqrt(v / (1 - b2^t)); the formula adds it "
        "to sqrt(v) and corrects the step size.",
    ),
    ("no_eps", "eps", "eps is missing in the denominator."),
    ("no_root", "root", "m is divided by v; divide by sqrt(v)."),
    ("no_decay", "decay", "weight_decay has no effect."),
    ("decay_first", "decay", "The weight decay comes before the gradient step; it comes after it."),
    (
        "decay_into_gradient",
        "decay",
        "weight_decay * p is added to the gradient (Adam with L2); decay p itself (AdamW).",
    ),
    ("decay_without_lr", "decay", "The weight decay is not multiplied by the learning rate."),
    ("decay_sign", "decay", "The weight decay makes weights larger: its sign is wrong."),
    (
        "decay_by_step_size",
        "decay correction",
        "The weight decay is multiplied by the corrected step size; multiply by lr.",
    ),
    ("betas_swapped", "betas", "The betas are swapped: the first is m's, the second v's."),
    ("m_not_averaged", "m", "m = b1 m + g; the gradient's factor 1 - b1 is missing."),
    ("v_not_averaged", "v", "v = b2 v + g^2; the square's factor 1 - b2 is missing."),
    ("ascent", "sign", "The step goes up the gradient: subtract it."),
    ("first_group_only", "groups", "Only the first parameter group is updated."),
    ("group_settings_ignored", "groups", "All groups use the constructor's settings; read each group's own."),
    ("clip_left_out", "clip", "max_grad_norm has no effect.", CLIPPED),
    (
        "clip_each_parameter",
        "clip",
        "Each parameter's gradient is clipped alone; clip the norm of the group's together.",
        CLIPPED,
    ),
    (
        "clip_by_value",
        "clip",
        "Gradients are clipped by value; scale them so that their norm is max_grad_norm at most.",
        CLIPPED,
    ),
    ("clip_over_groups", "clip", "The norm is taken over all groups; take each group's own.", CLIPPED),
    ("clip_always", "clip", "Gradients are scaled to max_grad_norm also if their norm is smaller.", CLIPPED),
    ("state_shared", "step state", "m, v and t are shared by all parameters; each has its own (self.state[p])."),
    (
        "state_not_kept",
        "step state betas m v correction clip",
        "m, v and t start again in each step; keep them in self.state[p].",
    ),
    ("nothing_moves", "alone", "The parameters do not change: assign to p.data (in place), not to a local name."),
]

ZERO_SHOT: list[Row] = [
    ("first_position", "position", "The first position is read; the last one predicts the label."),
    ("mean_of_positions", "position", "All positions are averaged; the last one predicts the label."),
    ("second_last", "position", "The second last position is read; the last one predicts the label."),
    ("probabilities", "scale", "Probabilities are returned; return log-probabilities."),
    ("raw_logits", "scale", "Logits are returned; take log_softmax over the vocabulary."),
    ("over_labels_only", "scale", "log_softmax goes over the labels only; it goes over the whole vocabulary."),
    (
        "softmax_over_rows",
        "axis scale",
        "log_softmax goes over the rows of the batch (dim 0); it goes over the last axis.",
    ),
    ("bos_counted", "ids", "The label's ids include the token of the beginning; encode with bos=False."),
    ("eos_counted", "ids", "The label's ids include the token of the end; encode with eos=False."),
    ("labels_reversed", "labels", "The labels are in the reverse order."),
    ("negated", "sign", "The scores have the wrong sign (a loss); return log-probabilities."),
]

CLASSIFIER: list[Row] = [
    ("first_position", "position", "The first position is read; read the hidden state of the last one."),
    ("mean_of_positions", "position", "The hidden states are averaged; read the last position's."),
    ("second_last", "position", "The second last position is read; read the last one."),
    ("tanh", "activation", "A tanh stands before the head (BERT's pooler); there is none here."),
    ("no_head_bias", "bias", "The head's bias is not added."),
    ("probabilities", "scale", "Probabilities are returned; return log-probabilities (log_softmax)."),
    ("raw_logits", "scale", "Logits are returned; return log-probabilities (log_softmax)."),
    (
        "softmax_over_rows",
        "scale",
        "log_softmax goes over the rows of the batch (dim 0); it goes over the labels (dim -1).",
    ),
    ("dropout_at_eval", "dropout", "Dropout acts in evaluation, too; use nn.Dropout or pass self.training."),
    ("no_dropout", "dropout", "Dropout does not act in training."),
    ("dropout_on_logits", "dropout", "Dropout is applied to the logits; apply it to the hidden state."),
    ("never_frozen", "freezing", "The option pretrain does not freeze the Llama."),
    ("always_frozen", "freezing", "The option finetune freezes the Llama; it should be trained."),
    ("frozen_reversed", "freezing", "The options are reversed: pretrain freezes the Llama, finetune trains it."),
    ("head_frozen", "head", "The head is frozen; it is trained with every option."),
]

LORA: list[Row] = [
    ("scale_alpha", "scale", "The update is multiplied by alpha; the scale is alpha / rank."),
    ("scale_alpha_times_rank", "scale", "The update is multiplied by alpha * rank; the scale is alpha / rank."),
    ("scale_rank_over_alpha", "scale", "The update is multiplied by rank / alpha; the scale is alpha / rank."),
    (
        "scale_root_of_rank",
        "scale",
        "The update is multiplied by alpha / sqrt(rank) (rsLoRA); the scale is alpha / rank.",
    ),
    ("no_scale", "scale", "The update is not scaled; the scale is alpha / rank."),
    ("update_subtracted", "update", "The update is subtracted; add it to the result of the original layer."),
    ("update_transposed", "update", "The update is transposed: x goes through A first, then through B."),
    ("base_left_out", "base", "The original layer's result is left out; add the update to it."),
    ("base_not_frozen", "freezing", "LoRALayer does not freeze the original layer."),
    (
        "b_random",
        "init",
        "B is random at the start; it must be zero, so that training starts from the pretrained model.",
    ),
    ("a_zero", "init", "A and B are both zero, so no gradient ever reaches them; A is random."),
    ("init_swapped", "init", "A starts at zero and B is random; it is the other way round."),
    ("wraps_query_value", "targets", "Only query and value are wrapped; wrap all four projections of attention."),
    (
        "wraps_feed_forward",
        "targets init",
        "The feed-forward layers are wrapped, too; wrap the projections of attention.",
    ),
    ("model_not_frozen", "model", "apply_lora leaves the rest of the model trainable; freeze it."),
    ("adapters_frozen", "adapters", "apply_lora freezes A and B, too; freeze the model first, then wrap."),
    ("optimizer_gets_a", "optimizer", "get_lora_optimizer_params gives only the As."),
    ("optimizer_gets_b", "optimizer", "get_lora_optimizer_params gives only the Bs."),
    ("optimizer_gets_all", "optimizer", "get_lora_optimizer_params gives all parameters; give A and B alone."),
    ("merge_without_scale", "merge scale", "The merged weight has B A without the scale alpha / rank."),
    ("merge_twice", "merge", "The merged weight has the update twice."),
    ("merge_subtracts", "merge", "The merged weight has the update subtracted."),
    ("merge_transposed", "merge update", "The merged weight has the update transposed: B A has the weight's shape."),
    ("merge_drops_update", "merge", "After merging the updates are lost."),
    (
        "merge_keeps_layers",
        "merge update base",
        "merge_lora_weights leaves the LoRALayers in; replace them by Linears.",
    ),
    (
        "merge_adds_again",
        "merge update base",
        "The weight is merged, but the LoRALayers stay and add the update once more.",
    ),
]

# Pairs that show as one mistake, as in mistakes_model.py.
APART: frozenset[tuple[str, str, str]] = frozenset(
    {
        ("generate", "no_temperature", "filter_before_temperature"),
        ("generate", "uniform", "filter_before_temperature"),
        ("classifier", "no_head_bias", "dropout_on_logits"),
        ("classifier", "no_head_bias", "softmax_over_rows"),
        ("classifier", "softmax_over_rows", "dropout_on_logits"),
    }
)
