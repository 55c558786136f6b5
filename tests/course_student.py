"""A second correct solution of the assignment, in the form of the course's files, and a way to put mistakes into it.

It is text, so that a mistake is a replacement of a line, as a student would have written it.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from minillama.grading.kit_setups import Setup

SOURCE = """
import math
import torch
import torch.nn as nn
import torch.nn.functional as F
from types import SimpleNamespace

CAUSAL = False

class LlamaConfig:
    def __init__(self, vocab_size=32000, dim=512, dropout=0.0, n_layers=8, n_heads=8, n_kv_heads=8, max_seq_len=1024,
                 layer_norm_eps=1e-5, multiple_of=32, hidden_dim=None, **more):
        self.vocab_size, self.dim, self.dropout = vocab_size, dim, dropout
        self.n_layers, self.n_heads = n_layers, n_heads
        self.n_kv_heads, self.max_seq_len, self.layer_norm_eps = n_kv_heads, max_seq_len, layer_norm_eps
        self.multiple_of, self.hidden_dim = multiple_of, hidden_dim

class LayerNorm(nn.Module):
    def __init__(self, dim, eps=1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, input):
        x = input.float()
        mean = x.mean(-1, keepdim=True)
        centred = x - mean
        variance = centred.pow(2).mean(-1, keepdim=True)
        normed = centred / torch.sqrt(variance + self.eps)
        output = normed * self.weight + self.bias
        return output.type_as(input)

class RMSNorm(nn.Module):
    def __init__(self, dim, eps=1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, input):
        x = input.float()
        square = x.pow(2).mean(-1, keepdim=True)
        normed = x * torch.rsqrt(square + self.eps)
        return (normed * self.weight).type_as(input)

Norm = LayerNorm

def apply_rotary_emb(query, key, head_dim, max_seq_len, theta=10000.0):
    _, seqlen, heads, _ = query.shape
    i = torch.arange(0, head_dim, 2).float()
    exponent = i / head_dim
    frequencies = 1.0 / theta ** exponent
    positions = torch.arange(seqlen).float()
    angles = torch.outer(positions, frequencies)
    cos, sin = angles.cos()[None, :, None, :], angles.sin()[None, :, None, :]

    def rotate(x):
        even, odd = x.float().reshape(*x.shape[:-1], -1, 2).unbind(-1)
        first = even * cos - odd * sin
        second = even * sin + odd * cos
        return torch.stack((first, second), dim=-1).flatten(-2)

    query_out = rotate(query)
    key_out = rotate(key)
    return query_out, key_out

class Attention(nn.Module):
    def __init__(self, config, causal=None):
        super().__init__()
        self.causal = CAUSAL if causal is None else causal
        self.n_heads, self.n_kv_heads = config.n_heads, config.n_kv_heads
        self.n_rep = self.n_heads // self.n_kv_heads
        self.head_dim = config.dim // config.n_heads
        self.max_seq_len = config.max_seq_len
        self.compute_query = nn.Linear(config.dim, self.n_heads * self.head_dim, bias=False)
        self.compute_key = nn.Linear(config.dim, self.n_kv_heads * self.head_dim, bias=False)
        self.compute_value = nn.Linear(config.dim, self.n_kv_heads * self.head_dim, bias=False)
        self.compute_output = nn.Linear(config.dim, config.dim, bias=False)
        self.attn_dropout = nn.Dropout(config.dropout)
        self.resid_dropout = nn.Dropout(config.dropout)
        self.dropout = config.dropout

    def compute_query_key_value_scores(self, query, key, value):
        seqlen = query.shape[-2]
        scores = query @ key.transpose(-2, -1)
        scores = scores / math.sqrt(self.head_dim)
        if self.causal:
            later = torch.triu(torch.ones(seqlen, seqlen, dtype=torch.bool), diagonal=1)
            scores = scores.masked_fill(later, float("-inf"))
        weights = F.softmax(scores, dim=-1)
        weights = self.attn_dropout(weights)
        output = weights @ value
        return output

    def forward(self, x):
        batch, seqlen, dim = x.shape
        query, key, value = self.compute_query(x), self.compute_key(x), self.compute_value(x)
        query = query.view(batch, seqlen, self.n_heads, self.head_dim)
        key = key.view(batch, seqlen, self.n_kv_heads, self.head_dim)
        value = value.view(batch, seqlen, self.n_kv_heads, self.head_dim)
        query, key = apply_rotary_emb(query, key, self.head_dim, self.max_seq_len)
        key = torch.repeat_interleave(key, self.n_rep, dim=2)
        value = torch.repeat_interleave(value, self.n_rep, dim=2)
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        output = self.compute_query_key_value_scores(query, key, value)
        output = output.transpose(1, 2).contiguous().view(batch, seqlen, dim)
        output = self.resid_dropout(self.compute_output(output))
        return output

class FeedForward(nn.Module):
    def __init__(self, dim, hidden_dim, multiple_of, dropout):
        super().__init__()
        if hidden_dim is None:
            hidden_dim = int(8 * dim / 3)
            hidden_dim = multiple_of * ((hidden_dim + multiple_of - 1) // multiple_of)
        self.w1 = nn.Linear(dim, hidden_dim, bias=False)
        self.w2 = nn.Linear(hidden_dim, dim, bias=False)
        self.w3 = nn.Linear(dim, hidden_dim, bias=False)
        self.dropout = nn.Dropout(dropout)

    def SwiGLU(self, x):
        return F.silu(self.w1(x)) * self.w3(x)

    def forward(self, x):
        return self.dropout(self.w2(self.SwiGLU(x)))

class LlamaLayer(nn.Module):
    def __init__(self, layer_id, config):
        super().__init__()
        self.layer_id = layer_id
        self.attention = Attention(config)
        self.feed_forward = FeedForward(config.dim, config.hidden_dim, config.multiple_of, config.dropout)
        self.attention_norm = Norm(config.dim, eps=config.layer_norm_eps)
        self.ffn_norm = Norm(config.dim, eps=config.layer_norm_eps)

    def forward(self, x):
        inner = self.attention_norm(x)
        mix = self.attention(inner)
        h = x + mix
        second = self.ffn_norm(h)
        return h + self.feed_forward(second)

class Llama(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = self.params = config
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(LlamaLayer(i, config) for i in range(config.n_layers))
        self.norm = Norm(config.dim, eps=config.layer_norm_eps)
        self.output = nn.Linear(config.dim, config.vocab_size, bias=False)
        self.tok_embeddings.weight = self.output.weight

    def forward(self, tokens, targets=None):
        embedded = self.tok_embeddings(tokens)
        h = self.dropout(embedded)
        for layer in self.layers:
            h = layer(h)
        stream = h
        h = self.norm(h)
        if targets is not None:
            logits = self.output(h)
        else:
            logits = self.output(h[:, [-1], :])
        return logits, h

    @torch.inference_mode()
    def generate(self, idx, max_new_tokens, temperature=1.0, epsilon=0.05):
        start = idx.size(1)
        for _ in range(max_new_tokens):
            context = self.params.max_seq_len
            idx_cond = idx if idx.size(1) <= context else idx[:, -context:]
            logits, _ = self(idx_cond)
            logits = logits[:, -1, :]
            if temperature == 0.0:
                idx_next = logits.argmax(dim=-1, keepdim=True)
            else:
                scaled = logits / temperature
                probs = F.softmax(scaled, dim=-1)
                kept = probs >= epsilon
                alone = F.one_hot(probs.argmax(-1), probs.size(-1)).bool()
                kept = torch.where(kept.any(-1, keepdim=True), kept, alone)
                probs = torch.where(kept, probs, torch.zeros_like(probs))
                probs = probs / probs.sum(-1, keepdim=True)
                idx_next = torch.multinomial(probs, num_samples=1)
            idx = torch.cat((idx, idx_next), dim=1)
        return idx

def load_pretrained(path):
    found = torch.load(path, map_location="cpu", weights_only=True)
    model = Llama(LlamaConfig(**found["model_args"]))
    model.load_state_dict(found["model"], strict=False)
    return model

class AdamW(torch.optim.Optimizer):
    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.0, correct_bias=True,
                 max_grad_norm=None):
        defaults = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, correct_bias=correct_bias)
        super().__init__(params, defaults | dict(max_grad_norm=max_grad_norm))
        self.shared = {}

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            members = [p for p in group["params"] if p.grad is not None]
            limit = group["max_grad_norm"]
            if limit is not None:
                torch.nn.utils.clip_grad_norm_(members, limit)
            beta1, beta2 = group["betas"]
            for p in members:
                grad = p.grad.data
                state = self.state[p]
                if len(state) == 0:
                    state["t"], state["m"], state["v"] = 0, torch.zeros_like(p), torch.zeros_like(p)
                state["t"] += 1
                t, m, v = state["t"], state["m"], state["v"]
                m.mul_(beta1).add_(grad, alpha=1 - beta1)
                v.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
                alpha, c1, c2 = group["lr"], 1.0, 1.0
                if group["correct_bias"]:
                    c1, c2 = 1 - beta1 ** t, 1 - beta2 ** t
                size = alpha * math.sqrt(c2) / c1
                update = size * m / (v.sqrt() + group["eps"])
                p.data.add_(-update)
                p.data.add_(p.data, alpha=-alpha * group["weight_decay"])

class LlamaZeroShotClassifier(nn.Module):
    def __init__(self, config, tokenizer, label_names):
        super().__init__()
        self.num_labels = config.num_labels
        self.llama = load_pretrained(config.pretrained_model_path)
        self.label_name_ids = [tokenizer.encode(label, bos=False, eos=False) for label in label_names]

    def forward(self, input_ids):
        logits, _ = self.llama(input_ids)
        log_probabilities = F.log_softmax(logits, dim=-1)
        scores = torch.zeros(len(input_ids), self.num_labels)
        for i, ids in enumerate(self.label_name_ids):
            scores[:, i] = log_probabilities[:, -1, ids].sum(-1)
        return scores

class LlamaEmbeddingClassifier(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.num_labels = config.num_labels
        self.llama = load_pretrained(config.pretrained_model_path)
        for param in self.llama.parameters():
            param.requires_grad = config.option == "finetune"
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.classifier_head = nn.Linear(self.llama.config.dim, self.num_labels)

    def forward(self, input_ids):
        _, hidden = self.llama(input_ids)
        pooled = hidden[:, -1]
        pooled = self.dropout(pooled)
        logits = self.classifier_head(pooled)
        return F.log_softmax(logits, dim=-1)

class LoRALayer(nn.Module):
    def __init__(self, original_layer, rank=4, alpha=1.0):
        super().__init__()
        self.original_layer = original_layer
        self.original_layer.weight.requires_grad = False
        self.scaling = alpha / rank
        self.lora_A = nn.Parameter(torch.randn(rank, original_layer.in_features) * 0.01)
        self.lora_B = nn.Parameter(torch.zeros(original_layer.out_features, rank))

    def forward(self, x):
        base = self.original_layer(x)
        update = x @ self.lora_A.T @ self.lora_B.T
        return base + self.scaling * update

TARGETS = ("compute_query", "compute_key", "compute_value", "compute_output")

def apply_lora(model, rank=4, alpha=1.0):
    for param in model.parameters():
        param.requires_grad = False
    for name, module in list(model.named_modules()):
        for target in TARGETS:
            if isinstance(getattr(module, target, None), nn.Linear):
                setattr(module, target, LoRALayer(getattr(module, target), rank, alpha))
    return model

def get_lora_optimizer_params(model):
    return [p for name, p in model.named_parameters() if "lora_A" in name or "lora_B" in name]

def merge_lora_weights(model):
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, LoRALayer):
                delta = child.lora_B.data @ child.lora_A.data
                child.original_layer.weight.data += child.scaling * delta
                setattr(module, name, child.original_layer)
    return model
"""

# What is different for a word of a setup (`Setup.words`).
OF_WORDS: dict[str, list[tuple[str, str]]] = {
    "rmsnorm": [("Norm = LayerNorm", "Norm = RMSNorm")],
    "outside": [
        ("torch.sqrt(variance + self.eps)", "(torch.sqrt(variance) + self.eps)"),
        ("x * torch.rsqrt(square + self.eps)", "x / (torch.sqrt(square) + self.eps)"),
    ],
    "halves": [
        ("even, odd = x.float().reshape(*x.shape[:-1], -1, 2).unbind(-1)", "even, odd = x.float().chunk(2, dim=-1)"),
        ("torch.stack((first, second), dim=-1).flatten(-2)", "torch.cat((first, second), dim=-1)"),
    ],
    "minus": [("angles = torch.outer(positions, frequencies)", "angles = -torch.outer(positions, frequencies)")],
    "causal": [("CAUSAL = False", "CAUSAL = True")],
    "temperature": [
        ("temperature=1.0, epsilon=0.05", "temperature=1.0, top_k=None"),
        ("kept = probs >= epsilon", "kept = probs >= 0.0"),
    ],
    "min_p": [
        ("temperature=1.0, epsilon=0.05", "temperature=1.0, min_p=0.1"),
        ("kept = probs >= epsilon", "kept = probs >= min_p * probs.max(-1, keepdim=True).values"),
    ],
    "top_p": [
        ("temperature=1.0, epsilon=0.05", "temperature=1.0, top_p=0.95"),
        (
            "kept = probs >= epsilon",
            "ordered, order = probs.sort(dim=-1, descending=True)\n"
            "                total = ordered.cumsum(-1)\n"
            "                kept_in_order = total - ordered < top_p\n"
            "                kept = torch.zeros_like(kept_in_order).scatter(-1, order, kept_in_order)",
        ),
    ],
}


def replaced(source: str, old: str, new: str) -> str:
    """The text with `old`, which it has once, replaced. The new lines get the indentation of the old line."""
    assert source.count(old) == 1, f"{source.count(old)} times in the student's text: {old}"
    line = source[: source.index(old)].rpartition("\n")[2]
    indent = line[: len(line) - len(line.lstrip())]
    return source.replace(old, new.replace("\n", f"\n{indent}") if "\n    " not in new else new)


def student_modules(setup: Setup, *changes: tuple[str, str]) -> dict[str, Any]:
    """The modules of the solution for a setup, with texts replaced; each module has all names."""
    source = SOURCE
    for old, new in (*(change for word in OF_WORDS if word in setup.words for change in OF_WORDS[word]), *changes):
        source = replaced(source, old, new)
    names: dict[str, Any] = {"__name__": "student"}
    exec(compile(source, "student.py", "exec"), names)
    module = SimpleNamespace(**names)
    return {name: module for name in ("config", "rope", "llama", "optimizer", "classifier", "lora")}
