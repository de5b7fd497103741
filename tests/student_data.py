"""A tiny student in training, as a process that may be killed."""

import os
import signal
import sys
from pathlib import Path

from sklformat.distill.student.training import train
from sklformat.settings.train import TrainConfig


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


if __name__ == "__main__":
    train_until(*map(Path, sys.argv[1:3]), *map(int, sys.argv[3:]))
