"""Beam search for the most probable whole continuation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import itemgetter

import torch
from torch import Tensor

from minillama.decoding.filters import check_finite
from minillama.decoding.sampling import LanguageModel, Reader, check_one_prompt, check_settings


@torch.no_grad()
def beam_search(
    model: LanguageModel,
    idx: Tensor,
    max_new_tokens: int,
    *,
    beams: int = 4,
    length_penalty: float = 1.0,
    eos_ids: Sequence[int] = (),
    banned_ids: Sequence[int] = (),
    use_cache: bool = True,
) -> tuple[Tensor, float]:
    """The best continuation found for one prompt, idx (1, T) -> (T + new,), and its score.

    The score is the sum of the new tokens' log-probabilities / (their number ** length_penalty). A penalty above 0
    favours longer continuations. Each step keeps `beams` open continuations, and the best one that ended in one of
    eos_ids. The search stops when no open one can become better, or after max_new_tokens. Raises ValueError for
    settings out of range.
    """
    check_settings(max_new_tokens, 0.0, 0.0)
    check_one_prompt(idx, "beam search")
    if beams < 1:
        raise ValueError(f"beams is {beams}; it must be 1 or more")
    if not -10.0 <= length_penalty <= 10.0:
        raise ValueError(f"length_penalty is {length_penalty}; it must be from -10 to 10")
    tokens, scores = idx, idx.new_zeros(1, dtype=torch.float32)
    ends = idx.new_tensor(list(eos_ids))
    done, new = (-math.inf, idx[0]), 1
    read = Reader(model, idx.shape[1] + max_new_tokens, use_cache, banned_ids)
    for new in range(1, max_new_tokens + 1):
        logits = read(tokens)[0][:, -1]
        check_finite(logits)
        candidates = scores[:, None] + logits.float().log_softmax(-1)  # (beams, V)
        # Enough candidates to keep `beams` open: each beam has at most one candidate for each end token.
        allowed = candidates.numel() - len(candidates) * len(read.banned)
        best = candidates.flatten().topk(min(beams * (1 + len(ends)), allowed))
        rows, chosen = best.indices // candidates.shape[1], best.indices % candidates.shape[1]
        ended = torch.isin(chosen, ends)
        grown = torch.cat((tokens[rows], chosen[:, None]), dim=1)
        for place in ended[:beams].nonzero().flatten().tolist():
            done = max(done, (float(best.values[place]) / new**length_penalty, grown[place]), key=itemgetter(0))
        kept = (~ended).nonzero().flatten()[:beams]
        tokens, scores = grown[kept], best.values[kept]
        if read.cache is not None:
            read.cache.take(rows[kept])
        longest = max_new_tokens if length_penalty > 0 else new  # the length at which an open one scores best
        if not len(kept) or float(scores[0]) / longest**length_penalty <= done[0]:
            break
    open_ones = [(float(score) / new**length_penalty, row) for score, row in zip(scores, tokens, strict=True)]
    score, row = max([done, *open_ones], key=itemgetter(0))
    return row, score
