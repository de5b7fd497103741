"""
The students of the claims: one is trained in well under a minute on a core, and its result is kept for all scripts.

All students of a seed have the same start and read the same sequences in the same order, so that differences are
paired.  Records are drawn where a cache would be read: a draw is a function of seed, sequence and position alone
(SPEC section 2), so that a later epoch sees the same ones, as from a file.  Draws of different seeds are independent.

Several processes may run the same script, or scripts that share students: each result is made by one of them.

Shape letters: S sequences, B sequences of a batch, T positions, P = B·T, D hidden size, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench import Mean, Options
from teacher import Part, Teacher
from torch import Tensor

import sklformat as skl
from sklformat.checksums import fingerprint
from sklformat.distill import DenseTeacher, Targets, easy_hard_weights, linear_sparse_kl, run_to_head
from sklformat.distill.losses.metrics import EvaluationSums
from sklformat.distill.models import outputs
from sklformat.distill.models.loading import new_llama
from sklformat.files.disk import write_atomically
from sklformat.format.records import SparseTargets
from sklformat.operations.thinning import thin
from sklformat.progress import show

DIGITS = {
    "records": 1, "% CE to FullKD": 0, "ECE %": 1, "confidence gap %": 1, "sum of min(p, q) %": 1,
    "top-1 agreement %": 1,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Records:
    """What is drawn of each position, as ``skl.draw`` takes it."""

    sampler: str = "multinomial"
    rounds: int = 0
    k: int | None = None
    p: float | None = None
    proposal_temperature: float = 1.0
    thinned_from: int = 0
    """Draws that are stored, of which each epoch reads ``rounds`` others; 0: all epochs read the same."""

    def draw(self, logits_TV: Tensor, *, seed: int, sequence: int, epoch: int = 0) -> SparseTargets:
        """The records of one sequence."""
        is_top = self.sampler in ("topk", "topp")
        how: dict[str, Any] = {"k": self.k, "p": self.p} if is_top else {"rounds": self.thinned_from or self.rounds}
        stored = skl.draw(
            logits_TV.float().cpu(), sampler=self.sampler, proposal_temperature=self.proposal_temperature, seed=seed,
            sequence=sequence, **how,
        )  # fmt: skip
        return thin(stored, self.rounds, seed=seed + epoch, sequence=sequence) if self.thinned_from else stored


@dataclass(frozen=True, kw_only=True)
class Student:
    """
    One student: what it learns from, how large it is, how long it learns.

    Attributes:
        records: None: cross-entropy (method "ce") or the whole distribution ("full").
        method, ce_weight: As ``linear_sparse_kl`` takes them.
        loss: Its further arguments, pairs of name and value.
        lr_ratio: Rate of hard tokens to that of easy ones, by the teacher's own confidence in the label (5.3).
        epochs: Times that each sequence is read, in the same number of steps: 3 read a third of the text.
        longer: Times as many steps, over as much more text.
        batch: Times as many sequences in each step, likewise.
        width, layers: Of the Llama; 0: as the size of the teacher says.
        label: What else tells it apart, such as other teachers.
    """

    records: Records | None = None
    method: str = "random_sampling"
    ce_weight: float = 0.0
    loss: tuple[tuple[str, Any], ...] = ()
    lr_ratio: float = 1.0
    epochs: int = 1
    longer: int = 1
    batch: int = 1
    width: int = 0
    layers: int = 0
    label: str = ""


CE, FULL = Student(method="ce"), Student(method="full")


@dataclass(frozen=True)
class Result:
    """Figures of a student on held-out text; ``records`` is the mean number per position, 0 where there are none."""

    figures: dict[str, float]
    reliability: list[list[float]]
    records: float
    seconds: float

    @property
    def lm_loss(self) -> float:
        return self.figures["lm_loss"]


def train_all(
    of: Teacher, students: Sequence[Student], given: Options, part: Part | None = None
) -> dict[Student, list[Result]]:
    """
    The results of students, a list over the seeds for each; those that are there already are not made again.

    Args:
        of: The teacher.
        students: In any order; seeds come first, so that a study that is stopped has whole seeds.
        given: How the script was called.
        part: What they learn from instead of ``of.train``; students that do must say so in their ``label``.
    """
    directory = of.directory / "students"
    directory.mkdir(exist_ok=True)
    wanted = [(student, seed) for seed in given.seeds for student in students]
    found: dict[tuple[Student, int], Result] = {}
    with show("students", len(wanted), unit="student") as reach:
        while len(found) < len(wanted):
            before = len(found)
            for student, seed in wanted:
                path = directory / f"{_name(of, student, seed)}.json"
                if (student, seed) in found:
                    continue
                with _claimed(path) as is_mine:
                    if path.exists():
                        found[student, seed] = Result(**json.loads(path.read_text())["result"])
                    elif is_mine:
                        found[student, seed] = _run(of, part or of.train, student, seed)
                        kept = {
                            "student": _asdict(student),
                            "seed": seed,
                            "result": dataclasses.asdict(found[student, seed]),
                        }
                        write_atomically(path, json.dumps(kept, indent=1).encode())
                reach(len(found))
            if len(found) == before:  # what is left another process makes
                time.sleep(1)
    return {student: [found[student, seed] for seed in given.seeds] for student in students}


def means(results: Sequence[Result], figure: str = "lm_loss") -> Mean:
    return Mean.of([result.records if figure == "records" else result.figures[figure] for result in results])


def percent(results: Sequence[Result], ce: Sequence[Result], full: Sequence[Result]) -> Mean:
    """'% CE to FullKD' of each seed, of its own gap."""
    triples = zip(results, ce, full, strict=True)
    return Mean.of([100 * (c.lm_loss - r.lm_loss) / (c.lm_loss - f.lm_loss) for r, c, f in triples])


def columns(results: Sequence[Result], ce: Sequence[Result], full: Sequence[Result]) -> dict[str, Mean]:
    """What the tables of students say of one of them."""
    return {
        "LM loss": means(results),
        "% CE to FullKD": percent(results, ce, full),
        "KL": means(results, "kl"),
        "ECE %": means(results, "calibration_error"),
        "confidence gap %": means(results, "confidence_gap"),
        "sum of min(p, q) %": means(results, "acceptance_rate"),
        "top-1 agreement %": means(results, "top1_agreement"),
    }


def rounds_for(
    of: Teacher, unique: float, sampler: str = "multinomial", *, temperature: float = 1.0, most: int = 127
) -> int:
    """The number of draws whose mean number of records comes closest to ``unique``; temperature is the proposal's."""
    hidden = of.train.hidden[:: max(1, len(of.train.hidden) // 32)].flatten(0, 1)
    rounds = sorted({round(most ** (i / 24)) for i in range(25)})
    sums = np.zeros(len(rounds))
    for rows in hidden.split(512):
        p_RV = (temperature * of.logits(rows).double()).softmax(-1)
        for i, n in enumerate(rounds):
            drawn = -torch.expm1(n * torch.log1p(-p_RV)) if sampler == "multinomial" else (n * p_RV).clamp(max=1)
            sums[i] += float(drawn.sum())
    every = np.arange(1, most + 1)
    return int(every[np.abs(np.interp(every, rounds, sums / len(hidden)) - unique).argmin()])


def start(of: Teacher, student: Student, seed: int) -> Any:
    """A student before its first step; of a seed and a size all are equal."""
    sizes = of.size.student
    width = student.width or sizes["hidden_size"]
    heads = max(1, sizes["num_heads"] * width // sizes["hidden_size"])
    return new_llama(
        vocab_size=of.vocab_size, hidden_size=width, num_layers=student.layers or sizes["num_layers"],
        num_heads=heads, max_positions=of.size.seq_len, seed=seed,
    ).to(of.head.device)  # fmt: skip


def trained(of: Teacher, student: Student, seed: int) -> Any:
    """A student itself, for scripts that ask for more than its figures; trained each time."""
    return train_one(of, of.train, student, seed)[0]


def _run(of: Teacher, part: Part, student: Student, seed: int) -> Result:
    started = time.monotonic()
    model, records = train_one(of, part, student, seed)
    figures, reliability = measure(of, model)
    return Result(figures, reliability, records, time.monotonic() - started)


def train_one(of: Teacher, part: Part, student: Student, seed: int, stop: int | None = None) -> tuple[Any, float]:
    """A trained student, or one after ``stop`` steps of its run; and its records per position."""
    sizes = of.size.student
    steps, size = sizes["steps"] * student.longer, sizes["batch_size"] * student.batch
    order = torch.Generator().manual_seed(seed)
    per_epoch = min(steps * size // student.epochs, len(part.tokens))
    epochs = [torch.randperm(per_epoch, generator=order) for _ in range(math.ceil(steps * size / per_epoch))]
    stream = torch.cat(epochs)[: steps * size].view(steps, size).to(part.tokens.device)
    model = start(of, student, seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.95), weight_decay=0.0)
    num_records = num_positions = 0
    for step, rows in enumerate(stream[:stop]):
        tokens_BT = part.tokens[rows]
        targets: Any = DenseTeacher(part.hidden[rows].flatten(0, 1), of.head)
        if student.method == "ce":
            targets = _one_hot(tokens_BT[:, 1:].flatten())
        elif student.records is not None:
            epoch = step * size // per_epoch
            targets = _drawn(of, part.hidden[rows], student.records, rows.tolist(), seed, epoch)
            num_records += targets.token_ids.numel()
        num_positions += tokens_BT[:, 1:].numel()
        hidden_PD, head, _ = run_to_head(model, tokens_BT[:, :-1])
        labels_P, weights_P = tokens_BT[:, 1:].flatten(), None
        if student.lr_ratio != 1:
            logp_PV = of.logits(part.hidden[rows]).flatten(0, 1).log_softmax(1)
            sure_P = logp_PV.gather(1, labels_P[:, None])[:, 0]
            weights_P = easy_hard_weights(sure_P, labels_P, lr_ratio=student.lr_ratio)
        loss = linear_sparse_kl(
            hidden_PD, head, targets, method="random_sampling" if student.method == "ce" else student.method,
            labels_P=labels_P, ce_weight=student.ce_weight, position_weights_P=weights_P, **dict(student.loss),
        )  # fmt: skip
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = sizes["learning_rate"] * _schedule(step, steps)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return model, num_records / num_positions


def _schedule(step: int, steps: int, warmup: float = 0.04, least: float = 0.1) -> float:
    """The paper's appendix F: a linear rise over 4 % of the steps, then a cosine down to a tenth."""
    rise = math.ceil(warmup * steps)
    if step < rise:
        return (step + 1) / rise
    return least + (1 - least) * 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


def _drawn(of: Teacher, hidden_BTD: Tensor, records: Records, rows: Sequence[int], seed: int, epoch: int) -> Targets:
    logits_BTV = of.logits(hidden_BTD)
    drawn = [
        records.draw(logits_TV, seed=seed, sequence=row, epoch=epoch)
        for logits_TV, row in zip(logits_BTV, rows, strict=True)
    ]
    sizes = np.concatenate([[0], *(np.diff(one.offsets) for one in drawn)])
    ids = torch.from_numpy(np.concatenate([one.token_ids for one in drawn]).astype(np.int64))
    if drawn[0].counts is not None:
        probs = torch.from_numpy(np.concatenate([one.counts for one in drawn])).float() / records.rounds
    else:
        probs = torch.from_numpy(np.concatenate([one.weights for one in drawn]))
    device = hidden_BTD.device
    return Targets(ids.to(device), probs.to(device), torch.from_numpy(np.cumsum(sizes)))


def _one_hot(labels_P: Tensor) -> Targets:
    return Targets(labels_P, torch.ones(len(labels_P), device=labels_P.device), torch.arange(len(labels_P) + 1))


@torch.no_grad()
def measure(of: Teacher, model: Any) -> tuple[dict[str, float], list[list[float]]]:
    """Figures of a model on the held-out text, and its reliability: confidence, accuracy and share of each bin."""
    sums = EvaluationSums()
    model.eval()
    for tokens_BT, hidden_BTD in zip(of.held_out.tokens.split(8), of.held_out.hidden.split(8), strict=True):
        logits_PV = outputs.logits(model, tokens_BT[:, :-1]).flatten(0, 1)
        sums.update(logits_PV, tokens_BT[:, 1:].flatten(), of.logits(hidden_BTD).flatten(0, 1))
    table = sums.reliability
    bins = [b for b in zip(table.confidence, table.accuracy, table.share, strict=True) if b[2] > 0]
    gap = sum(share * (confidence - accuracy) for confidence, accuracy, share in bins)
    figures = {
        "lm_loss": sums.lm_loss, "kl": sums.kl, "calibration_error": 100 * table.calibration_error,
        "confidence_gap": 100 * gap, "acceptance_rate": 100 * sums.acceptance_rate,
        "top1_agreement": 100 * sums.top1_agreement,
    }  # fmt: skip
    return figures, [list(b) for b in bins]


def _asdict(student: Student) -> dict[str, Any]:
    """What is not as by default, so that a result keeps its name when students learn something new."""
    defaults = dataclasses.asdict(Student())
    return {name: value for name, value in dataclasses.asdict(student).items() if value != defaults[name]}


def _name(of: Teacher, student: Student, seed: int) -> str:
    said = json.dumps([_asdict(student), seed, dataclasses.asdict(of.size), round(of.lm_loss, 6)], sort_keys=True)
    return fingerprint(said.encode())


@contextmanager
def _claimed(path: Path) -> Iterator[bool]:
    """Whether this process is the one that makes a result; a process that dies lets go of it."""
    if path.exists():
        yield False
        return
    lock = path.with_suffix(".lock")
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
            return
        yield True
    if path.exists():
        lock.unlink(missing_ok=True)
