"""
What training gets: the tensors of a batch and where its stream stands after it, and one batch of many sequences.

Knows no cache and no order.

Shape letters: B sequences, T positions, nnz records of a batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from sklformat.distill.losses.kl import IGNORED_LABEL


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
        return self._each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Targets:
        """Copy to page-locked memory."""
        return self._each(Tensor.pin_memory)

    def check(self) -> None:
        """Raise what is wrong with the records, where that is not known yet; see ``Batch.check``."""

    def _each(self, copy: Callable[[Tensor], Tensor]) -> Targets:
        return dataclasses.replace(
            self, token_ids=copy(self.token_ids), probs=copy(self.probs), offsets=copy(self.offsets)
        )


@dataclass(frozen=True)
class Batch:
    """
    One batch of one rank, or one sequence of it where the batches are made elsewhere: then without the dimension B.

    Attributes:
        input_ids: [B, T] int64, the tokens but the last of each sequence; 0 where padded.
        labels: [B, T] int64, the tokens but the first; -100 where there is none, and where a position has no record.
        targets: The teacher's distributions of the labels.
        state: Where the stream stands after this batch, for ``SparseLogitDataset.load_state_dict``; empty where there
            is no stream, as in ``SparseLogitSequences``.
        position_ids: [B, T] int64, each input's place in its document, or in what the sequence has of it; None where
            the cache does not say where documents begin. For models whose documents do not see each other
            (``SparseLogitDataset.isolated``) only.
        document_starts: [B, T] bool, whether an input begins a document; None as position_ids.
        label_logprob: [B, T] float32, the log-prob that the teacher gave to each label, <= 0, and 0 where there is
            none; None unless the dataset was asked for it.
    """

    input_ids: Tensor
    labels: Tensor
    targets: Targets
    state: dict[str, Any]
    position_ids: Tensor | None = None
    document_starts: Tensor | None = None
    label_logprob: Tensor | None = None

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Batch:
        """
        Copy the tensors to a device; see ``Targets.to``.  Records that are packed are decoded there.

        Raises:
            CorruptError: A packed record is bad, of the batch that was moved before this one, or of this one where the
                device is no GPU.
        """
        return self._each(
            lambda tensor: tensor.to(device, non_blocking=non_blocking),
            self.targets.to(device, non_blocking=non_blocking),
        )

    def pin_memory(self) -> Batch:
        """Copy the tensors to page-locked memory."""
        return self._each(Tensor.pin_memory, self.targets.pin_memory())

    def check(self) -> None:
        """
        Call it before ``optimizer.step()`` where a GPU decoded the records (``SparseLogitDataset(decode="cuda")``).

        It waits until they are decoded, not for the losses and gradients that were asked for since.  Elsewhere the
        records were checked before the batch was there, and nothing happens.

        Raises:
            CorruptError: A record is bad; names the file, the block and the position.
            ValueError: The records are packed yet: ask the batch that ``to`` gave.
        """
        self.targets.check()

    def padded(self, k: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """
        The targets with equally many places for every position, as tensors that can be cut and put together.

        Args:
            k: K, >= 1.  Positions with more records keep the k heaviest, of equal ones the lower ids; without k that
                is unbiased, with it only where ``rest`` is 0.  None: the most records that a position of this batch
                has, at least 1.

        Returns:
            ids [B, T, K] int32 and probs [B, T, K] float32, in the order of the records, then 0; and rest [B, T]
            float32, what ``k`` cut off of each position's mass.  Of a single sequence without B.

        Raises:
            ValueError: k is below 1.
        """
        if k is not None and k < 1:
            raise ValueError(f"padded targets need k >= 1, got {k}")
        shape = self.input_ids.shape
        ids, probs, rest = _padded(self.targets, k)
        return ids.reshape(*shape, -1), probs.reshape(*shape, -1), rest.reshape(shape)

    def row(self, row: int, length: int | None = None) -> Batch:
        """
        One sequence of a batch, without the dimension B; shares the batch's memory, and its state.

        Args:
            row: Which.
            length: Its positions, those of padding left out; None: all.
        """
        rows, positions = self.input_ids.shape
        end = positions if length is None else length
        targets = self.targets
        if rows > 1 or end < positions:
            offsets = targets.offsets[row * positions : row * positions + end + 1]
            first, last = int(offsets[0]), int(offsets[-1])
            targets = dataclasses.replace(
                targets,
                token_ids=targets.token_ids[first:last],
                probs=targets.probs[first:last],
                offsets=offsets - first,
            )
        at = row if end == positions else (row, slice(end))
        return Batch(
            self.input_ids[at],
            self.labels[at],
            targets,
            self.state,
            None if self.position_ids is None else self.position_ids[at],
            None if self.document_starts is None else self.document_starts[at],
            None if self.label_logprob is None else self.label_logprob[at],
        )

    def _each(self, copy: Callable[[Tensor], Tensor], targets: Targets) -> Batch:
        return Batch(
            copy(self.input_ids),
            copy(self.labels),
            targets,
            self.state,
            None if self.position_ids is None else copy(self.position_ids),
            None if self.document_starts is None else copy(self.document_starts),
            None if self.label_logprob is None else copy(self.label_logprob),
        )


def _padded(targets: Targets, k: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """The padded ids and probs [P, K], rest [P] of P positions."""
    counts = torch.diff(targets.offsets)
    most = max(int(counts.max()), 1)
    width = max(most, k or 1)
    # Record j of position p goes to p * width + j: as far from its place in the ragged list as the position's first.
    shift = torch.arange(counts.numel(), device=counts.device) * width - targets.offsets[:-1]
    nnz = targets.token_ids.numel()
    places = torch.arange(nnz, device=counts.device) + torch.repeat_interleave(shift, counts, output_size=nnz)
    ids = torch.zeros((counts.numel(), width), dtype=torch.int32, device=counts.device)
    probs = torch.zeros((counts.numel(), width), dtype=torch.float32, device=counts.device)
    ids.view(-1)[places] = targets.token_ids.to(torch.int32)
    probs.view(-1)[places] = targets.probs.to(torch.float32)
    rest = torch.zeros(counts.numel(), dtype=torch.float32, device=counts.device)
    if k is None or k >= most:
        return ids, probs, rest
    fuller = torch.nonzero(counts > k).squeeze(1)
    order = torch.sort(probs[fuller], dim=1, descending=True, stable=True).indices
    kept = torch.sort(order[:, :k], dim=1).values
    rest[fuller] = probs[fuller].gather(1, order[:, k:]).sum(1)
    heaviest_ids, heaviest = ids[fuller].gather(1, kept), probs[fuller].gather(1, kept)
    ids, probs = ids[:, :k].contiguous(), probs[:, :k].contiguous()
    ids[fuller], probs[fuller] = heaviest_ids, heaviest
    return ids, probs, rest


@overload
def collate(sequences: Sequence[Batch], form: Literal["batch"] = "batch", *, k: None = None) -> Batch: ...


@overload
def collate(sequences: Sequence[Batch], form: Literal["dict"], *, k: int | None = None) -> dict[str, Tensor]: ...


def collate(
    sequences: Sequence[Batch], form: Literal["batch", "dict"] = "batch", *, k: int | None = None
) -> Batch | dict[str, Tensor]:
    """
    One batch of single sequences: those of ``SparseLogitSequences``, or of ``SparseLogitDataset(batch_size=None)``.

    For trainers that batch by themselves: ``DataLoader(ds, batch_size=8, collate_fn=collate)``.  Shorter sequences are
    padded on the right with input 0, label -100 and no records; their positions count on.

    Args:
        sequences: At least one; input_ids and labels [T], each with a T of its own.
        form: "dict": tensors alone, for trainers that move batches, cut them and put them together:
            ``collate_fn=functools.partial(collate, form="dict", k=32)``.
        k: K of a dict, as for ``Batch.padded``.  Give one where dicts are put together, since all must have the same.

    Returns:
        A batch of B = len(sequences) rows with the state of the last.  In one of several worker processes the state is
        empty, and ``load_state_dict`` refuses it: each of them batches its own share of the stream there, so that no
        single place says what was seen.  ``DataLoader(ds, batch_size=None)`` gives single sequences in the stream's
        order for any number of workers; collated after that, their states stay exact.

        Or a dict of input_ids and labels [B, T], target_ids and target_probs [B, T, K], target_rest [B, T], which are
        ``padded``'s, and, where the cache has them, position_ids and document_starts [B, T]; it has no state.

    Raises:
        ValueError: No sequence, or batches among them; some say where documents begin and others do not; or a form
            that there is not, or k without a dict.
    """
    if form not in ("batch", "dict") or (form == "batch" and k is not None):
        raise ValueError(f"collate makes form 'batch', or 'dict' with a k or without, got form {form!r} and k {k}")
    batch = _together(sequences)
    return batch if form == "batch" else _as_dict(batch, k)


def _as_dict(batch: Batch, k: int | None) -> dict[str, Tensor]:
    ids, probs, rest = batch.padded(k)
    out = {
        "input_ids": batch.input_ids,
        "labels": batch.labels,
        "target_ids": ids,
        "target_probs": probs,
        "target_rest": rest,
    }
    if batch.position_ids is not None and batch.document_starts is not None:
        out |= {"position_ids": batch.position_ids, "document_starts": batch.document_starts}
    return out


def _together(sequences: Sequence[Batch]) -> Batch:
    if not sequences or any(sequence.input_ids.ndim != 1 for sequence in sequences):
        shapes = [tuple(sequence.input_ids.shape) for sequence in sequences]
        raise ValueError(f"collate takes single sequences, at least one, of input_ids [T]; got the shapes {shapes}")
    with_starts = {sequence.document_starts is not None for sequence in sequences}
    if len(with_starts) > 1:
        raise ValueError("some of these sequences have document_starts and others not; collate those of one cache")
    rows, width = len(sequences), max(sequence.input_ids.numel() for sequence in sequences)
    input_ids = torch.zeros((rows, width), dtype=torch.int64)
    labels = torch.full((rows, width), IGNORED_LABEL, dtype=torch.int64)
    counts = torch.zeros((rows, width), dtype=torch.int64)
    starts = torch.zeros((rows, width), dtype=torch.bool)
    positions = torch.arange(width).repeat(rows, 1)
    for row, sequence in enumerate(sequences):
        length = sequence.input_ids.numel()
        input_ids[row, :length], labels[row, :length] = sequence.input_ids, sequence.labels
        counts[row, :length] = torch.diff(sequence.targets.offsets)
        if sequence.position_ids is not None and sequence.document_starts is not None:
            starts[row, :length] = sequence.document_starts
            positions[row] += int(sequence.position_ids[-1]) + 1 - length  # of the padding
            positions[row, :length] = sequence.position_ids
    offsets = torch.zeros(rows * width + 1, dtype=torch.int64)
    torch.cumsum(counts.flatten(), 0, out=offsets[1:])
    targets = Targets(
        token_ids=torch.cat([sequence.targets.token_ids for sequence in sequences]),
        probs=torch.cat([sequence.targets.probs for sequence in sequences]),
        offsets=offsets,
    )
    info = get_worker_info()
    state = sequences[-1].state if info is None or info.num_workers == 1 else {}
    return Batch(input_ids, labels, targets, state, *((positions, starts) if True in with_starts else ()))
