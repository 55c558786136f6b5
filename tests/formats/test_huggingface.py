"""formats.py: other programs' checkpoints, read, written and damaged; against transformers and writers of our own."""

from __future__ import annotations

import json
import math
import random
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from config import PRESETS, LlamaConfig, RopeScaling
from conftest import ROOT, find_asset, tiny_llama
from llama import Llama, load_pretrained
from minillama.formats.checkpoint import read_checkpoint, write_checkpoint, write_safetensors
from minillama.formats.huggingface import write_huggingface
from minillama.formats.keys import KEYS, renamed, to_pairs, to_split_halves
from minillama.formats.llama2c import write_llama2c

IDS = torch.randint(64, (2, 30), generator=torch.Generator().manual_seed(0))


def all_logits(model: Llama, ids: torch.Tensor = IDS) -> torch.Tensor:
    return model(ids, targets=ids)[0].detach()


def foreign_llama(seed: int = 0, **changes: object) -> Llama:
    """A tiny model of the kind that other programs have."""
    return tiny_llama(seed, **({"norm": "rmsnorm", "causal": True} | changes))


# Names and layout


def test_names_go_to_every_dialect_and_back():
    names = list(foreign_llama(n_layers=12).state_dict())
    for dialect in ("meta", "huggingface", "gguf"):
        there = renamed(names, "ours", dialect)
        assert len(set(there.values())) == len(names) and not any("{" in name for name in there.values())
        assert list(renamed(there.values(), dialect, "ours").values()) == names
    assert len({row[0] for row in KEYS}) == len(KEYS) == 12
    assert renamed(["layers.11.attention.compute_key.weight"], "ours", "huggingface") == {
        "layers.11.attention.compute_key.weight": "model.layers.11.self_attn.k_proj.weight"
    }
    assert renamed(["a.b", "alone"], "meta", "ours") == {"a.b": "a.b", "alone": "alone"}


def test_a_head_of_pairs_becomes_two_halves_and_back():
    rows = torch.arange(12.0)[:, None]  # two heads of three pairs
    halves = [0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11]
    assert to_split_halves(rows, 2)[:, 0].tolist() == halves
    assert torch.equal(to_pairs(to_split_halves(rows, 2), 2), rows)


# llama2.c


@pytest.mark.parametrize("version", [0, 1])
def test_a_real_llama2c_file_is_written_back_byte_for_byte(tmp_path, version):
    original = find_asset(f"stories260K/stories260K_v{version}.bin")
    checkpoint = read_checkpoint(original)
    write_llama2c(tmp_path / "again", checkpoint.config, checkpoint.complete_state(checkpoint.config), version)
    assert (tmp_path / "again").read_bytes() == original.read_bytes()


def q80(weight: np.ndarray, group: int) -> bytes:
    """llama2.c's quantization, a number at a time."""
    integers, scales = bytearray(), bytearray()
    for start in range(0, weight.size, group):
        part = weight.reshape(-1)[start : start + group]
        scale = np.float32(np.abs(part).max() / np.float32(127))
        scales += struct.pack("<f", scale)
        integers += b"".join(struct.pack("<b", int(np.rint(x / scale))) for x in part)
    return bytes(integers + scales)


def v2_bytes(model: Llama, group: int) -> bytes:
    """An independent writer, by llama2.c's own names and order."""
    config, state = model.config, {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    hidden = model.layers[0].feed_forward.w1.out_features
    sizes = (config.dim, hidden, config.n_layers, config.n_heads, config.kv_heads, config.vocab_size)
    head = struct.pack("<Ii7iBi", 0x616B3432, 2, *sizes, config.max_seq_len, config.tie_embeddings, group)
    layers = [f"layers.{i}" for i in range(config.n_layers)]
    norms = [f"{layer}.{norm}.weight" for norm in ("attention_norm", "ffn_norm") for layer in layers] + ["norm.weight"]
    matrices = ["tok_embeddings.weight"]
    for matrix in ("attention.compute_query", "attention.compute_key", "attention.compute_value"):
        matrices += [f"{layer}.{matrix}.weight" for layer in layers]
    for matrix in ("attention.compute_output", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3"):
        matrices += [f"{layer}.{matrix}.weight" for layer in layers]
    if not config.tie_embeddings:
        matrices.append("output.weight")
    body = b"".join(state[name].astype("<f4").tobytes() for name in norms)
    return head.ljust(256, b"\0") + body + b"".join(q80(state[name], group) for name in matrices)


@pytest.mark.parametrize("tied", [True, False])
def test_int8_files_are_written_and_read_as_llama2c_has_them(tmp_path, tied):
    model = foreign_llama(tie_embeddings=tied)
    state = model.state_dict()
    write_llama2c(tmp_path / "ours", model.config, state, 2)
    assert (tmp_path / "ours").read_bytes() == v2_bytes(model, 32)
    (tmp_path / "theirs").write_bytes(v2_bytes(model, 8))
    for name, group in (("ours", 32), ("theirs", 8)):
        again = load_pretrained(tmp_path / name)
        assert read_checkpoint(tmp_path / name).kind == "llama2.c v2"
        assert again.config.tie_embeddings == tied and again.config.norm == "rmsnorm" and again.config.causal
        for key, tensor in again.state_dict().items():
            if tensor.dim() == 1:
                assert torch.equal(tensor, state[key])
            else:
                step = state[key].reshape(-1, group).abs().amax(1, keepdim=True) / 127
                error = (tensor - state[key]).reshape(-1, group).abs()
                assert (error <= 0.5001 * step).all() and error.max() > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm": "layernorm"}, "llama2.c holds RMSNorm models only, and this one has LayerNorm"),
        ({"causal": False}, "llama2.c holds causal models only, and this one's attention is bidirectional"),
        ({"rope_theta": 500000.0}, "rope_theta 10000.0 only, and this model has 500000.0"),
        ({"layer_norm_eps": 1e-6}, "layer_norm_eps 1e-05 only, and this model has 1e-06"),
        ({"rope_scaling": RopeScaling(8.0)}, "rope_scaling None only"),
    ],
)
def test_what_a_llama2c_file_cannot_hold_is_refused(tmp_path, changes, message):
    model = foreign_llama(**changes)
    with pytest.raises(ValueError, match=message):
        write_llama2c(tmp_path / "a", model.config, model.state_dict(), 1)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("group", [0, -1, 7, 1 << 30])
def test_a_group_that_divides_nothing_is_refused(tmp_path, group):
    content = bytearray(v2_bytes(foreign_llama(), 8))
    struct.pack_into("<i", content, 37, group)
    (tmp_path / "a.bin").write_bytes(content)
    with pytest.raises(ValueError, match=r"a.bin(: groups of|.*its header asks for)"):
        load_pretrained(tmp_path / "a.bin")


def test_llama2c_checkpoints_of_training_are_rmsnorm_and_causal(tmp_path):
    model = foreign_llama()
    names = renamed(model.state_dict(), "ours", "meta")
    sizes = ("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of", "max_seq_len")
    arguments = {name: getattr(model.config, name) for name in sizes} | {"dropout": 0.0}
    state = {"_orig_mod." + names[name]: tensor for name, tensor in model.state_dict().items()}
    torch.save({"model": state, "model_args": arguments, "iter_num": 3, "config": {}}, tmp_path / "ckpt.pt")
    checkpoint = read_checkpoint(tmp_path / "ckpt.pt")
    assert checkpoint.kind == "llama2.c" and checkpoint.config.convention == "RMSNorm, causal attention"
    assert torch.equal(all_logits(load_pretrained(tmp_path / "ckpt.pt")), all_logits(model))


# Hugging Face

SCALED = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("max_shard_size", ["1GB", "60KB"])
def test_folders_of_transformers_load_with_equal_logits(tmp_path, tied, kv_heads, scaled, max_shard_size):
    transformers = pytest.importorskip("transformers", minversion="5")
    rope = {"rope_type": "default", "rope_theta": 20000.0}
    if scaled:
        rope = SCALED | {"original_max_position_embeddings": 64}
    config = transformers.LlamaConfig(
        vocab_size=99,
        hidden_size=64,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        max_position_embeddings=512,
        rms_norm_eps=1e-6,
        rope_parameters=rope,
        tie_word_embeddings=tied,
        initializer_range=0.1,
    )
    torch.manual_seed(kv_heads)
    theirs = transformers.LlamaForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    assert (tmp_path / "model.safetensors").exists() == (max_shard_size == "1GB")
    ours = load_pretrained(tmp_path)
    ids = torch.randint(99, (2, 300))  # past the context that the scaling stretches
    with torch.no_grad():
        torch.testing.assert_close(all_logits(ours, ids), theirs(ids).logits, rtol=1e-5, atol=1e-5)
    assert ours.config.tie_embeddings == tied and (ours.config.rope_scaling is not None) == scaled


def test_scaling_changes_what_is_computed(tmp_path):
    plain, scaled = (foreign_llama(rope_scaling=scaling) for scaling in (None, RopeScaling(8.0, 1.0, 4.0, 16)))
    assert (all_logits(plain) - all_logits(scaled)).abs().max() > 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("scaling", [None, RopeScaling(8.0, 1.0, 4.0, 16)])
def test_our_folders_load_in_transformers(tmp_path, monkeypatch, dtype, tied, scaling):
    transformers = pytest.importorskip("transformers")
    monkeypatch.setattr("minillama.formats.huggingface.SHARD_BYTES", 30_000)
    model = foreign_llama(tie_embeddings=tied, rope_scaling=scaling, rope_theta=5000.0)
    state = {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}
    write_huggingface(tmp_path, model.config, state, 1, 2)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ours = load_pretrained(tmp_path)
    assert {name: t.to(dtype) for name, t in ours.state_dict().items()}.keys() == state.keys()
    for name, tensor in read_checkpoint(tmp_path).complete_state(ours.config).items():
        assert tensor.dtype == dtype and torch.equal(tensor, state[name])
    assert ours.config == LlamaConfig(**model.config.to_dict() | {"hidden_dim": 96})
    with torch.no_grad():
        torch.testing.assert_close(all_logits(ours), theirs(IDS).logits, rtol=1e-5, atol=1e-5)
        greedy = theirs.generate(
            IDS[:, :5], max_new_tokens=20, do_sample=False, attention_mask=torch.ones(2, 5), eos_token_id=None
        )
    assert torch.equal(ours.generate(IDS[:, :5], 20, temperature=0.0), greedy)


def huggingface_folder(folder: Path, **changes: object) -> Path:
    model = foreign_llama()
    folder.mkdir(exist_ok=True)
    write_huggingface(folder, model.config, model.state_dict(), 1, 2)
    content = json.loads((folder / "config.json").read_text()) | changes
    content = {name: value for name, value in content.items() if value != "left out"}
    (folder / "config.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mistral"}, "model_type is 'mistral'; this program computes 'llama' only"),
        ({"model_type": "left out"}, "model_type is None"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; this program computes 'silu' only"),
        ({"attention_bias": True}, "attention_bias is True; this program computes False only"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is {'bits': 4}; this program computes None only"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type is 'yarn'; this program computes default and llama3"),
        ({"rope_parameters": [1]}, "rope_scaling is .1.; it must be a table"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "has no 'low_freq_factor'"),
        ({"rope_parameters": SCALED | {"original_max_position_embeddings": "x"}}, "rope_scaling is .*must be numbers"),
        ({"head_dim": 64}, "head_dim is 64; this program computes hidden_size / heads = 8 only"),
        ({"hidden_size": "left out"}, "has no 'hidden_size'"),
        ({"hidden_size": -1}, "dim is -1; it must be a whole number"),
        ({"hidden_size": 1 << 50, "head_dim": None}, "its model_args ask for|which is no"),
        ({"num_hidden_layers": 10**9}, "too few for 1,000,000,000 layers"),
        ({"num_attention_heads": 3}, "dim 32 is not a multiple of n_heads 3"),
        ({"intermediate_size": 97}, r"w1.weight has shape \(96, 32\), its model_args ask for \(97, 32\)"),
        ({"vocab_size": [64]}, "vocab_size is .64.; it must be a whole number"),
    ],
)
def test_a_config_that_says_something_else_is_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message) as raised:
        load_pretrained(huggingface_folder(tmp_path / "model", **changes))
    assert "\n" not in str(raised.value) and str(tmp_path) in str(raised.value)


@pytest.mark.parametrize("content", ["", "{", "[1]", "5", "nul", '"text"', "[" * 100_000, "{}", '{"weight_map": {}}'])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", "params.json"])
def test_json_of_something_else_is_refused(tmp_path, name, content):
    folder = huggingface_folder(tmp_path / "model")
    if name == "params.json":
        (folder / "consolidated.00.pth").write_bytes(b"PK\x03\x04")
    if name == "model.safetensors.index.json":
        (folder / "model.safetensors").unlink()
    (folder / name).write_text(content)
    with pytest.raises(ValueError, match="model") as raised:
        load_pretrained(folder)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "name", ["../out.safetensors", "/etc/passwd", "a/b.safetensors", "model.bin", "", ".", "a\0.safetensors"]
)
def test_an_index_reads_only_beside_itself(tmp_path, name):
    folder = huggingface_folder(tmp_path / "model")
    (folder / "model.safetensors").rename(tmp_path / "out.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
    with pytest.raises(ValueError, match="only .safetensors beside it are read"):
        load_pretrained(folder)


def test_a_shard_that_is_missing_is_named(tmp_path):
    folder = huggingface_folder(tmp_path / "model")
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="lacks model-00001-of-00002.safetensors, which its index names"):
        load_pretrained(folder)
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(ValueError, match=r"has no model.safetensors; fetch it"):
        load_pretrained(folder)


def test_a_tensor_of_another_name_is_refused(tmp_path):
    """Ours, for one, whose query and key stand in another order."""
    folder = huggingface_folder(tmp_path / "model")
    model = foreign_llama()
    write_safetensors(folder / "model.safetensors", model.state_dict(), model.config)
    with pytest.raises(ValueError, match="which is no tensor of a Hugging Face Llama"):
        load_pretrained(folder)


def test_params_alone_are_no_model(tmp_path):
    (tmp_path / "params.json").write_text("{}")
    with pytest.raises(ValueError, match="lacks one of its consolidated.NN.pth"):
        load_pretrained(tmp_path)


def test_layernorm_does_not_go_into_a_llama_folder(tmp_path):
    model = tiny_llama(causal=True)
    with pytest.raises(ValueError, match="a Hugging Face Llama holds RMSNorm models only, and this one has LayerNorm"):
        write_huggingface(tmp_path, model.config, model.state_dict(), 1, 2)
    assert not list(tmp_path.iterdir())


# Meta


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


@pytest.mark.parametrize("shards", [1, 2, 8])
@pytest.mark.parametrize("llama3", [False, True])
def test_meta_folders_load_with_equal_logits(tmp_path, shards, llama3):
    shape = {"dim": 64, "n_heads": 8, "n_kv_heads": 8, "vocab_size": 64, "n_layers": 2, "tie_embeddings": False}
    if llama3:  # hidden: 1.3 * int(8 * 64 / 3) = 221, up to a multiple of 16
        shape |= {"rope_theta": 500000.0, "hidden_dim": 224, "max_seq_len": 131072}
        shape |= {"rope_scaling": RopeScaling(8.0, 1.0, 4.0, 8192)}
    else:
        shape |= {"multiple_of": 16, "max_seq_len": 4096, "layer_norm_eps": 1e-5}
    model = foreign_llama(**shape)
    params = {"dim": 64, "n_heads": 8, "n_layers": 2, "norm_eps": 1e-5, "vocab_size": -1, "multiple_of": 16}
    if llama3:
        params |= {"ffn_dim_multiplier": 1.3, "rope_theta": 500000.0, "n_kv_heads": 8, "vocab_size": 64}
        params |= {"use_scaled_rope": True, "rope_scaling_factor": 8}
    folder = meta_folder(tmp_path / "model", model, shards, llama3, params)
    again = load_pretrained(folder)
    assert read_checkpoint(folder).kind == "Meta"
    assert torch.equal(all_logits(again), all_logits(model))
    assert (
        again.config.max_seq_len == model.config.max_seq_len and again.config.rope_scaling == model.config.rope_scaling
    )
    assert again.config.rope_theta == model.config.rope_theta and not again.config.tie_embeddings


@pytest.mark.parametrize(
    ("params", "context", "factor"),
    [
        ({"norm_eps": 1e-6}, 2048, None),
        ({"norm_eps": 1e-5}, 4096, None),
        ({"norm_eps": 1e-5, "rope_theta": 500000.0}, 8192, None),
        ({"norm_eps": 1e-5, "rope_theta": 500000.0, "use_scaled_rope": True}, 131072, 32.0),  # 3.2, for it is narrow
    ],
)
def test_what_params_leave_out_is_that_of_the_release(tmp_path, params, context, factor):
    model = foreign_llama()
    sizes = {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": -1, "multiple_of": 32}
    config = read_checkpoint(meta_folder(tmp_path / "model", model, 1, False, sizes | params)).config
    assert (config.max_seq_len, config.layer_norm_eps) == (context, params["norm_eps"])
    assert config.tie_embeddings and (config.rope_scaling and config.rope_scaling.factor) == factor


def test_parts_of_meta_folders_that_do_not_belong_together_are_refused(tmp_path):
    model = foreign_llama(n_heads=8, n_kv_heads=8, dim=64)
    params = {"dim": 64, "n_layers": 2, "n_heads": 8, "vocab_size": -1, "multiple_of": 32, "norm_eps": 1e-5}
    folder = meta_folder(tmp_path / "model", model, 2, False, params)
    (folder / "consolidated.01.pth").rename(folder / "consolidated.02.pth")
    with pytest.raises(ValueError, match="lacks one of its consolidated.NN.pth"):
        load_pretrained(folder)
    (folder / "consolidated.02.pth").unlink()
    with pytest.raises(ValueError, match=r"tok_embeddings.weight has shape \(64, 32\), its model_args ask for"):
        load_pretrained(folder)
    torch.save({"norm.weight": torch.ones(64)}, folder / "consolidated.01.pth")
    with pytest.raises(ValueError, match="hold different tensors"):
        load_pretrained(folder)
    other = {name: tensor[..., :3] for name, tensor in torch.load(folder / "consolidated.00.pth").items()}
    torch.save(other, folder / "consolidated.01.pth")
    with pytest.raises(ValueError, match="do not fit together|its model_args ask for"):
        load_pretrained(folder)
    torch.save([1, 2], folder / "consolidated.01.pth")
    with pytest.raises(ValueError, match="it must be a table of tensors"):
        load_pretrained(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"moe": {"experts": 8}}, "has moe, which belongs to no Llama 1 to 3"),
        ({"n_layers": None}, "n_layers is None; it must be a whole number"),
        ({"dim": "64"}, "params.json: "),
        ({"ffn_dim_multiplier": 1e308}, "params.json: "),
        ({"multiple_of": 0}, "params.json: "),
        ({"n_heads": 7}, "dim 32 is not a multiple of n_heads 7"),
    ],
)
def test_params_of_something_else_are_refused(tmp_path, changes, message):
    params = {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": -1, "multiple_of": 32}
    folder = meta_folder(tmp_path / "model", foreign_llama(), 1, False, params | {"norm_eps": 1e-5} | changes)
    with pytest.raises(ValueError, match=message) as raised:
        load_pretrained(folder)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("preset", "count"),
    [
        ("Llama-2-7B", 6_738_415_616),
        ("Llama-2-13B", 13_015_864_320),
        ("Llama-2-70B", 68_976_648_192),
        ("Llama-3-8B", 8_030_261_248),
        ("Llama-3.2-1B", 1_235_814_400),
        ("TinyLlama-1.1B", 1_100_048_384),
    ],
)
def test_presets_have_the_published_number_of_parameters(preset, count):
    with torch.device("meta"):
        model = Llama(LlamaConfig(**PRESETS[preset]))
    assert sum(parameter.numel() for parameter in model.parameters()) == count


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


# Hostile files


def with_header(content: bytes, header: bytes) -> bytes:
    """A safetensors file with another header."""
    behind = 8 + struct.unpack_from("<Q", content)[0]
    return struct.pack("<Q", len(header)) + header + content[behind:]


def test_headers_that_lie_are_refused(tmp_path):
    folder = huggingface_folder(tmp_path / "model")
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    size = struct.unpack_from("<Q", whole)[0]
    header = json.loads(whole[8 : 8 + size])
    name = "model.norm.weight"
    for lie in (
        {"shape": [1 << 40]},
        {"shape": [1 << 62, 1 << 62]},
        {"shape": [-32]},
        {"shape": [31]},
        {"dtype": "F64"},
        {"dtype": "F99"},
        {"data_offsets": [0, 1 << 50]},
        {"data_offsets": [1 << 40, (1 << 40) + 128]},
        {"data_offsets": [-128, 0]},
    ):
        damaged = header | {name: header[name] | lie}
        path.write_bytes(with_header(whole, json.dumps(damaged).encode()))
        with pytest.raises(ValueError, match="model.safetensors is damaged or cut short"):
            load_pretrained(folder)
    for length in (0, 1, len(whole), 1 << 40, (1 << 64) - 1):
        path.write_bytes(struct.pack("<Q", length) + whole[8:])
        with pytest.raises(ValueError, match="damaged"):
            load_pretrained(folder)


def test_mutated_headers_load_or_are_refused_in_one_line(tmp_path):
    """Of safetensors and of both kinds of JSON, a few bytes at a time; nothing else may come out."""
    generator = random.Random(2)
    folder = huggingface_folder(tmp_path / "model")
    model, config = folder / "model.safetensors", folder / "config.json"
    whole, settings = model.read_bytes(), config.read_bytes()
    header = 8 + struct.unpack_from("<Q", whole)[0]
    refused = 0
    for round_number in range(300):
        damaged, text = bytearray(whole), bytearray(settings)
        target, size = (damaged, header) if round_number % 2 else (text, len(settings))
        for _ in range(generator.choice([1, 1, 2, 5])):
            target[generator.randrange(size)] = generator.choice([generator.randrange(256), *b'0123456789-e[]{}",:'])
        model.write_bytes(damaged)
        config.write_bytes(text)
        try:
            load_pretrained(folder)
        except ValueError as error:
            assert "\n" not in str(error) and str(folder) in str(error)
            refused += 1
    assert refused > 150


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


# Ends of texts


@pytest.mark.parametrize("value, ids", [(5, (5,)), ([7, 2, 7], (7, 2)), (None, ()), ([], ()), ("left out", ())])
def test_eos_token_id_may_be_one_id_or_a_list(tmp_path, value, ids):
    assert read_checkpoint(huggingface_folder(tmp_path / "model", eos_token_id=value)).stop_ids == ids


def test_the_generation_config_comes_before_the_config(tmp_path):
    folder = huggingface_folder(tmp_path / "model", eos_token_id=[3, 4])
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [9, 2]}))
    assert read_checkpoint(folder).stop_ids == (9, 2)
    (folder / "generation_config.json").write_text("{}")  # as in transformers, the config is not asked then
    assert read_checkpoint(folder).stop_ids == ()


@pytest.mark.parametrize("value", ["2", True, 2.0, -1, 64, [2, "x"], [[2]], {"a": 2}])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_an_eos_token_id_that_is_none_is_refused_in_one_line(tmp_path, name, value):
    folder = huggingface_folder(tmp_path / "model")
    content = json.loads((folder / "config.json").read_text()) | {"eos_token_id": value}
    (folder / name).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"{name}: eos_token_id is .*; it must be an id from 0 to 63, or a list") as e:
        read_checkpoint(folder)
    assert "\n" not in str(e.value)


# Leftovers and wrappers


def test_a_whole_model_comes_before_an_index_left_over_from_shards(tmp_path):
    transformers = pytest.importorskip("transformers")
    folder = huggingface_folder(tmp_path / "model")
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    theirs = transformers.LlamaForCausalLM.from_pretrained(folder)
    ours = load_pretrained(folder)
    torch.testing.assert_close(all_logits(ours), theirs(IDS).logits.detach(), atol=1e-4, rtol=1e-4)


def test_params_without_metas_weights_give_way_to_a_hugging_face_config(tmp_path):
    folder = huggingface_folder(tmp_path / "model")
    (folder / "params.json").write_text("{}")
    assert read_checkpoint(folder).kind == "Hugging Face"


WRAPPED = ["module.{}", "_orig_mod.module.{}", "module._orig_mod.{}", "_fsdp_wrapped_module._forward_module.{}"]


@pytest.mark.parametrize("wrapped", WRAPPED)
def test_wrapped_tensors_of_other_programs_load(tmp_path, wrapped):
    folder = huggingface_folder(tmp_path / "model")
    plain = all_logits(load_pretrained(folder))
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    tensors = {
        wrapped.format(name).replace("layers.0.", "layers.0._checkpoint_wrapped_module."): t
        for name, t in tensors.items()
    }
    safetensors.torch.save_file(tensors, folder / "model.safetensors")
    assert torch.equal(all_logits(load_pretrained(folder)), plain)
    sizes = {"dim": 64, "n_heads": 8, "n_kv_heads": 8, "n_layers": 2, "vocab_size": 64, "multiple_of": 16}
    model = foreign_llama(**sizes)
    params = {name: value for name, value in sizes.items() if name != "n_kv_heads"} | {"norm_eps": 1e-5}
    meta = meta_folder(tmp_path / "meta", model, 1, False, params)
    plain = all_logits(load_pretrained(meta))
    content = torch.load(meta / "consolidated.00.pth")
    torch.save({wrapped.format(name): tensor for name, tensor in content.items()}, meta / "consolidated.00.pth")
    assert torch.equal(all_logits(load_pretrained(meta)), plain)


def test_a_tensor_in_two_files_of_a_folder_is_refused(tmp_path):
    folder = huggingface_folder(tmp_path / "model")
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    (folder / "b.safetensors").write_bytes((folder / "a.safetensors").read_bytes())
    index = {"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="b.safetensors holds .* again, which another file of"):
        read_checkpoint(folder)
