"""Hugging Face folders: read, written and damaged; against transformers."""

from __future__ import annotations

import json

import pytest
import safetensors.torch
import torch

from config import LlamaConfig, RopeScaling
from llama import load_pretrained
from minillama.formats.checkpoint import read_checkpoint, write_safetensors
from minillama.formats.huggingface import write_huggingface
from models import SOME_IDS, all_logits, foreign_llama, huggingface_folder, meta_folder, tiny_llama

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
        torch.testing.assert_close(all_logits(ours), theirs(SOME_IDS).logits, rtol=1e-5, atol=1e-5)
        greedy = theirs.generate(
            SOME_IDS[:, :5], max_new_tokens=20, do_sample=False, attention_mask=torch.ones(2, 5), eos_token_id=None
        )
    assert torch.equal(ours.generate(SOME_IDS[:, :5], 20, temperature=0.0), greedy)


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
        ({"hidden_size": 1 << 50, "head_dim": None}, "its model_args ask for|which is not"),
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
    with pytest.raises(ValueError, match="has no model-00001-of-00002.safetensors, which its index lists"):
        load_pretrained(folder)
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(ValueError, match=r"has no model.safetensors; fetch it"):
        load_pretrained(folder)


def test_a_tensor_of_another_name_is_refused(tmp_path):
    """Ours, for one, whose query and key stand in another order."""
    folder = huggingface_folder(tmp_path / "model")
    model = foreign_llama()
    write_safetensors(folder / "model.safetensors", model.state_dict(), model.config)
    with pytest.raises(ValueError, match="which is not a tensor of a Hugging Face Llama"):
        load_pretrained(folder)


def test_layernorm_does_not_go_into_a_llama_folder(tmp_path):
    model = tiny_llama(causal=True)
    with pytest.raises(ValueError, match="a Hugging Face Llama supports only RMSNorm, and this model has LayerNorm"):
        write_huggingface(tmp_path, model.config, model.state_dict(), 1, 2)
    assert not list(tmp_path.iterdir())


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
    torch.testing.assert_close(all_logits(ours), theirs(SOME_IDS).logits.detach(), atol=1e-4, rtol=1e-4)


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
    with pytest.raises(ValueError, match="b.safetensors holds .*, and so does another file of"):
        read_checkpoint(folder)
