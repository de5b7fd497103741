"""
train(): a student learns from a cache, from plain text, or from a teacher that runs alongside.

Makes no cache and measures no held-out text. Losses: Anshumann et al. 2025 (arXiv 2503.16870), sections 2, 3 and 5.3.

Shape letters: B sequences, T positions, P = B·T positions, D hidden size, V vocabulary.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sklformat.distill.loader.batches import Batch
from sklformat.distill.losses.kl import IGNORED_LABEL, DenseTeacher, linear_sparse_kl
from sklformat.distill.models import heads, loading, outputs
from sklformat.distill.models.devices import find_device
from sklformat.distill.student import runs, streams
from sklformat.distill.student.inputs import load_student, load_teacher, open_stream, settings_of
from sklformat.distill.student.schedule import learning_rate_at
from sklformat.progress import say
from sklformat.settings.train import TrainConfig

CLIP_NORM = 1.0
BETAS = (0.9, 0.95)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainSummary:
    """
    What a finished run reports.

    Attributes:
        method: As in the config.
        model: Directory of the finished student.
        steps: Optimizer steps.
        sequences: Sequences seen, over all processes.
        parameters: Number of the student's parameters.
        loss: Mean training loss over the last logged interval, nats per position.
        seconds: Time spent in training, over all its starts.
    """

    method: str
    model: Path
    steps: int
    sequences: int
    parameters: int
    loss: float
    seconds: float

    def __str__(self) -> str:
        return (
            f"{self.model}: {self.parameters:,} parameters, {self.method}, {self.steps} steps over {self.sequences:,} "
            f"sequences in {self.seconds:.0f} s; training loss {self.loss:.4f} nats per position at the end"
        )


def train(config: TrainConfig, *, report: runs.Report | None = None) -> TrainSummary:
    """
    Train a student to the end, or finish a run that was killed; a finished run is not trained again.

    Started by torchrun, each process takes its share of every step's sequences and the gradients are summed.

    Args:
        config: The run.
        report: Told of each line of the log, on the first process; None: said on stderr.

    Returns:
        The summary, also kept in ``summary.json``; the model is in ``model/``, the log in ``metrics.jsonl``.

    Raises:
        SettingsError: The directory holds a run with other settings; the cache was made by another tokenizer, has a
            wider vocabulary than the student, or its records do not fit the method.
        InUseError: Another process trains in this directory.
        AlignmentError, FormatError: The cache is damaged or about other tokens.
        ValueError: A wrong argument, no such device, too few sequences for a step, or a loss that is no longer finite.
    """
    with _processes(config.device) as (rank, world_size, device):
        if rank == 0 and report is None:
            say(f"train {config.method}: opening {config.cache or config.tokens} and {_student_of(config)}")
        stream = open_stream(config, rank, world_size)
        if rank == 0 and stream.note:
            say(f"note: {stream.note}")
        student = load_student(config, stream)
        if rank == 0 and outputs.balance_weight(student) > 0 and not outputs.asks_for_balance(student):
            say(
                "note: the balancing loss of the student's experts is left out, since its config has "
                "output_router_logits off; set it to true there to add the loss"
            )
        teacher = None if config.teacher is None else load_teacher(config, stream, student)
        settings = settings_of(config, stream, world_size, student, teacher)
        with runs.opened(config.out, settings, writes=rank == 0) as run:
            if world_size > 1:
                dist.barrier()  # the other processes look at the directory after the first has checked it
            summary = run.summary()
            if summary is None:
                summary = _Training(config, stream, student, teacher, run, rank, world_size, device).run_to_end(report)
    return TrainSummary(**{**summary, "model": Path(config.out) / "model"})


def _student_of(config: TrainConfig) -> str:
    return "a new student" if config.student is None else f"the student {config.student}"


# --- the loop --------------------------------------------------------------------------------------------------------


class _Training:
    """One process's part of a run: model, optimizer, and where they stand."""

    def __init__(
        self,
        config: TrainConfig,
        stream: streams.Stream,
        student: Any,
        teacher: Any,
        run: runs.Run,
        rank: int,
        world_size: int,
        device: torch.device,
    ) -> None:
        self.config, self.stream, self.run = config, stream, run
        self.rank, self.world_size, self.device = rank, world_size, device
        self.model = student.to(device).train()
        self.head = heads.output_head(self.model)
        self.teacher = None if teacher is None else teacher.to(device)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        decay = [p for p in self.parameters if p.dim() >= 2]
        rest = [p for p in self.parameters if p.dim() < 2]
        self.optimizer = torch.optim.AdamW(
            [{"params": decay, "weight_decay": config.weight_decay}, {"params": rest, "weight_decay": 0.0}],
            lr=config.learning_rate,
            betas=BETAS,
        )
        self.step = 0
        self.loader_state: dict[str, Any] | None = None
        self.seconds = 0.0
        # Sum of the losses since the last line of the log, and of how many steps.
        self.loss_sum, self.loss_steps = 0.0, 0

    def run_to_end(self, report: runs.Report | None) -> dict[str, Any]:
        config = self.config
        self._load()
        if self.rank == 0:
            self.run.start_log(self.step)
        batches = self.stream.batches(config.num_workers, self.loader_state)
        loss = float("nan")
        unlogged = torch.zeros((), device=self.device)
        with self._reporter(report) as reporter:
            first, started = self.step, time.monotonic() - self.seconds
            for step in range(first, config.steps):
                if step > first and step % config.save_every == 0:
                    self._settle(unlogged)
                    self._save()
                micro_batches = [next(batches) for _ in range(config.accumulation)]
                rate = learning_rate_at(step, config)
                step_loss, norm = self._update(micro_batches, rate, step)
                unlogged += step_loss
                self.step, self.loader_state = step + 1, micro_batches[-1].state
                self.loss_steps += 1
                self.seconds = time.monotonic() - started
                if self.step % config.log_every == 0 or self.step == config.steps:
                    self._settle(unlogged)
                    loss = self.loss_sum / self.loss_steps
                    self.loss_sum, self.loss_steps = 0.0, 0
                    reporter.line(self.step, self._row(loss, rate, float(norm)))
                reporter.reach(self.step)
        summary = {
            "method": config.method,
            "steps": config.steps,
            "sequences": config.steps * self._sequences_per_step(),
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "loss": loss,
            "seconds": round(self.seconds, 3),
        }
        if self.rank == 0:
            self.run.finish(lambda path: loading.write(self.model, self.stream.tokenizer, path), summary)
        return summary

    def _reporter(self, report: runs.Report | None) -> runs.Reporter:
        config = self.config
        return runs.Reporter(
            self.run if self.rank == 0 else None,
            first=self.step,
            steps=config.steps,
            name=f"train {config.method}",
            report=report,
        )

    def _row(self, loss: float, rate: float, norm: float) -> dict[str, float]:
        return {
            "loss": loss,
            "learning_rate": rate,
            "gradient_norm": norm,
            "sequences": self.step * self._sequences_per_step(),
            "seconds": round(self.seconds, 3),
        }

    def _sequences_per_step(self) -> int:
        return self.config.batch_size * self.config.accumulation * self.world_size

    def _update(self, micro_batches: list[Batch], rate: float, step: int) -> tuple[Tensor, Tensor]:
        """
        Take one optimizer step; the loss is the mean over all counted positions of all micro-batches and processes.

        Means of means would weigh a position in a short micro-batch more than one in a long one.
        """
        # Dropout, where a model has it, depends on (seed, step, process) alone: nothing to store, nothing to restore.
        torch.manual_seed((self.config.seed * 1_000_003 + step) * self.world_size + self.rank)
        counts = [_num_counted(batch, self.config.method) for batch in micro_batches]
        total = sum(counts)
        if self.world_size > 1:
            shared = torch.tensor(total, device=self.device)
            dist.all_reduce(shared)
            total = int(shared)
        if total == 0:
            raise ValueError(f"step {step} has no position with a target; the cache holds none there")
        loss = torch.zeros((), device=self.device)
        for batch, count in zip(micro_batches, counts, strict=True):
            if count:
                part, balance = self._loss(batch, total)
                whole = part if balance is None else part + balance * (count / total)
                whole.backward()  # type: ignore[no-untyped-call]
                loss += part.detach()
        if self.world_size > 1:
            self._sum_over_processes(loss)
        norm = nn.utils.clip_grad_norm_(self.parameters, CLIP_NORM)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss, norm

    def _loss(self, batch: Batch, total: int) -> tuple[Tensor, Tensor | None]:
        """The batch's share of the step's mean over ``total`` positions, and the batch's own balancing loss."""
        config = self.config
        if config.method == "ce":
            batch = dataclasses.replace(batch, targets=streams.one_hot(batch.labels))
        batch = batch.to(self.device)
        labels_P = batch.labels.flatten()
        targets: Any = batch.targets
        positions_BT = batch.position_ids if self.stream.isolated else None
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=config.dtype == "bfloat16"):
            if self.teacher is not None:
                with torch.no_grad():
                    hidden_PD = outputs.hidden_states(self.teacher, batch.input_ids, positions_BT).flatten(0, 1)
                # A head may be padded beyond the ids that mean something.
                head_VD = outputs.lm_head_weight(self.teacher).detach()[: self.stream.vocab_size]
                targets = DenseTeacher(hidden_PD, head_VD)
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

    def _settle(self, unlogged: Tensor) -> None:
        """Bring the losses of the last steps to the host; only here does an accelerator have to wait."""
        self.loss_sum += float(unlogged)
        unlogged.zero_()
        if not math.isfinite(self.loss_sum):
            raise ValueError(
                f"{self.config.out}: the loss is no longer finite at step {self.step}; the last checkpoint is kept; "
                "train again with a lower learning_rate"
            )

    def _save(self) -> None:
        if self.rank == 0:
            self.run.save_checkpoint(
                {
                    "version": 1,
                    "step": self.step,
                    "model": self.model.state_dict(),
                    "optimizer": self.optimizer.state_dict(),
                    "loader": self.loader_state,
                    "seconds": self.seconds,
                    "loss_sum": self.loss_sum,
                    "loss_steps": self.loss_steps,
                }
            )

    def _load(self) -> None:
        state = self.run.load_checkpoint()
        if state is not None:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step, self.loader_state, self.seconds = state["step"], state["loader"], state["seconds"]
            self.loss_sum, self.loss_steps = state["loss_sum"], state["loss_steps"]


def _num_counted(batch: Batch, method: str) -> int:
    """Positions of a batch that the loss counts: those with a label and, where records are used, with records."""
    counted_P = batch.labels.flatten() != IGNORED_LABEL
    if method not in ("ce", "full"):
        counted_P = counted_P & (batch.targets.offsets.diff() > 0)
    return int(counted_P.sum())


@contextlib.contextmanager
def _processes(name: str) -> Iterator[tuple[int, int, torch.device]]:
    """Rank, number of processes and device; joins torchrun's processes for the time of the block."""
    device = find_device(name)
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1:
        yield 0, 1, device
        return
    if device.type == "cuda" and device.index is None:
        device = find_device(f"cuda:{os.environ['LOCAL_RANK']}")
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield dist.get_rank(), world_size, device
    finally:
        dist.destroy_process_group()
