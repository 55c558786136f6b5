"""Text generation: logits filters, each a pure function of logits, and the decoding loops over any model.

Order: repetition penalty, temperature, the filters, then renormalise (softmax), then sample. A filter cuts a token by
setting its logit to -inf, row by row, and always keeps at least one: the row's arg-max, or in typical sampling the
token whose surprise is nearest to the entropy.

A model with a cache computes each token once; past its context, where the first tokens fall out and all others move,
and without a cache, the whole window is computed for each new token. What is chosen is the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from operator import itemgetter
from typing import Any, Protocol

import torch
from torch import Tensor

Filter = Callable[[Tensor], Tensor]  # logits (..., V) -> (..., V)
BANNED = -1e30  # a logit below all others; finite, for an infinite one tells of damaged weights


class Config(Protocol):
    """What decoding needs to know of a model's config."""

    @property
    def max_seq_len(self) -> int: ...


class LanguageModel(Protocol):
    """What decoding needs of a model: a context length, and logits (B, 1, V) of each row's last real token, (B, T, V)
    with `targets`. One that has `new_cache` takes what that returns as `cache`.
    """

    @property
    def config(self) -> Config: ...

    @property
    def __call__(self) -> Callable[..., tuple[Tensor, Tensor]]: ...


# Filters


def cut(logits: Tensor, dropped: Tensor) -> Tensor:
    """The logits with those `dropped` (bool, the same shape) at -inf, but for each row's arg-max."""
    return logits.masked_fill(dropped.scatter(-1, logits.argmax(-1, keepdim=True), False), -math.inf)


def epsilon_filter(logits: Tensor, epsilon: float) -> Tensor:
    """Keeps the tokens with probability >= epsilon (arXiv 2210.15191); logits (..., V) -> (..., V).

    The course's 0.05 keeps at most 20 tokens; the paper suggests 3e-4 to 9e-4. 0 keeps everything.
    """
    return cut(logits, logits.softmax(-1) < epsilon)


def eta_filter(logits: Tensor, eta: float) -> Tensor:
    """Keeps probability >= min(eta, sqrt(eta) exp(-H)), H the row's entropy in nats (arXiv 2210.15191): the flatter the
    row, the lower the bar. The paper suggests 3e-4 to 4e-3.
    """
    log_probabilities = logits.log_softmax(-1)
    bar = (math.sqrt(eta) * torch.exp(-entropy(log_probabilities))).clamp(max=eta)
    return cut(logits, log_probabilities.exp() < bar)


def top_k_filter(logits: Tensor, k: int) -> Tensor:
    """Keeps the k likeliest tokens, and what is just as likely as the last of them. Raises ValueError for k below 1."""
    if k < 1:
        raise ValueError(f"k is {k}; it must be 1 or more")
    if k >= logits.shape[-1]:
        return logits
    return cut(logits, logits < logits.topk(k, dim=-1).values[..., -1:])


def top_p_filter(logits: Tensor, p: float) -> Tensor:
    """Keeps the likeliest tokens, as few as have probability p together (nucleus sampling, arXiv 1904.09751)."""
    ordered, order = logits.sort(dim=-1, descending=True)
    probabilities = ordered.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities  # of all likelier ones
    return cut(logits, torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, before >= p))


def min_p_filter(logits: Tensor, p: float) -> Tensor:
    """Keeps probability >= p times that of the likeliest token (arXiv 2407.01082)."""
    return cut(logits, logits < logits.amax(-1, keepdim=True) + math.log(p))


def typical_filter(logits: Tensor, mass: float) -> Tensor:
    """Keeps the tokens whose surprise -log p is nearest to the row's entropy, as few as have probability `mass`
    together, and what is just as near as the last of them (arXiv 2202.00666). The nearest is always kept. The arg-max
    is cut where it is not typical.
    """
    log_probabilities = logits.log_softmax(-1)
    distance = (-log_probabilities - entropy(log_probabilities)).abs()
    ordered, order = distance.sort(-1)
    reached = logits.gather(-1, order).softmax(-1).cumsum(-1)
    last = (reached < mass).sum(-1, keepdim=True).clamp(max=logits.shape[-1] - 1)
    return logits.masked_fill(distance > ordered.gather(-1, last), -math.inf)


def entropy(log_probabilities: Tensor) -> Tensor:
    """(..., V) -> (..., 1), in nats; what is impossible adds nothing."""
    return -(log_probabilities.exp() * log_probabilities).nan_to_num(nan=0.0).sum(-1, keepdim=True)


def repetition_penalised(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Logits of the tokens that a row has seen, divided by the penalty where positive and multiplied by it where
    negative (arXiv 1909.05858); logits (B, V), seen (B, T) -> (B, V). 1 changes nothing.
    """
    if penalty == 1.0:
        return logits
    before = logits.gather(-1, seen)
    return logits.scatter(-1, seen, torch.where(before > 0, before / penalty, before * penalty))


# One draw


def distribution(logits: Tensor, temperature: float, filters: Sequence[Filter]) -> Tensor:
    """What is drawn from: probabilities, float32, of logits (..., V) after temperature (above 0) and filters."""
    logits = logits.float()
    logits = logits.masked_fill(logits <= BANNED / 2, -math.inf)  # at no temperature is a banned token drawn
    # Shifted before the division: at a tiny temperature the quotients overflow, all but the likeliest one's, which is 0
    # (or 0 / 0, where the temperature itself vanishes in float32).
    logits = ((logits - logits.amax(-1, keepdim=True)) / temperature).nan_to_num(nan=0.0, neginf=-math.inf)
    for kept in filters:
        logits = kept(logits)
    return logits.softmax(-1)


def check_finite(logits: Tensor) -> None:
    """Raises ValueError if the logits are not finite."""
    if not logits.sum(dtype=torch.float32).isfinite():  # NaN and infinity, of either sign or both, stay in a sum
        raise ValueError(
            f"the model's logits ({logits.dtype}) hold NaN or infinity; damaged weights, or try --dtype fp32"
        )


def next_token(
    logits: Tensor,
    temperature: float,
    epsilon: float = 0.0,
    generator: torch.Generator | None = None,
    filters: Sequence[Filter] = (),
) -> Tensor:
    """Chooses one token a row: logits (B, V) -> ids (B,). Temperature 0 takes the arg-max.

    Raises ValueError if the logits are not finite.
    """
    check_finite(logits)
    if temperature == 0.0:
        return logits.argmax(-1)
    if epsilon > 0.0:
        filters = (lambda logits: epsilon_filter(logits, epsilon), *filters)
    return torch.multinomial(distribution(logits, temperature, filters), 1, generator=generator).squeeze(-1)


def check_settings(max_new_tokens: int, temperature: float, epsilon: float, repetition_penalty: float = 1.0) -> None:
    """Raises ValueError for a decoding setting out of its range."""
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be 0 or more")
    if not (0.0 <= temperature < math.inf):
        raise ValueError(f"temperature is {temperature}; it must be 0 (greedy) or a finite number above")
    if not 0.0 <= epsilon < 1.0:
        raise ValueError(f"epsilon is {epsilon}; it must be in [0, 1)")
    if not 0.01 <= repetition_penalty <= 100.0:  # with a few zeros more logits leave the range of their numbers
        raise ValueError(f"repetition_penalty is {repetition_penalty}; it must be from 0.01 to 100 (1 changes nothing)")


def check_prompts(idx: Tensor, attention_mask: Tensor | None) -> Tensor | None:
    """The mask as bool. Raises ValueError for an empty or right-padded prompt, and for a mask of another shape."""
    if idx.dim() != 2 or 0 in idx.shape:
        raise ValueError(f"idx has shape {tuple(idx.shape)}; it must be (batch, tokens) with at least one of each")
    if attention_mask is not None:
        if attention_mask.shape != idx.shape:
            raise ValueError(
                f"attention_mask has shape {tuple(attention_mask.shape)}, idx {tuple(idx.shape)}; they must be the same"
            )
        attention_mask = attention_mask.to(torch.bool)
        if not attention_mask[:, -1].all():
            raise ValueError("a prompt ends in padding; pad prompts of unequal length on the left")
    return attention_mask


def check_one_prompt(idx: Tensor, decoder: str) -> None:
    """Raises ValueError unless idx is (1, T), for a decoder that takes one prompt."""
    check_prompts(idx, None)
    if idx.shape[0] != 1:
        raise ValueError(f"{decoder} takes one prompt, not {idx.shape[0]}")


# Reading


class Reader:
    """A model that reads a growing text: through its cache while the text fits the context, then window by window.

    banned_ids: tokens that are never to be generated; their logits are `BANNED`.
    """

    def __init__(
        self, model: LanguageModel, capacity: int, use_cache: bool = True, banned_ids: Sequence[int] = ()
    ) -> None:
        self.model = model
        self.banned_ids = list(banned_ids)
        self.context = model.config.max_seq_len
        new_cache = getattr(model, "new_cache", None)
        self.cache: Any = new_cache(min(capacity, self.context)) if new_cache is not None and use_cache else None

    def __call__(self, tokens: Tensor, attention_mask: Tensor | None = None, **options: Any) -> tuple[Tensor, Tensor]:
        """What the model says of the whole text tokens (B, T) after having read it before up to the cache's length."""
        logits, hidden = self._read(tokens, attention_mask, **options)
        if self.banned_ids:
            wide = logits.to(torch.promote_types(logits.dtype, torch.float32))  # BANNED is infinity in float16
            logits = wide.index_fill(-1, tokens.new_tensor(self.banned_ids), BANNED)
        return logits, hidden

    def _read(self, tokens: Tensor, attention_mask: Tensor | None, **options: Any) -> tuple[Tensor, Tensor]:
        end = tokens.shape[1]
        if self.cache is None or end > self.context:
            self.cache = None  # the first tokens fall out now and all others move
            window = slice(max(0, end - self.context), end)
            mask = None if attention_mask is None else attention_mask[:, window]
            return self.model(tokens[:, window], attention_mask=mask, **options)
        new = slice(self.cache.length, end)
        # Only a prompt has padding; what is generated has none.
        mask = attention_mask[:, new] if attention_mask is not None and new.start == 0 else None
        return self.model(tokens[:, new], attention_mask=mask, cache=self.cache, **options)


# Decoding


@torch.no_grad()
def stream(
    model: LanguageModel,
    idx: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    epsilon: float = 0.05,
    filters: Sequence[Filter] = (),
    repetition_penalty: float = 1.0,
    attention_mask: Tensor | None = None,
    eos_ids: Sequence[int] = (),
    generator: torch.Generator | None = None,
    use_cache: bool = True,
    banned_ids: Sequence[int] = (),
    watch: Callable[[Tensor, Tensor], None] | None = None,
) -> Iterator[Tensor]:
    """The tokens (B,) that follow the prompts of idx (B, T), one step after the other, as they are chosen.

    attention_mask: bool (B, T), True for real tokens; prompts of unequal length are padded on the left, so that each
    row's continuation follows its prompt (rotary positions are relative: a shift changes nothing). eos_ids: a row that
    produced one of them goes on with the first, and the stream ends once every row did. Past the model's context the
    window slides. Draws come from `generator` (on idx's device), else from torch's default one. watch: is told of each
    step the logits (B, V), after the repetition penalty, and what was chosen (B,). banned_ids: tokens that are never
    chosen.

    Raises ValueError for an empty or right-padded prompt and for settings out of range.
    """
    check_settings(max_new_tokens, temperature, epsilon, repetition_penalty)
    attention_mask = check_prompts(idx, attention_mask)
    tokens = torch.cat((idx, idx.new_empty(idx.shape[0], max_new_tokens)), dim=1)
    if attention_mask is not None:
        new = torch.ones(idx.shape[0], max_new_tokens, dtype=torch.bool, device=idx.device)
        attention_mask = torch.cat((attention_mask, new), dim=1)
    ends = idx.new_tensor(list(eos_ids))
    finished = torch.zeros(idx.shape[0], dtype=torch.bool, device=idx.device)
    read = Reader(model, tokens.shape[1], use_cache, banned_ids)
    for end in range(idx.shape[1], tokens.shape[1]):
        mask = None if attention_mask is None else attention_mask[:, :end]
        logits = read(tokens[:, :end], mask)[0][:, -1]
        if repetition_penalty != 1.0:
            check_finite(logits)
            seen = tokens[:, :end] if mask is None else torch.where(mask, tokens[:, :end], tokens[:, end - 1 : end])
            logits = repetition_penalised(logits, seen, repetition_penalty)  # padding was not seen, the last token was
        chosen = next_token(logits, temperature, epsilon, generator, filters)
        if watch is not None:
            watch(logits, chosen)
        if len(ends):
            chosen = torch.where(finished, ends[0], chosen)
            finished |= torch.isin(chosen, ends)
        tokens[:, end] = chosen
        yield chosen
        if len(ends) and finished.all():
            return


def generate(model: LanguageModel, idx: Tensor, max_new_tokens: int, **settings: Any) -> Tensor:
    """Continues every prompt of idx (B, T) by max_new_tokens: int64 (B, T + max_new_tokens). Settings are those of
    `stream`; where that ends early, the rest is filled with the first of `eos_ids`.
    """
    new = list(stream(model, idx, max_new_tokens, **settings))
    tokens = torch.cat((idx, *(chosen[:, None] for chosen in new)), dim=1)
    missing = max_new_tokens - len(new)
    return torch.cat((tokens, tokens.new_full((len(tokens), missing), (*settings.get("eos_ids", ()), 0)[0])), dim=1)


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
    """The likeliest continuation found of one prompt, idx (1, T) -> (T + new,), and its score: the sum of its tokens'
    log-probabilities / (their number ** length_penalty), so that a penalty above 0 favours longer ones.

    `beams` beginnings are kept at each step, and the best continuation that ended in one of eos_ids; the search goes on
    until nothing is open that can beat it, or max_new_tokens. Raises ValueError for settings out of range.
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
        # As many again as beams: at most half of the best end, per ending.
        allowed = candidates.numel() - len(candidates) * len(read.banned_ids)
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
        longest = max_new_tokens if length_penalty > 0 else new  # where what is open may yet score best
        if not len(kept) or float(scores[0]) / longest**length_penalty <= done[0]:
            break
    open_ones = [(float(score) / new**length_penalty, row) for score, row in zip(scores, tokens, strict=True)]
    score, row = max([done, *open_ones], key=itemgetter(0))
    return row, score


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
    """Continues one prompt, idx (1, T) -> (T + new,), each time by that of the k likeliest tokens v for which
    (1 - alpha) p(v) - alpha (the largest cosine of v's hidden state with that of any token before) is largest
    (arXiv 2202.06417). Raises ValueError for settings out of range.
    """
    check_settings(max_new_tokens, 0.0, 0.0)
    check_one_prompt(idx, "contrastive search")
    if k < 1 or not 0.0 <= alpha <= 1.0:
        raise ValueError(f"k is {k} and alpha {alpha}; k must be 1 or more, alpha in [0, 1]")
    tokens = idx
    read = Reader(model, idx.shape[1] + max_new_tokens, use_cache, banned_ids)
    logits, states = read(tokens)  # (1, 1, V), (1, T, D)
    for _ in range(max_new_tokens):
        check_finite(logits)
        # By logits, of which none is equal to a banned one, as probabilities that vanish are.
        likely = logits[0, -1].float().topk(min(k, logits.shape[-1] - len(read.banned_ids))).indices
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
    """Continues one prompt, idx (1, T) -> (T + new,), guessing what follows from the text so far, and having the model
    check all guessed tokens in one pass: what is kept is what `stream` would have chosen, in distribution, and at
    temperature 0 token for token (speculative sampling, arXiv 2211.17192, with prompt look-up for a draft).

    A guess is what followed the last occurrence of the text's last tokens, `longest_match` of them or fewer. Each is
    certain, so it is accepted with the probability that the model gives it; the first that is not is replaced by a draw
    from the others. Pays where text repeats itself. Raises ValueError for settings out of range, and for a model
    without a cache.
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
        raise ValueError("look-up decoding needs a causal model, whose cache it checks the guesses with")
    while len(text) < goal:
        room = min(goal, read.context) - len(text) - 1
        guess = guessed(text, longest_match)[: max(0, min(draft_tokens, room))]
        tokens = idx.new_tensor([text + guess])
        logits = read(tokens, targets=tokens)[0][0, -1 - len(guess) :]  # after the text, and after each guess
        check_finite(logits)
        for place, row in enumerate(logits):
            proposed = guess[place] if place < len(guess) else None
            text.append(_checked(row, proposed, temperature, filters, generator))
            if text[-1] != proposed or text[-1] in eos_ids:
                break
        if read.cache is not None:
            read.cache.keep(len(text) - 1)
        if text[-1] in eos_ids:
            break
    return idx.new_tensor(text)


def guessed(text: list[int], longest_match: int) -> list[int]:
    """What followed the last occurrence, before its end, of as many of the text's last tokens as occur together."""
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
    """A token drawn as always, given one that was proposed for certain: that, or else one of the others."""
    if temperature == 0.0:
        return int(logits.argmax())
    probabilities = distribution(logits, temperature, filters)
    if proposed is not None:
        if torch.rand((), generator=generator, device=logits.device) < probabilities[proposed]:
            return proposed
        probabilities[proposed] = 0.0
    return int(torch.multinomial(probabilities, 1, generator=generator))
