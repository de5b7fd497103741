"""
What a capture will cost, before it runs: bytes, shards, disks, hours.

Arithmetic on the format's own sizes; runs no teacher and reads no file.  ``distill.teacher.calibration`` measures
what must be measured.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from sklformat.format import layout
from sklformat.format.header import Header
from sklformat.format.index import payload_sizes
from sklformat.sampler import MAX_COUNT_ROUNDS, MAX_ROUNDS

_HOUR = 3600.0
_DAY = 24 * _HOUR


@dataclass(frozen=True, kw_only=True)
class EstimateConfig:
    """
    Say what a capture will cost: size, shards, disks, GPU hours, money.

    From numbers that you give, or from a short calibration run of a teacher over some of the text.
    """

    positions: float
    """Positions to capture, such as 1e12."""

    rounds: int = 50
    """Draws a position; 0: none are drawn (topk, topp)."""

    seq_len: int = 1024
    """Positions in a sequence."""

    vocab_size: int | None = None
    """Token ids; a calibration run knows it."""

    unique_tokens: float | None = None
    """Records a position, mean; a calibration run measures it. The paper has about 12 at 50 rounds."""

    positions_per_second: float | None = None
    """Positions a second on one GPU; a calibration run measures it, here."""

    proposal_temperature: float = 1.0
    """Exponent of the proposal; other than 1 the records hold ratios."""

    store_tokens: bool = True
    """Whether the cache holds the tokens as well."""

    sequences_per_shard: int = 1024
    """Sequences in one file."""

    gpus: int = 1
    """GPUs, each with a teacher of its own."""

    gpu_price: float | None = None
    """Price of a GPU hour, in any currency."""

    disk_tb: float = 20.0
    """Size of one disk, 10^12 bytes."""

    teacher: str | None = None
    """Teacher of the calibration run: a directory, or a Hugging Face name."""

    text: tuple[Path, ...] = ()
    """Text of the calibration run: files and directories."""

    calibration_sequences: int = 16
    """Sequences of the calibration run."""

    batch_size: int = 8
    """Sequences in one forward pass of the calibration run."""

    device: str = "auto"
    """Device of the calibration run."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of the teacher's weights in the calibration run."""

    def __post_init__(self) -> None:
        for name in ("seq_len", "sequences_per_shard", "gpus", "calibration_sequences", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        for name in ("positions", "disk_tb"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {getattr(self, name)}")
        for name in ("unique_tokens", "positions_per_second"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {value}")
        if not 0 <= self.rounds <= MAX_ROUNDS:
            raise ValueError(f"rounds must be in 0..{MAX_ROUNDS}, got {self.rounds}")
        if self.rounds and self.unique_tokens is not None and self.unique_tokens > self.rounds:
            raise ValueError(
                f"unique_tokens {self.unique_tokens:g} is more than the {self.rounds} rounds that draw them"
            )
        if self.rounds == 0 and self.teacher is not None:
            raise ValueError("a calibration run draws: rounds must be >= 1 with a teacher, got 0")
        if (self.teacher is None) != (not self.text):
            raise ValueError("a calibration run needs both teacher and text")


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """
    What a capture will cost; a sum of money only where a price is given, times only where a speed is.

    Attributes:
        positions, sequences, shards: How many.
        profile: Of the records.
        unique_tokens: Records a position, mean.
        bytes_per_position: Tokens, checksums, index and padding included.
        bytes: Of the whole cache.
        bytes_per_shard: Of one shard.
        disks: So many of ``disk_tb`` hold it.
        positions_per_second: On one GPU.
        gpu_hours: Of all GPUs together.
        days: From begin to end on ``gpus`` GPUs.
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
    positions_per_second: float | None
    gpu_hours: float | None
    days: float | None
    bytes_per_second: float | None
    price: float | None

    def __str__(self) -> str:
        lines = [
            f"positions        {self.positions:,} in {self.sequences:,} sequences",
            f"records          {self.unique_tokens:.2f} a position, profile {self.profile}",
            f"size             {self.bytes / 1e12:,.3f} TB, {self.bytes_per_position:.1f} bytes a position",
            f"files            {self.shards:,} shards of {self.bytes_per_shard / 1e6:,.1f} MB",
            f"disks            {self.disks:,}",
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
        ValueError: ``vocab_size`` or ``unique_tokens`` is not known, or the format cannot hold such a cache.
    """
    for name in ("vocab_size", "unique_tokens"):
        if getattr(config, name) is None:
            raise ValueError(f"{name} is not known: give it, or teacher and text for a calibration run")
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
    sequences = math.ceil(config.positions / config.seq_len)
    shards = math.ceil(sequences / config.sequences_per_shard)
    block = block_size(header, config.seq_len, round(config.unique_tokens * config.seq_len))
    size = sequences * (block + layout.INDEX_ROW_SIZE) + shards * (layout.HEADER_SIZE + layout.TRAILER_SIZE)
    speed = config.positions_per_second
    seconds = None if speed is None else sequences * config.seq_len / speed
    hours = None if seconds is None else seconds / _HOUR
    assert header.profile is not None
    return Estimate(
        positions=sequences * config.seq_len,
        sequences=sequences,
        shards=shards,
        profile=header.profile,
        unique_tokens=config.unique_tokens,
        bytes_per_position=size / (sequences * config.seq_len),
        bytes=size,
        bytes_per_shard=math.ceil(size / shards),
        disks=math.ceil(size / (config.disk_tb * 1e12)),
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
