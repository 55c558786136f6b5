"""Contrastive search (arXiv 2202.06417): probable tokens that differ from the text so far."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from minillama.decoding.filters import check_finite
from minillama.decoding.sampling import LanguageModel, Reader, check_one_prompt, check_settings


@torch.no_grad()
def contrastive_search(
    model: LanguageModel,
    idx: Tensor,
    max_new_tokens: int,
    *,
    k: int = 4,
    alpha: float = 0.6,
    eos_ids: Sequence[int] = (),
    banned_ids: Sequence[int] = (),
    use_cache: bool = True,
) -> Tensor:
    """Continues one prompt, idx (1, T) -> (T + new,). Raises ValueError for settings out of range.

    Each step takes, among the k most probable tokens v, the one with the largest
    (1 - alpha) p(v) - alpha max_j cos(h_v, h_j). h_v is the hidden state of v, h_j that of an earlier token.
    """
    check_settings(max_new_tokens, 0.0, 0.0)
    check_one_prompt(idx, "contrastive search")
    if k < 1 or not 0.0 <= alpha <= 1.0:
        raise ValueError(f"k is {k} and alpha {alpha}; k must be 1 or more, alpha in [0, 1]")
    if model.config.max_seq_len < 2:
        raise ValueError("contrastive search needs a model with a context of 2 tokens or more; this one's is 1")
    tokens = idx
    read = Reader(model, idx.shape[1] + max_new_tokens, use_cache, banned_ids)
    logits, states = read(tokens)  # (1, 1, V), (1, T, D)
    for _ in range(max_new_tokens):
        check_finite(logits)
        # Ranked by logits, because rare tokens may have probability 0 like banned ones.
        likely = logits[0, -1].float().topk(min(k, logits.shape[-1] - len(read.banned))).indices
        probabilities = logits[0, -1].float().softmax(-1)[likely]
        tried = torch.cat((tokens.expand(len(likely), -1), likely[:, None]), dim=1)
        if read.cache is not None:
            read.cache.take(torch.zeros_like(likely))
        logits, found = read(tried)
        if read.cache is not None:
            found = torch.cat((states.expand(len(found), -1, -1), found), dim=1)  # (k, T + 1, D)
        directions = torch.nn.functional.normalize(found.float(), dim=-1)
        likeness = (directions[:, :-1] @ directions[:, -1:].transpose(1, 2)).amax((1, 2))  # (k,)
        best = ((1 - alpha) * probabilities - alpha * likeness).argmax()[None]
        tokens, logits, states = tried[best], logits[best], found[best]
        if read.cache is not None:
            read.cache.take(best)
        if int(tokens[0, -1]) in eos_ids:
            break
    return tokens[0]
