"""Several caches as one stream: what stands where, on any workers and ranks, exact resume, and what is refused."""

import json
import pickle
import shutil

import numpy as np
import pytest
import reference
import torch
from loader_data import POSITIONS, ROUNDS, SEQUENCES, labels_of, make_targets, rows, starts_of, write_cache
from torch.utils.data import DataLoader

import sklformat as skl
from sklformat.cache import reader
from sklformat.distill import SparseLogitDataset, SparseLogitSequences, collate

SIZES, WEIGHTS = [SEQUENCES, 9, 5], [0.5, 0.2, 0.3]


@pytest.fixture(scope="module")
def caches(tmp_path_factory):
    """Three caches of one layout, and what went into each."""
    directory = tmp_path_factory.mktemp("mixtures")
    paths = [directory / name for name in "abc"]
    return paths, [write_cache(path, seed=i, sequences=SIZES[i]) for i, path in enumerate(paths)]


def ratios(rng, positions):
    """The records of ``make_targets`` as weights."""
    targets = make_targets(rng, positions)
    weights = targets.counts.astype(np.float32) / ROUNDS
    return skl.SparseTargets(token_ids=targets.token_ids, weights=weights, offsets=targets.offsets)


def expected(data, seed, epoch, weights=WEIGHTS, window=None):
    """What went in, in the order of an epoch by the reference."""
    shares = reference.shares(SIZES, weights)
    pairs = [reference.mixed_sequence(SIZES, shares, seed, epoch, i, window) for i in range(sum(SIZES))]
    return [data[cache][number] for cache, number in pairs]


def as_row(tokens, targets):
    """What ``rows`` makes of a sequence."""
    return tuple(tokens[:-1].tolist()), tuple(labels_of(tokens, targets)), tuple(targets.token_ids.tolist())


@pytest.mark.parametrize("window", [None, 4])
def test_batches_hold_what_the_law_says(caches, window):
    """Each row is the sequence of the cache that SPEC puts at its place, in this epoch and in the next."""
    paths, data = caches
    ds = SparseLogitDataset(paths, batch_size=4, seed=3, tail="pad", weights=WEIGHTS, window=window)
    assert -(-sum(SIZES) // 4) == len(ds)
    for epoch in (0, 1, 4):
        ds.set_epoch(epoch)
        sequences = expected(data, 3, epoch, window=window)
        assert [as_row(*sequence) for sequence in sequences] == rows(ds)[: len(sequences)]
    probs = np.concatenate([targets.counts for _, targets in sequences[:4]]).astype(np.float32) / np.float32(ROUNDS)
    assert probs.tolist() == next(iter(ds)).targets.probs.tolist()


def test_without_weights_an_epoch_is_all_of_them(caches):
    """Each sequence of each cache comes once, whichever epoch; the rows of a batch are of several caches."""
    paths, data = caches
    whole = sorted(as_row(*sequence) for some in data for sequence in some)
    ds = SparseLogitDataset(paths, batch_size=37)
    batches = [rows(ds)]
    ds.set_epoch(1)
    batches.append(rows(ds))
    assert batches[0] != batches[1]
    assert [whole] * 2 == [sorted(batch) for batch in batches]


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker:UserWarning")
@pytest.mark.parametrize("tail", ["drop", "pad", "wrap"])
def test_stream_is_the_same_for_any_workers_and_ranks(caches, tail):
    """Worker processes, prefetch threads and ranks change who makes a batch, never the stream nor its states."""
    ds = SparseLogitDataset(caches[0], batch_size=6, tail=tail, weights=WEIGHTS, prefetch=0)
    whole = list(ds)
    for num_workers in (1, 3) if tail == "drop" else (2,):
        batches = list(DataLoader(ds, batch_size=None, num_workers=num_workers))
        assert rows(whole) == rows(batches)
        assert [batch.state for batch in whole] == [batch.state for batch in batches]
    for world_size in (2, 3, 6):
        ranks = [
            SparseLogitDataset(
                caches[0], batch_size=6 // world_size, rank=rank, world_size=world_size, tail=tail, weights=WEIGHTS
            )
            for rank in range(world_size)
        ]
        assert rows(whole) == [row for step in zip(*ranks, strict=True) for row in rows(step)]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_resume_after_any_batch(caches, num_workers):
    """The state of batch k, through JSON, gives the batches after k on another world size, then the next epoch."""
    ds = SparseLogitDataset(caches[0], batch_size=6, weights=WEIGHTS)
    batches = list(ds)
    ds.set_epoch(1)
    following = rows(ds)
    for step in range(len(batches)) if num_workers == 0 else (2,):
        ranks = [
            SparseLogitDataset(caches[0], batch_size=3, rank=rank, world_size=2, weights=WEIGHTS) for rank in (0, 1)
        ]
        for rank in ranks:
            rank.load_state_dict(json.loads(json.dumps(batches[step].state)))
        loaders = [DataLoader(rank, batch_size=None, num_workers=num_workers) for rank in ranks]
        got = [row for pair in zip(*loaders, strict=True) for row in rows(pair)]
        assert (rows(batches[step + 1 :]) or following) == got


def test_states_of_other_mixtures_are_refused(caches):
    """Other weights, caches, an other order of them, other parts or a cache alone raise ResumeError, with both."""
    a, b, c = caches[0]
    state = SparseLogitDataset([a, b], batch_size=2, weights=[3, 1]).state_dict()
    assert [24, 8] == state["shares"]
    SparseLogitDataset([a, b], batch_size=4, weights=[0.75, 0.25]).load_state_dict(state)
    for other, message in [
        (SparseLogitDataset([a, b], weights=[1, 1]), r"a and 1 more: .*\(shares: \[24, 8\] in the state, \[16, 16\] h"),
        (SparseLogitDataset([a, c], weights=[3, 1]), "fingerprint: "),
        (SparseLogitDataset([b, a], weights=[1, 3]), "fingerprint: "),
        (SparseLogitDataset([a, b], weights=[3, 1], sequences=[None, range(8)]), r"sequences: \[\[0, 23\], \[0, 9\]\]"),
        (SparseLogitDataset([a, b], weights=[3, 1], seed=1), "seed: 0 in the state, 1 here"),
        (
            SparseLogitDataset(a),
            r"sequences: \[\[0, 23\], \[0, 9\]\] in the state, \[0, 23\] here; .*shares: \[24, 8\] in",
        ),
    ]:
        with pytest.raises(skl.ResumeError, match=message):
            other.load_state_dict(state)
    alone = SparseLogitDataset(a).state_dict()
    with pytest.raises(skl.ResumeError, match=r"shares: None in the state, \[24, 8\] here; .*sequences: \[0, 23\] in"):
        SparseLogitDataset([a, b], weights=[3, 1]).load_state_dict(alone)
    with pytest.raises(skl.ResumeError, match="fields"):
        SparseLogitDataset([a, b]).load_state_dict({"mixture": 1, "shares": [23, 9]})


def test_one_cache_in_a_list_is_that_cache(caches):
    """Its stream and states are those of the cache alone, whatever its weight."""
    a = caches[0][0]
    alone, listed = SparseLogitDataset(a, batch_size=4), SparseLogitDataset([a], batch_size=4, weights=[0.3])
    assert rows(alone) == rows(listed)
    assert alone.state_dict() == listed.state_dict()


def test_parts_and_tokens_of_each_cache(caches):
    """sequences= and tokens= have one for each cache; tokens that are not the records' are refused by name."""
    (a, b, _), data = caches
    settings = {"batch_size": 5, "weights": [1, 2], "sequences": [range(11, 19), None]}
    stored = SparseLogitDataset([a, b], **settings)
    whole = rows(stored)
    allowed = {as_row(*sequence) for sequence in [*data[0][11:19], *data[1]]}
    assert set(whole) <= allowed
    tokens = [[tokens for tokens, _ in some] for some in data[:2]]
    for given in (tokens, [tokens[0], None], [None, tokens[1]]):
        assert whole == rows(SparseLogitDataset([a, b], tokens=given, **settings))
    rolled = [tokens[0], [np.roll(some, 1) for some in tokens[1]]]
    for given in (rolled, [None, rolled[1]]):
        with pytest.raises(skl.AlignmentError, match=r"/b: sequence .*shifted by one"):
            list(SparseLogitDataset([a, b], tokens=given, **settings))


def test_caches_of_more_shards_than_are_kept_open(caches, monkeypatch):
    """Where shards are closed while others are read, blocks are copied out of them, and the stream stays the same."""
    expected = rows(SparseLogitDataset(caches[0], batch_size=6))
    monkeypatch.setattr(reader, "MAX_OPEN_SHARDS", 1)
    ds = SparseLogitDataset(caches[0], batch_size=6)
    assert expected == rows(ds)
    assert [0, 1, 1] == [len(cache._open_shards) for cache in ds.caches]


def test_single_sequences_of_a_mixture(caches):
    """batch_size=None gives them one by one; collate makes the stream's batches."""
    ones = list(SparseLogitDataset(caches[0], batch_size=None, weights=WEIGHTS))
    whole = SparseLogitDataset(caches[0], batch_size=4, weights=WEIGHTS)
    assert rows(whole) == [row for i in range(0, 36, 4) for row in rows([collate(ones[i : i + 4])])]
    assert ones[3].state == next(iter(whole)).state


LENGTHS = [1 + 5 * (i % 5) for i in range(SEQUENCES)]  # shorter and longer than the others
UNLIKE = {
    "ragged": {"seq_len": 0, "lengths": LENGTHS},
    "longer": {"seq_len": 24},
    "longer ratios": {"seq_len": 24, "kind": "ratios", "records": ratios},
    "ratios": {"kind": "ratios", "records": ratios},
    "rounds": {"kind": "counts", "rounds": 12, "records": lambda rng, n: twelve(make_targets(rng, n))},
    "columns": {"columns": ("entropy", "document_start")},
    "ragged ratios": {"seq_len": 0, "lengths": LENGTHS, "kind": "ratios", "records": ratios},
}


def twelve(targets):
    """Two more rounds, for the first id of each position."""
    counts = targets.counts.copy()
    counts[targets.offsets[:-1][np.diff(targets.offsets) > 0]] += 2
    return skl.SparseTargets(token_ids=targets.token_ids, counts=counts, offsets=targets.offsets)


def sequences_of(path):
    """Each sequence of a cache alone, by its tokens."""
    ones = SparseLogitSequences(path)
    return {tuple(ones[i].input_ids.tolist()): ones[i] for i in range(len(ones))}


@pytest.mark.parametrize("other", UNLIKE)
@pytest.mark.parametrize("tail", ["wrap", "pad"])
def test_caches_of_unlike_layouts(tmp_path, other, tail):
    """Kinds, rounds, columns and lengths may differ: a row is what it is alone, padded on the right to the longest."""
    write_cache(tmp_path / "a", seed=1)
    write_cache(tmp_path / "b", seed=2, **UNLIKE[other])
    alone = sequences_of(tmp_path / "a") | sequences_of(tmp_path / "b")
    seen = 0
    for batch in SparseLogitDataset([tmp_path / "a", tmp_path / "b"], batch_size=7, weights=[1, 1], tail=tail):
        assert batch.position_ids is None is batch.document_starts
        width = batch.input_ids.shape[1]
        lengths = []
        for row in range(7):
            if (batch.labels[row] == -100).all() and (batch.input_ids[row] == 0).all():
                assert tail == "pad"
                continue
            found = next(
                one for tokens, one in alone.items() if batch.input_ids[row, : len(tokens)].tolist() == list(tokens)
            )
            lengths.append(len(found.input_ids))
            got = batch.row(row, lengths[-1])
            for x, y in zip(
                [got.labels, *vars(got.targets).values()], [found.labels, *vars(found.targets).values()], strict=True
            ):
                assert x.dtype == y.dtype
                assert torch.equal(x, y)
            rest = batch.row(row)
            assert (rest.labels[lengths[-1] :] == -100).all()
            assert len(found.targets.token_ids) == len(rest.targets.token_ids)
            seen += 1
        if "ragged" not in other:
            assert (24 if "longer" in other else POSITIONS) == width
        elif lengths:
            assert max(lengths) == width
    assert seen == (46 if tail == "pad" else 49)


def test_a_cache_that_is_given_twice(tmp_path):
    """Its sequences would count twice, which a weight says; a copy is the same cache."""
    write_cache(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "copy")
    for other in ("a", "copy"):
        with pytest.raises(skl.SettingsError, match=r"they are the same cache, fingerprint \w+, and"):
            SparseLogitDataset([tmp_path / "a", tmp_path / other])


def test_scales_of_weights_may_differ(tmp_path):
    """Caches whose weights are coded alike but for their scale each keep their own."""
    for name, scale in (("a", 0), ("b", 3)):
        write_cache(tmp_path / name, seed=scale, kind="ratios", records=ratios, scale_log2=scale)
    alone = sequences_of(tmp_path / "a") | sequences_of(tmp_path / "b")
    for batch in SparseLogitDataset([tmp_path / "a", tmp_path / "b"], batch_size=6):
        for row, tokens in enumerate(batch.input_ids.tolist()):
            assert torch.equal(alone[tuple(tokens)].targets.probs, batch.row(row).targets.probs)


@pytest.mark.parametrize("settings", [{"batch_size": 1}, {"batch_size": 1, "world_size": 2, "rank": 1, "tail": "pad"}])
def test_all_batches_have_the_greatest_length(tmp_path, settings):
    """Where lengths are fixed, so is the shape of the batches, whichever caches a batch has rows of."""
    write_cache(tmp_path / "a", seed=1)
    write_cache(tmp_path / "b", seed=2, **UNLIKE["longer ratios"], sequences=22)
    ds = SparseLogitDataset([tmp_path / "a", tmp_path / "b"], **settings)
    assert {(1, 24)} == {tuple(batch.input_ids.shape) for batch in ds}


def test_padded_rows_of_mixtures_are_those_of_collate(tmp_path):
    """Of sequences of unlike lengths and layouts, with borders: positions count on, and nothing else is there."""
    settings = {"columns": ("document_start",), "capture": {"packing": {"isolated": True}}}
    write_cache(tmp_path / "a", seed=1, **settings)
    write_cache(tmp_path / "b", seed=2, **settings, **UNLIKE["longer ratios"])
    paths = [tmp_path / "a", tmp_path / "b"]
    alone = sequences_of(paths[0]) | sequences_of(paths[1])
    for batch in SparseLogitDataset(paths, batch_size=6):
        tokens = [tuple(row) for row in batch.input_ids.tolist()]
        rows_alone = [alone[row] if row in alone else alone[row[:POSITIONS]] for row in tokens]
        ours, theirs = (tensors_of(b) for b in (batch, collate(rows_alone)))
        assert all(torch.equal(x, y) for x, y in zip(ours, theirs, strict=True))


def tensors_of(batch):
    """Every tensor of a batch."""
    return [batch.input_ids, batch.labels, batch.position_ids, batch.document_starts, *vars(batch.targets).values()]


@pytest.mark.parametrize("unlike", [{}, {"kind": "ratios", "records": ratios}])
def test_borders_of_isolated_documents(tmp_path, unlike):
    """Where all caches say where documents begin, so do the batches, of like and unlike layouts."""
    settings = {"columns": ("document_start",), "capture": {"packing": {"isolated": True}}}
    data = write_cache(tmp_path / "a", seed=1, **settings)
    data += write_cache(tmp_path / "b", seed=2, **settings, **unlike)
    starts = {tuple(tokens[:-1].tolist()): starts_of(i % SEQUENCES, POSITIONS) for i, (tokens, _) in enumerate(data)}
    ds = SparseLogitDataset([tmp_path / "a", tmp_path / "b"], batch_size=6)
    assert ds.isolated
    for batch in ds:
        for tokens, found in zip(batch.input_ids.tolist(), batch.document_starts.tolist(), strict=True):
            assert starts[tuple(tokens)][:-1].tolist() == found


A, B = "a" * 32, "b" * 32
PACKED = {"packing": {"isolated": True}}
CONFLICTS = [
    ({}, {"vocab_size": 1001}, "a and .*b do not go together: vocab_size 1000 and 1001; make both with"),
    ({"tokenizer_fingerprint": A}, {"tokenizer_fingerprint": B}, f"tokenizer fingerprints {A} and {B}; make both"),
    (
        {},
        {"kind": "ratios", "records": ratios, "sampler": "topk"},
        "samplers multinomial and topk, of which one leaves",
    ),
    ({}, {"capture": PACKED}, "documents isolated: False and True; a student is run in one of the two ways"),
    ({"capture": PACKED, "columns": ("document_start",)}, {"capture": PACKED}, "column document_start: True and False"),
]


@pytest.mark.parametrize(("one", "other", "message"), CONFLICTS)
def test_caches_that_do_not_go_together(tmp_path, one, other, message):
    """Another vocabulary, tokenizer, kind of sampler or way of isolating documents is refused, with both values."""
    write_cache(tmp_path / "a", **one)
    write_cache(tmp_path / "b", **other)
    with pytest.raises(skl.SettingsError, match=message):
        SparseLogitDataset([tmp_path / "a", tmp_path / "b"])


def test_tokenizers_that_agree_on_the_ids_go_together(tmp_path):
    """Unknown fingerprints say nothing, and of known ones the map from ids to tokens decides; every pair counts."""
    said = {"tokenizer": {"vocabulary": "c" * 32}}
    write_cache(tmp_path / "a", tokenizer_fingerprint=A, capture=said)
    write_cache(tmp_path / "b", tokenizer_fingerprint=B, capture=said)
    write_cache(tmp_path / "unknown")
    write_cache(tmp_path / "other", tokenizer_fingerprint=B)
    paths = [tmp_path / name for name in ("unknown", "a", "b")]
    assert 3 * SEQUENCES // 8 == len(SparseLogitDataset(paths))
    with pytest.raises(skl.SettingsError, match=f"a and .*other do not go together: tokenizer fingerprints {A}"):
        SparseLogitDataset([*paths, tmp_path / "other"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weights": [1.0]}, "give one weight for each cache, got 1 for 2"),
        ({"weights": [1.0, -1]}, "weights must be positive and finite, got -1"),
        ({"weights": [1.0, 1e-3]}, "weight 0.001 of 1.001 gives cache 1 none of the 32 sequences of an epoch"),
        ({"tokens": [None]}, "tokens of several caches are a list with one, or None, for each cache, got 1 for 2"),
        ({"tokens": np.zeros((3, 17), int)}, "tokens of several caches .*, got a ndarray"),
        ({"sequences": range(5)}, "sequences of several caches are a list .*, got a range"),
        ({"batch_size": 33}, "32 sequences do not fill one batch of 33 x 1 ranks"),
    ],
)
def test_arguments(caches, settings, message):
    """What does not fit the caches is refused before anything is read."""
    with pytest.raises(ValueError, match=message):
        SparseLogitDataset(caches[0][:2], **settings)


def test_other_arguments(caches):
    """No cache, a weight too many for one, several where one is meant."""
    with pytest.raises(ValueError, match="needs at least one, got an empty list"):
        SparseLogitDataset([])
    with pytest.raises(ValueError, match="give one weight for each cache, got 2 for 1"):
        SparseLogitDataset(caches[0][0], weights=[1, 1])
    with pytest.raises(TypeError, match="SparseLogitSequences takes one cache; torch's ConcatDataset"):
        SparseLogitSequences(caches[0])


def test_damage_names_its_cache(caches, tmp_path):
    """A flipped bit in one of the caches stops the stream there, by file and block."""
    write_cache(tmp_path / "bad", seed=9)
    path = tmp_path / "bad" / "shard-00000.skl"
    data = bytearray(path.read_bytes())
    data[int(skl.Shard(path).index.offset[3]) + 100] ^= 1
    path.write_bytes(data)
    with pytest.raises(skl.CorruptError, match=r"bad/shard-00000.skl: block 3: byte"):
        list(SparseLogitDataset([caches[0][0], tmp_path / "bad"], batch_size=4, tail="pad"))


def test_a_mixture_pickles_small(caches):
    """Worker processes get paths and numbers of every cache, not data."""
    ds = SparseLogitDataset(caches[0], batch_size=4, weights=WEIGHTS)
    whole = rows(ds)
    assert len(pickle.dumps(ds._sources)) + len(pickle.dumps(ds.schedule)) < 4096
    opened = pickle.loads(pickle.dumps(ds._sources))
    batches = [opened.batch(places, {}) for places, _ in pickle.loads(pickle.dumps(ds.schedule)).batches(0, 0)]
    assert whole == rows(batches)
