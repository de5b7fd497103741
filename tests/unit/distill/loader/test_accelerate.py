"""accelerate's prepare over our datasets, for real: each sequence once and resumed exactly, or one sentence."""

import json

import forked
import pytest
from accelerate_runs import first_tokens, run
from loader_data import write_cache

from sklformat.distill import SparseLogitDataset

SENTENCES = {
    "early": "before torch.distributed was initialised, and each of the 2 processes would train on all of it; make it",
    "divided: stream": "accelerate's prepare divides this loader among 2 processes, and SparseLogitDataset divides",
    "divided: singles": "its stream by itself (this is rank {rank} of 2); leave the loader out of prepare and move its",
    "dispatched: singles": "accelerate's prepare divides this loader among 2 processes, and SparseLogitDataset",
    "dispatched: stream": "(this is rank {rank} of 2); leave the loader out of prepare and move its batches with",
    "dispatched: batches": "lets process 0 read for all and takes its batches apart, which ragged targets do not allow",
    "trainer: singles": "this loader among 2 processes, and SparseLogitDataset divides its stream by itself",
    "dispatched: whole": "batch.to(accelerator.device), or prepare one over SparseLogitSequences",
}
WHOLE = ["stream", "sequences", "sequences, dicts", "dispatched"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A cache, and the names of its first 16 sequences."""
    directory = tmp_path_factory.mktemp("accelerate") / "cache"
    return directory, [int(tokens[0]) for tokens, _ in write_cache(directory)[:16]]


@pytest.fixture(scope="module")
def pair(cache):
    """What two processes saw."""
    done = forked.run_ranks(2, run, cache[0])
    assert [0, 0] == [one.status for one in done], done
    return [json.loads(one.stdout.splitlines()[-1]) for one in done]


@pytest.fixture(scope="module")
def alone(cache):
    """What one process saw."""
    done = forked.run(run, cache[0])
    assert done.status == 0, done
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("way", WHOLE)
def test_two_processes_see_each_sequence_once(cache, pair, way):
    """Divided once, by the dataset or by accelerate, the stream is whole, and resuming gives the rest of it."""
    assert [0, 1] == [one["rank"] for one in pair]
    assert sorted(cache[1]) == sorted(name for one in pair for step in one[way] for name in step)
    done = {"stream": 2}.get(way, 1)
    for one in pair:
        assert [2] * 4 == list(map(len, one[way]))
        assert one[way][done:] == one[f"{way}, resumed"]


def test_trainer_divides_sequences(cache, pair):
    """transformers' Trainer shuffles and divides ``SparseLogitSequences`` itself, each sequence once."""
    assert sorted(cache[1]) == sorted(name for one in pair for step in one["trainer: sequences"] for name in step)


def test_the_stream_of_two_is_that_of_one(cache, pair):
    """What the two see, step by step, is one process's stream of the same global batch."""
    expected = [first_tokens(batch) for batch in SparseLogitDataset(cache[0], 4, sequences=range(16))]
    assert expected == [a + b for a, b in zip(*(one["stream"] for one in pair), strict=True)]
    assert expected == [a + b for a, b in zip(*(one["dispatched"] for one in pair), strict=True)]


@pytest.mark.parametrize("way", SENTENCES)
def test_what_would_divide_twice_is_refused(pair, way):
    """Every rank says what to do instead, before any step."""
    for one in pair:
        assert SENTENCES[way].format(rank=one["rank"]) in one[way]


def test_a_refused_dataset_works_afterwards(pair):
    """The same dataset, left out of prepare, gives its share of the stream."""
    for one in pair:
        assert one["stream"] == one["refused and left out"]


def test_one_process(cache, alone):
    """One process sees everything, however it asks; batches that accelerate would take apart are refused there too."""
    for way in [*WHOLE, "early", "divided: stream", "divided: singles", "dispatched: singles", "trainer: singles"]:
        assert sorted(cache[1]) == sorted(name for step in alone[way] for name in step), way
    for way in ("dispatched: batches", "dispatched: stream"):
        assert SENTENCES["dispatched: batches"] in alone[way]


def test_epochs_of_a_prepared_loader(cache, alone):
    """accelerate counts epochs itself: it moves on by itself, and does not drop a place that waits to be resumed."""
    stream = SparseLogitDataset(cache[0], 2, sequences=range(16))
    steps = [first_tokens(batch) for batch in stream]
    stream.set_epoch(1)
    second = [first_tokens(batch) for batch in stream]
    found = alone["epochs"]
    assert steps + second == found["steps"]
    assert (
        "the next iteration is to resume in epoch 1, and the loader that accelerate prepared begins epoch 0; call its "
        "set_epoch(1) before iterating it"
    ) in found["refused"]
    assert second[2:] == found["resumed"]
    assert second == found["stopped"]
