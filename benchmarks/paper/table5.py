"""
Table 5: random sampling against the number of rounds.

The paper: 300 M students of a 3 B teacher, 10 B tokens; 5 unique tokens have FullKD's loss, 2.4 lose 0.02 nats of the
gain of 0.06, calibration is good at every number.  The study (``study.py``) has both samplers and more seeds.
"""

from __future__ import annotations

from typing import Any

from bench import CONTRADICTED, NOT_SHOWN, SHOWN, Claim, options
from drawing import curve, levels, logarithmic
from students import CE, DIGITS, FULL, Records, Student, columns, means, rounds_for, train_all
from teacher import teacher

UNIQUE = {
    2.4: {"LM loss": 2.77, "ECE %": 1.0}, 5.0: {"LM loss": 2.75, "ECE %": 1.1}, 12.0: {"LM loss": 2.75, "ECE %": 0.8},
    24.5: {"LM loss": 2.75, "ECE %": 1.1}, 57.0: {"LM loss": 2.74, "ECE %": 0.9},
}  # fmt: skip


def main() -> None:
    given = options(__doc__)
    claim = Claim("table5", "12 unique tokens of random sampling have FullKD's loss and calibration (Table 5)", given)
    of = teacher(given)
    students = {f"{unique:g} tokens": Student(records=Records(rounds=rounds_for(of, unique))) for unique in UNIQUE}
    students = {"CE": CE, **students, "FullKD": FULL}
    results = train_all(of, list(students.values()), given)
    paper = {"CE": {"LM loss": 2.81, "ECE %": 0.4}, "FullKD": {"LM loss": 2.75, "ECE %": 0.7}}
    paper |= {f"{unique:g} tokens": said for unique, said in UNIQUE.items()}
    for name, student in students.items():
        found = columns(results[student], results[CE], results[FULL])
        claim.add(name, paper=paper[name], records=means(results[student], "records"), **found)
    twelve = results[students["12 tokens"]]
    gain = means(results[CE]) - means(results[FULL])
    lost = (means(twelve) - means(results[FULL])).within()
    apart = (means(twelve, "confidence_gap") - means(results[FULL], "confidence_gap")).mean
    rule = (
        "12 tokens lose less than a sixth of FullKD's gain in LM loss (the paper's 0.01 of 0.06 nats, its last digit), "
        "with 95 % confidence, and confidence less accuracy is within 1 point of FullKD's"
    )
    sixth = gain.mean / 6
    verdict = SHOWN if lost[1] < sixth and abs(apart) < 1 else CONTRADICTED if lost[0] > sixth else NOT_SHOWN

    def draw(figure: Any) -> None:
        names, ends = [f"{unique:g} tokens" for unique in UNIQUE], {"CE": CE, "FullKD": FULL}
        labels = {"lm_loss": "LM loss, nats", "confidence_gap": "confidence less accuracy, points"}
        for axes, (name, label) in zip(figure.subplots(1, 2), labels.items(), strict=True):
            found = [means(results[students[one]], name) for one in names]
            x = [means(results[students[one]], "records").mean for one in names]
            curve(axes, 0, x, found, "random sampling")
            levels(axes, {other: means(results[student], name) for other, student in ends.items()})
            logarithmic(axes, [2, 5, 12, 25, 57])
            axes.set_xlabel("records per position")
            axes.set_ylabel(label)
        figure.axes[0].legend(frameon=False)

    claim.end(rule, verdict, draw, digits=DIGITS)


if __name__ == "__main__":
    main()
