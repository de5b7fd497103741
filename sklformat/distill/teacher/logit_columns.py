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

from sklformat.distill.models.devices import to_device, to_host
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
        self.names = tuple(name for name in names if name in (LABEL_LOGPROB, ENTROPY, RECORD_LOGPROB))
        self._labels = tokens[1:].astype(np.int64)
        self._parts: dict[int, tuple[NDArray[np.int64], dict[str, Tensor]]] = {}
        self._copied: torch.cuda.Event | None = None

    @torch.inference_mode()
    def add(
        self,
        places: NDArray[np.int64],
        logits_PV: Tensor,
        rows: Tensor | None,
        ids: Tensor | None,
        log_sum_P: Tensor | None = None,
        entropy_P: Tensor | None = None,
    ) -> None:
        """
        Take what is wanted of a slice; nothing waits for the device.

        Args:
            places: [P] ascending positions of the rows; those that no slice has get 0 and no record.
            logits_PV: Any float type.
            rows: int64 [n], for each id its row of the slice; None: ids are [P, N], N of each row.
            ids: int64 [n] or integers [P, N], of the records or draws; of rows that no draw may come from, any numbers.
                None: record_logprob is not taken.
            log_sum_P: float32, log of the sum of exp(logit), where it is known.
            entropy_P: float32, where it is known.
        """
        if not self.names:
            return
        wanted = tuple(name for name in self.names if name != RECORD_LOGPROB or ids is not None)
        x_PV = logits_PV
        if log_sum_P is None or (ENTROPY in wanted and entropy_P is None):
            x_PV = logits_PV.float()
        total_P1 = x_PV.logsumexp(-1, keepdim=True) if log_sum_P is None else log_sum_P[:, None]
        made = {}
        if LABEL_LOGPROB in wanted:
            labels_P = self.labels(places, x_PV.device)
            made[LABEL_LOGPROB] = (x_PV.gather(1, labels_P[:, None]).float() - total_P1)[:, 0].clamp(_LEAST, 0.0)
        if RECORD_LOGPROB in wanted and ids is not None:
            if rows is None:
                found = x_PV.gather(1, ids.long().clamp(0, max(0, x_PV.shape[1] - 1))).float() - total_P1
            else:
                found = x_PV[rows, ids].float() - total_P1[rows, 0]
            made[RECORD_LOGPROB] = found.clamp(_LEAST, 0.0)
        if ENTROPY in wanted:
            if entropy_P is None:
                entropy_P = torch.special.entr((x_PV - total_P1).exp_()).sum(-1)
            made[ENTROPY] = entropy_P
        self._keep(places, made)

    @torch.inference_mode()
    def add_known(
        self,
        places: NDArray[np.int64],
        log_sum_P: Tensor,
        entropy_P: Tensor | None,
        label_P: Tensor | None,
        logits_PN: Tensor | None,
    ) -> None:
        """
        The same of rows that are not here.

        Args:
            places: As of ``add``.
            log_sum_P: As of ``add``.
            entropy_P: float32, where the column is wanted.
            label_P: float32, the logits of the labels, where their column is wanted.
            logits_PN: float32, of N draws of each row; None: record_logprob is not taken.
        """
        made = {}
        if LABEL_LOGPROB in self.names:
            assert label_P is not None
            made[LABEL_LOGPROB] = (label_P - log_sum_P).clamp(_LEAST, 0.0)
        if RECORD_LOGPROB in self.names and logits_PN is not None:
            made[RECORD_LOGPROB] = (logits_PN - log_sum_P[:, None]).clamp(_LEAST, 0.0)
        if ENTROPY in self.names:
            assert entropy_P is not None
            made[ENTROPY] = entropy_P
        self._keep(places, made)

    def labels(self, places: NDArray[np.int64], device: torch.device) -> Tensor:
        """int64 ids that follow these positions, on a device."""
        return to_device(torch.from_numpy(self._labels[places]), device)

    def _keep(self, places: NDArray[np.int64], made: dict[str, Tensor]) -> None:
        halves = {name: values.half() for name, values in made.items()}
        self._parts[int(places[0]) if places.size else 0] = places, halves

    def add_given(
        self, first: int, logits_PV: Tensor, offsets: NDArray[np.int64], token_ids: NDArray[np.uint32]
    ) -> None:
        """
        Take what is wanted of a slice at given ids.

        Args:
            first: Position of its first row.
            logits_PV: Any float type.
            offsets: [T + 1]; position p is asked about token_ids[offsets[p] : offsets[p + 1]], and counts where that
                is something.
            token_ids: [n], of all positions.
        """
        end, device = first + len(logits_PV), logits_PV.device
        lengths_P = np.diff(offsets[first : end + 1])
        counted = np.flatnonzero(lengths_P)
        rows = np.repeat(np.arange(counted.size), lengths_P[counted])
        ids = token_ids[offsets[first] : offsets[end]].astype(np.int64)
        kept_PV = logits_PV
        if counted.size < len(logits_PV):
            kept_PV = logits_PV[torch.from_numpy(counted).to(device)]
        self.add(first + counted, kept_PV, torch.from_numpy(rows).to(device), torch.from_numpy(ids).to(device))

    @torch.inference_mode()
    def fetch(self) -> None:
        """Begin to copy what was taken to the host, behind what its device has to do now."""
        for _, parts in self._parts.values():
            for name, part in parts.items():
                parts[name], self._copied = to_host(part)

    def values(self) -> dict[str, NDArray[np.float16]]:
        """The columns that were taken: label_logprob and entropy [T], record_logprob [nnz] or [P, N], as its ids."""
        if self._copied is not None:
            self._copied.synchronize()
        slices = [self._parts[first] for first in sorted(self._parts)]
        columns = {}
        for name in self.names:
            taken = [(places, parts[name].numpy()) for places, parts in slices if name in parts]
            if name == RECORD_LOGPROB:
                columns[name] = np.concatenate([values for _, values in taken]) if taken else np.empty(0, np.float16)
                continue
            columns[name] = np.zeros(self._labels.size, np.float16)
            for places, values in taken:
                columns[name][places] = values
        return columns
