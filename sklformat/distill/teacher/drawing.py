"""
Records of whole sequences from a teacher's logits, slice after slice, on as many threads of the host as help.

Holds no model. What a record is depends on neither slices nor threads: ``skl.draw`` is keyed by position.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from sklformat.distill.teacher.logit_columns import LogitColumns
from sklformat.format.records import SparseTargets
from sklformat.sampler import draw

_ROWS = 128

_Run: TypeAlias = tuple[int, SparseTargets]  # first position and records of positions that follow each other


class Drawer:
    """
    Draws the records of one sequence at a time; a context, since it may have threads.

    Args:
        kind: "counts" or "ratios", of the records wanted.
        rounds: Draws per position; 0 for topk and topp.
        sampling: Further arguments of ``skl.draw``: sampler, proposal_temperature, k, p, seed, self_normalise.
        threads: How many slices are drawn at once; 1: in the caller's thread.
    """

    def __init__(self, *, kind: str, rounds: int, sampling: dict[str, Any], threads: int = 1) -> None:
        self._kind, self._rounds, self._sampling = kind, rounds, sampling
        self._pool = ThreadPoolExecutor(threads, "draw") if threads > 1 else None
        self._ahead = 2 * threads  # slices that are there at once

    def __enter__(self) -> Drawer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def draw(
        self,
        sequence: int,
        slices: Iterable[tuple[int, Any]],
        columns: LogitColumns | None = None,
        counted_T: NDArray[np.bool_] | None = None,
    ) -> SparseTargets:
        """
        The records of one sequence.

        Args:
            sequence: Its global number.
            slices: (First position, logits [positions, V]) in order, from position 0 on; one may be left out where it
                has no position that counts.
            columns: Take optional columns from logits, which are tensors then, and records.
            counted_T: Which positions get records, [T]; None: all.  What is drawn for one does not depend on the
                others.

        Raises:
            ValueError: Logits that are not finite, at a position that counts; names sequence, position and id.
        """
        if self._pool is None:
            parts = [self._drawn(sequence, columns, counted_T, *part) for part in slices]
            return self._joined(parts, counted_T)
        waiting: deque[Future[list[_Run]]] = deque()
        parts = []
        for part in slices:
            if len(waiting) == self._ahead:
                parts.append(waiting.popleft().result())
            waiting.append(self._pool.submit(self._drawn, sequence, columns, counted_T, *part))
        return self._joined([*parts, *(future.result() for future in waiting)], counted_T)

    def _drawn(
        self,
        sequence: int,
        columns: LogitColumns | None,
        counted_T: NDArray[np.bool_] | None,
        first_position: int,
        logits_TV: Any,
    ) -> list[_Run]:
        """The records of a slice, of one run of positions that count after the other."""
        places = counted_places(counted_T, first_position, len(logits_TV))
        borders = np.flatnonzero(np.diff(places) > 1) + 1
        runs = []
        for run in np.split(places, borders) if places.size else ():
            first, end = int(run[0]), int(run[-1]) + 1
            rows_TV = logits_TV[first - first_position : end - first_position]
            runs.append(
                (first, draw(rows_TV, rounds=self._rounds, sequence=sequence, first_position=first, **self._sampling))
            )
        if columns is not None and runs:
            lengths = np.concatenate([np.diff(drawn.offsets) for _, drawn in runs])
            ids = np.concatenate([drawn.token_ids for _, drawn in runs]).astype(np.int64)
            rows = torch.from_numpy(np.repeat(np.arange(places.size), lengths))
            kept_TV = logits_TV if places.size == len(logits_TV) else logits_TV[places - first_position]
            columns.add(places, kept_TV, rows, torch.from_numpy(ids))
        return runs

    def _joined(self, slices: Sequence[list[_Run]], counted_T: NDArray[np.bool_] | None) -> SparseTargets:
        """The records of all slices as those of one sequence, of the kind wanted."""
        runs = [run for part in slices for run in part]
        positions = sum(drawn.num_positions for _, drawn in runs) if counted_T is None else counted_T.size
        lengths = np.zeros(positions, np.int64)
        for first, drawn in runs:
            lengths[first : first + drawn.num_positions] = np.diff(drawn.offsets)
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        token_ids = np.concatenate([np.empty(0, np.uint32), *(drawn.token_ids for _, drawn in runs)])
        if self._kind == "counts":
            counts = np.concatenate([np.empty(0, np.uint8), *(_counts(drawn) for _, drawn in runs)])
            return SparseTargets(token_ids=token_ids, counts=counts, offsets=offsets)
        weights = np.concatenate([np.empty(0, np.float32), *(self._weights(drawn) for _, drawn in runs)])
        return SparseTargets(token_ids=token_ids, weights=weights, offsets=offsets)

    def _weights(self, part: SparseTargets) -> NDArray[np.float32]:
        return part.weights if part.weights is not None else _counts(part).astype(np.float32) / np.float32(self._rounds)


def on_host(slices: Iterable[tuple[int, torch.Tensor]]) -> Iterator[tuple[int, torch.Tensor]]:
    """Slices of any device as slices of the host, of no more rows than one thread should draw from."""
    for first, logits_TV in slices:
        host_TV = logits_TV.cpu()
        for at in range(0, len(host_TV), _ROWS):
            yield first + at, host_TV[at : at + _ROWS]


def counted_places(counted_T: NDArray[np.bool_] | None, first: int, positions: int) -> NDArray[np.int64]:
    """Those of ``positions`` positions from ``first`` on that count, ascending; None: all of them."""
    if counted_T is None:
        return np.arange(first, first + positions)
    return first + np.flatnonzero(counted_T[first : first + positions])


def _counts(part: SparseTargets) -> NDArray[np.uint8]:
    assert part.counts is not None
    return part.counts
