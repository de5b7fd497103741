"""
Table 12: other divergences than forward KL.

The paper: L1 diverges, MSE and reverse KL are far worse than CE, forward and reverse together lie between CE and
forward KL.  Here each is taken of the teacher's whole distribution, so that the divergence alone differs, at one
learning rate for all; JSD and total variation, which the paper has not, stand beside them.
"""

from __future__ import annotations

from typing import Any

from bench import CONTRADICTED, NOT_SHOWN, SHOWN, Claim, options
from drawing import bars
from students import CE, DIGITS, FULL, Student, columns, means, train_all
from teacher import teacher

NAMES = {
    "L1": "l1", "total variation": "total_variation", "MSE": "mse", "JSD": "jsd", "reverse KL": "reverse_kl",
    "forward + reverse KL": "forward_reverse_kl",
}  # fmt: skip
PAPER = {"CE": 2.81, "L1": "∞", "MSE": 5.38, "reverse KL": 3.37, "forward + reverse KL": 2.78, "forward KL": 2.75}


def main() -> None:
    given = options(__doc__)
    claim = Claim("table12", "forward KL has less LM loss than any other divergence (Table 12)", given)
    of = teacher(given)
    students = {"CE": CE}
    students |= {name: Student(method="full", loss=(("divergence", d),)) for name, d in NAMES.items()}
    students["forward KL"] = FULL
    results = train_all(of, list(students.values()), given)
    for name, student in students.items():
        paper = {"LM loss": PAPER[name]} if name in PAPER else {}
        claim.add(name, paper=paper, **columns(results[student], results[CE], results[FULL]))
    apart = {name: (means(results[students[name]]) - means(results[FULL])).within() for name in NAMES}
    rule = "each other divergence has more LM loss than forward KL, with 95 % confidence"
    behind = [name for name in NAMES if apart[name][0] > 0]
    better = [name for name in NAMES if apart[name][1] < 0]
    verdict = SHOWN if len(behind) == len(NAMES) else CONTRADICTED if better else NOT_SHOWN
    notes = [f"{'better' if name in better else 'not told apart'}: {name}" for name in NAMES if name not in behind]

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        bars(axes, {name: means(results[student]) for name, student in students.items()}, room=0.3)
        axes.set_xlabel("LM loss, nats")

    claim.end(rule, verdict, draw, digits=DIGITS, notes=notes)


if __name__ == "__main__":
    main()
