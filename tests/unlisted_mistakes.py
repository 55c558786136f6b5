"""Mistakes that are not in the table of known ones, each a textual change of one of our modules."""

from __future__ import annotations

from typing import NamedTuple


class Change(NamedTuple):
    """A mistake: `old` becomes `new`. words: what the sentence must contain; separated by |."""

    name: str
    part: str
    file: str
    old: str
    new: str
    words: str


NORM = "return F.layer_norm(wide, weight.shape, weight, bias, self.eps).to(x.dtype)"
TABLE = "return rotary_table(head_dim, 1 << (end - 1).bit_length(), theta, device, scaling)[start:end]"
ROTATED = "return rotate(query, table), rotate(key, table)"
PRODUCTS = "scores = query / math.sqrt(query.shape[-1]) @ key.transpose(-2, -1)"
SHARED = "if self.differential:\n            value = share_values(value)"
FED = "return x + self.feed_forward(self.ffn_norm(x))"
MIXED = "x = (x if only is None else gather_positions(x, only)) + mixed"
STREAM = "hidden = self.norm(self.residual_stream(tokens, attention_mask, cache=cache))"
GENERATED = "return generate(self, idx, max_new_tokens, temperature=temperature, epsilon=epsilon, **more)"
FILTERED = """if temperature > 0.0:
            for _ in range(max_new_tokens):
                p = (self(idx)[0][:, -1] / temperature).softmax(-1)
                kept = p >= epsilon
                idx = torch.cat((idx, (p * kept).multinomial(1)), dim=1)
            return idx
        """
UPDATE = "self.update(parameters, group)\n"
POOLED = 'return model.dropout(model.llama.last_hidden(ids, None if model.pooling == "last_column" else mask))'
LORA = "update = F.linear(F.linear(x.to(self.lora_A.dtype), self.lora_A), self.lora_B) * self.scaling"

CHANGES = [
    Change(
        "centres its input in place",
        "norm",
        "llama.py",
        NORM,
        f"wide -= wide.mean(-1, keepdim=True)\n        {NORM}",
        "'input_afterwards' is",
    ),
    Change(
        "squares eps", "norm", "llama.py", NORM, NORM.replace("self.eps", "self.eps**2"), "The probes 'usual values'"
    ),
    Change(
        "detaches its weight",
        "norm",
        "llama.py",
        NORM,
        NORM.replace("weight, bias,", "weight.detach(), bias,"),
        "'gradient_of_weight' is 0 instead of",
    ),
    Change(
        "begins again at position 256",
        "rope",
        "rope.py",
        "torch.arange(seq_len, dtype=torch.float32, device=device)",
        "(torch.arange(seq_len, dtype=torch.float32, device=device) % 256)",
        "from position 256 on|number of positions of 301 or more",
    ),
    Change(
        "keeps the table of another theta",
        "rope",
        "rope.py",
        TABLE,
        "kept = globals().setdefault('KEPT', {})\n    size = head_dim, 1 << (end - 1).bit_length()\n"
        "    if size not in kept:\n        kept[size] = rotary_table(*size, theta, device, scaling)\n"
        "    return kept[size][start:end]",
        "kept from an earlier call",
    ),
    Change(
        "rotates only the first row",
        "rope",
        "rope.py",
        ROTATED,
        "first, second = query.clone(), key.clone()\n"
        "    first[:1], second[:1] = rotate(query[:1], table), rotate(key[:1], table)\n    return first, second",
        "from row 1 on|only with more than one row",
    ),
    Change(
        "leaves out the last pair",
        "rope",
        "rope.py",
        "frequencies = rotary_frequencies(head_dim, theta, device)\n",
        "frequencies = rotary_frequencies(head_dim, theta, device)\n        frequencies[-1] = 0.0\n",
        "at the last 2 features",
    ),
    Change(
        "gives float64",
        "rope",
        "rope.py",
        ROTATED,
        ROTATED.replace("table)", "table).double()"),
        "'bytes' is 8 instead of 4|'query' and 'key' are right.",
    ),
    Change(
        "takes the keys of the first row",
        "scores",
        "llama.py",
        PRODUCTS,
        PRODUCTS.replace("key.", "key[:1]."),
        "from row 1 on|only with more than one row",
    ),
    Change(
        "sees four positions to each side",
        "scores",
        "llama.py",
        PRODUCTS,
        f"{PRODUCTS}\n        far = torch.ones_like(scores, dtype=torch.bool)\n"
        "        scores = scores.masked_fill(far.triu(5) | far.tril(-5), -math.inf)",
        "only with number of positions of",
    ),
    Change(
        "adds a slope for each head",
        "scores",
        "llama.py",
        PRODUCTS,
        f"{PRODUCTS}\n        steps = torch.arange(scores.shape[-1])\n"
        "        slopes = 0.5 * torch.arange(scores.shape[1])[:, None, None]\n"
        "        scores = scores - slopes * (steps[:, None] - steps).abs()",
        "from head 1 on",
    ),
    Change(
        "scales by the heads that share a key",
        "attention",
        "llama.py",
        SHARED,
        f"query = query * (config.kv_heads / config.n_heads) ** 0.5\n        {SHARED}",
        "only with grouped heads (n_kv_heads < n_heads).",
    ),
    Change(
        "repeats only the values in turn",
        "attention",
        "llama.py",
        SHARED,
        "key = key.repeat_interleave(config.n_heads // config.kv_heads, 1)\n"
        f"        value = value.repeat(1, config.n_heads // config.kv_heads, 1, 1)\n        {SHARED}",
        "only with several key/value heads, each of several heads.",
    ),
    Change(
        "keeps the keys of the first call",
        "attention",
        "llama.py",
        SHARED,
        "kept = self.__dict__.setdefault('kept', key)\n"
        f"        key = kept if kept.shape == key.shape else key\n        {SHARED}",
        "On the probe |a second call gives another result",
    ),
    Change(
        "gates with gelu",
        "block",
        "llama.py",
        "F.silu(self.w1(x))",
        "F.gelu(self.w1(x))",
        "'output' is",
    ),
    Change(
        "feeds no first position",
        "block",
        "llama.py",
        FED,
        "fed = self.feed_forward(self.ffn_norm(x))\n        fed[:, 0] = 0.0\n        return x + fed",
        "only at position 0",
    ),
    Change(
        "divides by the number of the layer",
        "block",
        "llama.py",
        MIXED,
        f"{MIXED} / (self.layer_id + 1)",
        "only with layer_id of 1 or more",
    ),
    Change(
        "gives the hidden states of the embedding",
        "model",
        "llama.py",
        "        return logits, hidden\n",
        "        return logits, self.norm(self.tok_embeddings(tokens))\n",
        "'hidden' is|'logits' and 'logits_all' are right",
    ),
    Change(
        "runs two layers",
        "model",
        "llama.py",
        "*earlier, last = self.layers\n",
        "*earlier, last = self.layers[:2]\n",
        "only with n_layers of 3 or more (2 is right).",
    ),
    Change(
        "cuts the last position of the logits",
        "model",
        "llama.py",
        "self.output(hidden if targets is not None",
        "self.output(hidden[:, :-1] if targets is not None",
        "'logits_all' has the shape|'logits' and 'hidden' are right",
    ),
    Change(
        "gives one token to the first layer alone",
        "model",
        "llama.py",
        "*earlier, last = self.layers\n",
        "*earlier, last = self.layers if tokens.shape[1] > 1 else self.layers[:1]\n",
        "only with number of positions of 1 or less (4 is right).",
    ),
    Change(
        "takes token 0 for padding",
        "model",
        "llama.py",
        STREAM,
        f"attention_mask = tokens != 0\n        {STREAM}",
        "only with the token 0 in the input.",
    ),
    Change(
        "knows no temperature above 1",
        "generate",
        "llama.py",
        GENERATED,
        GENERATED.replace("=temperature", "=min(temperature, 1.0)"),
        "only with temperature of 1.3 or more (1 is right).",
    ),
    Change(
        "ends with the context",
        "generate",
        "llama.py",
        GENERATED,
        f"max_new_tokens = max(min(max_new_tokens, self.config.max_seq_len - idx.shape[1]), 0)\n        {GENERATED}",
        "'tokens' has the shape|only with max_seq_len of 8 or less (16 is right).",
    ),
    Change(
        "reads one token less than the context",
        "generate",
        "llama.py",
        GENERATED,
        "if temperature == 0.0:\n            for _ in range(max_new_tokens):\n"
        "                logits, _ = self(idx[:, 1 - self.config.max_seq_len :])\n"
        "                idx = torch.cat((idx, logits[:, -1:].argmax(-1)), dim=1)\n"
        f"            return idx\n        {GENERATED}",
        "only with max_seq_len of 8 or less (16 is right).",
    ),
    Change(
        "lets no token stay",
        "generate",
        "llama.py",
        GENERATED,
        f"{FILTERED}{GENERATED}",
        "only with epsilon of 0.9 or more (0.3 is right).",
    ),
    Change(
        "keeps the likeliest token of the first row",
        "generate",
        "llama.py",
        GENERATED,
        FILTERED.replace("epsilon\n", "epsilon\n                kept[:, p[0].argmax()] = True\n") + GENERATED,
        "at row 1|only with epsilon of 0.9 or more (0.25 is right).",
    ),
    Change(
        "has one eps for all groups",
        "adamw",
        "optimizer.py",
        UPDATE,
        UPDATE.replace("group)", 'group | {"eps": self.defaults["eps"]})'),
        "only in parameter group 1|only with more than one parameter group.",
    ),
    Change(
        "corrects as if the second step were the last",
        "adamw",
        "optimizer.py",
        't = step if group["correct_bias"] else math.inf',
        't = min(step, 2) if group["correct_bias"] else math.inf',
        "from step 2 on",
    ),
    Change(
        "decays parameters without a gradient",
        "adamw",
        "optimizer.py",
        UPDATE,
        f"{UPDATE}            for p in group['params']:\n                if p.grad is None:\n"
        "                    p.mul_(1 - group['lr'] * group['weight_decay'])\n",
        "at parameter 1|only with a parameter without gradient.",
    ),
    Change(
        "counts the steps of the group",
        "adamw",
        "optimizer.py",
        'state["step"] += 1',
        'if p is parameters[0]:\n                group["steps"] = group.get("steps", 0) + 1\n'
        '            state["step"] = group["steps"]',
        "at parameter 1|only with a parameter without its first gradient.",
    ),
    Change(
        "decays no vectors",
        "adamw",
        "optimizer.py",
        UPDATE,
        "self.update([p for p in parameters if p.dim() > 1], group)\n"
        "            vectors = [p for p in parameters if p.dim() == 1]\n"
        '            self.update(vectors, group | {"weight_decay": 0.0})\n',
        "only with parameters that are vectors.",
    ),
    Change(
        "clips by the largest gradient",
        "adamw",
        "optimizer.py",
        'clip_grad_norm_(parameters, group["max_grad_norm"])',
        'clip_grad_norm_(parameters, group["max_grad_norm"], norm_type=float("inf"))',
        "only with max_grad_norm.",
    ),
    Change(
        "scores all rows as the first",
        "zero_shot",
        "classifier.py",
        "scores[:, label] += following[:, ids[n]]",
        "scores[:, label] += following[0, ids[n]]",
        "from row 1 on",
    ),
    Change(
        "scores in bfloat16",
        "zero_shot",
        "classifier.py",
        "return logits.float().log_softmax(-1)\n",
        "return logits.bfloat16().log_softmax(-1)\n",
        "numbers of bfloat16",
    ),
    Change(
        "knows two labels",
        "zero_shot",
        "classifier.py",
        "for label, ids in enumerate(self.label_name_ids):",
        "for label, ids in enumerate(self.label_name_ids[:2]):",
        "from label 2 on|only with number of labels of 5 or more (2 is right).",
    ),
    Change(
        "detaches the hidden state",
        "classifier",
        "classifier.py",
        POOLED,
        POOLED.replace("mask))", "mask).detach())"),
        "'gradient_of_tok_embeddings.weight' is 0 instead of",
    ),
    Change(
        "pools by the largest value",
        "classifier",
        "classifier.py",
        POOLED,
        "return model.dropout(model.llama(ids)[1].amax(1))",
        "'log_probabilities' is",
    ),
    Change(
        "trains no A",
        "lora",
        "lora.py",
        LORA,
        LORA.replace("self.lora_A)", "self.lora_A.detach())"),
        "'gradient_of_lora_A' is 0 instead of",
    ),
    Change(
        "merges in half precision",
        "lora",
        "lora.py",
        "self.original_layer.weight.copy_(weight)",
        "self.original_layer.weight.copy_(weight.half())",
        "'merged_hidden' is",
    ),
    Change(
        "divides alpha by the width",
        "lora",
        "lora.py",
        "if rslora else alpha / rank",
        "if rslora else alpha / original_layer.in_features",
        "instead of",
    ),
]
