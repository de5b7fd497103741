"""
The student as it learns: its model and optimizer, and what one step does to them.

Knows neither the run's length nor its directory.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sklformat.distill.loader.batches import Batch
from sklformat.distill.losses.confidence import weights_of_step
from sklformat.distill.models import adapters, layers, loading
from sklformat.distill.models.devices import to_device
from sklformat.distill.student import parallelism, streams
from sklformat.distill.student.objective import Objective, num_counted, targets_of
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
        student: The model, in training mode; it is moved to the process's device, and divided between the processes
            where the config asks for it.
        teacher: That of method full; else None.  Each process has it whole.
        process: Which this is.

    Raises:
        ValueError: The student cannot be divided, compiled or recomputed as the config asks.
    """

    def __init__(
        self, config: TrainConfig, stream: streams.Stream, student: Any, teacher: Any, process: Process
    ) -> None:
        self.config, self.stream, self.process = config, stream, process
        self.model = student.to(process.device)
        objective = self.objective = Objective(
            config, stream, self.model, None if teacher is None else teacher.to(process.device)
        )
        plain = adapters.unwrapped(self.model)
        if config.gradient_checkpointing:
            layers.recompute_activations(plain)
        if config.compile:
            layers.compile_layers(plain)
        self.root: nn.Module = objective
        self._is_warm = False
        if config.shard:
            parallelism.divide(self.model, layers.repeated_layers(plain), process, half=config.dtype == "bfloat16")
        elif process.world_size > 1:
            self.root = parallelism.replicated(objective)
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

    def weights(self) -> dict[str, Tensor]:
        """
        What the student has learnt: its weights, or those of its adapter, whole and on the CPU.

        Every process must ask for them; all but the first get empty ones.
        """
        found: dict[str, Tensor] = parallelism.whole(self._learning(), keep=self.process.is_first)
        return found

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of student and optimizer, for any number of processes; asked for as ``weights``."""
        optimizer = parallelism.whole(self.optimizer.state_dict(), keep=self.process.is_first)
        return {"model": self.weights(), "optimizer": optimizer}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """
        Take up what ``state_dict`` gave, on any number of processes.

        Raises:
            ValueError: It holds other weights than the student has.
        """
        own = self._learning()
        if own.keys() != state["model"].keys():
            name = min(own.keys() ^ state["model"].keys())
            raise ValueError(
                f"the checkpoint is of another student: the weight {name} is in one of the two alone; train with the "
                "transformers and peft that began this run, or start again in another directory"
            )
        weights = {name: parallelism.like(value, own[name]) for name, value in state["model"].items()}
        self.model.load_state_dict(weights, strict=False)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        moments = {
            number: {name: _as_moment(value, parameters[number]) for name, value in values.items()}
            for number, values in state["optimizer"]["state"].items()
        }
        self.optimizer.load_state_dict({**state["optimizer"], "state": moments})

    def write(self, weights: dict[str, Tensor], directory: Path) -> None:
        """Write what ``weights`` gave, in transformers' layout or peft's, with the tokenizer."""
        loading.write(self.model, self.stream.tokenizer, directory, weights)

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
            ValueError: No position counts, or the student cannot be compiled.
            CorruptError: A GPU that decodes the records found a bad one; nothing was learnt from this step.
        """
        # Dropout, where a model has it, depends on (seed, step, process) alone: nothing to store, nothing to restore.
        seed = (self.config.seed * 1_000_003 + step) * self.process.world_size + self.process.rank
        torch.manual_seed(seed % (1 << 63))  # torch takes no greater one
        counts = [num_counted(batch) for batch in micro_batches]
        total, positions, stops = self.process.sum(
            sum(counts), sum(batch.labels.numel() for batch in micro_batches), int(stop)
        )
        if total == 0:
            raise ValueError(f"step {step} has no position with a target; the cache holds none there")
        weights = self._weights(micro_batches)
        loss = torch.zeros((), device=self.process.device)
        moved: Batch | None = None
        last = len(micro_batches) - 1
        naming = layers.naming_compile_failures() if self.config.compile else contextlib.nullcontext()
        with naming:
            for number, (batch, count) in enumerate(zip(micro_batches, counts, strict=True)):
                # Several processes call and reduce together, also where one of them has nothing that counts.
                if count or self.process.world_size > 1:
                    # The first step here always averages: in it DDP finds out which parameters take part.
                    more = number < last and self._is_warm
                    with parallelism.without_sync(self.root) if more else contextlib.nullcontext():
                        # Moving a batch looks at the records of the one before it.
                        moved = to_device(targets_of(batch, self.config.method), self.process.device)
                        loss += self._backward(moved, total, count / total, weights[number])
        self._is_warm = True
        if moved is not None:
            moved.check()  # before the processes meet, so that none of them takes the step
        if self.process.world_size > 1:
            dist.all_reduce(loss)
        norm = parallelism.full(nn.utils.clip_grad_norm_(self.parameters, self.config.max_grad_norm or math.inf))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return Taken(loss, norm, positions, stops > 0)

    def _weights(self, micro_batches: Sequence[Batch]) -> list[Tensor | None]:
        """Of each batch the weights of its positions, on the device; None: all are 1."""
        config = self.config
        if config.lr_ratio == 1:
            return [None for _ in micro_batches]
        labels = [batch.labels.flatten() for batch in micro_batches]
        sure = [self.objective.confidence(batch) for batch in micro_batches]
        weights = weights_of_step(
            sure, labels, self.process.together, lr_ratio=config.lr_ratio, easy_percentile=config.easy_percentile
        )
        return [to_device(weights_P, self.process.device) for weights_P in weights]

    def _backward(self, batch: Batch, total: int, share: float, weights_P: Tensor | None) -> Tensor:
        """Add the gradient of a micro-batch that is on the device; its part of the step's loss."""
        part: Tensor
        loss, part = self.root(batch, total, share, weights_P)
        if self.process.world_size > 1:
            loss = loss * self.process.world_size  # both ways average the gradients of the processes
        loss.backward()
        return part

    def _learning(self) -> dict[str, Tensor]:
        """The student's weights by their names; of an adapter those that learn."""
        parallelism.part_again(self.model)
        if adapters.is_adapted(self.model):
            return {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        return dict(self.model.state_dict(keep_vars=True))


def _as_moment(value: Any, parameter: Tensor) -> Any:
    """An optimizer's tensor as its parameter is kept; numbers and counts of steps as they are."""
    matches = isinstance(value, Tensor) and value.shape == parameter.shape
    return parallelism.like(value, parameter) if matches else value
