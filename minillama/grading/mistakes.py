"""The known mistakes: a name, a sentence for the student, the right formula, and the place in the code.

Each is a switch of the second implementation (answers.py), so a wrong answer can be looked up among their answers.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

from minillama.grading import mistakes_model, mistakes_training
from minillama.grading.kit_setups import Setup

# Where each part belongs.
PLACES: dict[str, str] = {
    "norm": "llama.py, forward of the norm",
    "rope": "rope.py, apply_rotary_emb",
    "scores": "llama.py, Attention.compute_query_key_value_scores",
    "attention": "llama.py, Attention.forward",
    "block": "llama.py, LlamaLayer.forward",
    "model": "llama.py, Llama.forward",
    "generate": "llama.py, Llama.generate",
    "adamw": "optimizer.py, AdamW.step",
    "zero_shot": "classifier.py, LlamaZeroShotClassifier.forward",
    "classifier": "classifier.py, LlamaEmbeddingClassifier",
    "lora": "lora.py",
}


def right_formula(part: str, setup: Setup) -> str:
    """The right formula of a part in a setup."""
    x, size, bias = ("(x - mean)", "variance", " + bias") if setup.norm == "layernorm" else ("x", "mean(x^2)", "")
    root = f"sqrt({size} + eps)" if setup.eps == "inside" else f"(sqrt({size}) + eps)"
    pair = "2i and 2i + 1" if setup.pairing == "interleaved" else "i and i + hd/2"
    kept = {
        "temperature": "temperature 0: the most likely token",
        "epsilon": "without the tokens below epsilon",
        "top_p": "the fewest tokens with total probability top_p",
        "min_p": "without the tokens below min_p times the largest p",
    }
    return {
        "norm": f"{x} / {root} * weight{bias} over the last axis",
        "rope": f"a' = a cos(t) - b sin(t), b' = a sin(t) + b cos(t), a and b the features {pair} of a head, "
        f"t = {'' if setup.sign == 'plus' else '-'}position theta^(-2i/hd)",
        "scores": "softmax(query key^T / sqrt(hd) + mask) value, mask -inf above the diagonal"
        if setup.causal_argument
        else "softmax(query key^T / sqrt(hd)) value",
        "attention": "compute_output(scores(rope(query), rope(key), value)), heads merged",
        "block": "h = x + attention(attention_norm(x)); h + w2(silu(w1 n) * w3 n), n = ffn_norm(h)",
        "model": "hidden = norm(layers(embedding)), logits = output(hidden[:, -1:])",
        "generate": f"p = softmax(logits / temperature), {kept[setup.sampling]}",
        "adamw": "p -= lr sqrt(1-b2^t)/(1-b1^t) m/(sqrt(v)+eps); then p -= lr weight_decay p",
        "zero_shot": "log_softmax(logits of the last position)[label's token]",
        "classifier": "log_softmax(classifier_head(dropout(hidden of the last position)))",
        "lora": "W x + (alpha / rank) B A x, W frozen, B zero at the start",
    }[part]


@dataclass(frozen=True)
class Mistake:
    """A known mistake. slots: the places in the code that it fills; see `can_be_together`. words: it is a mistake in
    the setups that have one of these (`Setup.words`); if empty, in all.
    """

    name: str  # PART.SHORT_NAME
    part: str
    sentence: str
    slots: frozenset[str] = frozenset()
    words: frozenset[str] = frozenset()

    @property
    def short_name(self) -> str:
        return self.name.partition(".")[2]


def _table() -> dict[str, Mistake]:
    found = {}
    for part in PLACES:
        for room in (mistakes_model, mistakes_training):
            for short_name, slots, sentence, *words in getattr(room, part.upper(), []):
                name = f"{part}.{short_name}"
                assert name not in found, f"{name} twice"
                found[name] = Mistake(
                    name, part, sentence, frozenset(slots.split()), frozenset(" ".join(words).split())
                )
    return found


MISTAKES: dict[str, Mistake] = _table()


def mistakes_of(part: str, setup: Setup) -> list[Mistake]:
    """The known mistakes of a part in a setup, in the order of the table."""
    of_part = [mistake for mistake in MISTAKES.values() if mistake.part == part]
    return [mistake for mistake in of_part if not mistake.words or mistake.words & setup.words]


def can_be_together(one: Mistake, other: Mistake) -> bool:
    """Whether both fit into one piece of code, and neither hides the other."""
    if one.part != other.part or one.slots & other.slots or "alone" in one.slots | other.slots:
        return False
    apart = mistakes_model.APART | mistakes_training.APART
    return not any({one.short_name, other.short_name} == {a, b} for part, a, b in apart if part == one.part)


def pairs_of(part: str, setup: Setup) -> list[tuple[Mistake, Mistake]]:
    """The pairs of mistakes of a part that can be made together."""
    return [pair for pair in combinations(mistakes_of(part, setup), 2) if can_be_together(*pair)]
