"""Whether a planned run has room in memory, and the setting that gives it room."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from config import PRESETS
from minillama.cli.new_model import is_new
from minillama.cli.options import Options

if TYPE_CHECKING:
    import torch

    from config import LlamaConfig
    from minillama.training.planning import Memory


class DoesNotFit(ValueError):
    """The run does not fit into memory. The message says which setting does. code: of the program's exit."""

    code = 3


def check_room(options: Options, config: LlamaConfig, device: torch.device) -> None:
    """With --plan, raises DoesNotFit if the memory does not suffice for the parameters, before these are created."""
    from llama import llama_without_weights
    from minillama.training.memory import memory_limit

    if not options.plan:
        return

    def needed(config: LlamaConfig) -> int:
        """The float32 weights, and unless only adapters are trained, their gradients and two moments, in bytes."""
        copies = 1 if trains_adapters(options) else 4
        return 4 * copies * sum(parameter.numel() for parameter in llama_without_weights(config).parameters())

    size, limit = needed(config), memory_limit(device)
    if limit is None or size <= limit:
        return
    how = smaller_model(options)
    if is_new(options):
        own = {"hidden_dim": None, "rope_scaling": None, "tie_embeddings": False}
        sizes = (replace(config, **(own | sizes | {"vocab_size": config.vocab_size})) for sizes in PRESETS.values())
        fitting = {name: needed(one) for name, one in zip(PRESETS, sizes, strict=True) if needed(one) <= limit}
        if fitting:
            largest = max(fitting, key=fitting.__getitem__)
            how = f"those of --preset {largest} take {in_gigabytes(fitting[largest])}"
    parts = "weights" if trains_adapters(options) else "weights, gradients and moments"
    raise DoesNotFit(f"the {parts} take {in_gigabytes(size)}, and {in_gigabytes(limit)} are free; {how}")


def trains_adapters(options: Options) -> bool:
    return options.option == "lora" or (options.option == "sft" and bool(options.lora_rank))


def smaller_model(options: Options) -> str:
    """The advice for a model whose parameters need too much memory."""
    if options.option == "pretrain" or trains_adapters(options):
        return "give a smaller model"
    lora = "--option lora" if options.option == "finetune" else "--lora_rank 4"
    return f"{lora} needs no gradients and moments of the model, or give a smaller model"


def advice(options: Options, memory: Memory) -> str:
    """The memory that does not suffice, and the setting that fits."""
    assert memory.peak is not None and memory.limit is not None
    spare = " (some of it has to stay free)" * (memory.peak <= memory.limit)
    line = f"the run needs {in_gigabytes(memory.peak)}, and {in_gigabytes(memory.limit)} are free{spare}; "
    if memory.fitting_rows:
        if options.pooling == "last_column":  # reads whole batches
            return line + f"--batch_size {memory.fitting_rows} fits"
        return line + f"--micro_batch_size {memory.fitting_rows} fits, and takes the same steps"
    if 2 * (memory.weights + memory.gradients + memory.moments) > memory.limit:
        return line + smaller_model(options)
    shorter = "--window" if options.option in ("sft", "pretrain") else "--max_sentence_len"
    return line + f"one row of {memory.tokens // memory.rows} tokens is too much, so give a smaller {shorter}"


def in_gigabytes(size: int) -> str:
    return f"{size / 1e9:,.2f} GB"
