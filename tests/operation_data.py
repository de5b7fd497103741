"""Small made-up caches for the tests of merge, slice and subsample, and a run that is killed at any of its writes."""

import functools
import os
import signal

import numpy as np

import sklformat as skl

COLUMNS = ("label_logprob", "entropy", "document_start", "record_logprob")
VOCAB, ROUNDS, SEQ_LEN, PER_SHARD = 300, 20, 8, 3


def header(**changes):
    settings = {"vocab_size": VOCAB, "seq_len": SEQ_LEN, "kind": "counts", "rounds": ROUNDS}
    return skl.Header(**settings | changes)


def sequence(of, number):
    """Tokens, records and columns of a sequence; some positions have no record."""
    rng = np.random.default_rng(number)
    positions = of.seq_len or 3 + number % 4
    per_position = [
        np.zeros(0, np.int64) if rng.random() < 0.2 else rng.integers(0, 40, of.rounds or 5) for _ in range(positions)
    ]
    ids, counts = zip(*(np.unique(draws, return_counts=True) for draws in per_position), strict=True)
    offsets = np.concatenate([[0], np.cumsum([part.size for part in ids])])
    ids, counts = np.concatenate(ids), np.concatenate(counts)
    given = {"counts": counts} if of.kind == "counts" else {"weights": counts / max(of.rounds, 5)}
    has = np.diff(offsets) > 0
    columns = {
        "label_logprob": np.where(has, -rng.random(positions), 0),
        "entropy": np.where(has, rng.random(positions), 0),
        "document_start": rng.random(positions + 1) < 0.3,
        "record_logprob": -ids / 16,
    }
    targets = skl.SparseTargets(token_ids=ids, offsets=offsets, **given)
    return rng.integers(0, of.vocab_size, positions + 1), targets, {name: columns[name] for name in of.columns}


def write(path, count, first=0, per_shard=PER_SHARD, **changes):
    """A cache of the sequences ``first`` and those that follow it."""
    of = header(**changes)
    with skl.CacheWriter(path, header=of, sequences_per_shard=per_shard) as writer:
        for number in range(first, first + count):
            writer.append(*sequence(of, number))
    return path


def content(directory):
    """Every file's bytes by its path within."""
    files = (path for path in directory.rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in files}


CALLS = ("pwrite", "fdatasync", "fsync", "rename", "unlink", "ftruncate")


def run_until_call(call, work):
    """
    Run in a forked process that kills itself before its n-th call of the system that changes files.

    Returns whether it was killed; else it came to its end.
    """
    child = os.fork()
    if child == 0:
        left = [call]

        def dying(real, *arguments, **named):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **named)

        try:
            for name in CALLS:
                setattr(os, name, functools.partial(dying, getattr(os, name)))
            work()
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGKILL), status
    return status != 0
