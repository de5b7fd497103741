"""
A student together with its loss, as one module whose call is the whole forward pass of a micro-batch.

Knows neither optimizer nor processes.  What wraps a module (DDP, FSDP2) acts where it is called: the student's own call
is part of this one's, and nothing of the student is run past it.

Shape letters: P = B·T positions, D hidden size, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from sklformat.distill.loader.batches import Batch
from sklformat.distill.losses.confidence import label_confidence
from sklformat.distill.losses.kl import IGNORED_LABEL, DenseTeacher, OutputHead, linear_sparse_kl
from sklformat.distill.models import heads, outputs
from sklformat.distill.student import streams
from sklformat.settings.train import TrainConfig

_ROWS = 256  # positions whose logits a teacher has at once where it is asked how sure it is


class Objective(nn.Module):
    """
    What a run minimises.

    Args:
        config: The run.
        stream: Where its batches come from.
        student: A causal language model, or one of peft, whole on its device; ``output_head`` is tried here.
        teacher: That of method full; else None.  It is no part of this module, so that nothing wraps or trains it.
    """

    def __init__(self, config: TrainConfig, stream: streams.Stream, student: Any, teacher: Any) -> None:
        super().__init__()
        self.config, self.isolated, self.vocab_size = config, stream.isolated, stream.vocab_size
        self.student = student
        self.__dict__["teacher"] = teacher
        heads.output_head(student)

    def forward(self, batch: Batch, total: int, share: float, weights_P: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """
        Args:
            batch: Its targets are used as the method says; on the student's device.
            total: Positions that count in the whole step.
            share: The part of them in this batch, by which its own balancing loss is weighted.
            weights_P: Of its positions, with a mean of 1 over the step; None: all are 1.

        Returns:
            What to take the gradient of, and the batch's part of the step's loss, nats per position, without gradient.
        """
        config = self.config
        labels_P = batch.labels.flatten()
        positions_BT = batch.position_ids if self.isolated else None
        with torch.autocast(labels_P.device.type, dtype=torch.bfloat16, enabled=config.dtype == "bfloat16"):
            targets: Any = batch.targets
            if self.teacher is not None:
                targets = self._taught(batch, positions_BT)
            hidden_PD, head, balance = heads.run_to_head(self.student, batch.input_ids, positions_BT)
            loss = linear_sparse_kl(
                hidden_PD,
                head,
                targets,
                # The divergence from all of the probability on the label is cross-entropy.
                method="random_sampling" if config.method == "ce" else config.method,
                labels_P=labels_P,
                ce_weight=config.ce_weight,
                divergence=config.divergence,
                temperature=config.temperature,
                position_weights_P=(labels_P != IGNORED_LABEL).float() if weights_P is None else weights_P,
                normaliser=total,
            )
        return loss + balance * share, loss.detach()

    def confidence(self, batch: Batch) -> Tensor:
        """
        How sure the teacher is of each label, [P] on the CPU.

        By the teacher that runs alongside, which runs once more for it, else by the column of the cache where the batch
        has it, else by the records.

        Args:
            batch: On the CPU, with the cache's own records.
        """
        labels_P = batch.labels.flatten()
        if self.teacher is None and batch.label_logprob is not None:
            return batch.label_logprob.flatten().exp()
        if self.teacher is None:
            return label_confidence(batch.targets, labels_P)
        there = batch.to(next(self.student.parameters()).device)
        with torch.autocast(there.labels.device.type, dtype=torch.bfloat16, enabled=self.config.dtype == "bfloat16"):
            taught = self._taught(there, there.position_ids if self.isolated else None)
            assert isinstance(taught.head, OutputHead)
            found = []
            for start in range(0, len(labels_P), _ROWS):
                span = slice(start, start + _ROWS)
                logits = taught.head.logits(taught.hidden_PD[span]).float()
                of_label = logits.gather(1, there.labels.flatten()[span].clamp(min=0)[:, None])[:, 0]
                found.append((of_label - logits.logsumexp(1)).exp())
        return torch.cat(found).cpu()

    @torch.no_grad()
    def _taught(self, batch: Batch, positions_BT: Tensor | None) -> DenseTeacher:
        hidden_PD = outputs.hidden_states(self.teacher, batch.input_ids, positions_BT).flatten(0, 1)
        # A head may be padded beyond the ids that mean something.
        return DenseTeacher(hidden_PD, heads.output_head(self.teacher).narrowed(self.vocab_size))


def targets_of(batch: Batch, method: str) -> Batch:
    """A batch, on the CPU, with the targets that a method learns from."""
    return dataclasses.replace(batch, targets=streams.one_hot(batch.labels)) if method == "ce" else batch


def num_counted(batch: Batch) -> int:
    """Positions of a batch that the loss counts: those with a label, which a position without records never has."""
    return int((batch.labels != IGNORED_LABEL).sum())
