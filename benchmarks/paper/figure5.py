"""
Figure 5 and Appendix C: how many unique tokens a number of rounds gives.

The paper: on log-log scales almost a straight line, a power law.  Its 12 unique tokens of 50 rounds (D.1), with one of
one round, would be an exponent of 0.64.

Here the line is fitted to 1..128 rounds for each seed, which takes positions and draws of its own: for the teacher as
it is, for systematic sampling, and for the teacher sharpened until 50 rounds give 12 tokens, as the paper's do.  A
small teacher's distributions are flat, so that more rounds find something new.  The line cannot hold for ever: it would
pass the size of the vocabulary.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from bench import CONTRADICTED, NOT_SHOWN, SHOWN, Claim, Mean, options
from drawing import COLOURS, DASHES, MARKERS, logarithmic
from teacher import teacher
from torch import Tensor

import sklformat as skl

ROUNDS = (1, 2, 4, 8, 16, 32, 64, 128)
PAPER_ROUNDS, PAPER_UNIQUE = 50, 12
EXPONENT = np.log(PAPER_UNIQUE) / np.log(PAPER_ROUNDS)


def positions(hidden_PD: Tensor, count: int, seed: int) -> Tensor:
    """Hidden states of some positions, [count, D], others for each seed."""
    return hidden_PD[torch.randperm(len(hidden_PD), generator=torch.Generator().manual_seed(seed))[:count]]


def sharpness(logits_PV: Tensor) -> float:
    """What logits are multiplied by so that 50 rounds give 12 unique tokens."""
    low, high = 0.1, 10.0
    for _ in range(30):
        middle = (low * high) ** 0.5
        p_PV = (middle * logits_PV.double()).softmax(1)
        unique = float(-torch.expm1(PAPER_ROUNDS * torch.log1p(-p_PV)).sum(1).mean())
        low, high = (middle, high) if unique > PAPER_UNIQUE else (low, middle)
    return low


def unique(logits_PV: Tensor, sampler: str, seed: int, rounds: int) -> float:
    """Mean unique tokens per position."""
    return len(skl.draw(logits_PV, rounds, sampler, seed=seed, sequence=rounds).token_ids) / len(logits_PV)


def main() -> None:
    given = options(__doc__, seeds=5)
    claim = Claim("figure5", "unique tokens grow as a power of the rounds (Appendix C)", given)
    of = teacher(given)
    hidden_PD = of.train.hidden.flatten(0, 1)
    count = min(len(hidden_PD), {"quick": 256, "standard": 2048, "thorough": 8192}[given.scale])
    beta = sharpness(of.logits(positions(hidden_PD, min(count, 1024), seed=1_000_000)))
    arms = {
        "the teacher as it is": (1.0, "multinomial"),
        "systematic": (1.0, "systematic"),
        f"sharpened, logits x {beta:.2f}": (beta, "multinomial"),
    }
    found: dict[str, list[list[float]]] = {name: [] for name in arms}
    at_paper: dict[str, list[float]] = {name: [] for name in arms}
    for seed in given.seeds:
        logits_PV = of.logits(positions(hidden_PD, count, seed)).float().cpu()
        for name, (factor, sampler) in arms.items():
            found[name].append([unique(factor * logits_PV, sampler, seed, rounds) for rounds in ROUNDS])
            at_paper[name].append(unique(factor * logits_PV, sampler, seed, PAPER_ROUNDS))
    exponents, fits = {}, {}
    for name, values in found.items():
        lines = [np.polyfit(np.log(ROUNDS), np.log(one), 1) for one in values]
        exponents[name] = Mean.of([line[0] for line in lines])
        residuals = [np.log(one) - np.polyval(line, np.log(ROUNDS)) for one, line in zip(values, lines, strict=True)]
        shares = [1 - r.var() / np.log(one).var() for r, one in zip(residuals, values, strict=True)]
        fits[name] = Mean.of(shares), Mean.of([100 * float(np.abs(r).max()) for r in residuals])
        slopes = [np.diff(np.log(one)) / np.log(2) for one in values]
        sharpened = name.startswith("sharpened")
        claim.add(
            name,
            paper={"exponent": f"{EXPONENT:.2f}", "unique of 50": PAPER_UNIQUE} if sharpened else {},
            exponent=exponents[name],
            **{
                "R²": fits[name][0],
                "worst miss %": fits[name][1],
                "unique of 50": Mean.of(at_paper[name]),
                "slope 1 to 4": Mean.of([s[:2].mean() for s in slopes]),
                "slope 32 to 128": Mean.of([s[-2:].mean() for s in slopes]),
            },
        )
    rule = (
        "a straight line explains above 99 % of the variance of log unique tokens, in every arm; contradicted if it "
        "misses a point by half"
    )
    straight = all(min(share.values) > 0.99 for share, _ in fits.values())
    verdict = (
        SHOWN if straight else CONTRADICTED if any(max(miss.values) > 50 for _, miss in fits.values()) else NOT_SHOWN
    )

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        for number, (name, values) in enumerate(found.items()):
            means, spread = np.mean(values, 0), np.std(values, 0)
            axes.errorbar(
                ROUNDS, means, spread, color=COLOURS[number], linestyle="none", marker=MARKERS[number], capsize=3,
            )  # fmt: skip
            line = np.polyfit(np.log(ROUNDS), np.log(means), 1)
            axes.plot(
                ROUNDS, np.exp(np.polyval(line, np.log(ROUNDS))), color=COLOURS[number], linestyle=DASHES[number],
                marker=MARKERS[number], markevery=[], label=f"{name}: exponent {exponents[name].text(3)}",
            )  # fmt: skip
        logarithmic(axes, ROUNDS, base=2)
        logarithmic(axes, ROUNDS, axis="y", base=2)
        axes.set_ylim(0.8)
        axes.set_xlabel("rounds")
        axes.set_ylabel("unique tokens per position")
        axes.legend(frameon=False)

    claim.end(rule, verdict, draw, digits={"worst miss %": 1, "unique of 50": 1, "R²": 4})


if __name__ == "__main__":
    main()
