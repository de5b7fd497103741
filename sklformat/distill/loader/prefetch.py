"""
Work done ahead of whoever asks for it, by threads; knows nothing of what the work is.

Pays where the work lets go of the GIL, as decoding in C and reading files do.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

MAX_THREADS = 4
_Item = TypeVar("_Item")
_Made = TypeVar("_Made")


def made_ahead(items: Iterable[_Item], make: Callable[[_Item], _Made], ahead: int) -> Iterator[_Made]:
    """
    ``make(item)`` of each item, in order, while the next ones are made already.

    Nothing is made before the first is asked for, and at most ``ahead`` results wait.  An error in ``make`` is raised
    where its result would have come.  However the iteration ends (used up, by an error, closed or let go of), it leaves
    no thread behind.

    Args:
        items: Taken one by one, in the thread that iterates.
        make: Called by ``ahead`` threads at the same time, but by no more than MAX_THREADS.
        ahead: How many are made beyond the one that is asked for, >= 0; 0: no threads at all.
    """
    if ahead == 0:
        yield from map(make, items)
        return
    pool = ThreadPoolExecutor(min(ahead, MAX_THREADS), thread_name_prefix="sklformat-prefetch")
    pending: deque[Future[_Made]] = deque()
    try:
        for item in items:
            pending.append(pool.submit(make, item))
            if len(pending) > ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
