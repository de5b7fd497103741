"""
Figure 2a and Appendix K: what Top-K, the naive fix and random sampling make of a Zipf distribution.

The paper (2.2.1, 3.4, 4.1): Top-K scales the head up, giving the rest to the label helps, random sampling is right in
the mean.  It draws this for 100 000 tokens with p ~ 1/i, K = 20 and 22 rounds, averaged over 1000 positions.

Here Top-K and the naive fix are exact; the naive fix is a mean over labels that the distribution itself gives, as in
the paper's toy.  The draws are sklformat's own.  Beside them is Appendix K's ``create_prob`` as it is printed: its
``scatter_`` writes 1/N at each drawn token, whether it was drawn once or ten times, so that the head loses; with
``scatter_add_`` it is right.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from bench import CONTRADICTED, NOT_SHOWN, SHOWN, Claim, Mean, options
from drawing import COLOURS, DASHES, MARKERS

import sklformat as skl
from sklformat.progress import show

VOCAB_SIZE, TOP_K, ROUNDS = 100_000, 20, 22
HEAD = 50  # tokens that are compared, and drawn
LIMIT = 86.7  # chi-squared of 50 degrees of freedom passes it once in a thousand times


def top_k(p_V: np.ndarray) -> np.ndarray:
    """The K largest, scaled to sum to 1: what the student learns (A.4)."""
    kept = np.where(np.arange(len(p_V)) < TOP_K, p_V, 0)
    return kept / kept.sum()


def naive_fix(p_V: np.ndarray) -> np.ndarray:
    """The K largest, and what is left at the label; mean over labels (3.3)."""
    kept = np.where(np.arange(len(p_V)) < TOP_K, p_V, 0)
    return kept + p_V * (1 - kept.sum())


def drawn(logits_V: np.ndarray, sampler: str, rounds: int, seed: int, positions: int) -> tuple[np.ndarray, float]:
    """Mean targets of the first ``HEAD`` tokens over positions, and the mean number of unique tokens."""
    records = skl.draw(np.broadcast_to(logits_V, (positions, VOCAB_SIZE)), rounds, sampler, seed=seed, sequence=0)
    sums = np.bincount(records.token_ids, records.counts, minlength=VOCAB_SIZE)
    return sums[:HEAD] / (rounds * positions), len(records.token_ids) / positions


def appendix_k(p_V: torch.Tensor, seed: int, positions: int, *, adds: bool) -> tuple[np.ndarray, float]:
    """The same by the paper's ``downsample_ours`` and ``create_prob``, and the mean sum of a row."""
    g = torch.Generator(p_V.device).manual_seed(seed)
    indices = torch.multinomial(p_V.expand(positions, -1), ROUNDS, replacement=True, generator=g)
    values = torch.full((positions, ROUNDS), 1.0 / ROUNDS, device=p_V.device)
    mean_V, total = torch.zeros_like(p_V), 0.0
    for rows, each in zip(indices.split(64), values.split(64), strict=True):
        made = torch.zeros(len(rows), VOCAB_SIZE, device=p_V.device)
        made = made.scatter_add_(1, rows, each) if adds else made.scatter_(1, rows, each)
        mean_V += made.sum(0) / positions
        total += float(made.sum()) / positions
    return mean_V[:HEAD].cpu().numpy(), total


def chi_squared(found: np.ndarray, p_V: np.ndarray, draws: int) -> float:
    """Of the first ``HEAD`` tokens; about ``HEAD`` where the draws have no bias."""
    truth = p_V[:HEAD]
    return float(((found - truth) ** 2 / (truth * (1 - truth) / draws)).sum())


def main() -> None:
    given = options(__doc__)
    claim = Claim("figure2a", "random sampling is an unbiased estimate of the teacher; Top-K is scaled up", given)
    positions = {"quick": 100, "standard": 1000, "thorough": 10_000}[given.scale]
    p_V = 1 / np.arange(1, VOCAB_SIZE + 1)
    p_V /= p_V.sum()
    logits_V = np.log(p_V).astype(np.float32)
    p_on_device = torch.from_numpy(p_V).float().to(given.device)
    exact = {"Top-K": top_k(p_V)[:HEAD], "naive fix": naive_fix(p_V)[:HEAD]}
    means = {f"random sampling, {sampler}": [] for sampler in ("multinomial", "systematic")}
    means |= {"Appendix K, scatter_": [], "Appendix K, scatter_add_": []}
    unique = {name: [] for name in means}
    sums = {name: [] for name in means}
    with show("seeds", len(given.seeds), unit="step") as reach:
        for done, seed in enumerate(given.seeds, 1):
            for name in means:
                if name.startswith("random"):
                    found, number = drawn(logits_V, name.split(", ")[1], ROUNDS, seed, positions)
                    unique[name].append(number)
                else:
                    found, total = appendix_k(p_on_device, seed, positions, adds=name.endswith("add_"))
                    sums[name].append(total)
                means[name].append(found)
            reach(done)
    for name, found in exact.items():
        claim.add(name, paper={"unique tokens": TOP_K} if name == "Top-K" else {}, **figures([found], p_V))
    for name, found in means.items():
        paper, more = {}, {"row sum": Mean.of(sums[name])} if sums[name] else {}
        if unique[name]:
            paper, more = {"unique tokens": TOP_K}, {"unique tokens": Mean.of(unique[name])}
        claim.add(name, paper=paper, **figures(found, p_V), **more)

    draws = ROUNDS * positions * len(given.seeds)
    chi = chi_squared(np.mean(means["random sampling, multinomial"], 0), p_V, draws)
    scaled = exact["Top-K"][0] / p_V[0]
    lost = chi_squared(np.mean(means["Appendix K, scatter_"], 0), p_V, draws)
    rule = (
        f"multinomial draws: chi-squared of {HEAD} tokens {chi:.0f}, below {LIMIT} (1 in 1000); Top-K scales the head "
        f"{scaled:.2f} times, above 1.5"
    )
    verdict = CONTRADICTED if chi >= LIMIT else SHOWN if scaled > 1.5 else NOT_SHOWN
    shares = {name: Mean.of([f[0] / p_V[0] for f in means[name]]).text(3) for name in means if "Appendix" in name}
    note = (
        f"Appendix K as printed gives the top token {shares['Appendix K, scatter_']} of its probability (chi-squared "
        f"{lost:.0f}); with scatter_add_ {shares['Appendix K, scatter_add_']}"
    )

    def draw(figure: Any) -> None:
        left, right = figure.subplots(1, 2)
        index = np.arange(1, HEAD + 1)
        left.plot(index, p_V[:HEAD], color="black", linewidth=3, alpha=0.35, label="teacher (FullKD)")
        shown = exact | {name: np.mean(found, 0) for name, found in means.items() if "systematic" not in name}
        for number, (name, found) in enumerate(shown.items()):
            look = {
                "color": COLOURS[number], "linestyle": DASHES[number], "marker": MARKERS[number], "markersize": 4,
                "markevery": (number, 7), "linewidth": 1.3, "label": name,
            }  # fmt: skip
            left.plot(index, np.where(found > 0, found, np.nan), **look)
            right.plot(index, found / p_V[:HEAD], **look)
        left.set_yscale("log")
        left.set_ylabel("target probability, mean")
        right.set_ylabel("target over the teacher's probability")
        right.axhline(1, color="black", linewidth=3, alpha=0.35)
        for axes in (left, right):
            axes.set_xlabel("token, by rank")
        figure.legend(*left.get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False)

    claim.end(rule, verdict, draw, notes=[note], digits={"row sum": 3, "unique tokens": 2})


def figures(found: list[np.ndarray], p_V: np.ndarray) -> dict[str, Mean]:
    """Of several means over positions: against the teacher's, at the top token and in the tail; the head's L1 error."""
    return {
        "top token x teacher": Mean.of([f[0] / p_V[0] for f in found]),
        "tokens 21-50 x teacher": Mean.of([f[TOP_K:].sum() / p_V[TOP_K:HEAD].sum() for f in found]),
        "L1 of tokens 1-50": Mean.of([np.abs(f - p_V[:HEAD]).sum() for f in found]),
    }


if __name__ == "__main__":
    main()
