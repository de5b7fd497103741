"""
Endless batches for training: from a cache, or from packed text for methods that need no records.

Knows no model and no loss; checks that tokenizer and data belong together.
Shape letters: B sequences, T positions, P = B·T positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from sklformat.cache.reader import open_cache as open_shards
from sklformat.distill.loader.batches import Batch, Targets
from sklformat.distill.loader.conflicts import check_borders
from sklformat.distill.loader.dataset import SparseLogitDataset
from sklformat.distill.loader.sources import Sources
from sklformat.distill.losses.kl import IGNORED_LABEL
from sklformat.distill.models import loading, tokenization
from sklformat.distill.student.processes import leave_signals
from sklformat.distill.text.corpus import IdError, TokenStore
from sklformat.distill.text.fingerprints import MadeBy
from sklformat.distill.text.packing import Sequences
from sklformat.distill.text.singles import open_sequences
from sklformat.errors import SettingsError
from sklformat.format.header import Header
from sklformat.format.order import Schedule
from sklformat.settings.text import Packing, Truncate
from sklformat.settings.train import Decode

_HOST = torch.device("cpu")

Starts: TypeAlias = list[NDArray[np.bool_]] | None
"""Where documents begin among the tokens of each of some sequences, if that is known already."""


class TextBatches(IterableDataset[Batch]):
    """
    Batches of text; order and state work as in SparseLogitDataset, the targets are the labels themselves.

    Args:
        sequences: Of a token store.
        batch_size: Sequences per batch, on each process.
        seed: Seed of the order.
        rank: Number of this process.
        world_size: Number of processes.
        window: As for SparseLogitDataset.
    """

    def __init__(
        self,
        sequences: Sequences,
        *,
        batch_size: int,
        seed: int,
        rank: int,
        world_size: int,
        window: int | None = None,
    ) -> None:
        self.sequences = sequences
        self.schedule = Schedule(
            num_sequences=len(sequences),
            batch_size=batch_size,
            seed=seed,
            rank=rank,
            world_size=world_size,
            window=window,
        )
        self._epoch = self._consumed = 0

    def __len__(self) -> int:
        """Batches of one epoch on one process."""
        return self.schedule.num_batches(0)

    def set_epoch(self, epoch: int) -> None:
        """Start the next iteration at the beginning of this epoch."""
        self._epoch, self._consumed = epoch, 0

    def state_dict(self) -> dict[str, Any]:
        """Where the next iteration starts."""
        return {"epoch": self._epoch, "consumed": self._consumed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume right after the batch that carried this state."""
        self._epoch, self._consumed = state["epoch"], state["consumed"]

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        worker_id, num_workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        for chosen, consumed in self.schedule.batches(self._epoch, self._consumed, worker_id, num_workers):
            tokens = tokens_of(self.sequences, chosen)
            borders: tuple[Tensor | None, ...] = ()
            starts = None
            if self.sequences.isolated and not self.sequences.is_ragged:
                starts = [self.sequences.document_starts(int(index)) for index in chosen]
                starts_BT = np.stack([starts_L[:-1] for starts_L in starts])
                borders = position_ids_of(self.sequences, chosen, starts), torch.from_numpy(starts_BT)
            labels = labels_of(self.sequences, chosen, tokens, starts)
            epoch, after = self.schedule.after(self._epoch, consumed)
            state = {"epoch": epoch, "consumed": after}
            yield Batch(tokens[:, :-1].contiguous(), labels, one_hot(labels), state, *borders)


def tokens_of(sequences: Sequences, chosen: NDArray[np.int64]) -> Tensor:
    """Some sequences, [B, T + 1] int64; shorter ones are filled up with the separator."""
    rows = [sequences[int(index)] for index in chosen]
    tokens_BL = np.full((len(rows), max(tokens.size for tokens in rows)), sequences.separator_id, np.int64)
    for row, tokens in enumerate(rows):
        tokens_BL[row, : tokens.size] = tokens
    return torch.from_numpy(tokens_BL)


def labels_of(sequences: Sequences, chosen: NDArray[np.int64], tokens_BL: Tensor, starts: Starts = None) -> Tensor:
    """The tokens but the first of some sequences, [B, T] int64; -100 where a position is not learnt from, or filled."""
    ignored_BT = np.ones((len(chosen), tokens_BL.shape[1] - 1), np.bool_)
    for row, index in enumerate(chosen.tolist()):
        counted = sequences.counted(index, None if starts is None else starts[row])
        ignored_BT[row, : sequences.width(index, index + 1)] = False if counted is None else ~counted
    # Of one sequence the tokens but the first are a view, and the tokens themselves stay as they are.
    return tokens_BL[:, 1:].masked_fill(torch.from_numpy(ignored_BT).to(tokens_BL.device), IGNORED_LABEL)


def position_ids_of(sequences: Sequences, chosen: NDArray[np.int64], starts: Starts = None) -> Tensor | None:
    """Places of the inputs of some sequences in their documents, [B, T] int64; None where each sequence is one."""
    known = [None] * len(chosen) if starts is None else starts
    places = [sequences.position_ids(int(index), own) for index, own in zip(chosen, known, strict=True)]
    isolated = [place for place in places if place is not None]
    return torch.from_numpy(np.stack(isolated)) if isolated else None


def one_hot(labels_BT: Tensor) -> Targets:
    """Cross-entropy as targets, of labels on the CPU: all probability on the label, no record where that is -100."""
    labels_P = labels_BT.flatten()
    has_label_P = labels_P != IGNORED_LABEL
    offsets = torch.zeros(labels_P.numel() + 1, dtype=torch.int64)
    torch.cumsum(has_label_P, 0, out=offsets[1:])
    token_ids = labels_P[has_label_P]
    return Targets(token_ids=token_ids, probs=torch.ones(token_ids.numel()), offsets=offsets)


@dataclass(frozen=True)
class Stream:
    """
    Where a run's sequences come from.

    Attributes:
        source: The cache or the token store.
        dataset: One epoch of it.
        tokenizer: Whose ids these are.
        vocab_size: V of the data.
        seq_len: Positions of every sequence; 0: ragged.
        isolated: Whether documents do not see each other.
        note: What whoever trains on it may want to know; "" where there is nothing.
        identity: Fingerprints of the data, for the run's settings.
        store: The token store, if it is one.
    """

    source: Path | str
    dataset: SparseLogitDataset | TextBatches
    tokenizer: Any
    vocab_size: int
    seq_len: int
    isolated: bool
    identity: dict[str, Any]
    note: str = ""
    store: TokenStore | None = None

    def holds_only(self, width: int) -> bool:
        """Whether all ids are below this, although V is greater: V of a token store counts its tokenizer's ids."""
        if self.store is None:
            return False
        try:
            self.store.check_ids(width)
        except IdError:
            return False
        return True

    def batches(self, num_workers: int, state: dict[str, Any] | None) -> Iterator[Batch]:
        """
        Endless batches, epoch after epoch.

        Args:
            num_workers: Processes that read ahead; the stream is the same for any number.
            state: Of the batch to resume after; None: from the beginning.
        """
        if state is not None:
            self.dataset.load_state_dict(state)
        epoch = int(self.dataset.state_dict()["epoch"])
        while True:
            yield from DataLoader(self.dataset, batch_size=None, num_workers=num_workers, worker_init_fn=leave_signals)
            epoch += 1
            self.dataset.set_epoch(epoch)


def open_caches(
    paths: Sequence[Path | str],
    *,
    weights: Sequence[float] | None = None,
    tokenizer: str | None,
    batch_size: int,
    seed: int,
    rank: int,
    world_size: int,
    window: int | None = None,
    ragged_window: int | None = None,
    hold_out: int = 0,
    named: loading.Named | None = None,
    decode: Decode = "cpu",
    device: torch.device = _HOST,
) -> Stream:
    """
    Stream the sequences and records of caches.

    Args:
        paths: The caches, directories or URLs; several are mixed.
        weights: As for ``SparseLogitDataset``.
        tokenizer: The student's, path or name.
        batch_size: Sequences per batch, on each process.
        seed: Seed of the order of the sequences.
        rank: Number of this process.
        world_size: Number of processes.
        window: As for ``SparseLogitDataset``.
        ragged_window: The same where it is None and each sequence has a length of its own: those of like length stand
            beside each other in the cache, and stay together.
        hold_out: Sequences at the end of each cache that the stream never reaches.
        named: How the tokenizer is loaded.
        decode: Where records are decoded, as for ``Sources.decoding``; the stream's note says it of a GPU.
        device: What trains.

    Raises:
        SettingsError: A cache was made by another tokenizer, or lacks the borders of its isolated documents; or the
            caches do not go together.
        ValueError: They have too few sequences for a batch, or none that are not held out, no tokenizer was given, or
            the records cannot be decoded where they are to be.
        FormatError: A cache is damaged.
    """
    caches = [open_shards(path) for path in paths]
    named_caches = list(zip(paths, caches, strict=True))
    for path, cache in named_caches:
        if hold_out >= len(cache):
            raise ValueError(f"{path}: has {len(cache)} sequences, hold_out {hold_out} leaves none to train on")
    where = " + ".join(map(str, paths))
    parts = [range(len(cache) - hold_out) for cache in caches]
    _check_enough(where, sum(map(len, parts)), batch_size, world_size)
    seq_lens = [cache.header.seq_len for cache in caches]
    decode_on, decoded = Sources.of(caches, None, parts).decoding(decode, device)
    dataset = SparseLogitDataset(
        caches,
        weights=weights,
        batch_size=batch_size,
        seed=seed,
        rank=rank,
        world_size=world_size,
        window=ragged_window if window is None and not all(seq_lens) else window,
        sequences=parts,
        decode=decode_on,
    )
    for cache in caches:
        check_borders(cache)
    fingerprints = [cache.fingerprint for cache in caches]
    return Stream(
        source=where,
        dataset=dataset,
        tokenizer=_tokenizer([(path, made_by(cache.header)) for path, cache in named_caches], tokenizer, named),
        vocab_size=caches[0].header.vocab_size,
        seq_len=max(seq_lens) if all(seq_lens) else 0,
        isolated=dataset.isolated,
        identity={"cache": fingerprints if len(caches) > 1 else fingerprints[0]},
        note="; ".join(filter(None, (*(_author_note(path, cache.header) for path, cache in named_caches), decoded))),
    )


def _author_note(path: Path | str, header: Header) -> str:
    """Where a model wrote the text that is not the teacher: a student then learns on what neither of the two says."""
    author = header.capture.get("author")
    if not isinstance(author, dict) or author.get("fingerprint") == header.teacher_fingerprint:
        return ""
    return (
        f"{path}: its text was written by {author.get('name')}, its records are of another model; where the two "
        "differ much, the teacher predicts text that it would not write"
    )


def open_tokens(
    path: Path,
    *,
    tokenizer: str | None,
    seq_len: int,
    packing_seed: int,
    batch_size: int,
    seed: int,
    rank: int,
    world_size: int,
    named: loading.Named | None = None,
    isolated: bool = False,
    packing: Packing = "auto",
    truncate: Truncate = "end",
    ragged_window: int | None = None,
) -> Stream:
    """
    Stream the sequences of a token store.

    Args:
        path: The token store.
        tokenizer: The student's, path or name.
        seq_len: Positions of a sequence.
        packing_seed: Seed of the packing.
        batch_size: Sequences per batch, on each process.
        seed: Seed of the order of the sequences.
        rank: Number of this process.
        world_size: Number of processes.
        named: How the tokenizer is loaded.
        isolated: Whether documents do not see each other.
        packing: As ``open_sequences``.
        truncate: As ``open_sequences``.
        ragged_window: As for ``open_cache``.

    Raises:
        SettingsError: The store was made by another tokenizer.
        ValueError: It has too few sequences for a batch.
        FileNotFoundError, FormatError: It cannot be read.
    """
    store = TokenStore(path)
    facts = store.facts
    loaded = _tokenizer([(path, facts.made_by)], tokenizer, named)
    sequences = open_sequences(
        path,
        packing=packing,
        truncate=truncate,
        bos_id=loaded.bos_token_id,
        seq_len=seq_len,
        separator_id=tokenization.separator_id(loaded),
        seed=packing_seed,
        isolated=isolated,
    )
    _check_enough(path, len(sequences), batch_size, world_size)
    dataset = TextBatches(
        sequences,
        batch_size=batch_size,
        seed=seed,
        rank=rank,
        world_size=world_size,
        window=ragged_window if sequences.is_ragged else None,
    )
    return Stream(
        source=path,
        dataset=dataset,
        tokenizer=loaded,
        vocab_size=facts.vocab_size,
        seq_len=seq_len,
        isolated=isolated,
        identity={"corpus": facts.corpus_fingerprint, "vocabulary": facts.tokenizer_fingerprint},
        store=store,
    )


def _check_enough(source: Path | str, count: int, batch_size: int, world_size: int) -> None:
    if count < batch_size * world_size:
        processes = f" on each of {world_size} processes" if world_size > 1 else ""
        raise ValueError(
            f"{source}: has {count} sequences to train on, batch_size asks for {batch_size}{processes} at once; lower "
            "batch_size, or take more text"
        )


def made_by(header: Header) -> MadeBy:
    """What a cache's header says of the tokenizer that made its tokens."""
    said = header.capture.get("tokenizer")
    vocabulary = said.get("vocabulary") if isinstance(said, dict) else None
    return MadeBy(header.tokenizer_fingerprint, header.vocab_size, vocabulary if isinstance(vocabulary, str) else "")


def _tokenizer(made: Sequence[tuple[Path | str, MadeBy]], name: str | None, named: loading.Named | None) -> Any:
    """The student's tokenizer, sure to be the one that made each of the sources."""
    if name is None:
        raise ValueError("a new student needs a tokenizer: give the path or name of one (--tokenizer)")
    loaded = loading.load_tokenizer(name, **(named or {}))
    for source, maker in made:
        conflict = maker.conflict(loaded)
        if conflict:
            raise SettingsError(
                f"{source} was made by a different tokenizer, not {name}: {conflict}; make it again with this "
                "tokenizer, or give the student the one that made it"
            )
    return loaded
