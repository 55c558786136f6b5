"""Distributed training: the same methods for several processes, started by torchrun, and for a single one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from minillama.environment import this_process

Result = TypeVar("Result")


@dataclass(frozen=True)
class Processes:
    """The rank of this process, the number of processes, and whether each has a shard of the model (FSDP)."""

    rank: int = 0
    world: int = 1
    fsdp: bool = False

    @property
    def is_main(self) -> bool:
        return self.rank == 0  # the process that writes files and prints

    def share(self, positions: list[int]) -> tuple[list[int], int]:
        """This process's rows of a batch or of a piece of it: (positions, how many of them count).

        A process for which there is no row gets the first one, which does not count, because the processes exchange
        gradients.
        """
        mine = positions[self.rank :: self.world]
        return mine or positions[:1], len(mine)

    def sum(self, *numbers: float | Tensor) -> list[float]:
        """Each number, also a tensor (), summed over the processes in float64. Waits for the device once."""
        device = next((number.device for number in numbers if isinstance(number, Tensor)), None)
        if self.world == 1 and device is None:
            return [float(number) for number in numbers]
        if device is None:
            device = torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")
        total = torch.zeros(len(numbers), dtype=torch.float64, device=device)
        for place, number in zip(total, numbers, strict=True):
            place += number
        if self.world > 1:
            dist.all_reduce(total)
        return total.tolist()

    def gather(self, what: Any) -> list[Any]:
        """The values of all processes, in the order of their ranks; every process gets them."""
        if self.world == 1:
            return [what]
        everything = [None] * self.world
        dist.all_gather_object(everything, what)
        return everything

    def from_main(self, work: Callable[[], Result]) -> Result:
        """The result of work(), which runs in the main process alone; the others wait for hours if they must."""
        if self.world == 1:
            return work()
        patient = dist.new_group(backend="gloo", timeout=timedelta(hours=12))
        found: list[Any] = [work() if self.is_main else None]
        dist.broadcast_object_list(found, 0, group=patient)
        dist.destroy_process_group(patient)
        return found[0]

    def wait(self) -> None:
        """Waits until every process has called this."""
        if self.world > 1:
            dist.barrier()

    def wrap(self, model: nn.Module) -> nn.Module:
        """Wraps the model for distributed training: replicated (DDP), or sharded layer by layer (FSDP2)."""
        if self.world == 1:
            return model
        if self.fsdp:
            from torch.distributed.fsdp import fully_shard

            for layer in getattr(model, "llama", model).layers:  # type: ignore[union-attr]
                fully_shard(layer)
            fully_shard(model)
            return model
        return nn.parallel.DistributedDataParallel(model)

    def gradients(self, model: nn.Module, *, in_step: bool) -> AbstractContextManager[Any]:
        """The context of a forward and backward pass. in_step: average the gradients over the processes."""
        if self.fsdp:
            model.set_requires_gradient_sync(in_step)  # type: ignore[operator]
        keeps_its_own = self.world > 1 and not self.fsdp and not in_step
        return model.no_sync() if keeps_its_own else nullcontext()  # type: ignore[operator]


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel; any other model unchanged."""
    return getattr(model, "module", model)


@contextmanager
def process_group(device: torch.device, fsdp: bool) -> Iterator[Processes]:
    """Connects torchrun's processes, with gloo on the CPU and NCCL on CUDA; without torchrun there is one process.

    Raises ValueError for FSDP with one process, and if the processes cannot connect.
    """
    if this_process().world == 1:
        if fsdp:
            raise ValueError("--fsdp needs several processes; start it as torchrun --nproc_per_node=2 run_llama.py ...")
        yield Processes()
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    except ValueError as error:  # for example MASTER_ADDR is missing
        raise ValueError(
            f"the processes cannot connect ({error}); use torchrun, or type `unset RANK WORLD_SIZE` for one process"
        ) from error
    yield Processes(dist.get_rank(), dist.get_world_size(), fsdp)
    # Not after an error: this would wait for the other processes, which may wait for this one (see run_llama.py).
    dist.destroy_process_group()
