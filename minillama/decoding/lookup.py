"""Look-up decoding: draft tokens copied from the text so far, which the model checks in one pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from minillama.decoding.filters import Filter, check_finite, distribution, draw
from minillama.decoding.sampling import LanguageModel, Reader, check_one_prompt, check_settings


@torch.no_grad()
def lookup_decoding(
    model: LanguageModel,
    idx: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    filters: Sequence[Filter] = (),
    eos_ids: Sequence[int] = (),
    banned_ids: Sequence[int] = (),
    generator: torch.Generator | None = None,
    draft_tokens: int = 8,
    longest_match: int = 3,
) -> Tensor:
    """Continues one prompt, idx (1, T) -> (T + new,), by speculative sampling (arXiv 2211.17192) without a draft model.

    The result has the distribution of `stream`, and at temperature 0 the same tokens. Repetitive text is faster.

    The draft is the text after the last earlier occurrence of the last `longest_match` tokens, or of fewer. The model
    checks up to draft_tokens of it in one pass. A draft token is accepted with its probability under the model. The
    first rejected one is replaced by a draw from the other tokens. Raises ValueError for settings out of range, and
    for a model without a cache.
    """
    check_settings(max_new_tokens, temperature, 0.0)
    check_one_prompt(idx, "look-up decoding")
    if draft_tokens < 0:
        raise ValueError(f"draft_tokens is {draft_tokens}; it must be 0 or more")
    if longest_match < 1:
        raise ValueError(f"longest_match is {longest_match}; it must be 1 or more")
    text, goal = idx[0].tolist(), idx.shape[1] + max_new_tokens
    read = Reader(model, goal + draft_tokens, banned_ids=banned_ids)
    if read.cache is None:
        raise ValueError("look-up decoding needs a causal model with a cache")
    while len(text) < goal:
        room = min(goal, read.context) - len(text) - 1
        draft = find_draft(text, longest_match)[: max(0, min(draft_tokens, room))]
        tokens = idx.new_tensor([text + draft])
        logits = read(tokens, targets=tokens)[0][0, -1 - len(draft) :]  # after the text, and after each draft token
        check_finite(logits)
        for place, row in enumerate(logits):
            proposed = draft[place] if place < len(draft) else None
            text.append(_checked(row, proposed, temperature, filters, generator))
            if text[-1] != proposed or text[-1] in eos_ids:
                break
        if read.cache is not None:  # None once the text is longer than the context
            read.cache.keep(len(text) - 1)
        if text[-1] in eos_ids:
            break
    return idx.new_tensor(text)


def find_draft(text: list[int], longest_match: int) -> list[int]:
    """The tokens after the last earlier occurrence of the text's end, of the longest end that occurs earlier."""
    for size in range(min(longest_match, len(text) - 1), 0, -1):
        pattern = text[-size:]
        for start in range(len(text) - size - 1, -1, -1):
            if text[start : start + size] == pattern:
                return text[start + size :]
    return []


def _checked(
    logits: Tensor,
    proposed: int | None,
    temperature: float,
    filters: Sequence[Filter],
    generator: torch.Generator | None,
) -> int:
    """The proposed token, or another one if it is rejected."""
    if temperature == 0.0:
        return int(logits.argmax())
    probabilities = distribution(logits, temperature, filters)
    if proposed is not None:
        if torch.rand((), generator=generator, device=logits.device) < probabilities[proposed]:
            return proposed
        probabilities[proposed] = 0.0
    return int(draw(probabilities[None], generator))
