"""
Figure 3: calibration of students, by method and by the number of tokens.

The paper: Top-K students are over-confident, the more so the smaller K; random sampling is as well calibrated as CE and
FullKD at every number of tokens.  Here students are short of training, and not calibrated by themselves, so that what
counts is the distance of confidence less accuracy to FullKD's.
"""

from __future__ import annotations

from typing import Any

from bench import CONTRADICTED, NOT_SHOWN, SHOWN, Claim, options
from drawing import COLOURS, DASHES, MARKERS, ZERO, curve, logarithmic
from students import CE, DIGITS, FULL, Records, Student, means, rounds_for, train_all
from teacher import teacher

TOKENS = (2.4, 5.0, 12.0, 24.5, 57.0)
KS = (3, 5, 12, 25, 50)


def main() -> None:
    given = options(__doc__)
    claim = Claim("figure3", "random sampling is calibrated with any number of tokens, Top-K is not (Figure 3)", given)
    of = teacher(given)
    sampled = {u: Student(records=Records(rounds=rounds_for(of, u))) for u in TOKENS}
    kept = {k: Student(records=Records(sampler="topk", k=k), method="topk") for k in KS}
    results = train_all(of, [CE, FULL, *sampled.values(), *kept.values()], given)
    named = {"CE": CE, "FullKD": FULL}
    named |= {f"Top-K {k}": student for k, student in kept.items()}
    named |= {f"random sampling {u:g}": student for u, student in sampled.items()}
    apart = {}
    for name, student in named.items():
        gap = means(results[student], "confidence_gap")
        apart[name] = gap - means(results[FULL], "confidence_gap")
        error = means(results[student], "calibration_error")
        claim.add(name, **{"ECE %": error, "confidence gap %": gap, "less FullKD's": apart[name]})
    rule = (
        "confidence less accuracy of random sampling is within 2 points of FullKD's at every number of tokens, that of "
        "Top-K 3 and 5 above it by more than 2, each with 95 % confidence"
    )
    near = all(max(map(abs, apart[f"random sampling {u:g}"].within())) < 2 for u in TOKENS)
    above = all(apart[f"Top-K {k}"].within()[0] > 2 for k in KS[:2])
    far = any(apart[f"random sampling {u:g}"].within()[0] > 2 for u in TOKENS)
    verdict = SHOWN if near and above else CONTRADICTED if far else NOT_SHOWN

    def draw(figure: Any) -> None:
        left, right = figure.subplots(1, 2)
        shown = {"CE": CE, "FullKD": FULL, "Top-K 5": kept[5], "random sampling 5": sampled[5.0]}
        for number, (name, student) in enumerate(shown.items()):
            bins = sorted(row for row in results[student][0].reliability if row[2] > 0.002)
            left.plot([b[0] for b in bins], [b[1] for b in bins], color=COLOURS[number], linestyle=DASHES[number],
                      marker=MARKERS[number], markersize=4, label=name)  # fmt: skip
        left.plot([0, 1], [0, 1], color="0.6", linewidth=0.8)
        left.set_xlabel("confidence")
        left.set_ylabel("accuracy (first seed)")
        left.legend(frameon=False)
        for number, (label, names) in enumerate(
            {"Top-K": [f"Top-K {k}" for k in KS], "random sampling": [f"random sampling {u:g}" for u in TOKENS]}.items()
        ):
            x = [means(results[named[name]], "records").mean for name in names]
            curve(right, number, x, [apart[n] for n in names], label)
        right.axhline(0, color=ZERO, linewidth=0.8)
        logarithmic(right, [2, 5, 12, 25, 57])
        right.set_xlabel("tokens per position")
        right.set_ylabel("confidence less accuracy, to FullKD's, points")
        right.legend(frameon=False)

    claim.end(rule, verdict, draw, digits={**DIGITS, "less FullKD's": 1})


if __name__ == "__main__":
    main()
