"""
The processes that capture one cache together: those that torchrun started, or this one alone.

They exchange a few words at the beginning and at the end, over gloo wherever the teachers run; no tensor passes.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType
from typing import Any, TypeVar

import torch.distributed as dist

from sklformat.errors import CaptureError

_Result = TypeVar("_Result")
# One rank may tokenise, or end its last shard, long after the others. A process that is gone is noticed at once: its
# connections close. One that hangs is the launcher's to find.
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
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1

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
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        with self._partners():
            dist.all_gather_object(values, value)
        return values

    def first(self, work: Callable[[], _Result]) -> _Result:
        """
        What rank 0's ``work`` gives, on every rank; the others do none.

        Raises:
            CaptureError: Another rank is gone; on rank 0 what ``work`` raises.
        """
        return self.gather(work() if self.rank == 0 else None)[0]  # type: ignore[return-value]

    def in_turn(self, work: Callable[[bool], _Result]) -> _Result:
        """
        Run ``work`` on every rank: on the first, then on the first of each machine, then on all others.

        Args:
            work: Called with whether this rank is a first one, here or at all.

        Raises:
            CaptureError: Another rank is gone; and what ``work`` raises.
        """
        turn = 0 if self.rank == 0 else 1 if self.local_rank == 0 else 2
        results = []
        for now in range(3 if self.world_size > 1 else 1):
            if now == turn:
                results.append(work(turn < 2))
            self.wait()
        return results[0]

    @contextlib.contextmanager
    def _partners(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # gloo's: a connection was closed
            reason = str(error).partition("\n")[0]
            raise CaptureError(
                f"rank {self.rank}: another rank of this run has ended ({reason}); what was captured is kept, "
                "run the same command again to resume"
            ) from None


@contextlib.contextmanager
def joined() -> Iterator[Ranks]:
    """
    Join the processes that torchrun started, for the time of the block; without torchrun this one is alone.

    Raises:
        ValueError: torchrun's variables contradict each other.
    """
    environment = {name: int(os.environ.get(name.upper(), "0")) for name in ("rank", "local_rank")}
    sizes = {name: int(os.environ.get(name.upper(), "1")) for name in ("world_size", "local_world_size")}
    ranks = Ranks(**environment, **sizes)
    if ranks.world_size == 1:
        yield Ranks()
        return
    try:
        dist.init_process_group("gloo", timeout=_PATIENCE)
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"rank {ranks.rank} cannot meet the other ranks ({str(error).partition(chr(10))[0]}); "
            "start all of them with torchrun"
        ) from None
    try:
        yield ranks
    finally:
        dist.destroy_process_group()


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
