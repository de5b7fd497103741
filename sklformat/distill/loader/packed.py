"""
Records that go to the device as they are stored, three or four bytes each, and are decoded and checked there.

A kernel decodes where Triton runs, torch operations elsewhere.  The device says only whether a record is bad; which one
the host finds out from its own copy, in the words of the decoder in C.

Shape letters: B sequences, T positions, P = B·T positions, nnz records.
Source: SPEC.md sections 4.1, 4.2 and 13.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from sklformat import native
from sklformat.distill import kernels
from sklformat.distill.loader.batches import Targets
from sklformat.distill.models.devices import to_host
from sklformat.errors import CorruptError, FormatError
from sklformat.files.places import Place
from sklformat.format import layout
from sklformat.format.block import locate

Origin: TypeAlias = "tuple[Place, int, int] | None"
"""Of a row its file, its block there and the block's byte; None: the row is empty."""

_ID_BITS = {number: layout.ID_BITS[name] for name, number in layout.PROFILES.items()}
# What the last batch came to, until somebody asks for it, the next ``to`` at the latest.
_unread: deque[Fault] = deque()


class PackedTargets(Targets):
    """
    Targets whose records are bytes yet; ``to`` decodes them.

    Args:
        records: [nnz * record size] uint8.
        offsets: [P + 1] int64, proven by the host.
        shape: What the records are; its sizes do not count.
        origins: [B], where each row is from.
    """

    def __init__(self, records: Tensor, offsets: Tensor, shape: native.Shape, origins: Sequence[Origin]) -> None:
        given = {"records": records, "offsets": offsets, "shape": shape, "origins": origins}
        self.__dict__.update(given)  # of a class that is frozen

    records: Tensor
    shape: native.Shape
    origins: Sequence[Origin]

    def __repr__(self) -> str:
        return f"PackedTargets of {self.offsets.numel() - 1} positions"

    def __getattr__(self, name: str) -> Any:
        if name in ("token_ids", "probs"):
            raise ValueError(f"the records are packed and have no {name} yet: batch.to(device) decodes them there")
        raise AttributeError(f"packed targets have no attribute {name!r}")

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Targets:
        """
        Copy to a device and decode there.

        Raises:
            CorruptError: A record of the batch before is bad, or of this one where the device is no GPU.
        """
        while _unread:
            _unread.popleft().check()
        records, offsets = (x.to(device, non_blocking=non_blocking) for x in (self.records, self.offsets))
        token_ids, probs, flag = decode(records, offsets, self.shape)
        fault = Fault(flag, self)
        if fault.is_on_its_way:
            _unread.append(fault)
        else:
            fault.check()
        return DecodedTargets(token_ids, probs, offsets, fault)

    def check(self) -> None:
        """Refuse: nobody has looked at the records yet."""
        raise ValueError("the records are packed and not checked yet: call check() of what batch.to(device) gives")

    def pin_memory(self) -> Targets:
        """Copy to page-locked memory."""
        return PackedTargets(self.records.pin_memory(), self.offsets.pin_memory(), self.shape, self.origins)

    def find_fault(self) -> FormatError:
        """What the decoder in C says of these records, with the place of the first that is bad."""
        size, rows = native.record_size(self.shape), len(self.origins)
        offsets, records = self.offsets.numpy(), self.records.numpy()
        positions = (offsets.size - 1) // rows
        for row, origin in enumerate(self.origins):
            edges = offsets[row * positions : (row + 1) * positions + 1]
            numbers = np.diff(edges).astype("<u2").view(np.uint8)
            own = records[size * edges[0] : size * edges[-1]]
            shape = dataclasses.replace(
                self.shape,
                record_count_size=2,
                token_size=0,
                columns=0,
                num_positions=positions,
                num_records=int(edges[-1] - edges[0]),
            )
            try:
                native.decode(shape, np.concatenate([numbers, own, np.zeros(64, np.uint8)]))
            except FormatError as error:
                assert origin is not None
                path, number, offset = origin
                return locate(error, path=path, section="block", sequence=number, offset=offset)
        return CorruptError(
            "the device found a bad record where the host's copy has none: it, or the way there, is not to be trusted"
        )


@dataclasses.dataclass(frozen=True)
class DecodedTargets(Targets):
    """Targets that a device decoded, and what it found out about them."""

    fault: Fault

    def check(self) -> None:
        """Wait until the records are decoded; raise CorruptError if one is bad."""
        if self.fault in _unread:  # who asks here need not be told by the next batch
            _unread.remove(self.fault)
        self.fault.check()


class Fault:
    """
    Whether a device found a bad record; it is on the way to the host, which need not wait for it before it asks.

    Args:
        flag: [1] on the device, not 0 where there is one.
        packed: The records; kept until they are known to be sound.
    """

    def __init__(self, flag: Tensor, packed: PackedTargets) -> None:
        self._packed: PackedTargets | None = packed
        self._flag, self._mark = to_host(flag)

    @property
    def is_on_its_way(self) -> bool:
        """Whether asking for it may wait."""
        return self._mark is not None

    def check(self) -> None:
        """
        Wait for the flag, and for nothing that the device was given after it.

        Raises:
            CorruptError: A record is bad; names file, block, position and value.
        """
        if self._packed is None:
            return
        if self._mark is not None:
            self._mark.synchronize()
        if int(self._flag):
            raise self._packed.find_fault()
        self._packed = None


def decode(records: Tensor, offsets: Tensor, shape: native.Shape) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, probabilities and the flag of ``kernels.decode_counts``, by the kernel where it runs."""
    settings = {
        "id_bits": _ID_BITS[shape.profile],
        "record_size": native.record_size(shape),
        "rounds": shape.rounds,
        "vocab_size": shape.vocab_size,
    }
    if kernels.run_on(records.device):
        from sklformat.distill.kernels import decode_counts  # noqa: PLC0415  it loads Triton

        with torch.cuda.device(records.get_device()):  # Triton takes the current one
            return decode_counts.decode_counts(records, offsets, **settings)
    return decode_by_torch(records, offsets, **settings)


def decode_by_torch(
    records: Tensor, offsets: Tensor, *, id_bits: int, record_size: int, rounds: int, vocab_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The kernel's oracle, on any device."""
    of_record = records.view(-1, record_size).to(torch.int32)
    words = of_record[:, 0] | of_record[:, 1] << 8 | of_record[:, 2] << 16
    ids, codes = words & ((1 << id_bits) - 1), words >> id_bits
    bad = torch.zeros_like(ids, dtype=torch.bool)
    if record_size == 4:
        codes, bad = of_record[:, 3] & 127, of_record[:, 3] > 127
    counts = offsets.diff()
    positions = torch.repeat_interleave(counts, output_size=ids.numel())
    bad = bad | (ids >= vocab_size) | (codes == 0)
    bad[1:] |= (ids[1:] <= ids[:-1]) & (positions[1:] == positions[:-1])
    sums = torch.zeros_like(counts, dtype=torch.int32).index_add_(0, positions, codes)
    wrong = bad.any() | ((counts > 0) & (sums != rounds)).any()
    # By a tensor: CUDA multiplies by the reciprocal of a number, which is not always the host's quotient.
    probs = codes.to(torch.float32) / torch.full((), rounds, dtype=torch.float32, device=records.device)
    return torch.where(ids < vocab_size, ids, 0), probs, wrong.to(torch.int32).reshape(1)
