"""What a loader holds: few open files, little memory, and no more of it after a million sequences."""

import contextlib
import os
import signal
import subprocess
import sys
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pytest
from strategies import FastDisk
from torch.utils.data import DataLoader, IterableDataset

import sklformat as skl
from sklformat.cache.contents import scan_directory
from sklformat.cache.manifest import write_manifest
from sklformat.distill import SparseLogitDataset

MIB = 1 << 20


def write_shards(directory, num_shards, size, positions=4):
    """A cache of many small shards with its manifest."""
    directory.mkdir()
    rng = np.random.default_rng(0)
    for number in range(num_shards):
        header = skl.Header(
            vocab_size=500,
            seq_len=positions,
            kind="counts",
            rounds=3,
            shard_number=number,
            first_sequence=number * size,
        )
        with skl.ShardWriter(directory / f"{number:05}.skl", header=header, disk=FastDisk()) as writer:
            for _ in range(size):
                low = rng.integers(0, 499, positions)
                targets = skl.SparseTargets(
                    token_ids=np.stack([low, low + 1], axis=1).ravel(),
                    counts=[1, 2] * positions,
                    offsets=np.arange(0, 2 * positions + 1, 2),
                )
                writer.append(rng.integers(0, 500, positions + 1), targets)
    write_manifest(directory, scan_directory(directory))
    return directory


def open_files(directory):
    """How many files of a directory this process maps, and how many it has open."""
    maps = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if str(directory) in line}
    files = 0
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # a thread closed it just now
            files += str(directory) in str(link.readlink())
    return len(maps), files


def anonymous_bytes():
    """Memory of this process that no file backs."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise AssertionError


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("memory") / "many", 150, 2)


@pytest.mark.parametrize("batch_size", [3, 20, 140])
@pytest.mark.parametrize("io", ["mmap", "pread"])
def test_few_files_are_open(many, io, batch_size):
    """Batches over many more shards than 64, four in the making, never have more than 64 of them open."""
    with skl.open(many, io) as cache:
        ds = SparseLogitDataset(cache, batch_size=batch_size, prefetch=6)
        for _ in range(2):
            for _ in ds:
                maps, files = open_files(many)
                assert maps <= (64 if io == "mmap" else 0)
                assert files <= 64


def no_closure(i):
    return [i]


def test_a_dataset_pickles_small(many):
    """What goes to a worker process is below 4 KiB, whatever the number of shards."""
    ds = SparseLogitDataset(many, batch_size=4, tokens=no_closure, window=8)
    assert len(ForkingPickler.dumps(ds)) < 4096


KILLED = """
import os, signal, sys
from torch.utils.data import DataLoader
from sklformat.distill import SparseLogitDataset

stream = iter(DataLoader(SparseLogitDataset(sys.argv[1], batch_size=4), batch_size=None, num_workers=2))
next(stream)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.soak
def test_a_killed_loader_leaves_nothing(many):
    """SIGKILL in the middle of an epoch leaves no shared memory behind, and the next run starts as if nothing was."""
    before = set(os.listdir("/dev/shm"))
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", KILLED, str(many)], capture_output=True, text=True, check=False)
        assert (-signal.SIGKILL, "") == (done.returncode, done.stderr)
    left = {name for name in os.listdir("/dev/shm") if name.startswith(("torch", "psm", "sem"))} - before
    assert set() == left


class Measured(IterableDataset):
    """In a worker process: many epochs of a dataset, and the anonymous memory after some and after all of them."""

    def __init__(self, ds, warm_epochs, epochs):
        self.ds, self.warm_epochs, self.epochs = ds, warm_epochs, epochs

    def __iter__(self):
        seen = 0
        for epoch in range(self.epochs):
            self.ds.set_epoch(epoch)
            if epoch == self.warm_epochs:
                yield seen, anonymous_bytes()
            for batch in self.ds:
                seen += batch.input_ids.shape[0]
        yield seen, anonymous_bytes()


def growth(ds, warm_epochs, epochs):
    """Sequences and bytes that a worker process grew by after its first epochs."""
    (before, first), (after, last) = list(DataLoader(Measured(ds, warm_epochs, epochs), batch_size=None, num_workers=1))
    assert first < 1 << 30
    return after - before, last - first


@pytest.mark.soak
@pytest.mark.parametrize("io", ["mmap", "pread"])
def test_memory_is_constant_over_a_million_sequences(tmp_path, io):
    """A worker's own memory grows by less than 1 MiB while it makes a million sequences, checked against tokens."""
    path = write_shards(tmp_path / "cache", 10, 1000)
    with skl.open(path) as cache:
        np.save(tmp_path / "tokens.npy", np.stack([cache[i].tokens for i in range(len(cache))]))
    tokens = np.load(tmp_path / "tokens.npy", mmap_mode="r")
    sequences, grown = growth(SparseLogitDataset(skl.open(path, io), batch_size=50, tokens=tokens), 10, 110)
    assert 1_000_000 == sequences
    assert grown < MIB


@pytest.mark.soak
@pytest.mark.parametrize("io", ["mmap", "pread"])
def test_memory_is_constant_while_shards_come_and_go(many, io):
    """The same where hardly a sequence finds its shard open: opening and letting go of shards leaves nothing."""
    sequences, grown = growth(SparseLogitDataset(skl.open(many, io), batch_size=10), 20, 120)
    assert 30_000 == sequences
    assert grown < MIB


@pytest.mark.soak
def test_two_thousand_shards(tmp_path):
    """2000 shards: at most 64 are mapped at any time."""
    path = write_shards(tmp_path / "cache", 2000, 1)
    for batch_size in (16, 250):
        for _ in SparseLogitDataset(skl.open(path, "mmap"), batch_size=batch_size):
            assert open_files(path)[0] <= 64
