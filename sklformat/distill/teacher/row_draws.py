"""
The law of ``skl.draw`` in torch operations: draws from rows of logits where they lie, and their most probable ids.

Does what csrc/sampler.c and csrc/points.c do for multinomial and systematic draws; kernels/draw_rows.py does the same,
faster.  The uniforms are C's, bit for bit.  Sums of exponentials round in another order, so that a draw
whose point lies within rounding of the edge between two ids may fall to the neighbour.  The most probable ids are
chosen by the rules of csrc/tops.c: larger logits first, equal ones by lower id; -0 is 0.

Nothing here waits for the device, but for the constants of the first draw; no shape depends on data.
Shape letters: P positions of one slice, V vocabulary, N rounds, C blocks of 256 ids, W the 256 ids of one, M places: as
many ids as a position can keep.
Source: SPEC.md section 2; Salmon et al. 2011 (Philox4x32-10), section 3.3.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sklformat.distill.kernels.drawn import Drawn, Sums

LARGEST_LOGIT = 2.0**20
"""No row holds one above it; sampler.c says why."""

SMALLEST_WEIGHT = 2.0**-126
"""Records of a weight below it are left out, here as in C."""

KEYS_AT_ONCE = 1 << 24
"""The most keys of 64 bits in memory at once."""

_BLOCK = 256  # ids whose exponentials make one sum
_SMALLEST = 2.0**-126  # exponentials below it are 0, here as in C
_POINTS = 1 << 24  # points in memory at once
_SECOND_LEVEL = 1 << 22  # float64 running sums in memory at once
_MASK = (1 << 32) - 1
_BEHIND = 1 << 62  # above every id with its weight
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)


class RowDraws:
    """
    Draws slice after slice.

    Args:
        systematic: Equally spaced points instead of independent ones.
        rounds: N, draws per position, >= 1.
        seed: 0..2**64 - 1.
        temperature: Draws come from p to this power; other than 1 they carry weights.
        self_normalise: Whether the weights of a row sum to 1, or are unbiased.
    """

    def __init__(
        self, *, systematic: bool, rounds: int, seed: int, temperature: float = 1.0, self_normalise: bool = True
    ) -> None:
        self._systematic, self._rounds, self._seed = systematic, rounds, seed
        self._temperature, self._self_normalise = temperature, self_normalise
        self._constants: Tensor | None = None

    def draw(self, logits_PV: Tensor, places_P: Tensor, sequence: int) -> Drawn:
        """
        What the rows give, without the sums of ``Drawn``.

        Args:
            logits_PV: float32, float16 or bfloat16, P >= 1.
            places_P: int64, each row's position in its sequence, on the same device.
            sequence: Its global number.
        """
        some = max(1, _POINTS // self._rounds)
        parts = [
            self._draw_some(logits_PV[at : at + some], places_P[at : at + some], sequence)
            for at in range(0, len(logits_PV), some)
        ]
        weights = [part.weights for part in parts if part.weights is not None]
        return Drawn(
            torch.cat([part.ids for part in parts]),
            torch.cat(weights) if weights else None,
            torch.cat([part.is_bad for part in parts]),
            None,
            None,
        )

    def _draw_some(self, logits_PV: Tensor, places_P: Tensor, sequence: int) -> Drawn:
        positions, vocab_size = logits_PV.shape
        largest_P1 = logits_PV.amax(-1, keepdim=True).float()
        total_p_P1 = None
        if self._temperature != 1 and not self._self_normalise:
            total_p_P1 = _exponentials(logits_PV, largest_P1).sum(-1).sum(-1, keepdim=True, dtype=torch.float64)
        e_PCW = _exponentials(logits_PV, largest_P1, self._temperature)
        # A column of zeros before the sums; and a row after them, since torch scans a tensor of one row alone by
        # another algorithm, whose sums are not the same each time on CUDA.
        sums = e_PCW.new_zeros((positions + 1, e_PCW.shape[1] + 1), dtype=torch.float64)
        sums[:positions, 1:] = e_PCW.sum(-1)
        cdf_PC = _running(sums)[:positions]
        total_P1 = cdf_PC[:, -1:]
        points_PN = self._points(sequence, places_P)
        x_PN = _below(points_PN * (total_P1 / self._rounds if self._systematic else total_P1), total_P1)
        block_PN = (torch.searchsorted(cdf_PC, x_PN, right=True) - 1).clamp_(0, e_PCW.shape[1] - 1)
        begin_PN, end_PN = cdf_PC.gather(1, block_PN), cdf_PC.gather(1, block_PN + 1)
        share_PN = (x_PN - begin_PN) / (end_PN - begin_PN)
        some = max(1, _SECOND_LEVEL // (self._rounds * _BLOCK))
        parts = [
            _find(e_PCW[at : at + some], block_PN[at : at + some], share_PN[at : at + some])
            for at in range(0, positions, some)
        ]
        # A bad row's may lie beyond the vocabulary.
        ids_PN = (block_PN * _BLOCK + torch.cat(parts)).clamp_(max=vocab_size - 1)
        weights_PN = None
        if self._temperature != 1:
            weights_PN = self._weights(logits_PV.gather(1, ids_PN).float() - largest_P1, total_p_P1, total_P1)
        return Drawn(ids_PN, weights_PN, _bad_rows(largest_P1), None, None)

    def _weights(self, apart_PN: Tensor, total_p_P1: Tensor | None, total_q_P1: Tensor) -> Tensor:
        """float32 [P, N] importance weights p / q of draws, given their logits' distances from the row's largest."""
        # Up to a factor of the row; 0 where the id's own probability is, as in C.
        ratio_PN = torch.where(apart_PN.exp() >= _SMALLEST, (apart_PN * (1 - self._temperature)).exp(), 0.0).double()
        if total_p_P1 is None:
            return (ratio_PN / ratio_PN.sum(-1, keepdim=True)).float()
        return (ratio_PN / (self._rounds * (total_p_P1 / total_q_P1))).float()

    def _points(self, sequence: int, places_P: Tensor) -> Tensor:
        """
        Places of the draws, ascending.

        Returns:
            points_PN: float64. Multinomial: shares of the total, in [0, 1). Systematic: of total / N, in [0, N).
        """
        words_PN = self._uniforms(sequence, places_P, 1 if self._systematic else self._rounds)
        if self._systematic:
            return words_PN.double() * 2.0**-53 + torch.arange(self._rounds, device=places_P.device)
        return words_PN.sort(-1).values.double() * 2.0**-53  # integers below 2^53 are exact

    def _uniforms(self, sequence: int, places_P: Tensor, rounds: int) -> Tensor:
        """
        int64 [P, rounds] uniforms of 53 bits; points.c has their order and their keys.

        Words of 32 bits lie in int64.  A product of two wraps, as two's complement does; its bits are the right ones.
        Words 0 and 2 of the counter, and 1 and 3, are handled together: each half of Philox is the other's mirror.
        """
        device = places_P.device
        if self._constants is None or self._constants.device != device:  # a copy that waits, so once
            keys = [(self._seed & _MASK, self._seed >> 32)]
            for _ in range(9):
                keys.append(((keys[-1][0] + _KEY_STEPS[0]) & _MASK, (keys[-1][1] + _KEY_STEPS[1]) & _MASK))
            self._constants = torch.tensor([_MULTIPLIERS, *keys], device=device)[:, :, None, None]
        blocks = (rounds + 1) // 2
        even = torch.empty((2, len(places_P), blocks), dtype=torch.int64, device=device)
        odd = torch.empty_like(even)
        even[0] = torch.arange(blocks, device=device)
        odd[0] = places_P[:, None]
        even[1], odd[1] = sequence & _MASK, sequence >> 32
        for key in self._constants[1:]:
            product = (even * self._constants[0]).flip(0)
            even, odd = ((product >> 32) ^ odd ^ key) & _MASK, product & _MASK
        words = (odd << 21) | (even >> 11)  # the upper 53 of 64 bits, word 1 or 3 above word 0 or 2
        return words.permute(1, 2, 0).flatten(1)[:, :rounds].contiguous()


def sum_rows(logits_PV: Tensor) -> Sums:
    """What kernels/draw_rows.py takes in its first pass, without entropies; P at least 1."""
    largest_P1 = logits_PV.amax(-1, keepdim=True).float()
    total_P = _exponentials(logits_PV, largest_P1).sum(-1).sum(-1, dtype=torch.float64)
    return Sums(largest_P1[:, 0], total_P, _bad_rows(largest_P1), None)


def keep_tops(logits_PV: Tensor, sums: Sums, places: int, p: float) -> tuple[Tensor, Tensor]:
    """
    The most probable ids.

    Args:
        logits_PV: float32, float16 or bfloat16.
        sums: Of these rows.
        places: M, in 1..V.
        p: The fewest ids whose mass reaches it are kept, M at most; 1: M ids.

    Returns:
        ids_PM: int64, those that are kept in ascending order, then others.
        weights_PM: float32 probabilities, below ``SMALLEST_WEIGHT`` or NaN where an id is not kept.
    """
    rank_PV = (logits_PV.float() + 0.0).view(torch.int32)
    rank_PV = rank_PV ^ ((rank_PV >> 31) & 0x7FFFFFFF)  # integers in the order of the logits
    ids_V = torch.arange(logits_PV.shape[1], device=logits_PV.device)
    keys_PM = ((rank_PV.long() << 32) | (_MASK - ids_V)).topk(places, dim=1).values
    ids_PM, rank_PM = _MASK - (keys_PM & _MASK), (keys_PM >> 32).int()
    logit_PM = (rank_PM ^ ((rank_PM >> 31) & 0x7FFFFFFF)).view(torch.float32)
    e_PM = (logit_PM - sums.largest[:, None]).exp()
    e_PM = torch.where(e_PM >= SMALLEST_WEIGHT, e_PM, 0.0).double()
    weights_PM = e_PM / sums.total[:, None]
    if p < 1:
        # Kept where what stands before does not reach the mass.
        # One row more, as where sums of blocks are added up.
        before_PM = torch.cat([e_PM, e_PM[:1]]).cumsum(1)[:-1].cummax(1).values.roll(1, 1)
        before_PM[:, 0] = 0.0
        weights_PM = torch.where(before_PM < p * sums.total[:, None], weights_PM, 0.0)
    # Ids below 2^31 and weights of 32 bits that are not negative, sorted as one number.
    kept_PM = weights_PM >= SMALLEST_WEIGHT
    bits_PM = torch.where(kept_PM, weights_PM, 0.0).float().view(torch.int32).long()
    sorted_PM = torch.where(kept_PM, (ids_PM << 32) | bits_PM, _BEHIND).sort(1).values
    return sorted_PM >> 32, (sorted_PM & _MASK).int().view(torch.float32)


def _bad_rows(largest_P1: Tensor) -> Tensor:
    """[P] bool: rows that C refuses, by their largest logits as amax has them."""
    # Both comparisons are false for NaN, which amax hands on.
    return ~((largest_P1 > -LARGEST_LOGIT) & (largest_P1 <= LARGEST_LOGIT))[:, 0]


def _exponentials(logits_PV: Tensor, largest_P1: Tensor, temperature: float = 1.0) -> Tensor:
    """float32 [P, C, W] of logits against the row's largest, times a temperature; 0 beyond the row and below C's."""
    positions, vocab_size = logits_PV.shape
    e_PCW = largest_P1.new_empty((positions, -(-vocab_size // _BLOCK), _BLOCK))
    e_PV = e_PCW.view(positions, -1)
    torch.sub(logits_PV, largest_P1, out=e_PV[:, :vocab_size])
    e_PV[:, vocab_size:] = -math.inf
    if temperature != 1:
        e_PV *= temperature
    torch.nn.functional.threshold(e_PV.exp_(), _SMALLEST, 0.0, inplace=True)
    return e_PCW


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
