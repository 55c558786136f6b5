"""LoRA: the weights and outputs that a merge changes or keeps, and adapters saved and loaded."""

from __future__ import annotations

import copy
import io

import pytest
import torch

from lora import (
    LoRALayer,
    apply_lora,
    load_lora_state_dict,
    lora_layers,
    lora_state_dict,
    merge_lora_reversibly,
    merge_lora_weights,
    remove_lora,
    unmerge_lora,
)
from models import Classifier, adapted, snapshot, tiny_llama, with_random_update

IDS = torch.randint(64, (2, 9), generator=torch.Generator().manual_seed(0))


DORA = pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)


# Merging


@DORA
def test_merged_equals_unmerged_forward(dora):
    model = adapted(dora=dora)
    logits, hidden = model(IDS, IDS)
    base = tiny_llama()(IDS, IDS)[1]
    assert (hidden - base).abs().max() > 0.1
    assert merge_lora_reversibly(model) is model
    for got, wanted in zip(model(IDS, IDS), (logits, hidden), strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)


def test_merged_weight_is_the_float64_sum_cast_once():
    model = adapted(rank=3)
    layers = dict(lora_layers(model))
    wanted = {
        name: (layer.original_layer.weight.double() + 8.0 / 3 * (layer.lora_B.double() @ layer.lora_A.double())).float()
        for name, layer in layers.items()
    }
    merge_lora_reversibly(model)
    assert all(torch.equal(layer.original_layer.weight, wanted[name]) for name, layer in layers.items())


@DORA
def test_merging_and_unmerging_twice_is_merging_and_unmerging_once(dora):
    model = adapted(dora=dora)
    before = snapshot(model)
    merged = snapshot(merge_lora_reversibly(model))
    assert same(snapshot(merge_lora_reversibly(model)), merged) and not same(merged, before)
    assert all(layer.merged for _, layer in lora_layers(model))
    assert unmerge_lora(model) is model
    assert same(snapshot(model), before)
    assert same(snapshot(unmerge_lora(model)), before)
    assert not any(layer.merged for _, layer in lora_layers(model))
    assert same(snapshot(merge_lora_reversibly(model)), merged)


@DORA
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unmerging_is_exact_however_often(dtype, dora):
    torch.manual_seed(0)
    model = with_random_update(apply_lora(tiny_llama().to(dtype), 4, 30.0, dora=dora))
    before, logits = snapshot(model), model(IDS)[0]
    for _ in range(3):
        unmerge_lora(merge_lora_reversibly(model))
    assert same(snapshot(model), before)
    assert torch.equal(model(IDS)[0], logits)


def test_unmerging_a_model_that_was_never_merged_does_nothing():
    model = adapted()
    before = snapshot(model)
    assert same(snapshot(unmerge_lora(model)), before)


def test_bfloat16_weights_merge_in_wider_arithmetic():
    torch.manual_seed(0)
    base = torch.nn.Linear(64, 48, bias=False, dtype=torch.bfloat16)
    layer = LoRALayer(base, 8, 8.0)
    torch.nn.init.normal_(layer.lora_B)
    wanted = (base.weight.float() + layer.lora_B @ layer.lora_A).bfloat16()
    x = torch.randn(5, 64, dtype=torch.bfloat16)
    unmerged = layer(x)
    layer.merge()
    assert base.weight.dtype == torch.bfloat16
    assert (base.weight == wanted).float().mean() > 0.999
    torch.testing.assert_close(layer(x), unmerged, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("mode", [True, False])
def test_changing_the_mode_merges_nothing(mode):
    model = adapted()
    before = snapshot(model)
    assert same(snapshot(model.train(mode)), before)
    merged = snapshot(merge_lora_reversibly(model))
    assert same(snapshot(model.train(mode)), merged)


@DORA
def test_a_state_dict_saved_while_merged_stands_for_the_same_function(dora):
    model = merge_lora_reversibly(adapted(dora=dora))
    other = apply_lora(tiny_llama(seed=5), 4, 8.0, dora=dora)
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(other(IDS)[0], model(IDS)[0], atol=1e-5, rtol=1e-5)


def test_a_merged_model_computes_what_a_loaded_state_dict_says():
    source, model = adapted(seed=1), merge_lora_reversibly(adapted(seed=2))
    model.load_state_dict(source.state_dict())
    torch.testing.assert_close(model(IDS)[0], source(IDS)[0], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_removing_gives_the_plain_keys_and_the_base_or_the_merged_weights():
    plain = tiny_llama()
    removed = remove_lora(adapted())
    assert same(snapshot(removed), snapshot(plain))
    assert not list(lora_layers(removed))

    merged = merge_lora_reversibly(adapted())
    logits = merged(IDS)[0]
    assert remove_lora(merged) is merged
    assert merged.state_dict().keys() == plain.state_dict().keys()
    assert torch.equal(merged(IDS)[0], logits)
    plain.load_state_dict(merged.state_dict())
    plain.requires_grad_(False)  # torch's own rounding differs in the last bit with it
    assert torch.equal(plain(IDS)[0], logits)
    apply_lora(merged)


@torch.no_grad()
@DORA
def test_merging_for_good_leaves_a_standard_model(dora):
    """Plain Linears with the plain keys, in a copy, which a model that was never wrapped loads strictly."""
    model = Classifier()
    model.llama.layers[0].attention.compute_query = torch.nn.Linear(32, 32)  # one with a bias
    fresh = copy.deepcopy(model)
    with_random_update(apply_lora(model, 4, 8.0, dora=dora))
    wanted, wrapped = model(IDS), snapshot(model)
    merged = copy.deepcopy(model)
    assert merge_lora_weights(merged) is merged
    assert not any(isinstance(module, LoRALayer) for module in merged.modules())
    assert all(type(module) is torch.nn.Linear for name, module in merged.named_modules() if "compute_" in name)
    torch.testing.assert_close(merged(IDS), wanted, atol=1e-4, rtol=1e-4)
    file = io.BytesIO()
    torch.save(merged.state_dict(), file)
    before = fresh(IDS)
    assert str(fresh.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True), strict=True)) == (
        "<All keys matched successfully>"
    )
    assert torch.equal(fresh(IDS), merged(IDS)) and not torch.isclose(fresh(IDS), before).all()
    assert same(snapshot(model), wrapped)  # the copy was merged, not the model that goes on training


@pytest.mark.parametrize("before", [lambda model: model, merge_lora_reversibly], ids=["unmerged", "merged"])
def test_merging_for_good_takes_a_model_merged_reversibly_and_one_without_lora(before):
    merged, plain = merge_lora_weights(before(adapted())), merge_lora_weights(tiny_llama())
    assert merged.state_dict().keys() == plain.state_dict().keys() == tiny_llama().state_dict().keys()
    assert same(snapshot(merged), snapshot(merge_lora_weights(adapted())))
    assert same(snapshot(plain), snapshot(tiny_llama()))


def test_a_wrapped_layer_by_itself_is_merged_into_its_linear():
    layer = LoRALayer(torch.nn.Linear(6, 5), 2, 4.0)
    torch.nn.init.normal_(layer.lora_B)
    x = torch.randn(3, 6)
    wanted = layer(x)
    linear = merge_lora_weights(layer)
    assert type(linear) is torch.nn.Linear and linear.bias is not None
    torch.testing.assert_close(linear(x), wanted, atol=1e-5, rtol=1e-5)


def test_an_output_tied_to_the_embedding_is_not_merged_for_the_embedding_would_change():
    model = with_random_update(apply_lora(tiny_llama(), targets=("output",)))
    before = snapshot(model)
    message = "tok_embeddings.weight and output.original_layer.weight are one weight: merging would change both"
    with pytest.raises(ValueError, match=message):
        merge_lora_weights(model)
    assert same(snapshot(model), before) and len(list(lora_layers(model))) == 1


# Adapters in files


@DORA
def test_an_adapter_saved_and_loaded_gives_the_same_outputs(dora):
    source = adapted(seed=1, dora=dora)
    adapter = lora_state_dict(source)
    parts = ("lora_A", "lora_B", "lora_magnitude") if dora else ("lora_A", "lora_B")
    assert set(adapter) == {f"{name}.{part}" for name, _ in lora_layers(source) for part in parts}
    file = io.BytesIO()
    torch.save(adapter, file)
    other = adapted(seed=2, dora=dora)
    assert not torch.isclose(other(IDS)[0], source(IDS)[0]).all()
    load_lora_state_dict(other, torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    assert torch.equal(other(IDS)[0], source(IDS)[0])


def test_an_adapter_is_a_copy():
    model = adapted()
    adapter = lora_state_dict(model)
    before = {name: tensor.clone() for name, tensor in adapter.items()}
    with_random_update(model, seed=7)
    assert same(adapter, before)
    assert not any(tensor.requires_grad for tensor in adapter.values())


def test_a_merged_adapter_is_not_saved():
    with pytest.raises(ValueError, match="adapter is merged into the weights; call unmerge_lora"):
        lora_state_dict(merge_lora_reversibly(adapted()))


def test_loading_into_a_merged_model_unmerges_it_first():
    source = adapted(seed=1)
    model = merge_lora_reversibly(adapted(seed=2))
    load_lora_state_dict(model, lora_state_dict(source))
    assert not any(layer.merged for _, layer in lora_layers(model))
    assert torch.equal(model(IDS)[0], source(IDS)[0])


def other_rank(adapter: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return lora_state_dict(adapted(rank=2))


def last_misshaped(adapter: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    name = sorted(adapter)[-1]
    return adapter | {name: adapter[name][:, :-1]}


def one_missing(adapter: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in adapter.items() if name != "layers.1.attention.compute_key.lora_B"}


def one_extra(adapter: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return adapter | {"layers.7.attention.compute_key.lora_B": torch.zeros(1)}


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (other_rank, r"compute_key.lora_A has shape \(2, 32\), but \(4, 32\) in the model; do their ranks differ"),
        (last_misshaped, r"layers.1.attention.compute_value.lora_B has shape \(16, 3\), but \(16, 4\) in the model"),
        (one_missing, "does not fit the model: 1 names differ, such as layers.1.attention.compute_key.lora_B"),
        (one_extra, "does not fit the model: 1 names differ, such as layers.7.attention.compute_key.lora_B"),
        (lambda adapter: {}, "does not fit the model: 16 names differ"),
    ],
    ids=["other rank", "misshaped", "missing", "extra", "empty"],
)
def test_an_adapter_that_does_not_fit_raises_before_anything_changes(damage, message, merged):
    model = adapted(seed=1)
    adapter = damage(lora_state_dict(adapted(seed=2)))
    if merged:
        merge_lora_reversibly(model)
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        load_lora_state_dict(model, adapter)
    assert same(snapshot(model), before)
    assert all(layer.merged == merged for _, layer in lora_layers(model))
