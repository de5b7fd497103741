"""
train(): a student learns from a cache, from plain text, or from a teacher that runs alongside.

Makes no cache and measures no held-out text. Losses: Anshumann et al. 2025 (arXiv 2503.16870), sections 2, 3 and 5.3.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sklformat.distill.models import outputs
from sklformat.distill.student import processes, runs, streams
from sklformat.distill.student.inputs import load_student, load_teacher, open_stream, settings_of
from sklformat.distill.student.learner import Learner
from sklformat.distill.student.schedule import learning_rate_at
from sklformat.progress import say
from sklformat.settings.train import TrainConfig


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
    with processes.joined(config.device) as process:
        if process.is_first and report is None:
            say(f"train {config.method}: opening {config.cache or config.tokens} and {_student_of(config)}")
        stream = open_stream(config, process.rank, process.world_size)
        if process.is_first and stream.note:
            say(f"note: {stream.note}")
        student = load_student(config, stream)
        if process.is_first and outputs.balance_weight(student) > 0 and not outputs.asks_for_balance(student):
            say(
                "note: the balancing loss of the student's experts is left out, since its config has "
                "output_router_logits off; set it to true there to add the loss"
            )
        teacher = None if config.teacher is None else load_teacher(config, stream, student)
        settings = settings_of(config, stream, process.world_size, student, teacher)
        with runs.opened(config.out, settings, writes=process.is_first) as run:
            process.wait_for_others()  # they look at the directory after the first has checked it
            summary = run.summary()
            if summary is None:
                learner = Learner(config, stream, student, teacher, process)
                summary = _Training(config, stream, learner, run, process).run_to_end(report)
    return TrainSummary(**{**summary, "model": Path(config.out) / "model"})


def _student_of(config: TrainConfig) -> str:
    return "a new student" if config.student is None else f"the student {config.student}"


# --- the loop --------------------------------------------------------------------------------------------------------


class _Training:
    """One process's part of a run: the student, and where it stands."""

    def __init__(
        self,
        config: TrainConfig,
        stream: streams.Stream,
        learner: Learner,
        run: runs.Run,
        process: processes.Process,
    ) -> None:
        self.config, self.stream, self.learner, self.run, self.process = config, stream, learner, run, process
        self.step = 0
        self.loader_state: dict[str, Any] | None = None
        self.seconds = 0.0
        # Sum of the losses since the last line of the log, and of how many steps.
        self.loss_sum, self.loss_steps = 0.0, 0

    def run_to_end(self, report: runs.Report | None) -> dict[str, Any]:
        config = self.config
        self._load()
        if self.process.is_first:
            self.run.start_log(self.step)
        batches = self.stream.batches(config.num_workers, self.loader_state)
        loss = float("nan")
        unlogged = torch.zeros((), device=self.process.device)
        with self._reporter(report) as reporter:
            first, started = self.step, time.monotonic() - self.seconds
            for step in range(first, config.steps):
                if step > first and step % config.save_every == 0:
                    self._settle(unlogged)
                    self._save()
                micro_batches = [next(batches) for _ in range(config.accumulation)]
                rate = learning_rate_at(step, config)
                taken = self.learner.update(micro_batches, rate, step)
                unlogged += taken.loss
                self.step, self.loader_state = step + 1, micro_batches[-1].state
                self.loss_steps += 1
                self.seconds = time.monotonic() - started
                if self.step % config.log_every == 0 or self.step == config.steps:
                    self._settle(unlogged)
                    loss = self.loss_sum / self.loss_steps
                    self.loss_sum, self.loss_steps = 0.0, 0
                    reporter.line(self.step, self._row(loss, rate, float(taken.norm)))
                reporter.reach(self.step)
        summary = {
            "method": config.method,
            "steps": config.steps,
            "sequences": config.steps * self._sequences_per_step(),
            "parameters": self.learner.num_parameters,
            "loss": loss,
            "seconds": round(self.seconds, 3),
        }
        weights = self.learner.weights()  # every process gives its part
        if self.process.is_first:
            self.run.finish(lambda path: self.learner.write(weights, path), summary)
        return summary

    def _reporter(self, report: runs.Report | None) -> runs.Reporter:
        config = self.config
        return runs.Reporter(
            self.run if self.process.is_first else None,
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
        return self.config.batch_size * self.config.accumulation * self.process.world_size

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
        state = self.learner.state_dict()  # every process gives its part
        if self.process.is_first:
            self.run.save_checkpoint(
                {
                    "version": 1,
                    "step": self.step,
                    **state,
                    "loader": self.loader_state,
                    "seconds": self.seconds,
                    "loss_sum": self.loss_sum,
                    "loss_steps": self.loss_steps,
                }
            )

    def _load(self) -> None:
        state = self.run.load_checkpoint()
        if state is not None:
            self.learner.load_state_dict(state)
            self.step, self.loader_state, self.seconds = state["step"], state["loader"], state["seconds"]
            self.loss_sum, self.loss_steps = state["loss_sum"], state["loss_steps"]
