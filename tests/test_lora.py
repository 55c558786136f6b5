"""LoRA and DoRA: the formula of a layer, and the parameters that are trained."""

from __future__ import annotations

import pytest
import torch

from lora import (
    ATTENTION_PROJECTIONS,
    LoRALayer,
    apply_lora,
    count_lora_parameters,
    get_lora_optimizer_params,
    lora_layers,
    merge_lora_weights,
    remove_lora,
)
from minillama.cli.flags import LORA_TARGETS
from models import Classifier, snapshot, tiny_llama, with_random_update

IDS = torch.randint(64, (2, 9), generator=torch.Generator().manual_seed(0))


DORA = pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])


# Wrapping


@torch.no_grad()
@DORA
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_fresh_wrap_computes_what_the_base_computes_bit_for_bit(dtype, dora):
    model = tiny_llama().to(dtype).requires_grad_(False)
    before = model(IDS, IDS)
    apply_lora(model, 4, 8.0, dora=dora)
    assert all(torch.equal(got, wanted) for got, wanted in zip(model(IDS, IDS), before, strict=True))
    assert all(layer.lora_A.abs().sum() > 0 and not layer.lora_B.any() for _, layer in lora_layers(model))


def test_layer_adds_alpha_over_rank_times_b_a_x():
    torch.manual_seed(0)
    base = torch.nn.Linear(6, 5, dtype=torch.float64)
    layer = LoRALayer(base, rank=3, alpha=6.0)
    torch.nn.init.normal_(layer.lora_B)
    assert layer.scaling == 2.0 and layer.original_layer is base
    assert layer.lora_A.shape == (3, 6) and layer.lora_B.shape == (5, 3)
    x = torch.randn(2, 4, 6, dtype=torch.float64)
    wanted = x @ (base.weight + 2.0 * layer.lora_B @ layer.lora_A).T + base.bias
    torch.testing.assert_close(layer(x), wanted, atol=1e-12, rtol=0)


def test_rank_stabilized_layers_scale_by_alpha_over_the_root_of_the_rank():
    assert LoRALayer(torch.nn.Linear(6, 5), 16, 8.0, rslora=True).scaling == 2.0


# DoRA


def a_dora_layer(dtype=torch.float64, bias=True) -> LoRALayer:
    torch.manual_seed(0)
    layer = LoRALayer(torch.nn.Linear(6, 5, bias=bias, dtype=dtype), rank=3, alpha=6.0, dora=True)
    torch.nn.init.normal_(layer.lora_B)
    with torch.no_grad():
        layer.lora_magnitude.mul_(torch.rand(5, dtype=dtype) + 0.5)
    return layer


def written_out(layer: LoRALayer, x: torch.Tensor, detached: bool = True) -> torch.Tensor:
    """m V / ||V|| x + b with V = W + scaling B A, row by row, as the paper has it (equation 5, section 4.3)."""
    base, out = layer.original_layer, []
    for row in range(base.out_features):
        direction = base.weight[row] + layer.scaling * (layer.lora_B[row] @ layer.lora_A)
        norm = (direction**2).sum().sqrt()
        weight = layer.lora_magnitude[row] * direction / (norm.detach() if detached else norm)
        out.append(x @ weight + (0 if base.bias is None else base.bias[row]))
    return torch.stack(out, dim=-1)


@pytest.mark.parametrize("bias", [True, False])
def test_dora_is_the_papers_formula_with_the_norm_a_constant_in_the_gradient(bias):
    layer = a_dora_layer(bias=bias)
    x, weights = torch.randn(2, 4, 6, dtype=torch.float64, requires_grad=True), torch.randn(5, dtype=torch.float64)
    wanted_from = [x, *get_lora_optimizer_params(layer)]
    assert len(wanted_from) == 4

    def output_and_gradients(out):
        return [out, *torch.autograd.grad((out.sin() @ weights).sum(), wanted_from)]

    got = output_and_gradients(layer(x))
    for ours, theirs in zip(got, output_and_gradients(written_out(layer, x)), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)
    flowing = output_and_gradients(written_out(layer, x, detached=False))
    assert (got[2] - flowing[2]).abs().max() > 0.1  # so that the test would see the difference


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_training_with_dora_is_pefts(dtype, use_rslora):
    """Outputs, gradients and weights over ten steps of the same optimizer."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)

    def base():
        torch.manual_seed(1)
        layers = torch.nn.Linear(6, 8, dtype=dtype), torch.nn.Tanh(), torch.nn.Linear(8, 3, bias=False, dtype=dtype)
        return torch.nn.Sequential(*layers)

    settings = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["0", "2"], use_dora=True, use_rslora=use_rslora)
    theirs = peft.get_peft_model(base(), settings, autocast_adapter_dtype=False)
    ours = apply_lora(base(), 4, 6.0, targets=("0", "2"), rslora=use_rslora, dora=True)
    pairs = []
    for name, layer in lora_layers(ours):
        other = theirs.base_model.model.get_submodule(name)
        pairs += [(layer.lora_A, other.lora_A["default"].weight), (layer.lora_B, other.lora_B["default"].weight)]
        pairs.append((layer.lora_magnitude, other.lora_magnitude_vector["default"].weight))
        with torch.no_grad():
            layer.lora_A.copy_(other.lora_A["default"].weight)
    x, y = torch.randn(16, 6, dtype=dtype), torch.randn(16, 3, dtype=dtype)
    optimizers = [torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.1) for m in (ours, theirs)]
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-12}[dtype]
    start = [mine.detach().clone() for mine, _ in pairs]
    for _ in range(10):
        outputs = [model(x) for model in (ours, theirs)]
        torch.testing.assert_close(*outputs, atol=tolerance, rtol=0)
        for out, optimizer in zip(outputs, optimizers, strict=True):
            optimizer.zero_grad()
            (out - y).square().mean().backward()
        for mine, other in pairs:
            torch.testing.assert_close(mine.grad, other.grad, atol=tolerance, rtol=0)
        for optimizer in optimizers:
            optimizer.step()
    for (mine, other), before in zip(pairs, start, strict=True):
        torch.testing.assert_close(mine, other, atol=tolerance, rtol=0)
        assert (mine - before).abs().max() > 0.01


def test_a_row_of_zeros_stays_finite_under_dora():
    linear = torch.nn.Linear(6, 5)
    with torch.no_grad():
        linear.weight[2] = 0
    x = torch.randn(3, 6)
    before = linear(x)
    layer = LoRALayer(linear, dora=True)
    out = layer(x)
    torch.testing.assert_close(out, before, rtol=0, atol=0)
    out.square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in get_lora_optimizer_params(layer))
    layer.merge()
    assert linear.weight.isfinite().all()


def test_doras_norms_are_of_full_precision_under_autocast():
    layer, x = a_dora_layer(torch.float32), torch.randn(3, 6)
    norms = (layer.original_layer.weight + layer.scaling * layer.lora_B @ layer.lora_A).norm(dim=1)
    wanted = written_out(layer, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(layer._row_norms(), norms, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(layer(x).float(), wanted, atol=0.1, rtol=0.03)


# What is trained


def test_layer_freezes_what_it_wraps():
    layer = LoRALayer(torch.nn.Linear(6, 5))
    assert {name for name, parameter in layer.named_parameters() if parameter.requires_grad} == {"lora_A", "lora_B"}


def test_layer_defaults_are_rank_4_alpha_1():
    layer = LoRALayer(torch.nn.Linear(6, 5))
    assert (layer.rank, layer.alpha, layer.scaling) == (4, 1.0, 0.25)


def test_the_four_attention_projections_of_every_layer_are_wrapped():
    model = apply_lora(tiny_llama())
    wanted = {f"layers.{i}.attention.{projection}" for i in range(2) for projection in ATTENTION_PROJECTIONS}
    assert {name for name, _ in lora_layers(model)} == wanted


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_adapters_are_float32_or_wider_and_outputs_keep_the_models_dtype(dtype):
    model = apply_lora(tiny_llama().to(dtype))
    assert {p.dtype for p in get_lora_optimizer_params(model)} == {torch.promote_types(dtype, torch.float32)}
    x = torch.ones(2, 32, dtype=dtype)
    assert all(layer(x).dtype == dtype for _, layer in lora_layers(model))


def test_only_adapters_and_the_classifier_head_are_trained():
    model = apply_lora(Classifier())
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    adapters = {f"{name}.{matrix}" for name, _ in lora_layers(model) for matrix in ("lora_A", "lora_B")}
    assert len(adapters) == 16
    assert trainable == adapters | {"classifier_head.weight", "classifier_head.bias"}


def test_keep_trainable_is_a_choice():
    model = apply_lora(Classifier(), keep_trainable=("norm",))
    trainable = {n for n, p in model.named_parameters() if p.requires_grad and "lora_" not in n}
    assert trainable == {"llama.norm.weight", "llama.norm.bias"}


def test_gradient_reaches_only_adapters_and_head():
    model = with_random_update(apply_lora(Classifier(), 2, 4.0))
    before = snapshot(model)
    model(IDS).square().sum().backward()
    for name, parameter in model.named_parameters():
        if "lora_" in name or name.startswith("classifier_head"):
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
        else:
            assert parameter.grad is None, name
    torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1).step()
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@DORA
def test_optimizer_params_are_every_part_of_an_adapter_once(dora):
    model = apply_lora(tiny_llama(), dora=dora)
    wanted = {id(p) for name, p in model.named_parameters() if name.endswith(("lora_A", "lora_B", "lora_magnitude"))}
    got = get_lora_optimizer_params(model)
    assert len(got) == 8 * (3 if dora else 2) and {id(parameter) for parameter in got} == wanted
    assert count_lora_parameters(model)[0] == sum(parameter.numel() for parameter in got)


def test_the_targets_of_the_command_line_are_the_linears_of_a_layer():
    layer = tiny_llama().layers[0]
    names = [n.rpartition(".")[2] for n, module in layer.named_modules() if isinstance(module, torch.nn.Linear)]
    assert LORA_TARGETS["all"] == tuple(names) and LORA_TARGETS["attention"] == ATTENTION_PROJECTIONS
    assert set(LORA_TARGETS["all"]) == set(LORA_TARGETS["attention"]) | set(LORA_TARGETS["mlp"])


def test_works_on_any_module_with_named_linears():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 2))
    x = torch.randn(3, 4)
    before = model(x)
    assert apply_lora(model, 2, 4.0, targets=("0",)) is model
    assert isinstance(model[0], LoRALayer) and type(model[2]) is torch.nn.Linear
    assert torch.equal(model(x), before)
    unmerged = with_random_update(model)(x)
    assert not torch.isclose(unmerged, before).all()
    torch.testing.assert_close(merge_lora_weights(model)(x), unmerged, atol=1e-5, rtol=1e-5)
    assert type(remove_lora(model)[0]) is torch.nn.Linear
    torch.testing.assert_close(model(x), unmerged, atol=1e-5, rtol=1e-5)


def test_a_target_that_matches_nothing_raises_with_the_names():
    model = Classifier()
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    wanted = (
        "no Linear is named q_proj, v_proj; the model's are classifier_head, compute_key, compute_output, "
        "compute_query, compute_value, output, w1, w2, w3"
    )
    with pytest.raises(ValueError, match=wanted):
        apply_lora(model, targets=("compute_query", "q_proj", "v_proj"))
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before


def test_wrapping_twice_raises():
    with pytest.raises(ValueError, match="already has LoRA layers"):
        apply_lora(apply_lora(tiny_llama()))


@pytest.mark.parametrize(
    ("rank", "alpha", "message"),
    [
        (0, 1.0, "LoRA rank is 0; it must be 1 or more"),
        (-3, 1.0, "LoRA rank is -3"),
        (4, 0.0, "LoRA alpha is 0.0; it must be above 0"),
        (4, -1.0, "LoRA alpha is -1.0"),
        (4, float("inf"), "LoRA alpha is inf"),
        (4, float("nan"), "LoRA alpha is nan"),
    ],
)
def test_a_wrong_rank_or_alpha_raises(rank, alpha, message):
    with pytest.raises(ValueError, match=message):
        LoRALayer(torch.nn.Linear(4, 4), rank, alpha)


@pytest.mark.parametrize(("rank", "alpha", "message"), [(0, 1.0, "LoRA rank is 0"), (4, 0.0, "LoRA alpha is 0.0")])
def test_a_wrong_rank_or_alpha_leaves_the_model_as_it_was(rank, alpha, message):
    model = tiny_llama()
    with pytest.raises(ValueError, match=message):
        apply_lora(model, rank, alpha)
    assert not list(lora_layers(model))
    assert all(parameter.requires_grad for parameter in model.parameters())


# Counting


@pytest.mark.parametrize("tie_embeddings", [True, False])
@pytest.mark.parametrize("rank", [1, 4])
def test_counts_are_of_all_parameters_with_a_tied_weight_once(tie_embeddings, rank):
    model = tiny_llama(tie_embeddings=tie_embeddings)
    assert count_lora_parameters(model)[0] == 0
    apply_lora(model, rank)
    square, grouped, hidden, vocabulary = 32 * 32, 16 * 32, 96 * 32, 64 * 32
    base = 2 * (2 * square + 2 * grouped + 3 * hidden + 4 * 32) + 2 * 32 + vocabulary * (1 if tie_embeddings else 2)
    wanted = 2 * rank * (2 * (32 + 32) + 2 * (32 + 16))
    lora, total, percent = count_lora_parameters(model)
    assert (lora, total) == (wanted, base + wanted)
    assert percent == pytest.approx(100 * wanted / (base + wanted))


def test_counts_of_a_model_without_parameters_are_zero():
    assert count_lora_parameters(torch.nn.Module()) == (0, 0, 0.0)
