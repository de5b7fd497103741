"""
SIGKILL of a real writer process, at every point of its life and at random moments.

A child appends, flushes and seals, and tells through a pipe how many sequences it was told are saved.  After each death
the laws of SPEC section 10 hold: no invalid sealed shard, every acknowledged sequence is there, the shard that is
resumed in the end is the undisturbed one.
"""

import multiprocessing
import os
import random
import signal

import pytest
import reference
import strategies

import sklformat as skl
from sklformat.files.disk import Disk

SETTINGS = strategies.small_settings()
HEADER = strategies.header_of(SETTINGS)
FORK = multiprocessing.get_context("fork")


class MortalDisk(Disk):
    """Kills its process at a call, counted from 0: before it, in the middle of its write, or after it."""

    def __init__(self, call, when):
        self.left, self.when = call, when

    def strike(self, when):
        if self.left == 0 and when == self.when:
            os.kill(os.getpid(), signal.SIGKILL)

    def around(self, act):
        self.strike("before")
        result = act()
        self.strike("after")
        self.left -= 1
        return result

    def create(self, path):
        return self.around(lambda: super(MortalDisk, self).create(path))

    def reopen(self, path):
        return self.around(lambda: super(MortalDisk, self).reopen(path))

    def write(self, fd, data, offset):
        if self.left == 0 and self.when == "during":
            os.pwrite(fd, bytes(data)[: len(data) // 2], offset)
            self.strike("during")
        self.around(lambda: super(MortalDisk, self).write(fd, data, offset))

    def truncate(self, fd, size):
        self.around(lambda: super(MortalDisk, self).truncate(fd, size))

    def sync(self, fd):
        self.around(lambda: super(MortalDisk, self).sync(fd))

    def rename(self, source, target):
        self.strike("before")
        source.rename(target)
        self.strike("during")
        self.sync_directory(target.parent)

    def sync_directory(self, path):
        self.around(lambda: super(MortalDisk, self).sync_directory(path))


def write(path, pipe, disk, sequences, flush_every):
    """The child: go on with the shard, and send what is saved after each flush."""
    with skl.ShardWriter(path, header=HEADER, resume=True, disk=disk) as writer:
        for number in range(len(writer), sequences):
            sequence = strategies.small_sequence(number)
            writer.append(sequence.tokens, strategies.targets_of(SETTINGS.kind, sequence.positions))
            if (number + 1) % flush_every == 0:
                writer.flush()
                pipe.send(number + 1)
    pipe.send(sequences)


class Life:
    """A child that writes; ``wait`` returns the most that it reported as saved, and its exit code."""

    def __init__(self, path, disk, sequences, flush_every):
        self.pipe, theirs = FORK.Pipe(duplex=False)
        self.process = FORK.Process(target=write, args=(path, theirs, disk, sequences, flush_every))
        self.process.start()
        theirs.close()

    def wait(self):
        saved = 0
        try:
            while True:
                saved = self.pipe.recv()
        except EOFError:
            pass
        self.process.join()
        self.pipe.close()
        return saved, self.process.exitcode


def check_what_is_left(path, saved, whole):
    """The laws, on what a death left; True: the shard is sealed."""
    if path.exists():
        assert whole == path.read_bytes()
        return True
    if not path.with_name(path.name + ".partial").exists():
        assert saved == 0
        return False
    assert saved <= skl.recover(path).sequences
    return False


@pytest.mark.parametrize(("when", "deaths"), [("before", 13), ("during", 7), ("after", 13)])
def test_killed_at_every_point(tmp_path, when, deaths):
    """Death before, in and after each call of the writer: create, header, syncs, blocks, index, trailer, rename."""
    sequences, whole, codes = 3, strategies.small_shard(3), []
    for call in range(14):  # one more than there are
        path = tmp_path / f"{call}.skl"
        saved, code = Life(path, MortalDisk(call, when), sequences, 2).wait()
        codes.append(code)
        if not check_what_is_left(path, saved, whole):
            assert (sequences, 0) == Life(path, Disk(), sequences, 2).wait()
        assert whole == path.read_bytes()
    assert deaths == codes.count(-signal.SIGKILL)
    assert 14 - deaths == codes.count(0)


def kill_at_random(directory, seed, kills):
    """Let one shard after another be written under fire until so many deaths have happened."""
    generator = random.Random(seed)
    sequences = 60
    whole, deaths, number = reference_shard(sequences), 0, 0
    while deaths < kills:
        path = directory / f"{number}.skl"
        number += 1
        sealed = False
        while not sealed:
            life = Life(path, Disk(), sequences, generator.randrange(1, 8))
            if deaths < kills:
                life.process.join(generator.expovariate(1 / 0.02))
                life.process.kill()
            saved, code = life.wait()
            deaths += code == -signal.SIGKILL
            sealed = check_what_is_left(path, saved, whole)
    assert [] == skl.verify(path)


def reference_shard(sequences):
    return reference.encode_shard(SETTINGS, [strategies.small_sequence(number) for number in range(sequences)])


def test_killed_at_random(tmp_path):
    """20 deaths at any moment, again and again for the same shard."""
    kill_at_random(tmp_path, 1, 20)


@pytest.mark.soak
def test_killed_at_random_often(tmp_path):
    """200 deaths at any moment."""
    kill_at_random(tmp_path, 2, 200)
