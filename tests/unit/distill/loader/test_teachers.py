"""Several teachers of the same sequences as one: their mixture to the last record, exact gradients, proof of tokens."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from loader_data import POSITIONS, ROUNDS, SEQUENCES, VOCAB, rows, write_cache
from torch.utils.data import DataLoader

import sklformat as skl
from sklformat.distill import SparseLogitDataset, SparseLogitSequences, Teachers, collate, sparse_kl
from sklformat.format.order import permute

V = 40
LENGTHS = [1 + 3 * (i % 5) for i in range(SEQUENCES)]


def write_teacher(
    directory, seed, *, seq_len=POSITIONS, lengths=None, tokens_seed=0, kind="counts", skip=(), **settings
):
    """A cache of tokens that depend on ``tokens_seed`` only; positions t with t % 7 in ``skip`` have no record."""
    rng, of_tokens = np.random.default_rng(seed), np.random.default_rng(tokens_seed)
    directory.mkdir()
    rounds = {"rounds": ROUNDS} if kind == "counts" else {"rounds": 0}
    header = skl.Header(**{"vocab_size": V, "seq_len": seq_len, "kind": kind, **rounds} | settings)
    with skl.ShardWriter(directory / "shard-00000.skl", header=header) as writer:
        for i in range(SEQUENCES):
            length = (seq_len or POSITIONS) if lengths is None else lengths[i]
            found = [np.unique(rng.integers(0, V, ROUNDS), return_counts=True) for _ in range(length)]
            found = [(ids[:0], n[:0]) if t % 7 in skip else (ids, n) for t, (ids, n) in enumerate(found)]
            counts = np.concatenate([n for _, n in found])
            values = {"counts": counts} if kind == "counts" else {"weights": counts / ROUNDS}
            targets = skl.SparseTargets(
                token_ids=np.concatenate([ids for ids, _ in found]),
                offsets=np.cumsum([0, *(ids.size for ids, _ in found)]),
                **values,
            )
            columns = {"document_start": np.arange(length + 1) % 5 == 0} if header.columns else {}
            writer.append(of_tokens.integers(0, V, length + 1), targets, columns)
    return directory


def dense(targets):
    """Targets as [P, V] float64."""
    positions = torch.repeat_interleave(torch.arange(len(targets.offsets) - 1), torch.diff(targets.offsets))
    out = torch.zeros(len(targets.offsets) - 1, V, dtype=torch.float64)
    return out.index_put_((positions, targets.token_ids.long()), targets.probs.double(), accumulate=True)


def mixture(parts, weights):
    """The weighted mean of dense targets of those teachers that have records, position by position."""
    present = torch.stack([weight * (part.sum(1) > 0) for part, weight in zip(parts, weights, strict=True)])
    total = present.sum(0)
    return sum(w[:, None] * part for w, part in zip(present, parts, strict=True)) / total.clamp(min=1e-30)[:, None]


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """Caches of three teachers of the same sequences: two with gaps of their own, one of ratios, without tokens."""
    directory = tmp_path_factory.mktemp("teachers")
    return [
        write_teacher(directory / "a", 1, skip=(3, 5)),
        write_teacher(directory / "b", 2, skip=(3,)),
        write_teacher(directory / "c", 3, skip=(1, 3), kind="ratios", store_tokens=False),
    ]


@pytest.mark.parametrize("weights", [[1, 2, 5], None])
def test_targets_are_the_mixture(teachers, weights):
    """Each position's targets are the weighted mean of the teachers that have records there; ids rise, each once."""
    ds = SparseLogitDataset(Teachers(teachers, weights), batch_size=4, seed=3)
    tokens = [sequence.tokens for sequence in skl.open(teachers[0])]
    alone = [
        SparseLogitDataset(path, batch_size=4, seed=3, tokens=None if i < 2 else tokens)
        for i, path in enumerate(teachers)
    ]
    for step, (batch, *parts) in enumerate(zip(ds, *alone, strict=True)):
        expected = mixture([dense(part.targets) for part in parts], weights or [1, 1, 1])
        torch.testing.assert_close(dense(batch.targets), expected, rtol=1e-6, atol=1e-7)
        numbers = permute(np.arange(4 * step, 4 * step + 4), SEQUENCES, seed=3)
        here = torch.from_numpy(np.stack([tokens[number] for number in numbers]).astype(np.int64))
        says = torch.arange(POSITIONS) % 7 != 3
        assert torch.equal(here[:, :-1], batch.input_ids)
        assert torch.equal(here[:, 1:].where(says, -100), batch.labels)
        assert torch.equal(says.repeat(4), torch.diff(batch.targets.offsets) > 0)
        keys = torch.repeat_interleave(torch.arange(4 * POSITIONS), torch.diff(batch.targets.offsets)) * V
        assert (torch.diff(keys + batch.targets.token_ids) > 0).all()
        assert (torch.int32, torch.float32, torch.int64) == tuple(x.dtype for x in vars(batch.targets).values())


def test_the_gradient_is_the_mean_of_the_teachers(teachers):
    """For forward KL the united targets give the weighted mean of the teachers' gradients, and values that differ by a
    constant of the student."""
    weights = [0.3, 0.7]
    a, b = (SparseLogitDataset(path, batch_size=4) for path in teachers[:2])
    both = SparseLogitDataset(Teachers(teachers[:2], weights), batch_size=4)
    generator = torch.Generator().manual_seed(0)
    for batch, one, other in zip(both, a, b, strict=True):
        logits = torch.randn(4 * POSITIONS, V, dtype=torch.float64, generator=generator, requires_grad=True)
        everywhere = ((torch.diff(one.targets.offsets) > 0) & (torch.diff(other.targets.offsets) > 0)).double()
        losses = [sparse_kl(logits, x.targets, position_weights_P=everywhere) for x in (batch, one, other)]
        grads = [torch.autograd.grad(loss, logits)[0] for loss in losses]
        torch.testing.assert_close(weights[0] * grads[1] + weights[1] * grads[2], grads[0], rtol=0, atol=1e-8)
        with torch.no_grad():
            later = [sparse_kl(2 * logits, x.targets, position_weights_P=everywhere) for x in (batch, one, other)]
        apart = [float((weights[0] * x[1] + weights[1] * x[2] - x[0]).detach()) for x in (losses, later)]
        assert apart[0] > 0.1
        assert abs(apart[1] - apart[0]) < 1e-6


@pytest.mark.parametrize("settings", [{}, {"seq_len": 0, "lengths": LENGTHS}])
def test_streams_and_sequences_of_teachers(tmp_path, settings):
    """Workers, ranks, resume, single sequences and the map-style dataset give the same sequences; borders stay."""
    settings |= {"columns": ("document_start",)}
    paths = [write_teacher(tmp_path / name, seed, **settings) for seed, name in enumerate("ab")]
    both = Teachers(paths, [1, 3])
    ds = SparseLogitDataset(both, batch_size=4)
    whole = list(ds)
    assert whole[0].document_starts is not None
    assert rows(whole) == rows(DataLoader(ds, batch_size=None, num_workers=2))
    ranks = [SparseLogitDataset(both, batch_size=2, rank=rank, world_size=2) for rank in range(2)]
    if "lengths" not in settings:
        assert rows(whole) == [row for step in zip(*ranks, strict=True) for row in rows(step)]
    resumed = SparseLogitDataset(Teachers(paths, [2, 6]), batch_size=4)
    resumed.load_state_dict(json.loads(json.dumps(whole[1].state)))
    assert rows(whole[2:]) == rows(resumed)
    singles = SparseLogitSequences(both)
    ones = list(SparseLogitDataset(both, batch_size=None, shuffle=False))
    assert SEQUENCES == len(singles) == len(ones)
    for i, one in enumerate(ones):
        for x, y in zip(vars(one.targets).values(), vars(singles[i].targets).values(), strict=True):
            assert torch.equal(x, y)
        assert torch.equal(one.document_starts, singles[i].document_starts)
    by_sequence = next(iter(SparseLogitDataset(both, batch_size=5, shuffle=False)))
    assert rows([by_sequence]) == rows([collate([singles[i] for i in range(5)])])


def test_parts_and_tokens_of_teachers(teachers):
    """sequences= and tokens= mean all teachers; tokens that are not theirs are refused."""
    both = Teachers(teachers)
    tokens = [sequence.tokens for sequence in skl.open(teachers[0])]
    part = SparseLogitDataset(both, batch_size=3, shuffle=False, sequences=range(5, 11), tokens=tokens)
    assert rows(SparseLogitDataset(both, batch_size=11, shuffle=False))[5:11] == rows(part)
    with pytest.raises(skl.AlignmentError, match=r"a: sequence 5: .*shifted by one"):
        tokens = [np.roll(some, 1) for some in tokens]
        next(iter(SparseLogitDataset(both, batch_size=3, shuffle=False, sequences=range(5, 11), tokens=tokens)))
    with pytest.raises(ValueError, match="c: the cache stores no tokens; pass tokens="):
        SparseLogitDataset(Teachers(teachers[2:]))


def test_states_say_which_teachers_with_what_weights(teachers):
    """Another weight or another teacher is another stream."""
    state = SparseLogitDataset(Teachers(teachers[:2], [1, 3])).state_dict()
    for other in (Teachers(teachers[:2]), Teachers(teachers[1::-1], [1, 3])):
        with pytest.raises(skl.ResumeError, match=r"fingerprint: \[\['\w+', 0.25\], \['\w+', 0.75\]\] in the state"):
            SparseLogitDataset(other).load_state_dict(state)


def test_teachers_in_a_mixture(teachers, tmp_path):
    """Sequences of several teachers are mixed with those of a cache of one."""
    write_teacher(tmp_path / "other", 5, tokens_seed=5)
    both = Teachers(teachers[:2])
    ds = SparseLogitDataset([both, tmp_path / "other"], batch_size=46)
    alone = [rows(SparseLogitDataset(x, batch_size=SEQUENCES)) for x in (both, tmp_path / "other")]
    assert sorted(alone[0] + alone[1]) == sorted(rows(ds))
    assert [0.5, 0.5] == [weight for _, weight in ds.state_dict()["fingerprint"][0]]


def test_other_tokens_are_refused(teachers, tmp_path):
    """Teachers that saw other tokens are refused at once where the first sequence says it, else before the sequence."""
    message = r"a and .*other: sequence 0: alignment checksum 0x[0-9a-f]{16} in the first, 0x[0-9a-f]{16} in the second"
    with pytest.raises(skl.AlignmentError, match=message) as caught:
        Teachers([teachers[0], write_teacher(tmp_path / "other", 2, tokens_seed=1)])
    assert 0 == caught.value.sequence_index

    path = tmp_path / "late" / "shard-00000.skl"
    path.parent.mkdir()
    cache = skl.open(teachers[0])
    with skl.ShardWriter(path, header=dataclasses.replace(cache.header, sampling_seed=9)) as writer:
        for i, sequence in enumerate(cache):
            tokens = sequence.tokens.copy()
            tokens[3] = (tokens[3] + (i == 7)) % V
            writer.append(tokens, sequence.targets, {})
    for ask in (
        lambda both: list(SparseLogitDataset(both, batch_size=2, shuffle=False)),
        lambda both: SparseLogitSequences(both)[7],
    ):
        with pytest.raises(
            skl.AlignmentError, match=r"shard-00000.skl: sequence 7: .*; their teachers saw different"
        ) as caught:
            ask(Teachers([teachers[0], path]))
        assert 7 == caught.value.sequence_index
    stream = iter(SparseLogitDataset(Teachers([teachers[0], path]), batch_size=2, shuffle=False))
    assert 3 == len([next(stream) for _ in range(3)])


def test_teachers_that_do_not_go_together(teachers, tmp_path):
    """Other vocabularies, lengths and kinds of samplers are refused, as are weights that do not fit."""
    write_cache(tmp_path / "vocabulary")
    write_cache(tmp_path / "short", sequences=20, vocab_size=VOCAB)
    write_teacher(tmp_path / "topk", 4, kind="ratios", sampler="topk")
    for other, error, message in [
        ("vocabulary", skl.SettingsError, "vocab_size 40 and 1000"),
        ("short", ValueError, "a has 23 sequences, .*short has 20; teachers of one stream saw the same sequences"),
        ("topk", skl.SettingsError, "samplers multinomial and topk, of which one leaves out part"),
    ]:
        with pytest.raises(error, match=message):
            Teachers([teachers[0], tmp_path / other])
    for caches, weights, message in [
        ([], None, r"Teachers takes a list of caches, at least one, got \[\]"),
        (teachers[0], None, "Teachers takes a list of caches, at least one, got "),
        (teachers, [1, 2], "give one weight for each cache, got 2 for 3"),
        (teachers, [1, 2, 0], "weights must be positive and finite, got 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            Teachers(caches, weights)


def test_empty_rows_and_positions_without_records(tmp_path):
    """A padded tail and teachers that say nothing at all give empty targets, not an error."""
    named = enumerate("ab")
    silent = [write_teacher(tmp_path / name, seed, skip=range(7), capture={"of": name}) for seed, name in named]
    for batch in SparseLogitDataset(Teachers(silent), batch_size=4, tail="pad"):
        assert 0 == batch.targets.token_ids.numel() == int(batch.targets.offsets.max())
        assert 4 * POSITIONS + 1 == batch.targets.offsets.numel()
        assert (batch.labels == -100).all()
    ragged = write_teacher(tmp_path / "ragged", 3, seq_len=0)
    for paths in ([silent[0], ragged], [ragged, silent[0]]):
        settings = {"batch_size": 1, "tail": "pad", "world_size": SEQUENCES + 1}
        (last,) = SparseLogitDataset(Teachers(paths), rank=SEQUENCES, **settings)
        (other,) = SparseLogitDataset(Teachers(paths), rank=0, **settings)
        assert (last.labels == -100).all()
        assert 0 == last.targets.token_ids.numel() < other.targets.token_ids.numel()
