"""The known mistakes: a name, a sentence for the student, the right formula, and the place in the code.

Each is a switch of the second implementation (answers.py), so a wrong answer can be looked up among their answers.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

from minillama.grading import mistakes_model, mistakes_training
from minillama.grading.parts import PARTS

# The right formula of each part, and where it belongs.
FORMULAS: dict[str, tuple[str, str]] = {
    "norm": (
        "(x - mean) / sqrt(variance + eps) * weight + bias over the last axis",
        "llama.py, LayerNorm.forward (2024: RMSNorm.forward)",
    ),
    "rope": (
        "even' = even cos(a) - odd sin(a), odd' = even sin(a) + odd cos(a), a = position theta^(-2i/hd)",
        "rope.py, apply_rotary_emb",
    ),
    "scores": ("softmax(query key^T / sqrt(hd)) value", "llama.py, Attention.compute_query_key_value_scores"),
    "attention": ("compute_output(scores(rope(query), rope(key), value)), heads merged", "llama.py, Attention.forward"),
    "block": (
        "h = x + attention(attention_norm(x)); h + w2(silu(w1 n) * w3 n), n = ffn_norm(h)",
        "llama.py, LlamaLayer.forward",
    ),
    "model": ("hidden = norm(layers(embedding)), logits = output(hidden[:, -1:])", "llama.py, Llama.forward"),
    "generate": ("p = softmax(logits / temperature), without the tokens below epsilon", "llama.py, Llama.generate"),
    "adamw": (
        "p -= lr sqrt(1-b2^t)/(1-b1^t) m/(sqrt(v)+eps); then p -= lr weight_decay p",
        "optimizer.py, AdamW.step",
    ),
    "zero_shot": (
        "log_softmax(logits of the last position)[label's token]",
        "classifier.py, LlamaZeroShotClassifier.forward",
    ),
    "classifier": (
        "log_softmax(classifier_head(dropout(hidden of the last position)))",
        "classifier.py, LlamaEmbeddingClassifier",
    ),
    "lora": ("W x + (alpha / rank) B A x, W frozen, B zero at the start", "lora.py"),
}
OTHER_FORMULAS: dict[tuple[str, str], str] = {
    ("norm", "2024"): "x / sqrt(mean(x^2) + eps) * weight over the last axis",
    ("generate", "2024"): "p = softmax(logits / temperature), temperature 0: the most likely token",
    ("scores", "spring2026"): "softmax(query key^T / sqrt(hd) + mask) value, mask -inf above the diagonal",
    ("generate", "spring2026"): "p = softmax(logits / temperature), the fewest tokens with total probability top_p",
}


@dataclass(frozen=True)
class Mistake:
    """A known mistake. slots: the places in the code that it fills; see `can_be_together`."""

    name: str  # PART.SHORT_NAME
    part: str
    sentence: str
    formula: str
    place: str
    slots: frozenset[str] = frozenset()
    editions: tuple[str, ...] = tuple(PARTS)

    @property
    def short_name(self) -> str:
        return self.name.partition(".")[2]

    def formula_in(self, edition: str) -> str:
        """The right formula of this mistake's line in an edition."""
        return OTHER_FORMULAS.get((self.part, edition), self.formula)


def _table() -> dict[str, Mistake]:
    found = {}
    for part, (formula, place) in FORMULAS.items():
        for room in (mistakes_model, mistakes_training):
            for short_name, slots, sentence, *editions in getattr(room, part.upper(), []):
                of_part = [edition for edition in PARTS if part in PARTS[edition]]
                mistake = Mistake(
                    name=f"{part}.{short_name}",
                    part=part,
                    sentence=sentence,
                    formula=formula,
                    place=place,
                    slots=frozenset(slots.split()),
                    editions=tuple(editions[0].split()) if editions else tuple(of_part),
                )
                assert mistake.name not in found, f"{mistake.name} twice"
                found[mistake.name] = mistake
    return found


MISTAKES: dict[str, Mistake] = _table()


def mistakes_of(part: str, edition: str) -> list[Mistake]:
    """The known mistakes of a part in an edition, in the order of the table."""
    return [mistake for mistake in MISTAKES.values() if mistake.part == part and edition in mistake.editions]


def can_be_together(one: Mistake, other: Mistake) -> bool:
    """Whether both fit into one piece of code, and neither hides the other."""
    if one.part != other.part or one.slots & other.slots or "alone" in one.slots | other.slots:
        return False
    apart = mistakes_model.APART | mistakes_training.APART
    return not any({one.short_name, other.short_name} == {a, b} for part, a, b in apart if part == one.part)


def pairs_of(part: str, edition: str) -> list[tuple[Mistake, Mistake]]:
    """The pairs of mistakes of a part that can be made together."""
    return [pair for pair in combinations(mistakes_of(part, edition), 2) if can_be_together(*pair)]
