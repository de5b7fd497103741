"""
Small classifiers for the toys of Figure 2b and 2c: students of all methods on the same batches, and how sure they are.

Top-K and random sampling are Appendix K's, with ``scatter_add_``: dense targets, since there are few classes.

Shape letters: B points of a batch, C classes, K classes kept, N rounds.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from bench import CONTRADICTED, NOT_SHOWN, SHOWN, Claim, Mean, Options, kept
from drawing import COLOURS, MARKERS
from torch import Tensor, nn
from torch.nn import functional

from sklformat.distill.losses.metrics import ReliabilitySums
from sklformat.progress import show

METHODS = ("CE", "FullKD", "Top-K", "random sampling")
Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class Toy:
    """
    A task and how long its models learn.

    Attributes:
        batch: Points and labels of a size, from a generator; every call gives new ones.
        held_out: The same for points that are measured on.
        model: A new teacher or student, by its role.
        steps, batch_size, learning_rate: Of teacher and students.
        k, rounds: Of Top-K and of random sampling.
        measured: Batches that reliability is taken from.
    """

    batch: Callable[[int, torch.Generator], Batch]
    held_out: Callable[[int, torch.Generator], Batch]
    model: Callable[[str], nn.Module]
    steps: int
    batch_size: int
    learning_rate: float
    k: int
    rounds: int
    measured: int


def targets(method: str, teacher_BC: Tensor, labels_B: Tensor, toy: Toy, g: torch.Generator) -> Tensor:
    """What a student learns from, [B, C]."""
    if method == "FullKD":
        return teacher_BC
    empty = torch.zeros_like(teacher_BC)
    if method == "CE":
        return empty.scatter_(1, labels_B[:, None], 1.0)
    if method == "Top-K":
        values, ids = teacher_BC.topk(toy.k)
        return empty.scatter_(1, ids, values)
    ids = torch.multinomial(teacher_BC, toy.rounds, replacement=True, generator=g)
    return empty.scatter_add_(1, ids, torch.full_like(ids, 1 / toy.rounds, dtype=teacher_BC.dtype))


def train(models: dict[str, nn.Module], toy: Toy, given: Options, seed: int, teacher: nn.Module | None = None) -> None:
    """Train one model for each method, all on the same batches; the learning rate falls to 0 along a cosine."""
    g = torch.Generator(given.device).manual_seed(seed)
    draws = torch.Generator(given.device).manual_seed(seed + 10_000)
    parts = [torch.optim.Adam(model.parameters(), toy.learning_rate) for model in models.values()]
    name = f"seed {seed}, {'teacher' if teacher is None else 'students'}"
    with show(name, toy.steps, unit="step") as reach:
        for step in range(toy.steps):
            x, labels_B = toy.batch(toy.batch_size, g)
            if teacher is not None:
                with torch.no_grad():
                    teacher_BC = teacher(x).softmax(1)
            for (method, model), optimizer in zip(models.items(), parts, strict=True):
                log_p_BC = model(x).log_softmax(1)
                if teacher is None:
                    loss = functional.nll_loss(log_p_BC, labels_B)
                else:
                    loss = -(targets(method, teacher_BC, labels_B, toy, draws) * log_p_BC).sum(1).mean()
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.param_groups[0]["lr"] = toy.learning_rate * 0.5 * (1 + math.cos(math.pi * step / toy.steps))
                optimizer.step()
            reach(step + 1)


@torch.no_grad()
def measure(model: nn.Module, toy: Toy, given: Options, seed: int) -> dict[str, Any]:
    """Accuracy, calibration error, confidence less accuracy (percent), and the bins behind them."""
    g = torch.Generator(given.device).manual_seed(seed + 20_000)
    sums = ReliabilitySums(15)
    for _ in range(toy.measured):
        x, labels_B = toy.held_out(toy.batch_size, g)
        confidence_B, guess_B = model(x).softmax(1).max(1)
        sums.update(confidence_B.clamp(max=1), guess_B == labels_B)
    table = sums.table()
    bins = [list(b) for b in zip(table.confidence, table.accuracy, table.share, strict=True) if b[2] > 0]
    accuracy = sum(a * share for _, a, share in bins)
    gap = sum((c - a) * share for c, a, share in bins)
    return {"accuracy": 100 * accuracy, "ECE": 100 * table.calibration_error, "gap": 100 * gap, "bins": bins}


def results(name: str, toy: Toy, given: Options) -> dict[str, list[dict[str, Any]]]:
    """Each method's figures, the teacher's among them, a list over the seeds; each seed is made once."""
    size = f"{given.device}-{toy.steps}-{toy.batch_size}-{toy.learning_rate}-{toy.k}-{toy.rounds}-{toy.measured}"
    found: dict[str, list[dict[str, Any]]] = {}
    for seed in given.seeds:
        ours = kept(given.out / name / f"{size}-seed{seed}.json", lambda seed=seed: _seed(toy, given, seed))
        for method, one in ours.items():
            found.setdefault(method, []).append(one)
    return found


def _seed(toy: Toy, given: Options, seed: int) -> dict[str, dict[str, Any]]:
    """A teacher, then a student of each method with the same start."""

    def new(role: str) -> nn.Module:
        torch.manual_seed(seed)
        return toy.model(role).to(given.device)

    teacher = {"teacher": new("teacher")}
    train(teacher, toy, given, seed + 1_000)
    students = {method: new("student") for method in METHODS}
    train(students, toy, given, seed, teacher["teacher"])
    return {name: measure(model.eval(), toy, given, seed) for name, model in (teacher | students).items()}


def mean_of(found: dict[str, list[dict[str, Any]]], method: str, figure: str) -> Mean:
    return Mean.of([one[figure] for one in found[method]])


def end(claim: Claim, found: dict[str, list[dict[str, Any]]]) -> None:
    """The table, the verdict and the plot that Figure 2b and 2c share."""
    for method in found:
        columns = {"accuracy %": "accuracy", "ECE %": "ECE", "confidence less accuracy": "gap"}
        claim.add(method, **{title: mean_of(found, method, figure) for title, figure in columns.items()})
    error = {method: mean_of(found, method, "ECE") for method in METHODS}
    gap = {method: mean_of(found, method, "gap") for method in METHODS}
    over = gap["Top-K"] - gap["FullKD"]
    apart = gap["random sampling"] - gap["FullKD"]
    others = [error["Top-K"] - error[method] for method in METHODS if method != "Top-K"]
    rule = (
        "Top-K's confidence is above its accuracy, and its ECE above that of the three others, each with 95 % "
        "confidence; contradicted if it is not even more confident than FullKD"
    )
    if gap["Top-K"].within()[0] > 0 and all(one.within()[0] > 0 for one in others):
        verdict = SHOWN
    else:
        verdict = CONTRADICTED if over.within()[1] < 0 else NOT_SHOWN
    notes = [
        f"signed gap to FullKD: Top-K {_interval(over)}, random sampling {_interval(apart)} points (95 %, paired)",
        "whose ECE is below 2 %: " + (", ".join(m for m in METHODS if error[m].mean < 2) or "nobody's"),
    ]

    def draw(figure: Any) -> None:
        figure.set_size_inches(8, 3)
        axes = figure.subplots(1, len(METHODS), sharex=True, sharey=True)
        for number, (method, one) in enumerate(zip(METHODS, axes, strict=True)):
            one.plot([0, 100], [0, 100], color="0.6", linewidth=1)
            for seed, result in enumerate(found[method]):
                bins = [[100 * value for value in b] for b in result["bins"] if b[2] > 0.002]
                one.plot(
                    [b[0] for b in bins], [b[1] for b in bins], color=COLOURS[number], marker=MARKERS[number],
                    markersize=4, linewidth=1, alpha=1 if seed == 0 else 0.4,
                )  # fmt: skip
            one.set_title(f"{method}\nECE {error[method].mean:.1f} %, gap {gap[method].mean:+.1f}")
            one.set_aspect("equal")
            one.set_xticks([0, 50, 100])
            one.set_yticks([0, 50, 100])
        figure.supxlabel("confidence (%); below the line it is too high; a line for each seed")
        axes[0].set_ylabel("accuracy (%)")

    claim.end(rule, verdict, draw, notes=notes, digits=dict.fromkeys(columns, 1))


def _interval(difference: Mean) -> str:
    low, high = difference.within()
    return f"{difference.mean:+.1f} ({low:+.1f} to {high:+.1f})"
