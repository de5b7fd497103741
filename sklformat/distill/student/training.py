"""
train(): a student learns from a cache, from plain text, or from a teacher that runs alongside.

Makes no cache; what it measures while it trains is in ``measures.milestones``. Losses: Anshumann et al. 2025
(arXiv 2503.16870), sections 2, 3 and 5.3.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sklformat.distill.models import outputs
from sklformat.distill.student import parallelism, processes, runs, streams
from sklformat.distill.student.inputs import (
    check_measurable,
    facts_of,
    load_student,
    load_teacher,
    open_held_out,
    open_stream,
    settings_of,
)
from sklformat.distill.student.learner import Learner, Taken
from sklformat.distill.student.measures.milestones import Milestones
from sklformat.distill.student.measures.origins import find_model
from sklformat.distill.student.schedule import decay_start, learning_rate_at, warmup_note
from sklformat.distill.student.trackers import Pace, Report, Reporter, check_installed, training_flops
from sklformat.distill.student.validation import HeldOut
from sklformat.errors import CorruptError
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
        loss_name: What that loss is.
        seconds: Time spent in training, over all its starts.
        evaluation: The last evaluation, by the names of ``Validation``; None without.
        best: Of the model in best/: its "step", and what it is the best "by", with the "value"; None without.
    """

    method: str
    model: Path
    steps: int
    sequences: int
    parameters: int
    loss: float
    loss_name: str = "training loss"
    seconds: float
    evaluation: dict[str, float] | None = None
    best: dict[str, Any] | None = None

    def __str__(self) -> str:
        line = (
            f"{self.model}: {self.parameters:,} parameters, {self.method}, {self.steps} steps over {self.sequences:,} "
            f"sequences in {self.seconds:.0f} s; {self.loss_name} {self.loss:.4f} nats per position at the end"
        )
        if self.evaluation is not None:
            line += f"; held-out LM loss {self.evaluation['lm_loss']:.4f} nats per token"
        if self.best is not None:
            line += f", best {self.best['by']} {self.best['value']:.4f} after step {self.best['step']}"
        return line


def train(config: TrainConfig, *, report: Report | None = None) -> TrainSummary:
    """
    Train a student to the end, or finish a run that was stopped; a finished run is trained on where steps have grown.

    Started by torchrun, each process takes its share of every step's sequences and the gradients are summed.

    Args:
        config: The run.
        report: Told of each line of the log, on the first process; None: said on stderr.

    Returns:
        The summary, also kept in ``summary.json``; the model is in ``model/``, the log in ``metrics.jsonl``.

    Raises:
        SettingsError: The directory holds a run with other settings; the cache was made by another tokenizer, has a
            wider vocabulary than the student, or its records do not fit the method; it would evaluate on what it
            trains on; a tracker is not installed or does not start.
        InUseError: Another process trains in this directory.
        AlignmentError, FormatError: The cache is damaged or about other tokens; what the finished run wrote is damaged.
        ValueError: A wrong argument, no such device, too few sequences for a step, or a loss that is no longer finite.
        KeyboardInterrupt: Ctrl-C or SIGTERM; the first one lets the step end, and says which step was saved.
    """
    check_installed(config)
    if config.student is not None:
        config = dataclasses.replace(config, student=find_model(config.student))
    with processes.stoppable() as stop, processes.joined(config.device) as process:
        summary = _train(config, process, stop, report)
    return TrainSummary(**{**summary, "model": Path(config.out) / "model"})


def _train(
    config: TrainConfig, process: processes.Process, stop: processes.Stop, report: Report | None
) -> dict[str, Any]:
    """What the run ends with; nothing of the student is left when this returns, as ``processes.joined`` needs it."""
    if process.is_first and report is None:
        source = " + ".join(map(str, config.cache)) or config.tokens
        say(f"train {config.method}: opening {source} and {_student_of(config)}")
    stream = open_stream(config, process.rank, process.world_size, process.device)
    held_out = open_held_out(config, stream, process.rank, process.world_size)
    if process.is_first and stream.note:
        say(f"note: {stream.note}")
    student = load_student(config, stream)
    for part in held_out:
        check_measurable(student, part)
    for note in (outputs.balance_note(student), warmup_note(config)):
        if process.is_first and note:
            say(f"note: {note}")
    teacher = None if config.teacher is None else load_teacher(config, stream, student)
    settings = settings_of(config, stream, process.world_size, student, teacher)
    facts = facts_of(stream)
    with runs.opened(config.out, settings, facts=facts, writes=process.is_first, grows="steps") as run:
        process.wait_for_others()  # they look at the directory after the first has checked it
        summary = run.summary() or {}
        finished = summary.get("steps") == config.steps
        lost = run.missing(best=config.best_by != "none") if finished and process.is_first else None
        if not finished or process.sum(int(lost is not None))[0]:
            learner = Learner(config, stream, student, teacher, process)
            training = _Training(config, stream, learner, run, process, held_out, stop)
            summary = training.write_again(lost, summary) if finished else training.run_to_end(report)
        elif process.is_first and report is None:
            say(f"train {config.method}: {config.out} has its {config.steps:,} steps already; nothing to do")
    return summary


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
        held_out: list[HeldOut],
        stop: processes.Stop,
    ) -> None:
        self.config, self.stream, self.learner, self.run, self.process = config, stream, learner, run, process
        self.milestones = Milestones(config, learner, run, process, held_out)
        self.stop = stop
        self.step = 0
        self.saved: int | None = None  # step of the last checkpoint
        self.loader_state: dict[str, Any] | None = None
        self.seconds = 0.0
        # Sum of the losses since the last line of the log, and of how many steps; their mean at that line.
        self.loss_sum, self.loss_steps, self.loss = 0.0, 0, math.nan
        self.norm = math.nan  # of the last gradient
        self.unread: collections.deque[tuple[int, torch.Tensor, Any]] = collections.deque()

    def run_to_end(self, report: Report | None) -> dict[str, Any]:
        config = self.config
        self._load()
        evaluated = self.milestones.step == self.step
        again = self.run.start_log(self.step, evaluated=evaluated) if self.process.is_first else set()
        batches = self.stream.batches(config.num_workers, self.loader_state)
        run = self.run if self.process.is_first else None
        with Reporter(run, config, first=self.step, again=again, report=report) as reporter, self.stop.heeded():
            first, started = self.step, time.monotonic() - self.seconds
            flops = training_flops(self.learner.model, self.stream.seq_len)
            self.pace = Pace(self.process.device, self.process.world_size, flops, config.dtype)
            for step in range(first, config.steps):
                with self.pace.apart():
                    self._evaluate_if_due(reporter)
                    if step > first and step % config.save_every == 0:
                        self._save()
                    if config.schedule == "wsd" and step == decay_start(config) and config.keep_checkpoint:
                        self._save(before_decay=True)
                with self.pace.waiting():
                    micro_batches = [next(batches) for _ in range(config.accumulation)]
                rate = learning_rate_at(step, config)
                taken = self.learner.update(micro_batches, rate, step, stop=self.stop.asked)
                self.step, self.loader_state = step + 1, micro_batches[-1].state
                self._follow(taken)
                self.seconds = time.monotonic() - started
                if self.step % config.log_every == 0 or self.step == config.steps:
                    self._log(reporter, rate)
                reporter.reach(self.step)
                if (taken.stop or (self.stop.asked and self.process.world_size == 1)) and self.step < config.steps:
                    self._end_early()
            self._evaluate_if_due(reporter)
            if config.keep_checkpoint:
                self._save()
        summary = {
            "method": config.method,
            "steps": config.steps,
            "sequences": config.steps * self._sequences_per_step(),
            "parameters": self.learner.num_parameters,
            "loss": self.loss,
            "loss_name": config.loss_name,
            "seconds": round(self.seconds, 3),
            **self.milestones.summary(),
        }
        self._finish(summary)
        return summary

    def write_again(self, lost: str | None, summary: dict[str, Any]) -> dict[str, Any]:
        """Write the model of a finished run from its checkpoint; ``lost``: the file that is missing."""
        state = self.run.load_checkpoint()
        path = self.run.directory / (lost or "")
        if state is None or state["step"] != self.config.steps:
            raise CorruptError(
                "is missing, and no checkpoint is left to write it again from; train in another directory", path=path
            )
        if self.process.is_first:
            say(f"note: {path} is missing; {self.run.model_directory} is written again from the checkpoint")
        self.learner.load_state_dict(state)
        self._finish(summary)
        return summary

    def _finish(self, summary: dict[str, Any]) -> None:
        weights = self.learner.weights()  # every process gives its part
        if self.process.is_first:
            keep = self.config.keep_checkpoint
            self.run.finish(lambda path: self.learner.write(weights, path), summary, keep=keep)

    def _sequences_per_step(self) -> int:
        return self.config.batch_size * self.config.accumulation * self.process.world_size

    # --- what a step came to ---

    def _follow(self, taken: Taken) -> None:
        """Count a step, and look at its loss as soon as that holds up nobody: a GPU computes the next one meanwhile."""
        self.pace.add(taken.positions)
        on_gpu = self.process.device.type == "cuda"
        there = torch.stack((taken.loss.float(), taken.norm.float())).to("cpu", non_blocking=True)
        mark = torch.cuda.current_stream(self.process.device).record_event() if on_gpu else None
        self.unread.append((self.step, there, mark))
        self._read(leave=1 if on_gpu else 0)

    def _read(self, leave: int = 0) -> None:
        """Bring the losses of all steps but the last ``leave`` to the host."""
        while len(self.unread) > leave:
            step, there, mark = self.unread.popleft()
            if mark is not None:
                mark.synchronize()
            loss, self.norm = there.tolist()
            self.loss_sum += loss
            self.loss_steps += 1
            if not math.isfinite(loss + self.norm):
                raise self._diverged(
                    f"loss or gradient is no longer finite at step {step} (loss {loss:.4f}, gradient norm "
                    f"{self.norm:.4f})"
                )

    def _diverged(self, what: str) -> ValueError:
        kept = (
            "no checkpoint was saved before it"
            if self.saved is None
            else f"the checkpoint of step {self.saved} is sound"
        )
        return ValueError(
            f"{self.config.out}: {what}; {kept}, and the same command would come here again: train in another "
            "directory with a lower learning_rate or max_grad_norm, or a longer warmup"
        )

    def _log(self, reporter: Reporter, rate: float) -> None:
        self._read()
        self.loss = self.loss_sum / self.loss_steps
        if self.step % self.config.log_every == 0:  # at the end of a run that may grow, the interval stays open
            self.loss_sum, self.loss_steps = 0.0, 0
        row = {
            "loss": self.loss,
            "learning_rate": rate,
            "gradient_norm": self.norm,
            "sequences": self.step * self._sequences_per_step(),
            "seconds": round(self.seconds, 3),
        }
        reporter.line(self.step, row | self.pace.figures())

    def _end_early(self) -> None:
        """Save, and end as the signal wants it."""
        self._save()
        raise KeyboardInterrupt(
            f"stopped after step {self.step} of {self.config.steps}, which {self.config.out} keeps; run the same "
            "command again to resume"
        )

    def _evaluate_if_due(self, reporter: Reporter) -> None:
        if not self.milestones.is_due(self.step):
            return
        self._read()
        self._check_weights()
        figures = self.milestones.measure(self.step)
        reporter.evaluation(self.step, {f"eval_{name}": value for name, value in figures.items()})
        self.milestones.keep_if_best()
        if self.process.sum(int(self.stop.asked))[0] and self.step < self.config.steps:
            self._end_early()

    # --- checkpoints ---

    def _check_weights(self) -> None:
        """Refuse to keep or measure weights that are no finite numbers, although each loss was one."""
        parts = (parallelism.own(p.detach()) for p in self.learner.model.parameters() if p.is_floating_point())
        finite = torch.stack([torch.isfinite(part).all() for part in parts]).all()
        if self.process.sum(int(not finite))[0]:
            raise self._diverged(f"weights are no longer finite after step {self.step}")

    def _save(self, *, before_decay: bool = False) -> None:
        self._read()
        self._check_weights()
        learnt = self.learner.state_dict()  # every process gives its part
        if self.process.is_first:
            state = {
                "version": 1,
                "step": self.step,
                "steps": self.config.steps,
                **learnt,
                "loader": self.loader_state,
                "seconds": self.seconds,
                "loss_sum": self.loss_sum,
                "loss_steps": self.loss_steps,
                "loss": self.loss,
                **self.milestones.state_dict(),
            }
            self.run.save_checkpoint(state, before_decay=before_decay)
        if not before_decay:
            self.saved = self.step

    def _load(self) -> None:
        state = self.run.load_checkpoint()
        if state is None:
            return
        state = self._grown(state)
        self.learner.load_state_dict(state)
        self.step, self.loader_state, self.seconds = state["step"], state["loader"], state["seconds"]
        self.saved = self.step
        self.loss_sum, self.loss_steps, self.loss = state["loss_sum"], state["loss_steps"], state.get("loss", math.nan)
        self.milestones.load_state_dict(state)

    def _grown(self, state: dict[str, Any]) -> dict[str, Any]:
        """The checkpoint from which a run resumes whose steps have grown since, and a note on what that means."""
        before = dataclasses.replace(self.config, steps=state.get("steps", self.config.steps))
        if before.steps == self.config.steps:
            return state
        longer = f"{self.config.out} was to take {before.steps} steps, and takes {self.config.steps}"
        if before.schedule == "wsd" and state["step"] > decay_start(before):
            earlier = self.run.load_checkpoint(before_decay=True)
            if earlier is not None and earlier["step"] == decay_start(before):
                longer += f"; it resumes after step {earlier['step']}, where the learning rate had not begun to fall"
                state = earlier
        taken = range(state["step"])
        if any(learning_rate_at(step, before) != learning_rate_at(step, self.config) for step in taken):
            longer += (
                f"; the {len(taken)} steps taken had the learning rates of the shorter run, which this schedule makes "
                "others: the model will not be that of a run that was begun with the longer one"
            )
        if self.process.is_first:
            say(f"note: {longer}")
        return state
