"""
Batches of a cache for training: decoded, checked and proven to belong to the tokens trained on.

Knows no model and no loss; the order is ``sklformat.order``'s.  SPEC.md sections 12 and 13.

Shape letters: B sequences, T positions, nnz records of a batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from sklformat import order
from sklformat.distill.losses import IGNORED_LABEL
from sklformat.errors import AlignmentError, ResumeError
from sklformat.order import Schedule
from sklformat.reader import Cache

STATE_VERSION = 1
_MAX_WORKERS = 128


class TokenSource(Protocol):
    """Anything indexed by the global sequence number that gives seq_len + 1 token ids."""

    def __getitem__(self, index: int, /) -> Any: ...


@dataclass(frozen=True)
class Targets:
    """
    Sparse teacher distributions of a batch, ragged over its B·T positions in row order.

    Attributes:
        token_ids: [nnz] int32 (int64 from other makers), in [0, V).
        probs: [nnz] float32, > 0.
        offsets: [B*T + 1] int64; the records of position p are offsets[p] to offsets[p + 1].
    """

    token_ids: Tensor
    probs: Tensor
    offsets: Tensor

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Targets:
        """Copy to a device; with ``non_blocking`` and pinned memory the copy runs beside the computation."""
        return Targets(*(getattr(self, f.name).to(device, non_blocking=non_blocking) for f in dataclasses.fields(self)))

    def pin_memory(self) -> Targets:
        """Copy to page-locked memory."""
        return Targets(*(getattr(self, f.name).pin_memory() for f in dataclasses.fields(self)))


@dataclass(frozen=True)
class Batch:
    """
    One batch of one rank.

    Attributes:
        input_ids: [B, T] int64, the tokens but the last of each sequence; 0 where padded.
        labels: [B, T] int64, the tokens but the first; -100 where there is none.
        targets: The teacher's distributions of the labels.
        state: Where the stream stands after this batch, for ``SparseLogitDataset.load_state_dict``.
    """

    input_ids: Tensor
    labels: Tensor
    targets: Targets
    state: dict[str, Any]

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Batch:
        """Copy the tensors to a device; see ``Targets.to``."""
        return Batch(
            self.input_ids.to(device, non_blocking=non_blocking),
            self.labels.to(device, non_blocking=non_blocking),
            self.targets.to(device, non_blocking=non_blocking),
            self.state,
        )

    def pin_memory(self) -> Batch:
        """Copy the tensors to page-locked memory."""
        return Batch(self.input_ids.pin_memory(), self.labels.pin_memory(), self.targets.pin_memory(), self.state)


class SparseLogitDataset(IterableDataset[Batch]):
    """
    The batches of one epoch of a cache; use as ``DataLoader(ds, batch_size=None, num_workers=k)`` or iterate it.

    The stream is a pure function of (cache, seed, epoch): the same for any number of workers, and for any world size
    that makes the same global batch.  Each block's checksum is verified when it is first touched, each sequence's
    alignment checksum against the tokens that are handed out, so that records of other tokens stop training before the
    first step.

    Protocol of use: ``ds.set_epoch(e)`` before each epoch (as for torch's DistributedSampler; without it every
    iteration repeats the same epoch).  To resume, ``ds.load_state_dict(batch.state)`` of the last batch trained on: the
    next iteration goes on right after it, later ones begin at the start of their epoch again.

    Args:
        path: A cache directory or one shard.
        batch_size: Sequences a batch, on each rank.
        seed: Seed of the order.
        shuffle: False: the order of the cache.
        rank, world_size: None: torch.distributed's, where it is initialised, else 0 of 1.
        tokens: The training program's own tokens, indexed by the global sequence number, each seq_len + 1 ids; they are
            compared with the cache and handed out.  None: the tokens stored in the cache.
        tail: What becomes of the last sequences that fill no global batch: "drop", "pad" (label -100, no records) or
            "wrap".

    Raises:
        ValueError: The cache stores no tokens and none are given, or the arguments contradict each other.
        FormatError, FileNotFoundError: As ``skl.open``; damage met later is raised by the iteration.
        AlignmentError: By the iteration: the records are not about these tokens.
    """

    def __init__(
        self,
        path: Path | str,
        batch_size: int = 8,
        seed: int = 0,
        shuffle: bool = True,
        rank: int | None = None,
        world_size: int | None = None,
        tokens: TokenSource | None = None,
        tail: Literal["drop", "pad", "wrap"] = "drop",
    ) -> None:
        if (rank is None) != (world_size is None):
            raise ValueError(f"give both rank and world_size or neither, got rank {rank}, world_size {world_size}")
        if rank is None or world_size is None:
            distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
            rank = torch.distributed.get_rank() if distributed else 0
            world_size = torch.distributed.get_world_size() if distributed else 1
        self.cache = Cache(path)
        self.schedule = Schedule(
            num_sequences=len(self.cache),
            batch_size=batch_size,
            rank=rank,
            world_size=world_size,
            seed=seed,
            shuffle=shuffle,
            tail=tail,
        )
        self.tokens = tokens
        self._check_tokens()
        # In shared memory, so that set_epoch and load_state_dict reach persistent workers too: epoch, consumed and
        # version; then, for this process and for each (num_workers, worker), the version whose consumed it has used.
        self._shared: Tensor = torch.zeros(4 + _MAX_WORKERS * (_MAX_WORKERS + 1) // 2, dtype=torch.int64)
        self._shared.share_memory_()  # type: ignore[no-untyped-call]
        self._position = (0, 0)

    def _check_tokens(self) -> None:
        cache = self.cache
        if self.tokens is None:
            if not cache.header.store_tokens:
                raise ValueError(
                    f"{cache.path}: the cache stores no tokens; pass tokens= with the sequences it was made from"
                )
            return
        needed = cache.first_sequence + len(cache)
        available = len(self.tokens) if isinstance(self.tokens, Sized) else needed
        if available < needed:
            raise AlignmentError(
                f"{cache.path}: {available} sequences of tokens given, the cache reaches to sequence {needed - 1}; "
                "pack the tokens with the cache's tokenizer, corpus, seed and seq_len",
                sequence_index=available,
            )

    def __len__(self) -> int:
        """Batches of one epoch on this rank; the same on all ranks."""
        return self.schedule.num_batches(0)

    def set_epoch(self, epoch: int) -> None:
        """
        Name the epoch of the next iteration.

        It begins at the start, except that after ``load_state_dict`` its own epoch goes on where the state stands.
        """
        if epoch < 0:
            raise ValueError(f"epoch must be >= 0, got {epoch}")
        if epoch != int(self._shared[0]):
            self._go_to(epoch, 0)

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands, when it is iterated in this process; with workers take ``batch.state``."""
        return self._state(*self._position)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """
        Go on right after the batch that carried this state, on any number of workers and ranks.

        Raises:
            ResumeError: The state belongs to another cache, seed or order; says which values differ.
        """
        ours = self._state(0, 0)
        if set(state) != set(ours):
            raise ResumeError(f"a loader state has the fields {sorted(ours)}, got {sorted(state)}")
        differing = [
            f"{name}: {state[name]!r} in the state, {ours[name]!r} here"
            for name in ours
            if name not in ("epoch", "consumed") and state[name] != ours[name]
        ]
        if differing:
            raise ResumeError(
                f"{self.cache.path}: the state belongs to another stream ({'; '.join(differing)}); "
                "open the cache and settings it was made with, or start anew"
            )
        epoch, consumed = state["epoch"], state["consumed"]
        if not (
            isinstance(epoch, int) and isinstance(consumed, int) and epoch >= 0 and 0 <= consumed <= len(self.cache)
        ):
            raise ResumeError(f"epoch {epoch!r} and consumed {consumed!r} are no place in {len(self.cache)} sequences")
        self._go_to(epoch, consumed)

    def _go_to(self, epoch: int, consumed: int) -> None:
        if self.schedule.num_batches(consumed) == 0:
            epoch, consumed = epoch + 1, 0
        self._shared[0], self._shared[1] = epoch, consumed
        self._shared[2] += 1
        self._position = (epoch, consumed)

    def _state(self, epoch: int, consumed: int) -> dict[str, Any]:
        return {
            "version": STATE_VERSION,
            "fingerprint": self.cache.fingerprint,
            "order": order.ALGORITHM if self.schedule.shuffle else 0,
            "seed": self.schedule.seed,
            "tail": self.schedule.tail,
            "epoch": epoch,
            "consumed": consumed,
        }

    def _begin(self, worker: int, num_workers: int) -> tuple[int, int]:
        """Where this iteration starts: a loaded position counts once, for each number of workers on its own."""
        if num_workers > _MAX_WORKERS:
            raise ValueError(f"at most {_MAX_WORKERS} workers, got {num_workers}")
        place = 4 + num_workers * (num_workers - 1) // 2 + worker if num_workers else 3
        epoch, consumed, version = (int(value) for value in self._shared[:3])
        if int(self._shared[place]) == version:
            consumed = 0
        self._shared[place] = version
        return epoch, consumed

    def __iter__(self) -> Iterator[Batch]:
        info = get_worker_info()
        worker, num_workers = (0, 0) if info is None else (info.id, info.num_workers)
        epoch, start = self._begin(worker, num_workers)
        for numbers, consumed in self.schedule.batches(epoch, start, worker, max(num_workers, 1)):
            after = self.schedule.after(epoch, consumed)
            batch = self._batch(numbers, self._state(*after))
            self._position = after
            yield batch

    def _batch(self, numbers: NDArray[np.int64], state: dict[str, Any]) -> Batch:
        payloads = self.cache.payloads(numbers)
        given = None if self.tokens is None else self._given(numbers, payloads.num_positions.tolist())
        arrays = payloads.decode(self.cache.header, given, IGNORED_LABEL)
        return Batch(
            input_ids=torch.from_numpy(arrays.input_ids),
            labels=torch.from_numpy(arrays.labels),
            targets=Targets(
                token_ids=torch.from_numpy(arrays.token_ids.view(np.int32)),
                probs=torch.from_numpy(arrays.probs),
                offsets=torch.from_numpy(arrays.offsets),
            ),
            state=state,
        )

    def _given(self, numbers: NDArray[np.int64], positions: list[int]) -> NDArray[np.uint32]:
        """The training program's own tokens of a batch, proven to be those of the records."""
        assert self.tokens is not None
        out = np.zeros((numbers.size, (self.cache.header.seq_len or max(positions)) + 1), np.uint32)
        for row, number in enumerate(numbers.tolist()):
            if number >= 0:
                tokens = np.asarray(self.tokens[self.cache.first_sequence + number])
                self.cache.check_alignment(number, tokens)
                out[row, : positions[row] + 1] = tokens
        return out
