"""
The processes that capture one cache together: those that torchrun started, those of any launcher, or this one alone.

Those of torchrun exchange a few words at the beginning and at the end, over gloo wherever the teachers run; no tensor
passes, unless they have a part each of one teacher.  Those of another launcher never meet.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from sklformat.cache.sharding import other_settings
from sklformat.capture.plan import find_header
from sklformat.capture.runs import Agreement, Run
from sklformat.distill.models.devices import meet
from sklformat.distill.teacher.provenance import agree_on_versions
from sklformat.errors import CaptureError, SettingsError
from sklformat.files.disk import shared_directory
from sklformat.format.header import Header
from sklformat.settings.cache import CacheConfig

_Result = TypeVar("_Result")
# One rank may tokenise, or end its last shard, long after the others. A process that is gone is noticed at once: its
# connections close. One that hangs is the launcher's to find.
_OF_CONNECTIONS = re.compile("gloo|NCCL|[Cc]onnection|socket")
_PATIENCE = timedelta(days=30)


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """
    This process's place among those of the run.

    Attributes:
        rank: 0..world_size - 1.
        world_size: Number of processes.
        local_rank: Place among the processes of this machine.
        local_world_size: Number of processes of this machine.
        apart: The run, where its ranks never meet: what one asks of all others it asks of itself, and what the first
            does for all each does for itself, in turn.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    apart: Run | None = None

    @contextlib.contextmanager
    def held(self, directory: Path, run: str) -> Iterator[None]:
        """
        Hold a directory together with the other ranks of this run, for the time of the block.

        Raises:
            InUseError: Another run has it, or another process this rank.
        """
        with shared_directory(directory, run), self.apart.taken() if self.apart else contextlib.nullcontext():
            yield

    def are_divided(self, tensor_parallel: int) -> bool:
        """
        Whether these processes have a part each of one teacher.

        Raises:
            SettingsError: Some of them should.
        """
        if tensor_parallel not in (1, self.world_size) or (tensor_parallel > 1 and self.apart is not None):
            raise SettingsError(
                f"tensor_parallel {tensor_parallel} with {self.world_size} processes: all of a run have a part of the "
                f"one teacher, several teachers of parts are not supported; torchrun --nproc-per-node {tensor_parallel}"
            )
        return tensor_parallel > 1

    def wait(self) -> None:
        """
        Wait until all ranks are here.

        Raises:
            CaptureError: Another rank is gone.
        """
        self.gather(None)

    def gather(self, value: _Result) -> list[_Result]:
        """
        The values of all ranks, in their order, on each of them.

        Raises:
            CaptureError: Another rank is gone.
        """
        if self.world_size == 1 or self.apart is not None:
            return [value]
        values: list[Any] = [None] * self.world_size
        with self.partners():
            dist.all_gather_object(values, value)
        return values

    def first(self, work: Callable[[], _Result]) -> _Result:
        """
        What rank 0's ``work`` gives, on every rank; the others do none.

        Raises:
            CaptureError: Another rank is gone; on rank 0 what ``work`` raises.
        """
        return self.gather(work() if self.rank == 0 or self.apart is not None else None)[0]  # type: ignore[return-value]

    def in_turn(self, work: Callable[[bool], _Result]) -> _Result:
        """
        Run ``work`` on every rank: on the first, then on the first of each machine, then on all others.

        Args:
            work: Called with whether this rank is a first one, here or at all.

        Raises:
            CaptureError: Another rank is gone; and what ``work`` raises.
        """
        if self.apart is not None:
            with self.apart.turn():
                return work(self.apart.begun() is None)
        turn = 0 if self.rank == 0 else 1 if self.local_rank == 0 else 2
        results = []
        for now in range(3 if self.world_size > 1 else 1):
            if now == turn:
                results.append(work(turn < 2))
            self.wait()
        return results[0]

    @contextlib.contextmanager
    def partners(self) -> Iterator[None]:
        """
        Say in our words, for the time of the block, that another rank is gone.

        Raises:
            CaptureError: It is.
        """
        try:
            yield
        except RuntimeError as error:  # of gloo or NCCL: a connection was closed
            if self.world_size == 1 or not _OF_CONNECTIONS.search(str(error)):
                raise
            reason = str(error).partition("\n")[0]
            raise CaptureError(
                f"rank {self.rank}: another rank of this run has ended ({reason}); what was captured is kept, "
                "run the same command again to resume"
            ) from None


@contextlib.contextmanager
def joined(run: Run | None = None, *, tensors: bool = False) -> Iterator[Ranks]:
    """
    Join the processes that torchrun started, for the time of the block; without torchrun this one is alone.

    Args:
        run: Of ranks that any other launcher started.
        tensors: Whether they exchange tensors too, which on GPUs goes over NCCL.

    Raises:
        ValueError: torchrun's variables contradict each other, or there is a run beside them.
    """
    rank, local_rank = (int(os.environ.get(name, "0")) for name in ("RANK", "LOCAL_RANK"))
    world_size, local_world_size = (int(os.environ.get(name, "1")) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    ranks = Ranks(rank=rank, world_size=world_size, local_rank=local_rank, local_world_size=local_world_size)
    if run is not None:
        if ranks.world_size > 1:
            raise ValueError(
                f"run {run.name} says that this is rank {run.rank} of {run.world_size}, torchrun that it is rank "
                f"{ranks.rank} of {ranks.world_size}; leave run out, or start the processes without torchrun"
            )
        yield Ranks(rank=run.rank, world_size=run.world_size, apart=run)
        return
    if ranks.world_size == 1:
        yield Ranks()
        return
    try:
        on_gpus = tensors and torch.cuda.is_available()
        meet("cpu:gloo,cuda:nccl" if on_gpus else "gloo", timeout=_PATIENCE)
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"rank {ranks.rank} cannot meet the other ranks ({str(error).partition(chr(10))[0]}); "
            "start all of them with torchrun"
        ) from None
    try:
        yield ranks
    finally:
        dist.destroy_process_group()


def agree(config: CacheConfig, ranks: Ranks, header: Header, num_sequences: int) -> Header:
    """
    The header to write, the same on all ranks, given what is there already.

    Args:
        config: The settings.
        ranks: Of this run.
        header: What this rank would write.
        num_sequences: Of the whole cache, as this rank sees it.

    Raises:
        SettingsError: Another rank, or what is there, has other settings; shows both values.
        CaptureError: Another rank is gone.
        FormatError, RemoteError: What is there cannot be read.
    """
    how: dict[str, Any] = {"keep": config.keep_versions, "place": str(config.out)}
    run = ranks.apart
    if run is None:
        _check_same(ranks, header)
        return ranks.first(lambda: agree_on_versions(header, find_header(config.directory, config.url), **how))
    with run.turn():
        found = run.begun()
        there = find_header(config.directory, config.url) if found is None else found.header
        header = agree_on_versions(header, there, **how)
        if found is None and there is not None and (differing := there.differences(header)):
            raise other_settings(config.out, differing)
        mine = Agreement(
            run=run.name,
            world_size=run.world_size,
            num_sequences=num_sequences,
            sequences_per_shard=config.sequences_per_shard,
            header=header,
        )
        run.agree(mine)
    return header


def _check_same(ranks: Ranks, header: Header) -> None:
    """Ranks whose teachers or texts differ would make shards that do not belong together."""
    for rank, other in enumerate(ranks.gather(header)):
        if other != header:
            raise SettingsError(
                f"rank {ranks.rank} and rank {rank} have other settings: {'; '.join(header.differences(other))}; "
                "give every rank the same teacher, text and libraries"
            )


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """
    Let SIGTERM stop the block as Ctrl-C does: torchrun sends it to the ranks that are left when one has failed.

    Only the first counts, so that nothing disturbs the orderly end.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, _frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
