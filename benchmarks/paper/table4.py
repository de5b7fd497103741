"""
Table 4: training steps per second of CE, random sampling and FullKD.

The paper (4.4): students of 0.3 B and 3 B parameters with teachers of 3 B and 8 B, which FullKD runs at every step;
random sampling from a cache is 1.7 to 2.6 times as fast as FullKD and about a tenth slower than CE.

Here the teachers have about as many times the student's parameters as there, 10 and 2.7, with weights that do not
matter.  A step of random sampling reads and checks its records from a cache on disk.  Steps take turns in one run, and
on a CPU the process's own seconds count, so that a busy machine matters little; a figure is the median of the ratios of
neighbours.  A seed is a repetition of the whole measurement.  ``--device cuda`` has a student of 0.3 B, in bfloat16,
with V = 100 000.
"""

from __future__ import annotations

import math
import shutil
import time
from typing import Any

import numpy as np
import torch
from bench import CONTRADICTED, NOT_SHOWN, SHOWN, Claim, Mean, Options, options
from drawing import COLOURS
from timing import measure
from torch.nn import functional

import sklformat as skl
from sklformat.distill import DenseTeacher, SparseLogitDataset, linear_sparse_kl, run_to_head
from sklformat.distill.models import outputs
from sklformat.distill.models.loading import new_llama
from sklformat.progress import show

ROUNDS, BATCH, SEQUENCES = 14, 8, 64
SMALL = {"vocab_size": 4096, "seq_len": 128, "student": (64, 2, 2), "teachers": ((256, 5, 8), (128, 3, 4))}
QUICK = {"vocab_size": 512, "seq_len": 32, "student": (16, 1, 2), "teachers": ((64, 2, 2), (32, 1, 2))}
LARGE = {"vocab_size": 100_000, "seq_len": 1024, "student": (1024, 16, 8), "teachers": ((3072, 24, 24), (1536, 20, 12))}
PAPER = {"10": (2.9, 2.6), "2.7": (1.77, 1.73)}  # CE and random sampling over FullKD


def new(shape: tuple[int, int, int], size: dict[str, Any], given: Options) -> Any:
    hidden_size, num_layers, num_heads = shape
    model = new_llama(
        vocab_size=size["vocab_size"], hidden_size=hidden_size, num_layers=num_layers, num_heads=num_heads,
        max_positions=size["seq_len"], seed=0,
    )  # fmt: skip
    return model.to(given.device, torch.bfloat16 if given.device == "cuda" else torch.float32)


def write_cache(size: dict[str, Any], given: Options) -> Any:
    """A cache of about 12 records per position, of a Zipf distribution that is shifted for each."""
    path = given.out / "table4-cache"
    shutil.rmtree(path, ignore_errors=True)
    vocab_size, seq_len = size["vocab_size"], size["seq_len"]
    rng = np.random.default_rng(0)
    zipf_V = -np.log(np.arange(1, vocab_size + 1, dtype=np.float32))
    header = skl.Header(vocab_size=vocab_size, seq_len=seq_len, kind="counts", rounds=ROUNDS)
    with skl.CacheWriter(path, header=header, sequences_per_shard=SEQUENCES) as writer:
        for number in range(SEQUENCES):
            logits = np.stack([np.roll(zipf_V, shift) for shift in rng.integers(0, vocab_size, seq_len)])
            tokens = rng.integers(0, vocab_size, seq_len + 1)
            writer.append(tokens, skl.draw(logits, ROUNDS, sequence=number))
    return path


def steps(
    shape: tuple[int, int, int], size: dict[str, Any], given: Options, cache: Any
) -> tuple[float, dict[str, Any]]:
    """How many times larger the teacher is, and a step of each method."""
    teacher, student = new(shape, size, given).eval(), new(size["student"], size, given)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4)
    g = torch.Generator().manual_seed(0)
    tokens = torch.randint(size["vocab_size"], (BATCH, size["seq_len"] + 1), generator=g).to(given.device)

    def records() -> Any:
        dataset, epoch = SparseLogitDataset(cache, batch_size=BATCH, seed=0), 0
        while True:
            dataset.set_epoch(epoch)
            yield from dataset
            epoch += 1

    stream = records()

    def learn(loss: Any) -> None:
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if given.device == "cuda":
            torch.cuda.synchronize()

    def cross_entropy() -> None:
        logits = outputs.logits(student, tokens[:, :-1]).flatten(0, 1)
        learn(functional.cross_entropy(logits.float(), tokens[:, 1:].flatten()))

    def random_sampling() -> None:
        batch = next(stream).to(given.device)
        hidden, head, _ = run_to_head(student, batch.input_ids)
        learn(linear_sparse_kl(hidden, head, batch.targets))

    def full() -> None:
        with torch.no_grad():
            said, said_head, _ = run_to_head(teacher, tokens[:, :-1])
        hidden, head, _ = run_to_head(student, tokens[:, :-1])
        learn(linear_sparse_kl(hidden, head, DenseTeacher(said, said_head), method="full"))

    parameters = [sum(p.numel() for p in model.parameters()) for model in (teacher, student)]
    return parameters[0] / parameters[1], {"FullKD": full, "CE": cross_entropy, "random sampling": random_sampling}


def main() -> None:
    given = options(__doc__)
    claim = Claim(
        "table4", "random sampling trains 1.7 to 2.6 times as fast as FullKD, a tenth slower than CE (Table 4)", given
    )
    size = QUICK if given.is_quick else LARGE if given.device == "cuda" else SMALL
    rounds = {"quick": 1, "standard": 5, "thorough": 25}[given.scale]
    clock = time.perf_counter if given.device == "cuda" else time.process_time
    cache = write_cache(size, given)
    found: dict[str, dict[str, list[float]]] = {}
    with show("measurements", len(given.seeds) * len(PAPER), unit="step") as reach:
        for number, (times, shape) in enumerate(zip(PAPER, size["teachers"], strict=True)):
            larger, ways = steps(shape, size, given, cache)
            ours = found.setdefault(times, {"larger": [larger], "CE": [], "random sampling": [], "slower": []})
            for done in range(len(given.seeds)):
                for name, (_, ratio) in measure("FullKD", ways, rounds, clock).items():
                    if name != "FullKD":
                        ours[name].append(ratio)
                both = {name: ways[name] for name in ("random sampling", "CE")}
                ours["slower"].append(100 * (measure("random sampling", both, rounds, clock)["CE"][1] - 1))
                reach(number * len(given.seeds) + done + 1)
    shutil.rmtree(cache)
    for times, ours in found.items():
        faster = dict(zip(("CE", "random sampling"), PAPER[times], strict=True))
        for name, paper in faster.items():
            columns = {"x FullKD": Mean.of(ours[name])}
            printed: dict[str, Any] = {"x FullKD": paper}
            if name == "random sampling":
                columns["time over CE's, % more"] = Mean.of(ours["slower"])
                printed["time over CE's, % more"] = f"{100 * (PAPER[times][0] / paper - 1):.0f}"
            claim.add(f"teacher {ours['larger'][0]:.1f} x the student: {name}", paper=printed, **columns)
    speeds = [Mean.of(ours["random sampling"]) for ours in found.values()]
    slower = [Mean.of(ours["slower"]) for ours in found.values()]
    rule = (
        "random sampling's steps are faster than FullKD's and take at most 15 % longer than CE's, with both teachers "
        "and 95 % confidence; contradicted if FullKD's are faster"
    )
    faster = all(one.within()[0] > 1 for one in speeds)
    verdict = SHOWN if faster and all(one.within()[1] < 15 for one in slower) else NOT_SHOWN
    if any(one.within()[1] < 1 for one in speeds):
        verdict = CONTRADICTED

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        for number, name in enumerate(("CE", "random sampling", "FullKD")):
            places = [i + 0.27 * (number - 1) for i in range(len(found))]
            ours = [Mean.of([1.0]) if name == "FullKD" else Mean.of(one[name]) for one in found.values()]
            axes.bar(
                places, [one.mean for one in ours], 0.25, color=COLOURS[number], hatch=("", "//", "..")[number],
                yerr=[0 if math.isnan(one.error) else one.error for one in ours], capsize=4, edgecolor="white",
                label=name,
            )  # fmt: skip
            if name != "FullKD":
                paper = [PAPER[times][number] for times in found]
                axes.plot(places, paper, "wD", markeredgecolor="black", label="the paper" if number == 0 else None)
        axes.set_xticks(
            range(len(found)), [f"teacher {ours['larger'][0]:.1f} x the student" for ours in found.values()]
        )
        axes.set_ylabel("steps per second over FullKD's")
        figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False)

    claim.end(rule, verdict, draw, digits={"x FullKD": 2, "time over CE's, % more": 1})


if __name__ == "__main__":
    main()
