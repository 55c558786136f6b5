"""One process among several: torch's own engine (`torchrun`), or a process alone, behind the same few verbs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from minillama.environment import this_process


@dataclass(frozen=True)
class Processes:
    """This process's number (`rank`), how many there are (`world`), and whether they keep a shard of the model each."""

    rank: int = 0
    world: int = 1
    fsdp: bool = False

    @property
    def is_main(self) -> bool:
        """Whether this is the one that writes files and talks."""
        return self.rank == 0

    def share(self, positions: list[int], at_once: int | None = None) -> list[tuple[list[int], int]]:
        """This process's rows of a batch, in pieces of at most `at_once`: (positions, how many of them count).

        Every process gets as many pieces as every other, for they meet in each. Where there is no row left, a piece is
        the batch's first row, and none of it counts.
        """
        longest = -(-len(positions) // self.world)
        at_once = min(at_once or longest, longest)
        mine = positions[self.rank :: self.world]
        pieces = [mine[start : start + at_once] for start in range(0, longest, at_once)]
        return [(piece or positions[:1], len(piece)) for piece in pieces]

    def sum(self, *numbers: float) -> list[float]:
        """Each number summed over the processes."""
        if self.world == 1:
            return list(numbers)
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        total = torch.tensor(numbers, dtype=torch.float64, device=device)
        dist.all_reduce(total)
        return total.tolist()

    def gather(self, what: Any) -> list[Any]:
        """The value of each process, in the order of their ranks, on all of them."""
        if self.world == 1:
            return [what]
        everything = [None] * self.world
        dist.all_gather_object(everything, what)
        return everything

    def wait(self) -> None:
        """Returns once every process has come here."""
        if self.world > 1:
            dist.barrier()

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model that trains in step with the others': replicated (DDP), or sharded layer by layer (FSDP2)."""
        if self.world == 1:
            return model
        if self.fsdp:
            from torch.distributed.fsdp import fully_shard

            for layer in getattr(model, "llama", model).layers:  # type: ignore[union-attr]
                fully_shard(layer)
            fully_shard(model)
            return model
        return nn.parallel.DistributedDataParallel(model)

    @contextmanager
    def gradients(self, model: nn.Module, *, in_step: bool) -> Iterator[None]:
        """A forward and backward pass after which the processes' gradients are averaged, or kept for a later one."""
        if self.world == 1:
            yield
        elif self.fsdp:
            model.set_requires_gradient_sync(in_step)  # type: ignore[operator]
            yield
        elif in_step:
            yield
        else:
            with model.no_sync():  # type: ignore[operator]
                yield


@contextmanager
def process_group(device: torch.device, fsdp: bool) -> Iterator[Processes]:
    """The processes that torchrun started, ready to talk: gloo on CPU, NCCL on CUDA. Alone without torchrun.

    Raises ValueError if a shard for each process is asked for where there is one process, or the processes cannot meet.
    """
    if this_process().world == 1:
        if fsdp:
            raise ValueError("--fsdp needs several processes; start it as torchrun --nproc_per_node=2 run_llama.py ...")
        yield Processes()
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # The others wait while one tokenizes, which may take hours; that one has died torchrun sees sooner than this.
    backend = "nccl" if device.type == "cuda" else "gloo"
    try:
        dist.init_process_group(backend, timeout=timedelta(hours=12))
    except ValueError as error:  # a variable of torchrun's is missing, say MASTER_ADDR
        raise ValueError(
            f"the processes cannot meet ({error}); start them with torchrun, or type `unset RANK WORLD_SIZE` for one"
        ) from error
    try:
        yield Processes(dist.get_rank(), dist.get_world_size(), fsdp)
    finally:
        dist.destroy_process_group()
