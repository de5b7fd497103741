"""Mixtures of caches: which one each place is of; the reference agrees, shares are exact, nobody waits long."""

import math

import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st

from sklformat.format.mixture import Mixture
from sklformat.format.order import Schedule

SEEDS = st.sampled_from([0, 1, 2**64 - 1]) | st.integers(0, 2**64 - 1)
WEIGHTS = st.floats(0.05, 20) | st.sampled_from([1.0, 0.1, 3.0])


@st.composite
def mixtures(draw, most=80):
    """Some caches; their sizes and weights."""
    sizes = draw(st.lists(st.integers(1, most), min_size=1, max_size=9))
    weights = draw(st.none() | st.lists(WEIGHTS, min_size=len(sizes), max_size=len(sizes)))
    if weights is not None and sum(sizes) * min(weights) < sum(weights):
        weights = None  # one would give nothing
    return sizes, weights


@given(mixtures(), SEEDS | st.none(), st.integers(0, 5))
@settings(max_examples=100, deadline=None)
def test_each_cache_gives_its_share_in_order(mixture, seed, epoch):
    """Over an epoch each cache's sequences are the next of it, one by one; where it stopped, the next epoch begins."""
    sizes, weights = mixture
    mixed = Mixture.of(sizes, weights)
    assert sum(sizes) == mixed.num_sequences
    sources, numbers = mixed.find(np.arange(sum(sizes)), epoch, seed)
    for s, share in enumerate(mixed.shares):
        assert list(range(epoch * share, (epoch + 1) * share)) == numbers[sources == s].tolist()
        assert abs(share - sum(sizes) * (weights or sizes)[s] / sum(weights or sizes)) < 1 + 1e-9


@given(mixtures(), SEEDS | st.none(), st.integers(0, 3))
@settings(max_examples=100, deadline=None)
def test_proportions_hold_everywhere(mixture, seed, epoch):
    """After any number of places each cache is within 2 sequences per halving of its exact share."""
    mixed = Mixture.of(*mixture)
    places = np.arange(mixed.num_sequences)
    sources, _ = mixed.find(places, epoch, seed)
    given_so_far = np.cumsum(sources[:, None] == np.arange(len(mixed.shares)), axis=0)
    exact = (places[:, None] + 1) * np.array(mixed.shares) / mixed.num_sequences
    assert np.abs(given_so_far - exact).max() <= 2 * math.ceil(math.log2(len(mixed.shares)))


@given(st.data(), SEEDS, st.booleans(), st.sampled_from([0, 1, 2**20]))
@settings(max_examples=60, deadline=None)
def test_the_reference_agrees(data, seed, shuffle, epoch):
    """Package and reference give the same cache and number at any place of epochs of up to 2^32 sequences."""
    shares = data.draw(st.lists(st.integers(1, 2**32) | st.integers(1, 100), min_size=2, max_size=6))
    shares = [max(1, share * 2**32 // max(sum(shares), 2**32) - 1) for share in shares]
    mixed = Mixture(tuple(shares), tuple(shares))
    last = mixed.num_sequences - 1
    places = [0, last, last - last % 16, *data.draw(st.lists(st.integers(0, last), max_size=5))]
    found = mixed.find(np.array(places), epoch, seed if shuffle else None)
    expected = [reference.mixed(shares, seed, epoch, i, shuffle=shuffle) for i in places]
    assert expected == list(zip(*(values.tolist() for values in found), strict=True))


@given(mixtures(most=20), SEEDS, st.integers(0, 3), st.none() | st.integers(1, 25))
@settings(max_examples=40, deadline=None)
def test_schedules_follow_the_reference(mixture, seed, epoch, window):
    """The stream has the reference's sequences, numbered one cache after the other."""
    sizes, weights = mixture
    mixed = Mixture.of(sizes, weights)
    schedule = Schedule(num_sequences=sum(sizes), batch_size=1, seed=seed, window=window, mixture=mixed)
    got = [int(places[0]) for places, _ in schedule.batches(epoch, 0)]
    firsts = np.cumsum([0, *sizes]).tolist()
    shares = sizes if weights is None else reference.shares(sizes, weights)
    pairs = [reference.mixed_sequence(sizes, shares, seed, epoch, i, window) for i in range(sum(sizes))]
    assert [firsts[cache] + sequence for cache, sequence in pairs] == got
    if weights is None:
        assert list(range(sum(sizes))) == sorted(got)


@given(mixtures(most=12), SEEDS, st.none() | st.integers(1, 15))
@settings(max_examples=40, deadline=None)
def test_nothing_comes_again_before_all_has_come(mixture, seed, window):
    """Over many epochs the sequences of a cache come in whole walks, each with every sequence once."""
    sizes, weights = mixture
    mixed = Mixture.of(sizes, weights)
    schedule = Schedule(num_sequences=sum(sizes), batch_size=1, seed=seed, window=window, mixture=mixed)
    got = np.concatenate([places for epoch in range(4) for places, _ in schedule.batches(epoch, 0)])
    first = 0
    for size in sizes:
        own = got[(got >= first) & (got < first + size)] - first
        for begin in range(0, own.size, size):
            walk = own[begin : begin + size].tolist()
            assert len(walk) == len(set(walk))
            assert len(walk) == size or begin + size > own.size
        first += size


def test_no_rank_has_one_cache_for_ever():
    """With a row each, two ranks of an even mixture both see both caches about as often; batches stay even."""
    sources, _ = Mixture.of([5000, 5000], None).find(np.arange(10_000), 0, seed=3)
    steps = sources.reshape(-1, 2)
    assert (np.abs(steps.mean(axis=0) - 0.5) < 0.1).all()
    assert (np.abs(sources.reshape(-1, 8).sum(axis=1) - 4) <= 1).all()


def test_unshuffled_caches_take_turns():
    """Without shuffling there is no chance in it: one after the other, each in its own order."""
    schedule = Schedule(num_sequences=7, batch_size=7, shuffle=False, mixture=Mixture.of([4, 3], None))
    for epoch in (0, 1):
        assert [[4, 0, 5, 1, 6, 2, 3]] == [places.tolist() for places, _ in schedule.batches(epoch, 0)]


def test_the_last_epoch():
    """Numbers stay below 2^62; beyond, an epoch is refused."""
    mixed = Mixture.of([3, 1], None)
    assert 2**62 // 4 * 3 - 1 == mixed.find(np.arange(4), 2**60 - 1, 0)[1].max()
    with pytest.raises(ValueError, match=r"epoch 1152921504606846976 of 4 sequences each lies beyond 2\*\*62"):
        mixed.find(np.arange(4), 2**60, 0)


@pytest.mark.parametrize(
    ("sizes", "weights", "message"),
    [
        ([5, 5], [1.0], "give one weight for each cache, got 1 for 2"),
        ([5, 5], [1.0, 0.0], "weights must be positive and finite, got 0.0"),
        ([5, 5], [1.0, -1.0], "weights must be positive and finite, got -1.0"),
        ([5, 5], [math.inf, 1.0], "weights must be positive and finite, got inf"),
        ([5, 5], [1.0, math.nan], "weights must be positive and finite, got nan"),
        ([5, 5], [0.999, 0.001], r"weight 0.001 of 1.0 gives cache 1 none of the 10 sequences of an epoch; raise it"),
        ([2**32, 1], None, r"a mixture has up to 2\*\*32 sequences, got 4294967297"),
    ],
)
def test_refusals(sizes, weights, message):
    """Weights that say nothing, and epochs that are too long, are refused with their values."""
    with pytest.raises(ValueError, match=message):
        Mixture.of(sizes, weights)


def test_only_ratios_of_weights_count():
    """Weights of any scale that are exact multiples give the same shares; ties go to the earlier cache."""
    assert Mixture.of([10, 10], [7, 3]) == Mixture.of([10, 10], [14.0, 6.0]) == Mixture((10, 10), (14, 6))
    assert (3, 2) == Mixture.of([2, 3], [1, 1]).shares
    assert (5, 5) == Mixture.of([5, 5], [1e308, 1e308]).shares
    assert (7, 3) == Mixture.of([5, 5], np.array([0.7, 0.3], np.float32)).shares
