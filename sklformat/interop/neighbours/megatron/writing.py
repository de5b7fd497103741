"""A directory of tars in Megatron's newest layout, and the tokens beside them."""

from __future__ import annotations

import hashlib
import json
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from sklformat.files import zstd
from sklformat.files.directories import published
from sklformat.format.columns import STARTS
from sklformat.interop.columns import Row
from sklformat.interop.neighbours.megatron.batches import FILLER_ID, FILLER_LOGPROB, check_vocab
from sklformat.interop.neighbours.megatron.members import TarWriter
from sklformat.interop.neighbours.megatron.tars import META
from sklformat.interop.tables.exports import Evener, Export, Exporter
from sklformat.interop.tables.pickles import pack_torch

_SAMPLES_PER_TAR = 256
_TOKENS = "tokens.npy"


def open_export(path: Path, kind: str, export: Export) -> Exporter:  # noqa: ARG001  of all kinds
    """
    As ``kinds.open_export``: a directory in the newest layout, and the tokens beside.

    Raises:
        ValueError: Sequences of several lengths, or a vocabulary that is too large for 17 bits.
    """
    check_vocab(path, export.header.vocab_size)
    if not export.header.seq_len:
        raise ValueError(f"{path}: Megatron's sequences are all of one length, these are not; pack them, or leave it")
    return _Directory(path, export)


class _Directory:
    """Writes tars of whole sequences, each a micro-batch of its own, so that any batch size can be made of them."""

    def __init__(self, path: Path, export: Export) -> None:
        self._path, self._export, self._evener = path, export, Evener(export, FILLER_LOGPROB)
        self._has_documents = STARTS in export.header.columns
        identifiers = {"seed": None, "train_samples": export.count, "blend": {"kind": "sklformat", "name": path.name}}
        compact = json.dumps(identifiers, separators=(",", ":")).encode()
        saver = {"k": export.k, "p": None, "min_k": 1, "save_dtype": "fp32", "format_version": 2}
        saver |= {"mbs_save": 1, "dp_size_save": 1, "gbs_save": 1}
        digest = hashlib.md5(compact, usedforsecurity=False).hexdigest()
        meta = {"hash": digest, "identifiers": identifiers, "saver": saver}
        self._meta = json.dumps(meta, separators=(",", ":")).encode()
        self._stack, self._number = ExitStack(), 0
        self._tar: TarWriter | None = None

    @property
    def says(self) -> list[str]:
        length = self._export.header.seq_len
        return [
            f"row t describes token t + 1: for --seq-length {length}, samples in this order; {_TOKENS} has the tokens",
            "load them with --logits-load-ignore-hash: the hash of your data set is not known here",
            *self._evener.says(),
        ]

    def append(self, row: Row) -> None:
        """As ``Exporter``."""
        first = self._number
        if first % _SAMPLES_PER_TAR == 0:
            self._close_tar()
            end = min(first + _SAMPLES_PER_TAR, self._export.count)
            self._tar = TarWriter(self._directory / f"dp0__{first}-{end}.tar")
            self._tar.add(META, self._meta)
        assert self._tar is not None
        evened = self._evener.even(row)
        ids = np.where(evened.real, evened.token_ids, FILLER_ID)[:, None]
        payload = {
            "values": evened.logprobs.astype(np.float32)[:, None],
            "indices_low": (ids & 0xFFFF).astype(np.uint16),
            "bit_17": np.packbits(ids >> 16),
            "format_version": 2,
            "cu_seqlens_padded": self._bounds(row),
        }
        self._tar.add(f"{first}-{first + 1}.pt.zst", zstd.pack(pack_torch(payload)))
        self._tokens.write(row.input_ids.astype("<i4").tobytes())
        self._number += 1

    def _bounds(self, row: Row) -> NDArray[np.int32] | None:
        if not self._has_documents:
            return None
        rows = row.input_ids.size - 1
        starts = np.flatnonzero(row.columns[STARTS][:rows])
        return np.unique([0, *starts, rows]).astype(np.int32)[None]

    def _close_tar(self) -> None:
        if self._tar is not None:
            self._tar.close()

    def __enter__(self) -> _Directory:
        self._directory = self._stack.enter_context(published(self._path))
        self._tokens = self._stack.enter_context((self._directory / _TOKENS).open("wb"))
        self._stack.callback(self._close_tar)
        shape = (self._export.count, self._export.header.seq_len + 1)
        head = {"descr": "<i4", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(self._tokens, head)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)
