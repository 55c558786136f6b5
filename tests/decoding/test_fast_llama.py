"""The fast model against the readable one: every convention, with and without a cache, with padding, in int8."""

from __future__ import annotations

import copy

import pytest
import torch

from config import RopeScaling
from minillama.decoding import fast_llama
from minillama.decoding.beam_search import beam_search
from minillama.decoding.fast_llama import InferenceLlama
from minillama.decoding.lookup import lookup_decoding
from minillama.decoding.sampling import generate
from minillama.layers import kernels
from minillama.layers.kernels import (
    can_pack,
    dense_product,
    fastest,
    int8_product,
    int8_weights,
    packed_product,
    product_of,
)
from models import tiny_llama

IDS = torch.randint(64, (3, 9), generator=torch.Generator().manual_seed(0))
MASK = torch.ones(3, 9, dtype=torch.bool)
MASK[0, :4] = MASK[1, :1] = False
CONVENTIONS = [
    {"causal": causal, "norm": norm, "n_kv_heads": heads, "tie_embeddings": tied}
    for causal, norm, heads, tied in (
        (True, "rmsnorm", 2, True),
        (True, "layernorm", 4, False),
        (False, "layernorm", 1, True),
        (False, "rmsnorm", 4, False),
    )
]


def both(**changes):
    model = tiny_llama(**changes)
    return model, InferenceLlama(copy.deepcopy(model))


@pytest.mark.parametrize("changes", CONVENTIONS, ids=str)
@pytest.mark.parametrize("mask", [None, MASK], ids=["whole", "ragged"])
@torch.no_grad()
def test_it_computes_what_the_readable_model_does(changes, mask):
    model, fast = both(**changes)
    for targets in (None, IDS):
        for ours, wanted in zip(fast(IDS, targets, mask), model(IDS, targets, mask), strict=True):
            real = slice(None) if mask is None or wanted.shape[1] == 1 else mask
            torch.testing.assert_close(ours[real], wanted[real], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("cuts", [(9,), (1, 8), (4, 3, 2), (1,) * 9])
@pytest.mark.parametrize("ragged", [False, True])
@torch.no_grad()
def test_however_a_text_is_cut_the_cache_changes_nothing(cuts, ragged):
    model, fast = both(causal=True)
    mask = MASK if ragged else None
    wanted = model(IDS, IDS, mask)[0]
    cache, start, found = fast.new_cache(), 0, []
    for size in cuts:
        part = slice(start, start + size)
        found.append(fast(IDS[:, part], IDS, None if mask is None else mask[:, part], cache=cache)[0])
        start += size
    real = MASK if ragged else slice(None)
    torch.testing.assert_close(torch.cat(found, 1)[real], wanted[real], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("causal", [True, False])
def test_it_generates_the_same_tokens_past_the_context_too(causal):
    model, fast = both(causal=causal, max_seq_len=12)
    for settings in ({"temperature": 0.0}, {"temperature": 1.0, "epsilon": 0.01}, {"attention_mask": MASK}):
        drawn = [
            generate(one, IDS, 10, generator=torch.Generator().manual_seed(1), **settings) for one in (model, fast)
        ]
        assert drawn[0].equal(drawn[1])
    if causal:
        assert beam_search(model, IDS[:1], 8)[0].equal(beam_search(fast, IDS[:1], 8)[0])
        assert lookup_decoding(model, IDS[:1], 8).equal(lookup_decoding(fast, IDS[:1], 8))


def test_the_weights_are_taken_over():
    model = tiny_llama(causal=True)
    InferenceLlama(model)
    assert len(model.layers) == 0 and len(list(model.output.parameters())) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 2, 4, 5, 40])
@pytest.mark.parametrize("make", [dense_product, packed_product])
def test_a_product_is_that_of_the_formula(make, rows, dtype):
    torch.manual_seed(0)
    weight, x = torch.randn(48, 32).to(dtype), torch.randn(1, rows, 32)
    wanted = x.to(dtype).double() @ weight.double().T
    tolerance = 1e-5 if dtype == torch.float32 else 4e-2  # the sum is rounded to bfloat16
    torch.testing.assert_close(make(weight)(x).double(), wanted, atol=tolerance, rtol=tolerance)
    assert make(weight)(x).shape == (1, rows, 48)


def test_whole_numbers_are_within_half_a_step_of_the_weights():
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    weight[3] = 0
    whole, scale = int8_weights(weight)
    assert whole.dtype == torch.int8 and whole.abs().max() == 127
    difference = (whole * scale.float()[:, None] - weight).abs()
    assert (difference <= 0.5001 * scale.float()[:, None]).all()


@pytest.mark.parametrize("rows", [1, 3, 4, 5, 30])
def test_an_int8_product_differs_by_no_more_than_its_roundings(rows):
    torch.manual_seed(0)
    weight, x = torch.randn(48, 256), torch.randn(rows, 256)
    whole, scale = int8_weights(weight)
    wanted = x.to(torch.bfloat16).double() @ (whole.double() * scale.double()[:, None]).T
    torch.testing.assert_close(int8_product(whole, scale)(x).double(), wanted, atol=0.3, rtol=1e-2)
    assert (wanted - x.double() @ weight.double().T).abs().max() < 1.0 < wanted.abs().max()


def test_in_8_bits_the_model_says_nearly_the_same():
    model = tiny_llama(causal=True)
    exact = model(IDS, IDS)[0].log_softmax(-1)
    found = InferenceLlama(model, quantize="int8")(IDS, IDS)[0].float().log_softmax(-1)
    divergence = (exact.exp() * (exact - found)).sum(-1)  # of the random weights of a tiny model, the hardest case
    assert 0 < divergence.mean() < 0.01


def test_half_precision_keeps_the_stream_and_the_cache_wide():
    model = tiny_llama(causal=True)
    wanted = model(IDS, IDS)[0].log_softmax(-1)
    fast = InferenceLlama(model, torch.bfloat16)
    cache = fast.new_cache()
    found, hidden = fast(IDS, IDS, cache=cache)
    assert hidden.dtype == cache.keys[0].dtype == torch.float32
    assert (wanted.exp() * (wanted - found.float().log_softmax(-1))).sum(-1).mean() < 0.02


def test_of_half_precision_weights_the_stream_is_wide_too():
    model = tiny_llama(causal=True).bfloat16()
    widths = []
    model.layers[1].attention_norm.register_forward_pre_hook(lambda _, given: widths.append(given[0].dtype))
    model.layers[0].attention_norm.register_forward_pre_hook(lambda _, given: widths.append(given[0].dtype))
    logits, hidden = InferenceLlama(model)(IDS, IDS)
    assert widths == [torch.float32] * 2 and hidden.dtype == torch.float32 and logits.dtype == torch.bfloat16


def test_another_quantization_is_refused():
    with pytest.raises(ValueError, match="quantize is 'int4'; it must be one of int8"):
        InferenceLlama(tiny_llama(), quantize="int4")


def test_the_plain_product_stands_in_for_a_weight_that_no_kernel_packs():
    weight = torch.randn(4, 6, dtype=torch.float64)
    x = torch.randn(1, 1, 6, dtype=torch.float64)
    assert product_of(weight, None)(x).equal(torch.nn.functional.linear(x, weight))


@pytest.mark.parametrize(
    "changes",
    [{"rope_theta": 100.0}, {"rope_scaling": RopeScaling(8.0, 1.0, 4.0, 16)}, {"n_kv_heads": 1, "max_seq_len": 16}],
    ids=str,
)
@torch.no_grad()
def test_positions_are_turned_as_the_config_says(changes):
    model, fast = both(causal=True, **changes)
    plain = tiny_llama(causal=True)
    torch.testing.assert_close(fast(IDS, IDS)[0], model(IDS, IDS)[0], atol=1e-5, rtol=1e-5)
    assert "rope_theta" not in changes or not torch.allclose(plain(IDS, IDS)[0], model(IDS, IDS)[0], atol=1e-3)


@torch.no_grad()
def test_of_a_right_padded_row_the_last_real_token_is_read():
    model, fast = both(causal=True)
    mask = MASK.flip(1)
    torch.testing.assert_close(fast(IDS, None, mask)[0], model(IDS, None, mask)[0], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_float64_stays_float64():
    model = tiny_llama(causal=True).double()
    wanted = model(IDS, IDS)[0]
    fast = InferenceLlama(model)
    cache = fast.new_cache()
    found = torch.cat([fast(IDS[:, part], IDS, cache=cache)[0] for part in (slice(0, 5), slice(5, 6), slice(6, 9))], 1)
    torch.testing.assert_close(found, wanted, atol=1e-9, rtol=1e-9)


def test_a_model_that_shall_have_no_cache_has_none():
    assert InferenceLlama(tiny_llama(causal=True, use_cache=False)).new_cache() is None
    assert InferenceLlama(tiny_llama(causal=False)).new_cache() is None


@pytest.mark.parametrize("width", [4, 20, 36, 172])
@pytest.mark.parametrize("rows", [1, 4])
def test_widths_that_the_int8_kernel_cannot_read_are_widened(width, rows, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(torch, "_weight_int8pack_mm", None)  # it would read past the end
    weight, x = torch.randn(48, width), torch.randn(rows, width)
    whole, scale = int8_weights(weight)
    wanted = x.to(torch.bfloat16).double() @ (whole.double() * scale.double()[:, None]).T
    torch.testing.assert_close(int8_product(whole, scale)(x).double(), wanted, atol=0.3, rtol=1e-2)


def test_every_product_is_of_8_bits_the_output_too(monkeypatch):
    made = []
    really = kernels.int8_product
    monkeypatch.setattr(kernels, "int8_product", lambda whole, *more: made.append(whole.shape) or really(whole, *more))
    model = tiny_llama()
    InferenceLlama(model, quantize="int8")
    assert len(made) == 4 * 2 + 1 and made[-1] == (64, 32)


def test_bfloat16_is_packed_where_the_processor_can(monkeypatch):
    weight = torch.randn(16, 16, dtype=torch.bfloat16)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    assert not can_pack(weight) and can_pack(weight.float()) and not can_pack(weight.half())
    assert product_of(weight, None)(torch.ones(1, 16)).shape == (1, 16)


def test_the_fastest_product_is_one_that_works_and_is_right():
    weight, x = torch.randn(6, 8), torch.randn(2, 8)
    right = dense_product(weight)

    def fails(x):
        raise NotImplementedError("no kernel")

    products = [right, lambda x: 1.1 * right(x), fails, lambda x: right(x) * torch.nan, lambda x: 1.001 * right(x)]
    assert fastest(products, x, lambda run: -float(products.index(run.func))) == 4
    assert fastest(products, x, lambda run: float(products.index(run.func))) == 0


@torch.no_grad()
def test_where_int8_is_slow_its_rounded_weights_are_kept_in_bfloat16_and_one_line_says_so(monkeypatch):
    model = tiny_llama(causal=True)
    wanted = InferenceLlama(copy.deepcopy(model), quantize="int8")(IDS, IDS)[0]
    shapes, lines = set(), []
    monkeypatch.setattr(kernels, "_int8_is_fast", lambda *asked: shapes.add(asked[:3]) or False)
    monkeypatch.setattr(
        kernels, "int8_is_fast", lambda weight, rows: kernels._int8_is_fast(*weight.shape, rows, "cuda")
    )
    monkeypatch.setattr(fast_llama, "int8_is_fast", kernels.int8_is_fast)
    found = InferenceLlama(model, quantize="int8", rows=3, tell=lines.append)(IDS, IDS)[0]
    assert found.dtype == torch.bfloat16 and (found - wanted).norm() < 0.02 * wanted.norm()
    assert {rows for *_, rows in shapes} == {3}
    assert lines == [
        "notice: int8 is slower than bf16 on this GPU, so rounded weights are kept in bf16 and save no memory"
    ]
