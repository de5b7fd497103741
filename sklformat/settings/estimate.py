"""The settings of ``sklformat estimate``."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from sklformat.sampler import MAX_ROUNDS
from sklformat.settings.cache import ModelDtype
from sklformat.settings.files import TextFiles
from sklformat.settings.limits import check_least, check_positive


@dataclass(frozen=True, kw_only=True)
class EstimateConfig(TextFiles):
    """
    Predict what a capture will cost: size, shards, disks, GPU hours, money.

    From numbers that you give, or from a short calibration run of a teacher over some of the text or dataset.
    """

    positions: float
    """Positions to capture, such as 1e12."""

    rounds: int = 50
    """Draws per position; 0: none are drawn (topk, topp)."""

    seq_len: int = 1024
    """Positions in a sequence."""

    vocab_size: int | None = None
    """Token ids; a calibration run knows it."""

    learnt_per_sequence: float | None = None
    """Positions of a sequence that are learnt from, mean, such as answers in chats; none: all, or as measured."""

    unique_tokens: float | None = None
    """Records per position, mean; a calibration run measures it. The paper has about 12 at 50 rounds."""

    positions_per_second: float | None = None
    """Positions per second on one GPU; a calibration run measures it, here."""

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
    """Text of the calibration run: plain text, .jsonl, .json, .parquet, .arrow, also packed (.gz, .zst), and directories of them."""  # noqa: E501

    dataset: tuple[str, ...] = dataclasses.field(default=(), metadata={"once": True})
    """Hugging Face dataset of the calibration run, instead of text, as sklformat cache has it."""

    dataset_split: str = "train"
    """Part of the dataset."""

    calibration_sequences: int = 16
    """Sequences of the calibration run."""

    batch_size: int = 8
    """Sequences in one forward pass of the calibration run."""

    device: str = "auto"
    """Device of the calibration run."""

    dtype: ModelDtype = "auto"
    """Type of the teacher's weights in the calibration run."""

    trust_remote_code: bool = False
    """Run the code that came with the teacher. Look at it first."""

    adapter_base: str | None = None
    """Where the teacher is an adapter (peft): the model that it belongs to; none: as the adapter says."""

    def __post_init__(self) -> None:
        check_least(self, 1, "seq_len", "sequences_per_shard", "gpus", "calibration_sequences", "batch_size")
        check_positive(self, "positions", "disk_tb", "unique_tokens", "positions_per_second", "learnt_per_sequence")
        if self.learnt_per_sequence is not None and self.learnt_per_sequence > self.seq_len:
            raise ValueError(
                f"learnt_per_sequence {self.learnt_per_sequence:g} is more than the {self.seq_len} positions of seq_len"
            )
        if not 0 <= self.rounds <= MAX_ROUNDS:
            raise ValueError(f"rounds must be in 0..{MAX_ROUNDS}, got {self.rounds}")
        if self.rounds and self.unique_tokens is not None and self.unique_tokens > self.rounds:
            raise ValueError(
                f"unique_tokens {self.unique_tokens:g} is more than the {self.rounds} rounds that draw them"
            )
        if self.rounds == 0 and self.teacher is not None:
            raise ValueError("a calibration run draws: rounds must be >= 1 with a teacher, got 0")
        if bool(self.text) + bool(self.dataset) != (self.teacher is not None):
            raise ValueError("a calibration run needs both a teacher and something to read: either text or a dataset")
        TextFiles.__post_init__(self)
        given = [
            name for name, default in (("field", None), ("dataset_split", "train")) if getattr(self, name) != default
        ]
        if self.teacher is None and given:
            raise ValueError(f"{given[0]} belongs to the text of a calibration run, which is not given")
