"""
subsample: fewer draws of the same records, without bias and without replacement, whatever the shards are.

The bounds of chance are those of ``chance``: a correct program passes one of them with all but 6e-7 of all seeds, or
with 1e-6 where a test says so; the seeds are fixed.
"""

import itertools
import math
import re
from pathlib import Path

import numpy as np
import pytest
import reference
from chance import DEVIATE, chi_square, chi_square_at, largest_z, z_of_false_alarm
from operation_data import COLUMNS, content, run_until_call, write

import sklformat as skl
from sklformat.cli import main
from sklformat.operations import subsample_cache
from sklformat.operations.thinning import thin
from sklformat.settings.operations import SubsampleConfig

PAGE = (Path(__file__).parents[3] / "docs" / "operations.md").read_text()
LAW = np.array([0.45, 0.25, 0.15, 0.1, 0.04, 0.01])


def subsample(cache, rounds, out, **settings):
    return subsample_cache(SubsampleConfig(cache=str(cache), rounds=rounds, out=out, **settings))


def dense(targets, width):
    """[positions, width] counts."""
    found = np.zeros((targets.num_positions, width))
    found[np.repeat(np.arange(targets.num_positions), np.diff(targets.offsets)), targets.token_ids] = targets.counts
    return found


def repeated(counts, positions):
    """The same counts at every position."""
    ids = np.flatnonzero(counts)
    return skl.SparseTargets(
        token_ids=np.tile(ids, positions),
        counts=np.tile(np.array(counts)[ids], positions),
        offsets=np.arange(positions + 1) * ids.size,
    )


@pytest.mark.parametrize(("seed", "sequence"), [(0, 0), (7, 3), ((1 << 64) - 1, (1 << 64) - 1)])
@pytest.mark.parametrize("rounds", [1, 7, 19, 20])
def test_draws_are_kept_by_the_law_of_the_format(tmp_path, seed, sequence, rounds):
    """Every position of some sequences is thinned as the reference does it; one without records stays so."""
    cache = skl.open(write(tmp_path / "a", 4))
    for targets in (found.targets for found in cache):
        thinned = thin(targets, rounds, seed=seed, sequence=sequence)
        for t, (begin, end) in enumerate(itertools.pairwise(targets.offsets)):
            pairs = list(zip(targets.token_ids[begin:end].tolist(), targets.counts[begin:end].tolist(), strict=True))
            own = slice(thinned.offsets[t], thinned.offsets[t + 1])
            found = list(zip(thinned.token_ids[own].tolist(), thinned.counts[own].tolist(), strict=True))
            assert reference.thin(pairs, rounds, seed, sequence, t) == found
    assert any((np.diff(found.targets.offsets) == 0).any() for found in cache)


def test_vectors():
    """What the page says that stays of some counts is what the code and the reference keep."""
    before, sequence, kept, seed, left = re.search(
        r"of counts ([\d, ]+) at positions 0\.\.3 of sequence (\d+) there stay, with m = (\d+) and seed (\d+), (.+)\.",
        PAGE,
    ).groups()
    counts = [int(count) for count in before.split(",")]
    expected = [[int(count) for count in position.split()] for position in re.split(", | and ", left)]
    thinned = thin(repeated(counts, 4), int(kept), seed=int(seed), sequence=int(sequence))
    assert expected == dense(thinned, 3).tolist()
    for t, position in enumerate(expected):
        pairs = [(token_id, count) for token_id, count in enumerate(position) if count]
        assert pairs == reference.thin(list(enumerate(counts)), int(kept), int(seed), int(sequence), t)
    assert 4 == len(expected)


def test_every_choice_has_its_hypergeometric_chance():
    """Of counts 4, 1, 3 the outcomes of 3 draws come as often as without replacement (chi-square, both sides)."""
    counts, kept, positions = [4, 1, 3], 3, 30_000
    found = dense(thin(repeated(counts, positions), kept, seed=1, sequence=2), 3)
    chances, seen = [], []
    for outcome in itertools.product(*(range(count + 1) for count in counts)):
        if sum(outcome) == kept:
            ways = math.prod(math.comb(count, taken) for count, taken in zip(counts, outcome, strict=True))
            chances.append(ways / math.comb(sum(counts), kept))
            seen.append((found == outcome).all(1).sum())
    assert 1 == pytest.approx(sum(chances))
    found_at = chi_square(np.array(seen), np.array(chances) * positions)
    assert chi_square_at(len(chances) - 1, -DEVIATE) < found_at < chi_square_at(len(chances) - 1, DEVIATE)


def test_each_set_of_draws_is_as_likely():
    """All 70 ways to keep 4 of 8 draws are equally frequent, also of the first and the last sequence and position."""
    positions = 70_000
    kept = thin(repeated([1] * 8, positions), 4, seed=3, sequence=0)
    sets = (dense(kept, 8) @ (1 << np.arange(8))).astype(int)
    found = np.unique(sets, return_counts=True)[1]
    assert 70 == found.size
    assert chi_square_at(69, -DEVIATE) < chi_square(found, positions / 70) < chi_square_at(69, DEVIATE)


@pytest.mark.parametrize("by", ["position", "sequence", "seed"])
def test_choices_are_independent_of_each_other(by):
    """What one position keeps says nothing of its neighbour, of the next sequence's, or of the next seed's."""
    source = repeated([5, 5], 20_000)
    one = dense(thin(source, 5, seed=3, sequence=8), 2)[:, 0]
    seed, sequence = {"seed": (4, 8), "sequence": (3, 9)}.get(by, (3, 8))
    other = dense(thin(source, 5, seed=seed, sequence=sequence), 2)[:, 0]
    if by == "position":
        one, other = one[:-1], other[1:]
    products = (one - 2.5) * (other - 2.5)
    assert largest_z(products[:, None], np.zeros(1)) < z_of_false_alarm(1)


@pytest.mark.parametrize("sampler", ["multinomial", "systematic"])
def test_thinned_draws_are_unbiased(sampler):
    """The mean over many positions is the teacher's distribution, with each false alarm in a million seeds."""
    logits = np.tile(np.log(LAW).astype(np.float32), (40_000, 1))
    drawn = skl.draw(logits, rounds=50, sampler=sampler, sequence=1)
    thinned = dense(thin(drawn, 12, seed=5, sequence=1), LAW.size)
    assert (12 == thinned.sum(1)).all()
    assert largest_z(thinned[:, :-1], 12 * LAW[:-1]) < z_of_false_alarm(LAW.size - 1)


def test_multinomial_stays_multinomial():
    """Of independent draws all second moments are those of 12 independent draws, which those of systematic are not."""
    logits = np.tile(np.log(LAW).astype(np.float32), (40_000, 1))
    pairs = list(itertools.combinations_with_replacement(range(LAW.size - 1), 2))
    expected = np.array([12 * ((i == j) * LAW[i] - LAW[i] * LAW[j]) for i, j in pairs])
    z = {}
    for sampler in ("multinomial", "systematic"):
        drawn = skl.draw(logits, rounds=50, sampler=sampler, sequence=2)
        centred = dense(thin(drawn, 12, seed=6, sequence=2), LAW.size) - 12 * LAW
        products = np.stack([centred[:, i] * centred[:, j] for i, j in pairs], axis=1)
        z[sampler] = largest_z(products, expected)
    assert z["multinomial"] < z_of_false_alarm(len(pairs))
    assert z["systematic"] > z_of_false_alarm(len(pairs))


def test_fewer_draws_are_some_of_more():
    """With one seed, what 6 rounds keep lies within what 12 keep."""
    source = repeated([3, 2, 9, 1, 5], 200)
    more, fewer = (dense(thin(source, rounds, seed=9, sequence=4), 5) for rounds in (12, 6))
    assert (fewer <= more).all()
    assert (fewer < more).any()


def test_shards_make_no_difference(tmp_path):
    """The same records come of the same sequences, whatever shards they lie in and go to; tokens and text stay."""
    a, b = write(tmp_path / "a", 8), write(tmp_path / "b", 8, per_shard=8)
    (a / "tokens").mkdir()
    (a / "tokens" / "store.json").write_text("{}")
    before = content(a)
    made = subsample(a, 7, tmp_path / "c", seed=3)
    subsample(b, 7, tmp_path / "d", seed=3, sequences_per_shard=2)
    assert list(skl.open(tmp_path / "c")) == list(skl.open(tmp_path / "d"))
    assert [3, 2] == [len(next(skl.open(tmp_path / name).shards())) for name in "cd"]
    assert [] == skl.verify(tmp_path / "c")
    assert (8, 64, skl.open(tmp_path / "c").num_records) == (made.sequences, made.positions, made.records)
    assert [s.tokens.tolist() for s in skl.open(a)] == [s.tokens.tolist() for s in skl.open(tmp_path / "c")]
    assert b"{}" == content(tmp_path / "c")["tokens/store.json"]
    shard = subsample(a / "shard-00001.skl", 7, tmp_path / "e", seed=3)
    assert list(skl.open(tmp_path / "e")) == list(skl.open(tmp_path / "c"))[3:6]
    assert 3 == shard.sequences
    assert before == content(a)


@pytest.mark.parametrize("seq_len", [8, 0])
def test_columns_go_along(tmp_path, seq_len):
    """record_logprob stays with its records; what is said of positions and tokens stays as it is."""
    a = skl.open(write(tmp_path / "a", 5, columns=COLUMNS, seq_len=seq_len))
    subsample(tmp_path / "a", 4, tmp_path / "c")
    for old, new in zip(a, skl.open(tmp_path / "c"), strict=True):
        for name in ("label_logprob", "entropy", "document_start"):
            assert old.columns[name].tolist() == new.columns[name].tolist()
        assert (-(new.targets.token_ids / np.float16(16))).tolist() == new.columns["record_logprob"].tolist()
        assert new.targets.num_records < old.targets.num_records


def test_a_cache_without_tokens(tmp_path):
    """Their alignment checksums go along, so that tokens can still be proven to be the right ones."""
    kept, a = skl.open(write(tmp_path / "kept", 4)), skl.open(write(tmp_path / "a", 4, store_tokens=False))
    subsample(tmp_path / "a", 4, tmp_path / "c")
    found = skl.open(tmp_path / "c")
    assert [s.alignment for s in a] == [s.alignment for s in found]
    assert found[3].tokens is None
    found.check_alignment(3, kept[3].tokens)
    assert [] == skl.verify(tmp_path / "c")


@pytest.mark.parametrize(
    ("sampler", "stays"),
    [("multinomial", "multinomial"), ("systematic", "thinned"), ("thinned", "thinned"), ("unknown", "unknown")],
)
def test_the_header_says_what_was_done(tmp_path, sampler, stays):
    """Sampler, rounds, the smallest profile that fits now, and of what the records were thinned."""
    cache = skl.open(write(tmp_path / "a", 2, sampler=sampler, vocab_size=200_000, rounds=64, capture={"teacher": "t"}))
    assert "R32" == cache.header.profile
    made = subsample(tmp_path / "a", 12, tmp_path / "c", seed=4)
    found = skl.open(tmp_path / "c").header
    assert (12, stays, "R24W", "counts") == (found.rounds, found.sampler, found.profile, found.kind)
    said = {"cache": cache.fingerprint, "rounds": 64, "sampler": sampler, "seed": 4, "sequences_per_shard": 2}
    assert {"teacher": "t", "thinned": said} == found.capture
    assert f"12 of 64 rounds kept, sampler {stays}" in str(made)


def test_killed_anywhere_it_resumes_to_the_same_bytes(tmp_path):
    """After kill -9 before each third write, sync or rename the same command ends with the undisturbed bytes."""
    a = write(tmp_path / "a", 4, columns=("record_logprob",))
    before = content(a)
    subsample(a, 5, tmp_path / "whole")
    whole = content(tmp_path / "whole")
    for call in itertools.count(1, 3):
        out = tmp_path / str(call)
        killed = run_until_call(call, lambda out=out: subsample(a, 5, out))
        if not killed:
            break
        subsample(a, 5, out)
        assert whole == content(out), call
    assert call > 15
    assert before == content(a)


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (("ratios", "--rounds", "4"), 1, "ratios: its records are ratios, and only counts are draws"),
        (("a", "--rounds", "20"), 1, "a: has 20 rounds, asked for are 20; give fewer, or capture it with more"),
        (("a", "--rounds", "0"), 2, "rounds must be >= 1, got 0"),
        (("a", "--rounds", "4", "--seed", str(1 << 64)), 2, "seed must be below 2**64, got 18446744073709551616"),
        (("a",), 2, "--rounds"),
    ],
)
def test_what_cannot_be_is_said_in_a_line(tmp_path, monkeypatch, capfd, words, status, message):
    """Nothing is written, and the line says what to do."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a", 2)
    write(tmp_path / "ratios", 2, kind="ratios")
    assert status == main(["subsample", *words, "--out", "c"])
    out, err = capfd.readouterr()
    assert ("", 1) == (out, err.count("\n"))
    assert message in err
    assert not (tmp_path / "c").exists()
