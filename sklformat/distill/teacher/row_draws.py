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

BLOCK = 256
"""Ids whose exponentials make one sum."""

_SMALLEST = 2.0**-126  # exponentials below it are 0, here as in C
_LOG2_E = 1.4426950408889634
_LN_2 = (0.693359375, -2.1219444005469057e-4)  # the first of 9 bits
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
        some = self.rows_at_once
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
        largest_P1 = logits_PV.amax(-1, keepdim=True).float()
        total_p_P1 = None
        if self.is_unbiased:
            total_p_P1 = _exponentials(logits_PV, largest_P1).sum(-1).sum(-1, keepdim=True, dtype=torch.float64)
        e_PCW, offset_P1 = self.powers(logits_PV, largest_P1)
        block_PN, share_PN, total_P1 = self.locate(e_PCW.sum(-1).double(), places_P, sequence)
        # A bad row's may lie beyond the vocabulary.
        ids_PN = self.find(e_PCW, block_PN, share_PN).clamp_(max=logits_PV.shape[1] - 1)
        weights_PN = None
        if self.is_tempered:
            apart_PN = logits_PV.gather(1, ids_PN).float() - largest_P1
            weights_PN = self.weigh(apart_PN, total_p_P1, self.against(total_P1, offset_P1, largest_P1))
        return Drawn(ids_PN, weights_PN, bad_rows(largest_P1), None, None)

    @property
    def rows_at_once(self) -> int:
        """How many rows' points may be in memory at once."""
        return max(1, _POINTS // self._rounds)

    @property
    def is_tempered(self) -> bool:
        """Whether draws carry weights."""
        return self._temperature != 1

    @property
    def is_unbiased(self) -> bool:
        """Whether they do, and these are not divided by their sum."""
        return self.is_tempered and not self._self_normalise

    def powers(self, logits_PV: Tensor, largest_P1: Tensor) -> tuple[Tensor, Tensor]:
        """
        What is drawn in proportion to: exponentials of the logits times the temperature, over a power of two.

        Those over two powers differ by a power of two, exactly, unless they become 0: so the parts of a row may each
        have the power that fits their own largest logit, and are the same row.

        Returns:
            e_PCW: float32, exp(y) / 2^offset, y = logit times temperature; 0 beyond the row and below C's.
            offset_P1: float32, the integer nearest to the y / ln 2 of the largest logit.
        """
        positions, vocab_size = logits_PV.shape
        temperature = largest_P1.new_full((1, 1), self._temperature)  # a tensor, so that the product is of float32
        lowest = -2 * LARGEST_LOGIT * self._temperature
        e_PCW = largest_P1.new_empty((positions, -(-vocab_size // BLOCK), BLOCK))
        e_PV = e_PCW.view(positions, -1)
        torch.mul(logits_PV, temperature, out=e_PV[:, :vocab_size])
        e_PV[:, vocab_size:] = -math.inf
        e_PV.clamp_(min=lowest)
        offset_P1 = ((largest_P1 * temperature).clamp_(min=lowest) * _LOG2_E).round_()
        # y = whole ln 2 + rest; the first product is exact, so that the difference is.
        whole_PV = (e_PV * _LOG2_E).round_()
        e_PV -= whole_PV * _LN_2[0]
        e_PV -= whole_PV * _LN_2[1]
        shift_PV = whole_PV.sub_(offset_P1).clamp_(min=-127).int()
        e_PV.exp_().mul_(((shift_PV + 127) << 23).view(torch.float32))
        torch.nn.functional.threshold(e_PCW, _SMALLEST, 0.0, inplace=True)
        return e_PCW, offset_P1

    def against(self, total_P1: Tensor, offset_P1: Tensor, largest_P1: Tensor) -> Tensor:
        """Totals of ``powers`` as those of exponentials against the largest logit."""
        return total_P1 * (offset_P1.double() * math.log(2) - self._temperature * largest_P1.double()).exp()

    def locate(self, mass_PC: Tensor, places_P: Tensor, sequence: int) -> tuple[Tensor, Tensor, Tensor]:
        """
        The block of each draw, and its share of that block, given the float64 sums of ``powers`` over blocks.

        Returns:
            block_PN: int64, ascending.
            share_PN: float64, in [0, 1).
            total_P1: Of the sums.
        """
        positions, blocks = mass_PC.shape
        # A column of zeros before the sums; and a row after them, since torch scans a tensor of one row alone by
        # another algorithm, whose sums are not the same each time on CUDA.
        sums = mass_PC.new_zeros((positions + 1, blocks + 1))
        sums[:positions, 1:] = mass_PC
        cdf_PC = _running(sums)[:positions]
        total_P1 = cdf_PC[:, -1:]
        points_PN = self._points(sequence, places_P)
        x_PN = _below(points_PN * (total_P1 / self._rounds if self._systematic else total_P1), total_P1)
        block_PN = (torch.searchsorted(cdf_PC, x_PN, right=True) - 1).clamp_(0, blocks - 1)
        begin_PN, end_PN = cdf_PC.gather(1, block_PN), cdf_PC.gather(1, block_PN + 1)
        return block_PN, (x_PN - begin_PN) / (end_PN - begin_PN), total_P1

    def find(self, e_PCW: Tensor, block_PN: Tensor, share_PN: Tensor) -> Tensor:
        """int64 [P, N] ids at these shares of these blocks."""
        some = max(1, _SECOND_LEVEL // (self._rounds * BLOCK))
        parts = [
            _find(e_PCW[at : at + some], block_PN[at : at + some], share_PN[at : at + some])
            for at in range(0, len(e_PCW), some)
        ]
        return block_PN * BLOCK + torch.cat(parts)

    def weigh(self, apart_PN: Tensor, total_p_P1: Tensor | None, total_q_P1: Tensor) -> Tensor:
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
    return Sums(largest_P1[:, 0], total_P, bad_rows(largest_P1), None)


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
    return keep_of_keys(top_keys(logits_PV, places), sums, p)


def top_keys(logits_PV: Tensor, places: int, first_id: int = 0) -> Tensor:
    """int64 [P, M] keys of the most probable ids, which are counted from ``first_id`` on, the largest first."""
    rank_PV = (logits_PV.float() + 0.0).view(torch.int32)
    rank_PV = rank_PV ^ ((rank_PV >> 31) & 0x7FFFFFFF)  # integers in the order of the logits
    ids_V = torch.arange(first_id, first_id + logits_PV.shape[1], device=logits_PV.device)
    return ((rank_PV.long() << 32) | (_MASK - ids_V)).topk(places, dim=1).values


def keep_of_keys(keys_PM: Tensor, sums: Sums, p: float) -> tuple[Tensor, Tensor]:
    """``keep_tops`` of the M largest keys of each row, the largest first."""
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


def bad_rows(largest_P1: Tensor) -> Tensor:
    """[P] bool: rows that C refuses, by their largest logits as amax has them."""
    # Both comparisons are false for NaN, which amax hands on.
    return ~((largest_P1 > -LARGEST_LOGIT) & (largest_P1 <= LARGEST_LOGIT))[:, 0]


def _exponentials(logits_PV: Tensor, largest_P1: Tensor) -> Tensor:
    """float32 [P, C, W] of logits against the row's largest; 0 beyond the row and below C's."""
    positions, vocab_size = logits_PV.shape
    e_PCW = largest_P1.new_empty((positions, -(-vocab_size // BLOCK), BLOCK))
    e_PV = e_PCW.view(positions, -1)
    torch.sub(logits_PV, largest_P1, out=e_PV[:, :vocab_size])
    e_PV[:, vocab_size:] = -math.inf
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
    index_PNW = block_PN[:, :, None].expand(-1, -1, BLOCK)
    running_PNW = _running(e_PCW.gather(1, index_PNW).double())
    total_PN1 = running_PNW[:, :, -1:]
    target_PN1 = _below(share_PN[:, :, None] * total_PN1, total_PN1)
    return torch.searchsorted(running_PNW, target_PN1, right=True)[:, :, 0].clamp_(max=BLOCK - 1)
