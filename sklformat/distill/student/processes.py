"""
The processes of one training run: which of them this is, and on what device it computes.

Knows no model.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist

from sklformat.distill.models.devices import find_device


@dataclass(frozen=True)
class Process:
    """
    One of the processes that train together.

    Attributes:
        rank: Its number, in [0, world_size).
        world_size: How many there are.
        device: Where it computes.
    """

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether it is the one that writes and speaks for all."""
        return self.rank == 0

    def sum(self, *numbers: int) -> list[int]:
        """The sums of all processes' numbers; each must ask for them."""
        if self.world_size == 1:
            return [*numbers]
        shared = torch.tensor(numbers, device=self.device)
        dist.all_reduce(shared)
        sums: list[int] = shared.tolist()
        return sums

    def wait_for_others(self) -> None:
        """Return once every process has come here."""
        if self.world_size > 1:
            dist.barrier()


@contextlib.contextmanager
def joined(device_name: str) -> Iterator[Process]:
    """
    This process; joins torchrun's others for the time of the block.

    Raises:
        ValueError: There is no such device.
    """
    device = find_device(device_name)
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1:
        yield Process(0, 1, device)
        return
    if device.type == "cuda" and device.index is None:
        device = find_device(f"cuda:{os.environ['LOCAL_RANK']}")
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Process(dist.get_rank(), world_size, device)
    finally:
        dist.destroy_process_group()
