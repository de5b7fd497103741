"""
Run a few independent jobs on a few cores, one process per job; stops them all together.

Knows nothing of what the jobs do.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from typing import Any, cast

import torch

from sklformat.errors import SklError

_GRACE_SECONDS = 5.0


@dataclass(frozen=True)
class Job:
    """A function that a new process can import, and its arguments; what it returns must pickle."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]


def run_jobs(jobs: Sequence[Job], *, processes: int, threads: int) -> list[Any]:
    """
    Run jobs, at most ``processes`` at a time, each with ``threads`` threads; their progress bars stand side by side.

    One process: the jobs run here, one after the other, with no process started.

    Args:
        jobs: Started in this order.
        processes: How many run at once, >= 1.
        threads: Threads that torch uses in each, >= 1.

    Returns:
        What each job returned, in the order of ``jobs``.

    Raises:
        Exception: The first error of a job; the others are stopped.
        KeyboardInterrupt: The jobs have ended when it arrives here.
        SklError: A job's process died without a result (killed, out of memory).
    """
    if processes == 1:
        with _threads(threads):
            return [job.function(*job.arguments) for job in jobs]
    results: dict[int, Any] = {}
    waiting = list(range(len(jobs)))
    running: dict[Connection, tuple[int, Any, int]] = {}
    free_bars = list(range(processes))
    try:
        while waiting or running:
            while waiting and free_bars:
                number, bar = waiting.pop(0), free_bars.pop(0)
                connection, process = _start(jobs[number], bar, threads)
                running[connection] = (number, process, bar)
            for ready in wait(list(running)):
                connection = cast("Connection", ready)
                number, process, bar = running[connection]
                results[number] = _receive(connection, process, jobs[number])
                process.join()
                del running[connection]
                free_bars = sorted([*free_bars, bar])
    finally:
        _stop([process for _, process, _ in running.values()])
    return [results[number] for number in range(len(jobs))]


def _start(job: Job, bar: int, threads: int) -> tuple[Connection, Any]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(theirs, job))
    # Both variables are read once, when the new process imports tqdm and torch. It is born with SIGINT blocked, so that
    # a Ctrl-C while it still imports waits for the place that knows what to do with it.
    resource_tracker.ensure_running()  # otherwise started within, which would unblock the signal
    with _environment(TQDM_POSITION=str(bar), OMP_NUM_THREADS=str(threads)), _interrupts_later():
        process.start()
    theirs.close()
    return ours, process


@contextlib.contextmanager
def _interrupts_later() -> Iterator[None]:
    """
    Hold Ctrl-C back until the block has ended; a process that is started half gets half of what it is to do.

    Blocking the signal does this for the new process. Here another thread of a library may take it all the same, and
    Python would then interrupt the main thread; so the handler only remembers.
    """
    pending: list[int] = []
    handled_here = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGINT, lambda number, _: pending.append(number)) if handled_here else None
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        if handled_here:
            signal.signal(signal.SIGINT, before)
    if pending:
        raise KeyboardInterrupt


def _work(connection: Connection, job: Job) -> None:
    """What runs in the new process: the job, and its result or its error into the pipe."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        message = (True, job.function(*job.arguments))
    except KeyboardInterrupt:
        os._exit(130)
    except (SklError, ValueError, TypeError, OSError, RuntimeError, ArithmeticError, LookupError) as error:
        message = (False, (type(error), str(error)))
    with contextlib.suppress(BrokenPipeError):  # the parent was stopped meanwhile: nobody asks any more
        connection.send(message)


def _end_with_parent() -> None:
    """A parent that was killed could not say so; a job that kept running would keep its directory from the next run."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _rebuilt(kind: type[Exception], text: str) -> Exception:
    """An error of the same kind and words; kinds that need more than words become an SklError."""
    try:
        return kind(text)
    except TypeError:
        return SklError(text)


def _receive(connection: Connection, process: Any, job: Job) -> Any:
    try:
        succeeded, value = connection.recv()
    except EOFError:
        process.join()
        if process.exitcode == 130:
            raise KeyboardInterrupt from None
        raise SklError(
            f"the process of {job.function.__name__} ended with exit code {process.exitcode} and no result "
            "(killed, or out of memory); run again to resume"
        ) from None
    finally:
        connection.close()
    if not succeeded:
        raise _rebuilt(*value)
    return value


def _stop(processes: Sequence[Any]) -> None:
    """End the processes; after Ctrl-C the terminal has told them already, so they get a moment to end by themselves."""
    for process in processes:
        process.join(_GRACE_SECONDS if process.is_alive() else None)
    for process in processes:
        if process.is_alive():
            process.terminate()
        process.join()


@contextlib.contextmanager
def _environment(**values: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _threads(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
