"""Several processes that train one network together, as torchrun starts them."""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from serving.errors import DeviceError


@dataclass(frozen=True)
class Processes:
    """How many processes train together, and which of them this is; one process alone needs no torchrun."""

    rank: int = 0  # from 0; that process alone writes files and talks
    count: int = 1
    local_rank: int = 0  # on this machine: which of its GPUs to use

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files and talks."""
        return self.rank == 0

    def wrap(self, network: nn.Module) -> nn.Module:
        """The network, with gradients that are the mean over all processes."""
        return DistributedDataParallel(network, broadcast_buffers=False) if self.count > 1 else network

    def share(self, indices: torch.Tensor) -> torch.Tensor:
        """This process's part of a batch's indices, int64 [N]."""
        return indices[self.rank :: self.count]

    def add(self, numbers: torch.Tensor) -> torch.Tensor:
        """The sum of `numbers` over all processes, in place."""
        if self.count > 1:
            distributed.all_reduce(numbers)
        return numbers

    def agree(self, network: nn.Module) -> None:
        """Give every process the first one's statistics of batch normalisation."""
        if self.count > 1:
            for buffer in network.buffers():
                distributed.broadcast(buffer, src=0)

    def gather(self, value: Any) -> list[Any]:
        """Every process's value, by rank."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        distributed.all_gather_object(values, value)
        return values

    def wait(self) -> None:
        """Return when all processes have come here."""
        if self.count > 1:
            distributed.barrier()


ALONE = Processes()


def device_spec(spec: str, processes: Processes) -> str:
    """Each process's own GPU where several were started with plain `cuda` or `auto`."""
    if processes.count == 1 or spec not in ("auto", "cuda") or not torch.cuda.is_available():
        return spec
    return f"cuda:{processes.local_rank}"


@contextlib.contextmanager
def join(spec: str) -> Iterator[Processes]:
    """Meet the processes that torchrun started with this one; alone without it.

    Args:
        spec: the device asked for; it decides what the processes talk by: NCCL on CUDA, gloo elsewhere.

    Raises:
        DeviceError: the device is one that only a single process can use.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield ALONE
        return
    if spec == "mps" or spec.startswith("cuda:"):
        raise DeviceError(
            f"--device {spec} is one device, and {count} processes were started: use --device cuda or cpu"
        )
    cuda = spec != "cpu" and torch.cuda.is_available()
    processes = Processes(int(os.environ["RANK"]), count, int(os.environ["LOCAL_RANK"]))
    if cuda:
        torch.cuda.set_device(processes.local_rank)
    # DistributedDataParallel and the optimisers import this, and its tables keep for good the group that they find when
    # they are made: gloo's threads then outlive the interpreter, and abort the process when they need it.
    importlib.import_module("torch._dynamo")
    distributed.init_process_group("nccl" if cuda else "gloo")
    try:
        yield processes
    finally:
        distributed.destroy_process_group()
