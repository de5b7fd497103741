"""
Table 10: the temperature t of the proposal q ∝ p^t.

The paper: 0.8, 1.0 and 1.2 train equally well at about 57 unique tokens; t = 0, which draws from all ids alike,
diverges.  The weights are divided by their sum, as there.
"""

from __future__ import annotations

from typing import Any

from bench import CONTRADICTED, NOT_SHOWN, SHOWN, Claim, options
from drawing import bars
from students import CE, DIGITS, FULL, Records, Student, columns, means, rounds_for, train_all
from teacher import teacher

UNIFORM = 0.001  # the least exponent that draws take; e^0.02 between the ends of a row of 20 nats
UNIQUE = 57.0
PAPER = {
    "t = 0": {"LM loss": "∞"}, "t = 0.8": {"LM loss": 2.74, "ECE %": 0.7, "top-1 agreement %": 61.9},
    "t = 1": {"LM loss": 2.75, "ECE %": 0.8, "top-1 agreement %": 61.8},
    "t = 1.2": {"LM loss": 2.74, "ECE %": 0.8, "top-1 agreement %": 61.9},
}  # fmt: skip


def main() -> None:
    given = options(__doc__)
    claim = Claim("table10", "t = 0.8 to 1.2 are alike, and t = 0 diverges (Table 10)", given)
    of = teacher(given)
    students = {}
    for t in (UNIFORM, 0.8, 1.0, 1.2):
        rounds = rounds_for(of, UNIQUE, temperature=t)
        name = "t = 0" if t == UNIFORM else f"t = {t:g}"
        students[name] = Student(records=Records(rounds=rounds, proposal_temperature=t))
    results = train_all(of, [CE, FULL, *students.values()], given)
    for name, student in {"CE": CE, **students, "FullKD": FULL}.items():
        found = columns(results[student], results[CE], results[FULL])
        claim.add(name, paper=PAPER.get(name), records=means(results[student], "records"), **found)
    gain = (means(results[CE]) - means(results[FULL])).mean
    base = means(results[students["t = 1"]])
    apart = {name: (means(results[students[name]]) - base).within() for name in ("t = 0", "t = 0.8", "t = 1.2")}
    rule = (
        "0.8 and 1.2 are within a sixth of FullKD's gain over CE of t = 1, and t = 0 is worse than CE, each with 95 % "
        "confidence"
    )
    alike = all(max(map(abs, apart[name])) < gain / 6 for name in ("t = 0.8", "t = 1.2"))
    diverges = (means(results[students["t = 0"]]) - means(results[CE])).within()[0] > 0
    differ = any(min(map(abs, apart[n])) > gain / 6 and apart[n][0] * apart[n][1] > 0 for n in ("t = 0.8", "t = 1.2"))
    verdict = SHOWN if alike and diverges else CONTRADICTED if differ else NOT_SHOWN

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        named = {"CE": CE, **students, "FullKD": FULL}
        bars(axes, {name: means(results[student]) for name, student in named.items()}, room=0.2)
        axes.set_xlabel("LM loss, nats")

    claim.end(rule, verdict, draw, digits=DIGITS)


if __name__ == "__main__":
    main()
