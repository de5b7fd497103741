"""Tiny caches, a tiny student in training, and the same as a process that may be killed."""

import json
import multiprocessing
import os
import signal
import sys
from pathlib import Path

import numpy as np
import tiny

import sklformat as skl
from sklformat.cli import main
from sklformat.distill.models import tokenization
from sklformat.distill.student.trackers import Reporter
from sklformat.distill.student.training import train
from sklformat.distill.text.fingerprints import tokenizer_fingerprint
from sklformat.distill.text.packing import PackedSequences
from sklformat.settings.train import TrainConfig

SEQ_LEN = 16


def write_cache(directory, packed, vocab_size, fingerprint, sampler, count, **facts):
    """A cache whose records put 3/4 on the label and 1/4 on the next id, drawn or as Top-K; its columns are noise."""
    counts = sampler == "multinomial"
    header = skl.Header(
        vocab_size=vocab_size,
        seq_len=SEQ_LEN,
        kind="counts" if counts else "ratios",
        rounds=8 if counts else 0,
        sampler=sampler,
        tokenizer_fingerprint=fingerprint,
        **facts,
    )
    directory.mkdir()
    with skl.ShardWriter(directory / "shard-00000.skl", header=header) as writer:
        for i in range(count):
            tokens = packed[i]
            ids = np.sort(np.stack([tokens[1:], (tokens[1:] + 1) % vocab_size], 1), axis=1)
            on_label = ids == tokens[1:, None]
            offsets = np.arange(SEQ_LEN + 1) * 2
            if counts:
                values = {"counts": np.where(on_label, 6, 2).ravel(), "token_ids": ids.ravel()}
            else:
                ids = np.stack([tokens[1:], (tokens[1:] + 1) % vocab_size], 1)
                values = {"weights": np.tile([0.6, 0.2], SEQ_LEN), "token_ids": ids.ravel()}
            columns = {name: -np.random.default_rng(i).random(SEQ_LEN) for name in header.columns}
            writer.append(tokens, skl.SparseTargets(offsets=offsets, **values), columns or None)


def write_place(root):
    """Caches of one text, drawn, Top-K, and with label_logprob, a teacher, and what ``tiny.write_place`` writes."""
    tokenizer = tiny.write_place(root)
    vocab_size, fingerprint = tokenization.num_ids(tokenizer), tokenizer_fingerprint(tokenizer)
    packed = PackedSequences(
        root / "tokens", seq_len=SEQ_LEN, separator_id=tokenization.separator_id(tokenizer), seed=0, count=20
    )
    write_cache(root / "random", packed, vocab_size, fingerprint, "multinomial", 20)
    write_cache(root / "topk", packed, vocab_size, fingerprint, "topk", 20)
    write_cache(root / "sure", packed, vocab_size, fingerprint, "multinomial", 20, columns=("label_logprob",))
    tiny.write_model(root / "teacher", tokenizer, hidden_size=24, max_positions=SEQ_LEN, seed=9, separator_id=None)
    return root


def config_of(place, out, **changes):
    values = {
        "out": out,
        "cache": place / "random",
        "tokenizer": str(place / "tokenizer"),
        "hidden_size": 16,
        "num_layers": 1,
        "num_heads": 2,
        "batch_size": 4,
        "steps": 12,
        "learning_rate": 1e-2,
        "log_every": 1,
        "save_every": 5,
        "device": "cpu",
    }
    return TrainConfig(**(values | changes))


def silent(*_):
    pass


def log_of(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def losses_of(out):
    return [(row["step"], row["loss"], row["gradient_norm"]) for row in log_of(out)]


def stop_at(step):
    def report(done, *_):
        if done == step:
            raise KeyboardInterrupt

    return report


def train_until(out, place, batch_size, kill):
    """Twelve steps on the tokens of ``tiny.write_place``; this process is killed after step ``kill`` (0: never)."""

    def report(step, *_):
        if step == kill:
            os.kill(os.getpid(), signal.SIGKILL)

    config = TrainConfig(
        out=out, tokens=place / "tokens", tokenizer=str(place / "tokenizer"), seq_len=16, method="ce", hidden_size=16,
        num_layers=1, num_heads=2, steps=12, batch_size=batch_size, save_every=5, log_every=1, device="cpu",
        learning_rate=1e-2,
    )  # fmt: skip
    train(config, report=report)


def main_with_signals(words, step, number, count, rank=0):
    """As ``main``; the signal comes ``count`` times once step ``step`` is logged, to this process and its workers."""
    line = Reporter.line

    def signalling(reporter, done, row):
        line(reporter, done, row)
        if done == step and int(os.environ.get("RANK", "0")) == rank:
            for worker in multiprocessing.active_children():
                os.kill(worker.pid, signal.SIGINT)
            for _ in range(count):
                os.kill(os.getpid(), number)

    multiprocessing.set_start_method("fork", force=True)  # as in a process of its own
    Reporter.line = signalling
    return main(words)


if __name__ == "__main__":
    train_until(*map(Path, sys.argv[1:3]), *map(int, sys.argv[3:]))
