"""
Records of whole sequences from a teacher's logits, slice after slice, on as many threads of the host as help.

Holds no model. What a record is depends on neither slices nor threads: ``skl.draw`` is keyed by position.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sklformat.distill.teacher.logit_columns import LogitColumns
from sklformat.format.records import SparseTargets
from sklformat.sampler import draw


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
        self, sequence: int, slices: Iterable[tuple[int, Any]], columns: LogitColumns | None = None
    ) -> SparseTargets:
        """
        The records of one sequence.

        Args:
            sequence: Its global number.
            slices: (First position, logits [positions, V]) that follow each other from position 0 on.
            columns: Take optional columns from logits, which are tensors then, and records.

        Raises:
            ValueError: Logits that are not finite; names sequence, position and id.
        """
        if self._pool is None:
            return self._joined([self._drawn(sequence, columns, *part) for part in slices])
        waiting: deque[Future[SparseTargets]] = deque()
        parts: list[SparseTargets] = []
        for part in slices:
            if len(waiting) == self._ahead:
                parts.append(waiting.popleft().result())
            waiting.append(self._pool.submit(self._drawn, sequence, columns, *part))
        return self._joined([*parts, *(future.result() for future in waiting)])

    def _drawn(self, sequence: int, columns: LogitColumns | None, first_position: int, logits_TV: Any) -> SparseTargets:
        drawn = draw(logits_TV, rounds=self._rounds, sequence=sequence, first_position=first_position, **self._sampling)
        if columns is not None:
            rows = torch.from_numpy(np.repeat(np.arange(drawn.num_positions), np.diff(drawn.offsets)))
            columns.add(first_position, logits_TV, rows, torch.from_numpy(drawn.token_ids.astype(np.int64)))
        return drawn

    def _joined(self, parts: Sequence[SparseTargets]) -> SparseTargets:
        """The records of consecutive slices as those of one sequence, of the kind wanted."""
        lengths = np.concatenate([np.diff(part.offsets) for part in parts])
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        token_ids = np.concatenate([part.token_ids for part in parts])
        if self._kind == "counts":
            counts = np.concatenate([_counts(part) for part in parts])
            return SparseTargets(token_ids=token_ids, counts=counts, offsets=offsets)
        weights = np.concatenate([self._weights(part) for part in parts])
        return SparseTargets(token_ids=token_ids, weights=weights, offsets=offsets)

    def _weights(self, part: SparseTargets) -> NDArray[np.float32]:
        return part.weights if part.weights is not None else _counts(part).astype(np.float32) / np.float32(self._rounds)


def _counts(part: SparseTargets) -> NDArray[np.uint8]:
    assert part.counts is not None
    return part.counts
