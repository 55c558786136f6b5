"""Small models, and inputs for them."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import safetensors.torch
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from config import LlamaConfig
from llama import Llama
from lora import apply_lora, lora_layers
from minillama.formats.checkpoint import METADATA_KEY
from minillama.formats.huggingface import write_huggingface

# The class names of the course's two data sets.
SST = ["awful", "bad", "average", "good", "excellent"]
CFIMDB = ["bad", "good"]


def tiny_config(**changes: object) -> LlamaConfig:
    sizes: dict = {"vocab_size": 64, "dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "max_seq_len": 32}
    return LlamaConfig(**(sizes | changes))


def tiny_llama(seed: int = 0, **changes: object) -> Llama:
    """A small model with weights large enough for its parts to matter."""
    torch.manual_seed(seed)
    model = Llama(tiny_config(**changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def written(path: Path, content: str | bytes) -> Path:
    """The path, with this content in its file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def some_stories(count: int, seed: int = 0, words: int = 40) -> list[str]:
    """Documents that are easy to learn: sentences of one pattern, drawn from few words."""
    draw = random.Random(seed).choice
    sentence = lambda: f"the {draw(ADJECTIVES)} {draw(ANIMALS)} {draw(VERBS)} the {draw(ADJECTIVES)} {draw(ANIMALS)}."  # noqa: E731
    return [" ".join(sentence() for _ in range(words // 6)) for _ in range(count)]


ADJECTIVES = "big small red happy quiet old young funny brave gentle".split()
ANIMALS = "cat dog bird fox owl mouse bear frog horse goat".split()
VERBS = "saw liked chased found helped met heard missed".split()


def random_ids(batch: int, seq_len: int, vocab_size: int = 64, seed: int = 0) -> torch.Tensor:
    return torch.randint(vocab_size, (batch, seq_len), generator=torch.Generator().manual_seed(seed))


def padded(rows: list[torch.Tensor], side: str, pad_id: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of unequal length as one batch, and the mask of its real tokens."""
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), pad_id)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        columns = slice(width - len(row), None) if side == "left" else slice(len(row))
        ids[i, columns], mask[i, columns] = row, True
    return ids, mask


def with_kernel(model: Llama, kernel: str) -> Llama:
    """A model with equal weights that uses this attention kernel."""
    other = Llama(replace(model.config, attention_kernel=kernel)).to(model.tok_embeddings.weight.dtype)
    other.load_state_dict(model.state_dict())
    return other.train(model.training)


def read_in_parts(model, ids, mask, parts):
    """Logits (B, T, V) of the tokens, read through a cache in parts of these lengths."""
    cache, at, found = model.new_cache(), 0, []
    for size in parts:
        part = slice(at, at + size)
        found.append(model(ids[:, part], ids[:, part], None if mask is None else mask[:, part], cache=cache)[0])
        at += size
    assert cache.length == at == ids.shape[1]
    return torch.cat(found, dim=1)


SOME_IDS = torch.randint(64, (2, 30), generator=torch.Generator().manual_seed(0))


def all_logits(model: Llama, ids: torch.Tensor = SOME_IDS) -> torch.Tensor:
    return model(ids, targets=ids)[0].detach()


def foreign_llama(seed: int = 0, **changes: object) -> Llama:
    """A tiny model of the kind that other programs have."""
    return tiny_llama(seed, **({"norm": "rmsnorm", "causal": True} | changes))


def huggingface_folder(folder: Path, **changes: object) -> Path:
    model = foreign_llama()
    folder.mkdir(exist_ok=True)
    write_huggingface(folder, model.config, model.state_dict(), 1, 2)
    content = json.loads((folder / "config.json").read_text()) | changes
    content = {name: value for name, value in content.items() if value != "left out"}
    (folder / "config.json").write_text(json.dumps(content))
    return folder


def meta_folder(folder: Path, model: Llama, shards: int, llama3: bool, params: dict[str, object]) -> Path:
    """Cut as Meta's parallel layers are: theirs by output rows, wo and w2 by input columns."""
    folder.mkdir()
    for number in range(shards):
        content = {"rope.freqs": torch.ones(model.config.head_dim // 2)}
        for name, tensor in model.state_dict().items():
            for ours, theirs in (("query", "q"), ("key", "k"), ("value", "v"), ("output", "o")):
                name = name.replace(f"compute_{ours}", f"w{theirs}")
            if name.endswith(("wo.weight", "w2.weight")) or (name == "tok_embeddings.weight" and not llama3):
                tensor = tensor.chunk(shards, dim=1)[number]
            elif "norm" not in name:
                tensor = tensor.chunk(shards, dim=0)[number]
            content[name] = tensor.clone()
        torch.save(content, folder / f"consolidated.{number:02}.pth")
    (folder / "params.json").write_text(json.dumps(params))
    return folder


COURSE_ARGS = ("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of", "max_seq_len")


def course_content(model: Llama | None = None) -> dict:
    """The content of a course checkpoint: no biases, and of the configuration only sizes."""
    model = model or tiny_llama(n_layers=1)
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.endswith(".bias")}
    arguments = {name: getattr(model.config, name) for name in COURSE_ARGS}
    return {"model": state, "model_args": arguments, "iter_num": 7, "best_val_loss": torch.tensor(1.5), "config": {}}


def saved(path: Path, content: object, **options) -> Path:
    torch.save(content, path, **options)
    return path


def safetensors_file(path: Path, metadata: dict[str, str] | None, **tensors: torch.Tensor) -> Path:
    state = {name: t for name, t in tiny_llama().state_dict().items() if name != "output.weight"} | tensors
    safetensors.torch.save_file(state, path, metadata)
    return path


def described(**changes: object) -> dict[str, str]:
    content = {"format_version": 1, "kind": "llama", "model_args": tiny_llama().config.to_dict()} | changes
    return {"format": "pt", METADATA_KEY: json.dumps({k: v for k, v in content.items() if v is not None})}


PROMPTS = torch.randint(64, (3, 5), generator=torch.Generator().manual_seed(0))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class CountingModel:
    """A model without weights: the token after n is n + 1, past the last one 0. Remembers what it was asked."""

    def __init__(self, vocab_size: int = 10, max_seq_len: int = 8, certainty: float = 50.0) -> None:
        self.config = SimpleNamespace(max_seq_len=max_seq_len)
        self.vocab_size, self.certainty = vocab_size, certainty
        self.windows, self.masks, self.grad_modes = [], [], []

    def __call__(self, tokens, attention_mask=None):
        self.windows.append(tokens.clone())
        self.masks.append(None if attention_mask is None else attention_mask.clone())
        self.grad_modes.append(torch.is_grad_enabled())
        following = (tokens[:, -1:] + 1) % self.vocab_size
        logits = self.certainty * torch.nn.functional.one_hot(following, self.vocab_size).float()
        return logits, tokens


class ConstantModel(CountingModel):
    """A model that gives every row the same logits, whatever it reads."""

    def __init__(self, logits) -> None:
        super().__init__()
        self.logits = torch.tensor(logits)

    def __call__(self, tokens, attention_mask=None):
        return self.logits.expand(len(tokens), 1, -1), tokens


class WeightCasts(TorchDispatchMode):
    """A count of the casts of matrices (out, in)."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._to_copy.default and args[0].dim() == 2
        return func(*args, **(kwargs or {}))


class Classifier(torch.nn.Module):
    """A backbone with a head that has no pretrained weight."""

    def __init__(self) -> None:
        super().__init__()
        self.llama = tiny_llama()
        self.classifier_head = torch.nn.Linear(32, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.classifier_head(self.llama(ids)[1][:, -1])


def with_random_update(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Fills every lora_B, and scales every magnitude, some below 0, so that the adapters do something."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, layer in lora_layers(model):
            layer.lora_B.copy_(torch.randn(layer.lora_B.shape, generator=generator))
            if layer.lora_magnitude is not None:
                layer.lora_magnitude.mul_(torch.rand(layer.lora_magnitude.shape, generator=generator) * 2 - 0.5)
    return model


def adapted(rank: int = 4, alpha: float = 8.0, seed: int = 0, **variant) -> torch.nn.Module:
    torch.manual_seed(seed)
    return with_random_update(apply_lora(tiny_llama(), rank, alpha, **variant), seed)


def snapshot(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


LOOKS_SPECIAL = "<s></s><|begin_of_text|><|end_of_text|><|eot_id|><|start_header_id|><|endoftext|>"
EDGES_OF_TEXT = [
    "",
    " ",
    "   ",
    "  a",
    "a  ",
    "a  b   c",
    "\n",
    "\n\n\tx\ty",
    "\0",
    "a\0b",
    "\x01\x1b\x7f\x85\u2028\ufeff",
    "1234567",
]
EDGES_OF_TEXT += [
    "zwölf e\u0301 \ufb01",
    "映画 кино سينما",
    "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467",
    "it's I'LL 'S",
    LOOKS_SPECIAL,
]


def word_level(folder, **changes):
    """A tokenizer.json of two words and two marks, that are among its words, not its added tokens."""
    content = {
        "version": "1.0",
        "truncation": {"max_length": 1, "strategy": "LongestFirst", "stride": 0, "direction": "Right"},
        "padding": {"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0}
        | {"pad_type_id": 0, "pad_token": "a"},
        "pre_tokenizer": {"type": "Whitespace"},
        "model": {"type": "WordLevel", "vocab": {"a": 0, "b": 1, "<go>": 2, "<halt>": 3}, "unk_token": "a"},
    }
    (folder / "tokenizer.json").write_text(json.dumps(content | changes), encoding="utf-8")
    marks = {"bos_token": {"content": "<go>", "lstrip": False}, "eos_token": "<halt>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(marks), encoding="utf-8")
    return folder / "tokenizer.json"
