"""SparseLogitDataset: the same stream on any workers and ranks, exact resume, proof of alignment."""

import json
import pickle

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import sklformat as skl
from sklformat.distill import SparseLogitDataset
from sklformat.order import Schedule, permute

VOCAB, POSITIONS, ROUNDS, SEQUENCES = 1000, 16, 10, 23


def make_targets(rng, positions):
    """Records of a sequence; every fifth position has none."""
    token_ids, counts, offsets = [], [], [0]
    for t in range(positions):
        ids, number = np.unique(rng.integers(0, VOCAB, ROUNDS), return_counts=True)
        if t % 5 == 4:
            ids, number = ids[:0], number[:0]
        token_ids.append(ids)
        counts.append(number)
        offsets.append(offsets[-1] + ids.size)
    return skl.SparseTargets(token_ids=np.concatenate(token_ids), counts=np.concatenate(counts), offsets=offsets)


def write_cache(directory, *, seq_len=POSITIONS, lengths=None, store_tokens=True):
    """Two shards of SEQUENCES sequences; returns what went in."""
    rng = np.random.default_rng(7)
    data, shard_size = [], 15
    directory.mkdir()
    for number, first in enumerate(range(0, SEQUENCES, shard_size)):
        header = skl.Header(
            vocab_size=VOCAB,
            seq_len=seq_len,
            kind="counts",
            rounds=ROUNDS,
            shard_number=number,
            first_sequence=first,
            store_tokens=store_tokens,
        )
        with skl.ShardWriter(directory / f"shard-{number:05d}.skl", header=header) as writer:
            for i in range(first, min(first + shard_size, SEQUENCES)):
                length = POSITIONS if lengths is None else lengths[i]
                tokens, targets = rng.integers(0, VOCAB, length + 1), make_targets(rng, length)
                writer.append(tokens, targets)
                data.append((tokens, targets))
    return data


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    directory = tmp_path_factory.mktemp("dataset") / "cache"
    return directory, write_cache(directory)


def rows(batches):
    """A batch stream as plain values, one entry a sequence."""
    out = []
    for batch in batches:
        size, positions = batch.input_ids.shape
        offsets = batch.targets.offsets.reshape(-1)
        for row in range(size):
            begin, end = int(offsets[row * positions]), int(offsets[(row + 1) * positions])
            out.append(
                (
                    tuple(batch.input_ids[row].tolist()),
                    tuple(batch.labels[row].tolist()),
                    tuple(batch.targets.token_ids[begin:end].tolist()),
                )
            )
    return out


def test_batches_hold_what_was_written(cache):
    """Inputs, labels, ids, probabilities and offsets of a batch are those of its sequences, in the order of SPEC."""
    directory, data = cache
    ds = SparseLogitDataset(directory, batch_size=4, seed=3)
    assert SEQUENCES // 4 == len(ds)
    for step, batch in enumerate(ds):
        numbers = permute(np.arange(4 * step, 4 * step + 4), SEQUENCES, seed=3, epoch=0)
        assert torch.int64 == batch.input_ids.dtype == batch.labels.dtype
        for row, number in enumerate(numbers):
            tokens, targets = data[number]
            assert tokens[:-1].tolist() == batch.input_ids[row].tolist()
            assert tokens[1:].tolist() == batch.labels[row].tolist()
            begin = batch.targets.offsets[row * POSITIONS]
            end = batch.targets.offsets[(row + 1) * POSITIONS]
            assert targets.token_ids.tolist() == batch.targets.token_ids[begin:end].tolist()
            expected = targets.counts.astype(np.float32) / np.float32(ROUNDS)
            assert expected.tolist() == batch.targets.probs[begin:end].tolist()


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker:UserWarning")
@pytest.mark.parametrize("tail", ["drop", "pad", "wrap"])
def test_stream_is_the_same_for_any_number_of_workers(cache, tail):
    """Worker processes change who makes a batch, never which batches there are, nor their state."""
    ds = SparseLogitDataset(cache[0], batch_size=4, tail=tail)
    in_process = list(ds)
    for num_workers in (1, 2, 3):
        batches = list(DataLoader(ds, batch_size=None, num_workers=num_workers))
        assert rows(in_process) == rows(batches)
        assert [b.state for b in in_process] == [b.state for b in batches]


@pytest.mark.parametrize("world_size", [1, 2, 3, 6])
def test_ranks_share_the_global_stream(cache, world_size):
    """Any world size that makes the same global batch sees the same global stream, with equally many batches a rank."""
    whole = rows(SparseLogitDataset(cache[0], batch_size=6, rank=0, world_size=1))
    per_rank = [
        list(SparseLogitDataset(cache[0], batch_size=6 // world_size, rank=rank, world_size=world_size))
        for rank in range(world_size)
    ]
    assert 1 == len({len(batches) for batches in per_rank})
    merged = [row for step in zip(*per_rank, strict=True) for row in rows(step)]
    assert whole == merged


@pytest.mark.parametrize("num_workers", [0, 2])
def test_resume_goes_on_right_after_any_batch(cache, num_workers):
    """Loading the state of batch k yields the batches after k, once; later epochs are whole again."""
    ds = SparseLogitDataset(cache[0], batch_size=4)
    batches = list(ds)
    ds.set_epoch(1)
    next_epoch = rows(ds)
    for step, batch in enumerate(batches):
        resumed = SparseLogitDataset(cache[0], batch_size=4)
        loader = DataLoader(resumed, batch_size=None, num_workers=num_workers)
        resumed.load_state_dict(json.loads(json.dumps(batch.state)))
        if step + 1 < len(batches):
            assert rows(batches[step + 1 :]) == rows(loader)
            assert rows(batches) == rows(loader)
            resumed.set_epoch(1)
        assert next_epoch == rows(loader)


def test_set_epoch_of_a_resumed_epoch_keeps_the_place(cache):
    """The usual loop calls set_epoch with the epoch it resumes; that must not start it over."""
    ds = SparseLogitDataset(cache[0], batch_size=4)
    batches = list(ds)
    ds.load_state_dict(batches[1].state)
    ds.set_epoch(0)
    assert rows(batches[2:]) == rows(ds)


def test_resume_on_another_world_size(cache):
    """The state counts sequences globally, so that other ranks go on with the same stream."""
    batches = list(SparseLogitDataset(cache[0], batch_size=6, rank=0, world_size=1))
    ranks = [SparseLogitDataset(cache[0], batch_size=3, rank=rank, world_size=2) for rank in range(2)]
    for ds in ranks:
        ds.load_state_dict(batches[0].state)
    merged = [row for step in zip(*ranks, strict=True) for row in rows(step)]
    assert rows(batches[1:]) == merged


def test_state_is_small_and_the_same_in_process(cache):
    """The state is JSON below 300 bytes, and state_dict agrees with the batch just taken."""
    ds = SparseLogitDataset(cache[0], batch_size=4)
    for batch in ds:
        assert batch.state == ds.state_dict()
        assert len(json.dumps(batch.state)) < 300


def test_epochs_differ_and_persistent_workers_follow_set_epoch(cache):
    """set_epoch reaches worker processes that live on between epochs."""
    ds = SparseLogitDataset(cache[0], batch_size=4)
    loader = DataLoader(ds, batch_size=None, num_workers=2, persistent_workers=True)
    first = rows(loader)
    ds.set_epoch(1)
    second = rows(loader)
    assert first != second
    assert second == rows(ds)


def test_state_of_another_stream_is_refused(cache, tmp_path):
    """A state of another cache or seed raises ResumeError with both values."""
    ds = SparseLogitDataset(cache[0], batch_size=4, seed=1)
    state = ds.state_dict()
    other = SparseLogitDataset(cache[0], batch_size=4, seed=2)
    with pytest.raises(skl.ResumeError, match="seed: 1 in the state, 2 here"):
        other.load_state_dict(state)
    other = SparseLogitDataset(cache[0], batch_size=4, seed=1, tail="wrap")
    with pytest.raises(skl.ResumeError, match="tail: 'drop' in the state, 'wrap' here"):
        other.load_state_dict(state)
    with pytest.raises(skl.ResumeError, match="fingerprint"):
        ds.load_state_dict(state | {"fingerprint": "0" * 32})
    with pytest.raises(skl.ResumeError, match="fields"):
        ds.load_state_dict({"epoch": 1})


def test_right_tokens_pass_and_wrong_tokens_stop_before_the_first_batch(cache):
    """Tokens packed with another seed, shifted, or with one id changed never become a batch."""
    directory, data = cache
    tokens = [t for t, _ in data]
    assert rows(SparseLogitDataset(directory, batch_size=4)) == rows(
        SparseLogitDataset(directory, batch_size=4, tokens=tokens)
    )
    order = permute(np.arange(SEQUENCES), SEQUENCES, seed=9)
    repacked = [tokens[i] for i in order]
    changed = [t.copy() for t in tokens]
    for t in changed:
        t[5] = (t[5] + 1) % VOCAB
    for wrong, cause in (
        (repacked, "packing seed"),
        ([np.roll(t, 1) for t in tokens], "shifted by one"),
        (changed, "1 of 17 tokens differ, the first at 5"),
    ):
        with pytest.raises(skl.AlignmentError, match=cause):
            next(iter(SparseLogitDataset(directory, batch_size=4, tokens=wrong)))
    with pytest.raises(skl.AlignmentError, match="22 sequences of tokens given"):
        SparseLogitDataset(directory, batch_size=4, tokens=tokens[:-1])


def test_a_wrong_token_source_stops_a_loader_with_workers(cache):
    """The error of a worker process reaches the training process."""
    tokens = [np.roll(t, 1) for t, _ in cache[1]]
    loader = DataLoader(SparseLogitDataset(cache[0], batch_size=4, tokens=tokens), batch_size=None, num_workers=2)
    with pytest.raises(Exception, match="AlignmentError"):
        next(iter(loader))


def test_a_cache_without_tokens_needs_a_source(tmp_path):
    """Without stored tokens the caller's are handed out, and are asked for."""
    data = write_cache(tmp_path / "cache", store_tokens=False)
    with pytest.raises(ValueError, match="stores no tokens"):
        SparseLogitDataset(tmp_path / "cache")
    ds = SparseLogitDataset(tmp_path / "cache", batch_size=4, shuffle=False, tokens=[t for t, _ in data])
    assert data[0][0][:-1].tolist() == next(iter(ds)).input_ids[0].tolist()


def test_ragged_sequences_are_padded_on_the_right(tmp_path):
    """Padding has input 0, label -100 and no records; records stay with their positions."""
    lengths = [1 + 3 * (i % 5) for i in range(SEQUENCES)]
    data = write_cache(tmp_path / "cache", seq_len=0, lengths=lengths)
    ds = SparseLogitDataset(tmp_path / "cache", batch_size=4, shuffle=False)
    for step, batch in enumerate(ds):
        longest = max(lengths[4 * step : 4 * step + 4])
        assert (4, longest) == tuple(batch.input_ids.shape)
        for row in range(4):
            tokens, targets = data[4 * step + row]
            n = tokens.size - 1
            assert [*tokens[:-1].tolist(), *[0] * (longest - n)] == batch.input_ids[row].tolist()
            assert [*tokens[1:].tolist(), *[-100] * (longest - n)] == batch.labels[row].tolist()
            found = np.diff(batch.targets.offsets[row * longest : (row + 1) * longest + 1])
            assert [*np.diff(targets.offsets).tolist(), *[0] * (longest - n)] == found.tolist()


def test_a_padded_tail_carries_no_label_and_no_record(cache):
    """tail="pad" fills the last batch with empty places, never with repeated sequences."""
    batches = list(SparseLogitDataset(cache[0], batch_size=4, tail="pad"))
    assert -(-SEQUENCES // 4) == len(batches)
    last = batches[-1]
    assert [True] * 3 + [False] == (last.labels != -100).all(dim=1).tolist()
    assert int(last.targets.offsets[3 * POSITIONS]) == int(last.targets.offsets[-1])
    assert {"epoch": 1, "consumed": 0}.items() <= last.state.items()


def test_damage_met_while_training_names_the_place(tmp_path):
    """A flipped byte in a block raises CorruptError with file, byte offset and sequence, and no batch of it."""
    write_cache(tmp_path / "cache")
    path = tmp_path / "cache" / "shard-00000.skl"
    data = bytearray(path.read_bytes())
    offset = int(skl.Shard(path).index.offset[3])
    data[offset + 100] ^= 1
    path.write_bytes(data)
    ds = SparseLogitDataset(tmp_path / "cache", batch_size=1, shuffle=False)
    stream = iter(ds)
    for _ in range(3):
        next(stream)
    with pytest.raises(skl.CorruptError, match=rf"shard-00000.skl: block 3: byte {offset}: payload checksum"):
        next(stream)


def test_dataset_pickles_small(cache):
    """Worker processes get paths and numbers, not data; they open the cache themselves."""
    ds = SparseLogitDataset(cache[0], batch_size=4)
    cache_bytes = pickle.dumps(ds.cache)
    assert len(cache_bytes) < 4096
    assert ds.cache.fingerprint == pickle.loads(cache_bytes).fingerprint


def test_schedule_refuses_what_it_cannot_do():
    """An epoch without a batch, a rank outside the world and an unknown tail are errors, not empty loops."""
    with pytest.raises(ValueError, match="do not fill one batch"):
        Schedule(num_sequences=3, batch_size=2, rank=0, world_size=2)
    with pytest.raises(ValueError, match="rank"):
        Schedule(num_sequences=30, batch_size=2, rank=2, world_size=2)
    with pytest.raises(ValueError, match="tail"):
        Schedule(num_sequences=30, batch_size=2, tail="repeat")


@pytest.mark.parametrize("name", ["num_sequences", "batch_size", "rank", "world_size", "seed"])
def test_schedule_takes_integers_only(name):
    """A float is refused by its name before anything is computed with it; numpy's integers are taken."""
    with pytest.raises(TypeError, match=f"{name} must be an integer, got 2.0"):
        Schedule(**{"num_sequences": 30, "batch_size": 2, "world_size": 3} | {name: 2.0})
    schedule = Schedule(**{"num_sequences": 30, "batch_size": 2, "world_size": 3, "tail": "pad"} | {name: np.int64(2)})
    assert int is type(getattr(schedule, name))
