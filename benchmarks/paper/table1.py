"""
Table 1: students of a vanilla Top-K teacher, against K, and of Top-p 0.98 with a cap on K.

The paper: 300 M students of a 3 B teacher, 10 B tokens; Top-K 300 keeps 77 % of FullKD's gain, and Top-K 12 and fewer
are worse than cross-entropy.  Its small K are over-confident.
"""

from __future__ import annotations

from typing import Any

from bench import CONTRADICTED, NOT_SHOWN, SHOWN, Claim, options
from drawing import curve, levels, logarithmic
from students import CE, DIGITS, FULL, Records, Student, columns, means, train_all
from teacher import teacher

KS = (3, 5, 12, 25, 50, 100)
PAPER = {
    "CE": {"% CE to FullKD": 0}, "Top-K 50": {"% CE to FullKD": 5, "ECE %": 2.2},
    "Top-p 0.98, K ≤ 100": {"% CE to FullKD": 47, "ECE %": 1.7}, "Top-K 100": {"% CE to FullKD": 55, "ECE %": 1.1},
    "FullKD": {"% CE to FullKD": 100, "ECE %": 0.7},
}  # fmt: skip


def main() -> None:
    given = options(__doc__)
    claim = Claim("table1", "Top-K needs many tokens, and is over-confident with few (Table 1)", given)
    of = teacher(given)
    students = {"CE": CE}
    students |= {f"Top-K {k}": Student(records=Records(sampler="topk", k=k), method="topk") for k in KS}
    students["Top-p 0.98, K ≤ 100"] = Student(records=Records(sampler="topp", k=100, p=0.98), method="topk")
    students["FullKD"] = FULL
    results = train_all(of, list(students.values()), given)
    for name, student in students.items():
        found = columns(results[student], results[CE], results[FULL])
        claim.add(name, paper=PAPER.get(name), records=means(results[student], "records"), **found)
    over = [means(results[students[f"Top-K {k}"]], "confidence_gap") for k in KS]
    losses = [means(results[students[f"Top-K {k}"]]) for k in KS]
    falls = all((b - a).within()[1] < 0 for a, b in zip(losses, losses[2:], strict=False))
    behind = (losses[KS.index(12)] - means(results[FULL])).within()[0] > 0
    rule = (
        "Top-K 12 is worse than FullKD, four times K is always better, and the smallest K is over-confident by more "
        "than FullKD, each with 95 % confidence"
    )
    confident = (over[0] - means(results[FULL], "confidence_gap")).within()[0] > 0
    worse = (losses[KS.index(12)] - means(results[FULL])).within()[1] < 0
    verdict = SHOWN if falls and behind and confident else CONTRADICTED if worse else NOT_SHOWN

    def draw(figure: Any) -> None:
        left, right = figure.subplots(1, 2)
        ends = {"CE": CE, "FullKD": FULL}
        for axes, figures, label in (
            (left, losses, "LM loss, nats"),
            (right, over, "confidence less accuracy, points"),
        ):
            curve(axes, 0, KS, figures, "Top-K")
            name = "lm_loss" if axes is left else "confidence_gap"
            levels(axes, {other: means(results[student], name) for other, student in ends.items()})
            logarithmic(axes, KS)
            axes.set_xlabel("K")
            axes.set_ylabel(label)
        left.legend(frameon=False)

    claim.end(rule, verdict, draw, digits=DIGITS)


if __name__ == "__main__":
    main()
