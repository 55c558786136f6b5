"""The decoder for CUDA on the CPU: its step against the ordinary one, with a recording of operations as the graph."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minillama.decoding import cuda_decoder
from minillama.decoding.beam_search import beam_search
from minillama.decoding.contrastive_search import contrastive_search
from minillama.decoding.fast_llama import InferenceLlama
from minillama.decoding.lookup import lookup_decoding
from minillama.decoding.sampling import generate, stream
from models import padded, random_ids, tiny_llama

PROMPTS, MASK = padded([random_ids(1, length, seed=length)[0] for length in (7, 3, 5)], "left")


class Recording(TorchDispatchMode):
    """A stand-in for a CUDA graph: `replay` repeats the operations of a function on the same memory, and no Python."""

    def __init__(self, step) -> None:
        super().__init__()
        self.operations = []
        with self:
            self.results = step()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.operations.append((func, args, kwargs or {}, result))
        return result

    def replay(self):
        for func, args, kwargs, result in self.operations:
            views = storages(result) & storages((args, kwargs))
            if func._schema.is_mutable:
                func(*args, **kwargs)
            elif not views:
                for kept, new in zip(tree_leaves(result), tree_leaves(func(*args, **kwargs)), strict=True):
                    if isinstance(kept, torch.Tensor):  # the size of an array is a result, too
                        kept.copy_(new)
        return self.results


def storages(values) -> set[int]:
    """The addresses of the memory of all tensors; oneDNN's packed weights have none."""
    tensors = (one for one in tree_leaves(values) if isinstance(one, torch.Tensor) and not one.is_mkldnn)
    return {one.untyped_storage().data_ptr() for one in tensors}


@pytest.fixture
def graphs(monkeypatch):
    """The decoder for CUDA in use, with recordings as its graphs. The recordings made are in `.made`."""
    seen = SimpleNamespace(made=[], fails=None)

    def capture(step):
        if seen.fails is not None:
            raise seen.fails
        seen.made.append(Recording(step))
        return seen.made[-1].replay

    monkeypatch.setattr(cuda_decoder, "covers", lambda config, device: config.causal)
    monkeypatch.setattr(cuda_decoder, "Capture", lambda device: capture)
    monkeypatch.setattr(cuda_decoder, "FEWEST_KEYS", 4)
    return seen


def with_and_without(tell=lambda line: None, quantize=None, **changes):
    """The model with graphs, and the one without."""
    model = tiny_llama(**{"causal": True, "max_seq_len": 24} | changes)
    plain = InferenceLlama(copy.deepcopy(model), quantize=quantize, rows=3)
    plain.graphs = None
    return InferenceLlama(model, quantize=quantize, rows=3, tell=tell), plain


def read(model, ids, mask=None, prompt=5, cache=None):
    """Logits and hidden states of all tokens after a prompt, read one by one."""
    cache = model.new_cache(ids.shape[1]) if cache is None else cache
    model(ids[:, :prompt], attention_mask=None if mask is None else mask[:, :prompt], cache=cache)
    return [model(ids[:, end : end + 1], cache=cache) for end in range(prompt, ids.shape[1])]


@pytest.mark.parametrize(
    "changes",
    [
        {"norm": "rmsnorm", "n_kv_heads": 2},
        {"norm": "layernorm", "n_kv_heads": 4, "tie_embeddings": False},
        {"n_kv_heads": 1, "sliding_window": 6},
        {"quantize": "int8"},
    ],
    ids=str,
)
@pytest.mark.parametrize("rows", [1, 3])
def test_each_token_has_the_logits_of_the_ordinary_step(graphs, changes, rows):
    ours, plain = with_and_without(**changes)
    ids = random_ids(rows, 24)
    found, wanted = read(ours, ids), read(plain, ids)
    for ours_at, plain_at in zip(found, wanted, strict=True):
        for one, other in zip(ours_at, plain_at, strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    assert len(graphs.made) == 3  # for 8, 16 and 24 keys


def test_padding_is_hidden(graphs):
    ours, plain = with_and_without()
    assert generate(ours, PROMPTS, 12, temperature=0.0, attention_mask=MASK).equal(
        generate(plain, PROMPTS, 12, temperature=0.0, attention_mask=MASK)
    )
    assert graphs.made


def test_a_second_prompt_takes_the_same_graphs(graphs):
    ours, plain = with_and_without()
    for seed, length in ((1, 9), (2, 5), (3, 11)):
        ids = random_ids(1, length, seed=seed)
        assert generate(ours, ids, 12, temperature=0.0).equal(generate(plain, ids, 12, temperature=0.0))
    assert len(graphs.made) == 3


def test_a_longer_text_and_more_rows_get_arrays_of_their_own(graphs):
    ours, plain = with_and_without()
    for ids, new in ((PROMPTS[:1], 4), (PROMPTS[:1], 12), (PROMPTS, 12), (PROMPTS[:2], 3)):
        assert generate(ours, ids, new, temperature=0.0).equal(generate(plain, ids, new, temperature=0.0))


def test_two_texts_at_once_do_not_disturb_each_other(graphs):
    ours, plain = with_and_without()
    texts = [
        [stream(model, PROMPTS[row : row + 1], 12, temperature=0.0) for row in range(3)] for model in (ours, plain)
    ]
    for _ in range(12):
        for one, other in zip(*texts, strict=True):
            assert next(one).equal(next(other))


def test_what_an_earlier_text_left_behind_has_no_effect(graphs):
    ours, plain = with_and_without()
    cache = ours.new_cache()
    read(ours, random_ids(1, 24), cache=cache)
    for array in (*cache.keys, *cache.values):
        array.fill_(torch.nan)
    ids = random_ids(1, 12)
    torch.testing.assert_close(read(ours, ids)[-1][0], read(plain, ids)[-1][0], atol=1e-5, rtol=1e-5)


def test_all_decoders_find_the_same_text(graphs):
    ours, plain = with_and_without()
    prompt = PROMPTS[:1]
    assert beam_search(ours, prompt, 12)[0].equal(beam_search(plain, prompt, 12)[0])
    assert contrastive_search(ours, prompt, 12).equal(contrastive_search(plain, prompt, 12))
    assert lookup_decoding(ours, prompt, 12).equal(lookup_decoding(plain, prompt, 12))
    assert graphs.made


def test_past_the_context_too(graphs):
    ours, plain = with_and_without(max_seq_len=12)
    assert generate(ours, PROMPTS, 12, temperature=0.0).equal(generate(plain, PROMPTS, 12, temperature=0.0))


def test_a_full_cache_is_named(graphs):
    ours, _ = with_and_without()
    cache = ours.new_cache(6)
    read(ours, random_ids(1, 6), cache=cache)
    with pytest.raises(ValueError, match="6 tokens are cached and 1 more do not fit into 6"):
        ours(random_ids(1, 1), cache=cache)


def test_where_no_graph_can_be_made_the_text_is_the_same_and_one_line_says_why(graphs):
    lines = []
    ours, plain = with_and_without(tell=lines.append)
    steps = stream(ours, PROMPTS, 12, temperature=0.0)
    found = [next(steps) for _ in range(3)]
    graphs.fails = torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 20 MiB")
    found += list(steps)
    assert torch.stack(found, 1).equal(generate(plain, PROMPTS, 12, temperature=0.0)[:, 7:])
    assert lines == [
        "notice: text comes at about half the speed, because CUDA could not capture a step "
        "(OutOfMemoryError: CUDA out of memory. Tried to allocate 20 MiB)"
    ]


def test_the_cpu_and_models_with_alibi_take_the_ordinary_path():
    assert InferenceLlama(tiny_llama(causal=True)).graphs is None
    cuda = torch.device("cuda")
    kinds = {"causal": {"causal": True}, "alibi": {"causal": True, "position_embedding_type": "alibi"}, "both ways": {}}
    covered = {name: cuda_decoder.covers(tiny_llama(**kind).config, cuda) for name, kind in kinds.items()}
    assert covered == {"causal": True, "alibi": False, "both ways": False}
