"""
How few records are enough: multinomial against systematic sampling at equal records, and both against FullKD.

Students of a seed have the same start and read the same text in the same order; what differs is what they are told of
the teacher, each with its own draws.  So an arm's distance to FullKD is a mean of paired differences.  One epoch, and
three epochs over a third of the text in the same number of steps, where a stored sample is read three times: with
"thinned" each epoch reads other draws of a larger sample that is stored.

The smallest effect that the study could see is the one whose 95 % test has a power of 80 %.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from bench import COLOURS, DASHES, MARKERS, NOT_SHOWN, SHOWN, Claim, Mean, options, student_t
from students import CE, FULL, Records, Student, means, rounds_for, train_all
from teacher import Teacher, teacher

UNIQUE = (2.4, 5.0, 12.0)
SAMPLERS = ("multinomial", "systematic")


def arms(of: Teacher) -> dict[str, Student]:
    """Every student of the study by its name; the records are of ``UNIQUE`` per position, as near as draws allow."""
    found = {"CE": CE, "FullKD": FULL}
    rounds = {(s, u): rounds_for(of, u, s) for s in SAMPLERS for u in UNIQUE}
    for (sampler, unique), n in rounds.items():
        found[f"{sampler} {unique:g}"] = Student(records=Records(sampler=sampler, rounds=n))
    again: dict[str, Any] = {"epochs": 3}
    found["3 epochs, FullKD"] = dataclasses.replace(FULL, **again)
    for unique, larger in ((2.4, 12.0), (12.0, 28.0)):
        for sampler in SAMPLERS:
            found[f"3 epochs, {sampler} {unique:g}"] = dataclasses.replace(found[f"{sampler} {unique:g}"], **again)
        stored, n = rounds_for(of, larger), rounds["multinomial", unique]
        found[f"3 epochs, multinomial {unique:g} thinned of {larger:g}"] = Student(
            records=Records(rounds=n, thinned_from=stored), **again
        )
    return found


def smallest_seen(differences: Mean) -> float:
    """The effect whose two-sided 5 % test has a power of 80 %, by Student's t."""
    degrees = len(differences.values) - 1
    return (student_t(degrees, 0.95) + student_t(degrees, 0.60)) * differences.error


def main() -> None:
    given = options(__doc__, seeds=8, thorough=16)
    claim = Claim("study", "12 unique tokens train as good a student as the whole distribution (5.1)", given)
    of = teacher(given)
    students = arms(of)
    results = train_all(of, list(students.values()), given)
    apart: dict[str, Mean] = {}
    for name, student in students.items():
        mine = results[student]
        base = results[students["3 epochs, FullKD" if student.epochs > 1 else "FullKD"]]
        apart[name] = means(mine, "kl") - means(base, "kl")
        low, high = apart[name].within()
        claim.add(
            name,
            rounds=str(student.records.rounds) if student.records else "",
            records=means(mine, "records").mean,
            **{
                "LM loss": means(mine),
                "KL": means(mine, "kl"),
                "LM loss to FullKD": means(mine) - means(base),
                "KL to FullKD": apart[name],
                "95 %": f"{low:+.3f} to {high:+.3f}" if student is not FULL and "FullKD" not in name else "",
                "could see": smallest_seen(apart[name]),
            },
        )
    compared = {}
    for prefix in ("", "3 epochs, "):
        for unique in UNIQUE:
            pair = [f"{prefix}{sampler} {unique:g}" for sampler in SAMPLERS]
            if pair[0] not in students:
                continue
            a, b = (means(results[students[name]], "kl") for name in pair)
            compared[f"{prefix}{unique:g} records"] = b - a
    notes = [
        f"{name}: KL of systematic less multinomial {difference.text(4)}, 95 % {difference.within()[0]:+.4f} to "
        f"{difference.within()[1]:+.4f}, could see {smallest_seen(difference):.4f}"
        for name, difference in compared.items()
    ]
    few = apart["systematic 2.4"]
    gap = (means(results[students["CE"]], "kl") - means(results[students["FullKD"]], "kl")).mean
    notes.append(f"2.4 records of systematic sampling keep {100 * (1 - few.mean / gap):.1f} % of FullKD's gain over CE")
    nearest = apart["systematic 12"]
    rule = "12 records lose less than a tenth of FullKD's gain over CE in KL, with 95 % confidence, by either sampler"
    ends = [apart[f"{sampler} 12"].within()[1] for sampler in SAMPLERS]
    verdict = SHOWN if max(ends) < 0.1 * gap and nearest.error == nearest.error else NOT_SHOWN

    def line(axes: Any, number: int, names: list[str], label: str) -> None:
        found = [apart[name] for name in names]
        axes.errorbar(
            [means(results[students[name]], "records").mean for name in names],
            [one.mean for one in found],
            [one.within()[1] - one.mean for one in found],
            color=COLOURS[number], linestyle=DASHES[number], marker=MARKERS[number], capsize=4, label=label,
        )  # fmt: skip

    def draw(figure: Any) -> None:
        for axes, prefix in zip(figure.subplots(1, 2, sharey=True), ("", "3 epochs, "), strict=True):
            for number, sampler in enumerate(SAMPLERS):
                line(axes, number, [n for u in UNIQUE if (n := f"{prefix}{sampler} {u:g}") in apart], sampler)
            if prefix:
                line(axes, 2, [name for name in apart if "thinned" in name], "multinomial, thinned each epoch")
            axes.axhline(0, color="0.4", linewidth=0.8)
            axes.set_xscale("log")
            axes.set_xticks([2, 4, 8, 16], ["2", "4", "8", "16"])
            axes.minorticks_off()
            axes.set_xlabel("records per position")
            axes.set_title("three epochs over a third" if prefix else "one epoch")
            axes.legend(frameon=False)
        figure.axes[0].set_ylabel("KL to the teacher less FullKD's, nats (95 %)")

    claim.end(rule, verdict, draw, notes=notes, digits={"records": 1})


if __name__ == "__main__":
    main()
