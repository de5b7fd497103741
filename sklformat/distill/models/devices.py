"""
The devices that torch can use here, by a user's word for them, what goes to them and comes back, the cores, and how
processes of them meet.

Knows no model.
"""

from __future__ import annotations

import itertools
import os
import resource
import sys
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

_Carried = TypeVar("_Carried")
_MEETINGS = itertools.count()


def find_device(name: str) -> torch.device:
    """
    The device that a user's word means.

    Args:
        name: "auto" (the GPU if there is one, else the CPU), "cpu", "cuda" or "cuda:1", …

    Raises:
        ValueError: No such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ValueError(f"device {name!r} is not known; use auto, cpu, cuda or cuda:1, …")
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if not count:
            raise ValueError(f"device {name}: no CUDA device here; use cpu")
        if device.index is not None and device.index >= count:
            raise ValueError(f"device {name}: the last CUDA device here is cuda:{count - 1}; use it, or auto")
    return device


def to_device(values: _Carried, device: torch.device) -> _Carried:
    """
    A copy on a device, which on a GPU waits for nothing that it still does.

    Args:
        values: On the host: a tensor, or what pins its memory and moves as one.
        device: Where to.
    """
    carried: Any = values
    is_gpu = device.type == "cuda"
    # From memory that may be paged out a copy begins once all that was queued before it is done, and the host waits.
    moved: _Carried = (carried.pin_memory() if is_gpu else carried).to(device, non_blocking=is_gpu)
    return moved


def to_host(values: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """A tensor on its way to the host, and the event that says when it is there; None: it is."""
    if not values.is_cuda:
        return values.cpu(), None
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(values, non_blocking=True)
    # Of the device that has them, which need not be the current one.
    return host, torch.cuda.current_stream(values.device).record_event()


def own_devices(local_rank: int, local_world_size: int) -> list[int]:
    """
    Numbers of the GPUs that belong to one of a machine's processes, each GPU to one process.

    Args:
        local_rank: The process, counted from 0 on this machine.
        local_world_size: How many processes this machine runs.

    Raises:
        ValueError: Fewer GPUs than processes, or a number of GPUs that the processes cannot share evenly.
    """
    count = torch.cuda.device_count()
    if count == 0 or count % local_world_size:
        raise ValueError(
            f"{count} CUDA devices for {local_world_size} processes on this machine; "
            "start as many processes as divide the devices (torchrun --nproc-per-node), or set CUDA_VISIBLE_DEVICES"
        )
    share = count // local_world_size
    return list(range(local_rank * share, (local_rank + 1) * share))


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# Dense products in bfloat16 and in float32 without TF32, TFLOP/s, as NVIDIA's data sheets of these cards give them.
_PEAKS = {
    "A100": (312.0, 19.5),
    "A10": (125.0, 31.2),
    "A40": (149.7, 37.4),
    "B200": (2250.0, 75.0),
    "H100": (989.4, 66.9),
    "H100 NVL": (835.5, 60.0),
    "H100 PCIe": (756.0, 51.0),
    "H200": (989.4, 66.9),
    "H200 NVL": (835.5, 60.0),
    "L4": (121.0, 30.3),
    "L40S": (362.0, 91.6),
}


def peak_flops(name: str, dtype: str) -> float | None:
    """
    Floating point operations per second that a GPU can do at most.

    Args:
        name: As torch gives it, such as "NVIDIA H100 80GB HBM3".
        dtype: Of the matrix products, "bfloat16" or "float32".

    Returns:
        None for a GPU that is not known here.
    """
    words = name.replace("-", " ").split()
    known = [card for card in _PEAKS if all(word in words for word in card.split())]
    if not known:
        return None
    return 1e12 * _PEAKS[max(known, key=len)][dtype == "float32"]


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory that this process has used: on a GPU in torch's tensors, else in main memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def meet(backend: str, *, timeout: timedelta | None = None) -> None:
    """
    Join torchrun's other processes, as ``torch.distributed.init_process_group`` does, however often they part again.

    Each meeting has names of its own: under those of an earlier one, addresses stand where nobody answers any more.

    Args:
        backend: As there.
        timeout: As there; None: torch's own.

    Raises:
        ValueError, RuntimeError: As there.
    """
    patience: dict[str, Any] = {} if timeout is None else {"timeout": timeout}
    found = dist.rendezvous("env://", **patience)  # type: ignore[attr-defined]  # public by torch's documentation
    store, rank, world_size = next(found)
    part = dist.PrefixStore(f"meeting {next(_MEETINGS)}", store)  # type: ignore[attr-defined]
    dist.init_process_group(backend, store=part, rank=rank, world_size=world_size, **patience)
