"""The settings of ``sklformat estimate``."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from sklformat.sampler import MAX_ROUNDS
from sklformat.settings.cache import ModelDtype
from sklformat.settings.files import TextFiles
from sklformat.settings.limits import MAX_DRAWN, check_least, check_picture, check_positive

# Independent draws that leave 12 records per position, the paper's number, add 0.1 to 0.2.
NOISE = 0.1
MAX_NOISE_SEED = 1 << 48
NOISE_ROUNDS = (1, 2, 4, 8, 12, 18, 32, 50)
_OF_NOISE = ("noise", "noise_rounds", "noise_sequences", "noise_seed", "plot")


@dataclass(frozen=True, kw_only=True)
class EstimateConfig(TextFiles):
    """
    Predict what a capture will cost: size, shards, disks, GPU hours, money.

    From numbers that you give, or from a short calibration run of a teacher over some of the text or dataset. With a
    student also how many records are enough: what the draws add to the noise of its gradient.
    """

    positions: float | None = None
    """Positions to capture, such as 1e12; with --student they may be left out."""

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
    """Text of the calibration run: plain text, .jsonl, .json, .parquet, .arrow, also compressed (.gz, .zst), and directories of them."""  # noqa: E501

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

    student: tuple[str, ...] = dataclasses.field(default=(), metadata={"once": True})
    """Students to measure how many records are enough for, such as an early and a late one: models or runs."""

    noise: float = NOISE
    """The most noise that draws may add to a student's gradient, as a share of the text's own."""

    noise_rounds: tuple[int, ...] = NOISE_ROUNDS
    """Draws per position to try, with each sampler."""

    noise_sequences: int = 24
    """Sequences to measure the noise on."""

    noise_seed: int = 0
    """Seed of the draws that are tried."""

    plot: Path | None = None
    """File for a plot of the shares, .png, .svg or .pdf."""

    def __post_init__(self) -> None:
        check_least(self, 1, "seq_len", "sequences_per_shard", "gpus", "calibration_sequences", "batch_size")
        if self.positions is None and not self.student:
            raise ValueError("positions is missing: say how many to capture, such as 1e12")
        check_positive(
            self, "noise", "positions", "disk_tb", "unique_tokens", "positions_per_second", "learnt_per_sequence"
        )
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
        self._check_noise()
        given = [
            name for name, default in (("field", None), ("dataset_split", "train")) if getattr(self, name) != default
        ]
        if self.teacher is None and given:
            raise ValueError(f"{given[0]} belongs to the text of a calibration run, which is not given")

    def _check_noise(self) -> None:
        if not self.student:
            said = [
                f.name for f in dataclasses.fields(self) if f.name in _OF_NOISE and getattr(self, f.name) != f.default
            ]
            if said:
                raise ValueError(f"{said[0]} belongs to the noise of a student's gradient; give a student")
            return
        if self.teacher is None:
            raise ValueError(f"student {self.student[0]} learns from a teacher, which is not given; give both")
        if len(set(self.student)) < len(self.student):
            raise ValueError(f"a student is given twice: {' '.join(self.student)}; give each once")
        if self.proposal_temperature != 1:
            raise ValueError(
                f"the noise is measured of draws from the teacher's own distribution: proposal_temperature must be 1 "
                f"with a student, got {self.proposal_temperature:g}"
            )
        if self.plot is not None:
            check_picture("plot", self.plot)
            if len(self.student) > MAX_DRAWN:
                raise ValueError(f"plot draws 1 to {MAX_DRAWN} students, got {len(self.student)}; leave it out")
        check_positive(self, "noise")
        if not 0 <= self.noise_seed < MAX_NOISE_SEED:
            raise ValueError(f"noise_seed must be in 0..2**48 - 1, got {self.noise_seed}")
        if self.noise_sequences < 3:
            raise ValueError(f"noise_sequences must be >= 3, for a variance and its error, got {self.noise_sequences}")
        if not self.noise_rounds:
            raise ValueError("noise_rounds is empty; give rounds to try, such as 2 12 50")
        for rounds in self.noise_rounds:
            if not 1 <= rounds <= MAX_ROUNDS:
                raise ValueError(f"noise_rounds must be in 1..{MAX_ROUNDS}, got {rounds}")
        if len(set(self.noise_rounds)) < len(self.noise_rounds):
            twice = " ".join(map(str, self.noise_rounds))
            raise ValueError(f"noise_rounds holds a number twice: {twice}; give each once")
