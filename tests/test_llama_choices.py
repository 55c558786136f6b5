"""Optional positions and attention (ALiBi, sliding window, differential), against slow loops and transformers.

Every path is tested: with a cache, with padding, trained, saved, and in the fast model.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

import reference
from config import LlamaConfig, check_rmsnorm, parameter_shapes
from llama import Attention, Llama, load_pretrained
from lora import apply_lora, merge_lora_weights
from minillama.decoding import sampling as generation
from minillama.decoding.fast_llama import InferenceLlama, fast_model
from minillama.decoding.lookup import lookup_decoding
from minillama.formats.checkpoint import read_checkpoint, write_checkpoint, write_safetensors
from minillama.formats.keys import renamed, to_split_halves
from minillama.layers.masks import default_mask
from minillama.layers.precision import autocast
from models import WeightCasts, padded, random_ids, read_in_parts, tiny_config, tiny_llama, with_kernel

ALIBI = {"position_embedding_type": "alibi"}
WINDOW = {"sliding_window": 4}
DIFFERENTIAL = {"attention_type": "differential"}
CHOICES = [ALIBI, WINDOW, DIFFERENTIAL, ALIBI | WINDOW, DIFFERENTIAL | ALIBI | WINDOW]
choices = pytest.mark.parametrize("choice", CHOICES, ids=lambda choice: "+".join(map(str, choice.values())))


def model_of(choice, **changes) -> Llama:
    return tiny_llama(**{"causal": True, "layer_norm_eps": 1e-3} | choice | changes)


# What is computed


@choices
@pytest.mark.parametrize("kv_heads", [2, 4])
@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
@torch.no_grad()
def test_the_logits_are_those_of_slow_loops(choice, kv_heads, norm):
    model = model_of(choice, n_kv_heads=kv_heads, norm=norm).double()
    ids = random_ids(2, 9)
    wanted = torch.stack([reference.logits(model.state_dict(), model.config, row) for row in ids])
    for kernel in ("fused", "manual", "pieces"):
        one = with_kernel(model, kernel)
        for length in (9, 5, 4):  # above the window, by one, and just it
            got = one(ids[:, :length], ids[:, :length])[0]
            torch.testing.assert_close(got, wanted[:, :length], rtol=0, atol=1e-9)
    assert (model_of({}, n_kv_heads=kv_heads, norm=norm).double()(ids, ids)[0] - wanted).abs().max() > 1e-3


@torch.no_grad()
def test_differential_attention_may_be_bidirectional():
    model, ids = tiny_llama(**DIFFERENTIAL, causal=False).double(), random_ids(1, 7)
    wanted = reference.logits(model.state_dict(), model.config, ids[0])
    torch.testing.assert_close(model(ids, ids)[0][0], wanted, rtol=0, atol=1e-9)


@pytest.mark.parametrize("heads", [3, 6])
@torch.no_grad()
def test_alibi_with_a_number_of_heads_that_is_no_power_of_two_and_heads_of_odd_width(heads):
    model = model_of(ALIBI, n_heads=heads, n_kv_heads=3, dim=5 * heads).double()
    ids = random_ids(1, 8)
    wanted = reference.logits(model.state_dict(), model.config, ids[0])
    torch.testing.assert_close(model(ids, ids)[0][0], wanted, rtol=0, atol=1e-9)


@choices
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kernel", ["fused", "manual", "pieces"])
@torch.no_grad()
def test_rows_of_unequal_length_are_each_as_alone(choice, side, kernel):
    model = with_kernel(model_of(choice).double(), kernel)
    rows = [random_ids(1, length, seed=length)[0] for length in (9, 6, 1)]
    ids, mask = padded(rows, side)
    logits, hidden = model(ids, ids, mask)
    assert logits.isfinite().all()
    last = model.last_hidden(ids, mask)
    for i, row in enumerate(rows):
        wanted = reference.logits(model.state_dict(), model.config, row)
        # A shifted row meets other angles of the float32 rotary tables; ALiBi has none.
        exact = "position_embedding_type" in choice or side == "right"
        torch.testing.assert_close(logits[i][mask[i]], wanted, rtol=0, atol=1e-9 if exact else 2e-5)
        torch.testing.assert_close(last[i], hidden[i][mask[i]][-1], rtol=0, atol=1e-9)


@choices
def test_attention_by_itself_does_as_the_config_says(choice):
    torch.manual_seed(0)
    attention = Attention(tiny_config(causal=True, **choice)).eval()
    query, key, value = torch.randn(3, 2, 4, 7, 8, dtype=torch.float64)
    mask = default_mask(7, attention.config, query.dtype, query.device)
    for kernel in ("manual", "fused", "pieces"):
        attend = Attention(tiny_config(causal=True, attention_kernel=kernel, **choice)).eval().attend
        given, by_config = attend(query, key, value, mask), attend(query, key, value, None)
        torch.testing.assert_close(by_config, given, rtol=0, atol=1e-12)
    a_window = attention.compute_query_key_value_scores(query, key, value)[:, :, 5]
    changed = key.clone()
    changed[:, :, :2] += 1
    same = torch.equal(attention.compute_query_key_value_scores(query, changed, value)[:, :, 5], a_window)
    assert same == ("sliding_window" in choice)  # of 4: position 5 sees 2, 3, 4 and itself


# Against transformers


def their_state(model: Llama) -> dict[str, torch.Tensor]:
    """The tensors by Hugging Face's names, in its layout."""
    config, state = model.config, model.state_dict()
    names = renamed(state, "ours", "huggingface")
    names |= {name: f"model.{name.replace('attention', 'self_attn')}" for name in names if "lambda" in name}
    for name, tensor in state.items():
        if "compute_query" in name or "compute_key" in name:
            state[name] = to_split_halves(tensor, config.n_heads if "query" in name else config.kv_heads)
        elif "compute_value" in name and config.attention_type == "differential":
            # A value's two halves: ours side by side, theirs K / 2 heads apart.
            state[name] = tensor.unflatten(0, (config.kv_heads // 2, 2, -1)).transpose(0, 1).flatten(0, 2)
    return {names[name]: tensor for name, tensor in state.items()}


def their_settings(config: LlamaConfig) -> dict:
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "intermediate_size": parameter_shapes(config)["layers.0.feed_forward.w1.weight"][0],
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.kv_heads,
        "max_position_embeddings": config.max_seq_len,
        "rms_norm_eps": config.layer_norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "tie_word_embeddings": config.tie_embeddings,
        "attn_implementation": "eager",
    }


@pytest.mark.parametrize("window", [1, 4])
@torch.no_grad()
def test_a_sliding_window_is_mistrals(window):
    transformers = pytest.importorskip("transformers")
    model = tiny_llama(causal=True, norm="rmsnorm", sliding_window=window)
    settings = transformers.MistralConfig(**their_settings(model.config), sliding_window=window)
    theirs = transformers.MistralForCausalLM(settings).eval()
    theirs.load_state_dict(their_state(model))
    ids = random_ids(2, 12)
    torch.testing.assert_close(model(ids, ids)[0], theirs(ids, use_cache=False).logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kv_heads", [2, 4])
def test_differential_attention_is_that_of_diffllama_and_so_are_its_gradients(kv_heads):
    transformers = pytest.importorskip("transformers")
    model = tiny_llama(causal=True, norm="rmsnorm", n_kv_heads=kv_heads, n_layers=3, **DIFFERENTIAL)
    for layer in model.layers:
        torch.nn.init.ones_(layer.attention.head_norm.weight)  # theirs has no weight
    settings = transformers.DiffLlamaConfig(**their_settings(model.config))
    theirs = transformers.DiffLlamaForCausalLM(settings).eval()
    missing, unexpected = theirs.load_state_dict(their_state(model), strict=False)
    assert not missing and all("head_norm" in name for name in unexpected)
    ids = random_ids(2, 12)
    ours, wanted = model(ids, ids)[0], theirs(ids, use_cache=False).logits
    torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-4)
    for logits in (ours, wanted):
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    grown = copy.deepcopy(model)
    grown.load_state_dict({name: p.grad for name, p in model.named_parameters()}, strict=False)
    for name, gradient in their_state(grown).items():
        if "head_norm" not in name and "lm_head" not in name:  # the latter is tied
            found = theirs.get_parameter(name).grad
            assert found is not None and found.abs().max() > 1e-3, name
            torch.testing.assert_close(gradient, found, rtol=1e-3, atol=1e-4)


# The cache, and running


@choices
@pytest.mark.parametrize("kv_heads", [2, 4])
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@torch.no_grad()
def test_one_pass_is_one_prefill_is_chunks_is_token_by_token(choice, kv_heads, ragged, dtype, tolerance):
    model, ids, mask = model_of(choice, n_kv_heads=kv_heads).to(dtype), random_ids(3, 14), None
    if ragged:
        mask = torch.ones(3, 14, dtype=torch.bool)
        mask[0, :5] = mask[2, :9] = False
    whole = model(ids, ids, mask)[0]
    for parts in ([14], [7, 7], [1, 13], [6, 1, 1, 3, 3], [1] * 14):
        torch.testing.assert_close(read_in_parts(model, ids, mask, parts), whole, rtol=0, atol=tolerance)


@choices
@torch.no_grad()
def test_the_model_for_running_computes_the_same(choice):
    model, ids = model_of(choice), random_ids(3, 9)
    mask = torch.ones(3, 9, dtype=torch.bool)
    mask[0, :4] = mask[1, :1] = False
    fast = fast_model(copy.deepcopy(model))
    assert isinstance(fast, Llama if choice.get("attention_type") else InferenceLlama)
    for given in (None, mask):
        torch.testing.assert_close(fast(ids, ids, given)[0], model(ids, ids, given)[0], rtol=0, atol=1e-4)
    whole = model(ids, ids, mask)[0]
    for parts in ([9], [4, 3, 2], [1] * 9):
        torch.testing.assert_close(read_in_parts(fast, ids, mask, parts), whole, rtol=0, atol=1e-4)


@choices
def test_generation_with_a_cache_is_that_without_past_the_context_too(choice):
    model = model_of(choice, max_seq_len=12)
    ids, mask = padded([random_ids(1, 5)[0], random_ids(1, 2)[0]], "left")
    for one in (model, fast_model(copy.deepcopy(model))):
        drawn = [
            generation.generate(
                one, ids, 10, attention_mask=mask, generator=torch.Generator().manual_seed(1), use_cache=cached
            )
            for cached in (True, False)
        ]
        assert drawn[0].equal(drawn[1])
        assert lookup_decoding(one, ids[:1], 6).equal(generation.generate(one, ids[:1], 6, temperature=0)[0])


@choices
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_in_half_precision_it_says_nearly_the_same(choice, weights):
    model, ids = model_of(choice), random_ids(2, 9)
    wanted = model(ids, ids)[0].log_softmax(-1)
    fast = fast_model(copy.deepcopy(model).to(weights), torch.bfloat16)
    found, hidden = fast(ids, ids)
    assert hidden.dtype == torch.float32 and not torch.equal(found.float(), wanted)
    # Random weights, the hardest case.
    assert (wanted.exp() * (wanted - found.float().log_softmax(-1))).sum(-1).mean() < 0.05
    token_by_token = read_in_parts(fast, ids, None, [1] * 9).float().log_softmax(-1)
    assert (wanted.exp() * (wanted - token_by_token)).sum(-1).mean() < 0.05


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, None])
def test_differential_attention_is_run_in_the_precision_asked_for(weights, dtype):
    fast = fast_model(model_of(DIFFERENTIAL).to(weights), dtype)
    kinds = []
    fast.layers[1].feed_forward.w2.register_forward_hook(lambda _, given, made: kinds.append(made.dtype))
    logits, hidden = fast(random_ids(2, 9))
    assert logits.dtype == (dtype or weights) and kinds == [dtype or weights] and hidden.dtype == torch.float32


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_differential_attention_casts_its_weights_once_and_computes_what_autocast_does(weights):
    model, ids = model_of(DIFFERENTIAL).to(weights), random_ids(2, 9)
    with autocast(ids.device, torch.bfloat16):
        wanted = model(ids, ids)
    fast = fast_model(model, torch.bfloat16)
    with WeightCasts() as casts:
        found = fast(ids, ids)
    assert casts.count == 0 and all(map(torch.equal, found, wanted))


def test_no_copy_for_running_is_made_of_differential_attention():
    model = model_of(DIFFERENTIAL)
    with pytest.raises(ValueError, match="differential attention cannot be quantized; leave out --quantize"):
        fast_model(model, quantize="int8")
    assert len(model.layers) == 2


# Training, saving


@choices
def test_training_reaches_every_parameter_and_lowers_the_loss(choice):
    torch.manual_seed(0)
    model = Llama(tiny_config(causal=True, **choice)).train()
    ids = random_ids(4, 12)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        logits, _ = model(ids[:, :-1], ids[:, 1:])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in model.parameters())
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.3


@choices
def test_the_paths_agree_in_gradients(choice):
    model, (ids, mask) = model_of(choice).double(), padded([random_ids(1, 9)[0], random_ids(1, 5)[0]], "right")
    found = []
    for kernel in ("fused", "manual", "pieces"):
        one = with_kernel(model, kernel)
        loss = one(ids, ids, mask)[0][mask].square().mean()
        found.append(torch.autograd.grad(loss, list(one.parameters())))
    for other in found[1:]:
        for got, wanted in zip(other, found[0], strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)


def test_differential_attention_starts_as_the_paper_has_it_but_for_the_gain():
    torch.manual_seed(0)
    model = Llama(tiny_config(dim=1024, n_layers=3, vocab_size=8, **DIFFERENTIAL))
    for depth, wanted in enumerate((0.2, 0.8 - 0.6 * 0.7408182, 0.8 - 0.6 * 0.5488116)):
        attention = model.layers[depth].attention
        assert attention.differential
        assert attention.lambda_init == pytest.approx(wanted, abs=1e-6)
        for vector in (attention.lambda_q1, attention.lambda_k1, attention.lambda_q2, attention.lambda_k2):
            assert 0.08 < vector.std() < 0.12 and vector.mean().abs() < 0.03
        assert torch.equal(attention.head_norm.weight, torch.full((512,), 0.1)) and attention.head_norm.eps == 1e-5


@choices
@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
def test_a_checkpoint_keeps_the_choice_and_every_tensor(choice, norm, tmp_path):
    model = model_of(choice, norm=norm)
    state = model.state_dict()
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == parameter_shapes(model.config)
    write_checkpoint(tmp_path / "a.pt", state, model.config)
    write_safetensors(tmp_path / "a.safetensors", state, model.config)
    for name in ("a.pt", "a.safetensors"):
        assert read_checkpoint(tmp_path / name).config == model.config
        again = load_pretrained(tmp_path / name)
        assert all(torch.equal(tensor, state[key]) for key, tensor in again.state_dict().items())
        ids = random_ids(1, 9)
        assert torch.equal(again(ids, ids)[0], model(ids, ids)[0])


@choices
def test_no_other_programs_file_holds_it(choice):
    config = tiny_config(causal=True, norm="rmsnorm", **choice)
    with pytest.raises(ValueError, match=f"GGUF supports no {config.extras[0]}, and this model has it; keep it as"):
        check_rmsnorm(config, "GGUF")
    check_rmsnorm(tiny_config(causal=True, norm="rmsnorm"), "GGUF")


@choices
def test_lora_applies_and_merges(choice):
    model, ids = model_of(choice).double(), random_ids(2, 9)
    before = model(ids, ids)[0]
    apply_lora(model, rank=2, alpha=4.0)
    assert torch.equal(model(ids, ids)[0], before)
    assert all(("lora" in name) == parameter.requires_grad for name, parameter in model.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                parameter.normal_(std=0.1)
    adapted = model(ids, ids)[0]
    assert (adapted - before).abs().max() > 1e-3
    torch.testing.assert_close(merge_lora_weights(model)(ids, ids)[0], adapted, rtol=0, atol=1e-9)


# The config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (ALIBI | {"causal": False}, "ALiBi .* needs causal attention"),
        (WINDOW | {"causal": False}, "a sliding window .* needs causal attention"),
        ({"sliding_window": 0}, "sliding_window is 0; it must be a whole number of 1 or more"),
        ({"sliding_window": 2.5}, "sliding_window is 2.5"),
        ({"attention_type": "linear"}, "attention_type is 'linear'; it must be one of softmax, differential"),
        (DIFFERENTIAL | {"n_heads": 8, "n_kv_heads": 1}, "n_heads is 8, n_kv_heads 1; .* both must be even"),
    ],
)
def test_what_cannot_be_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**{"causal": True} | changes)


def test_the_convention_tells_what_is_not_the_default():
    config = tiny_config(causal=True, **DIFFERENTIAL, **ALIBI, **WINDOW)
    assert (
        config.convention == "LayerNorm, causal attention, differential attention, ALiBi positions, sliding window of 4"
    )
    plain = replace(config, position_embedding_type="rotary", sliding_window=None, attention_type="softmax")
    assert plain.convention == "LayerNorm, causal attention"
