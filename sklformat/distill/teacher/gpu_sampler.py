"""
Records where the logits lie: the law of ``skl.draw``, so that no row leaves its device.

Draws are made by kernels/draw_rows.py where that runs, else by torch operations (row_draws); the most probable ids are
always chosen by these, from sums that a kernel made where it runs.  Both differ from C by rounding alone: about one
draw in some thousands falls to a neighbour.  Equal logits in equal slices give equal records on one kind of device, not
on two.

Nothing here waits for the device, and no shape depends on data: a sequence is queued and asked for later (arrivals).
Knows no model and no file.  Shape letters: T positions, K of them that count, P positions of one slice, V vocabulary,
N rounds, M places: as many ids as a position can keep.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sklformat.distill import kernels
from sklformat.distill.kernels.drawn import Drawn, Sums
from sklformat.distill.models.devices import to_device
from sklformat.distill.teacher import row_draws
from sklformat.distill.teacher.arrivals import Arrival, DrawnRatios, Draws, Tops
from sklformat.distill.teacher.drawing import counted_places
from sklformat.distill.teacher.logit_columns import LogitColumns
from sklformat.distill.teacher.parts import Found, Part
from sklformat.distill.teacher.row_draws import RowDraws
from sklformat.errors import SettingsError
from sklformat.format.columns import ENTROPY, LABEL_LOGPROB, RECORD_LOGPROB
from sklformat.sampler import MAX_COUNT_ROUNDS, MAX_K, check_rounds, check_temperature

_Given: TypeAlias = tuple[Tensor | None, Tensor | None, Tensor | None]  # ids, log_sum and entropy of a slice

DEVICES = ("cuda",)
"""Kinds of device that draw for themselves; beside a CPU teacher C is faster."""

MAX_PLACES = 1 << 27
"""Records that a sequence may have at most: those of two sequences, 8 bytes each, are in memory at once."""


def draws_there(device: torch.device, seq_len: int, places: int, *, divided: bool) -> bool:
    """
    Whether a teacher's device draws for itself, and not C.

    Args:
        device: The teacher's.
        seq_len: Positions of a sequence.
        places: Records that each may have.
        divided: Whether processes have a part of the logits each, which C does not draw from.

    Raises:
        SettingsError: They have, and a sequence has more records than there is room for.
    """
    has_room = seq_len * places <= MAX_PLACES
    if divided and not has_room:
        raise SettingsError(
            f"{places} records at each of {seq_len} positions are more than the {MAX_PLACES} that tensor_parallel "
            "draws; give a smaller k, or fewer rounds"
        )
    return has_room and (divided or device.type in DEVICES)


class DeviceSampler:
    """
    Draws sequence after sequence on the device that logits come on.

    Args:
        sampler: As of ``skl.draw``.
        rounds: N, draws per position, 1..65535; without meaning for topk and topp.
        seed: 0..2**64 - 1.
        proposal_temperature: As of ``skl.draw``.
        k: As of ``skl.draw``.
        p: As of ``skl.draw``.
        self_normalise: As of ``skl.draw``.
        part: Where processes have parts of the rows: that of this one.  All of them draw together then, by torch
            operations; it gives the same on each.

    Raises:
        ValueError: No such sampler, or rounds or temperature out of range; k, p and seed are taken as checked.
    """

    def __init__(
        self,
        *,
        sampler: str,
        seed: int,
        rounds: int = 0,
        proposal_temperature: float = 1.0,
        k: int | None = None,
        p: float | None = None,
        self_normalise: bool = True,
        part: Part | None = None,
    ) -> None:
        if sampler not in ("multinomial", "systematic", "topk", "topp"):
            raise ValueError(f"a device draws by multinomial, systematic, topk or topp, got sampler {sampler!r}")
        check_temperature(proposal_temperature)
        self._is_top = sampler in ("topk", "topp")
        if not self._is_top:
            check_rounds(rounds)
        self._rounds, self._k, self._p = rounds, MAX_K if k is None else k, 1.0 if p is None else p
        self._law: dict[str, Any] = {
            "rounds": rounds,
            "seed": seed,
            "systematic": sampler == "systematic",
            "temperature": proposal_temperature,
            "self_normalise": self_normalise,
        }
        self._row_draws = RowDraws(**self._law)
        self._part = part

    @torch.inference_mode()
    def draw(
        self,
        sequence: int,
        positions: int,
        slices: Iterable[tuple[int, Tensor]],
        columns: LogitColumns | None = None,
        counted_T: NDArray[np.bool_] | None = None,
    ) -> Arrival:
        """
        Queue the records of one sequence.

        Args:
            sequence: Its global number, 0..2**64 - 1.
            positions: T, >= 1.
            slices: (First position, logits [P, V] of float32, float16 or bfloat16), all on one device, that together
                are positions 0..T - 1; one may be left out where it has no position that counts.  Of a part, of the
                ids that are here, and the same slices in all processes.
            columns: Take optional columns from logits and draws.
            counted_T: Which positions are drawn from, [T]; None: all.

        Returns:
            What gives them: ``Draws`` where counts say it all, else records with weights.
        """
        counted_T = np.ones(positions, bool) if counted_T is None else counted_T
        places_K = counted_places(counted_T, 0, positions)
        queue: _DrawQueue | _TopQueue | None = None
        for start, slice_PV in slices:
            first, last = np.searchsorted(places_K, (start, start + len(slice_PV))).tolist()
            if first == last:
                continue
            if queue is None:
                queue = self._queue(places_K, slice_PV)
            logits_PV, places_P = slice_PV, queue.places_K[first:last]
            if last - first < len(slice_PV):
                logits_PV = slice_PV.index_select(0, places_P - start)
            self._take(queue, first, logits_PV, places_P, places_K[first:last], sequence, columns)
        if queue is None:
            queue = self._queue(places_K, torch.empty(0, 1))
            if columns is not None:
                nothing = None if self._is_top else torch.empty((0, self._rounds), dtype=torch.int64)
                columns.add(places_K, torch.empty(0, 1), None, nothing)
        arrival = self._arrival(queue, sequence, counted_T)
        if columns is not None:
            columns.fetch()
        return arrival

    def _take(
        self,
        queue: _DrawQueue | _TopQueue,
        first: int,
        logits_PV: Tensor,
        places_P: Tensor,
        places: NDArray[np.int64],
        sequence: int,
        columns: LogitColumns | None,
    ) -> None:
        """Queue what a slice gives, and its columns."""
        want_entropy = columns is not None and ENTROPY in columns.names
        if self._part is not None:
            self._take_part(queue, first, logits_PV, places_P, places, sequence, columns)
            return
        if isinstance(queue, _TopQueue):
            sums = self._sums(logits_PV, want_entropy)
            queue.put(first, logits_PV, sums, self._p)
            given: _Given = None, sums.log_sum(), sums.entropy
        else:
            drawn = self._drawn(logits_PV, places_P, sequence, want_entropy)
            queue.put(first, drawn, logits_PV)
            given = drawn.ids, drawn.log_sum, drawn.entropy
        if columns is not None:
            columns.add(places, logits_PV, None, *given)

    def _take_part(
        self,
        queue: _DrawQueue | _TopQueue,
        first: int,
        logits_PV: Tensor,
        places_P: Tensor,
        places: NDArray[np.int64],
        sequence: int,
        columns: LogitColumns | None,
    ) -> None:
        """The same of the ids that are here."""
        assert self._part is not None
        names = () if columns is None else columns.names
        wanted: dict[str, Any] = {"want_entropy": ENTROPY in names}
        if columns is not None and LABEL_LOGPROB in names:
            wanted["labels_P"] = columns.labels(places, logits_PV.device)
        if isinstance(queue, _TopQueue):
            some = max(1, row_draws.KEYS_AT_ONCE // queue.places)
            if len(logits_PV) > some:
                for at in range(0, len(logits_PV), some):
                    span = slice(at, at + some)
                    given = logits_PV[span], places_P[span], places[span]
                    self._take_part(queue, first + at, *given, sequence, columns)
                return
            found = self._part.tops(logits_PV, queue.places, **wanted)
            queue.put_keys(first, logits_PV, found, self._p)
        else:
            wanted["want_logits"] = RECORD_LOGPROB in names
            found = self._part.draw(self._row_draws, logits_PV, places_P, sequence, **wanted)
            assert found.drawn is not None
            queue.put(first, found.drawn, logits_PV)
        if columns is not None:
            columns.add_known(places, found.sums.log_sum(), found.sums.entropy, found.label, found.logits)

    def _queue(self, places_K: NDArray[np.int64], logits_PV: Tensor) -> _DrawQueue | _TopQueue:
        if self._is_top:
            vocab_size = logits_PV.shape[1] if self._part is None else self._part.vocab_size
            return _TopQueue(places_K, logits_PV, min(self._k, vocab_size))
        return _DrawQueue(places_K, logits_PV, self._rounds, tempered=self._law["temperature"] != 1)

    def _arrival(self, queue: _DrawQueue | _TopQueue, sequence: int, counted_T: NDArray[np.bool_]) -> Arrival:
        if isinstance(queue, _TopQueue):
            return Tops(queue.numbers, queue.bad_V, sequence, queue.records, counted_T, self._part)
        if self._law["temperature"] == 1 and self._rounds <= MAX_COUNT_ROUNDS:
            return Draws(queue.numbers, queue.bad_V, sequence, self._rounds, self._part)
        return DrawnRatios(queue.numbers, queue.bad_V, sequence, self._rounds, counted_T, self._part)

    def _drawn(self, logits_PV: Tensor, places_P: Tensor, sequence: int, want_entropy: bool) -> Drawn:
        if kernels.run_on(logits_PV.device):
            from sklformat.distill.kernels import draw_rows  # noqa: PLC0415  needs Triton

            if logits_PV.shape[1] <= draw_rows.MAX_VOCAB and self._rounds <= draw_rows.MAX_ROUNDS:
                return draw_rows.draw_rows(
                    logits_PV, places_P, sequence=sequence, want_entropy=want_entropy, **self._law
                )
        return self._row_draws.draw(logits_PV, places_P, sequence)

    @staticmethod
    def _sums(logits_PV: Tensor, want_entropy: bool) -> Sums:
        if kernels.run_on(logits_PV.device):
            from sklformat.distill.kernels import draw_rows  # noqa: PLC0415  needs Triton

            return draw_rows.sum_rows(logits_PV, want_entropy=want_entropy)
        return row_draws.sum_rows(logits_PV)


class _Queue:
    """
    What a sequence's slices gave so far, on their device.

    Args:
        places_K: Positions that count.
        logits_PV: Of the first slice.
        length: Numbers to come.

    Attributes:
        places_K: The same, on the device.
        numbers: int32 [length + 1]; the last: the first position that may not be drawn from, or -1.
        bad_V: The logits of that position.
    """

    def __init__(self, places_K: NDArray[np.int64], logits_PV: Tensor, length: int) -> None:
        self.places_K = to_device(torch.from_numpy(places_K), logits_PV.device)
        self.numbers = logits_PV.new_full((length + 1,), -1, dtype=torch.int32)
        self.bad_V = logits_PV.new_zeros(logits_PV.shape[1])

    def _note_bad(self, first: int, is_bad_P: Tensor, logits_PV: Tensor) -> None:
        row = is_bad_P.int().argmax(keepdim=True)  # the first, as a tensor
        place = self.places_K[first : first + len(logits_PV)].index_select(0, row).int()
        is_new = is_bad_P.any() & (self.numbers[-1] < 0)
        self.bad_V = torch.where(is_new, logits_PV.index_select(0, row)[0], self.bad_V)
        self.numbers[-1:] = torch.where(is_new, place, self.numbers[-1:])


class _DrawQueue(_Queue):
    """Draws: ids, and behind them the bits of their weights where they have some."""

    def __init__(self, places_K: NDArray[np.int64], logits_PV: Tensor, rounds: int, *, tempered: bool) -> None:
        super().__init__(places_K, logits_PV, places_K.size * rounds * (2 if tempered else 1))

    def put(self, first: int, drawn: Drawn, logits_PV: Tensor) -> None:
        self._note_bad(first, drawn.is_bad, logits_PV)
        positions, rounds = drawn.ids.shape
        at, end = first * rounds, (first + positions) * rounds
        self.numbers[at:end] = drawn.ids.flatten()
        if drawn.weights is not None:
            behind = len(self.places_K) * rounds
            self.numbers[behind + at : behind + end] = drawn.weights.view(torch.int32).flatten()


class _TopQueue(_Queue):
    """
    Records of the most probable ids, one after the other; the numbers are those of the positions.

    Attributes:
        places: M.
        records: int32 [2, K * M + 1]: ids, and bits of weights; the last is for what is not kept.
    """

    def __init__(self, places_K: NDArray[np.int64], logits_PV: Tensor, places: int) -> None:
        super().__init__(places_K, logits_PV, places_K.size)
        self.places = places
        self.records = logits_PV.new_empty((2, places_K.size * places + 1), dtype=torch.int32)
        self._used = logits_PV.new_zeros((), dtype=torch.int64)

    def put(self, first: int, logits_PV: Tensor, sums: Sums, p: float) -> None:
        self._note_bad(first, sums.is_bad, logits_PV)
        positions, vocab_size = logits_PV.shape
        some = max(1, row_draws.KEYS_AT_ONCE // vocab_size)
        for at in range(0, positions, some):
            end = min(positions, at + some)
            self._put(first + at, *row_draws.keep_tops(logits_PV[at:end], sums.of_rows(at, end), self.places, p))

    def put_keys(self, first: int, logits_PV: Tensor, found: Found, p: float) -> None:
        """The same where the most probable ids are known."""
        assert found.keys is not None
        self._note_bad(first, found.sums.is_bad, logits_PV)
        self._put(first, *row_draws.keep_of_keys(found.keys, found.sums, p))

    def _put(self, at: int, ids_PM: Tensor, weights_PM: Tensor) -> None:
        kept_PM = weights_PM >= row_draws.SMALLEST_WEIGHT
        self.numbers[at : at + len(ids_PM)] = kept_PM.sum(1)
        count = kept_PM.flatten().cumsum(0)
        to = torch.where(kept_PM.flatten(), self._used + count - 1, self.records.shape[1] - 1)
        self.records[0].scatter_(0, to, ids_PM.flatten().int())
        self.records[1].scatter_(0, to, weights_PM.view(torch.int32).flatten())
        self._used = self._used + count[-1]
