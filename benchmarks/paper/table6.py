"""
Table 6: longer training.

The paper: ten times the tokens (100 B), where CE, random sampling and FullKD have the same LM loss, and both students
of the teacher are nearer to it.  Here: three times the steps over three times the text.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from bench import CONTRADICTED, NOT_SHOWN, SHOWN, Claim, options
from drawing import curve
from students import CE, DIGITS, FULL, Records, Student, columns, means, rounds_for, train_all
from teacher import packed, read, teacher

LONGER = 3
PAPER = {
    "CE, longer": {"LM loss": 2.48, "ECE %": 0.7, "top-1 agreement %": 64.6},
    "random sampling 12, longer": {"LM loss": 2.48, "ECE %": 0.3, "top-1 agreement %": 65.7},
    "FullKD, longer": {"LM loss": 2.48, "ECE %": 0.4, "top-1 agreement %": 65.8},
}


def main() -> None:
    given = options(__doc__)
    claim = Claim("table6", "random sampling stays with FullKD in longer training (Table 6)", given)
    of = teacher(given)
    short = {
        "CE": CE,
        "random sampling 12": Student(records=Records(rounds=rounds_for(of, 12.0))),
        "FullKD": FULL,
    }
    longer = {f"{name}, longer": dataclasses.replace(student, longer=LONGER) for name, student in short.items()}
    results = train_all(of, list(short.values()), given)
    sequences = packed(of.directory, of.size, "tokens")
    count = min(LONGER * of.size.student["steps"] * of.size.student["batch_size"], len(sequences))
    part = read(given, of.directory / "teacher" / "model", sequences, count)
    results |= train_all(of, list(longer.values()), given, part)
    for group in (short, longer):
        ce, _, full = (results[student] for student in group.values())
        for name, student in group.items():
            claim.add(name, paper=PAPER.get(name), **columns(results[student], ce, full))
    ce, ours, full = (results[student] for student in longer.values())
    gain, lost = means(ce, "kl") - means(full, "kl"), means(ours, "kl") - means(full, "kl")
    rule = (
        "trained longer, random sampling loses less than a sixth of FullKD's gain over CE in KL, with 95 % confidence"
    )
    sixth = gain.mean / 6
    verdict = SHOWN if lost.within()[1] < sixth else CONTRADICTED if lost.within()[0] > sixth else NOT_SHOWN

    def draw(figure: Any) -> None:
        for axes, name, label in zip(
            figure.subplots(1, 2), ("lm_loss", "kl"), ("LM loss, nats", "KL to the teacher, nats"), strict=True
        ):
            for number, (one, other) in enumerate(zip(short, longer, strict=True)):
                found = [means(results[short[one]], name), means(results[longer[other]], name)]
                curve(axes, number, [1, LONGER], found, one)
            axes.set_xticks([1, LONGER], ["1", f"{LONGER}"])
            axes.set_xlabel("steps, and text, times")
            axes.set_ylabel(label)
        figure.axes[0].legend(frameon=False)

    claim.end(rule, verdict, draw, digits=DIGITS)


if __name__ == "__main__":
    main()
