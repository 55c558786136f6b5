"""The setups of the course: three editions, and 48 variants of each, so that a solution of last year fails by name.

A setup says which norm, rotary pairs and sampling rule a kit asks for. An assignment adds what hand-ins are judged by;
a kit's is in hidden.json. Imports no torch and no numpy.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# Points for each part, in the order in which the parts build on each other.
PARTS: dict[str, dict[str, int]] = {
    "2024": {"norm": 10, "rope": 14, "scores": 14, "attention": 8, "block": 12, "model": 8}
    | {"generate": 12, "adamw": 12, "zero_shot": 4, "classifier": 6},
    "fall2025": {"norm": 8, "rope": 12, "scores": 12, "attention": 8, "block": 10, "model": 8}
    | {"generate": 10, "adamw": 12, "zero_shot": 4, "classifier": 6, "lora": 10},
    "spring2026": {"norm": 10, "rope": 14, "scores": 14, "attention": 8, "block": 12, "model": 8}
    | {"generate": 12, "adamw": 12, "zero_shot": 4, "classifier": 6},
}
EDITIONS = tuple(PARTS)
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
# The number that a kit's `generate` takes by default for each rule that drops tokens.
DEFAULTS = {"epsilon": 0.05, "top_p": 0.95, "min_p": 0.1}
# The number with which each of these rules drops nothing.
OFF = {"epsilon": 0.0, "top_p": 1.0, "min_p": 0.0}
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

    @property
    def words(self) -> frozenset[str]:
        """The edition, the choices and the mask, each in a word; known mistakes ask for them (mistakes.py)."""
        return frozenset(
            {self.edition, *self.choices().values(), "causal" if self.causal_argument else "bidirectional"}
        )

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


@dataclass(frozen=True)
class Assignment:
    """The measure of hand-ins: the setup, the seed of the probes, and the points of each part that is judged."""

    setup: Setup
    seed: int
    points: dict[str, int]

    @property
    def title(self) -> str:
        """The assignment in words."""
        choices = self.setup.choices() if self.setup != PLAIN[self.setup.edition] else {}
        words = [f"edition {self.setup.edition}", *(f"{name} {value}" for name, value in choices.items())]
        return ", ".join([*words, f"seed {self.seed}"])

    def only(self, parts: Iterable[str]) -> Assignment:
        """The assignment with these parts alone."""
        return Assignment(self.setup, self.seed, {part: self.points[part] for part in self.points if part in parts})


def hidden_part(setup: Setup, seed: int | None, keep: tuple[str, ...]) -> dict[str, Any]:
    """The teacher's part: the seed, the seed of the probes, the variant's choices and the points."""
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


def read_hidden(path: Path) -> Assignment:
    """The assignment in a file that holds a `hidden_part`; its points may be others.

    Raises OSError, and ValueError with the reason in a line if it is no such file or contradicts itself.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        raise ValueError("it is no JSON") from None
    if not isinstance(found, dict) or found.get("edition") not in EDITIONS:
        raise ValueError(f"it is no hidden.json of a kit: it names no edition ({', '.join(EDITIONS)})")
    seed, kept, points = (found.get(name) for name in ("seed", "kept", "points"))
    if seed is not None and (type(seed) is not int or seed < 0):
        raise ValueError(f"its seed {seed!r} is no whole number of 0 or more")
    setup = find_setup(found["edition"], seed)
    if not isinstance(kept, list) or not all(part in setup.parts for part in kept):
        raise ValueError(f"its kept parts {kept!r} are not parts of {setup.edition} ({', '.join(setup.parts)})")
    wanted = hidden_part(setup, seed, tuple(kept))
    for name in wanted:
        if name != "points" and found.get(name) != wanted[name]:
            raise ValueError(f"its {name} is {found.get(name)!r}, which does not belong to its edition and seed")
    if not isinstance(points, dict) or set(points) != set(wanted["points"]):
        raise ValueError(f"its points must be those of {', '.join(wanted['points'])}")
    if wrong := next((part for part, value in points.items() if type(value) is not int or value < 0), None):
        raise ValueError(f"its points of {wrong} are {points[wrong]!r}, no whole number of 0 or more")
    return Assignment(setup, wanted["probe_seed"], {part: points[part] for part in wanted["points"]})
