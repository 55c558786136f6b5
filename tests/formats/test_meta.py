"""Meta's folders: read, and refused where the parts do not belong together."""

from __future__ import annotations

import pytest
import torch

from config import PRESETS, LlamaConfig, RopeScaling
from llama import Llama, load_pretrained
from minillama.formats.checkpoint import read_checkpoint
from models import all_logits, foreign_llama, meta_folder


def test_params_alone_are_no_model(tmp_path):
    (tmp_path / "params.json").write_text("{}")
    with pytest.raises(ValueError, match="lacks a consolidated.NN.pth"):
        load_pretrained(tmp_path)


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
    with pytest.raises(ValueError, match="lacks a consolidated.NN.pth"):
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
        ({"moe": {"experts": 8}}, "has moe, which no Llama 1 to 3 has"),
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
