"""
Table 13: what it costs when teacher and student pack the documents in different orders.

The paper: with different shuffle seeds 79 % (windows of 1024) to 90 % (4096) of the online teacher's gain is kept, with
equal seeds all of it.  Here the teacher reads the same documents in another order, in windows as long as the
student's, and of a quarter; each token keeps what the teacher said of it there.  ``sklformat`` refuses such a cache:
its alignment checksums differ.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from bench import CONTRADICTED, NOT_SHOWN, SHOWN, Claim, Options, options
from drawing import bars
from students import CE, DIGITS, FULL, Records, Student, columns, means, rounds_for, train_all
from teacher import Part, Teacher, hidden_states, model_of, packed, teacher

PAPER = {
    "different, quarter windows": {"% CE to FullKD": 79}, "different": {"% CE to FullKD": 90},
    "same": {"% CE to FullKD": 96}, "online (FullKD)": {"% CE to FullKD": 100},
}  # fmt: skip


def main() -> None:
    given = options(__doc__)
    claim = Claim("table13", "records of another packing order teach less (Table 13)", given)
    of = teacher(given)
    same = Student(records=Records(rounds=rounds_for(of, 12.0)))
    found = {"CE": CE, "online (FullKD)": FULL, "same": same}
    results = train_all(of, list(found.values()), given)
    for name, shorter in (("different", 1), ("different, quarter windows", 4)):
        found[name] = dataclasses.replace(same, label=f"{name} packing")
        results |= train_all(of, [found[name]], given, _misaligned(of, given, shorter))
    for name in ("CE", "different, quarter windows", "different", "same", "online (FullKD)"):
        mine = results[found[name]]
        claim.add(name, paper=PAPER.get(name), **columns(mine, results[CE], results[FULL]))
    lost = (means(results[found["different, quarter windows"]]) - means(results[same])).within()
    rule = "records of another order in quarter windows teach less than those of the same order, with 95 % confidence"
    verdict = SHOWN if lost[0] > 0 else CONTRADICTED if lost[1] < 0 else NOT_SHOWN

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        bars(axes, {row["row"]: row["ours"]["% CE to FullKD"] for row in claim.rows})
        axes.set_xlabel("% CE to FullKD")

    claim.end(rule, verdict, draw, digits=DIGITS)


def _misaligned(of: Teacher, given: Options, shorter: int) -> Part:
    """The teacher's last hidden states of the same tokens where it read the documents in another order."""
    tokens_ST = of.train.tokens[:, :-1]
    sequences = packed(of.directory, of.size, "tokens")
    starts = np.concatenate([sequences.document_starts(i)[:-1] for i in range(len(tokens_ST))])
    starts[0] = True
    documents = np.split(np.arange(starts.size), np.flatnonzero(starts)[1:])
    order = np.random.default_rng(1).permutation(len(documents))
    places = torch.from_numpy(np.concatenate([documents[i] for i in order])).to(tokens_ST.device)
    windows = tokens_ST.flatten()[places].view(-1, tokens_ST.shape[1] // shorter)
    seen = hidden_states(model_of(given, of.directory / "teacher" / "model"), windows)
    hidden = torch.empty_like(of.train.hidden).flatten(0, 1)
    hidden[places] = seen.flatten(0, 1)
    return Part(of.train.tokens, hidden.view_as(of.train.hidden))


if __name__ == "__main__":
    main()
