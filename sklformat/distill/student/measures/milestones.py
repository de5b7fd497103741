"""
What a run measures its student by while it trains, and the best student of these so far.

Does not say when training stops; the figures are those of ``validation``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from sklformat.distill.student import parallelism
from sklformat.distill.student.learner import Learner
from sklformat.distill.student.processes import Process
from sklformat.distill.student.runs import Run
from sklformat.distill.student.validation import HeldOut, validate
from sklformat.progress import say
from sklformat.settings.train import TrainConfig


class Milestones:
    """
    The evaluations of a run; all processes call each method together.

    Args:
        config: The run.
        learner: Its student.
        run: Where the best student goes.
        process: Which this is.
        held_out: What to measure on, a part of each cache; empty: nothing is measured.

    Attributes:
        step: The step after which the student was last measured; 0: it was not.
    """

    def __init__(
        self, config: TrainConfig, learner: Learner, run: Run, process: Process, held_out: list[HeldOut]
    ) -> None:
        self.config, self.learner, self.run, self.process, self.held_out = config, learner, run, process, held_out
        self.step = 0
        self._figures: dict[str, float] | None = None  # of that step
        self._best: dict[str, Any] | None = None  # "step", "value", what it is the best "by", and "on"

    def is_due(self, step: int) -> bool:
        """Whether the student is to be measured after ``step`` steps, and was not yet."""
        every = self.config.eval_every
        due = every and (step % every == 0 or step == self.config.steps)
        return bool(self.held_out and due and step != self.step)

    def measure(self, step: int) -> dict[str, float]:
        """The figures of the student after ``step`` steps, by the names of ``Validation``."""
        device, half = self.process.device, self.config.dtype == "bfloat16"
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=half):
            found = validate(self.learner.model, self.held_out, device=device)
        parallelism.part_again(self.learner.model)
        values = {name: value for name, value in dataclasses.asdict(found).items() if value is not None}
        self.step = step
        self._figures = {name: value for name, value in values.items() if not name.startswith("num_")}
        return self._figures

    def keep_if_best(self) -> None:
        """Write the student that was measured last to best/, if it is the best so far."""
        by: str = self.config.best_by
        if by == "none":
            return
        assert self._figures is not None
        if by == "kl" and "kl" not in self._figures:
            by = "kl_to_records"
        measure = {"by": by, "on": self._measured_on()}
        value = self._figures[by]
        if self._best is not None and self._best["value"] <= value and measure.items() <= self._best.items():
            return
        self._best = {**measure, "value": value, "step": self.step}
        weights = self.learner.weights()  # every process gives its part
        if self.process.is_first:
            figures = {"step": self.step, **self._figures}
            self.run.save_best(lambda path: self.learner.write(weights, path), figures)

    def _measured_on(self) -> str:
        parts = [(each.cache.fingerprint, each.sequences) for each in self.held_out]
        return " + ".join(f"{fingerprint}[{part.start}:{part.stop}]" for fingerprint, part in parts)

    def summary(self) -> dict[str, Any]:
        """The last evaluation and the best, as ``TrainSummary`` has them."""
        best = None if self._best is None else {name: self._best[name] for name in ("step", "by", "value")}
        return {"evaluation": self._figures, "best": best}

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"evaluated": self.step, "evaluation": self._figures, "best": self._best}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """
        Take up what ``state_dict`` gave; checkpoints of before there was an evaluation have nothing of it.

        Where best/ does not hold the best up to the checkpoint, the next evaluation begins it again: it was deleted, or
        is of steps that a crash or a longer run takes a second time.
        """
        self.step, self._figures = state.get("evaluated", 0), state.get("evaluation")
        self._best = state.get("best")
        if self._best is None:
            return
        lost = self.process.is_first and self.run.best_step() != self._best["step"]
        if lost:
            say(
                f"note: {self.run.best_directory} does not hold the model of step {self._best['step']}, the best up to "
                "the checkpoint; the next evaluation begins it again"
            )
        if self.process.sum(int(lost))[0]:
            self._best = None
