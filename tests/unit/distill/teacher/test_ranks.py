"""Ranks: what one of them says all hear, and a signal stops each."""

import os
import signal
import threading

import pytest

from sklformat.distill.teacher.ranks import Ranks, joined, stoppable
from sklformat.errors import CaptureError


def test_one_process_is_its_own_company(monkeypatch):
    """Without torchrun there is one rank, which does everything itself and waits for nobody."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with joined() as ranks:
        assert Ranks() == ranks
        ranks.wait()
        assert (["x"], 3) == (ranks.gather("x"), ranks.first(lambda: 3))
        assert ranks.in_turn(lambda is_first: is_first) is True


def test_a_lost_rank_is_one_line():
    """Whatever gloo says when a connection closes becomes one line that says how to go on."""
    ranks = Ranks(rank=1, world_size=2)
    message = r"rank 1: another rank .* has ended \(Connection closed\); .* to resume"
    with pytest.raises(CaptureError, match=message), ranks.partners():
        raise RuntimeError("Connection closed\nat gloo/transport/tcp/pair.cc:1")
    with pytest.raises(RuntimeError, match="shapes differ"), ranks.partners():
        raise RuntimeError("shapes differ")


def test_ranks_that_cannot_meet_say_so(monkeypatch):
    """A process that is told of others, and not where they are, does not wait for them."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("MASTER_ADDR", "MASTER_PORT", "RANK"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match=r"rank 0 cannot meet the other ranks .*start all of them with torchrun"):
        joined().__enter__()


def test_sigterm_stops_once():
    """SIGTERM is a KeyboardInterrupt, the second one nothing; afterwards it is what it was before."""
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), stoppable():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
    assert before == signal.getsignal(signal.SIGTERM)


def test_threads_are_left_alone():
    """A capture in a thread works; only the main thread can have signals."""
    done = []

    def work():
        with stoppable():
            done.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert [True] == done
