"""
Log-probs of given ids by a teacher: rows of ids in, columns of a cache out.

A teacher behind another engine is a ``Scorer`` as well.
Shape letters: B sequences, T positions, V vocabulary, P positions of a slice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from sklformat.distill.rescoring.questions import Question
from sklformat.distill.teacher.drawing import counted_places
from sklformat.distill.teacher.forward import Teacher
from sklformat.distill.teacher.logit_columns import LogitColumns

Scores = dict[str, NDArray[np.float16]]
"""By name of the column: record_logprob [nnz], label_logprob and entropy [T], 0 where a position is not asked about."""


class Scorer(Protocol):
    """Whatever runs a teacher over tokens and says the log-probs of ids."""

    def score(self, batch: Sequence[Question], names: tuple[str, ...]) -> list[Scores]:
        """
        What the teacher says of each sequence of a batch.

        Args:
            batch: B questions.
            names: Of the columns that are wanted, of record_logprob, label_logprob and entropy.
        """


class TeacherScorer:
    """
    A teacher of transformers.

    Args:
        model: A causal language model in eval mode.
        vocab_size: Logits beyond it are padding and left out.
        filler: Token that shorter sequences of a batch are filled up with.
    """

    def __init__(self, model: Any, vocab_size: int, filler: int = 0) -> None:
        self._teacher, self._filler = Teacher(model, vocab_size), filler

    def score(self, batch: Sequence[Question], names: tuple[str, ...]) -> list[Scores]:
        """As ``Scorer``; logits of no more than a slice of positions are there at once."""
        width = max(question.tokens.size for question in batch) - 1
        # No token sees a later one, so what shorter rows are filled up with is seen by none that counts.
        inputs_BT = np.full((len(batch), width), self._filler, np.uint32)
        places_BT = np.zeros((len(batch), width), np.int64)
        for row, question in enumerate(batch):
            inputs_BT[row, : question.tokens.size - 1] = question.tokens[:-1]
            if question.position_ids is not None:
                places_BT[row, : question.position_ids.size] = question.position_ids
        isolated = batch[0].position_ids is not None
        outputs = self._teacher.run(inputs_BT, places_BT if isolated else None)
        taken = [self._taken(question, outputs[row], names) for row, question in enumerate(batch)]
        return [columns.values() for columns in taken]

    def _taken(self, question: Question, output: torch.Tensor, names: tuple[str, ...]) -> LogitColumns:
        taken, counted_T = LogitColumns(names, question.tokens), question.counted
        offsets, lengths_T = question.offsets, np.diff(question.offsets)
        for first, logits_PV in self._teacher.logits(output[: counted_T.size], counted_T):
            places = counted_places(counted_T, first, len(logits_PV))
            device = logits_PV.device
            kept_PV = logits_PV
            if places.size < len(logits_PV):
                kept_PV = logits_PV[torch.from_numpy(places - first).to(device)]
            rows = np.repeat(np.arange(places.size), lengths_T[places])
            ids = question.token_ids[offsets[first] : offsets[first + len(logits_PV)]].astype(np.int64)
            taken.add(places, kept_PV, torch.from_numpy(rows).to(device), torch.from_numpy(ids).to(device))
        taken.fetch()
        return taken
