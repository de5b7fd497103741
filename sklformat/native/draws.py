"""Records from logits, and from draws made elsewhere: sampler.c and merge.c."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from sklformat.native.door import NULL, check, expect, ffi, lib, view

_SAMPLERS = {
    "multinomial": lib.SKL_SAMPLER_MULTINOMIAL,
    "systematic": lib.SKL_SAMPLER_SYSTEMATIC,
    "topk": lib.SKL_SAMPLER_TOPK,
    "topp": lib.SKL_SAMPLER_TOPP,
}


_DTYPES = {
    "float32": lib.SKL_DTYPE_FLOAT32,
    "float16": lib.SKL_DTYPE_FLOAT16,
    "bfloat16": lib.SKL_DTYPE_BFLOAT16,
}


_RECORDS_A_CALL = 1 << 20  # bounds the room for records that a call may need


def draw(
    logits: NDArray[Any],
    *,
    dtype: str,
    sampler: str,
    rounds: int,
    k: int,
    p: float,
    proposal_temperature: float,
    self_normalise: bool,
    weighted: bool,
    seed: int,
    sequence: int,
    first_position: int,
) -> tuple[NDArray[np.int64], NDArray[np.uint32], NDArray[Any]]:
    """
    Draw the records of T positions; ranges as ``skl_sampling`` in skl.h has them.

    Args:
        logits: [T, V] of 4-byte (float32) or 2-byte items, contiguous along V, rows at any distance >= 0.
        dtype: "float32", "float16" or "bfloat16".
        sampler: "multinomial", "systematic", "topk" or "topp".
        rounds: Draws per position; without meaning for topk and topp.
        k: Most ids that topk and topp keep; else without meaning.
        p: Mass that topp keeps; else without meaning.
        proposal_temperature: Exponent of the proposal.
        self_normalise: Importance weights sum to 1.
        weighted: Return weights instead of counts.
        seed: Seed of the whole cache.
        sequence: Global number of the sequence.
        first_position: Position of the first row.

    Returns:
        offsets [T + 1], token_ids [nnz], counts uint8 or weights float32 [nnz].

    Raises:
        ValueError: A field out of range, or a row with NaN, +inf or nothing finite; names sequence and position.
    """
    positions, vocab_size = logits.shape
    stride = logits.strides[0] // logits.itemsize if positions > 1 else vocab_size
    sampling = ffi.new("skl_sampling *")
    sampling.sampler, sampling.dtype, sampling.vocab_size = _SAMPLERS[sampler], _DTYPES[dtype], vocab_size
    sampling.row_stride, sampling.rounds, sampling.k, sampling.p = stride, rounds, k, p
    sampling.proposal_temperature, sampling.self_normalise = proposal_temperature, self_normalise
    sampling.seed, sampling.sequence = seed, sequence
    num_scratch, most = ffi.new("uint64_t *"), ffi.new("uint64_t *")
    check(lib.skl_draw_sizes(sampling, num_scratch, most))
    scratch = np.empty(num_scratch[0], np.uint64)
    rows_a_call = min(max(1, _RECORDS_A_CALL // most[0]), max(1, positions))
    token_ids = np.empty(rows_a_call * most[0], np.uint32)
    values = np.empty(token_ids.size, np.float32 if weighted else np.uint8)
    offsets = np.zeros(positions + 1, np.int64)
    parts: list[tuple[NDArray[np.uint32], NDArray[Any]]] = []
    fault = ffi.new("skl_fault *")
    for begin in range(0, positions, rows_a_call):
        rows = logits[begin : begin + rows_a_call]
        sampling.num_positions, sampling.first_position = len(rows), first_position + begin
        part = np.empty(len(rows) + 1, np.int64)
        status = lib.skl_draw(
            sampling,
            ffi.cast("void *", rows.ctypes.data),  # rows need not be contiguous with each other
            (len(rows) - 1) * stride + vocab_size,
            view("uint64_t[]", scratch, writable=True),
            scratch.size,
            view("int64_t[]", part, writable=True),
            view("uint32_t[]", token_ids, writable=True),
            NULL if weighted else view("uint8_t[]", values, writable=True),
            view("float[]", values, writable=True) if weighted else NULL,
            token_ids.size,
            fault,
        )
        check(status, fault, where=f"sequence {sequence}, ")
        offsets[begin + 1 : begin + len(part)] = part[1:] + offsets[begin]
        parts.append((token_ids[: part[-1]].copy(), values[: part[-1]].copy()))
    if not parts:
        return offsets, token_ids[:0], values[:0]
    return offsets, np.concatenate([ids for ids, _ in parts]), np.concatenate([pairs for _, pairs in parts])


def merge_draws(
    draws: NDArray[np.uint32],
) -> tuple[NDArray[np.int64], NDArray[np.uint32], NDArray[np.uint8]]:
    """
    Merge the sorted draws of each position into (token id, count) pairs.

    Args:
        draws: [T, rounds] uint32, each row ascending; rounds 1..127.

    Returns:
        offsets [T + 1], token_ids [nnz] ascending within a position, counts [nnz] that sum to rounds.

    Raises:
        ValueError: A row is not sorted, or rounds is out of range; the message names the position.
    """
    expect(draws, draws.size, np.uint32)
    positions, rounds = draws.shape
    if not 1 <= rounds <= 127:
        raise ValueError(f"counts hold 1..127 rounds, got {rounds}")
    offsets = np.empty(positions + 1, np.int64)
    token_ids, counts = np.empty(draws.size, np.uint32), np.empty(draws.size, np.uint8)
    fault = ffi.new("skl_fault *")
    status = lib.skl_merge_draws(
        positions,
        rounds,
        view("uint32_t[]", draws),
        view("int64_t[]", offsets, writable=True),
        view("uint32_t[]", token_ids, writable=True),
        view("uint8_t[]", counts, writable=True),
        fault,
    )
    if status == lib.SKL_ERR_ARG and fault.reason == lib.SKL_REASON_ID_ORDER:
        raise ValueError(f"position {fault.position}: draws are not sorted (id {fault.value} follows a larger one)")
    check(status, fault)
    kept = int(offsets[-1])
    return offsets, token_ids[:kept], counts[:kept]
