"""
Figure 4: what random sampling gains over CE, by the size of the student.

The paper: the gain in 0-shot scores grows from 300 M to 3 B parameters.  Scores need large students; here it is the
gain in LM loss, of which the paper's text says no more than that it persists.
"""

from __future__ import annotations

from typing import Any

from bench import CONTRADICTED, NOT_SHOWN, SHOWN, Claim, options
from drawing import curve
from students import DIGITS, Records, Student, means, percent, rounds_for, start, train_all
from teacher import teacher

SHAPES = ((0.5, 2), (1, 2), (2, 3))  # of the usual width; layers


def main() -> None:
    given = options(__doc__)
    claim = Claim("figure4", "the gain over CE grows with the student (Figure 4)", given)
    of = teacher(given)
    usual, rounds = of.size.student["hidden_size"], rounds_for(of, 12.0)
    if given.is_quick:
        shapes = [(usual, 1), (2 * usual, 1)]
    else:
        shapes = [(round(usual * times), layers) for times, layers in SHAPES]
    gains, sizes = [], []
    for width, layers in shapes:
        as_usual = (width, layers) == (usual, of.size.student["num_layers"])
        shape = {} if as_usual else {"width": width, "layers": layers}
        ce, ours, full = (
            Student(method="ce", **shape), Student(records=Records(rounds=rounds), **shape),
            Student(method="full", **shape),
        )  # fmt: skip
        results = train_all(of, [ce, ours, full], given)
        sizes.append(sum(p.numel() for p in start(of, ours, 0).parameters()) / 1e6)
        gains.append(means(results[ce]) - means(results[ours]))
        claim.add(
            f"{sizes[-1]:.2f} M parameters",
            **{
                "CE": means(results[ce]),
                "random sampling 12": means(results[ours]),
                "FullKD": means(results[full]),
                "gain over CE": gains[-1],
                "% CE to FullKD": percent(results[ours], results[ce], results[full]),
            },
        )
    grows = (gains[-1] - gains[0]).within()
    rule = "the largest student gains more LM loss over CE than the smallest, and all gain, with 95 % confidence"
    all_gain = all(gain.within()[0] > 0 for gain in gains)
    verdict = SHOWN if grows[0] > 0 and all_gain else CONTRADICTED if grows[1] < 0 else NOT_SHOWN

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        curve(axes, 0, sizes, gains)
        axes.set_xlabel("parameters of the student, millions")
        axes.set_ylabel("LM loss of CE less random sampling's, nats")
        axes.set_ylim(bottom=0)

    claim.end(rule, verdict, draw, digits=DIGITS)


if __name__ == "__main__":
    main()
