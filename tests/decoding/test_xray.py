"""The X-ray's numbers, against a float64 reference that computes one query and one key at a time."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import reference
from lora import apply_lora
from minillama.decoding.xray import differences, first_difference, logit_lens, score_by_distance, shares, trace
from models import random_ids, tiny_llama

KINDS = {
    "llama 2": {"norm": "rmsnorm", "causal": True},
    "one key head for each query head": {"norm": "rmsnorm", "causal": True, "n_kv_heads": 4},
    "the course's": {"norm": "layernorm", "causal": False},
    "a window": {"norm": "rmsnorm", "causal": True, "sliding_window": 3},
    "ALiBi": {"norm": "layernorm", "causal": True, "position_embedding_type": "alibi"},
    "ALiBi in a window": {"causal": True, "position_embedding_type": "alibi", "sliding_window": 4},
    "differential": {"norm": "rmsnorm", "causal": True, "attention_type": "differential"},
    "differential, all directions": {"causal": False, "attention_type": "differential"},
    "differential with ALiBi": {
        "causal": True,
        "attention_type": "differential",
        "position_embedding_type": "alibi",
        "norm": "rmsnorm",
    },
    "an output matrix of its own": {"norm": "rmsnorm", "causal": True, "tie_embeddings": False},
}


@pytest.fixture(params=KINDS)
def model(request):
    return tiny_llama(**KINDS[request.param]).double()


def ids(count=9):
    return random_ids(1, count)[0]


def test_a_trace_is_what_the_model_computes(model):
    found, tokens = trace(model, ids()), ids()[None]
    logits, hidden = model(tokens, tokens)
    torch.testing.assert_close(found.logits, logits[0])
    torch.testing.assert_close(found.hidden, hidden[0])
    torch.testing.assert_close(model.norm(found.stream()[-1]), found.hidden)
    for layer in found.layers:
        torch.testing.assert_close(layer.maps.sum(-1), torch.ones_like(layer.maps[..., 0]))
        torch.testing.assert_close(layer.maps @ layer.value, layer.mixed)
        torch.testing.assert_close(layer.heads.sum(0), layer.attention)


def test_maps_lens_and_logits_are_those_of_the_reference(model):
    found, maps, states = trace(model, ids()), [], []
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    logits = reference.logits(state, model.config, ids(), maps, states)
    torch.testing.assert_close(found.logits, logits, rtol=1e-5, atol=1e-5)
    for layer, expected in zip(found.layers, maps, strict=True):
        torch.testing.assert_close(layer.maps, expected, rtol=1e-5, atol=1e-5)
    answers = found.logits.argmax(-1)
    lens = logit_lens(found, answers, n=3)
    for line, hidden in zip(range(1, 1 + len(states)), states, strict=True):
        probabilities = (hidden @ state["output.weight"].T).softmax(-1)
        best = probabilities.topk(3, dim=-1)
        torch.testing.assert_close(lens.probabilities[line], best.values, rtol=1e-5, atol=1e-5)
        assert lens.ids[line].tolist() == best.indices.tolist()
        torch.testing.assert_close(lens.answer[line], probabilities[range(9), answers], rtol=1e-5, atol=1e-5)
        larger = [sum(float(p) > float(row[a]) for p in row) for row, a in zip(probabilities, answers, strict=True)]
        assert lens.rank[line].tolist() == [count + 1 for count in larger]
    assert lens.rank[-1].tolist() == [1] * 9 and bool((lens.first() <= len(states)).all())


def test_shares_add_up_to_the_logit_and_are_linear(model):
    found = trace(model, ids())
    answers = torch.arange(9)
    rows = model.output.weight.detach()[answers]
    part = shares(found, rows)
    torch.testing.assert_close(part.total(), found.logits[range(9), answers])
    lead = shares(found, rows - model.output.weight.detach()[20], bias=0.5)
    torch.testing.assert_close(lead.total(), found.logits[range(9), answers] - found.logits[:, 20] + 0.5)
    # By hand for one head: its vector through the norm, whose scale is that of the whole stream.
    stream, added = found.stream()[-1][4], found.layers[1].heads[0, 4]
    if model.config.norm == "layernorm":
        stream, added = stream - stream.mean(), added - added.mean()
    scale = 1 / math.sqrt(float((stream**2).mean()) + model.config.layer_norm_eps)
    by_hand = float((added * scale * model.norm.weight.detach() * rows[4]).sum())
    assert float(part.heads[1, 0, 4]) == pytest.approx(by_hand, rel=1e-9)


def test_maps_without_positions_do_not_know_the_order():
    model = tiny_llama(norm="rmsnorm", causal=False)
    tokens = ids(7)
    turned = tokens.flip(0)
    one, other = (trace(model, each).layers[0].maps_without_positions() for each in (tokens, turned))
    torch.testing.assert_close(one, other.flip(1, 2))
    placed, moved = (trace(model, each).layers[0].maps for each in (tokens, turned))
    assert not torch.allclose(placed, moved.flip(1, 2), atol=1e-3)


def test_the_score_by_distance_is_a_mean():
    layer = trace(tiny_llama(norm="rmsnorm", causal=True, sliding_window=5), ids()).layers[0]
    means = score_by_distance(layer)
    for head, distance in ((0, 0), (3, 4)):
        scores = [
            float(layer.placed_query[head, t] @ layer.placed_key[head, t - distance]) / math.sqrt(8)
            for t in range(distance, 9)
        ]
        assert float(means[head, distance]) == pytest.approx(sum(scores) / len(scores), rel=1e-4)
    assert means[:, 5:].isnan().all()


def test_the_answer_appears_where_it_stays():
    found = logit_lens(trace(tiny_llama(norm="rmsnorm", causal=True), ids()), torch.zeros(9, dtype=torch.long))
    found.rank = torch.tensor([[1, 2, 1], [1, 1, 3], [1, 1, 2]])
    assert found.first().tolist() == [0, 1, 3]


def test_a_model_is_as_it_was():
    model = tiny_llama(norm="rmsnorm", causal=True, dropout=0.5).train()
    before = [module.__dict__.keys() for module in model.modules()]
    config = model.layers[0].attention.config
    first, second = trace(model, ids()), trace(model, ids())
    assert torch.equal(first.logits, second.logits), "dropout is off"
    assert model.training and model.layers[0].attention.config is config
    assert [module.__dict__.keys() for module in model.modules()] == before
    assert not any(module._forward_hooks for module in model.modules())
    with pytest.raises(IndexError):
        trace(model, [10**6])
    assert not any(module._forward_hooks for module in model.modules()), "an error leaves no hook"


@pytest.mark.parametrize("tokens, message", [([], "no token"), ([1] * 33, "33 tokens do not fit .* context of 32")])
def test_what_cannot_be_traced_is_told(tokens, message):
    with pytest.raises(ValueError, match=message):
        trace(tiny_llama(), tokens)


def test_lora_layers_are_traced_with_their_updates():
    model = tiny_llama(norm="rmsnorm", causal=True)
    plain = trace(model, ids())
    apply_lora(model, rank=2, alpha=8, targets=["compute_query", "compute_output"])
    assert first_difference(differences(trace(model, ids()), plain)) is None, "LoRA begins as nothing"
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                parameter.normal_()
    changed = trace(model, ids())
    torch.testing.assert_close(changed.layers[0].heads.sum(0), changed.layers[0].attention, rtol=1e-4, atol=1e-4)
    assert str(first_difference(differences(changed, plain))) == "layer 1: queries"


class StudentAttention(nn.Module):
    """An attention as a student might write it, with the write-up's names and nothing else."""

    def __init__(self, theirs, causal, mistake):
        super().__init__()
        for part in ("query", "key", "value", "output"):
            setattr(self, f"compute_{part}", getattr(theirs, f"compute_{part}"))
        self.rotate, self.causal, self.mistake = theirs, causal, mistake

    def compute_query_key_value_scores(self, query, key, value):
        scores = query @ key.transpose(2, 3) / query.shape[-1] ** (1.0 if self.mistake == "scale" else 0.5)
        if self.causal:
            scores = scores + torch.full(scores.shape[-2:], -math.inf).triu(1)
        return scores.softmax(-1) @ value

    def forward(self, x, mask=None, only=None, cache=None, layer_id=0):
        from rope import apply_rotary_emb

        config = self.rotate.config
        query, key, value = (getattr(self, f"compute_{part}")(x) for part in ("query", "key", "value"))
        query = query.view(*x.shape[:2], 4, 8)
        key, value = (part.view(*x.shape[:2], 2, 8) for part in (key, value))
        if self.mistake != "positions":
            query, key = apply_rotary_emb(query, key, 8, config.max_seq_len)
        key, value = (part.repeat_interleave(2, dim=2) for part in (key, value))
        mixed = self.compute_query_key_value_scores(*(part.transpose(1, 2) for part in (query, key, value)))
        return self.compute_output(mixed.transpose(1, 2).reshape(x.shape))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    "mistake, stage",
    [("", None), ("positions", "layer 2: queries with positions"), ("scale", "layer 2: weighted values")],
)
def test_a_students_model_is_compared_with_the_reference(causal, mistake, stage):
    model, student = (tiny_llama(norm="rmsnorm", causal=causal) for _ in range(2))
    student.layers[1].attention = StudentAttention(student.layers[1].attention, causal, mistake)
    found = first_difference(differences(trace(student, ids()), trace(model, ids())))
    assert (None if found is None else str(found)) == stage


def test_only_models_of_one_shape_are_compared():
    one = trace(tiny_llama(), ids())
    with pytest.raises(ValueError, match="different tokens"):
        differences(one, trace(tiny_llama(), ids(5)))
    with pytest.raises(ValueError, match="2 layers and the other 3"):
        differences(one, trace(tiny_llama(n_layers=3), ids()))
    with pytest.raises(ValueError, match="keys: one model has the shape"):
        differences(one, trace(tiny_llama(n_kv_heads=4), ids()))
