"""The key/value cache: however a text is cut, the logits are those of one pass."""

from __future__ import annotations

import pytest
import torch

from llama import KVCache, load_pretrained
from models import random_ids, read_in_parts, tiny_llama


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
def test_one_pass_is_one_prefill_is_chunks_is_token_by_token(dtype, tolerance, kv_heads, padded, norm):
    model = tiny_llama(causal=True, n_kv_heads=kv_heads, norm=norm).to(dtype)
    ids = random_ids(3, 20)
    mask = None
    if padded:
        mask = torch.ones(3, 20, dtype=torch.bool)
        mask[0, :5] = mask[2, :9] = False
    whole = model(ids, ids, mask)[0]
    for parts in ([20], [7, 13], [1, 19], [12, 1, 1, 3, 3], [1] * 20):
        torch.testing.assert_close(read_in_parts(model, ids, mask, parts), whole, rtol=0, atol=tolerance)


def test_the_cache_of_a_real_model_agrees(asset):
    model = load_pretrained(asset("stories260K/stories260K_v1.bin")).double()
    ids = torch.randint(512, (2, 150), generator=torch.Generator().manual_seed(0))
    whole = model(ids, ids)[0]
    for parts in ([150], [100, 50], [1] * 150):
        torch.testing.assert_close(read_in_parts(model, ids, None, parts), whole, rtol=0, atol=1e-9)


def test_what_a_cache_forgets_leaves_no_trace_and_rows_can_be_taken():
    model, ids = tiny_llama(causal=True).double(), random_ids(2, 12)
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[0, :2] = False
    cache = model.new_cache()
    model(ids[:, :5], attention_mask=mask, cache=cache)
    model(random_ids(2, 4, seed=9), cache=cache)
    cache.keep(5)
    cache.take(torch.tensor([1, 0, 1]))
    got = model(ids[[1, 0, 1], 5:], ids[:, 5:], cache=cache)[0]
    long = torch.cat((mask, torch.ones(2, 7, dtype=torch.bool)), dim=1)
    torch.testing.assert_close(got, model(ids, ids, long)[0][[1, 0, 1], 5:], rtol=0, atol=1e-9)


def test_padding_that_a_cache_forgets_hides_nothing_and_no_more_than_there_is_is_kept():
    model, ids = tiny_llama(causal=True).double(), random_ids(2, 9)
    cache = model.new_cache()
    model(ids[:, :4], cache=cache)
    cache.keep(7)
    assert cache.length == 4
    hidden = torch.tensor([[True, False, False], [False, True, False]])
    model(random_ids(2, 3, seed=9), attention_mask=hidden, cache=cache)
    cache.keep(4)
    got = model(ids[:, 4:], ids[:, 4:], cache=cache)[0]
    torch.testing.assert_close(got, model(ids, ids)[0][:, 4:], rtol=0, atol=1e-9)


def test_key_value_heads_are_stored_once_and_no_more_than_there_is_room_for():
    model = tiny_llama(causal=True, n_kv_heads=2)
    cache = model.new_cache(capacity=9)
    model(random_ids(3, 4), cache=cache)
    assert cache.keys[1].shape == cache.values[0].shape == (3, 2, 9, 8) and cache.length == 4
    with pytest.raises(ValueError, match="4 tokens are cached and 6 more do not fit into 9; start again with the last"):
        model(random_ids(3, 6), cache=cache)
    assert cache.length == 4
    model(random_ids(3, 5), cache=cache)
    assert model.new_cache(10**9).capacity == model.new_cache().capacity == model.config.max_seq_len


def test_a_bidirectional_model_has_no_cache():
    model = tiny_llama(causal=False)
    assert model.new_cache() is None and tiny_llama(causal=True, use_cache=False).new_cache() is None
    with pytest.raises(ValueError, match="a bidirectional model cannot use a cache"):
        KVCache(model.config)
