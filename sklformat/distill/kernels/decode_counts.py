"""
Records of kind counts from their bytes to ids and probabilities, each checked.

Each program has one position: it reads the bytes of the records, and those of the one before each once more, which are
in the cache.  The checks are csrc's, in one flag for all: whoever reads it decodes on the host to name what is wrong.

Shape letters: P positions, N records.
Source: SPEC.md sections 4.1 and 4.2.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sklformat.distill.kernels import AS_WRITTEN

_RECORDS = 32  # those of a position, mostly


@triton.jit
def _words(at, inside, SIZE: tl.constexpr):
    """Records as integers: the lower three bytes, and the fourth by itself, where there is one."""
    word = tl.load(at, mask=inside, other=0).to(tl.int32)
    word |= tl.load(at + 1, mask=inside, other=0).to(tl.int32) << 8
    word |= tl.load(at + 2, mask=inside, other=0).to(tl.int32) << 16
    high = tl.zeros_like(word)
    if SIZE == 4:
        high = tl.load(at + 3, mask=inside, other=0).to(tl.int32)
    return word, high


@triton.jit
def _positions(
    records, offsets, ids, probs, fault, vocab_size, rounds,
    ID_BITS: tl.constexpr, SIZE: tl.constexpr, RECORDS: tl.constexpr,
):  # fmt: skip
    number = tl.program_id(0).to(tl.int64)
    first, last = tl.load(offsets + number), tl.load(offsets + number + 1)
    total = tl.zeros((), tl.int32)
    bad = tl.zeros((), tl.int32)
    for start in range(first, last, RECORDS):
        n = start + tl.arange(0, RECORDS)
        inside = n < last
        word, high = _words(records + n * SIZE, inside, SIZE)
        before, _ = _words(records + (n - 1) * SIZE, inside & (n > first), SIZE)
        found = word & ((1 << ID_BITS) - 1)
        code = word >> ID_BITS
        if SIZE == 4:
            code = high & 127
        falls = (n > first) & (found <= (before & ((1 << ID_BITS) - 1)))
        wrong = inside & ((found >= vocab_size) | (code == 0) | (high > 127) | falls)
        bad += tl.sum(wrong.to(tl.int32), 0)
        total += tl.sum(code, 0)
        # Whatever comes before the flag is read must not look outside the vocabulary.
        tl.store(ids + n, tl.where(found < vocab_size, found, 0), mask=inside)
        share = tl.div_rn(code.to(tl.float32), tl.zeros((RECORDS,), tl.float32) + rounds)
        tl.store(probs + n, share, mask=inside)
    bad += ((last > first) & (total != rounds)).to(tl.int32)
    if bad > 0:
        tl.store(fault, 1)


def decode_counts(
    records: Tensor, offsets: Tensor, *, id_bits: int, record_size: int, rounds: int, vocab_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """
    Decode the records of P positions; nothing waits for the device.

    Args:
        records: [N * record_size] uint8, as they are stored.
        offsets: [P + 1] int64, rising from 0 to N, on the same device.
        id_bits: Of the profile: 17, 18 or 24.
        record_size: Of the profile: 3 bytes, or 4 with 24 bits of id.
        rounds: The sum of a position's counts.
        vocab_size: V.

    Returns:
        ids [N] int32, all in [0, V); probs [N] float32; fault [1] int32, not 0 where a record breaks a rule.
    """
    num_records = records.numel() // record_size
    ids = torch.empty(num_records, dtype=torch.int32, device=records.device)
    probs = torch.empty(num_records, dtype=torch.float32, device=records.device)
    fault = torch.zeros(1, dtype=torch.int32, device=records.device)
    if num_records:
        _positions[(offsets.numel() - 1,)](
            records, offsets, ids, probs, fault, vocab_size, rounds,
            ID_BITS=id_bits, SIZE=record_size, RECORDS=_RECORDS, num_warps=1, **AS_WRITTEN,
        )  # fmt: skip
    return ids, probs, fault
