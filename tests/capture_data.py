"""A small made-up capture for the tests of ring and writer process: the same sequences in every process."""

import os
import signal
import sys
from pathlib import Path

import numpy as np
from system import wait_for

import sklformat as skl
from sklformat.capture import Capture, merge_draws

HEADER = skl.Header(vocab_size=1000, seq_len=32, kind="counts", rounds=20, capture={"teacher": "made up"})
NUM_SEQUENCES, PER_SHARD = 11, 4


def tokens_of(sequence):
    return np.random.default_rng(sequence).integers(0, HEADER.vocab_size, HEADER.seq_len + 1)


def draws_of(sequence):
    rng = np.random.default_rng(10_000 + sequence)
    return np.sort(rng.integers(0, HEADER.vocab_size, (HEADER.seq_len, HEADER.rounds)) // 7 * 7, axis=1)


def open_capture(directory, **changes):
    settings = {"header": HEADER, "num_sequences": NUM_SEQUENCES, "sequences_per_shard": PER_SHARD} | changes
    return Capture(directory, **settings)


def push_all(capture):
    for work in capture.shards():
        for sequence in range(work.next_sequence, work.end):
            capture.push_draws(sequence, tokens_of(sequence), draws_of(sequence))


def write_undisturbed(directory):
    """The cache as it must be, written without ring or second process."""
    directory.mkdir()
    for number, first in enumerate(range(0, NUM_SEQUENCES, PER_SHARD)):
        header = skl.Header(
            vocab_size=1000,
            seq_len=32,
            kind="counts",
            rounds=20,
            capture={"teacher": "made up"},
            shard_number=number,
            first_sequence=first,
        )
        with skl.ShardWriter(directory / f"shard-{number:05d}.skl", header=header) as writer:
            for sequence in range(first, min(first + PER_SHARD, NUM_SEQUENCES)):
                writer.append(tokens_of(sequence), merge_draws(draws_of(sequence)))
    return shard_bytes(directory)


def shard_bytes(directory):
    return {path.name: path.read_bytes() for path in Path(directory).glob("*.skl")}


def wait_for_durable(capture, sequences):
    wait_for(lambda: capture.durable >= sequences)


def main(directory, victim, after, rank="0", world_size="1", run=None):
    """
    Capture, and kill the teacher or the writer process after so many pushes; run by the tests as a process.

    "stopped": the teacher dies while its writer process is stopped.
    """
    ranks = {"rank": int(rank), "world_size": int(world_size), "run": run}
    with open_capture(directory, checkpoint_bytes=1, **ranks) as capture:
        if capture._process is None:
            return
        print(capture._process.pid, flush=True)
        pushed = 0
        for work in capture.shards():
            for sequence in range(work.next_sequence, work.end):
                if pushed == int(after):
                    if victim == "stopped":
                        os.kill(capture._process.pid, signal.SIGSTOP)
                    if victim in ("teacher", "stopped"):
                        os.kill(os.getpid(), signal.SIGKILL)
                    if victim == "writer":
                        wait_for_durable(capture, sequence)
                        os.kill(capture._process.pid, signal.SIGKILL)
                capture.push_draws(sequence, tokens_of(sequence), draws_of(sequence))
                pushed += 1


if __name__ == "__main__":
    main(*sys.argv[1:])
