"""
What does a step of transformers' Trainer cost with the loss of SparseKDTrainer, over one with its own cross-entropy?

The same student, batches of the same size and the same optimizer; a step is all from one optimizer step to the next:
batch, forward, backward, clipping, update.  The ways, in the same run:

* sparse KL: ``SparseKDTrainer`` over a cache of about 12 records per position;
* cross-entropy: ``Trainer`` over the same tokens, with the model's own loss.  This is the peer of the goal
  (ratio <= 1.02);
* one record: ``SparseKDTrainer(method="ce")``, which is cross-entropy by our chunked loss;
* again: sparse KL itself as its own peer, which shows the noise of the ratios.

Each round trains some steps in each way, one after the other, in changing order; a round's figure is its median step,
the ratio the median over rounds of each pair's own.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from timing import processor
from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

import sklformat as skl
from sklformat.integrations.transformers import SparseKDTrainer

GOAL = 1.02


class Clock(TrainerCallback):
    """Seconds from the end of each step to the end of the next."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._last: float | None = None

    def on_train_begin(self, *_: object, **__: object) -> None:
        self.seconds, self._last = [], None

    def on_step_end(self, *_: object, **__: object) -> None:
        now = time.perf_counter()
        if self._last is not None:
            self.seconds.append(now - self._last)
        self._last = now


def write_cache(path: Path, vocab_size: int, seq_len: int, num_sequences: int, rounds: int) -> None:
    rng = np.random.default_rng(0)
    header = skl.Header(vocab_size=vocab_size, seq_len=seq_len, kind="counts", rounds=rounds)
    weights = 1 / np.arange(1, 513)
    with skl.ShardWriter(path, header=header) as writer:
        for _ in range(num_sequences):
            ids, counts, offsets = [], [], [0]
            for start in rng.integers(0, vocab_size - 512, seq_len):
                drawn, number = np.unique(rng.choice(512, rounds, p=weights / weights.sum()), return_counts=True)
                ids.append(drawn + start)
                counts.append(number)
                offsets.append(offsets[-1] + len(drawn))
            targets = skl.SparseTargets(token_ids=np.concatenate(ids), counts=np.concatenate(counts), offsets=offsets)
            writer.append(rng.integers(0, vocab_size, seq_len + 1), targets)


def main() -> None:
    parser = argparse.ArgumentParser(description="Cost of a Trainer step with the sparse loss over one with its own.")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=6, help="steps of a round, of which the first is not counted")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default: 1)")
    parser.add_argument("--vocab-size", type=int, default=32_000)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--draws", type=int, default=14, help="draws per position (14: about 12 records)")
    parser.add_argument("--bf16", action="store_true", help="autocast to bfloat16")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder) / "cache.skl"
        write_cache(cache, options.vocab_size, options.seq_len, options.batch_size * options.steps, options.draws)
        opened = skl.open(cache)
        records = sum(len(sequence.targets.token_ids) for sequence in opened) / len(opened) / options.seq_len

        def student() -> LlamaForCausalLM:
            torch.manual_seed(0)
            size = options.hidden_size
            heads = {"num_attention_heads": size // 64, "num_key_value_heads": size // 64}
            config = LlamaConfig(
                vocab_size=options.vocab_size, hidden_size=size, intermediate_size=8 * size // 3,
                num_hidden_layers=options.layers, **heads,
            )  # fmt: skip
            return LlamaForCausalLM(config)

        def arguments() -> TrainingArguments:
            return TrainingArguments(
                folder, max_steps=options.steps, per_device_train_batch_size=options.batch_size, report_to=[],
                save_strategy="no", logging_strategy="no", disable_tqdm=True, bf16=options.bf16,
            )  # fmt: skip

        tokens = [torch.from_numpy(sequence.tokens.astype(np.int64))[:-1] for sequence in opened]
        rows = [{"input_ids": ids, "labels": ids} for ids in tokens]
        ways = {
            "sparse KL": SparseKDTrainer(student(), arguments(), cache=cache),
            "cross-entropy": Trainer(student(), arguments(), train_dataset=rows),
            "one record": SparseKDTrainer(student(), arguments(), cache=cache, method="ce"),
            "again": SparseKDTrainer(student(), arguments(), cache=cache),
        }
        for trainer in ways.values():
            trainer.remove_callback(PrinterCallback)
        clocks = {name: Clock() for name in ways}
        for name, trainer in ways.items():
            trainer.add_callback(clocks[name])
            trainer.train()
        found: dict[str, list[float]] = {name: [] for name in ways}
        for number in range(options.rounds):
            for name in list(ways) if number % 2 else list(reversed(ways)):
                ways[name].train()
                found[name].append(statistics.median(clocks[name].seconds))

    device = "one GPU" if torch.cuda.is_available() else f"{processor()}, {options.threads} thread(s)"
    print(f"{device}, torch {torch.__version__}, {records:.1f} records per position, {options}")
    print(f"{'way':<15} {'seconds':>9}  sparse KL / way (median of {options.rounds} pairs)")
    for name, seconds in found.items():
        ratio = statistics.median(ours / theirs for ours, theirs in zip(found["sparse KL"], seconds, strict=True))
        print(f"{name:<15} {statistics.median(seconds):>9.4f}  {ratio:.3f}")
    ratio = statistics.median(a / b for a, b in zip(found["sparse KL"], found["cross-entropy"], strict=True))
    print(f"goal: at most {GOAL} of the Trainer's own cross-entropy: {'held' if ratio <= GOAL else 'missed'}")


if __name__ == "__main__":
    main()
