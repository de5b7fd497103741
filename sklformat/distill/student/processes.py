"""
The processes of one training run: which of them this is, on what device it computes, and who wants it to stop.

Knows no model.
"""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType

import torch
import torch.distributed as dist
from torch import Tensor

from sklformat.distill.models.devices import find_device, meet

# Groups stay until the process ends, since an exception, such as that of a signal, keeps the wrapper of DDP beyond its
# group: where DDP lets go of one last, it joins gloo's threads while it holds the lock of Python that these wait for.
_GROUPS: list[dist.ProcessGroup | None] = []


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

    def together(self, values: Tensor) -> Tensor:
        """Those of all processes, one after the other, where each has [M] of them, M its own; on the CPU."""
        if self.world_size == 1:
            return values
        sizes = self.sum(*(len(values) if rank == self.rank else 0 for rank in range(self.world_size)))
        padded = torch.zeros(max(sizes), device=self.device)
        padded[: len(values)] = values
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)]).cpu()

    def wait_for_others(self) -> None:
        """Return once every process has come here."""
        if self.world_size > 1:
            dist.barrier()


@contextlib.contextmanager
def joined(device_name: str) -> Iterator[Process]:
    """
    This process; joins torchrun's others for the time of the block, where it has not yet.  The caller's variables hold
    no DDP wrapper at its end.

    Raises:
        ValueError: There is no such device, or not one for each process; or they were not started by torchrun.
        ConnectionError: Another process has ended before this one.
    """
    device = find_device(device_name)
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1:
        yield Process(0, 1, device)
        return
    unset = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if unset:
        raise ValueError(f"WORLD_SIZE is {world_size} without {', '.join(unset)}; start all processes with torchrun")
    if device.type == "cuda":
        device = _own_device(device, world_size)
        torch.cuda.set_device(device)
    own = not dist.is_initialized()  # by a program that trains several students, say
    if own:
        meet("nccl" if device.type == "cuda" else "gloo")
        _GROUPS.append(dist.group.WORLD)
    try:
        yield Process(dist.get_rank(), world_size, device)
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        raise ConnectionError("another process of this run has ended; what it said tells why") from error
    finally:
        if own:
            # Of DDP's wrapper, which refers to itself: gloo may wait for ever for one that outlives its group.
            gc.collect()
            dist.destroy_process_group()


def _own_device(device: torch.device, world_size: int) -> torch.device:
    """The GPU of this process alone."""
    if device.index is not None:
        raise ValueError(f"device {device} is one GPU for {world_size} processes; use cuda: each then has its own")
    number, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if number >= count:
        raise ValueError(
            f"process {number} of this machine, counted from 0, has no GPU of its own: there are {count}; start "
            f"torchrun with --nproc-per-node {count}"
        )
    return torch.device("cuda", number)


class Stop:
    """
    What Ctrl-C and SIGTERM do to a run: the first is heeded at the end of a step, where something waits for that.

    Attributes:
        is_heeded: Whether something does; else each interrupts at once.
        asked: Whether one has come since.
    """

    def __init__(self) -> None:
        self.is_heeded = self.asked = False

    @contextlib.contextmanager
    def heeded(self) -> Iterator[None]:
        """Wait with the first signal, for the time of the block."""
        self.is_heeded = True
        try:
            yield
        finally:
            self.is_heeded = False

    def hear(self, _number: int, _frame: FrameType | None) -> None:
        """Take a signal."""
        # Under torchrun one Ctrl-C comes twice, from the terminal and from torchrun, which kills who takes too long.
        if self.asked and "TORCHELASTIC_RUN_ID" in os.environ:
            return
        if self.asked or not self.is_heeded:
            raise KeyboardInterrupt
        self.asked = True
        # Not by way of sys.stderr, in the middle of a write to which this may be.
        os.write(2, b"\nstopping at the end of this step, with a checkpoint; a second signal stops at once\n")


@contextlib.contextmanager
def stoppable() -> Iterator[Stop]:
    """Let SIGTERM stop the block as Ctrl-C does; only the main thread can be stopped so."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    # One that is ignored stays so, as in a shell's background.
    heard = [number for number in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, stop.hear) for number in heard}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def leave_signals(_worker_id: int) -> None:
    """Of a process that reads ahead: Ctrl-C reaches all that a terminal runs, and who trains says when reading ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
