"""Checkpoint files: written and read back, from the course and from elsewhere."""

from __future__ import annotations

import math
import subprocess
import sys
import zipfile

import pytest
import safetensors.torch
import torch

from config import PRESETS, LlamaConfig, parameter_shapes
from conftest import ROOT, find_asset
from llama import Llama, load_pretrained
from minillama.formats.checkpoint import (
    read_checkpoint,
    read_fine_tuned,
    write_checkpoint,
    write_safetensors,
)
from minillama.formats.huggingface import write_huggingface
from minillama.formats.llama2c import write_llama2c
from models import all_logits, course_content, described, saved, tiny_llama

IDS = torch.randint(64, (2, 6), generator=torch.Generator().manual_seed(0))


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# Reading and writing


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"norm": "rmsnorm", "causal": True, "rope_theta": 500000.0},
        {"tie_embeddings": False, "causal": True, "n_kv_heads": 1},
        {"norm": "rmsnorm", "hidden_dim": 40, "layer_norm_eps": 1e-3, "n_kv_heads": None},
    ],
)
def test_what_is_written_is_read_back(tmp_path, changes):
    model = tiny_llama(**changes)
    path = tmp_path / "model.pt"
    write_checkpoint(path, model.state_dict(), model.config, seed=3, score=torch.tensor(0.5))
    checkpoint = read_checkpoint(path)
    assert checkpoint.path == path and checkpoint.kind == "mini-llama"
    assert checkpoint.config == model.config
    assert same(checkpoint.state, model.state_dict())
    assert checkpoint.extra == {"format_version": 1, "kind": "llama", "seed": 3, "score": torch.tensor(0.5)}
    loaded = load_pretrained(str(path))
    assert loaded.config == model.config and not loaded.training
    assert (loaded.output.weight is loaded.tok_embeddings.weight) == model.config.tie_embeddings
    assert torch.equal(loaded(IDS)[0], model(IDS)[0])


def test_a_tied_weight_is_written_once(tmp_path):
    sizes = []
    for tied in (True, False):
        model = tiny_llama(tie_embeddings=tied)
        write_checkpoint(tmp_path / "model.pt", model.state_dict(), model.config)
        sizes.append((tmp_path / "model.pt").stat().st_size)
    assert sizes[1] - sizes[0] > 64 * 32 * 4 * 0.9


def test_a_course_checkpoint_is_layernorm_and_bidirectional_with_zero_biases(tmp_path):
    model = tiny_llama()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                parameter.zero_()
    path = saved(tmp_path / "course.pt", course_content(model))
    checkpoint = read_checkpoint(path)
    assert checkpoint.kind == "course" and checkpoint.extra["iter_num"] == 7
    loaded = load_pretrained(path)
    assert (loaded.config.norm, loaded.config.causal, loaded.config.tie_embeddings) == ("layernorm", False, True)
    assert same(loaded.state_dict(), model.state_dict())
    assert torch.equal(loaded(IDS)[0], model(IDS)[0])


def test_norm_and_causality_can_be_overridden(tmp_path):
    path = saved(tmp_path / "course.pt", course_content())
    loaded = load_pretrained(path, norm="rmsnorm", causal=True)
    assert (loaded.config.norm, loaded.config.causal) == ("rmsnorm", True)
    content = course_content()
    content["model"]["norm.bias"] = torch.zeros(32)
    assert load_pretrained(saved(path, content), norm="rmsnorm").config.norm == "rmsnorm"
    content["model"]["norm.bias"] = torch.ones(32)
    with pytest.raises(ValueError, match="norm.bias is not zero, so the model is LayerNorm; leave out --norm"):
        load_pretrained(saved(path, content), norm="rmsnorm")
    with pytest.raises(ValueError, match="norm is 'batchnorm'; it must be one of"):
        load_pretrained(path, norm="batchnorm")


def test_the_compiled_prefix_is_taken_off(tmp_path):
    content = course_content()
    plain = read_checkpoint(saved(tmp_path / "plain.pt", content))
    content["model"] = {f"_orig_mod.{name}": tensor for name, tensor in content["model"].items()}
    assert same(read_checkpoint(saved(tmp_path / "compiled.pt", content)).state, plain.state)


@pytest.mark.parametrize("output", ["absent", "equal", "different"])
def test_a_course_checkpoint_is_untied_only_if_its_output_differs(tmp_path, output):
    content = course_content()
    embedding = content["model"]["tok_embeddings.weight"]
    del content["model"]["output.weight"]
    if output != "absent":
        content["model"]["output.weight"] = embedding.clone() if output == "equal" else embedding + 1
    model = load_pretrained(saved(tmp_path / "course.pt", content))
    assert model.config.tie_embeddings == (output != "different")
    assert torch.equal(model.output.weight, embedding + 1 if output == "different" else embedding)
    assert torch.equal(model.tok_embeddings.weight, embedding)


def test_two_different_tensors_for_one_tied_weight_raise(tmp_path):
    content = course_content()
    content["model_args"]["tie_embeddings"] = True
    content["model"]["output.weight"] = content["model"]["tok_embeddings.weight"] + 1
    with pytest.raises(ValueError, match=r"output\.weight"):
        load_pretrained(saved(tmp_path / "course.pt", content))


def test_parameter_shapes_are_those_of_the_model():
    for changes in ({}, {"norm": "rmsnorm", "n_kv_heads": 1, "hidden_dim": 24}, {"tie_embeddings": False}):
        model = tiny_llama(**changes)
        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        assert parameter_shapes(model.config) == shapes


def test_a_context_beyond_memory_costs_nothing_until_it_is_used(tmp_path):
    content = course_content()
    content["model_args"]["max_seq_len"] = 10**13
    logits, _ = load_pretrained(saved(tmp_path / "long.pt", content))(IDS)
    assert torch.isfinite(logits).all()


def test_a_compressed_torch_file_is_read(tmp_path):
    model = tiny_llama(n_layers=1, n_kv_heads=4)
    saved(tmp_path / "stored.pt", course_content(model))
    with zipfile.ZipFile(tmp_path / "stored.pt") as stored:
        with zipfile.ZipFile(tmp_path / "small.pt", "w", zipfile.ZIP_DEFLATED) as small:
            for entry in stored.infolist():
                small.writestr(entry.filename, stored.read(entry))
    assert same(
        load_pretrained(tmp_path / "small.pt").state_dict(), load_pretrained(tmp_path / "stored.pt").state_dict()
    )


# Wrappers, ends of texts


@pytest.mark.parametrize("where", ["front", "inside"])
@pytest.mark.parametrize("wrapper", ["module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"])
def test_names_that_wrappers_put_into_keys_are_taken_out(tmp_path, wrapper, where):
    def wrapped(name: str) -> str:
        front = f"{wrapper}._orig_mod.{name}"
        return front if where == "front" else name.replace("layers.0.", f"layers.0.{wrapper}.")

    content = course_content()
    plain = read_checkpoint(saved(tmp_path / "plain.pt", content))
    tensors = {wrapped(name): tensor for name, tensor in content["model"].items()}
    assert tensors.keys() != content["model"].keys()
    assert same(read_checkpoint(saved(tmp_path / "w.pt", content | {"model": tensors})).state, plain.state)
    path = tmp_path / "w.safetensors"
    safetensors.torch.save_file({name: tensor.clone() for name, tensor in tensors.items()}, path, described())
    assert same(read_checkpoint(path).state, plain.state)
    fine = {"kind": "classifier", "format_version": 1, "label_names": ["a", "b"]} | content
    assert same(read_fine_tuned(saved(tmp_path / "f.pt", fine | {"model": tensors})).state, content["model"])


def test_two_keys_that_become_one_are_refused(tmp_path):
    content = course_content()
    content["model"]["module.norm.weight"] = content["model"]["norm.weight"]
    with pytest.raises(ValueError, match="'norm.weight' and 'module.norm.weight', which are one tensor"):
        read_checkpoint(saved(tmp_path / "twice.pt", content))


def test_the_ids_at_which_a_text_ends_are_kept_with_the_model(tmp_path):
    model = tiny_llama()
    write_safetensors(tmp_path / "m.safetensors", model.state_dict(), model.config, stop_ids=(2, 7))
    write_checkpoint(tmp_path / "m.pt", model.state_dict(), model.config, stop_ids=[2, 7])
    write_safetensors(tmp_path / "none.safetensors", model.state_dict(), model.config)
    found = [read_checkpoint(tmp_path / name).stop_ids for name in ("m.safetensors", "m.pt", "none.safetensors")]
    assert found == [(2, 7), (2, 7), ()]
    write_checkpoint(tmp_path / "bad.pt", model.state_dict(), model.config, stop_ids=[2, 64])
    with pytest.raises(ValueError, match=r"bad.pt: stop_ids is \[2, 64\]; it must be an id from 0 to 63"):
        read_checkpoint(tmp_path / "bad.pt")


# Round trips


def test_every_format_gives_the_same_logits_back(tmp_path):
    path = find_asset("stories260K/stories260K_v1.bin")
    checkpoint, ids = read_checkpoint(path), torch.randint(512, (2, 200))
    config, state = checkpoint.config, checkpoint.complete_state(checkpoint.config)
    expected = all_logits(load_pretrained(path), ids)
    (tmp_path / "huggingface").mkdir()
    write_huggingface(tmp_path / "huggingface", config, state, 1, 2)
    write_safetensors(tmp_path / "safetensors", state, config)
    write_checkpoint(tmp_path / "torch", state, config)
    for version in (0, 1, 2):
        write_llama2c(tmp_path / f"v{version}", config, state, version)
    for name in ("huggingface", "safetensors", "torch", "v0", "v1"):
        assert torch.equal(all_logits(load_pretrained(tmp_path / name), ids), expected), name
    assert 1e-3 < (all_logits(load_pretrained(tmp_path / "v2"), ids) - expected).abs().max() < 0.5


@pytest.mark.slow
def test_a_model_of_a_billion_weights_loads_within_its_size_and_generates(tmp_path):
    """In a process of its own, whose memory at its peak is that of the interpreter and of the file, and little more."""
    config = LlamaConfig(**PRESETS["TinyLlama-1.1B"] | {"causal": True})
    with torch.device("meta"):
        model = Llama(config)
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, tensor in model.state_dict().items():
        state[name] = torch.empty(tensor.shape, dtype=torch.bfloat16).normal_(0.0, 0.02, generator=generator)
        if "norm" in name:
            state[name].fill_(1.0)
    del model
    write_huggingface(tmp_path, config, state, 1, 2)
    size = sum(tensor.nbytes for tensor in state.values())
    del state
    script = """
import resource, sys
import torch
sys.path.insert(0, sys.argv[1])
from llama import load_pretrained
from minillama.layers.precision import autocast
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
model = load_pretrained(sys.argv[2], dtype=None)
with autocast(torch.device("cpu"), torch.bfloat16):
    print(model.generate(torch.tensor([[1, 5, 9]]), 3, temperature=0.0).shape[1])
print(peak() - before)
"""
    run = subprocess.run(
        [sys.executable, "-c", script, str(ROOT), str(tmp_path)], capture_output=True, text=True, check=True
    )
    tokens, memory = map(int, run.stdout.split())
    assert tokens == 6
    assert math.isclose(size, 2.2e9, rel_tol=0.01) and memory < 1.15 * size, f"{memory:,} for {size:,}"
