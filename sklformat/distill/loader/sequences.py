"""
A cache as torch's map-style dataset, for trainers that shuffle, divide and batch by themselves.

Shape letters: T positions.
"""

from __future__ import annotations

import operator
from typing import SupportsIndex

import numpy as np
from torch.utils.data import Dataset

from sklformat.cache.tokens import TokenSource
from sklformat.distill.loader.batches import Batch
from sklformat.distill.loader.sources import Source, Sources


class SparseLogitSequences(Dataset[Batch]):
    """
    The sequences of a cache by number, for samplers, ``Subset``, ``ConcatDataset`` and every trainer that shuffles and
    divides a dataset itself; ``DataLoader(ds, batch_size=8, shuffle=True, collate_fn=collate)`` makes batches.

    The checks are those of ``SparseLogitDataset``: each block's checksum when it is first touched, each sequence's
    alignment checksum every time.  The order is the sampler's, and so is the way to resume: ``state`` is empty here.

    Args:
        path: A cache directory, one shard, or the URL of either; or a cache that ``skl.open`` opened; or ``Teachers``
            of the same sequences.
        tokens: As for ``SparseLogitDataset``: the training program's own tokens by the global sequence number; None:
            those stored in the cache.
        sequences: The part of the cache that this dataset sees, as in ``cache[i]``; its first is number 0.  None: all.

    Raises:
        TypeError: Several caches; ``ConcatDataset`` puts them one after the other.
        ValueError: The cache stores no tokens and none are given, or the part is none of this cache.
        FormatError, FileNotFoundError: As ``skl.open``; damage met later is raised by ``ds[i]``.
        AlignmentError: By ``ds[i]``: the records are not about these tokens.
    """

    def __init__(self, path: Source, *, tokens: TokenSource | None = None, sequences: range | None = None) -> None:
        if isinstance(path, list | tuple):
            raise TypeError("SparseLogitSequences takes one cache; torch's ConcatDataset puts several together")
        self._sources = Sources([path], [tokens], [sequences])
        self.cache, self.sequences = self._sources.caches[0], self._sources.spans[0]

    @property
    def isolated(self) -> bool:
        """Whether documents did not see each other when the teacher ran; see ``SparseLogitDataset.isolated``."""
        return self._sources.isolated

    def __len__(self) -> int:
        return len(self.sequences)

    def __getitem__(self, i: SupportsIndex) -> Batch:
        """
        Sequence i, or from the end where i is negative: input_ids and labels [T], records of T positions.

        Raises:
            IndexError: There is no sequence i.
        """
        return self.__getitems__([i])[0]

    def __getitems__(self, indices: list[SupportsIndex]) -> list[Batch]:
        """Several sequences, decoded in one call; a ``DataLoader`` asks for the sequences of a batch in this way."""
        return self._sources.singles(np.array([self._place(i) for i in indices], np.int64))

    def _place(self, i: SupportsIndex) -> int:
        place, size = operator.index(i), len(self)
        if not -size <= place < size:
            raise IndexError(f"{self.cache.path}: no sequence {place} among the {size} of this dataset")
        return place % size
