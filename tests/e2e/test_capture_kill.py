"""kill -9 of teacher or writer process, anywhere: sealed shards are whole, the next run completes the same cache."""

import contextlib
import itertools
import os
import random
import signal
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from capture_data import NUM_SEQUENCES, open_capture, push_all, shard_bytes, write_undisturbed
from system import HANGS, alive, wait_for

import sklformat as skl
from sklformat.capture import session

_DATA = Path(__file__).parents[1] / "capture_data.py"

# Put before the standard library's own start in the writer process: end it at the n-th call of a function of os.
_DIE_AT = """
import os, signal, sys
if "capture.scribe" in " ".join(sys.orig_argv):
    real, left = os.{name}, {calls}
    def dying(*arguments, **named):
        global left
        left -= 1
        if left == 0:
            {before}
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **named)
    os.{name} = dying
"""


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return write_undisturbed(tmp_path_factory.mktemp("undisturbed") / "cache")


def begin(directory, victim="nobody", after=-1, *ranks, start=None, stderr=subprocess.DEVNULL):
    """A teacher's process; its first line is the process id of its writer."""
    paths = [str(start)] if start else []
    return subprocess.Popen(
        [sys.executable, str(_DATA), str(directory), victim, str(after), *map(str, ranks)],
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([*paths, str(_DATA.parents[1])])},
    )


def run_until_killed(directory, victim, after, start=None):
    """A teacher's process that ends by a kill of it or of its writer; both are gone on return."""
    process = begin(directory, victim, after, start=start, stderr=subprocess.PIPE)
    # The writer holds the same pipes: their end is the end of both processes.
    out, err = process.communicate(timeout=HANGS)
    writer = int(out)
    wait_for(lambda: not alive(writer))  # descriptors close a moment before the process is gone
    return process.returncode, err


def check_and_finish(directory, undisturbed):
    """What was sealed is right; the next run recovers the rest, and makes exactly the undisturbed cache."""
    for name, content in shard_bytes(directory).items():
        assert undisturbed[name] == content
    with open_capture(directory) as run:
        kept = NUM_SEQUENCES - sum(work.end - work.next_sequence for work in run.shards())
        push_all(run)
    assert undisturbed == shard_bytes(directory)
    assert [] == skl.verify(directory)
    assert {"manifest.json", *undisturbed} == {path.name for path in directory.iterdir()}
    return kept


@pytest.mark.parametrize("after", [0, 3, 4, 6])
def test_killed_teacher(tmp_path, undisturbed, after):
    """Every sequence that the teacher handed over before its death is kept: the writer drains the ring and ends."""
    status, _ = run_until_killed(tmp_path / "cache", "teacher", after)
    assert -signal.SIGKILL == status
    assert after == check_and_finish(tmp_path / "cache", undisturbed)


@pytest.mark.parametrize("after", [2, 8])
def test_killed_writer(tmp_path, undisturbed, after):
    """The teacher raises, and every sequence that was called durable is kept."""
    status, err = run_until_killed(tmp_path / "cache", "writer", after)
    assert status == 1
    assert f"killed by signal 9; sequences below {after} are safe" in err
    assert check_and_finish(tmp_path / "cache", undisturbed) >= after


@pytest.mark.parametrize(
    ("name", "calls", "before"),
    [
        ("rename", 1, "pass"),  # index and trailer are written, the shard has not its name yet
        ("rename", 2, "real(*arguments, **named)"),  # it has, and the directory is not synced
        ("fdatasync", 1, "pass"),  # the header is not known to be durable
        ("pwrite", 4, "real(arguments[0], arguments[1][:100], arguments[2])"),  # in the middle of a block
    ],
)
def test_writer_killed_between_two_calls(tmp_path, undisturbed, name, calls, before):
    """The places where a half-done change would show: none does."""
    (tmp_path / "start").mkdir()
    (tmp_path / "start" / "sitecustomize.py").write_text(_DIE_AT.format(name=name, calls=calls, before=before))
    status, err = run_until_killed(tmp_path / "cache", "nobody", -1, tmp_path / "start")
    assert status == 1
    assert "killed by signal 9" in err
    check_and_finish(tmp_path / "cache", undisturbed)


def test_killed_again_and_again(tmp_path, undisturbed):
    """A capture that is killed after every few sequences still ends with the undisturbed cache."""
    runs = 0
    while len(shard_bytes(tmp_path / "cache")) < len(undisturbed):
        status, _ = run_until_killed(tmp_path / "cache", ("teacher", "writer")[runs % 2], 3)
        runs += 1
        if status == 0:
            break
    assert runs >= NUM_SEQUENCES // 3
    assert NUM_SEQUENCES == check_and_finish(tmp_path / "cache", undisturbed)


def test_a_new_teacher_waits_for_the_old_writer(tmp_path, undisturbed, monkeypatch):
    """A run that begins while a dead teacher's writer still drains never writes beside it."""
    process = begin(tmp_path / "cache", "stopped", 6)
    writer = int(process.stdout.readline())
    process.wait()
    monkeypatch.setattr(session, "_TAKEOVER_SECONDS", 0.1)
    try:
        with pytest.raises(skl.InUseError, match="writer process of an interrupted capture is still writing"):
            open_capture(tmp_path / "cache").__enter__()
    finally:
        os.kill(writer, signal.SIGCONT)
    monkeypatch.undo()
    assert 6 == check_and_finish(tmp_path / "cache", undisturbed)
    process.stdout.close()


@pytest.mark.soak
def test_how_soon_a_killed_writer_is_noticed(tmp_path):
    """A teacher that waits for room in the ring learns within 200 ms that its writer was killed; the figure of 30."""
    seconds = []
    for number in range(30):
        killed = []

        def kill(capture, killed=killed):
            wait_for(lambda: capture.wait_seconds > 0)
            os.kill(capture._process.pid, signal.SIGKILL)
            killed.append(time.monotonic())

        with (
            pytest.raises(skl.CaptureError, match="killed by signal 9"),
            open_capture(tmp_path / str(number), ring_bytes=8192) as capture,
        ):
            os.kill(capture._process.pid, signal.SIGSTOP)
            killer = threading.Thread(target=kill, args=(capture,))
            killer.start()
            try:
                push_all(capture)
            finally:
                seconds.append(time.monotonic())
                killer.join()
        seconds[-1] -= killed[0]
    print(f"a killed writer is noticed after {statistics.median(seconds) * 1e3:.1f} ms, "
          f"at the most {max(seconds) * 1e3:.1f} ms")  # fmt: skip
    assert statistics.median(seconds) < 0.2


@pytest.mark.soak
def test_killed_at_any_moment(tmp_path, undisturbed):
    """200 kills of teacher or writer at random moments: every cache ends as the undisturbed one."""
    rng = random.Random(0)
    kills = number = 0
    while kills < 200:
        directory = tmp_path / str(number)
        number += 1
        while len(shard_bytes(directory)) < len(undisturbed):
            process = begin(directory)
            writer = int(process.stdout.readline())
            time.sleep(rng.random() * 0.5)
            with contextlib.suppress(ProcessLookupError):
                os.kill(rng.choice([process.pid, writer]), signal.SIGKILL)
                kills += 1
            process.communicate()
            wait_for(lambda writer=writer: not alive(writer))
            for name, content in shard_bytes(directory).items():
                assert undisturbed[name] == content
        assert NUM_SEQUENCES == check_and_finish(directory, undisturbed)


@pytest.mark.soak
def test_ranks_killed_at_any_moment(tmp_path, undisturbed):
    """200 kills of teachers and writers of one to three ranks at random moments: every cache ends as undisturbed."""
    rng = random.Random(1)
    kills = number = 0
    while kills < 200:
        directory = tmp_path / str(number)
        number += 1
        for run in itertools.count():
            if len(shard_bytes(directory)) == len(undisturbed):
                break
            world_size = rng.randint(1, 3)
            ranks = [begin(directory, "nobody", -1, rank, world_size, f"run {run}") for rank in range(world_size)]
            writers = [int(line) for process in ranks if (line := process.stdout.readline())]
            time.sleep(rng.random() * 0.3)
            for pid in rng.sample([*(process.pid for process in ranks), *writers], rng.randint(1, len(ranks))):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                    kills += 1
            for process in ranks:
                process.communicate()
            for writer in writers:
                wait_for(lambda writer=writer: not alive(writer))
            for name, content in shard_bytes(directory).items():
                assert undisturbed[name] == content
            if not (directory / "manifest.json").exists():
                with pytest.raises(skl.MissingShardError):
                    skl.open(directory)
        check_and_finish(directory, undisturbed)
