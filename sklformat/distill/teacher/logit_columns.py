"""
The optional columns of a cache from a teacher's logits, slice after slice, on the device that has them.

Log-probs and entropies are float32 sums and differences, rounded once to float16.
Shape letters: P positions of one slice, V vocabulary, T positions of the sequence.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sklformat.format.columns import ENTROPY, LABEL_LOGPROB, RECORD_LOGPROB

_LEAST = -65504.0  # of float16: of labels whose probability is 0


class LogitColumns:
    """
    Those of one sequence; its slices may come from several threads.

    Args:
        names: Of the header; those that need no logits are passed over.
        tokens: [T + 1] uint32 of the sequence.
    """

    def __init__(self, names: tuple[str, ...], tokens: NDArray[np.uint32]) -> None:
        self._names = tuple(name for name in names if name in (LABEL_LOGPROB, ENTROPY, RECORD_LOGPROB))
        self._labels = tokens[1:].astype(np.int64)
        self._parts: dict[int, tuple[NDArray[np.int64], list[Tensor]]] = {}
        self._copied: torch.cuda.Event | None = None

    @torch.inference_mode()
    def add(self, places: NDArray[np.int64], logits_PV: Tensor, rows: Tensor | None, ids: Tensor) -> None:
        """
        Take what is wanted of a slice; nothing waits for the device.

        Args:
            places: [P] ascending positions of the rows; those that no slice has get 0 and no record.
            logits_PV: Any float type.
            rows: int64 [n], for each id its row of the slice; None: ids are [P, N], N of each row.
            ids: int64 [n] or [P, N], of the records or draws.
        """
        if not self._names:
            return
        x_PV = logits_PV.float()
        total_P1 = x_PV.logsumexp(-1, keepdim=True)
        made = []
        if LABEL_LOGPROB in self._names:
            labels_P = torch.from_numpy(self._labels[places])
            if x_PV.device.type == "cuda":
                labels_P = labels_P.pin_memory().to(x_PV.device, non_blocking=True)
            made.append((x_PV.gather(1, labels_P[:, None]) - total_P1)[:, 0].clamp(_LEAST, 0.0))
        if ENTROPY in self._names:
            made.append(torch.special.entr((x_PV - total_P1).exp_()).sum(-1))
        if RECORD_LOGPROB in self._names:
            found = x_PV.gather(1, ids) - total_P1 if rows is None else x_PV[rows, ids] - total_P1[rows, 0]
            made.append(found.clamp(_LEAST, 0.0))
        self._parts[int(places[0]) if places.size else 0] = places, [values.half() for values in made]

    @torch.inference_mode()
    def fetch(self) -> None:
        """Begin to copy what was taken to the host, behind what its device has to do now."""
        for first, (places, parts) in self._parts.items():
            if parts[0].device.type == "cuda":
                copies = [
                    torch.empty_like(part, device="cpu", pin_memory=True).copy_(part, non_blocking=True)
                    for part in parts
                ]
                self._parts[first] = places, copies
                self._copied = torch.cuda.current_stream(parts[0].device).record_event()

    def values(self) -> dict[str, NDArray[np.float16]]:
        """The columns: label_logprob and entropy [T], record_logprob [nnz] or [P, N], as its ids were given."""
        if self._copied is not None:
            self._copied.synchronize()
        slices = [self._parts[first] for first in sorted(self._parts)]
        columns = {}
        for number, name in enumerate(self._names):
            taken = [parts[number].numpy() for _, parts in slices]
            if name == RECORD_LOGPROB:
                columns[name] = np.concatenate(taken) if taken else np.empty(0, np.float16)
                continue
            columns[name] = np.zeros(self._labels.size, np.float16)
            for (places, _), values in zip(slices, taken, strict=True):
                columns[name][places] = values
        return columns
