"""
Table 9: cross-entropy mixed in, and a higher rate for hard tokens.

The paper: with 0.1 to 0.2 of cross-entropy and a rate of hard tokens twice that of easy ones random sampling passes
FullKD, by up to 25 % of FullKD's gain.  Hard: the teacher's confidence in the label is in the lower half of a step's.
"""

from __future__ import annotations

from typing import Any

from bench import CONTRADICTED, NOT_SHOWN, SHOWN, Claim, options
from drawing import ZERO, curve
from students import CE, DIGITS, FULL, Records, Student, means, percent, rounds_for, train_all
from teacher import teacher

ALPHAS, RATIOS = (0.0, 0.1, 0.3), (1.0, 2.0)
PAPER = {(0.0, 1.0): 98, (0.1, 1.0): 95, (0.3, 1.0): 101, (0.0, 2.0): 112, (0.1, 2.0): 125, (0.3, 2.0): 116}


def main() -> None:
    given = options(__doc__)
    claim = Claim("table9", "CE mixed in and higher rates for hard tokens pass FullKD (Table 9)", given)
    of = teacher(given)
    rounds = rounds_for(of, 12.0)
    students = {
        (alpha, ratio): Student(records=Records(rounds=rounds), ce_weight=alpha, lr_ratio=ratio)
        for ratio in RATIOS
        for alpha in ALPHAS
    }
    results = train_all(of, [CE, FULL, *students.values()], given)
    shares = {at: percent(results[student], results[CE], results[FULL]) for at, student in students.items()}
    for (alpha, ratio), student in students.items():
        claim.add(
            f"α {alpha:g}, ratio {ratio:g}",
            paper={"% CE to FullKD": PAPER[alpha, ratio]},
            **{
                "% CE to FullKD": shares[alpha, ratio],
                "LM loss": means(results[student]),
                "confidence gap %": means(results[student], "confidence_gap"),
            },
        )
    passes = [shares[at].within()[0] > 100 for at in students]
    better = (shares[0.1, 2.0] - shares[0.0, 1.0]).within()
    under = means(results[students[0.1, 2.0]], "confidence_gap") - means(results[students[0.0, 1.0]], "confidence_gap")
    rule = "α 0.1 with ratio 2 is better than random sampling alone, and some mix passes FullKD, with 95 % confidence"
    verdict = SHOWN if better[0] > 0 and any(passes) else CONTRADICTED if better[1] < 0 else NOT_SHOWN
    notes = [f"ratio 2 makes students less confident, as the paper warns: {under.text(1)} points with α 0.1"]

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        for number, ratio in enumerate(RATIOS):
            found = [shares[alpha, ratio] for alpha in ALPHAS]
            curve(axes, number, ALPHAS, found, f"ratio {ratio:g}")
        axes.axhline(100, color=ZERO, linewidth=0.8)
        axes.set_xlabel("weight α of cross-entropy")
        axes.set_ylabel("% CE to FullKD")
        axes.legend(frameon=False)

    claim.end(rule, verdict, draw, digits=DIGITS, notes=notes)


if __name__ == "__main__":
    main()
