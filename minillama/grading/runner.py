"""The torch side of the grader: puts a probe to a student's modules and returns their answer as arrays.

It calls only what the course fixes: the names of classes, methods and parameters, and the constructors.
"""

from __future__ import annotations

import dataclasses
import inspect
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minillama.grading.calls import called, gradients_of, rule_arguments
from minillama.grading.parts import Arrays, Case

Modules = Mapping[str, Any]
Settings = Mapping[str, Any]
SIZES = ("vocab_size", "dim", "n_layers", "n_heads", "n_kv_heads", "max_seq_len", "hidden_dim", "layer_norm_eps")
NORMS = {"layernorm": "LayerNorm", "rmsnorm": "RMSNorm"}
PROJECTIONS = ("compute_query", "compute_key", "compute_value", "compute_output")


def run_case(case: Case, modules: Modules) -> Arrays:
    """The answer of the modules to a probe, under the names of `answers.answer`. modules: by name, such as "llama".

    Raises what the student's code raises, and TypeError if it returns no tensor.
    """
    with everything_dropped():
        return RUNS[case.part](case.settings, case.arrays, modules)


@contextmanager
def everything_dropped() -> Iterator[None]:
    """A context in which dropout with a probability above 0 drops everything, so that a run can be compared."""

    def dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        return input * 0.0 if training and p > 0 else input

    before = F.dropout
    F.dropout = dropout  # type: ignore[assignment]
    try:
        yield
    finally:
        F.dropout = before


def numbers(found: Any, source: str) -> np.ndarray:
    """A tensor as float64. Raises TypeError for anything else."""
    if not isinstance(found, Tensor):
        raise TypeError(f"{source} returned {type(found).__name__}; it must return a tensor")
    return found.detach().to("cpu", torch.float64).numpy()


def pair(found: Any, source: str) -> tuple[Any, Any]:
    if not isinstance(found, tuple | list) or len(found) != 2:
        raise TypeError(f"{source} returned {type(found).__name__}; it must return two tensors")
    return found[0], found[1]


def tensors(arrays: Arrays, *names: str) -> list[Tensor]:
    return [torch.from_numpy(np.ascontiguousarray(arrays[name])) for name in names]


def parameters_of(owner: Any) -> set[str]:
    """The names of the arguments that a class or function takes."""
    try:
        return set(inspect.signature(owner).parameters)
    except (TypeError, ValueError):
        return set()


def config_of(settings: Settings, modules: Modules) -> Any:
    """A LlamaConfig of the student's, with the edition's conventions where it has fields for them."""
    cls = modules["config"].LlamaConfig
    chosen = {name: settings[name] for name in (*SIZES, "dropout", "multiple_of") if name in settings}
    return cls(**chosen, **conventions_of(settings, modules))


def conventions_of(settings: Settings, modules: Modules) -> dict[str, Any]:
    """The edition's norm and mask, as far as the student's LlamaConfig has fields for them."""
    cls = modules["config"].LlamaConfig
    known = {field.name for field in dataclasses.fields(cls)} if dataclasses.is_dataclass(cls) else parameters_of(cls)
    return {name: settings[name] for name in ("norm", "causal") if name in known & set(settings)}


def put_weights(module: nn.Module, weights: Mapping[str, np.ndarray]) -> None:
    """Copies weights into the parameters of these names. Raises AttributeError if one is missing."""
    own = dict(module.named_parameters(remove_duplicate=False))
    for name, value in weights.items():
        if name not in own:
            raise AttributeError(f"{type(module).__name__} has no parameter {name}")
        with torch.no_grad():
            own[name].copy_(torch.from_numpy(value))


def weights_in(arrays: Arrays) -> Arrays:
    """The arrays that are weights of a Llama: their names have a dot."""
    return {name: value for name, value in arrays.items() if "." in name and not name.startswith("classifier_head")}


def norm(settings: Settings, arrays: Arrays, modules: Modules) -> Arrays:
    llama, name = modules["llama"], NORMS[settings["norm"]]
    weights = {name: value for name, value in arrays.items() if name != "x"}
    [other] = set(NORMS.values()) - {name}
    if not hasattr(llama, name) and hasattr(llama, other):  # a solution of another variant; both have a weight
        name, weights = other, {"weight": arrays["weight"]}
    module = getattr(llama, name)(arrays["x"].shape[-1], settings["eps"])
    put_weights(module, weights)
    dtype = getattr(torch, settings.get("dtype", "float32"))
    (x,) = tensors(arrays, "x")
    module, x = module.to(dtype), x.to(dtype, copy=True)
    output = numbers(found := called(module, x), "the norm")
    leaves = dict(zip(arrays, tensors(arrays, *arrays), strict=True))  # none reaches a weight that the student lacks
    leaves |= {"x": x} | dict(module.named_parameters())
    slopes = gradients_of(settings, ("output",), module, x, **leaves)
    module(x)
    size = np.array(float(found.element_size()))
    return {"output": output, "bytes": size, "input_afterwards": numbers(x, "the norm")} | slopes


def rope(settings: Settings, arrays: Arrays, modules: Modules) -> Arrays:
    query, key = tensors(arrays, "query", "key")
    sizes = settings["head_dim"], settings["max_seq_len"], settings["theta"]
    source = "apply_rotary_emb"

    def rotate(query: Tensor, key: Tensor) -> Any:
        return pair(modules["rope"].apply_rotary_emb(query, key, *sizes), source)

    found = called(rotate, query, key)
    slopes = gradients_of(settings, ("query", "key"), rotate, query, key, query=query, key=key)
    rotated = {"query": numbers(found[0], source), "key": numbers(found[1], source)}
    return rotated | {"bytes": np.array(float(max(one.element_size() for one in found)))} | slopes


def attention_of(settings: Settings, modules: Modules) -> nn.Module:
    cls = modules["llama"].Attention
    more = {"causal": settings["causal"]} if "causal" in parameters_of(cls) else {}
    return cls(config_of(settings, modules), **more).eval()


@torch.no_grad()
def scores(settings: Settings, arrays: Arrays, modules: Modules) -> Arrays:
    module = attention_of(settings, modules)
    inputs = dict(zip(("query", "key", "value"), tensors(arrays, "query", "key", "value"), strict=True))
    call: Any = module.compute_query_key_value_scores
    output = numbers(called(call, *inputs.values()), "compute_query_key_value_scores")
    return {"output": output} | gradients_of(settings, ("output",), call, *inputs.values(), **inputs)


@torch.no_grad()
def attention(settings: Settings, arrays: Arrays, modules: Modules) -> Arrays:
    module = attention_of(settings, modules)
    put_weights(module, weights_in(arrays))
    (x,) = tensors(arrays, "x")
    output = numbers(called(module, x), "Attention.forward")
    return {"output": output} | gradients_of(settings, ("output",), module, x, x=x, **dict(module.named_parameters()))


@torch.no_grad()
def block(settings: Settings, arrays: Arrays, modules: Modules) -> Arrays:
    module = modules["llama"].LlamaLayer(settings["layer_id"], config_of(settings, modules)).eval()
    put_weights(module, weights_in(arrays))
    (x,) = tensors(arrays, "x")
    output = numbers(called(module, x), "LlamaLayer.forward")
    return {"output": output} | gradients_of(settings, ("output",), module, x, x=x, **dict(module.named_parameters()))


def llama_of(settings: Settings, arrays: Arrays, modules: Modules) -> nn.Module:
    module = modules["llama"].Llama(config_of(settings, modules)).eval()
    weights = {name: value for name, value in weights_in(arrays).items() if "lora_" not in name}
    put_weights(module, weights | {"output.weight": weights["tok_embeddings.weight"]})
    return module


@torch.no_grad()
def model(settings: Settings, arrays: Arrays, modules: Modules) -> Arrays:
    module = llama_of(settings, arrays, modules)
    (tokens,) = tensors(arrays, "tokens")
    logits, hidden = pair(called(module, tokens), "Llama.forward")
    every, _ = pair(module(tokens, tokens), "Llama.forward")
    found = {"logits": logits, "hidden": hidden, "logits_all": every}
    own = dict(module.named_parameters(remove_duplicate=False))
    slopes = gradients_of(settings, ("", "hidden"), module, tokens, **own)
    return {name: numbers(tensor, "Llama.forward") for name, tensor in found.items()} | slopes


@torch.no_grad()
def generate(settings: Settings, arrays: Arrays, modules: Modules) -> Arrays:
    """Calls Llama.generate on a model whose logits are fixed: they depend on the first and the last token alone.

    A `generate` with several sampling rules is called with the other rules switched off.
    """
    table, first, prompt = tensors(arrays, "table", "first", "prompt")
    small = {"vocab_size": len(table), "dim": 8, "n_layers": 1, "n_heads": 2, "n_kv_heads": 2, "hidden_dim": 8}
    module = modules["llama"].Llama(config_of({**settings, **small}, modules)).eval()

    def forward(tokens: Tensor, targets: Tensor | None = None, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        read = tokens if targets is not None else tokens[:, -1:]
        return table[read] + first[tokens[:, :1]], torch.zeros(*tokens.shape, 8)

    module.forward = forward  # type: ignore[method-assign]
    more = rule_arguments(module.generate, settings)
    rows = len(prompt)
    prompt = prompt.repeat(settings.get("draws", rows) // rows, 1)
    torch.manual_seed(len(prompt))
    try:
        found = module.generate(  # type: ignore[operator]
            prompt, settings["max_new_tokens"], temperature=settings["temperature"], **more
        )
    except RuntimeError:
        if not settings.get("at_epsilon"):
            raise
        found = prompt.new_zeros((len(prompt), 1))  # nothing was left to draw; the likeliest token is the first
    tokens = numbers(found, "Llama.generate")
    if "draws" not in settings:
        return {"tokens": tokens}
    if tokens.ndim != 2 or len(tokens) != len(prompt):
        raise ValueError(f"Llama.generate returned shape {tokens.shape} for prompts of shape {tuple(prompt.shape)}")
    if not tokens.shape[1]:
        raise ValueError("Llama.generate returned no token")
    # The first new token; where the prompt is left out, the first of all.
    drawn = tokens[:, prompt.shape[1] if tokens.shape[1] > prompt.shape[1] else 0].astype(int)
    counts = np.stack([np.bincount(drawn[row::rows], minlength=len(table)) for row in range(rows)]) * rows / len(drawn)
    return {"frequencies": counts, "drawn": (counts > 0).astype(float)}


def adamw(settings: Settings, arrays: Arrays, modules: Modules) -> Arrays:
    parameters = [nn.Parameter(torch.from_numpy(value.copy())) for value in arrays["parameters"]]
    groups, start = [], 0
    for own in settings["groups"]:
        members = parameters[start : start + own["count"]]
        start += own["count"]
        groups.append({"params": members} | {name: value for name, value in own.items() if name != "count"})
    defaults = {name: value for name, value in settings["defaults"].items() if value is not None}
    for chosen in (*groups, defaults):
        if "betas" in chosen:
            chosen["betas"] = tuple(chosen["betas"])
    optimizer = modules["optimizer"].AdamW(groups, **defaults)
    after = []
    for k, gradients in enumerate(arrays["gradients"]):
        without = {*settings["without_gradient"], *(settings["late"] if k == 0 else ())}
        for i, (parameter, gradient) in enumerate(zip(parameters, gradients, strict=True)):
            parameter.grad = None if i in without else torch.from_numpy(gradient.copy())
        optimizer.step()
        after.append(np.stack([numbers(parameter, "AdamW") for parameter in parameters]))
    return {"parameters": np.stack(after)}


@contextmanager
def checkpoint(settings: Settings, arrays: Arrays, modules: Modules) -> Iterator[str]:
    """The path of a checkpoint of the course's kind with the probe's weights."""
    weights = {name: torch.from_numpy(value) for name, value in weights_in(arrays).items()}
    weights["output.weight"] = weights["tok_embeddings.weight"]
    model_args = {name: settings[name] for name in (*SIZES, "dropout", "multiple_of") if name in settings}
    model_args |= conventions_of(settings, modules)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "probe.pt"
        torch.save({"model": weights, "model_args": model_args}, path)
        yield str(path)


class LabelTokenizer:
    """A tokenizer that knows the words of the labels, each one token, and the special tokens 1 to 3."""

    kind = "sentencepiece"
    bos_id, eos_id, pad_id = 1, 2, 3

    def __init__(self, words: Mapping[str, int], n_words: int) -> None:
        self.words, self.n_words = words, n_words

    def encode(self, s: str, bos: bool = False, eos: bool = False) -> list[int]:
        return [self.bos_id] * bos + [self.words[word] for word in s.split()] + [self.eos_id] * eos

    def decode(self, ids: list[int]) -> str:
        return " ".join(word for i in ids for word, known in self.words.items() if known == i)


def classifier_config(settings: Settings, path: str, **more: Any) -> SimpleNamespace:
    conventions = {"norm": settings["norm"], "causal": settings["causal"]}
    return SimpleNamespace(pretrained_model_path=path, **conventions, **more)


@torch.no_grad()
def zero_shot(settings: Settings, arrays: Arrays, modules: Modules) -> Arrays:
    words = {f"label{i}": token for i, token in enumerate(settings["label_ids"])}
    tokenizer = LabelTokenizer(words, settings["vocab_size"])
    with checkpoint(settings, arrays, modules) as path:
        config = classifier_config(settings, path, num_labels=len(words), hidden_dropout_prob=0.0, option="pretrain")
        module = modules["classifier"].LlamaZeroShotClassifier(config, tokenizer, list(words)).eval()
    return {"scores": numbers(called(module, *tensors(arrays, "tokens")), "LlamaZeroShotClassifier.forward")}


def trainable_share(parameters: list[nn.Parameter]) -> float:
    """The share of the weights that are trained; 0 if there are none."""
    total = sum(parameter.numel() for parameter in parameters)
    return sum(parameter.numel() for parameter in parameters if parameter.requires_grad) / max(total, 1)


def classifier(settings: Settings, arrays: Arrays, modules: Modules) -> Arrays:
    more = {name: settings[name] for name in ("num_labels", "hidden_dropout_prob", "option")}
    with checkpoint(settings, arrays, modules) as path:
        module = modules["classifier"].LlamaEmbeddingClassifier(classifier_config(settings, path, **more))
    put_weights(module, {name: value for name, value in arrays.items() if name.startswith("classifier_head")})
    shares = [trainable_share(list(part.parameters())) for part in (module.llama, module.classifier_head)]
    module.train(settings["training"])
    (tokens,) = tensors(arrays, "tokens")
    with torch.no_grad():
        found = numbers(called(module, tokens), "LlamaEmbeddingClassifier.forward")
    own = {name.removeprefix("llama."): one for name, one in module.named_parameters(remove_duplicate=False)}
    slopes = gradients_of(settings, ("log_probabilities",), module, tokens, **own)
    return {"log_probabilities": found, "trainable": np.array(shares)} | slopes


@torch.no_grad()
def lora(settings: Settings, arrays: Arrays, modules: Modules) -> Arrays:
    if "x" not in arrays:
        return lora_model(settings, arrays, modules)
    linear = nn.Linear(arrays["weight"].shape[1], arrays["weight"].shape[0], bias=False)
    put_weights(linear, {"weight": arrays["weight"]})
    layer = modules["lora"].LoRALayer(linear, settings["rank"], settings["alpha"]).eval()
    at_start = [float(not bool(matrix.any())) for matrix in (layer.lora_B, layer.lora_A)]
    put_weights(layer, {name: arrays[name] for name in ("lora_A", "lora_B")})
    owned = (layer.original_layer.weight, layer.lora_A, layer.lora_B)
    trained = np.array([float(parameter.requires_grad) for parameter in owned])
    (x,) = tensors(arrays, "x")
    output = numbers(called(layer, x), "LoRALayer.forward")
    slopes = gradients_of(settings, ("output",), layer, x, x=x, **dict(layer.named_parameters()))
    return {"output": output, "starts_at_zero": np.array(at_start), "trainable": trained} | slopes


def lora_model(settings: Settings, arrays: Arrays, modules: Modules) -> Arrays:
    """A Llama with LoRA: which Linears are wrapped, what is trained, and the hidden states before and after merging."""
    lora, module = modules["lora"], llama_of(settings, arrays, modules)
    module = lora.apply_lora(module, settings["rank"], settings["alpha"]) or module
    layers = {name: part for name, part in module.named_modules() if isinstance(part, lora.LoRALayer)}
    places = [f"attention.{name}" for name in PROJECTIONS] + [f"feed_forward.{name}" for name in ("w1", "w2", "w3")]
    wrapped = [sum(name.endswith(place) for name in layers) / settings["n_layers"] for place in places]
    for name, layer in layers.items():
        matrices = {part: arrays[f"{name}.{part}"] for part in ("lora_A", "lora_B") if f"{name}.{part}" in arrays}
        put_weights(layer, matrices)
    adapters = [[layer.lora_A for layer in layers.values()], [layer.lora_B for layer in layers.values()]]
    within = {id(parameter) for layer in layers.values() for parameter in layer.parameters()}
    others = [parameter for parameter in module.parameters() if id(parameter) not in within]
    listed = {id(parameter) for parameter in flat(lora.get_lora_optimizer_params(module))}
    in_list = [sum(id(one) in listed for one in group) / max(len(group), 1) for group in adapters]
    foreign = listed - {id(one) for group in adapters for one in group}
    (tokens,) = tensors(arrays, "tokens")
    before = numbers(pair(module(tokens), "Llama.forward")[1], "Llama.forward")
    merged = lora.merge_lora_weights(module) or module
    plain = not any(isinstance(part, lora.LoRALayer) for part in merged.modules())
    return {
        "hidden": before,
        "merged_hidden": numbers(pair(merged(tokens), "Llama.forward")[1], "Llama.forward"),
        "wrapped": np.array(wrapped),
        "trainable": np.array([trainable_share(group) for group in (others, *adapters)]),
        "optimizer": np.array([*in_list, float(bool(foreign))]),
        "plain_after_merge": np.array(float(plain)),
    }


def flat(listed: Any) -> list[nn.Parameter]:
    """The parameters of a list of parameters or of parameter groups."""
    found = []
    for one in listed:
        found += list(one["params"]) if isinstance(one, dict) else [one]
    return found


RUNS: dict[str, Callable[[Settings, Arrays, Modules], Arrays]] = {
    "norm": norm,
    "rope": rope,
    "scores": scores,
    "attention": attention,
    "block": block,
    "model": model,
    "generate": generate,
    "adamw": adamw,
    "zero_shot": zero_shot,
    "classifier": classifier,
    "lora": lora,
}
