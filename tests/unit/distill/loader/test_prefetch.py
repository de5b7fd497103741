"""Prefetch threads: the same results in order, bounded, errors where they belong, and no thread left behind."""

import gc
import threading

import pytest
from loader_data import rows, write_cache
from system import HANGS
from torch.utils.data import DataLoader

import sklformat as skl
from sklformat.distill import SparseLogitDataset
from sklformat.distill.loader.prefetch import made_ahead


def threads():
    return {thread for thread in threading.enumerate() if thread.name.startswith("sklformat-prefetch")}


@pytest.fixture(autouse=True)
def no_thread_is_left():
    """Of each test."""
    assert not threads()
    yield
    if threads():
        gc.collect()
    assert not threads()


@pytest.mark.parametrize("ahead", [0, 1, 2, 5, 50])
def test_results_come_in_order(ahead):
    """Every result comes once, in the order of the items, whichever thread was first."""
    gates = [threading.Event() for _ in range(20)]

    def make(i):
        if ahead > 1 and i % 2 == 0:  # an even item waits for the odd one behind it
            assert gates[i + 1].wait(HANGS)
        gates[i].set()
        return i * i

    assert [i * i for i in range(20)] == list(made_ahead(range(20), make, ahead))


def test_work_is_done_ahead_and_bounded():
    """While the first result is in use the next ones are made, and no more than asked for."""
    taken, made = [], threading.Semaphore(0)

    def items():
        for i in range(10):
            taken.append(i)
            yield i

    def make(i):
        made.release()
        return i

    stream = made_ahead(items(), make, 3)
    assert [] == taken
    assert 0 == next(stream)
    for _ in range(4):  # the one that was asked for and three more
        assert made.acquire(timeout=HANGS)
    assert [0, 1, 2, 3] == taken
    assert 1 == next(stream)
    assert [0, 1, 2, 3, 4] == taken
    stream.close()
    assert 5 == len(taken)


@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_an_error_comes_in_its_place(ahead):
    """Results before the faulty item are handed out, then the error itself, then nothing."""

    def make(i):
        if i == 3:
            raise KeyError(i)
        return i

    stream = made_ahead(range(6), make, ahead)
    assert [0, 1, 2] == [next(stream) for _ in range(3)]
    with pytest.raises(KeyError):
        next(stream)
    assert not threads()
    with pytest.raises(StopIteration):
        next(stream)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    directory = tmp_path_factory.mktemp("prefetch") / "cache"
    return directory, write_cache(directory)


@pytest.mark.parametrize("prefetch", [0, 1, 4, 100])
def test_the_stream_does_not_depend_on_prefetch(cache, prefetch):
    """Batches made ahead are the same, and are counted when they are handed out: resume is exact."""
    plain = list(SparseLogitDataset(cache[0], batch_size=2, prefetch=0))
    ds = SparseLogitDataset(cache[0], batch_size=2, prefetch=prefetch)
    for number, batch in enumerate(ds):
        assert batch.state == ds.state_dict()
        if number == 4:
            break
    resumed = SparseLogitDataset(cache[0], batch_size=2, prefetch=prefetch)
    resumed.load_state_dict(ds.state_dict())
    assert rows(plain[5:]) == rows(resumed)


def test_a_stream_left_early_leaves_no_thread(cache):
    """Breaking off, closing, or a DataLoader that is let go of ends the threads at once."""
    ds = SparseLogitDataset(cache[0], batch_size=2)
    stream = iter(ds)
    next(stream)
    assert threads()
    stream.close()
    assert not threads()
    for _ in DataLoader(ds, batch_size=None):
        assert threads()
        break
    assert not threads()


def test_the_error_of_a_batch_made_ahead_waits_for_its_turn(cache):
    """Wrong tokens behind the third batch stop the stream there, not before and not silently."""
    tokens = [t.copy() for t, _ in cache[1]]
    tokens[7][2] += 1
    ds = SparseLogitDataset(cache[0], batch_size=2, shuffle=False, tokens=tokens, prefetch=4)
    stream = iter(ds)
    for _ in range(3):
        next(stream)
    with pytest.raises(skl.AlignmentError, match="sequence 7:"):
        next(stream)


def test_workers_forked_beside_prefetch_threads(cache):
    """Worker processes started while threads of this process read the same dataset give the same stream."""
    tokens = [t for t, _ in cache[1]]
    ds = SparseLogitDataset(cache[0], batch_size=2, tokens=tokens)
    whole = rows(ds)
    stream = iter(ds)
    got = [next(stream)]
    assert whole == rows(DataLoader(ds, batch_size=None, num_workers=2, multiprocessing_context="fork"))
    assert whole == rows([*got, *stream])


@pytest.mark.parametrize("io", ["mmap", "pread"])
def test_a_cache_closed_under_its_readers(cache, io):
    """Closing a cache while threads make batches of it ends the stream with an error, never with a crash."""
    for _ in range(50):
        opened = skl.open(cache[0], io)
        stream = iter(SparseLogitDataset(opened, batch_size=1, prefetch=4))
        next(stream)
        opened.close()
        with pytest.raises(ValueError, match="is closed; open it again"):
            list(stream)


def test_prefetch_out_of_range(cache):
    """A negative number is refused."""
    with pytest.raises(ValueError, match="prefetch must be >= 0, got -1"):
        SparseLogitDataset(cache[0], prefetch=-1)
