"""SparseLogitSequences: one sequence by its number, the same as the stream's, for whoever orders and divides."""

import pickle

import numpy as np
import pytest
import torch
from loader_data import POSITIONS, SEQUENCES, VOCAB, labels_of, rows, write_cache
from torch.utils.data import ConcatDataset, DataLoader, DistributedSampler, Subset, WeightedRandomSampler

import sklformat as skl
from sklformat.distill import SparseLogitDataset, SparseLogitSequences, collate

LENGTHS = [1 + 3 * (i % 5) for i in range(SEQUENCES)]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    directory = tmp_path_factory.mktemp("sequences") / "cache"
    return directory, write_cache(directory)


@pytest.fixture(scope="module")
def ragged(tmp_path_factory):
    directory = tmp_path_factory.mktemp("sequences") / "ragged"
    settings = {"columns": ("document_start",), "capture": {"packing": {"isolated": True}}}
    return directory, write_cache(directory, seq_len=0, lengths=LENGTHS, **settings)


def tensors_of(one):
    """Every tensor of a sequence or a batch."""
    starts = [] if one.document_starts is None else [one.position_ids, one.document_starts]
    return [one.input_ids, one.labels, *vars(one.targets).values(), *starts]


def assert_same(a, b):
    """Two sequences or batches agree in every tensor, dtypes and shapes too."""
    for x, y in zip(tensors_of(a), tensors_of(b), strict=True):
        assert x.dtype == y.dtype
        assert torch.equal(x, y)


@pytest.mark.parametrize("which", ["cache", "ragged"])
def test_a_sequence_is_the_stream_s(which, request):
    """[i] is what ``SparseLogitDataset(batch_size=None)`` gives, one by one, many at once, from the end."""
    directory, _ = request.getfixturevalue(which)
    ds = SparseLogitSequences(directory)
    expected = list(SparseLogitDataset(directory, batch_size=None, shuffle=False))
    assert SEQUENCES == len(ds) == len(expected)
    assert ("ragged" == which) == ds.isolated
    for i, (one, other) in enumerate(zip(expected, ds.__getitems__(list(range(SEQUENCES))), strict=True)):
        assert_same(one, ds[i])
        assert_same(one, other)
        assert_same(one, ds[np.int64(i - SEQUENCES)])
        assert {} == ds[i].state == other.state


def test_the_sequence_is_what_was_written(ragged):
    """Tokens and records of a sequence of its own length are those that went in."""
    directory, data = ragged
    ds = SparseLogitSequences(directory)
    for i, (tokens, targets) in enumerate(data):
        one = ds[i]
        assert tokens[:-1].tolist() == one.input_ids.tolist()
        assert labels_of(tokens, targets) == one.labels.tolist()
        assert targets.token_ids.tolist() == one.targets.token_ids.tolist()
        assert targets.offsets.tolist() == one.targets.offsets.tolist()


def test_a_part_has_numbers_of_its_own(cache):
    """sequences= reaches nothing outside of it; numbers outside are refused, as are floats and slices."""
    directory, data = cache
    part = SparseLogitSequences(directory, sequences=range(5, 12))
    assert 7 == len(part)
    assert [data[i][0][:-1].tolist() for i in range(5, 12)] == [one.input_ids.tolist() for one in part]
    for outside in (7, -8, 2**40):
        with pytest.raises(IndexError, match=f"cache: no sequence {outside} among the 7 of this dataset"):
            part[outside]
    for wrong in (1.0, slice(2), "1"):
        with pytest.raises(TypeError, match="cannot be interpreted as an integer"):
            part[wrong]


@pytest.mark.parametrize("method", ["fork", "forkserver", pytest.param("spawn", marks=pytest.mark.soak)])
def test_worker_processes_give_the_same(cache, method):
    """A DataLoader that shuffles gives the same batches with worker processes, each sequence once."""
    ds = SparseLogitSequences(cache[0])

    def batches(num_workers):
        generator = torch.Generator().manual_seed(5)
        context = method if num_workers else None
        return DataLoader(
            ds,
            batch_size=4,
            shuffle=True,
            collate_fn=collate,
            generator=generator,
            num_workers=num_workers,
            multiprocessing_context=context,
        )

    expected = rows(batches(0))
    assert expected == rows(batches(2 if method == "fork" else 1))
    assert sorted(expected) == sorted(rows(SparseLogitDataset(cache[0], batch_size=1)))
    assert len(pickle.dumps(ds)) < 2048


def test_samplers_subsets_and_several_caches(cache, ragged):
    """Subset, ConcatDataset, weighted and distributed samplers see the sequences that they ask for."""
    ds = SparseLogitSequences(cache[0])
    subset = Subset(ds, [3, 20, 3])
    assert [rows([collate([ds[i]])]) for i in (3, 20, 3)] == [rows([collate([one])]) for one in subset]
    both = ConcatDataset([ds, Subset(SparseLogitSequences(cache[0]), range(2))])
    assert SEQUENCES + 2 == len(both)
    assert_same(ds[1], both[SEQUENCES + 1])
    sampler = WeightedRandomSampler([0.0] * 7 + [1.0] + [0.0] * 15, 6)
    drawn = list(DataLoader(ds, batch_size=3, sampler=sampler, collate_fn=collate))
    assert rows([collate([ds[7]])]) * 6 == rows(drawn)
    ranks = [DistributedSampler(ds, 2, rank, drop_last=True) for rank in range(2)]
    seen = [row for sampler in ranks for row in rows(DataLoader(ds, batch_size=4, sampler=sampler, collate_fn=collate))]
    assert 22 == len(seen) == len(set(seen))


def test_wrong_tokens_are_refused(cache):
    """Tokens of one's own are handed out and proven, sequence by sequence; damage is met when it is touched."""
    directory, data = cache
    tokens = [t.copy() for t, _ in data]
    tokens[4][5] = (tokens[4][5] + 1) % VOCAB
    ds = SparseLogitSequences(directory, tokens=tokens)
    assert_same(SparseLogitSequences(directory)[3], ds[3])
    for ask in (lambda: ds[4], lambda: ds.__getitems__([3, 4])):
        with pytest.raises(skl.AlignmentError, match="1 of 17 tokens differ, the first at 5"):
            ask()
    with pytest.raises(skl.AlignmentError, match="22 sequences of tokens given"):
        SparseLogitSequences(directory, tokens=tokens[:-1])


def test_a_damaged_sequence_is_refused(tmp_path):
    """A flipped bit stops the sequence it is in, and no other."""
    write_cache(tmp_path / "cache")
    path = tmp_path / "cache" / "shard-00000.skl"
    data = bytearray(path.read_bytes())
    data[int(skl.Shard(path).index.offset[3]) + 100] ^= 1
    path.write_bytes(data)
    ds = SparseLogitSequences(tmp_path / "cache")
    assert (POSITIONS,) == tuple(ds[2].input_ids.shape)
    with pytest.raises(skl.CorruptError, match=r"shard-00000.skl: block 3: byte"):
        ds[3]


def test_a_cache_without_tokens_needs_a_source(tmp_path):
    """Without stored tokens the caller's are asked for."""
    write_cache(tmp_path / "cache", store_tokens=False)
    with pytest.raises(ValueError, match="the cache stores no tokens; pass tokens="):
        SparseLogitSequences(tmp_path / "cache")
