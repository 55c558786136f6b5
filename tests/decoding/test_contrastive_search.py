"""Contrastive search against its formula."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from minillama.decoding.contrastive_search import contrastive_search
from minillama.decoding.sampling import generate
from models import PROMPTS, tiny_llama


@torch.no_grad()
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("context", [64, 8])  # 8: the window slides
def test_contrastive_search_takes_the_likely_that_is_not_alike(context, causal):
    model, text = tiny_llama(causal=causal, max_seq_len=context), PROMPTS[0].tolist()
    for _ in range(8):
        probabilities = model(torch.tensor([text[-context:]]))[0][0, -1].softmax(-1)
        scores = {}
        for token in probabilities.topk(3).indices.tolist():
            hidden = model(torch.tensor([[*text, token][-context:]]))[1][0].double()
            likeness = max(float(torch.cosine_similarity(hidden[-1], one, dim=0)) for one in hidden[:-1])
            scores[token] = 0.4 * float(probabilities[token]) - 0.6 * likeness
        text.append(max(scores, key=scores.get))
    greedy = generate(model, PROMPTS[:1], 8, temperature=0.0)[0]
    for use_cache in (True, False):
        search = partial(contrastive_search, model, PROMPTS[:1], 8, use_cache=use_cache)
        assert search(k=3, alpha=0.6).tolist() == text
        assert torch.equal(search(alpha=0.0), greedy)
        assert torch.equal(search(k=1), greedy)
    end = text[len(PROMPTS[0]) + 3]
    ended = contrastive_search(model, PROMPTS[:1], 8, k=3, eos_ids=(end,)).tolist()
    assert ended == text[: text.index(end, len(PROMPTS[0])) + 1]


@pytest.mark.parametrize("k", [2, 5])
def test_contrastive_search_tries_no_banned_token_though_all_else_is_improbable(k):
    model = tiny_llama(vocab_size=5, causal=True)
    with torch.no_grad():
        model.norm.weight.mul_(500.0)  # so that most probabilities vanish
    found = contrastive_search(model, PROMPTS[:1] % 5, 12, k=k, alpha=0.99, banned_ids=(1, 3))
    assert not {1, 3} & set(found[5:].tolist())
