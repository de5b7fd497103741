"""
The batches of caches for training, as one stream over all ranks and workers that resumes anywhere.

Knows no model and no loss; the order is ``format.order``'s, each batch ``sources``'.  SPEC.md section 12.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from sklformat.cache.tokens import TokenSource
from sklformat.distill.loader.batches import Batch
from sklformat.distill.loader.launchers import check_division, check_epoch, check_ranks, find_prepared, find_rank
from sklformat.distill.loader.prefetch import made_ahead
from sklformat.distill.loader.sources import Source, Sources
from sklformat.errors import ResumeError
from sklformat.format.mixture import VERSION as MIXTURE_VERSION
from sklformat.format.mixture import Mixture
from sklformat.format.order import Schedule

STATE_VERSION = 2
_MAX_WORKERS = 128
_OF_MIXTURES = {"mixture", "shares"}  # what states of several caches have beside the rest


class SparseLogitDataset(IterableDataset[Batch]):
    """
    The batches of one epoch; use as ``DataLoader(ds, batch_size=None, num_workers=k)`` or iterate it.

    The stream is a pure function of (caches, weights, seed, epoch): the same for any number of workers, and for any
    world size that makes the same global batch.  Each block's checksum is verified when it is first touched, each
    sequence's alignment checksum against the tokens that are handed out, so that records of other tokens stop training
    before the first step.

    Protocol of use: ``ds.set_epoch(e)`` before each epoch (as for torch's DistributedSampler; without it every
    iteration repeats the same epoch).  To resume, ``ds.load_state_dict(batch.state)`` of the last batch trained on: the
    next iteration resumes right after it, later ones begin at the start of their epoch again.  The state counts
    batches that were handed out, so that none that were made ahead are lost; a ``DataLoader`` must hand them out in
    order for that, as it does unless told otherwise (``in_order``).

    Several caches make one stream: ``SparseLogitDataset([a, b], weights=[0.7, 0.3])``.  Its places are shared out by
    the weights, evenly along the stream, so that the rows of a batch come from all of them.  An epoch is as long as all
    caches together; each has an order of its own, which the next epoch continues where this one stopped, and begins
    again, reshuffled, when all of its sequences were had.  So a cache of little weight is seen to its end before
    anything of it comes again, and one of much weight comes again within an epoch.

    Args:
        path: A cache directory, one shard, or the URL of either; or a cache that ``skl.open`` opened with settings of
            its own, such as how its files are read; or ``Teachers`` of the same sequences.  A list of these: several.
        batch_size: Sequences per batch, on each rank; None: single sequences, for trainers that make the batches
            themselves, with ``collate``.
        seed: Seed of the order.
        shuffle: False: the order of the cache.
        rank, world_size: None: torch.distributed's, where it is initialised, else 0 of 1.
        tokens: The training program's own tokens, each seq_len + 1 ids by the global sequence number, from anything
            that ``cache.tokens.Tokens`` takes; they are compared with the cache and handed out.  None: the tokens
            stored in the cache.  Of several caches a list, with None for those whose stored ones are meant.
        tail: What becomes of the last sequences that fill no global batch: "drop", "pad" (label -100, no records) or
            "wrap".
        window: None: shuffle all sequences; else shuffle the order of blocks of this many consecutive sequences, and
            the sequences inside each block: reads then stay together, which disks and networks need.  A window of
            several global batches mixes well enough.  Of several caches each has windows of its own.
        weights: Of several caches: how much of the stream is of each, > 0; only their ratios count, rounded to whole
            sequences of an epoch.  None: their numbers of sequences, so that an epoch has each sequence once.
        sequences: The part of the cache that this dataset sees, as in ``cache[i]``; None: all.  It reaches nothing
            else, so that a held-out part is safe: ``range(0, n - 500)`` to train on, ``range(n - 500, n)`` to measure.
            Of several caches a list.
        prefetch: Batches made ahead by as many threads (four at most) where it is iterated without worker processes;
            0: none.
        decode: Where records become ids and probabilities.  "cpu": where the batch is made.  "cuda": on the GPU that
            ``batch.to`` names, of records of kind counts; the host checks all but the records, and ``batch.check()``
            before ``optimizer.step()`` raises what the GPU found, else the ``to`` of the next batch, if there is one.
        label_logprob: Whether batches carry the column of that name, for ``easy_hard_weights``; the host reads their
            sequences once more for it.  Not with ``decode="cuda"``, ``Teachers`` or single sequences.

    Raises:
        ValueError: The cache stores no tokens and none are given, or the arguments contradict each other; by the
            iteration: something else divides the stream again, or nothing does among several processes.
        SettingsError: Caches that do not go together: tokenizers, isolation of documents or kinds of samplers differ.
        FormatError, FileNotFoundError: As ``skl.open``; damage met later is raised by the iteration.
        AlignmentError: By the iteration: the records are not about these tokens.
    """

    def __init__(
        self,
        path: Source | Sequence[Source],
        batch_size: int | None = 8,
        seed: int = 0,
        shuffle: bool = True,
        rank: int | None = None,
        world_size: int | None = None,
        tokens: TokenSource | Sequence[TokenSource | None] | None = None,
        tail: Literal["drop", "pad", "wrap"] = "drop",
        *,
        weights: Sequence[float] | None = None,
        window: int | None = None,
        sequences: range | Sequence[range | None] | None = None,
        prefetch: int = 2,
        decode: Literal["cpu", "cuda"] = "cpu",
        label_logprob: bool = False,
    ) -> None:
        if (rank is None) != (world_size is None):
            raise ValueError(f"give both rank and world_size or neither, got rank {rank}, world_size {world_size}")
        self._found_rank = rank is None
        if rank is None or world_size is None:
            rank, world_size = find_rank()
        if prefetch < 0:
            raise ValueError(f"prefetch must be >= 0, got {prefetch}")
        _check_decode(decode, batch_size)
        self._sources = Sources.of(path, tokens, sequences)
        if decode == "cuda":
            self._sources.pack()
        if label_logprob and batch_size is None:
            raise ValueError("label_logprob is of batches; read the columns of single sequences with skl.open")
        if label_logprob:
            self.give_label_logprob()
        self.caches, sizes, spans = self._sources.caches, self._sources.sizes, self._sources.spans
        self.cache, self.sequences = self.caches[0], spans[0] if len(spans) == 1 else spans
        mixture = Mixture.of(sizes, weights) if len(sizes) > 1 or weights is not None else None
        self.schedule = Schedule(
            num_sequences=sum(sizes),
            batch_size=1 if batch_size is None else batch_size,
            rank=rank,
            world_size=world_size,
            seed=seed,
            shuffle=shuffle,
            window=window,
            tail=tail,
            mixture=mixture if len(sizes) > 1 else None,
        )
        self.prefetch = prefetch
        self._single = batch_size is None
        # In shared memory, so that set_epoch and load_state_dict reach persistent workers too: epoch, consumed and
        # version; then, for this process and for each (num_workers, worker), the version whose consumed it has used.
        self._shared: Tensor = torch.zeros(4 + _MAX_WORKERS * (_MAX_WORKERS + 1) // 2, dtype=torch.int64)
        self._shared.share_memory_()  # type: ignore[no-untyped-call]
        self._position = (0, 0)
        self._own_start: tuple[int, int] | None = None

    @property
    def have_label_logprob(self) -> bool:
        """Whether every cache has the column, of the teacher of its records."""
        return self._sources.have_label_logprob

    def give_label_logprob(self) -> None:
        """From now on as with ``label_logprob=True``."""
        self._sources.give_label_logprob()

    @property
    def isolated(self) -> bool:
        """
        Whether documents did not see each other when the teacher ran: then they must not in training either.

        Give the model ``batch.position_ids`` then, and no attention mask: transformers keeps attention within each
        document where its positions begin at 0 again.
        """
        return self._sources.isolated

    def __len__(self) -> int:
        """Batches of one epoch on this rank; the same on all ranks."""
        return self.schedule.num_batches(0)

    def set_epoch(self, epoch: int) -> None:
        """
        Name the epoch of the next iteration.

        It begins at the start, except that after ``load_state_dict`` its own epoch resumes where the state stands.
        """
        if epoch < 0:
            raise ValueError(f"epoch must be >= 0, got {epoch}")
        loader = self._check_launcher()
        if loader is not None and self._waits():
            check_epoch(self._sources.where, loader, epoch, int(self._shared[0]))
        if epoch != int(self._shared[0]):
            self._go_to(epoch, 0)

    def state_dict(self) -> dict[str, Any]:
        """
        Where the stream stands, when it is iterated in this process; with workers take ``batch.state``.

        Where something reads ahead of you, as loaders do that accelerate prepared, take ``batch.state`` too.

        In a worker process it is that worker's share of the stream, as torchdata's ``StatefulDataLoader`` keeps it.
        """
        return self._state(*self._position)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """
        Resume right after the batch that carried this state, on any number of workers and ranks.

        Raises:
            ResumeError: The state belongs to another cache, seed or order; says which values differ.
        """
        ours = self._state(0, 0)
        if set(state) - _OF_MIXTURES != set(ours) - _OF_MIXTURES:
            raise ResumeError(f"a loader state has the fields {sorted(ours)}, got {sorted(state)}")
        differing = [
            f"{name}: {state.get(name)!r} in the state, {ours.get(name)!r} here"
            for name in dict.fromkeys([*ours, *state])
            if name not in ("epoch", "consumed") and state.get(name) != ours.get(name)
        ]
        if differing:
            raise ResumeError(
                f"{self._sources.where}: the state belongs to another stream ({'; '.join(differing)}); "
                "open the cache and settings it was made with, or start over"
            )
        epoch, consumed = state["epoch"], state["consumed"]
        info = get_worker_info()
        end = self.schedule.num_sequences + (0 if info is None else info.num_workers * self.schedule.global_batch)
        if not (type(epoch) is int and type(consumed) is int and epoch >= 0 and 0 <= consumed <= end):
            raise ResumeError(f"epoch {epoch!r} and consumed {consumed!r} are no place in {end} sequences")
        if info is None:
            self._go_to(epoch, consumed)
        else:  # of this worker alone, so the others must not see it
            self._own_start = self._position = (epoch, consumed)

    def _check_launcher(self) -> Any | None:
        """The loader that accelerate prepared, where one iterates this dataset, once it is sure who divides it."""
        rank, world_size = self.schedule.rank, self.schedule.world_size
        loader = find_prepared(self)
        if loader is not None:
            check_division(self._sources.where, loader, rank, world_size)
        elif self._found_rank:
            check_ranks(self._sources.where, rank, world_size)
        return loader

    def _waits(self) -> bool:
        """Whether no iteration has used yet what ``set_epoch`` or ``load_state_dict`` set."""
        return not bool((self._shared[3:] == self._shared[2]).any())

    def _go_to(self, epoch: int, consumed: int) -> None:
        if self.schedule.num_batches(consumed) == 0:
            epoch, consumed = epoch + 1, 0
        self._shared[0], self._shared[1] = epoch, consumed
        self._shared[2] += 1
        self._position = (epoch, consumed)

    def _state(self, epoch: int, consumed: int) -> dict[str, Any]:
        identities, spans = self._sources.identities, [[span.start, span.stop] for span in self._sources.spans]
        mixture = self.schedule.mixture
        several = {} if mixture is None else {"mixture": MIXTURE_VERSION, "shares": list(mixture.shares)}
        return several | {
            "version": STATE_VERSION,
            "fingerprint": identities if several else identities[0],
            "sequences": spans if several else spans[0],
            "order": self.schedule.algorithm,
            "window": self.schedule.window,
            "seed": self.schedule.seed,
            "tail": self.schedule.tail,
            "epoch": epoch,
            "consumed": consumed,
        }

    def _begin(self, worker: int, num_workers: int) -> tuple[int, int]:
        """Where this iteration starts: a loaded position counts once, for each number of workers on its own."""
        if num_workers > _MAX_WORKERS:
            raise ValueError(f"at most {_MAX_WORKERS} workers, got {num_workers}")
        if self._own_start is not None:
            own, self._own_start = self._own_start, None
            return own
        place = 4 + num_workers * (num_workers - 1) // 2 + worker if num_workers else 3
        epoch, consumed, version = (int(value) for value in self._shared[:3])
        if int(self._shared[place]) == version:
            consumed = 0
        self._shared[place] = version
        return epoch, consumed

    def __iter__(self) -> Iterator[Batch]:
        self._check_launcher()
        info = get_worker_info()
        worker, num_workers = (0, 0) if info is None else (info.id, info.num_workers)
        epoch, start = self._begin(worker, num_workers)
        if num_workers == 0:
            steps = self.schedule.batches(epoch, start)
            for batch in made_ahead(steps, lambda step: self._batch(epoch, *step), self.prefetch):
                self._position = (batch.state["epoch"], batch.state["consumed"])
                yield batch
            return
        self._position = (epoch, start)
        for places, consumed in self.schedule.batches(epoch, start, worker, num_workers):
            batch = self._batch(epoch, places, consumed)
            # From here on, this worker's next step would be its first: one of every num_workers, the worker-th of them.
            self._position = (epoch, consumed + (num_workers - worker) * self.schedule.global_batch)
            yield batch

    def _batch(self, epoch: int, places: NDArray[np.int64], consumed: int) -> Batch:
        batch = self._sources.batch(places, self._state(*self.schedule.after(epoch, consumed)))
        return batch.row(0) if self._single else batch


def _check_decode(decode: str, batch_size: int | None) -> None:
    if decode not in ("cpu", "cuda"):
        raise ValueError(f"decode must be 'cpu' or 'cuda', got {decode!r}")
    if decode == "cuda" and batch_size is None:
        raise ValueError('decode="cuda" makes batches, not the single sequences of batch_size=None')
    if decode == "cuda" and not torch.cuda.is_available():
        raise ValueError('decode="cuda" needs a GPU, and torch sees none here; use decode="cpu"')
