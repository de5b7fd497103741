"""Borders of documents in batches: where they begin, how far each token is from there, and what nothing predicts."""

import dataclasses

import numpy as np
import pytest
import torch
from loader_data import POSITIONS, SEQUENCES, rows, starts_of, write_cache

import sklformat as skl
from sklformat.distill import SparseLogitDataset, collate
from sklformat.format.order import permute

COLUMNS = [("document_start",), ("entropy", "document_start")]
LENGTHS = [1 + 3 * (i % 5) for i in range(SEQUENCES)]


def positions_of(starts, width):
    """Places in their documents of the inputs of one sequence; padding counts on."""
    places, place = [], 0
    for t in range(width):
        place = 0 if t < starts.size - 1 and starts[t] else place
        places.append(place)
        place += 1
    return places


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("lengths", [None, LENGTHS])
def test_batches_say_where_documents_begin(tmp_path, columns, lengths):
    """Starts of the inputs as stored, and positions that begin at 0 there; a sequence's first position is 0."""
    write_cache(tmp_path / "cache", columns=columns, lengths=lengths, seq_len=POSITIONS if lengths is None else 0)
    ds = SparseLogitDataset(tmp_path / "cache", batch_size=4, seed=3)
    for step, batch in enumerate(ds):
        numbers = permute(np.arange(4 * step, 4 * step + 4), SEQUENCES, seed=3, epoch=0)
        width = batch.input_ids.shape[1]
        assert (torch.bool, torch.int64) == (batch.document_starts.dtype, batch.position_ids.dtype)
        for row, number in enumerate(numbers):
            starts = starts_of(number, POSITIONS if lengths is None else lengths[number])
            found = batch.document_starts[row].tolist()
            assert [*starts[:-1].tolist(), *[False] * (width - starts.size + 1)] == found
            assert positions_of(starts, width) == batch.position_ids[row].tolist()


def test_collate_makes_the_same_borders(tmp_path):
    """Single sequences of several lengths collate to the borders that the dataset's own batches have."""
    write_cache(tmp_path / "cache", columns=COLUMNS[0], lengths=LENGTHS, seq_len=0)
    whole = list(SparseLogitDataset(tmp_path / "cache", batch_size=5))
    ones = list(SparseLogitDataset(tmp_path / "cache", batch_size=None))
    assert all((1, 1) == (one.document_starts.ndim, one.position_ids.ndim) for one in ones)
    for number, batch in enumerate(whole):
        made = collate(ones[5 * number : 5 * number + 5])
        assert batch.document_starts.tolist() == made.document_starts.tolist()
        assert batch.position_ids.tolist() == made.position_ids.tolist()
    without = dataclasses.replace(ones[0], document_starts=None, position_ids=None)
    with pytest.raises(ValueError, match="some of these sequences have document_starts and others not"):
        collate([without, ones[1]])


def test_a_cache_without_the_column_has_no_borders(tmp_path):
    """Both are None, in batches, single sequences and what is collated of them; and so they move."""
    write_cache(tmp_path / "cache", columns=("entropy",))
    (batch,) = SparseLogitDataset(tmp_path / "cache", batch_size=SEQUENCES)
    ones = list(SparseLogitDataset(tmp_path / "cache", batch_size=None))
    for found in (batch, ones[0], collate(ones), batch.to("meta")):
        assert found.document_starts is found.position_ids is None


def test_borders_move_with_the_batch(tmp_path):
    """to() takes both along."""
    write_cache(tmp_path / "cache", columns=COLUMNS[1])
    (batch,) = SparseLogitDataset(tmp_path / "cache", batch_size=SEQUENCES)
    moved = batch.to("meta", non_blocking=True)
    assert {"meta"} == {moved.document_starts.device.type, moved.position_ids.device.type}
    assert (SEQUENCES, POSITIONS) == tuple(moved.document_starts.shape) == tuple(moved.position_ids.shape)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_borders_are_pinned(tmp_path):
    """pin_memory() pins both."""
    write_cache(tmp_path / "cache", columns=COLUMNS[1])
    (batch,) = SparseLogitDataset(tmp_path / "cache", batch_size=SEQUENCES)
    pinned = batch.pin_memory()
    assert pinned.document_starts.is_pinned()
    assert pinned.position_ids.is_pinned()


def test_borders_are_there_whatever_the_tokens_come_from(tmp_path):
    """The training program's own tokens, and a padded tail, change nothing of them."""
    data = write_cache(tmp_path / "cache", columns=COLUMNS[0])
    own = [tokens for tokens, _ in data]
    settings = {"batch_size": 4, "tail": "pad"}
    stored = list(SparseLogitDataset(tmp_path / "cache", **settings))
    given = list(SparseLogitDataset(tmp_path / "cache", tokens=own, **settings))
    assert rows(stored) == rows(given)
    for a, b in zip(stored, given, strict=True):
        assert torch.equal(a.document_starts, b.document_starts)
        assert torch.equal(a.position_ids, b.position_ids)
    assert list(range(POSITIONS)) == stored[-1].position_ids[-1].tolist()
    assert not stored[-1].document_starts[-1].any()


@pytest.mark.parametrize(
    ("capture", "isolated"),
    [({}, False), ({"packing": {"isolated": True}}, True), ({"packing": "none"}, False), ({"packing": {}}, False)],
    ids=str,
)
def test_the_header_says_whether_documents_are_isolated(tmp_path, capture, isolated):
    """Of captures that others wrote too."""
    write_cache(tmp_path / "cache", columns=COLUMNS[0], capture=capture)
    assert isolated is SparseLogitDataset(skl.open(tmp_path / "cache")).isolated
