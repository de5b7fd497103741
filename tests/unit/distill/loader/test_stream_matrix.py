"""
One stream whatever the world size, the workers and the interruptions: a covering part here, all of it in ``make soak``.

A sequence's first two tokens are its number, so that a stream is a list of numbers; the reference is the order itself.
"""

import itertools
import json

import numpy as np
import pytest
from torch.utils.data import DataLoader

import sklformat as skl
from sklformat.distill import SparseLogitDataset
from sklformat.format.order import Schedule, permute, permute_windows

GLOBAL = 24
WORLDS, WORKERS, EPOCHS = (1, 2, 3, 4, 6, 8, 12), (0, 1, 2, 3, 5), (0, 1, 2)
TAILS, WINDOWS = ("drop", "pad", "wrap"), (None, 50)
BASE = 1000

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


def write_numbered(directory, num_sequences, shard_size=100):
    """A cache whose sequence i begins with the tokens i // 1000, i % 1000."""
    directory.mkdir()
    for number, first in enumerate(range(0, num_sequences, shard_size)):
        header = skl.Header(
            vocab_size=BASE, seq_len=2, kind="counts", rounds=1, shard_number=number, first_sequence=first
        )
        with skl.ShardWriter(directory / f"{number:05}.skl", header=header) as writer:
            for i in range(first, min(first + shard_size, num_sequences)):
                targets = skl.SparseTargets(token_ids=[i % BASE], counts=[1], offsets=[0, 1, 1])
                writer.append([*divmod(i, BASE), 7], targets)
    return directory


def numbers(batch):
    """The sequences of a batch, -1 for an empty row; its records are those of the sequence."""
    found = (batch.input_ids[:, 0] * BASE + batch.input_ids[:, 1]).tolist()
    found = [n if label != -100 else -1 for n, label in zip(found, batch.labels[:, 0].tolist(), strict=True)]
    assert [n % BASE for n in found if n >= 0] == batch.targets.token_ids.tolist()
    return found


def merged(ranks):
    """The global stream of the ranks' batches; all ranks have as many."""
    assert 1 == len({len(batches) for batches in ranks})
    return [n for step in zip(*ranks, strict=True) for batch in step for n in numbers(batch)]


def reference(num_sequences, epoch, tail, window, seed=0):
    """The global stream of an epoch, straight from the order."""
    places = np.arange(num_sequences)
    if window is None:
        order = permute(places, num_sequences, seed=seed, epoch=epoch).tolist()
    else:
        order = permute_windows(places, num_sequences, window, seed=seed, epoch=epoch).tolist()
    over = -num_sequences % GLOBAL
    more = {"drop": [], "pad": [-1] * over, "wrap": order[:over]}[tail]
    order = order + more
    return order[: len(order) // GLOBAL * GLOBAL]


def datasets(path, world_size, **settings):
    """One dataset a rank."""
    return [
        SparseLogitDataset(path, batch_size=GLOBAL // world_size, rank=rank, world_size=world_size, **settings)
        for rank in range(world_size)
    ]


def assert_epochs(path, num_sequences, world_size, num_workers, tail, window, epochs, **loader):
    """Every epoch's stream is the reference's, with worker processes that live on between epochs."""
    ranks = datasets(path, world_size, tail=tail, window=window)
    loaders = [
        DataLoader(ds, batch_size=None, num_workers=num_workers, persistent_workers=num_workers > 0, **loader)
        for ds in ranks
    ]
    for epoch in epochs:
        for ds in ranks:
            ds.set_epoch(epoch)
        got = merged([list(one) for one in loaders])
        assert reference(num_sequences, epoch, tail, window) == got
        if tail != "wrap":
            assert len(got) - got.count(-1) == len(set(got) - {-1}) >= num_sequences - GLOBAL + 1


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("tail", TAILS)
def test_every_world_and_number_of_workers_by_arithmetic(tail, window):
    """World sizes x workers x 3 epochs make the identical stream, each sequence once, equally many batches a rank."""
    n = 5 * GLOBAL + 11
    for epoch in EPOCHS:
        expected = reference(n, epoch, tail, window)
        for world_size in WORLDS:
            size = GLOBAL // world_size
            for num_workers in WORKERS:
                ranks = []
                for rank in range(world_size):
                    schedule = Schedule(
                        num_sequences=n, batch_size=size, rank=rank, world_size=world_size, window=window, tail=tail
                    )
                    shares = [list(schedule.batches(epoch, 0, w, max(num_workers, 1))) for w in range(num_workers or 1)]
                    # A DataLoader takes from its workers in turn.
                    turns = [shares[i % len(shares)][i // len(shares)][0] for i in range(schedule.num_batches(0))]
                    assert len(turns) == sum(map(len, shares))
                    ranks.append(np.stack(turns))
                assert expected == np.stack(ranks, axis=1).ravel().tolist()


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return write_numbered(tmp_path_factory.mktemp("matrix") / "small", 5 * GLOBAL + 11), 5 * GLOBAL + 11


@pytest.mark.parametrize(
    ("world_size", "num_workers", "tail", "window"),
    [(1, 5, "drop", None), (2, 3, "pad", 50), (3, 0, "wrap", None), (12, 0, "drop", 50), (4, 2, "wrap", 50)],
)
def test_some_worlds_with_processes(small, world_size, num_workers, tail, window):
    """The same with real worker processes, for settings that together cover every value but a few world sizes."""
    assert_epochs(*small, world_size, num_workers, tail, window, EPOCHS)


@pytest.mark.parametrize("method", ["fork", "forkserver", pytest.param("spawn", marks=pytest.mark.soak)])
def test_start_methods(small, method):
    """However worker processes are started, the stream and what follows a resume are the same."""
    path, n = small
    ds = SparseLogitDataset(path, batch_size=GLOBAL, tokens=None)
    loader = DataLoader(ds, batch_size=None, num_workers=2, multiprocessing_context=method, persistent_workers=True)
    whole = list(loader)
    assert reference(n, 0, "drop", None) == merged([whole])
    ds.load_state_dict(whole[1].state)
    assert reference(n, 0, "drop", None)[2 * GLOBAL :] == merged([list(loader)])


def resumed(path, world_size, state, steps=None, num_workers=0, **settings):
    """Go on from a state that went through JSON: numbers and state after ``steps`` steps, or to the epoch's end."""
    text = json.dumps(state)
    assert len(text) < 300
    ranks, last = [], set()
    for ds in datasets(path, world_size, **settings):
        ds.load_state_dict(json.loads(text))
        stream = DataLoader(ds, batch_size=None, num_workers=num_workers) if num_workers else ds
        taken, after = [], state
        for batch in itertools.islice(stream, steps):
            taken.append(numbers(batch))  # the tensors of a worker process keep a file open each
            after = batch.state
        ranks.append(taken)
        last.add(json.dumps(after))
    assert 1 == len(last) == len({len(taken) for taken in ranks})
    return [n for step in zip(*ranks, strict=True) for part in step for n in part], json.loads(last.pop())


def assert_chained(path, expected, start, last_state, choice, num_workers, steps=None, **settings):
    """From the state after step ``start``, three resumes on three world sizes give the rest of the epoch, once; or a
    part of it, after so many steps of the last."""
    left = len(expected) // GLOBAL - start
    hops = [min(left // 3, 1 + choice % 4), min(left // 3, 1 + choice % 3)]
    got, state = [], last_state
    for hop, taken in enumerate(hops):
        if taken:
            more, state = resumed(path, WORLDS[(choice + 2 * hop) % len(WORLDS)], state, taken, **settings)
            got += more
    more, _ = resumed(path, WORLDS[(choice + 4) % len(WORLDS)], state, steps, num_workers, **settings)
    end = None if steps is None else (start + sum(hops) + steps) * GLOBAL
    assert expected[start * GLOBAL : end] == got + more


def states_of(path, **settings):
    """The states before the first step and after every other, from one run."""
    ds = SparseLogitDataset(path, batch_size=GLOBAL, **settings)
    return [ds.state_dict(), *(batch.state for batch in ds)]


@pytest.mark.parametrize(("tail", "window"), [("drop", None), ("pad", 50), ("wrap", 50)])
def test_resume_at_every_step(small, tail, window):
    """At step 0 and after every step, three resumes one after the other on other worlds; then the end of the epoch."""
    path, n = small
    settings = {"tail": tail, "window": window}
    states = states_of(path, **settings)
    expected = reference(n, 0, tail, window)
    assert len(states) == len(expected) // GLOBAL + 1
    for start, state in enumerate(states[:-1]):
        assert_chained(path, expected, start, state, start, 2 if start == 1 else 0, **settings)
    for world_size in WORLDS:
        assert (1, 0) == (states[-1]["epoch"], states[-1]["consumed"])
        assert reference(n, 1, tail, window) == resumed(path, world_size, states[-1], **settings)[0]


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")
@pytest.mark.parametrize("num_workers", [0, 2, pytest.param(3, marks=pytest.mark.soak)])
def test_stateful_data_loader(small, num_workers):
    """torchdata's StatefulDataLoader, which keeps a state a worker, goes on at any step of the epoch."""
    loaders = pytest.importorskip("torchdata.stateful_dataloader")
    path, n = small

    def loader():
        ds = SparseLogitDataset(path, batch_size=GLOBAL // 3, rank=1, world_size=3)
        return loaders.StatefulDataLoader(ds, batch_size=None, num_workers=num_workers)

    whole = [numbers(batch) for batch in loader()]
    assert whole == [reference(n, 0, "drop", None)[i * GLOBAL + 8 : i * GLOBAL + 16] for i in range(5)]
    for steps in range(len(whole)):
        stopped = loader()
        stream = iter(stopped)
        for step in range(steps):
            assert whole[step] == numbers(next(stream))
        state = stopped.state_dict()
        del stream
        again = loader()
        again.load_state_dict(state)
        assert whole[steps:] == [numbers(batch) for batch in again]
        assert whole == [numbers(batch) for batch in again]


# --- the whole matrices -----------------------------------------------------------------------------------------------


@pytest.mark.soak
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("tail", TAILS)
def test_all_worlds_and_workers(small, tail, window):
    """World sizes {1, 2, 3, 4, 6, 8, 12} x workers {0, 1, 2, 3, 5} x 3 epochs with real processes."""
    for world_size in WORLDS:
        for num_workers in WORKERS:
            assert_epochs(*small, world_size, num_workers, tail, window, EPOCHS)


@pytest.fixture(scope="module")
def long(tmp_path_factory):
    n = 500 * GLOBAL + 11
    return write_numbered(tmp_path_factory.mktemp("matrix") / "long", n, 5000), n


@pytest.mark.soak
@pytest.mark.parametrize(("tail", "window"), [("drop", None), ("wrap", 200)])
def test_resume_at_every_step_of_500(long, tail, window):
    """
    Every step of a 500-step epoch, three resumes each on other world sizes, every fiftieth ending with workers.

    Every ninth goes to the epoch's end, on every world size in turn, the others for ten steps.
    """
    path, n = long
    settings = {"tail": tail, "window": window}
    states = states_of(path, **settings)
    expected = reference(n, 0, tail, window)
    assert len(states) == len(expected) // GLOBAL + 1 >= 501
    for start, state in enumerate(states[:-1]):
        workers = (1, 2, 3, 5)[start // 50 % 4] if start % 50 == 0 else 0
        steps = None if workers or start % 9 == 0 else 10
        assert_chained(path, expected, start, state, start, workers, steps, **settings)
    assert reference(n, 1, tail, window) == resumed(path, 8, states[-1], **settings)[0]
