"""The flags of a new model with random weights, and the config that they ask for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from config import POSITIONS, PRESETS
from minillama.cli import flags
from minillama.cli.options import Flag, Group, Options
from minillama.cli.parser import COUNT

if TYPE_CHECKING:
    from config import LlamaConfig

SIZES = {
    "dim": "width",
    "n_layers": "layers",
    "n_heads": "query heads",
    "n_kv_heads": "key/value heads",
    "max_seq_len": "context in tokens",
}
# How a model with random weights is trained: AdamW learns no carry in sums (docs/results.md).
TRAINED_BY = {"optimizer": "muon", "lr": 4e-3}
OF_NEW = "is for a new model; a checkpoint has its own"
KINDS = (
    Flag(
        "--position",
        "position encoding of a new model: rotary rotates queries and keys, alibi lowers the scores of distant tokens",
        POSITIONS,
        default_text="rotary",
        elsewhere=OF_NEW,
    ),
    Flag(
        "--sliding_window N",
        "in a new model, a token attends to itself and the N - 1 tokens before it",
        COUNT,
        default_text="all earlier tokens",
        elsewhere=OF_NEW,
    ),
    Flag(
        "--differential",
        "differential attention in a new model: the difference of two softmaxes, from pairs of heads",
        bool,
        elsewhere=OF_NEW,
    ),
)
NEW_MODEL = Group(
    "a new model",
    (
        Flag("--preset", "sizes of a new model", PRESETS, default_text="mini, the bundled model's"),
        *(
            Flag(f"--{name} N", f"{what} of a new model", COUNT, default_text="the preset's")
            for name, what in SIZES.items()
        ),
        *KINDS,
    ),
)


def is_new(options: Options) -> bool:
    """Whether a training command begins with random weights."""
    return not options.continued and (options.option == "pretrain" or bool(typed_sizes(options)))


def typed_sizes(options: Options) -> list[str]:
    """The flags of a new model that were typed. Raises ValueError if a checkpoint is named, too."""
    keys = {flag.key for flag in NEW_MODEL.flags} & options.command.keys
    typed = options.changed(*sorted(keys))
    if typed and options.continued:
        raise ValueError(
            f"--{typed[0]} is for a new model, but --pretrained-model-path has its own; give only one of them"
        )
    return typed


def new_config(options: Options, vocab_size: int) -> LlamaConfig:
    """The config of a new model: the sizes of the preset, overridden by the options; a usual Llama by default."""
    from config import LlamaConfig

    given = {name: getattr(options, name) for name in SIZES if getattr(options, name) is not None}
    sizes = PRESETS[options.preset or flags.DEFAULT_PRESET] | given
    sizes["norm"] = options.norm or "rmsnorm"
    if options.dim is not None:
        sizes["hidden_dim"] = None  # the preset's was for its own width
    sizes |= {
        "position_embedding_type": options.position or "rotary",
        "sliding_window": options.sliding_window,
        "attention_type": "differential" if options.differential else "softmax",
    }
    sizes |= {
        "vocab_size": vocab_size,
        "causal": options.attention != "bidirectional",
        "dropout": options.dropout or 0.0,
    }
    return LlamaConfig(**sizes)
