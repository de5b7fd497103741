"""
Who divides a stream among processes: torch.distributed's ranks, and loaders that accelerate prepared.

A stream that is divided twice loses sequences, one that nobody divides doubles them, and neither shows in a loss; so
both are refused.  accelerate is asked only where the program has loaded it.
"""

from __future__ import annotations

import sys
from typing import Any

import torch

from sklformat.distill.loader.batches import collate
from sklformat.errors import ResumeError


def find_rank() -> tuple[int, int]:
    """Rank and world size of torch.distributed where it is initialised, else 0 of 1."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def find_prepared(dataset: object) -> Any | None:
    """The loader that accelerate's ``prepare`` made over a dataset, where it is being iterated; else None."""
    if "accelerate.data_loader" not in sys.modules:
        return None
    for loader in reversed(sys.modules["accelerate.state"].GradientState().dataloader_references):
        if loader is not None and (loader.dataset is dataset or _divided(loader) is dataset):
            return loader
    return None


def check_division(where: object, loader: Any, rank: int, world_size: int) -> None:
    """
    Refuse a prepared loader that divides a stream, unless process 0 alone reads a whole one and hands out dicts.

    Args:
        where: The cache, for the message.
        loader: As ``find_prepared`` gives it.
        rank: The dataset's.
        world_size: The dataset's.

    Raises:
        ValueError: Says what to do instead.
    """
    instead = (
        "leave the loader out of prepare and move its batches with batch.to(accelerator.device), "
        "or prepare one over SparseLogitSequences"
    )
    dispatches = isinstance(loader, sys.modules["accelerate.data_loader"].DataLoaderDispatcher)
    if _divided(loader) is not None or (dispatches and world_size > 1):
        processes = loader.state.num_processes if dispatches else loader.dataset.num_processes
        loader.end()  # accelerate forgets the loader, as after its last batch
        raise ValueError(
            f"{where}: accelerate's prepare divides this loader among {processes} processes, and SparseLogitDataset "
            f"divides its stream by itself (this is rank {rank} of {world_size}); {instead}"
        )
    if dispatches and (loader.batch_size is None or loader.collate_fn is collate):
        loader.end()
        raise ValueError(
            f"{where}: accelerate's prepare lets process 0 read for all and takes its batches apart, which ragged "
            f"targets do not allow; {instead}"
        )


def check_epoch(where: object, loader: Any, epoch: int, waiting: int) -> None:
    """
    Refuse that a prepared loader, which counts epochs itself, drops the place that waits to be resumed.

    Raises:
        ResumeError: ``epoch``, which the loader begins, is not the one that waits.
    """
    if epoch != waiting:
        loader.end()
        raise ResumeError(
            f"{where}: the next iteration is to resume in epoch {waiting}, and the loader that accelerate prepared "
            f"begins epoch {epoch}; call its set_epoch({waiting}) before iterating it"
        )


def check_ranks(where: object, rank: int, world_size: int) -> None:
    """
    Refuse a dataset that was made before torch.distributed was initialised: each process would see all of the stream.

    Raises:
        ValueError: Says how many processes there are now.
    """
    now = find_rank()[1]
    if world_size == 1 < now:
        raise ValueError(
            f"{where}: this dataset was made as rank {rank} of {world_size}, before torch.distributed was initialised, "
            f"and each of the {now} processes would train on all of it; make it afterwards, or give rank and world_size"
        )


def _divided(loader: Any) -> Any | None:
    """What accelerate's IterableDatasetShard divides, where a loader has one; else None."""
    shard = sys.modules["accelerate.data_loader"].IterableDatasetShard
    return loader.dataset.dataset if isinstance(loader.dataset, shard) else None
