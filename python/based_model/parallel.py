"""One training run in several processes: what they share, and how the model is spread over them.

    torchrun --nproc-per-node 2 -m based_model.train --parallel fsdp

Each process (rank) works on its share of every batch. In a single process all of this does nothing.
"""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from based_model.model import Based


@dataclass(frozen=True)
class Ranks:
    """This process among those of the run. What all must agree on goes through the methods."""

    rank: int = 0
    count: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that prints and writes."""
        return self.rank == 0

    def sum(self, value: float) -> float:
        """The sum over all ranks, in fp64."""
        return self._reduced(value, dist.ReduceOp.SUM)

    def max(self, value: float) -> float:
        """The largest of all ranks."""
        return self._reduced(value, dist.ReduceOp.MAX)

    def from_main(self, value: Any) -> Any:
        """The main process's value."""
        values = [value]
        if self.count > 1:
            dist.broadcast_object_list(values, device=torch.device("cpu"))
        return values[0]

    def wait(self):
        """Returns when all ranks have called it."""
        self.sum(0.0)

    def _reduced(self, value: float, op) -> float:
        if self.count == 1:
            return value
        value = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(value, op)
        return value.item()


def current_ranks() -> Ranks:
    """The ranks of the process group that is open, if any."""
    return Ranks(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else Ranks()


@contextmanager
def process_group() -> Iterator[Ranks]:
    """Joins the processes that torchrun has started; without torchrun there is nothing to join."""
    if "WORLD_SIZE" not in os.environ:
        yield Ranks()
        return
    # With fewer GPUs than processes here, these can only work on the CPU.
    if 0 < int(os.environ["LOCAL_WORLD_SIZE"]) <= torch.cuda.device_count():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # what "cuda" means from here on
        dist.init_process_group("cpu:gloo,cuda:nccl")
    else:
        dist.init_process_group("gloo")
    try:
        yield current_ranks()
    finally:
        dist.destroy_process_group()


def spread(model: Based, parallel: str, device: torch.device) -> nn.Module:
    """The model on its device, as the module whose forward trains it.

    ddp: every rank holds the whole model. fsdp: the model's parameters become DTensors, of which
    each rank holds a part; a block's are put together while it runs.
    """
    if current_ranks().count == 1:
        return model.to(device)
    if parallel == "ddp":
        return DistributedDataParallel(model.to(device))
    mesh = dist.init_device_mesh(device.type, (dist.get_world_size(),))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def backward_of_part(module: nn.Module, last: bool) -> AbstractContextManager:
    """Where a part of a batch is run: only the backward of the last one adds up over the ranks."""
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(last)
    elif isinstance(module, DistributedDataParallel) and not last:
        return module.no_sync()
    return nullcontext()


def whole(x: Tensor) -> Tensor:
    """A tensor put together from all ranks, which must all call this."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def spread_like(x: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, known to every rank, spread over the ranks as another one is."""
    if not isinstance(like, DTensor):
        return x
    return distribute_tensor(x, like.device_mesh, like.placements, src_data_rank=None)
