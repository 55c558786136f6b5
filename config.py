"""Shape and conventions of a Llama, in one frozen dataclass. Imports no torch, so that `--help` stays instant."""

from __future__ import annotations

import math
import reprlib
import sys
from dataclasses import asdict, dataclass, fields
from typing import Any, NamedTuple

NORMS = ("layernorm", "rmsnorm")
ATTENTION_KERNELS = ("auto", "fused", "manual", "pieces")
ATTENTION_TYPES = ("softmax", "differential")
POSITIONS = ("rotary", "alibi")
# The course's filter of `generate`. The number is an object of its own, so that `is` tells the default from an epsilon
# of 0.05 that the caller gave: the default is dropped when another filter is given.
DEFAULT_EPSILON = float("0.05")


class RopeScaling(NamedTuple):
    """Llama 3.1's scaling of rotary positions, see `rope.scaled`."""

    factor: float  # 8; 32 in Llama 3.2
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192  # context of the first training


@dataclass(frozen=True)
class LlamaConfig:
    """The sizes and conventions that determine a Llama's computation.

    The defaults are the course's: a checkpoint that states only sizes is read as LayerNorm with bidirectional attention
    (no causal mask). Readers of other formats set `norm` and `causal`. Raises ValueError if the values do not fit.
    """

    vocab_size: int = 32000
    dim: int = 512
    dropout: float = 0.0
    n_layers: int = 8
    n_heads: int = 8
    n_kv_heads: int | None = 8  # None: as many as n_heads
    max_seq_len: int = 1024
    layer_norm_eps: float = 1e-5
    multiple_of: int = 32
    hidden_dim: int | None = None  # None: derived from dim, see `feed_forward_size`
    position_embedding_type: str = "rotary"  # or "alibi", which ignores rope_theta and rope_scaling
    use_cache: bool = True
    norm: str = "layernorm"
    causal: bool = False
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    tie_embeddings: bool = True
    attention_kernel: str = "auto"  # see `Attention.attend`; all compute the same
    attention_type: str = "softmax"  # or "differential", see `DifferentialAttention`
    sliding_window: int | None = None  # a token sees itself and the sliding_window - 1 before it; None: all before it

    def __post_init__(self) -> None:
        if self.n_kv_heads is None:
            object.__setattr__(self, "n_kv_heads", self.n_heads)
        self._check_rope_scaling()
        self._check_values()
        if self.dim % self.n_heads:
            raise ValueError(f"dim {self.dim} is not a multiple of n_heads {self.n_heads}")
        if self.head_dim % 2 and self.position_embedding_type == "rotary":
            raise ValueError(f"the head size dim / n_heads = {self.head_dim} is odd; rotary embeddings need pairs")
        if self.n_heads % self.kv_heads:
            raise ValueError(f"n_heads {self.n_heads} is not a multiple of n_kv_heads {self.n_kv_heads}")
        if not self.causal and self.position_embedding_type == "alibi":
            raise ValueError("ALiBi looks back only and needs causal attention (--attention causal)")
        if not self.causal and self.sliding_window is not None:
            raise ValueError("a sliding window looks back only and needs causal attention (--attention causal)")
        if self.attention_type == "differential" and (self.n_heads % 2 or self.kv_heads % 2):
            counts = f"n_heads is {self.n_heads}, n_kv_heads {self.kv_heads}"
            raise ValueError(f"{counts}; differential attention takes pairs of heads, so both must be even")

    def _check_values(self) -> None:
        sizes = ["vocab_size", "dim", "n_layers", "n_heads", "n_kv_heads", "max_seq_len", "multiple_of"]
        sizes += [name for name in ("hidden_dim", "sliding_window") if getattr(self, name) is not None]
        for name in sizes:
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value < 1 << 63:
                raise ValueError(f"{name} is {shown(value)}; it must be a whole number of 1 or more, below 2^63")
        for name, accepts, wanted in (
            ("dropout", lambda value: 0.0 <= value < 1.0, "in [0, 1)"),
            ("layer_norm_eps", lambda value: 0.0 < value <= sys.float_info.max, "a number above 0"),
            ("rope_theta", lambda value: 0.0 < value <= sys.float_info.max, "a number above 0"),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not accepts(value):
                raise ValueError(f"{name} is {shown(value)}; it must be {wanted}")
        for name in ("use_cache", "causal", "tie_embeddings"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} is {shown(getattr(self, name))}; it must be True or False")
        for name, allowed in (
            ("norm", NORMS),
            ("attention_kernel", ATTENTION_KERNELS),
            ("position_embedding_type", POSITIONS),
            ("attention_type", ATTENTION_TYPES),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {shown(getattr(self, name))}; it must be one of {', '.join(allowed)}")

    def _check_rope_scaling(self) -> None:
        if self.rope_scaling is None:
            return
        given: Any = self.rope_scaling
        try:  # a file has a dict or a list
            scaling = RopeScaling(**given) if isinstance(given, dict) else RopeScaling(*given)
        except TypeError as error:
            wanted = ", ".join(RopeScaling._fields)
            raise ValueError(f"rope_scaling is {shown(given)}; it must give {wanted}") from error
        numbers = all(isinstance(value, int | float) and 0 < value < math.inf for value in scaling)
        if not numbers or scaling.low_freq_factor >= scaling.high_freq_factor:
            wanted = "numbers above 0, with low_freq_factor below high_freq_factor"
            raise ValueError(f"rope_scaling is {shown(tuple(scaling))}; it must be {wanted}")
        object.__setattr__(self, "rope_scaling", scaling)

    @property
    def kv_heads(self) -> int:
        """Number of key/value heads, never None."""
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads

    @property
    def extras(self) -> list[str]:
        """Names of this config's features that other programs do not support."""
        has = {
            "differential attention": self.attention_type == "differential",
            "ALiBi positions": self.position_embedding_type == "alibi",
            f"sliding window of {self.sliding_window}": self.sliding_window is not None,
        }
        return [name for name in has if has[name]]

    @property
    def convention(self) -> str:
        """The norm and the attention in words, as the header of a run prints them."""
        norm = {"layernorm": "LayerNorm", "rmsnorm": "RMSNorm"}[self.norm]
        return ", ".join([norm, f"{'causal' if self.causal else 'bidirectional'} attention", *self.extras])

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values; `LlamaConfig.from_dict` is its inverse."""
        scaling = None if self.rope_scaling is None else self.rope_scaling._asdict()
        return asdict(self) | {"rope_scaling": scaling}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> LlamaConfig:
        """A config from the `model_args` of a checkpoint. Raises ValueError for an unknown field."""
        if unknown := sorted(map(str, set(values) - {field.name for field in fields(cls)})):
            raise ValueError(f"model_args has fields that this program does not know: {', '.join(unknown)}")
        return cls(**values)


def shown(value: object) -> str:
    """A value as one short line of text."""
    return " ".join(reprlib.repr(value).split())


def feed_forward_size(dim: int, hidden_dim: int | None, multiple_of: int) -> int:
    """Width of the SwiGLU layer: `hidden_dim`, or 2/3 of 4*dim rounded up to `multiple_of` (arXiv 2302.13971, 2.2)."""
    if hidden_dim is not None:
        return hidden_dim
    return multiple_of * math.ceil(int(8 * dim / 3) / multiple_of)


def parameter_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor in the state dict of a `Llama` with this config, including a tied output."""
    dim, hidden = config.dim, feed_forward_size(config.dim, config.hidden_dim, config.multiple_of)
    kv_dim = config.kv_heads * config.head_dim
    norm_parts = ("weight", "bias") if config.norm == "layernorm" else ("weight",)
    shapes: dict[str, tuple[int, ...]] = {"tok_embeddings.weight": (config.vocab_size, dim)}
    for i in range(config.n_layers):
        shapes |= {
            f"layers.{i}.attention.compute_query.weight": (dim, dim),
            f"layers.{i}.attention.compute_key.weight": (kv_dim, dim),
            f"layers.{i}.attention.compute_value.weight": (kv_dim, dim),
            f"layers.{i}.attention.compute_output.weight": (dim, dim),
            f"layers.{i}.feed_forward.w1.weight": (hidden, dim),
            f"layers.{i}.feed_forward.w2.weight": (dim, hidden),
            f"layers.{i}.feed_forward.w3.weight": (hidden, dim),
        }
        if config.attention_type == "differential":
            shapes |= {f"layers.{i}.attention.lambda_{name}": (config.head_dim,) for name in ("q1", "k1", "q2", "k2")}
            shapes[f"layers.{i}.attention.head_norm.weight"] = (2 * config.head_dim,)
        shapes |= {
            f"layers.{i}.{norm}.{part}": (dim,) for norm in ("attention_norm", "ffn_norm") for part in norm_parts
        }
    shapes |= {f"norm.{part}": (dim,) for part in norm_parts}
    return shapes | {"output.weight": (config.vocab_size, dim)}


# Sizes for `--preset`; a new model takes its vocabulary size from its tokenizer. The stories* models are llama2.c's.
META: dict[str, Any] = {"norm": "rmsnorm", "tie_embeddings": False}
LLAMA2 = META | {"vocab_size": 32000, "max_seq_len": 4096, "multiple_of": 256}
LLAMA3 = META | {"vocab_size": 128256, "max_seq_len": 8192, "n_kv_heads": 8, "rope_theta": 500000.0}
PRESETS: dict[str, dict[str, Any]] = {
    "mini": {"dim": 256, "n_layers": 6, "n_heads": 4, "n_kv_heads": 2, "max_seq_len": 1024},  # the bundled model
    "stories260K": {"dim": 64, "n_layers": 5, "n_heads": 8, "n_kv_heads": 4, "max_seq_len": 512, "multiple_of": 4},
    "stories15M": {"dim": 288, "n_layers": 6, "n_heads": 6, "n_kv_heads": 6, "max_seq_len": 256},
    "stories42M": {"dim": 512, "n_layers": 8, "n_heads": 8, "n_kv_heads": 8, "max_seq_len": 1024},
    "stories110M": {"dim": 768, "n_layers": 12, "n_heads": 12, "n_kv_heads": 12, "max_seq_len": 1024},
    "TinyLlama-1.1B": LLAMA2 | {"dim": 2048, "n_layers": 22, "n_heads": 32, "n_kv_heads": 4, "max_seq_len": 2048},
    "Llama-2-7B": LLAMA2 | {"dim": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 32},
    "Llama-2-13B": LLAMA2 | {"dim": 5120, "n_layers": 40, "n_heads": 40, "n_kv_heads": 40},
    "Llama-2-70B": LLAMA2 | {"dim": 8192, "n_layers": 80, "n_heads": 64, "n_kv_heads": 8, "hidden_dim": 28672},
    "Llama-3-8B": LLAMA3 | {"dim": 4096, "n_layers": 32, "n_heads": 32, "hidden_dim": 14336},
    "Llama-3.2-1B": LLAMA3
    | {"dim": 2048, "n_layers": 16, "n_heads": 32, "hidden_dim": 8192, "tie_embeddings": True}
    | {"max_seq_len": 131072, "rope_scaling": RopeScaling(32.0)},
}


def check_rmsnorm(config: LlamaConfig, target: str) -> None:
    """Raises ValueError unless other programs can run the model: RMSNorm, causal, no `extras`."""
    if config.norm != "rmsnorm":
        reason, remedy = "only RMSNorm, and this model has LayerNorm", "or pretrain one without --norm layernorm"
    elif not config.causal:
        reason = "only causal attention, and this model's is bidirectional"
        remedy = "or give --attention causal if it was trained that way"
    elif config.extras:
        reason, remedy = f"no {config.extras[0]}, and this model has it", "which this program reads"
    else:
        return
    raise ValueError(f"{target} supports {reason}; keep it as safetensors, {remedy}")
