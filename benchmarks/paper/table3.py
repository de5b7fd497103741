"""
Table 3: how far the gradient of a sparse method is from FullKD's.

The paper (4.2): for a model trained with FullKD, the gradient of all its parameters over one batch; the angle to
FullKD's gradient and the ratio of their norms.  Random sampling of 12 tokens is 4° off, Top-K of 300 still 30°.

Here a student that FullKD trained, on held-out text that it did not see, for three sizes of a batch: what is noise
shrinks as the root of the size, what is bias does not.  The paper's batch has a million tokens, 32 times our largest.
Top-K as in the paper's Eq. 5, not normalised; beside it normalised, the naive fix, and systematic sampling of as many
tokens.  A seed has a student and draws of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from bench import CONTRADICTED, NOT_SHOWN, SHOWN, Claim, Mean, kept, options
from drawing import curve, logarithmic
from students import FULL, rounds_for, trained
from teacher import Teacher, teacher
from torch import Tensor

import sklformat as skl
from sklformat.distill import DenseTargets, Targets, linear_sparse_kl, run_to_head
from sklformat.progress import show

UNIQUE = 12.0
PAPER = {"Top-K 12": (58, 2.4), "Top-K 50": (48, 1.8), "Top-K 300": (30, 1.3), "random sampling": (4, 1.0)}
Loss = Callable[[Tensor, Any, Tensor, Tensor, int], Tensor]  # of hidden states, head, p_PV, labels and a number


def losses(of: Teacher, seed: int) -> dict[str, Loss]:
    """Each method's sum over the positions of a batch."""

    def loss(hidden: Tensor, head: Any, given: Any, method: str, labels: Tensor | None = None) -> Tensor:
        return linear_sparse_kl(hidden, head, given, method=method, labels_P=labels, normaliser=1)

    def top(k: int, method: str = "topk") -> Loss:
        def run(hidden: Tensor, head: Any, p_PV: Tensor, labels: Tensor, _: int) -> Tensor:
            values, ids = p_PV.topk(k)
            return loss(hidden, head, (ids, values), method, labels)

        return run

    def drawn(sampler: str) -> Loss:
        rounds = rounds_for(of, UNIQUE, sampler)

        def run(hidden: Tensor, head: Any, p_PV: Tensor, _: Tensor, number: int) -> Tensor:
            one = skl.draw(p_PV.log().cpu(), rounds, sampler, seed=seed, sequence=number)
            ids, offsets = torch.from_numpy(one.token_ids.astype("int64")), torch.from_numpy(one.offsets)
            probs = torch.from_numpy(one.counts).float() / rounds
            return loss(
                hidden, head, Targets(ids.to(hidden.device), probs.to(hidden.device), offsets), "random_sampling"
            )

        return run

    return {
        "FullKD": lambda hidden, head, p_PV, _, __: loss(hidden, head, DenseTargets(p_PV), "full"),
        "CE": lambda hidden, head, _, labels, __: loss(hidden, head, (labels[:, None], torch.ones_like(labels[:, None],
              dtype=hidden.dtype)), "random_sampling"),
        "Top-K 12": top(12), "Top-K 50": top(50), "Top-K 300": top(300),
        "Top-K 12, normalised": top(12, "topk_normalised"), "naive fix 12": top(12, "naive_fix"),
        "random sampling": drawn("multinomial"), "systematic": drawn("systematic"),
    }  # fmt: skip


def batches(of: Teacher) -> list[int]:
    """Sequences of each batch: a sixteenth of what there is, a quarter, all."""
    count = len(of.held_out.tokens)
    return [count // divisor for divisor in ((16, 4, 1) if count >= 16 else (4, 2, 1))]


def angles(of: Teacher, seed: int) -> dict[str, list[tuple[float, float]]]:
    """Angle to FullKD's gradient, degrees, and norm over its norm, of each method at each number of tokens."""
    model = trained(of, FULL, seed)
    parameters = list(model.parameters())
    methods = losses(of, seed)
    order = torch.randperm(len(of.held_out.tokens), generator=torch.Generator().manual_seed(seed))
    stops = batches(of)
    sums = {name: torch.zeros(sum(p.numel() for p in parameters), dtype=torch.float64) for name in methods}
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in methods}
    with show(f"gradients, seed {seed}", len(order), unit="sequence") as reach:
        for number, row in enumerate(order.tolist(), 1):
            tokens_BT = of.held_out.tokens[row][None]
            p_PV = of.logits(of.held_out.hidden[row]).softmax(1)
            hidden_PD, head, _ = run_to_head(model, tokens_BT[:, :-1])
            for name, of_method in methods.items():
                total = of_method(hidden_PD, head, p_PV, tokens_BT[0, 1:], number)
                parts = torch.autograd.grad(total, parameters, retain_graph=True)
                sums[name] += torch.cat([part.flatten() for part in parts]).double().cpu()
            if number in stops:
                full = sums["FullKD"]
                for name, gradient in sums.items():
                    cosine = float(gradient @ full / gradient.norm() / full.norm())
                    angle = math.degrees(math.acos(min(1.0, max(-1.0, cosine))))
                    found[name].append((angle, float(gradient.norm() / full.norm())))
            reach(number)
    return found


def main() -> None:
    given = options(__doc__)
    claim = Claim(
        "table3", "gradients of 12 random tokens are those of FullKD, gradients of Top-K are not (Table 3)", given
    )
    of = teacher(given)
    place = of.directory / "table3" / f"{of.lm_loss:.6f}"  # of this teacher
    seeds = [kept(place / f"seed{seed}.json", lambda seed=seed: angles(of, seed)) for seed in given.seeds]
    counts = [sequences * of.size.seq_len for sequences in batches(of)]
    angle = {name: [Mean.of([one[name][i][0] for one in seeds]) for i in range(len(counts))] for name in seeds[0]}
    norm = {name: [Mean.of([one[name][i][1] for one in seeds]) for i in range(len(counts))] for name in seeds[0]}
    for name in angle:
        if name == "FullKD":
            continue
        columns = {}
        for i, count in enumerate(counts):
            columns |= {f"angle °, {count:,} tokens": angle[name][i], f"norm, {count:,}": norm[name][i]}
        last = dict(zip(list(columns)[-2:], PAPER.get(name, ()), strict=False))
        claim.add(name, paper=last, **columns)
    sampled, tops = angle["random sampling"], [angle[f"Top-K {k}"] for k in (12, 50, 300)]
    rule = (
        f"at {counts[-1]:,} tokens random sampling's angle is below half of every Top-K's and its norm within a tenth "
        f"of FullKD's, and its angle shrinks from {counts[0]:,} tokens on to below a half, as noise does; each with "
        "95 % confidence; contradicted if its angle is above any Top-K's"
    )
    halves = [*(top[-1] for top in tops), sampled[0]]
    below = all((sampled[-1] - Mean.of([v / 2 for v in one.values])).within()[1] < 0 for one in halves)
    near = max(abs(end - 1) for end in norm["random sampling"][-1].within()) < 0.1
    above = any((sampled[-1] - top[-1]).within()[0] > 0 for top in tops)
    verdict = CONTRADICTED if above else SHOWN if below and near else NOT_SHOWN
    roots = Mean.of([math.tan(math.radians(a)) / math.tan(math.radians(b))
                     for a, b in zip(sampled[0].values, sampled[-1].values, strict=True)])  # fmt: skip
    falls = (
        f"the tangent of random sampling's angle falls {roots.text(1)} times from {counts[0]:,} to {counts[-1]:,} "
        f"tokens; pure noise falls {math.sqrt(counts[-1] / counts[0]):.0f} times"
    )
    rounds = (
        f"{rounds_for(of, UNIQUE)} rounds of multinomial and {rounds_for(of, UNIQUE, 'systematic')} of systematic "
        "sampling are 12 unique tokens of this teacher"
    )

    def draw(figure: Any) -> None:
        for axes, values, what in zip(
            figure.subplots(1, 2),
            (angle, norm),
            ("angle to FullKD's gradient, degrees", "norm over FullKD's"),
            strict=True,
        ):
            for number, (name, ours) in enumerate((n, v) for n, v in values.items() if n != "FullKD"):
                curve(axes, number, counts, ours, name)
            logarithmic(axes, counts, base=2)
            axes.set_xlabel("tokens of the batch")
            axes.set_ylabel(what)
        logarithmic(figure.axes[0], [2, 5, 10, 20, 40, 80], axis="y")
        figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False)

    digits = {f"angle °, {count:,} tokens": 1 for count in counts} | {f"norm, {count:,}": 2 for count in counts}
    claim.end(rule, verdict, draw, notes=[falls, rounds], digits=digits)


if __name__ == "__main__":
    main()
