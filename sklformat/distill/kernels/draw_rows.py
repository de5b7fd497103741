"""
Draws from rows of logits by the law of csrc: sums over blocks of 256 ids, float64 where they decide the tail.

Two kernels.  The first reads each logit once: a program for each row and tile of ids writes the sums of exponentials
over blocks, against the tile's own maximum.  The second has a program for each row: it brings the sums to the row's
maximum, adds them up in float64, makes the uniforms (C's, bit for bit) and sorts them, finds each point's block, and
reads the logits of that block once more to find the id.  Sums of exponentials round otherwise than in C, so that
a point within rounding of the edge between two ids may fall to the neighbour.

Logits are those of the model's own call, which scales and caps them in its own type.  To do it here, in float32, would
save six passes over a capped row in bfloat16, and give another distribution: 1.2e-3 nats from the model's, and every
fourth draw another one (cap 30, 3.5 nats of entropy).

Shape letters: P positions (rows), V vocabulary, N rounds, C blocks of a row, S tiles of a row.
Source: SPEC.md section 2; csrc/sampler.c; Salmon et al. 2011 (Philox4x32-10).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sklformat.distill.kernels import AS_WRITTEN
from sklformat.distill.kernels.drawn import Drawn, Sums

MAX_ROUNDS = 4096
"""The most rounds that one program has in hand."""
MAX_VOCAB = 1 << 19
"""The longest row whose blocks one program has in hand."""

_BLOCK = tl.constexpr(256)  # ids whose exponentials make one sum
_TILE_BLOCKS = tl.constexpr(32)  # blocks that a program of the first kernel reads
_DRAWS = tl.constexpr(16)  # draws whose blocks are read at once
_LARGEST = tl.constexpr(2.0**20)  # beyond it float32 has no room left for differences that matter
_SMALLEST = tl.constexpr(2.0**-126)  # exponentials below it are 0, as in C
_LOWEST = tl.constexpr(-1e30)  # stands for minus infinity where a product with 0 must be 0
_LAST_WORD = tl.constexpr(2**53)  # above every uniform


@triton.jit
def _logits_at(row, at, inside):
    return tl.load(row + at, mask=inside, other=-float("inf")).to(tl.float32)


@triton.jit
def _tiles(
    logits, stride, V, num_blocks, num_tiles, sums, maxima, totals, moments, bad, temperature,
    TEMPERED: tl.constexpr, ENTROPY: tl.constexpr,
):  # fmt: skip
    number = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    blocks = tile * _TILE_BLOCKS + tl.arange(0, _TILE_BLOCKS)
    at = blocks[:, None] * _BLOCK + tl.arange(0, _BLOCK)[None, :]
    inside = at < V
    x = _logits_at(logits + number * stride, at, inside)
    # Both comparisons are false for NaN.
    is_bad = tl.where(inside & (x <= _LARGEST), 0, inside.to(tl.int32))
    top = tl.max(tl.max(tl.where(is_bad == 0, x, -float("inf")), 1), 0)
    around = tl.where(top > -float("inf"), top, 0.0)
    p = tl.exp(x - around)
    p = tl.where(p >= _SMALLEST, p, 0.0)
    q = p
    if TEMPERED:
        q = tl.exp((x - around) * temperature)
        q = tl.where(q >= _SMALLEST, q, 0.0)
    tl.store(sums + number * num_blocks + blocks, tl.sum(q, 1), mask=blocks < num_blocks)
    place = number * num_tiles + tile
    tl.store(maxima + place, top)
    tl.store(bad + place, tl.sum(tl.sum(is_bad, 1), 0))
    tl.store(totals + place, tl.sum(tl.sum(p, 1), 0))
    if ENTROPY:
        tl.store(moments + place, tl.sum(tl.sum(p * tl.maximum(x - around, _LOWEST), 1), 0))


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def _running(values, AXIS: tl.constexpr):
    """
    Running sums in float64 that rise at positive values only, whatever the order of additions.

    A parallel scan rounds its sums each in another way, so that they could fall, or rise where a value is 0.
    """
    sums = tl.where(values > 0, tl.cumsum(values, AXIS), 0.0)
    return tl.associative_scan(sums, AXIS, _larger)


@triton.jit
def _uniforms(seed, sequence, place, rounds):
    """The 53-bit uniforms of these rounds as integers; points.c has their order and their keys."""
    zero = tl.zeros_like(rounds).to(tl.int64)  # small numbers come as constants or 32 bits
    low, high = (zero + sequence) & 0xFFFFFFFF, ((zero + sequence) >> 32) & 0xFFFFFFFF
    counter = (rounds // 2).to(tl.uint32), (zero + place).to(tl.uint32), low.to(tl.uint32), high.to(tl.uint32)
    a, b, c, d = tl.philox((tl.zeros((), tl.int64) + seed), counter[0], counter[1], counter[2], counter[3])
    odd = (rounds & 1) == 1
    lower = tl.where(odd, c, a).to(tl.uint32, bitcast=True).to(tl.int64)
    upper = tl.where(odd, d, b).to(tl.uint32, bitcast=True).to(tl.int64)
    return (upper << 21) | (lower >> 11)


# A kernel is compiled once for all seeds and sequences, not for each kind of number that they may be.
@triton.jit(do_not_specialize=("seed", "sequence"))
def _rows(
    logits, stride, V, num_blocks, num_tiles, sums, maxima, totals, moments, bad, places,
    seed: tl.int64, sequence: tl.int64, points, ids, weights, is_bad, log_sum, entropy, N, temperature,
    SYSTEMATIC: tl.constexpr, TEMPERED: tl.constexpr, NORMALISED: tl.constexpr,
    ENTROPY: tl.constexpr, BLOCKS: tl.constexpr, TILES: tl.constexpr, ROUNDS: tl.constexpr,
):  # fmt: skip
    number = tl.program_id(0).to(tl.int64)
    row = logits + number * stride
    tiles = tl.arange(0, TILES)
    there = tiles < num_tiles
    tops = tl.load(maxima + number * num_tiles + tiles, mask=there, other=-float("inf"))
    top = tl.max(tops, 0)
    wrong = tl.sum(tl.load(bad + number * num_tiles + tiles, mask=there, other=0), 0)
    unfit = (wrong > 0) | (top <= -_LARGEST)
    tl.store(is_bad + number, unfit.to(tl.int8))
    around = tl.where(top > -float("inf"), top, 0.0)
    shrunk = tl.exp(tl.where(there, tops, -float("inf")) - around)
    in_tiles = tl.load(totals + number * num_tiles + tiles, mask=there, other=0.0)
    total_p = tl.sum((in_tiles * shrunk).to(tl.float64), 0)
    log_total = tl.log(total_p.to(tl.float32))
    tl.store(log_sum + number, around + log_total)
    if ENTROPY:
        moment = tl.load(moments + number * num_tiles + tiles, mask=there, other=0.0)
        # Of the logits against the row's maximum, under the row's distribution.
        apart = (moment + in_tiles * tl.maximum(tops - around, _LOWEST)) * shrunk
        tl.store(entropy + number, tl.maximum(log_total - tl.sum(apart, 0) / total_p.to(tl.float32), 0.0))
    if unfit:
        return

    blocks = tl.arange(0, BLOCKS)
    held = blocks < num_blocks
    block_tops = tl.load(maxima + number * num_tiles + blocks // _TILE_BLOCKS, mask=held, other=-float("inf"))
    factor = tl.exp((block_tops - around) * temperature)
    mass = tl.load(sums + number * num_blocks + blocks, mask=held, other=0.0).to(tl.float64) * factor.to(tl.float64)
    cdf = _running(mass, 0)
    total = tl.max(cdf, 0)

    rounds = tl.arange(0, ROUNDS)
    place = tl.load(places + number)
    if SYSTEMATIC:
        words = _uniforms(seed, sequence, place, rounds * 0)
        all_points = (words.to(tl.float64) * 1.1102230246251565e-16 + rounds.to(tl.float64)) * (total / N)
    else:
        words = tl.where(rounds < N, _uniforms(seed, sequence, place, rounds), _LAST_WORD)
        all_points = tl.sort(words).to(tl.float64) * 1.1102230246251565e-16 * total
    tl.store(points + number * N + rounds, all_points, mask=rounds < N)
    tl.debug_barrier()

    last_block = tl.sum((cdf < total).to(tl.int32), 0)  # where the running sums come to the total, as in C
    lanes = tl.arange(0, _BLOCK)
    whole = tl.zeros((), tl.float64)
    for start in range(0, N, _DRAWS):
        n = start + tl.arange(0, _DRAWS)
        x = tl.load(points + number * N + n, mask=n < N, other=0.0)
        passed = cdf[None, :] <= x[:, None]
        block = tl.minimum(tl.sum(passed.to(tl.int32), 1), last_block)
        # The ends of the block, and of the last one where rounding took the point to the total.
        here = blocks[None, :] == block[:, None]
        end = tl.max(tl.where(here, cdf[None, :], 0.0), 1)
        begin = tl.max(tl.where(blocks[None, :] < block[:, None], cdf[None, :], 0.0), 1)
        share = tl.minimum((x - begin) / (end - begin), 1.0)
        at = block[:, None] * _BLOCK + lanes[None, :]
        y = _logits_at(row, at, at < V) - around
        e = tl.exp(y * temperature)
        e = tl.where((at < V) & (e >= _SMALLEST), e, 0.0)
        inner = _running(e.to(tl.float64), 1)
        target = share * tl.max(inner, 1)
        found = tl.sum((inner <= target[:, None]).to(tl.int32), 1)
        found = tl.minimum(found, tl.max(tl.where(e > 0, lanes[None, :], 0), 1))
        tl.store(ids + number * N + n, block * _BLOCK + found, mask=n < N)
        if TEMPERED:
            drawn = tl.sum(tl.where(lanes[None, :] == found[:, None], y, 0.0), 1)
            is_some = (n < N) & (tl.exp(drawn) >= _SMALLEST)
            ratio = tl.where(is_some, tl.exp(drawn * (1 - temperature)), 0.0)  # p / q, up to a factor of the row
            tl.store(weights + number * N + n, ratio, mask=n < N)
            whole += tl.sum(ratio.to(tl.float64), 0)
    if TEMPERED:
        divisor = whole
        if not NORMALISED:
            divisor = N * total_p / total
        tl.debug_barrier()
        for start in range(0, N, _DRAWS):
            n = start + tl.arange(0, _DRAWS)
            ratio = tl.load(weights + number * N + n, mask=n < N, other=0.0)
            tl.store(weights + number * N + n, (ratio.to(tl.float64) / divisor).to(tl.float32), mask=n < N)


def draw_rows(
    logits_PV: Tensor,
    places_P: Tensor,
    *,
    rounds: int,
    seed: int,
    sequence: int,
    systematic: bool = False,
    temperature: float = 1.0,
    self_normalise: bool = True,
    want_entropy: bool = False,
) -> Drawn:
    """
    Draw from each row; nothing waits for the device, and no shape depends on data.

    Args:
        logits_PV: [P, V] float32, bfloat16 or float16, V at most ``MAX_VOCAB``; rows may lie apart, ids may not.
        places_P: [P] integers below 2^32, each row's position in its sequence, on the same device.
        rounds: N, 1..``MAX_ROUNDS``.
        seed: 0..2^64 - 1.
        sequence: Global number of the sequence, 0..2^64 - 1.
        systematic: Equally spaced points instead of independent ones.
        temperature: Draws come from p to this power; other than 1 they carry weights.
        self_normalise: Whether the weights of a row sum to 1, or are unbiased.
        want_entropy: Whether to take the rows' entropies in the same pass.
    """
    positions, new, tempered = len(logits_PV), logits_PV.new_empty, temperature != 1.0
    ids = new((positions, rounds), dtype=torch.int32)
    weights = new((positions, rounds), dtype=torch.float32) if tempered else None
    is_bad, log_sum = new(positions, dtype=torch.int8), new(positions, dtype=torch.float32)
    entropy = new(positions, dtype=torch.float32) if want_entropy else None
    if positions:
        points = new((positions, rounds), dtype=torch.float64)
        read = _room(logits_PV)
        num_blocks, num_tiles = read[3:5]
        flags = {"TEMPERED": tempered, "ENTROPY": want_entropy, **AS_WRITTEN}
        with torch.cuda.device_of(logits_PV):
            _tiles[(positions, num_tiles)](*read, float(temperature), **flags, num_warps=4)
            _rows[(positions,)](
                *read, places_P, _signed(seed), _signed(sequence), points, ids, ids if weights is None else weights,
                is_bad, log_sum, log_sum if entropy is None else entropy, rounds, float(temperature),
                SYSTEMATIC=systematic, NORMALISED=self_normalise, BLOCKS=triton.next_power_of_2(num_blocks),
                TILES=triton.next_power_of_2(num_tiles), ROUNDS=triton.next_power_of_2(rounds), **flags, num_warps=8,
            )  # fmt: skip
    return Drawn(ids, weights, is_bad.bool(), log_sum, entropy)


def sum_rows(logits_PV: Tensor, *, want_entropy: bool = False) -> Sums:
    """
    Read each logit once; nothing waits for the device.

    Args:
        logits_PV: As for ``draw_rows``, with P and V at least 1.
        want_entropy: Whether to take the rows' entropies.
    """
    read = _room(logits_PV)
    num_tiles, maxima_PS, totals_PS, moments_PS, bad_PS = read[4], *read[6:]
    flags = {"TEMPERED": False, "ENTROPY": want_entropy, **AS_WRITTEN}
    with torch.cuda.device_of(logits_PV):
        _tiles[(len(logits_PV), num_tiles)](*read, 1.0, **flags, num_warps=4)
    largest_P = maxima_PS.amax(1)
    is_bad_P = (bad_PS.sum(1) > 0) | (largest_P <= -_LARGEST.value)
    apart_PS = maxima_PS - largest_P[:, None]
    shrunk_PS = apart_PS.exp()  # a tile without logits has none of the sum
    total_P = (totals_PS * shrunk_PS).sum(1, dtype=torch.float64)
    if not want_entropy:
        return Sums(largest_P, total_P, is_bad_P, None)
    moment_P = ((moments_PS + totals_PS * apart_PS.clamp(min=_LOWEST.value)) * shrunk_PS).sum(1, dtype=torch.float64)
    return Sums(largest_P, total_P, is_bad_P, (total_P.log() - moment_P / total_P).clamp(min=0).float())


def _room(logits_PV: Tensor) -> tuple[Any, ...]:
    """What the first kernel reads, and room for what it writes, in the order of its arguments."""
    positions, vocab_size = logits_PV.shape
    num_blocks = triton.cdiv(vocab_size, _BLOCK.value)
    num_tiles = triton.cdiv(num_blocks, _TILE_BLOCKS.value)
    sums = logits_PV.new_empty((positions, num_blocks), dtype=torch.float32)
    maxima, totals, moments = (logits_PV.new_empty((positions, num_tiles), dtype=torch.float32) for _ in range(3))
    bad = logits_PV.new_empty((positions, num_tiles), dtype=torch.int32)
    return logits_PV, logits_PV.stride(0), vocab_size, num_blocks, num_tiles, sums, maxima, totals, moments, bad


def _signed(number: int) -> int:
    """The 64 bits of a number, as a kernel takes them."""
    return number - (1 << 64) if number >= 1 << 63 else number
