"""
The student as it learns: its model and optimizer, and what one step does to them.

Knows neither the run's length nor its directory.

Shape letters: B sequences, T positions, P = B·T positions, D hidden size, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sklformat.distill.loader.batches import Batch
from sklformat.distill.losses.kl import IGNORED_LABEL, DenseTeacher, linear_sparse_kl
from sklformat.distill.models import heads, outputs
from sklformat.distill.student import streams
from sklformat.distill.student.processes import Process
from sklformat.settings.train import TrainConfig


class Taken(NamedTuple):
    """
    One step of all processes.

    Attributes:
        loss: Nats per position, a scalar on the device.
        norm: Of the gradient before it was clipped, a scalar on the device.
        positions: How many went through the student, counted or not.
        stop: Whether a process was asked to stop.
    """

    loss: Tensor
    norm: Tensor
    positions: int
    stop: bool


class Learner:
    """
    One process's share of a student and its optimizer; all processes take each step together.

    Args:
        config: The run.
        stream: Where its batches come from.
        student: The model, in training mode; it is moved to the process's device.
        teacher: That of method full; else None.
        process: Which this is.
    """

    def __init__(
        self, config: TrainConfig, stream: streams.Stream, student: Any, teacher: Any, process: Process
    ) -> None:
        self.config, self.stream, self.process = config, stream, process
        self.model = student.to(process.device)
        self.head = heads.output_head(self.model)
        self.teacher = None if teacher is None else teacher.to(process.device)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        decay = [p for p in self.parameters if p.dim() >= 2]
        rest = [p for p in self.parameters if p.dim() < 2]
        self.optimizer = torch.optim.AdamW(
            [{"params": decay, "weight_decay": config.weight_decay}, {"params": rest, "weight_decay": 0.0}],
            lr=config.learning_rate,
            betas=config.betas,
            eps=config.adam_eps,
        )

    @property
    def num_parameters(self) -> int:
        """Of the whole student."""
        return sum(p.numel() for p in self.model.parameters())

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of student and optimizer."""
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what ``state_dict`` gave."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])

    def update(self, micro_batches: Sequence[Batch], rate: float, step: int, *, stop: bool = False) -> Taken:
        """
        Take one optimizer step; the loss is the mean over all counted positions of all micro-batches and processes.

        Means of means would weigh a position in a short micro-batch more than one in a long one.

        Args:
            micro_batches: Of this process.
            rate: The learning rate.
            step: Number of the step, on which the run's randomness depends.
            stop: Whether this process was asked to stop; all of them learn of it, and in the same step.

        Returns:
            What it came to, the same in all processes.

        Raises:
            ValueError: No position counts.
        """
        # Dropout, where a model has it, depends on (seed, step, process) alone: nothing to store, nothing to restore.
        torch.manual_seed((self.config.seed * 1_000_003 + step) * self.process.world_size + self.process.rank)
        counts = [_num_counted(batch, self.config.method) for batch in micro_batches]
        total, positions, stops = self.process.sum(
            sum(counts), sum(batch.labels.numel() for batch in micro_batches), int(stop)
        )
        if total == 0:
            raise ValueError(f"step {step} has no position with a target; the cache holds none there")
        loss = torch.zeros((), device=self.process.device)
        for batch, count in zip(micro_batches, counts, strict=True):
            if count:
                part, balance = self._loss(batch, total)
                whole = part if balance is None else part + balance * (count / total)
                whole.backward()  # type: ignore[no-untyped-call]
                loss += part.detach()
        if self.process.world_size > 1:
            self._sum_over_processes(loss)
        norm = nn.utils.clip_grad_norm_(self.parameters, self.config.max_grad_norm or math.inf)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return Taken(loss, norm, positions, stops > 0)

    def _loss(self, batch: Batch, total: int) -> tuple[Tensor, Tensor | None]:
        """The batch's share of the step's mean over ``total`` positions, and the batch's own balancing loss."""
        config = self.config
        if config.method == "ce":
            batch = dataclasses.replace(batch, targets=streams.one_hot(batch.labels))
        device = self.process.device
        batch = batch.to(device)
        labels_P = batch.labels.flatten()
        targets: Any = batch.targets
        positions_BT = batch.position_ids if self.stream.isolated else None
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=config.dtype == "bfloat16"):
            if self.teacher is not None:
                with torch.no_grad():
                    hidden_PD = outputs.hidden_states(self.teacher, batch.input_ids, positions_BT).flatten(0, 1)
                # A head may be padded beyond the ids that mean something.
                targets = DenseTeacher(hidden_PD, heads.output_head(self.teacher).narrowed(self.stream.vocab_size))
            hidden_BTD, balance = outputs.hidden_states_and_balance(self.model, batch.input_ids, positions_BT)
            loss = linear_sparse_kl(
                hidden_BTD.flatten(0, 1),
                self.head,
                targets,
                # The divergence from all of the probability on the label is cross-entropy.
                method="random_sampling" if config.method == "ce" else config.method,
                labels_P=labels_P,
                ce_weight=config.ce_weight,
                position_weights_P=(labels_P != IGNORED_LABEL).float(),
                normaliser=total,
            )
        return loss, balance

    def _sum_over_processes(self, loss: Tensor) -> None:
        for parameter in self.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        tensors = [loss, *(p.grad for p in self.parameters if p.grad is not None)]
        for work in [dist.all_reduce(tensor, async_op=True) for tensor in tensors]:
            work.wait()


def _num_counted(batch: Batch, method: str) -> int:
    """Positions of a batch that the loss counts: those with a label and, where records are used, with records."""
    counted_P = batch.labels.flatten() != IGNORED_LABEL
    if method not in ("ce", "full"):
        counted_P = counted_P & (batch.targets.offsets.diff() > 0)
    return int(counted_P.sum())
