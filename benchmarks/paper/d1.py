"""
Appendix D.1: seven bits for each Top-K value, in equal steps or as a ratio to the value before.

The paper: 2^7 equal intervals of 0..1 trained slightly worse than fp16; ratios of sorted values made the error almost
0.  It does not give the ratios' steps.

Here the codes are compared without a student: KL(coded || exact), both over the K ids and scaled to sum to 1, which is
what a student that learns the code perfectly is off.  Ratios in 2^7 equal steps stand beside the code of SPEC 4.3,
whose steps are finer near 1 and which measures each ratio from the value that was coded before.  In equal steps a ratio
below 1/254 is 0, and so are all values after it.  "Sharpened" is the teacher with logits multiplied until 50 rounds
draw 12 unique tokens, as the paper's do.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from bench import CONTRADICTED, NOT_SHOWN, SHOWN, Claim, Mean, options
from drawing import curve
from figure5 import positions, sharpness
from teacher import teacher
from torch import Tensor

from sklformat import native

SIZES = (12, 50)


def equal_steps(p_PK: Tensor) -> Tensor:
    return (127 * p_PK).round() / 127


def middles(p_PK: Tensor) -> Tensor:
    """The middle of one of 128 intervals, which loses no id."""
    return ((128 * p_PK).floor().clamp(max=127) + 0.5) / 128


def equal_ratios(p_PK: Tensor) -> Tensor:
    before_PK = torch.cat([torch.ones_like(p_PK[:, :1]), p_PK[:, :-1]], 1)
    return equal_steps(p_PK / before_PK).cumprod(1)


def spec_ratios(p_PK: Tensor) -> Tensor:
    """Through the encoder's and decoder's own C."""
    positions, k = p_PK.shape
    offsets = np.arange(positions + 1, dtype=np.int64) * k
    ids = np.tile(np.arange(k, dtype=np.uint32), positions)
    offsets, ids, codes = native.quantise(offsets, ids, p_PK.float().numpy().ravel(), 0)
    coded_PK = torch.zeros_like(p_PK)
    rows = torch.arange(positions).repeat_interleave(torch.from_numpy(np.diff(offsets)))
    coded_PK[rows, torch.from_numpy(ids.astype(np.int64))] = torch.from_numpy(native.expand(offsets, codes, 0)).double()
    return coded_PK


CODES = {
    "equal steps, q / 127": equal_steps,
    "equal steps, middles": middles,
    "ratios in equal steps": equal_ratios,
    "ratio code of SPEC 4.3": spec_ratios,
    "fp16": lambda p_PK: p_PK.half().double(),
}


def figures(coded_PK: Tensor, p_PK: Tensor) -> dict[str, float]:
    c_PK = coded_PK / coded_PK.sum(1, keepdim=True)
    t_PK = p_PK / p_PK.sum(1, keepdim=True)
    return {
        "KL": float((torch.xlogy(c_PK, c_PK) - torch.xlogy(c_PK, t_PK)).sum(1).mean()),
        "ids lost %": 100 * float((coded_PK == 0).double().mean()),
    }


def main() -> None:
    given = options(__doc__)
    claim = Claim(
        "d1", "7 bits in equal steps are too few for Top-K values; as ratios their error is almost 0 (D.1)", given
    )
    of = teacher(given)
    hidden_PD = of.train.hidden.flatten(0, 1)
    count = min(len(hidden_PD), {"quick": 256, "standard": 4096, "thorough": 32_768}[given.scale])
    beta = sharpness(of.logits(positions(hidden_PD, min(count, 1024), seed=1_000_000)))
    found: dict[tuple[str, int, str], list[float]] = {}
    for seed in given.seeds:
        for rows_PD in positions(hidden_PD, count, seed).split(2048):
            logits_PV = of.logits(rows_PD).double().cpu()
            for said, factor in {"": 1.0, ", sharpened": beta}.items():
                for k in SIZES:
                    p_PK = (factor * logits_PV).softmax(1).topk(k).values
                    for name, code in CODES.items():
                        for figure, value in figures(code(p_PK), p_PK).items():
                            sums = found.setdefault((name, k, figure + said), [0.0] * len(given.seeds))
                            sums[seed] += value * len(rows_PD) / count
    columns = ("KL", "KL, sharpened", "ids lost %", "ids lost %, sharpened")
    for k in SIZES:
        for name in CODES:
            claim.add(f"K = {k}, {name}", **{figure: Mean.of(found[name, k, figure]) for figure in columns})
    rule = (
        "the ratio code's KL is below a thousandth of a nat and below a tenth of that of equal steps, at every K and "
        "for both teachers, with 95 % confidence; contradicted if it is above that of equal steps"
    )
    pairs = [
        [Mean.of(found[name, k, figure]) for name in ("ratio code of SPEC 4.3", "equal steps, q / 127")]
        for k in SIZES
        for figure in ("KL", "KL, sharpened")
    ]
    small = all(mine.within()[1] < 1e-3 for mine, _ in pairs)
    tenth = all((mine - Mean.of([v / 10 for v in linear.values])).within()[1] < 0 for mine, linear in pairs)
    above = any((mine - linear).within()[0] > 0 for mine, linear in pairs)
    verdict = CONTRADICTED if above else SHOWN if small and tenth else NOT_SHOWN

    def draw(figure: Any) -> None:
        for axes, said in zip(figure.subplots(1, 2, sharey=True), ("", ", sharpened"), strict=True):
            for number, name in enumerate(CODES):
                values = [Mean.of(found[name, k, f"KL{said}"]) for k in SIZES]
                curve(axes, number, [str(k) for k in SIZES], values, name)
            axes.set_yscale("log")
            axes.set_xlabel("K")
            axes.set_title(f"teacher{said}")
            axes.margins(x=0.2)
        figure.axes[0].set_ylabel("KL of the coded Top-K to the exact one, nats")
        figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False)

    claim.end(rule, verdict, draw, digits={"KL": 6, "KL, sharpened": 6, "ids lost %": 1, "ids lost %, sharpened": 1})


if __name__ == "__main__":
    main()
