"""
What a capture will cost, before it runs: bytes, shards, disks, hours.

Arithmetic on the format's own sizes; runs no teacher and reads no file.  ``distill.teacher.calibration`` measures
what must be measured.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from sklformat.format import layout
from sklformat.format.header import Header
from sklformat.format.index import payload_sizes
from sklformat.sampler import MAX_COUNT_ROUNDS
from sklformat.settings.estimate import EstimateConfig

_HOUR = 3600.0
_DAY = 24 * _HOUR


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """
    What a capture will cost; a sum of money only where a price is given, times only where a speed is.

    Attributes:
        positions, sequences, shards: How many.
        profile: Of the records.
        unique_tokens: Records per position, mean.
        bytes_per_position: Tokens, checksums, index and padding included.
        bytes: Of the whole cache.
        bytes_per_shard: Of one shard.
        disks: How many of ``disk_tb`` hold it.
        disk_tb: Size of one, 10^12 bytes.
        positions_per_second: On one GPU.
        gpu_hours: Of all GPUs together.
        days: From beginning to end on ``gpus`` GPUs.
        bytes_per_second: That the disks have to take meanwhile, all GPUs together.
        price: Of the GPU hours.
    """

    positions: int
    sequences: int
    shards: int
    profile: str
    unique_tokens: float
    bytes_per_position: float
    bytes: int
    bytes_per_shard: int
    disks: int
    disk_tb: float
    positions_per_second: float | None
    gpu_hours: float | None
    days: float | None
    bytes_per_second: float | None
    price: float | None

    def __str__(self) -> str:
        lines = [
            f"positions        {self.positions:,} in {self.sequences:,} sequences",
            f"records          {self.unique_tokens:.2f} per position, profile {self.profile}",
            f"size             {self.bytes / 1e12:,.3f} TB, {self.bytes_per_position:.1f} bytes per position",
            f"files            {self.shards:,} shards of {self.bytes_per_shard / 1e6:,.1f} MB",
            f"disks            {self.disks:,} of {self.disk_tb:g} TB",
        ]
        if self.gpu_hours is not None:
            speed = f"{self.positions_per_second:,.0f} positions/s"
            lines.append(f"time             {self.gpu_hours:,.1f} GPU hours at {speed}, {self.days:,.2f} days")
            lines.append(f"writing          {(self.bytes_per_second or 0) / 1e6:,.1f} MB/s")
        if self.price is not None:
            lines.append(f"price            {self.price:,.2f} for the GPUs")
        return "\n".join(lines)


def estimate(config: EstimateConfig) -> Estimate:
    """
    What a capture will cost, from numbers alone.

    Raises:
        ValueError: ``positions``, ``vocab_size`` or ``unique_tokens`` is not known, or the format cannot hold such a
            cache.
    """
    if config.positions is None:
        raise ValueError("how many positions to capture is not known; say it")
    for name in ("vocab_size", "unique_tokens"):
        if getattr(config, name) is None:
            raise ValueError(f"{name} is not known: give it, or --teacher and --text for a calibration run")
    assert config.vocab_size is not None
    assert config.unique_tokens is not None
    is_counts = 1 <= config.rounds <= MAX_COUNT_ROUNDS and config.proposal_temperature == 1
    header = Header(
        vocab_size=config.vocab_size,
        seq_len=config.seq_len,
        kind="counts" if is_counts else "ratios",
        rounds=config.rounds,
        proposal_temperature=config.proposal_temperature,
        store_tokens=config.store_tokens,
    )
    learnt = config.learnt_per_sequence or config.seq_len
    sequences = math.ceil(config.positions / learnt)
    positions = round(sequences * learnt)
    shards = math.ceil(sequences / config.sequences_per_shard)
    block = block_size(header, config.seq_len, round(config.unique_tokens * learnt))
    size = sequences * (block + layout.INDEX_ROW_SIZE) + shards * (layout.HEADER_SIZE + layout.TRAILER_SIZE)
    speed = config.positions_per_second
    seconds = None if speed is None else positions / speed
    hours = None if seconds is None else seconds / _HOUR
    assert header.profile is not None
    return Estimate(
        positions=positions,
        sequences=sequences,
        shards=shards,
        profile=header.profile,
        unique_tokens=config.unique_tokens,
        bytes_per_position=size / positions,
        bytes=size,
        bytes_per_shard=math.ceil(size / shards),
        disks=math.ceil(size / (config.disk_tb * 1e12)),
        disk_tb=config.disk_tb,
        positions_per_second=speed,
        gpu_hours=hours,
        days=None if seconds is None else seconds / config.gpus / _DAY,
        bytes_per_second=None if seconds is None else size / (seconds / config.gpus),
        price=None if hours is None or config.gpu_price is None else hours * config.gpu_price,
    )


def block_size(header: Header, positions: int, records: int) -> int:
    """Bytes of a sequence's block: header, payload and zero bytes.  SPEC section 5."""
    payload = payload_sizes(header, np.array([positions], np.uint32), np.array([records], np.uint32))
    return layout.block_size(int(payload[0]))
