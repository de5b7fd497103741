"""
What does a step of the sparse KL loss cost over a step of cross-entropy?

Step: loss of the output layer and gradients of hidden states and weight.  The ways, in the same run:

* sparse KL: ``linear_sparse_kl`` with about 12 records per position;
* one record: the same function with one record per position, the label with probability 1, which is cross-entropy.
  This is the peer of the goal (ratio <= 1.02): the same chunks and dense passes, so that the ratio shows what the
  records cost and nothing else;
* records cost: the same ratio, with less noise.  The matrix products being the same, all that differs is the pass over
  the rows; it is timed alone for both, and its extra time added to 1 as a share of the step's (CPU seconds);
* again: sparse KL itself as its own peer, which shows the noise of the ratios;
* chunked torch: the loop a user would write, ``cross_entropy`` of 2048 positions at a time, backward at once;
* plain torch: ``cross_entropy(hidden @ weight.T)``, all logits at once;
* ``linear_cross_entropy`` of torch, where this version has it (it chunks too, by its own rule).

The ratio is the median over rounds of each pair's own (see timing.py).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from timing import measure, processor
from torch import Tensor
from torch.nn import functional

from sklformat.distill.losses.kl import MAX_CHUNK_POSITIONS, linear_sparse_kl
from sklformat.distill.losses.rows import LossRows

GOAL = 1.02
SHAPES = [(256, 32_000, 2048), (1024, 32_000, 512), (512, 128_256, 256)]
QUICK_SHAPES = [(256, 32_000, 1024)]


@dataclass
class Records:
    token_ids: Tensor
    probs: Tensor
    offsets: Tensor


def sparse_records(num_positions: int, vocab_size: int, mean_records: int, g: torch.Generator) -> Records:
    """Ragged counts of 50 draws: between 1 and twice the mean of records per position, distinct ids."""
    lengths = torch.randint(1, 2 * mean_records, (num_positions,), generator=g)
    # A random start and an odd stride smaller than V / records: distinct, and scattered over the vocabulary.
    step = vocab_size // (2 * mean_records) - 1
    rank = torch.cat([torch.arange(int(n)) for n in lengths])
    start = torch.randint(vocab_size, (num_positions,), generator=g).repeat_interleave(lengths)
    probs = torch.rand(len(rank), generator=g) + 0.1
    rows = torch.arange(num_positions).repeat_interleave(lengths)
    probs /= torch.zeros(num_positions).index_add_(0, rows, probs)[rows]
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    return Records(((start + rank * step) % vocab_size).int(), probs, offsets)


def chunked_cross_entropy(hidden_PD: Tensor, weight_VD: Tensor, labels_P: Tensor) -> None:
    for start in range(0, len(hidden_PD), MAX_CHUNK_POSITIONS):
        span = slice(start, start + MAX_CHUNK_POSITIONS)
        loss = functional.cross_entropy((hidden_PD[span] @ weight_VD.T).float(), labels_P[span], reduction="sum")
        (loss / len(hidden_PD)).backward()


def steps(D: int, V: int, P: int, mean_records: int, dtype: torch.dtype) -> dict[str, Callable[[], None]]:
    g = torch.Generator().manual_seed(0)
    hidden_PD = torch.randn(P, D, generator=g).to(dtype).requires_grad_()
    weight_VD = (torch.randn(V, D, generator=g) / D**0.5).to(dtype).requires_grad_()
    labels_P = torch.randint(V, (P,), generator=g)
    records = sparse_records(P, V, mean_records, g)
    one_record = Records(labels_P.int(), torch.ones(P), torch.arange(P + 1))

    def step(forward_backward: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            hidden_PD.grad = weight_VD.grad = None
            forward_backward()

        return run

    ways = {
        "sparse KL": step(lambda: linear_sparse_kl(hidden_PD, weight_VD, records).backward()),
        "one record": step(lambda: linear_sparse_kl(hidden_PD, weight_VD, one_record).backward()),
        "again": step(lambda: linear_sparse_kl(hidden_PD, weight_VD, records).backward()),
        "chunked torch": step(lambda: chunked_cross_entropy(hidden_PD, weight_VD, labels_P)),
        "plain torch": step(lambda: functional.cross_entropy((hidden_PD @ weight_VD.T).float(), labels_P).backward()),
    }
    if hasattr(functional, "linear_cross_entropy"):
        ways["linear_cross_entropy"] = step(
            lambda: functional.linear_cross_entropy(hidden_PD, weight_VD, labels_P).backward()
        )
    return ways


def records_cost(D: int, V: int, P: int, mean_records: int, dtype: torch.dtype, rounds: int) -> float:
    """1 + extra CPU seconds of the row pass for the records over one record per position, as a share of the step's."""
    g = torch.Generator().manual_seed(1)
    logits_PV = torch.randn(P, V, generator=g).to(dtype)
    buffer_PV = torch.empty_like(logits_PV)
    records = sparse_records(P, V, mean_records, g)
    one_record = Records(torch.randint(V, (P,), generator=g).int(), torch.ones(P), torch.arange(P + 1))

    def row_pass(targets: Records) -> float:
        buffer_PV.copy_(logits_PV)
        start = time.process_time()
        rows = LossRows(targets, "random_sampling", None, 0.0, None, num_positions=P, vocab_size=V, like=buffer_PV)
        loss = torch.zeros(())
        for _, blocks in rows.chunks(P):
            rows.run_chunk(blocks, buffer_PV, buffer_PV, loss)
        return time.process_time() - start

    extra = statistics.median(row_pass(records) - row_pass(one_record) for _ in range(3 * rounds))
    step = steps(D, V, P, mean_records, dtype)["one record"]
    step()
    cpu_seconds = []
    for _ in range(3):
        start = time.process_time()
        step()
        cpu_seconds.append(time.process_time() - start)
    return 1 + extra / statistics.median(cpu_seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description="Cost of a sparse KL step over a cross-entropy step.")
    parser.add_argument("--quick", action="store_true", help="one small shape, few rounds (seconds, not minutes)")
    parser.add_argument("--rounds", type=int, help="pairs for each peer (default: 7, quick: 5)")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default: 1)")
    parser.add_argument("--records", type=int, default=12, help="mean records per position (default: 12)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="type of the parameters")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rounds = args.rounds or (5 if args.quick else 7)
    print(f"{processor()}, {args.threads} thread(s), torch {torch.__version__}, {args.dtype}, {args.records} records")
    print(f"{'D':>5} {'V':>7} {'P':>6}  {'way':<21} {'seconds':>9}  sparse KL / way (median of {rounds} pairs)")
    held = True
    for D, V, P in QUICK_SHAPES if args.quick else SHAPES:
        results = measure("sparse KL", steps(D, V, P, args.records, getattr(torch, args.dtype)), rounds)
        for name, (median, ratio) in results.items():
            print(f"{D:>5} {V:>7} {P:>6}  {name:<21} {median:>9.3f}  {ratio:.3f}")
        cost = records_cost(D, V, P, args.records, getattr(torch, args.dtype), rounds)
        print(f"{D:>5} {V:>7} {P:>6}  {'records cost':<21} {'':>9}  {cost:.4f}")
        held &= cost <= GOAL
    print(f"goal: records cost at most {GOAL}: {'held' if held else 'missed'}")


if __name__ == "__main__":
    main()
