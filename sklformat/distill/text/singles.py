"""
Sequences of one document each, as chats are learnt from: every one has a length of its own.

Knows no model and no torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from sklformat.cache.tokens import TokenSource
from sklformat.distill.text.corpus import TokenStore, is_token_store, open_ninja
from sklformat.distill.text.packing import PackedSequences, Sequences, paste
from sklformat.errors import SettingsError, UnsupportedError
from sklformat.format.header import Header
from sklformat.format.order import permute
from sklformat.settings.text import Packing, Truncate

_BUCKET = 4096  # documents that follow each other in the shuffled order and are brought near others of their length
_RUN = 64  # of like length, that stay together


class SingleSequences(Sequences):
    """
    One document is one sequence, between its marks; a longer one than ``seq_len + 1`` tokens is truncated.

    Documents stand in shuffled order; of each ``_BUCKET`` that follow each other, those of like length form runs of
    ``_RUN``, which are shuffled: batches of sequences that follow each other are little padded, and any first part has
    documents of all lengths. A sequence of one token is left out, and one of whose answers truncation leaves nothing.

    Args:
        truncate: What a document that is too long loses: its "end", or its "start" but for BOS, without which many
            models predict badly.
        bos_id: The token that is BOS if a document brings one, where the store puts none; None: there is no such token.
        Others, and Raises: As ``Sequences``.

    Attributes:
        num_truncated: Documents that are too long.
        num_lost: Of these, those that lose all of their answers and are left out.
    """

    is_ragged = True
    PICKLED: ClassVar = (*Sequences.PICKLED, "truncate", "bos_id")

    def __init__(
        self, store_path: Path | str, *, truncate: Truncate = "end", bos_id: int | None = None, **settings: Any
    ) -> None:
        self.truncate, self.bos_id = truncate, bos_id
        super().__init__(store_path, **settings)

    def __getitem__(self, index: int) -> NDArray[np.uint32]:
        document, begin = self._place(index)
        sequence = np.empty(int(self._positions[document]) + 1, np.uint32)
        tokens = self._opened()[document]
        paste(sequence, begin, tokens)
        if self._before:
            paste(sequence, begin - 1, [self._bos_id])
        if self._after:
            paste(sequence, begin + tokens.size, [self.separator_id])
        if begin < self._before and (self._before or tokens[0] == self.bos_id):
            sequence[0] = self._bos_id if self._before else tokens[0]
        return sequence

    def document_starts(self, index: int) -> NDArray[np.bool_]:
        document, begin = self._place(index)
        starts = np.zeros(int(self._positions[document]) + 1, np.bool_)
        paste(starts, begin - self._before, [True])
        if self._before or self._opened()[document][0] == self.bos_id:
            starts[0] = True
        return starts

    def counted(self, index: int, starts: NDArray[np.bool_] | None = None) -> NDArray[np.bool_] | None:
        del starts
        if not self.facts.marks_answers:
            return None
        return self._answers(self._opened(), self._place(index)[0])[1:]

    def width(self, begin: int, end: int) -> int:
        self._opened()
        return int(self._positions[self._order[self.first + begin : self.first + end]].max())

    def _num_all_positions(self) -> int:
        return int(self._positions[self._order[self.first : self.first + len(self)]].sum())

    def _place(self, index: int) -> tuple[int, int]:
        """The document of a sequence, and where in the sequence its first own token stands."""
        number = self._number(index)
        document = int(self._order[number])
        return document, self._begin(self._opened(), document)

    def _begin(self, store: TokenStore, document: int) -> int:
        whole = int(store.lengths[document]) + self._before + self._after
        return self._before - (whole - int(self._positions[document]) - 1) * (self.truncate == "start")

    def _answers(self, store: TokenStore, document: int) -> NDArray[np.bool_]:
        answers = np.zeros(int(self._positions[document]) + 1, np.bool_)
        paste(answers, self._begin(store, document), store.answers(document))
        return answers

    def _arrange(self, store: TokenStore) -> None:
        if store.facts.bos == "window":
            raise ValueError(
                f"{store.directory}: bos window begins packed sequences; where each document is one, make the tokens "
                "with --bos document"
            )
        self._after = int(not store.facts.marks_answers)  # no BOS follows that could stand for the separator
        whole = store.lengths + self._before + self._after - 1
        self._positions = np.minimum(whole, self.seq_len)
        is_kept = whole >= 1
        too_long = np.flatnonzero(whole > self.seq_len)
        self.num_truncated = len(too_long)
        if store.facts.marks_answers:
            is_kept[too_long] = [bool(self._answers(store, int(document))[1:].any()) for document in too_long]
        self.num_lost = self.num_truncated - int(np.count_nonzero(is_kept[too_long]))
        order = permute(np.arange(len(store), dtype=np.int64), len(store), seed=self.seed)
        self._order = _grouped(order[is_kept[order]], self._positions, self.seed)

    def _num_available(self) -> int:
        return len(self._order)

    def _too_short(self, wanted: int) -> str:
        return (
            f"the text is too short: {wanted} sequences of one document each are asked for, it gives "
            f"{len(self._order)} of {len(self._positions)} documents; give more text, or fewer num_sequences"
        )


def open_sequences(
    store_path: Path | str, *, packing: Packing, truncate: Truncate = "end", bos_id: int | None = None, **settings: Any
) -> Sequences:
    """
    The sequences of a store.

    Args:
        store_path: The store.
        packing: "packed", "single", or "auto": single where answers are marked.
        truncate: As ``SingleSequences``.
        bos_id: As ``SingleSequences``.
        settings: Arguments of ``Sequences``.
    """
    if packing == "auto":
        packing = "single" if TokenStore(store_path).facts.marks_answers else "packed"
    if packing == "single":
        return SingleSequences(store_path, truncate=truncate, bos_id=bos_id, **settings)
    return PackedSequences(store_path, **settings)


def packed_as(path: Path, header: Header) -> TokenSource | None:
    """
    The sequences of a directory of tokens, packed as a cache's header says where they are not packed yet.

    Args:
        path: An mmap-ninja store of sequences, or a token store.
        header: Of the cache.

    Returns:
        None where the directory is neither.

    Raises:
        SettingsError: A token store whose BOS stands elsewhere than the cache's.
        UnsupportedError: A token store, and the cache does not say how it was packed.
    """
    store: TokenSource | None = open_ninja(path)
    if store is not None or not is_token_store(path):
        return store
    packed = header.capture.get("packing")
    is_single = isinstance(packed, dict) and "single" in packed
    if not isinstance(packed, dict) or "separator_id" not in packed or not (header.seq_len or is_single):
        raise UnsupportedError(
            "the cache does not say how its tokens were packed (sklformat cache writes that); give the packed "
            "sequences as a .npy array or an mmap-ninja store",
            path=path,
        )
    way: dict[str, Any] = {"packing": "packed", "seq_len": header.seq_len}
    if is_single:
        way = {"packing": "single", **packed["single"]}
    sequences = open_sequences(
        path,
        **way,
        separator_id=packed["separator_id"],
        seed=header.packing_seed,
        first=packed.get("first_sequence", 0),
    )
    there, captured = sequences.facts.bos, packed.get("bos", {"at": "none"})["at"]
    if there != captured:
        raise SettingsError(
            f"{path}: its tokens go with --bos {there}, the cache was captured with --bos {captured}; give the "
            "tokens that it was captured on"
        )
    return sequences


def _grouped(order: NDArray[np.int64], lengths: NDArray[np.int64], seed: int) -> NDArray[np.int64]:
    """The same documents, those of like length beside each other as ``SingleSequences`` says."""
    parts = []
    for number, start in enumerate(range(0, len(order), _BUCKET)):
        bucket = order[start : start + _BUCKET]
        bucket = bucket[np.argsort(lengths[bucket], kind="stable")]
        runs = [bucket[first : first + _RUN] for first in range(0, len(bucket), _RUN)]
        parts += [runs[i] for i in permute(np.arange(len(runs)), len(runs), seed=seed, epoch=number + 1)]
    return np.concatenate(parts) if parts else order
