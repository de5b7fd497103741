"""
Counted draws where the logits lie: the law of ``skl.draw`` in torch operations, so that no row leaves its device.

Does what csrc/sampler.c and csrc/points.c do for the samplers multinomial and systematic at proposal temperature 1 and
up to 127 rounds; every other sampler stays with C, on the host.  The uniforms are C's, bit for bit.  Sums of
exponentials round in another order, so that a draw whose point lies within rounding of the edge between two ids may
fall to the neighbour.  Equal logits in equal slices give equal draws on one kind of device, not on two.

Nothing here waits for the device, and no shape depends on data: a sequence is queued and asked for later (``Draws``).
Knows no model and no file.  Shape letters: T positions, K of them that count, P positions of one slice, V vocabulary,
N rounds, C blocks of 256 ids, W the 256 ids of one.
Source: SPEC.md section 2; Salmon et al. 2011 (Philox4x32-10), section 3.3.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sklformat.distill.teacher.drawing import counted_places
from sklformat.distill.teacher.logit_columns import LogitColumns
from sklformat.sampler import MAX_COUNT_ROUNDS, draw

DEVICES = ("cuda",)
"""Kinds of device that draw for themselves; beside a CPU teacher C is faster."""

_BLOCK = 256  # ids whose exponentials make one sum
_LARGEST_LOGIT = 2.0**20  # sampler.c says why
_SMALLEST = 2.0**-126  # exponentials below it are 0, here as in C
_SECOND_LEVEL = 1 << 22  # float64 running sums that are there at once
_MASK = (1 << 32) - 1
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)


class Draws:
    """
    The draws of one sequence, queued on a device and on their way to the host.

    Args:
        sampled: int32 [K * N + 1] on the device: draws, and the first position that may not be drawn from, or -1.
        bad_V: The logits of that position, on the device.
        rounds: N.
        sequence: Global number of the sequence.
    """

    def __init__(self, sampled: Tensor, bad_V: Tensor, rounds: int, sequence: int) -> None:
        self._bad_V, self._rounds, self._sequence = bad_V, rounds, sequence
        on_cuda = sampled.device.type == "cuda"
        self._host = torch.empty(sampled.shape, dtype=sampled.dtype, pin_memory=on_cuda)
        self._host.copy_(sampled, non_blocking=on_cuda)
        # Of the device that has them, which need not be the current one.
        self._copied = torch.cuda.current_stream(sampled.device).record_event() if on_cuda else None

    def result(self) -> NDArray[np.int32]:
        """
        Wait for the device: [K, N] ids, each row ascending.

        Raises:
            ValueError: Logits that ``skl.draw`` refuses; the message is its own and names sequence, position and id.
        """
        if self._copied is not None:
            self._copied.synchronize()
        sampled: NDArray[np.int32] = self._host.numpy()
        if sampled[-1] >= 0:
            draw(self._bad_V.cpu()[None], rounds=1, sequence=self._sequence, first_position=int(sampled[-1]))
            raise AssertionError("C draws from a row that was refused here")
        return sampled[:-1].reshape(-1, self._rounds)


class DeviceSampler:
    """
    Draws sequence after sequence on the device that logits come on.

    Args:
        sampler: "multinomial" or "systematic".
        rounds: Draws per position, 1..127.
        seed: 0..2**64 - 1.

    Raises:
        ValueError: Draws that only C makes.
    """

    def __init__(self, *, sampler: str, rounds: int, seed: int) -> None:
        if sampler not in ("multinomial", "systematic") or not 1 <= rounds <= MAX_COUNT_ROUNDS:
            raise ValueError(f"a device draws counts of 1..{MAX_COUNT_ROUNDS} rounds, got {sampler} with {rounds}")
        self._systematic, self._rounds, self._seed = sampler == "systematic", rounds, seed
        self._constants: Tensor | None = None

    @torch.inference_mode()
    def draw(
        self,
        sequence: int,
        positions: int,
        slices: Iterable[tuple[int, Tensor]],
        columns: LogitColumns | None = None,
        counted_T: NDArray[np.bool_] | None = None,
    ) -> Draws:
        """
        Queue the draws of one sequence.

        Args:
            sequence: Its global number, 0..2**64 - 1.
            positions: T, >= 1.
            slices: (First position, logits [P, V] of float32, float16 or bfloat16), all on one device, that together
                are positions 0..T - 1; one may be left out where it has no position that counts.
            columns: Take optional columns from logits and draws.
            counted_T: Which positions are drawn from, [T]; None: all.

        Returns:
            What ``Draws.result`` waits for.
        """
        places_K = counted_places(counted_T, 0, positions)
        sampled, bad_V = torch.full((1,), -1, dtype=torch.int32), torch.zeros(1)
        points_KN = on_device_K = None
        for start, slice_PV in slices:
            first, last = np.searchsorted(places_K, (start, start + len(slice_PV))).tolist()
            if first == last:
                continue
            logits_PV = slice_PV
            if points_KN is None or on_device_K is None:
                on_device_K = _to_device(places_K, slice_PV.device)
                sampled = slice_PV.new_full((places_K.size * self._rounds + 1,), -1, dtype=torch.int32)
                points_KN = self._points(sequence, on_device_K)
                bad_V = slice_PV.new_zeros(slice_PV.shape[1])
            if last - first < len(slice_PV):
                logits_PV = slice_PV.index_select(0, on_device_K[first:last] - start)
            largest_P1 = logits_PV.amax(-1, keepdim=True).float()
            # Both comparisons are false for NaN, which amax hands on.
            is_bad_P = ~((largest_P1 > -_LARGEST_LOGIT) & (largest_P1 <= _LARGEST_LOGIT))[:, 0]
            row = is_bad_P.int().argmax(keepdim=True)  # the first, as a tensor
            is_new = is_bad_P.any() & (sampled[-1] < 0)
            bad_V = torch.where(is_new, logits_PV.index_select(0, row)[0], bad_V)
            sampled[-1:] = torch.where(is_new, on_device_K[first:last].index_select(0, row).int(), sampled[-1:])
            draws_PN = self._draw_slice(logits_PV, largest_P1, points_KN[first:last])
            sampled[first * self._rounds : last * self._rounds] = draws_PN.flatten()
            if columns is not None:
                columns.add(places_K[first:last], logits_PV, None, draws_PN.clamp(max=logits_PV.shape[1] - 1))
        if columns is not None and not places_K.size:
            columns.add(places_K, torch.empty(0, 1), None, torch.empty((0, self._rounds), dtype=torch.int64))
        draws = Draws(sampled, bad_V, self._rounds, sequence)
        if columns is not None:
            columns.fetch()
        return draws

    def _draw_slice(self, logits_PV: Tensor, largest_P1: Tensor, points_PN: Tensor) -> Tensor:
        """int64 [P, N] ids; of no meaning, but in range of the padded row, where the row is bad."""
        positions, vocab_size = logits_PV.shape
        blocks = -(-vocab_size // _BLOCK)
        e_PCW = largest_P1.new_empty((positions, blocks, _BLOCK))
        e_PV = e_PCW.view(positions, -1)
        torch.sub(logits_PV, largest_P1, out=e_PV[:, :vocab_size])
        e_PV[:, vocab_size:] = -math.inf
        torch.nn.functional.threshold(e_PV.exp_(), _SMALLEST, 0.0, inplace=True)
        # A column of zeros before the sums; and a row after them, since torch scans a tensor of one row alone by
        # another algorithm, whose sums are not the same each time on CUDA.
        sums = e_PV.new_zeros((positions + 1, blocks + 1), dtype=torch.float64)
        sums[:positions, 1:] = e_PCW.sum(-1)
        cdf_PC = _running(sums)[:positions]
        total_P1 = cdf_PC[:, -1:]
        x_PN = _below(points_PN * (total_P1 / self._rounds if self._systematic else total_P1), total_P1)
        block_PN = (torch.searchsorted(cdf_PC, x_PN, right=True) - 1).clamp_(0, blocks - 1)
        begin_PN, end_PN = cdf_PC.gather(1, block_PN), cdf_PC.gather(1, block_PN + 1)
        share_PN = (x_PN - begin_PN) / (end_PN - begin_PN)
        some = max(1, _SECOND_LEVEL // (self._rounds * _BLOCK))
        parts = [
            _find(e_PCW[at : at + some], block_PN[at : at + some], share_PN[at : at + some])
            for at in range(0, positions, some)
        ]
        return block_PN * _BLOCK + torch.cat(parts)

    def _points(self, sequence: int, places_K: Tensor) -> Tensor:
        """
        Places of the draws, ascending.

        Returns:
            points_KN: float64. Multinomial: shares of the total, in [0, 1). Systematic: of total / N, in [0, N).
        """
        words_KN = self._uniforms(sequence, places_K, 1 if self._systematic else self._rounds)
        if self._systematic:
            return words_KN.double() * 2.0**-53 + torch.arange(self._rounds, device=places_K.device)
        return words_KN.sort(-1).values.double() * 2.0**-53  # integers below 2^53 are exact

    def _uniforms(self, sequence: int, places_K: Tensor, rounds: int) -> Tensor:
        """
        int64 [K, rounds] uniforms of 53 bits; points.c has their order and their keys.

        Words of 32 bits lie in int64.  A product of two wraps, as two's complement does; its bits are the right ones.
        Words 0 and 2 of the counter, and 1 and 3, are handled together: each half of Philox is the other's mirror.
        """
        device = places_K.device
        if self._constants is None or self._constants.device != device:  # a copy that waits, so once
            keys = [(self._seed & _MASK, self._seed >> 32)]
            for _ in range(9):
                keys.append(((keys[-1][0] + _KEY_STEPS[0]) & _MASK, (keys[-1][1] + _KEY_STEPS[1]) & _MASK))
            self._constants = torch.tensor([_MULTIPLIERS, *keys], device=device)[:, :, None, None]
        blocks = (rounds + 1) // 2
        even = torch.empty((2, len(places_K), blocks), dtype=torch.int64, device=device)
        odd = torch.empty_like(even)
        even[0] = torch.arange(blocks, device=device)
        odd[0] = places_K[:, None]
        even[1], odd[1] = sequence & _MASK, sequence >> 32
        for key in self._constants[1:]:
            product = (even * self._constants[0]).flip(0)
            even, odd = ((product >> 32) ^ odd ^ key) & _MASK, product & _MASK
        words = (odd << 21) | (even >> 11)  # the upper 53 of 64 bits, word 1 or 3 above word 0 or 2
        return words.permute(1, 2, 0).flatten(1)[:, :rounds].contiguous()


def _to_device(places_K: NDArray[np.int64], device: torch.device) -> Tensor:
    """A copy that waits for nothing that the device still does."""
    places = torch.from_numpy(places_K)
    return (places.pin_memory() if device.type == "cuda" else places).to(device, non_blocking=True)


def _running(values: Tensor) -> Tensor:
    """
    Running sums along the last axis that rise at positive values only, whatever the order of additions.

    A parallel scan rounds its sums each in another way, so that they could fall, or rise where a value is 0.
    """
    return torch.where(values > 0, values.cumsum(-1), 0.0).cummax(-1).values


def _below(x: Tensor, total: Tensor) -> Tensor:
    """The points; where rounding took one to the total, the largest number below it, in the last id that has any."""
    return torch.minimum(x, torch.nextafter(total, torch.zeros_like(total)))


def _find(e_PCW: Tensor, block_PN: Tensor, share_PN: Tensor) -> Tensor:
    """int64 [P, N] places in their blocks of the ids at these shares of the blocks' float64 totals."""
    index_PNW = block_PN[:, :, None].expand(-1, -1, _BLOCK)
    running_PNW = _running(e_PCW.gather(1, index_PNW).double())
    total_PN1 = running_PNW[:, :, -1:]
    target_PN1 = _below(share_PN[:, :, None] * total_PN1, total_PN1)
    return torch.searchsorted(running_PNW, target_PN1, right=True)[:, :, 0].clamp_(max=_BLOCK - 1)
