"""
A cache as torch's map-style dataset, for trainers that shuffle, divide and batch by themselves.

Shape letters: T positions.
"""

from __future__ import annotations

import operator
from pathlib import Path
from typing import SupportsIndex

import numpy as np
from torch.utils.data import Dataset

from sklformat.cache.reader import Cache
from sklformat.cache.tokens import TokenSource
from sklformat.distill.loader.batches import Batch
from sklformat.distill.loader.contents import Contents


class SparseLogitSequences(Dataset[Batch]):
    """
    The sequences of a cache by number, for samplers, ``Subset``, ``ConcatDataset`` and every trainer that shuffles and
    divides a dataset itself; ``DataLoader(ds, batch_size=8, shuffle=True, collate_fn=collate)`` makes batches.

    The checks are those of ``SparseLogitDataset``: each block's checksum when it is first touched, each sequence's
    alignment checksum every time.  The order is the sampler's, and so is the way to resume: ``state`` is empty here.

    Args:
        path: A cache directory, one shard, or the URL of either; or a cache that ``skl.open`` opened.
        tokens: As for ``SparseLogitDataset``: the training program's own tokens by the global sequence number; None:
            those stored in the cache.
        sequences: The part of the cache that this dataset sees, as in ``cache[i]``; its first is number 0.  None: all.

    Raises:
        ValueError: The cache stores no tokens and none are given, or the part is none of this cache.
        FormatError, FileNotFoundError: As ``skl.open``; damage met later is raised by ``ds[i]``.
        AlignmentError: By ``ds[i]``: the records are not about these tokens.
    """

    def __init__(
        self, path: Path | str | Cache, *, tokens: TokenSource | None = None, sequences: range | None = None
    ) -> None:
        self._contents = Contents(path, tokens, sequences)
        self.cache, self.sequences = self._contents.cache, self._contents.sequences

    @property
    def isolated(self) -> bool:
        """Whether documents did not see each other when the teacher ran; see ``SparseLogitDataset.isolated``."""
        return self._contents.isolated

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
        return self._contents.singles(np.array([self._place(i) for i in indices], np.int64))

    def _place(self, i: SupportsIndex) -> int:
        place, size = operator.index(i), len(self)
        if not -size <= place < size:
            raise IndexError(f"{self.cache.path}: no sequence {place} among the {size} of this dataset")
        return place % size
