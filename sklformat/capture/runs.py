"""
A run whose ranks never meet: any launcher starts them, each at its own time, and starts again those that died.

What they must agree on is written down by the first, in the directory that all share; there they also take turns at
what only one may do, and leave no two processes the same rank.
"""

from __future__ import annotations

import contextlib
import json
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sklformat.cache.manifest import MANIFEST_NAME, read_manifest
from sklformat.capture.destinations import Target
from sklformat.capture.plan import unsealed
from sklformat.capture.session import Capture
from sklformat.errors import CorruptError, FormatError, InUseError, MissingShardError, SettingsError
from sklformat.files.disk import shared_directory, write_atomically
from sklformat.files.places import url_of
from sklformat.format.header import Header, parse_header
from sklformat.format.listing import Entry

AGREEMENT_NAME = "capture.run.json"
_TURN_LOCK = ".turn.lock"
_PATIENCE_SECONDS = 30 * 24 * 3600.0  # one rank may tokenise while all others wait


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """
    What all ranks of a run have in common.

    Attributes:
        run: Its name.
        world_size: Number of its ranks.
        num_sequences: Of the whole cache.
        sequences_per_shard: Of every shard but the last.
        header: Of all shards.
    """

    run: str
    world_size: int
    num_sequences: int
    sequences_per_shard: int
    header: Header

    def pack(self) -> bytes:
        """As JSON."""
        return json.dumps(self.__dict__ | {"header": self.header.pack().hex()}, indent=1).encode()

    @classmethod
    def parse(cls, data: bytes) -> Agreement:
        """
        What ``pack`` wrote.

        Raises:
            ValueError, KeyError, TypeError, FormatError: It did not.
        """
        values: dict[str, Any] = json.loads(data)
        return cls(**values | {"header": parse_header(bytes.fromhex(values["header"]))})

    def differences(self, other: Agreement) -> list[str]:
        """One "name: ours != theirs" for each value that differs."""
        numbers = [name for name in self.__dict__ if name != "header"]
        lines = [f"{name}: {getattr(self, name)!r} != {getattr(other, name)!r}" for name in numbers]
        same = [getattr(self, name) == getattr(other, name) for name in numbers]
        return [line for line, is_same in zip(lines, same, strict=True) if not is_same] + self.header.differences(
            other.header
        )


class Run:
    """
    One rank's part in it.

    Args:
        directory: What all ranks share: the cache, or where its shards wait for their upload.
        name: Of the run; the same for all of its ranks, and for no ranks that divide the work in another way.
        rank: Of this process.
        world_size: Number of ranks.
    """

    def __init__(self, directory: Path, name: str, rank: int = 0, world_size: int = 1) -> None:
        self.directory, self.name, self.rank, self.world_size = directory, name, rank, world_size
        self._path = directory / AGREEMENT_NAME

    @contextlib.contextmanager
    def taken(self) -> Iterator[None]:
        """
        Take this rank's place, for the time of the block.

        Raises:
            InUseError: Another process has it.
        """
        place = shared_directory(self.directory, secrets.token_hex(8), name=f".rank-{self.rank:05d}.lock")
        with contextlib.ExitStack() as held:
            try:
                held.enter_context(place)
            except InUseError:
                raise InUseError(
                    f"{self.directory}: rank {self.rank} of run {self.name} is another process, which is at work; give "
                    "each process a rank of its own"
                ) from None
            yield

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """Wait until no other rank is in such a block."""
        with shared_directory(self.directory, secrets.token_hex(8), name=_TURN_LOCK, patience=_PATIENCE_SECONDS):
            yield

    def begun(self) -> Agreement | None:
        """
        What was agreed on, where a rank of this run has begun it; None: none has, or what is there is another run's.

        Raises:
            CorruptError: What is there was not written by a rank.
        """
        try:
            data = self._path.read_bytes()
        except FileNotFoundError:
            return None
        try:
            found = Agreement.parse(data)
        except (ValueError, KeyError, TypeError, FormatError) as error:
            raise CorruptError(
                f"not what a rank of a run wrote ({error}); remove it, and start the ranks again", path=self._path
            ) from None
        return found if found.run == self.name else None

    def agree(self, mine: Agreement) -> None:
        """
        Write down what this run is about, or find that another rank wrote the same; in a turn.

        Raises:
            SettingsError: It wrote something else; shows both values.
        """
        found = self.begun()
        if found is None:
            write_atomically(self._path, mine.pack())
        elif differing := found.differences(mine):
            raise SettingsError(
                f"{self.directory}: another rank began run {self.name} in another way (its value != this one's): "
                f"{'; '.join(differing)}; give every rank the same, or the run another name"
            )

    def waits_for(self, agreed: Agreement, url: str | None) -> tuple[int, tuple[int, ...]]:
        """How many shards are not in their final place, and which ranks they are the work of."""
        numbers = unsealed(Target(self.directory, url), agreed.num_sequences, agreed.sequences_per_shard)
        return len(numbers), tuple(sorted({number % agreed.world_size for number in numbers}))

    def check_whole(self, agreed: Agreement, url: str | None) -> None:
        """
        Make sure that all ranks have done their work.

        Raises:
            MissingShardError: Some have not; says which.
        """
        number, ranks = self.waits_for(agreed, url)
        if number:
            raise MissingShardError(
                f"run {self.name} is not finished: {number} shards are not sealed, of the ranks "
                f"{', '.join(map(str, ranks))} of {agreed.world_size}; start these again",
                path=self.directory,
            )

    def end(self) -> None:
        """Forget what was agreed on, once the manifest is there."""
        self._path.unlink(missing_ok=True)


def finish_run(directory: Path, name: str, url: str | None = None) -> list[Entry]:
    """
    Write the manifest of a run all of whose ranks have ended, which the last one does by itself unless it is killed.

    Args:
        directory: As of ``Run``.
        name: Of the run.
        url: Where sealed shards went, if they did not stay.

    Returns:
        What the manifest says of each shard.

    Raises:
        MissingShardError: Some ranks have not done their work; says which.
        SettingsError: No rank of this run has begun here.
        InUseError: Another run is at work here.
        FileNotFoundError, FormatError, RemoteError: The directory, a shard or the store cannot be read.
    """
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory}: no such directory, so no rank of run {name} has begun here")
    run = Run(directory, name)
    with shared_directory(directory, name), run.turn():
        agreed = run.begun()
        if agreed is None and Target(directory, url).has(MANIFEST_NAME):
            return read_manifest(directory / MANIFEST_NAME if url is None else url_of(url, MANIFEST_NAME))
        if agreed is None:
            raise SettingsError(f"{directory}: no rank of run {name} has begun here; start its ranks first")
        run.check_whole(agreed, url)
        capture = Capture(
            directory,
            header=agreed.header,
            num_sequences=agreed.num_sequences,
            sequences_per_shard=agreed.sequences_per_shard,
            url=url,
            run=name,
        )
        entries = capture.finish()
        run.end()
    return entries
