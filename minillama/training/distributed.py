"""Distributed training: the same methods for several processes, started by torchrun, and for a single one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from minillama.environment import this_process
from minillama.formats.files import release_pages
from minillama.layers.precision import sum_dtype
from optimizer import local

ROWS_AT_ONCE = 1024  # of a tensor that is read from a file

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
            device = this_device()
        total = torch.zeros(len(numbers), dtype=sum_dtype(device), device=device)
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

    def own_rows(self, whole: Tensor) -> Tensor:
        """This process's rows of a parameter, as FSDP2 divides them: the last processes may have fewer, or none."""
        rows = -(-len(whole) // self.world)
        return whole[self.rank * rows : (self.rank + 1) * rows]

    def divide(self, model: nn.Module, dtype: torch.dtype) -> None:
        """With FSDP2, replaces each parameter by this process's shard, in float32 on its device; else does nothing.

        The model may be memory-mapped and of any dtype. A `Llama` on the device "meta" gets the weights that one
        process would draw. dtype: of the matrix products. The matrices of the layers are gathered in this dtype,
        because a copy that autocast makes of a gathered matrix stays in memory until the backward pass.
        """
        if not self.fsdp:
            return
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        llama: Any = getattr(model, "llama", model)
        sources = {name: parameter.data for name, parameter in model.named_parameters()}
        model.to("meta", torch.float32)
        llama.tie_weights()  # `to` and `to_empty` make two parameters of a tied one

        mesh = init_device_mesh(this_device().type, (self.world,))
        half = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        for layer in llama.layers:
            parts = [layer.attention, layer.feed_forward]
            # Vectors stay float32: norms, in the group of the embedding, and those of DoRA and differential attention.
            only_matrices = all(parameter.dim() > 1 for part in parts for parameter in part.parameters())
            fully_shard(parts, mesh=mesh, mp_policy=half if only_matrices else MixedPrecisionPolicy())
        fully_shard(model, mesh=mesh)

        model.to_empty(device=this_device())
        llama.tie_weights()
        if any(source.is_meta for source in sources.values()):
            with DrawShards(self):
                llama.reset_parameters()
        else:
            self.load(model, sources)

    @torch.no_grad()
    def load(self, model: nn.Module, state: Mapping[str, Tensor]) -> None:
        """Copies whole tensors into the parameters of `model`, or this process's rows of them into its shards.

        Memory-mapped tensors are read in pieces, which then leave memory.
        """
        if self.fsdp:
            model.reshard()  # type: ignore[operator]  # an evaluation may have gathered the embedding
        for name, parameter in model.named_parameters():
            source = self.own_rows(state[name]) if self.fsdp else state[name]
            for rows, piece in zip(local(parameter).split(ROWS_AT_ONCE), source.split(ROWS_AT_ONCE), strict=True):
                rows.copy_(piece)
                release_pages(piece)
            release_pages(state[name])  # reading ahead, the system may have taken more

    @contextmanager
    def gradients(self, model: nn.Module, *, in_step: bool) -> Iterator[None]:
        """The context of a forward and backward pass. in_step: average the gradients over the processes.

        Each gradient is summed as soon as it is complete, while the backward pass goes on. One sum per parameter has
        the same order of additions in every step and after a resumption, unlike DistributedDataParallel, whose buffers
        change after the first step. FSDP2 averages its own gradients in every pass, because their sum over several
        passes is as large as the model.
        """
        sums: list[dist.Work] = []

        def average(parameter: nn.Parameter) -> None:
            parameter.grad.div_(self.world)  # type: ignore[union-attr]
            sums.append(dist.all_reduce(parameter.grad, async_op=True))

        trained = [p for p in model.parameters() if p.requires_grad] if in_step and self.world > 1 else []
        hooks = [p.register_post_accumulate_grad_hook(average) for p in trained if not self.fsdp]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        for one in sums:
            one.wait()


def this_device() -> torch.device:
    """The device of this process in its group."""
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")


class DrawShards(TorchFunctionMode):
    """A context in which torch.nn.init draws whole parameters, as one process does, and keeps this process's shards."""

    def __init__(self, processes: Processes) -> None:
        super().__init__()
        self.processes = processes

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", None) != "torch.nn.init":
            return func(*args, **(kwargs or {}))
        tensor = kwargs.pop("tensor")
        whole = func(torch.empty(tensor.shape), **kwargs)
        with torch.no_grad():
            local(tensor).copy_(self.processes.own_rows(whole))
        return tensor


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
