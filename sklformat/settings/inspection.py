"""The settings of the verbs that look at caches and runs: ``inspect``, ``stats``, ``view``, ``card``, ``verify``, …"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from sklformat.settings.limits import MAX_DRAWN, check_least, check_picture, is_part, part_of

MAX_PORT = 65535
_SHOWN = 32  # positions of a sequence, where nobody says which
_LICENCE = re.compile(r"[a-z0-9][a-z0-9.+-]*")


@dataclass(frozen=True, kw_only=True)
class InspectConfig:
    """
    Show what a cache holds: settings, sizes, where it comes from, whether it is biased. Reads headers only.

    Of a capture that has not ended, how far it is. With --sequence one sequence, token by token, with its records.
    """

    path: str
    """Cache directory, or one .skl shard, or the URL of either; of a capture that has not ended what there is of it, or
    one .skl.partial."""

    sequence: int | None = field(default=None, metadata={"flag": "sequence"})
    """Sequence to show token by token, counted from 0. None: the cache as a whole is shown."""

    positions: str | None = field(default=None, metadata={"flag": "positions"})
    """Positions A:B of the sequence, from A to before B; without A from the first, without B to the last. None: the
    first 32."""

    tokenizer: str | None = field(default=None, metadata={"flag": "tokenizer"})
    """Tokenizer of the cache: a directory or a name. None: that of the teacher's name on the hub, if an earlier
    download left it here; else ids are shown."""

    trust_remote_code: bool = False
    """Whether code that comes with a tokenizer may be run."""

    def __post_init__(self) -> None:
        check_least(self, 0, "sequence")
        if self.positions is not None and not is_part(self.positions):
            raise ValueError(f"the positions to show must be A:B, such as 0:32, got {self.positions!r}")
        for name in ("positions", "tokenizer"):
            if self.sequence is None and getattr(self, name) is not None:
                raise ValueError(f"{name} is about one sequence; say which: --sequence I")

    def part(self, available: int) -> range:
        """
        The positions that are meant, of so many.

        Raises:
            ValueError: There are none, or not so many.
        """
        found = range(min(_SHOWN, available)) if self.positions is None else part_of(self.positions, available)
        if found is None:
            raise ValueError(
                f"{self.path}: positions {self.positions} are asked for, and sequence {self.sequence} has {available}; "
                f"give A:B with 0 <= A < B <= {available}"
            )
        return found


@dataclass(frozen=True, kw_only=True)
class StatsConfig:
    """Show what a cache holds, in numbers: of its records, how labels and records agree, and what looks wrong."""

    path: str
    """Cache directory, or one .skl shard, or the URL of either; of a capture that has not ended what there is of it, or
    one .skl.partial."""

    sample: int | None = None
    """Read this many sequences, drawn at random, and state standard errors; None: all."""

    seed: int = 0
    """Of that draw."""

    def __post_init__(self) -> None:
        check_least(self, 2, "sample")
        check_least(self, 0, "seed")


@dataclass(frozen=True, kw_only=True)
class VerifyConfig:
    """Check every byte of a cache. Damage is listed, one line each, and the exit status is then 3."""

    path: str
    """Cache directory, or one .skl shard, or the URL of either."""


@dataclass(frozen=True, kw_only=True)
class RecoverConfig:
    """Keep the whole sequences of an unfinished shard and cut its torn tail. Sealed shards are never changed."""

    path: Path
    """.skl.partial file, or a directory: every unfinished shard in it."""


@dataclass(frozen=True, kw_only=True)
class CheckConfig:
    """Prove that a cache was captured on exactly the tokens to be trained on: every sequence, before the first step."""

    path: str
    """Cache directory, or one .skl shard, or the URL of either."""

    tokens: Path = field(metadata={"flag": "tokens"})
    """The tokens: a .npy array [sequences, seq_len + 1], an mmap-ninja store of such sequences, or the token store that
    sklformat cache wrote, which is packed again as the cache says."""


@dataclass(frozen=True, kw_only=True)
class PlotConfig:
    """
    Draw caches on one sheet, or training runs, side by side.

    Caches: unique tokens, confidence against correctness, label-in-support along the sequence, bytes by column, counts.
    Runs: losses, distance to the teacher, calibration error and reliability.
    """

    paths: tuple[str, ...]
    """1 to 8 caches: directories, .skl shards, or URLs of either; or 1 to 8 directories of runs, as sklformat train
    writes them: evaluation.json in one, of eval, is drawn too."""

    out: Path = field(metadata={"flag": "out", "short": "-o"})
    """File to write; its ending chooses the format: .png, .svg or .pdf."""

    sample: int | None = None
    """Of each cache read this many sequences, drawn at random; None: all."""

    seed: int = 0
    """Of that draw."""

    def __post_init__(self) -> None:
        check_least(self, 2, "sample")
        check_least(self, 0, "seed")
        if not 1 <= len(self.paths) <= MAX_DRAWN:
            raise ValueError(f"plot draws 1 to {MAX_DRAWN} runs or caches, got {len(self.paths)}")
        check_picture("out", self.out)


@dataclass(frozen=True, kw_only=True)
class ViewConfig:
    """Write or serve one page that shows what the teacher said of each token. Any browser opens it, without network."""

    caches: tuple[str, ...]
    """Caches of the same tokens, one or more: directories, .skl shards, or URLs of either."""

    out: Path | None = field(default=None, metadata={"flag": "out", "short": "-o"})
    """File to write, in place of what is there; none: page.html, or no file with --serve."""

    serve: bool = field(default=False, metadata={"flag": "serve"})
    """Serve the page on 127.0.0.1, to this machine alone, until Ctrl-C."""

    port: int = 0
    """Port to serve on; 0: one that is free."""

    first: int = 0
    """The sequence to begin with."""

    positions: int = 10_000
    """Whole sequences are shown up to so many positions together, at least one."""

    tokenizer: str | None = None
    """Tokenizer of the cache: a directory or a name. None: ids are shown, or the student's tokenizer is taken if it
    is the cache's."""

    students: tuple[str, ...] = field(default=(), metadata={"flag": "student"})
    """Students to show beside the teacher: directories or names."""

    device: str = "auto"
    """Where the students run: cpu, cuda, cuda:1, …; auto: the GPU if there is one."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the students' weights in memory; probabilities are computed in float32."""

    trust_remote_code: bool = False
    """Whether code that comes with a model or tokenizer may be run."""

    def __post_init__(self) -> None:
        check_least(self, 0, "first", "port")
        check_least(self, 1, "positions")
        if not self.caches:
            raise ValueError("a page shows one cache or more, got none")
        if self.port > MAX_PORT:
            raise ValueError(f"port must be <= {MAX_PORT}, got {self.port}")
        if not self.students and (self.device, self.dtype) != ("auto", "float32"):
            raise ValueError("device and dtype are those of students, and none is given")
        if self.port and not self.serve:
            raise ValueError(f"port {self.port} belongs to --serve, which is not given")


@dataclass(frozen=True, kw_only=True)
class CardConfig:
    """Write a dataset card: the README.md that a hub shows of a cache. It comes from headers, no record is read."""

    path: str
    """Cache directory, or one .skl shard, or the URL of either."""

    out: Path | None = field(default=None, metadata={"flag": "out", "short": "-o"})
    """File to write, such as README.md; one that exists is not replaced. None: print the card."""

    license: str | None = field(default=None, metadata={"flag": "license"})
    """Licence of the data, as the Hugging Face hub names it (apache-2.0, cc-by-4.0, other, …). None: a blank is left
    that the hub refuses until it is filled."""

    name: str | None = field(default=None, metadata={"flag": "name"})
    """Name of the dataset. None: one that says the teacher."""

    teacher: str | None = field(default=None, metadata={"flag": "teacher"})
    """Name of the teacher, such as org/model, where the cache has none: of a local path it keeps the fingerprint."""

    text: str | None = field(default=None, metadata={"flag": "text"})
    """Name of the text, such as that of a dataset: a cache keeps the fingerprint."""

    def __post_init__(self) -> None:
        if self.license is not None and not _LICENCE.fullmatch(self.license):
            raise ValueError(
                f"the licence must be as the hub names it, in small letters, such as apache-2.0, got {self.license!r}"
            )
        for of, name in (("dataset", self.name), ("teacher", self.teacher), ("text", self.text)):
            if name is not None and not name.strip():
                raise ValueError(f"the name of the {of} is empty; give one, or leave it out")
