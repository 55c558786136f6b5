"""The setups of the course: three editions, and 48 variants of each, so that a solution of last year fails by name.

A setup says which norm, rotary pairs and sampling rule a kit asks for. Imports no torch.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from typing import Any

from minillama.grading.parts import PARTS

EDITIONS = ("2024", "fall2025", "spring2026")
NORMS = ("layernorm", "rmsnorm")
PLACES = ("inside", "outside")  # of eps, by the root
PAIRINGS = ("interleaved", "halves")
SIGNS = ("plus", "minus")
# Rules of an edition's variants, its own first. "temperature" drops no token.
SAMPLING = {
    "2024": ("temperature", "epsilon", "top_p"),
    "fall2025": ("epsilon", "top_p", "min_p"),
    "spring2026": ("top_p", "min_p", "epsilon"),
}
VARIANTS = 48  # 4 rotary conventions, 4 norms, 3 sampling rules
NORM_CLASS = {"layernorm": "LayerNorm", "rmsnorm": "RMSNorm"}


@dataclass(frozen=True)
class Setup:
    """The choices of one kit."""

    edition: str
    norm: str
    eps: str
    pairing: str
    sign: str
    sampling: str

    @property
    def norm_class(self) -> str:
        return NORM_CLASS[self.norm]

    @property
    def parts(self) -> tuple[str, ...]:
        """The exercises, in the order in which a student does them."""
        return tuple(PARTS[self.edition])

    @property
    def lora(self) -> bool:
        return "lora" in self.parts

    @property
    def causal_argument(self) -> bool:
        """Whether it is `Attention(config, causal=True)`, instead of a field of the config that is False by default."""
        return self.edition == "spring2026"

    @property
    def switches(self) -> list[str]:
        """The known mistakes (mistakes.py) that are right answers in this variant."""
        asked = {
            "norm.eps_outside": self.eps == "outside",
            "rope.split_halves": self.pairing == "halves",
            "rope.wrong_sign": self.sign == "minus",
        }
        return [name for name, is_asked in asked.items() if is_asked]

    def choices(self) -> dict[str, str]:
        """The choices that a variant changes, as plain values."""
        return {name: asdict(self)[name] for name in ("norm", "eps", "pairing", "sign", "sampling")}


PLAIN = {
    "2024": Setup("2024", "rmsnorm", "inside", "interleaved", "plus", "temperature"),
    "fall2025": Setup("fall2025", "layernorm", "inside", "interleaved", "plus", "epsilon"),
    "spring2026": Setup("spring2026", "layernorm", "inside", "interleaved", "plus", "top_p"),
}


def find_setup(edition: str, seed: int | None = None) -> Setup:
    """The setup of an edition; with a seed, a variant of it.

    The variant is seed modulo 48, and 0 is the edition itself. Each seed differs from the next in the norm or the
    place of its eps, in the rotary convention, and in the sampling rule.
    """
    plain = PLAIN[edition]
    n = 0 if seed is None else seed % VARIANTS
    pairing, sign = [(pairing, sign) for sign in SIGNS for pairing in PAIRINGS][n % 4]
    norms = sorted(NORMS, key=lambda norm: norm != plain.norm)
    norm, eps = [(norm, eps) for eps in PLACES for norm in norms][(n + n % 16 // 4) % 4]
    return Setup(edition, norm, eps, pairing, sign, SAMPLING[edition][n % 3])


def exercises(setup: Setup) -> dict[str, tuple[str, tuple[str, ...]]]:
    """The file of each part, and the functions whose bodies the student writes."""
    found: dict[str, tuple[str, tuple[str, ...]]] = {
        "norm": ("llama.py", (f"{setup.norm_class}.forward",)),
        "scores": ("llama.py", ("Attention.compute_query_key_value_scores",)),
        "attention": ("llama.py", ("Attention.forward",)),
        "block": ("llama.py", ("LlamaLayer.forward",)),
        "rope": ("rope.py", ("apply_rotary_emb",)),
        "model": ("llama.py", ("Llama.forward",)),
        "generate": ("llama.py", ("Llama.generate",)),
        "adamw": ("optimizer.py", ("AdamW.step",)),
        "zero_shot": ("classifier.py", ("LlamaZeroShotClassifier.forward",)),
        "classifier": ("classifier.py", ("LlamaEmbeddingClassifier.forward",)),
        "lora": ("lora.py", ("LoRALayer.__init__", "LoRALayer.forward", "apply_lora", "merge_lora_weights")),
    }
    return {part: found[part] for part in setup.parts}


def hidden_part(setup: Setup, seed: int | None, keep: tuple[str, ...]) -> dict[str, Any]:
    """What only the teacher has: the seed, the seed of the probes, the variant's choices and the points."""
    digest = hashlib.sha256(f"{setup.edition}/{seed}".encode()).digest()
    return {
        "edition": setup.edition,
        "seed": seed,
        "probe_seed": int.from_bytes(digest[:4], "big"),
        "variant": setup.choices(),
        "switches": setup.switches,
        "kept": list(keep),
        "points": {part: points for part, points in PARTS[setup.edition].items() if part not in keep},
    }
