"""SparseLogitDataset: the same stream on any workers and ranks, exact resume, proof of alignment."""

import json
import pickle

import numpy as np
import pytest
import torch
from loader_data import POSITIONS, ROUNDS, SEQUENCES, VOCAB, labels_of, rows, write_cache
from torch.utils.data import DataLoader

import sklformat as skl
from sklformat.distill import SparseLogitDataset, collate
from sklformat.format.order import Schedule, permute, permute_windows


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    directory = tmp_path_factory.mktemp("dataset") / "cache"
    return directory, write_cache(directory)


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
            assert labels_of(tokens, targets) == batch.labels[row].tolist()
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
    with pytest.raises(
        skl.ResumeError, match=r"cache: the state belongs to another stream \(seed: 1 in the state, 2 here\); open"
    ):
        other.load_state_dict(state)
    other = SparseLogitDataset(cache[0], batch_size=4, seed=1, tail="wrap")
    with pytest.raises(skl.ResumeError, match="tail: 'drop' in the state, 'wrap' here"):
        other.load_state_dict(state)
    with pytest.raises(skl.ResumeError, match="fingerprint"):
        ds.load_state_dict(state | {"fingerprint": "0" * 32})
    with pytest.raises(skl.ResumeError, match=r"a loader state has the fields \['consumed', .*\], got \["):
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
    with pytest.raises(skl.AlignmentError, match=_FEWER):
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
    with pytest.raises(
        ValueError, match="the cache stores no tokens; pass tokens= with the sequences it was made from"
    ):
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
            assert [*labels_of(tokens, targets), *[-100] * (longest - n)] == batch.labels[row].tolist()
            found = np.diff(batch.targets.offsets[row * longest : (row + 1) * longest + 1])
            assert [*np.diff(targets.offsets).tolist(), *[0] * (longest - n)] == found.tolist()


def test_a_padded_tail_carries_no_label_and_no_record(cache):
    """tail="pad" fills the last batch with empty places, never with repeated sequences."""
    batches = list(SparseLogitDataset(cache[0], batch_size=4, tail="pad"))
    assert -(-SEQUENCES // 4) == len(batches)
    last = batches[-1]
    assert [True] * 3 + [False] == (last.labels != -100).any(dim=1).tolist()
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


def test_a_window_changes_the_order_and_enters_the_state(cache):
    """window= takes the windowed order of SPEC section 12; a state of another order is refused."""
    directory, data = cache
    ds = SparseLogitDataset(directory, batch_size=4, seed=3, window=6)
    ds.set_epoch(2)
    numbers = permute_windows(np.arange(20), SEQUENCES, 6, seed=3, epoch=2)
    assert [tuple(data[n][0][:-1].tolist()) for n in numbers] == [row[0] for row in rows(ds)]
    for other, name in (
        (SparseLogitDataset(directory, batch_size=4, seed=3), "order: 2 in the state, 1 here; window: 6 in the state"),
        (SparseLogitDataset(directory, batch_size=4, seed=3, window=7), "window: 6 in the state, 7 here"),
    ):
        with pytest.raises(skl.ResumeError, match=name):
            other.load_state_dict(ds.state_dict())


@pytest.mark.parametrize("settings", [{}, {"shuffle": False}, {"window": 4}, {"tail": "wrap"}, {"tail": "pad"}])
def test_a_held_out_part_is_never_seen(cache, settings):
    """What lies outside of sequences= comes in no epoch, also where the tail is filled up; two parts are disjoint."""
    directory, data = cache
    tokens = [tuple(t[:-1].tolist()) for t, _ in data]
    seen = []
    for part in (range(17), range(17, SEQUENCES)):
        ds = SparseLogitDataset(directory, batch_size=4, sequences=part, **settings)
        found = set()
        for epoch in range(20):
            ds.set_epoch(epoch)
            found |= {row[0] for row in rows(ds) if set(row[1]) != {-100}}
        assert found <= {tokens[i] for i in part}
        if settings.get("shuffle", True):
            assert len(part) == len(found)
        seen.append(found)
    assert not seen[0] & seen[1]


def test_a_state_of_another_part_is_refused(cache):
    """The part of the cache belongs to the stream: training cannot go on with another one, nor without."""
    ds = SparseLogitDataset(cache[0], batch_size=4, sequences=range(20))
    for part in (None, range(3, 23)):
        with pytest.raises(skl.ResumeError, match=r"sequences: \[0, 20\] in the state"):
            SparseLogitDataset(cache[0], batch_size=4, sequences=part).load_state_dict(ds.state_dict())


@pytest.mark.parametrize("part", [range(24), range(5, 5), range(-1, 5), range(0, 10, 2), range(9, 3)])
def test_parts_that_are_none(cache, part):
    """A part that is empty, has steps or leaves the cache is refused."""
    with pytest.raises(ValueError, match=r"sequences must be a range of step 1 inside of 0\.\.23"):
        SparseLogitDataset(cache[0], batch_size=1, sequences=part)
    with pytest.raises(TypeError, match=r"sequences must be a range, got \["):
        SparseLogitDataset(cache[0], batch_size=1, sequences=[1, 2])


@pytest.mark.parametrize("num_workers", [0, 1, 3])
@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker:UserWarning")
def test_single_sequences_collate_to_the_same_batches(cache, num_workers):
    """batch_size=None gives the same stream one by one; collated in order it is that of a batch size, states too."""
    batches = list(SparseLogitDataset(cache[0], batch_size=4))
    single = SparseLogitDataset(cache[0], batch_size=None)
    ones = list(DataLoader(single, batch_size=None, num_workers=num_workers))
    assert SEQUENCES == len(single) == len(ones)
    assert all((POSITIONS,) == tuple(one.input_ids.shape) == tuple(one.labels.shape) for one in ones)
    for number, batch in enumerate(batches):
        made = collate(ones[4 * number : 4 * number + 4])
        if batch.state["consumed"]:  # the last one's is the next epoch, where batches of 4 drop a tail
            assert batch.state == made.state
        for a, b in zip(
            (batch.input_ids, batch.labels, *vars(batch.targets).values()),
            (made.input_ids, made.labels, *vars(made.targets).values()),
            strict=True,
        ):
            assert a.dtype == b.dtype
            assert torch.equal(a, b)


def test_trainers_that_batch_themselves(cache):
    """A DataLoader with batch_size and collate gives resumable batches without workers and with one, not with two."""
    expected = list(SparseLogitDataset(cache[0], batch_size=4))
    for num_workers in (0, 1):
        ds = SparseLogitDataset(cache[0], batch_size=None)
        loader = DataLoader(ds, batch_size=4, collate_fn=collate, num_workers=num_workers, drop_last=True)
        got = list(loader)
        assert rows(expected) == rows(got)
        ds.load_state_dict(got[2].state)
        assert rows(expected[3:]) == rows(loader)
    shared = list(DataLoader(ds, batch_size=4, collate_fn=collate, num_workers=2))
    assert sorted(rows(shared)) == sorted(rows([collate([one]) for one in ds]))
    assert all({} == batch.state for batch in shared)
    with pytest.raises(skl.ResumeError, match="fields"):
        ds.load_state_dict(shared[0].state)


def test_collate_pads_on_the_right(tmp_path):
    """Sequences of several lengths become what the dataset makes of them itself."""
    write_cache(tmp_path / "cache", seq_len=0, lengths=[1 + 3 * (i % 5) for i in range(SEQUENCES)])
    whole = list(SparseLogitDataset(tmp_path / "cache", batch_size=5))
    ones = list(SparseLogitDataset(tmp_path / "cache", batch_size=None))
    made = [collate(ones[5 * i : 5 * i + 5]) for i in range(len(whole))]
    assert rows(whole) == rows(made)
    assert [batch.targets.offsets.tolist() for batch in whole] == [batch.targets.offsets.tolist() for batch in made]


def test_collate_takes_single_sequences_only(cache):
    """No sequence, or batches instead, are refused with their shapes."""
    for wrong in ([], list(SparseLogitDataset(cache[0], batch_size=4))):
        with pytest.raises(ValueError, match="collate takes single sequences"):
            collate(wrong)


def test_the_largest_state_is_small(cache):
    """The state stays below 300 bytes of JSON whatever its numbers are."""
    ds = SparseLogitDataset(cache[0], batch_size=4, seed=2**64 - 1, window=2**62, tail="wrap")
    state = ds.state_dict() | {"epoch": 2**63 - 1, "consumed": 2**62, "sequences": [2**62 - 1, 2**62]}
    assert len(json.dumps(state)) < 300


def test_batches_move_to_a_device(cache):
    """to() moves every tensor and keeps the state, also when it need not wait."""
    (batch,) = list(SparseLogitDataset(cache[0], batch_size=23))
    for moved in (batch.to("meta"), batch.to("meta", non_blocking=True)):
        tensors = (moved.input_ids, moved.labels, *vars(moved.targets).values())
        assert all(tensor.device.type == "meta" for tensor in tensors)
        assert [tuple(t.shape) for t in tensors] == [
            tuple(t.shape) for t in (batch.input_ids, batch.labels, *vars(batch.targets).values())
        ]
        assert batch.state == moved.state


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_are_pinned(cache):
    """pin_memory() pins every tensor, called by hand and by a DataLoader; the copy on the GPU equals the batch."""
    ds = SparseLogitDataset(cache[0], batch_size=4)
    for number, batch in enumerate(DataLoader(ds, batch_size=None, num_workers=2, pin_memory=True)):
        plain = list(ds)[number]
        for pinned in (batch, plain.pin_memory()):
            tensors = (pinned.input_ids, pinned.labels, *vars(pinned.targets).values())
            assert all(tensor.is_pinned() for tensor in tensors)
        moved = batch.to("cuda", non_blocking=True)
        torch.cuda.synchronize()
        assert rows([plain]) == rows([moved.to("cpu")])
        assert plain.state == moved.state


@pytest.mark.parametrize("own", [False, True])
def test_a_rank_without_any_sequence_has_a_position(tmp_path, own):
    """Where a padded tail of ragged sequences leaves a rank nothing, its batch still has T >= 1, so a model can run."""
    lengths = [POSITIONS] * SEQUENCES
    data = write_cache(tmp_path / "cache", seq_len=0, lengths=lengths)
    tokens = [sequence for sequence, _ in data] if own else None
    settings = {"batch_size": 2, "rank": 3, "world_size": 4, "tail": "pad", "sequences": range(1), "prefetch": 0}
    (batch,) = SparseLogitDataset(tmp_path / "cache", tokens=tokens, **settings)
    assert (2, 1) == tuple(batch.input_ids.shape)
    assert [[-100], [-100]] == batch.labels.tolist()
    assert [0, 0, 0] == batch.targets.offsets.tolist()


_FEWER = (
    "cache: 22 sequences of tokens given, the cache reaches to sequence 22; "
    "pack the tokens with the cache's tokenizer, corpus, seed and seq_len"
)


def test_a_state_holds_numbers(cache):
    """True is no number of sequences."""
    ds = SparseLogitDataset(cache[0], batch_size=2)
    with pytest.raises(skl.ResumeError, match="epoch 0 and consumed True are no place in"):
        ds.load_state_dict(ds.state_dict() | {"consumed": True})


def test_batches_say_how_sure_the_teacher_was(tmp_path):
    """The column beside each label, by one cache, a part of it, and several of unlike layouts; 0 in empty rows."""
    write_cache(tmp_path / "a", columns=("label_logprob",))
    write_cache(tmp_path / "b", columns=("entropy", "label_logprob"), profile="R32", seed=8)
    for source, part in ((tmp_path / "a", range(3, 20)), ([tmp_path / "a", tmp_path / "b"], None)):
        seen = 0
        for batch in SparseLogitDataset(source, 4, tail="pad", sequences=part, label_logprob=True):
            counted = batch.labels != -100
            assert torch.allclose(
                batch.label_logprob[counted], -0.5 - batch.labels[counted] / VOCAB, atol=1e-3
            )  # kept as float16
            assert not batch.label_logprob[~counted].any()
            assert torch.equal(batch.to("cpu").row(0).label_logprob, batch.label_logprob[0])
            seen += int(counted.any(1).sum())
        assert seen == (17 if part else 2 * SEQUENCES)
    assert next(iter(SparseLogitDataset(tmp_path / "a", 4))).label_logprob is None
