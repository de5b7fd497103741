"""
Draws and records on their way from a device to the host: one sequence each, asked for later.

Nothing waits before it is asked.  Logits that C refuses are given to C, for its message.
Shape letters: T positions of a sequence, K of them that count, V vocabulary, N rounds.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sklformat.distill.models.devices import to_host
from sklformat.distill.teacher.parts import Part
from sklformat.distill.teacher.row_draws import SMALLEST_WEIGHT
from sklformat.format.records import SparseTargets
from sklformat.sampler import draw


class _Arrival:
    """
    Numbers that are queued on a device.

    Args:
        numbers: int32 [n + 1] on the device; the last: the first position that may not be drawn from, or -1.
        bad_V: The logits of that position, on the device.
        sequence: Global number of the sequence.
        part: Where processes have parts of the rows: that of this one, of which ``bad_V`` is.
    """

    def __init__(self, numbers: Tensor, bad_V: Tensor, sequence: int, part: Part | None = None) -> None:
        self._bad_V, self._sequence, self._part = bad_V, sequence, part
        self._host, self._copied = to_host(numbers)

    def _wait(self) -> NDArray[np.int32]:
        """
        The numbers without the last.

        Raises:
            ValueError: Logits that ``skl.draw`` refuses; the message is its own and names sequence, position and id.
        """
        if self._copied is not None:
            self._copied.synchronize()
        numbers: NDArray[np.int32] = self._host.numpy()
        if numbers[-1] >= 0:
            row_V = self._bad_V if self._part is None else self._part.whole_row(self._bad_V)
            draw(row_V.cpu()[None], rounds=1, sequence=self._sequence, first_position=int(numbers[-1]))
            raise AssertionError("C draws from a row that was refused here")
        return numbers[:-1]


class Draws(_Arrival):
    """
    The draws of one sequence, to be counted.

    Args:
        sampled: int32 [K * N + 1]: draws, and the first bad position.
        bad_V: As above.
        sequence: As above.
        rounds: N.
        part: As above.
    """

    def __init__(self, sampled: Tensor, bad_V: Tensor, sequence: int, rounds: int, part: Part | None = None) -> None:
        super().__init__(sampled, bad_V, sequence, part)
        self._rounds = rounds

    def result(self) -> NDArray[np.int32]:
        """
        Wait for the device: [K, N] ids, each row ascending.

        Raises:
            ValueError: Logits that ``skl.draw`` refuses; the message is its own and names sequence, position and id.
        """
        return self._wait().reshape(-1, self._rounds)


class DrawnRatios(_Arrival):
    """
    The draws of one sequence, to become records with weights.

    The host merges them: 0.26 ms for 1024 positions of 50 draws on one core, while the device is at the next sequence,
    which takes a teacher of 3.6 B parameters 15 ms on an H100.  The device would save a copy of 300 kB, 6 us.

    Args:
        sampled: int32 [K * N + 1], or [2 * K * N + 1] where each draw has a weight of its own, whose bits follow ids.
        bad_V: As above.
        sequence: As above.
        rounds: N.
        counted_T: The positions that count.
        part: As above.
    """

    def __init__(
        self,
        sampled: Tensor,
        bad_V: Tensor,
        sequence: int,
        rounds: int,
        counted_T: NDArray[np.bool_],
        part: Part | None = None,
    ) -> None:
        super().__init__(sampled, bad_V, sequence, part)
        self._rounds, self._counted_T = rounds, counted_T
        self._kept: NDArray[np.int64] | None = None

    def result(self) -> SparseTargets:
        """
        Wait for the device: records of all T positions.

        Raises:
            ValueError: As of ``Draws.result``.
        """
        numbers = self._wait()
        size = int(np.count_nonzero(self._counted_T)) * self._rounds
        ids, bits = numbers[:size], numbers[size:]
        begins = np.ones(size, bool)
        begins[1:] = ids[1:] != ids[:-1]
        begins[:: self._rounds] = True
        at = np.flatnonzero(begins)
        counts = np.diff(at, append=size)
        weights = counts / self._rounds if not bits.size else counts * bits.view(np.float32)[at].astype(np.float64)
        is_kept = weights >= SMALLEST_WEIGHT  # false for NaN
        self._kept = at[is_kept]
        return _records(ids[self._kept], weights[is_kept], self._kept // self._rounds, self._counted_T)

    def record_logprob(self, of_draws_KN: NDArray[np.float16] | None) -> NDArray[np.float16]:
        """The column beside the records of ``result``, which was called, from its values beside the draws."""
        assert of_draws_KN is not None
        kept: NDArray[np.float16] = of_draws_KN.ravel()[self._kept]
        return kept


class Tops(_Arrival):
    """
    The most probable ids of one sequence.

    Args:
        lengths: int32 [K + 1]: records of each position that counts, and the first bad one.
        bad_V: As above.
        sequence: As above.
        records: int32 [2, room]: ids, and the bits of their weights; with more room than there are records.
        counted_T: The positions that count.
        part: As above.
    """

    def __init__(
        self,
        lengths: Tensor,
        bad_V: Tensor,
        sequence: int,
        records: Tensor,
        counted_T: NDArray[np.bool_],
        part: Part | None = None,
    ) -> None:
        super().__init__(lengths, bad_V, sequence, part)
        self._records, self._counted_T = records, counted_T
        self._weights = np.empty(0, np.float32)

    def result(self) -> SparseTargets:
        """
        Wait for the device: records of all T positions.

        Raises:
            ValueError: As of ``Draws.result``.
        """
        lengths_K = self._wait()
        kept = self._records[:, : int(lengths_K.sum())]
        if kept.device.type == "cuda":
            # What is queued behind these records is no reason to wait.
            with torch.cuda.stream(torch.cuda.Stream(kept.device)):  # type: ignore[no-untyped-call]
                kept = kept.cpu()
        ids, bits = kept.numpy()
        self._weights = bits.view(np.float32)
        return _records(ids, self._weights, np.repeat(np.arange(lengths_K.size), lengths_K), self._counted_T)

    def record_logprob(self, _: NDArray[np.float16] | None) -> NDArray[np.float16]:
        """The column beside the records of ``result``, which was called: their weights are the probabilities."""
        return np.log(self._weights.astype(np.float64)).astype(np.float16)


def _records(
    ids: NDArray[np.int32], weights: NDArray[np.floating], rows: NDArray[np.int64], counted_T: NDArray[np.bool_]
) -> SparseTargets:
    """Records of rows, each of which is a position that counts, as those of all positions."""
    lengths_T = np.zeros(counted_T.size, np.int64)
    lengths_T[counted_T] = np.bincount(rows, minlength=int(np.count_nonzero(counted_T)))
    offsets = np.concatenate([[0], np.cumsum(lengths_T)])
    return SparseTargets(token_ids=ids.astype(np.uint32), weights=weights.astype(np.float32), offsets=offsets)


Arrival: TypeAlias = Draws | DrawnRatios | Tops
