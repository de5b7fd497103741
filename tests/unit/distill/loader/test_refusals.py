"""What the loader refuses, each refusal once by its own words; test_dataset.py says when."""

import pytest
from loader_data import write_cache

from sklformat.distill import SparseLogitDataset


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    directory = tmp_path_factory.mktemp("loader") / "cache"
    write_cache(directory)
    return directory


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda cache: SparseLogitDataset(cache, rank=1),
            "give both rank and world_size or neither, got rank 1, world_size None",
        ),
        (lambda cache: SparseLogitDataset(cache).set_epoch(-1), "^epoch must be >= 0, got -1"),
        (
            lambda cache: SparseLogitDataset(cache, label_logprob=True),
            "label_logprob is asked for, and not in each cache, of the teacher of its records; capture with --columns",
        ),
        (
            lambda cache: SparseLogitDataset(cache, batch_size=None, label_logprob=True),
            "label_logprob is of batches; read the columns of single sequences with skl.open",
        ),
        (lambda cache: SparseLogitDataset(cache)._begin(0, 129), "at most 128 workers, got 129"),
    ],
)
def test_arguments(cache, call, message):
    """A value out of range is refused before anything is read."""
    with pytest.raises(ValueError, match=message):
        call(cache)
