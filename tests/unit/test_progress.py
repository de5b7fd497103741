"""Progress: what is said where nobody watches, under a clock of the test's own; and a bar on a terminal."""

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios

import pytest

from sklformat import progress


@pytest.fixture
def clock(monkeypatch):
    """The time in seconds, in a list of one."""
    now = [1000.0]
    monkeypatch.setattr(progress, "clock", lambda: now[0])
    return now


def test_a_line_at_the_beginning_and_then_each_minute(capfd, clock):
    """The first line comes at once, the second soon, the others a minute apart; the last says the time it took."""
    with progress.show("train ce", 1200, unit="step", first=200) as reach:
        assert "train ce: 200 of 1,200 steps\n" == capfd.readouterr().err
        for step in range(201, 501):
            clock[0] += 1
            reach(step, f"loss {step}.0")
    assert (
        "train ce: 210 of 1,200 steps, loss 210.0, about 16 min left\n"
        "train ce: 270 of 1,200 steps, loss 270.0, about 16 min left\n"
        "train ce: 330 of 1,200 steps, loss 330.0, about 14 min left\n"
        "train ce: 390 of 1,200 steps, loss 390.0, about 14 min left\n"
        "train ce: 450 of 1,200 steps, loss 450.0, about 12 min left\n"
        "train ce: 500 of 1,200 steps, in 5 min\n"
    ) == capfd.readouterr().err


def test_a_short_run_says_its_beginning_alone(capfd, clock):
    """What is over before anybody asks has one line."""
    with progress.show("eval", 3, unit="sequence") as reach:
        clock[0] += 9
        reach(3)
    assert "eval: 0 of 3 sequences\n" == capfd.readouterr().err


def test_a_run_that_does_not_move_has_no_time_left(capfd, clock):
    """Nothing done gives no figure; a run that fails says how far it came."""
    with pytest.raises(ZeroDivisionError), progress.show("cache c", 1, unit="sequence") as reach:
        clock[0] += 20
        reach(0)
        raise ZeroDivisionError
    expected = "cache c: 0 of 1 sequence\ncache c: 0 of 1 sequence\ncache c: 0 of 1 sequence, in 20 s\n"
    assert expected == capfd.readouterr().err


def test_bytes_and_what_nobody_can_count(capfd, clock):
    """Many bytes are megabytes, few are bytes; without a total there is no time left."""
    with progress.show("verify", 25_000_000, unit="byte") as reach:
        clock[0] += 10
        reach(5_000_000)
    with progress.show("verify", 900_000, unit="byte"):
        pass
    with progress.show("reading", None, unit="sequence") as reach:
        clock[0] += 7500
        reach(12_345)
    assert (
        "verify: 0.0 of 25.0 MB\nverify: 5.0 of 25.0 MB, about 40 s left\nverify: 5.0 of 25.0 MB, in 10 s\n"
        "verify: 0 of 900,000 bytes\n"
        "reading: 0 sequences\nreading: 12,345 sequences\nreading: 12,345 sequences, in 2 h 5 min\n"
    ) == capfd.readouterr().err


def test_what_is_not_shown_says_nothing(capfd):
    """The further processes of a run tell nobody."""
    with progress.show("cache", 3, unit="sequence", shown=False) as reach:
        reach(1)
        reach(3, "note")
    assert ("", "") == tuple(capfd.readouterr())


def test_a_terminal_has_a_bar():
    """On a terminal a bar is drawn in its place, with the note beside it; in a pipe there is no such byte."""
    code = """
from sklformat import progress
with progress.show("train ce", 4, unit="step", first=1) as reach:
    reach(4, "loss 3.5")
"""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    subprocess.run([sys.executable, "-c", code], stderr=theirs, check=True)
    os.close(theirs)
    drawn = b""
    try:
        while part := os.read(ours, 4096):
            drawn += part
    except OSError:  # the end of a terminal that nobody holds
        pass
    os.close(ours)
    assert b"\r" in drawn
    assert b"train ce: 100%" in drawn
    assert b"4/4" in drawn
    assert b"loss 3.5" in drawn
    piped = subprocess.run([sys.executable, "-c", code], stderr=subprocess.PIPE, check=True).stderr
    assert b"train ce: 1 of 4 steps\n" == piped


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0, "0 s"), (89, "89 s"), (90, "2 min"), (7199, "2 h 0 min"), (71 * 3600, "71 h 0 min"), (72 * 3600, "3 days 0 h"),
     (1e7, "115 days 18 h"), (1e12, "11,574,074 days 2 h")],
)  # fmt: skip
def test_durations(seconds, words):
    """In the unit that people say them in."""
    assert words == progress.describe_duration(seconds)
