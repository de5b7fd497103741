"""
Log-probs of given ids by a teacher: rows of ids in, columns of a cache out.

A teacher behind another engine is a ``Scorer`` as well.
Shape letters: B sequences, T positions, V vocabulary, P positions of a slice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from sklformat.capture import ShardWork
from sklformat.distill.models import attention, loading
from sklformat.distill.models.devices import find_device, own_devices
from sklformat.distill.models.identities import model_fingerprint
from sklformat.distill.rescoring.headers import describe_teacher
from sklformat.distill.rescoring.questions import Question, Questions
from sklformat.distill.teacher.forward import Teacher
from sklformat.distill.teacher.logit_columns import LogitColumns
from sklformat.progress import say
from sklformat.settings.rescore import RescoreConfig

Scores = dict[str, NDArray[np.float16]]
"""By name of the column: record_logprob [nnz], label_logprob and entropy [T], 0 where a position is not asked about."""


class Scorer(Protocol):
    """Whatever runs a teacher over tokens and says the log-probs of ids."""

    def answers(
        self, works: Sequence[ShardWork], read: Callable[[int], Question], names: tuple[str, ...]
    ) -> Iterator[tuple[Question, Scores]]:
        """
        What the teacher says of each sequence that shards still need, in their order.

        Args:
            works: The shards.
            read: What is asked of a sequence.
            names: Of the columns that are wanted, of record_logprob, label_logprob and entropy.
        """


class TeacherScorer:
    """
    A teacher of transformers.

    Args:
        model: A causal language model in eval mode.
        vocab_size: Logits beyond it are padding and left out.
        batch_size: Sequences of one forward pass.
        filler: Token that shorter sequences of a batch are filled up with.
    """

    def __init__(self, model: Any, vocab_size: int, batch_size: int, filler: int = 0) -> None:
        self._teacher, self._batch_size, self._filler = Teacher(model, vocab_size), batch_size, filler

    def answers(
        self, works: Sequence[ShardWork], read: Callable[[int], Question], names: tuple[str, ...]
    ) -> Iterator[tuple[Question, Scores]]:
        """
        As ``Scorer``; logits of no more than a slice of positions are there at once.

        They depend in their last bits on the shape of a batch, so batches are a fixed grid within the shard.
        """
        for work in works:
            for first in range(work.first_sequence, work.end, self._batch_size):
                last = min(first + self._batch_size, work.end)
                if last > work.next_sequence:
                    batch = [read(number) for number in range(first, last)]
                    new = max(0, work.next_sequence - first)
                    yield from zip(batch[new:], self.score(batch, names)[new:], strict=True)

    def score(self, batch: Sequence[Question], names: tuple[str, ...]) -> list[Scores]:
        """What the teacher says of each sequence of a batch."""
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
        for first, logits_PV in self._teacher.logits(output[: counted_T.size], counted_T):
            taken.add_given(first, logits_PV, question.offsets, question.token_ids)
        taken.fetch()
        return taken


def load_scorer(config: RescoreConfig, questions: Questions) -> tuple[Scorer, dict[str, Any]]:
    """
    A teacher of transformers, sure to know the cache's ids, and what a header says of it.

    Raises:
        OSError, ValueError, SettingsError: As ``rescore``.
    """
    device = find_device(config.device)
    over: list[int] = []
    if config.device_map == "auto":
        if device.type != "cuda" or device.index is not None:
            raise ValueError(f"device_map auto needs several CUDA devices, device is {config.device}; leave both out")
        over = own_devices(0, 1)
    header = questions.cache.header
    named: loading.Named = {"revision": config.revision, **loading.named_of(config)}
    tokenizer = loading.load_tokenizer(config.teacher_name, **named)
    dtype: loading.Dtype = "float32" if device.type == "cpu" else "bfloat16"
    if config.dtype != "auto":
        dtype = config.dtype
    say(f"rescore {config.out.name}: loading the teacher {config.teacher}")
    model = loading.load_model(config.teacher_name, dtype=dtype, device=device, over=over, **named)
    if questions.isolated:
        attention.check_isolates(model)
    width = loading.check_fit(tokenizer, model, seq_len=header.seq_len or None)
    questions.check_ids(tokenizer, width, config.teacher)
    packing = header.capture.get("packing")
    filler = packing.get("separator_id", 0) if isinstance(packing, dict) else 0
    teacher = describe_teacher(config, model, model_fingerprint(model), dtype, device.type)
    return TeacherScorer(model, width, config.batch_size, filler), {"teacher": teacher, "batch_size": config.batch_size}
