"""
One student on several processes: replicated by DDP, or divided between them by FSDP2; and its state, whole again.

Knows no loss and no step.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from sklformat.distill.models import layers
from sklformat.distill.student.processes import Process


def replicated(root: nn.Module) -> nn.Module:
    """
    The same weights on each process; gradients are averaged during the backward pass.

    Args:
        root: What is called in each step, on its device; process 0's weights count.
    """
    separate = layers.has_separate_experts(root)
    wrapper = DistributedDataParallel(
        root,
        gradient_as_bucket_view=True,
        find_unused_parameters=separate,
        # Parameters that never get a gradient (of a part for images) are found once, in the first backward pass.
        static_graph=not separate,
    )
    wrapper.broadcast_buffers = False  # of a language model they are constants; as an argument it has two names
    return wrapper


def divide(model: Any, own_layers: Sequence[nn.Module], process: Process, *, half: bool) -> None:
    """
    Give each process its part of every weight: each layer is gathered where it runs, the rest for the whole pass.

    Args:
        model: What is called in each step, on its device; changed in place.
        own_layers: Its layers.
        process: Which this is.
        half: Gather weights in bfloat16; gradients are averaged in float32 all the same.

    Raises:
        ValueError: There is one process, or its experts are modules of their own.
    """
    if process.world_size == 1:
        raise ValueError(
            "shard divides a student between processes, and there is one; start several with torchrun, or leave it out"
        )
    if layers.has_separate_experts(model):
        raise ValueError(
            f"the experts of {type(model).__name__} are modules of their own, of which processes use different ones; "
            "FSDP2 cannot divide them: train without --shard, or with a newer transformers"
        )
    mesh = init_device_mesh(process.device.type, (process.world_size,))
    gathered_as = torch.bfloat16 if half else None
    policy = MixedPrecisionPolicy(param_dtype=gathered_as, reduce_dtype=torch.float32)
    for module in (*own_layers, model):
        fully_shard(module, mesh=mesh, mp_policy=policy)


def without_sync(root: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Leave the gradients of a replicated student unaveraged: more of the step follows."""
    return root.no_sync() if isinstance(root, DistributedDataParallel) else contextlib.nullcontext()


def part_again(model: nn.Module) -> None:
    """Drop what a divided student gathered for a pass without gradients, so that its parameters are the parts."""
    if isinstance(model, FSDPModule):
        model.reshard()


def whole(value: Any, *, keep: bool) -> Any:
    """
    A state with its tensors whole, on the CPU; every process must ask for it.

    Args:
        value: Dicts and lists of tensors and whatever else; what is one tensor in two places stays one.
        keep: Whether this process wants them; one that does not gets empty ones, and never holds more than one.
    """
    done: dict[int, Tensor] = {}

    def gathered(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: gathered(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [gathered(inner) for inner in value]
        if isinstance(value, Tensor) and id(value) not in done:
            tensor = full(value).detach()
            done[id(value)] = tensor.cpu() if keep else tensor.new_empty(0)
        return done[id(value)] if isinstance(value, Tensor) else value

    return gathered(value)


def full(tensor: Tensor) -> Tensor:
    """A tensor whole, where it is; every process must ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process keeps."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def like(value: Tensor, tensor: Tensor) -> Tensor:
    """A whole tensor as another one of its shape is kept: divided between the processes as that is."""
    if not isinstance(tensor, DTensor):
        return value
    mesh, placements = tensor.device_mesh, tensor.placements
    return distribute_tensor(value.to(tensor.device), mesh, placements, src_data_rank=None)
