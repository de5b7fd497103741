"""
Does the noise that draws add to the gradient explain what they cost?  The instrument against the study.

``sklformat estimate --student`` measures the share: the variance that drawn records add to the student's gradient over
the variance that it has from the text.  Here the share of each arm of the study, measured with a FullKD student early
and late in its run, stands beside what the arm lost: its KL to the teacher less FullKD's, over the study's seeds.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from bench import CONTRADICTED, NOT_SHOWN, SHOWN, Claim, options
from drawing import COLOURS, MARKERS, ZERO
from students import CE, FULL, Records, Student, means, rounds_for, train_all, train_one
from teacher import model_of, teacher

from sklformat.distill.student.measures.noise import Lesson, measure_noise
from sklformat.settings.estimate import NOISE

UNIQUE = {"multinomial": (2.4, 5.0, 12.0, 57.0), "systematic": (2.4, 5.0, 12.0)}
NUM_SEQUENCES = 48
TRIED = (8, 12, 14, 18, 20, 24, 34, 38, 42, 50)  # rounds beside the study's, for the fewest below the default limit


def main() -> None:
    given = options(__doc__)
    claim = Claim("noise", "noise of the gradient explains what few records cost (sections 4.2, 4.3)", given)
    of = teacher(given)
    arms = {(s, n): u for s, every in UNIQUE.items() for u in every for n in [rounds_for(of, u, s)]}
    students = {arm: Student(records=Records(sampler=arm[0], rounds=arm[1])) for arm in arms}
    results = train_all(of, [CE, FULL, *students.values()], given)

    steps = of.size.student["steps"]
    measured = {
        name: train_one(of, of.train, FULL, 0, stop)[0]
        for name, stop in (("early", math.ceil(steps / 8)), ("late", steps))
    }
    for model in measured.values():
        model.eval()
    count = min(NUM_SEQUENCES, len(of.held_out.tokens))
    learnt = torch.ones(of.size.seq_len, dtype=torch.bool)
    table = measure_noise(
        model_of(given, of.directory / "teacher" / "model").eval(),
        measured,
        [Lesson(tokens[:-1].cpu(), learnt) for tokens in of.held_out.tokens[:count]],
        vocab_size=of.vocab_size,
        rounds=sorted({rounds for _, rounds in arms} | set(() if given.is_quick else TRIED)),
    )
    rows = {arm: i for i, arm in enumerate(zip(table.samplers, table.rounds, strict=True)) if arm in arms}
    lost, shares = {}, {}
    for arm, student in students.items():
        lost[arm] = means(results[student], "kl") - means(results[FULL], "kl")
        shares[arm] = table.students["late"].shares[rows[arm]]
        early, late = (
            f"{table.students[when].shares[rows[arm]]:.3f} ± {table.students[when].share_errors[rows[arm]]:.3f}"
            for when in ("early", "late")
        )
        claim.add(
            f"{arm[0]}, N = {arm[1]}",
            records=means(results[student], "records").mean,
            **{"share, early": early, "share, late": late, "KL to FullKD": lost[arm]},
            **{"lost / share": lost[arm].mean / shares[arm]},
        )
    x, y = [math.log(shares[arm]) for arm in arms], [math.log(max(lost[arm].mean, 1e-6)) for arm in arms]
    slope, correlation = _line(x, y)
    rule = (
        "over all arms the logarithm of what is lost and that of the late share correlate by more than 0.95: the share "
        "tells more of it than sampler or number of records"
    )
    verdict = SHOWN if correlation > 0.95 else CONTRADICTED if correlation < 0.5 else NOT_SHOWN
    gain = (means(results[CE], "kl") - means(results[FULL], "kl")).mean
    notes = [f"lost ∝ share^{slope:.2f}, correlation of the logarithms {correlation:.3f}"]
    for share in (0.02, 0.05, 0.1, 0.2):
        x0, y0 = sum(x) / len(x), sum(y) / len(y)
        loss = math.exp(y0 + slope * (math.log(share) - x0))
        percent = 100 * loss / gain
        notes.append(f"at a share of {share:g} the line says {loss:.3f} nats of KL lost, {percent:.1f} % of the gain")

    late = table.students["late"]
    for sampler in UNIQUE:
        few = [i for i, one in enumerate(table.samplers) if one == sampler and late.shares[i] <= NOISE]
        if few:
            notes.append(
                f"the fewest {sampler} rounds tried of which the late share is at most {NOISE:g}: "
                f"{table.rounds[few[0]]}, {table.unique_tokens[few[0]]:.1f} records, {late.shares[few[0]]:.3f} "
                f"± {late.share_errors[few[0]]:.3f}"
            )

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        for number, sampler in enumerate(UNIQUE):
            mine = [arm for arm in arms if arm[0] == sampler]
            axes.errorbar([shares[arm] for arm in mine], [lost[arm].mean for arm in mine],
                          [lost[arm].error for arm in mine], color=COLOURS[number], marker=MARKERS[number],
                          linestyle="none", capsize=4, label=sampler)  # fmt: skip
        ends = [min(shares.values()), max(shares.values())]
        x0, y0 = sum(x) / len(x), sum(y) / len(y)
        axes.plot(ends, [math.exp(y0 + slope * (math.log(e) - x0)) for e in ends], color=ZERO, linewidth=0.8)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("share of the gradient's variance that draws add, late in training")
        axes.set_ylabel("KL to the teacher less FullKD's, nats")
        axes.legend(frameon=False)

    claim.end(rule, verdict, draw, notes=notes, digits={"records": 1, "lost / share": 2})


def _line(x: list[float], y: list[float]) -> tuple[float, float]:
    """Slope and correlation."""
    mx, my = sum(x) / len(x), sum(y) / len(y)
    xx, yy = sum((a - mx) ** 2 for a in x), sum((b - my) ** 2 for b in y)
    xy = sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True))
    return xy / xx, xy / math.sqrt(xx * yy)


if __name__ == "__main__":
    main()
