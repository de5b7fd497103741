"""The order of sequences: a permutation for every (seed, epoch, n), the same as the reference's."""

import numpy as np
import pytest
import reference
from hypothesis import given
from hypothesis import strategies as st

from sklformat.format.order import Schedule, permute, permute_windows

SEEDS = st.sampled_from([0, 1, 2**64 - 1]) | st.integers(0, 2**64 - 1)


@given(st.integers(1, 200), SEEDS, SEEDS)
def test_every_index_comes_once(n, seed, epoch):
    """Over [0, n) each value comes exactly once."""
    assert list(range(n)) == sorted(permute(np.arange(n), n, seed=seed, epoch=epoch).tolist())


@given(st.integers(1, 2**62), SEEDS, SEEDS, st.data())
def test_the_reference_agrees(n, seed, epoch, data):
    """Package and reference put an index in the same place, for any size up to 2^62."""
    indices = [0, n - 1, data.draw(st.integers(0, n - 1))]
    expected = [reference.permute(n, seed, epoch, i) for i in indices]
    assert expected == permute(indices, n, seed=seed, epoch=epoch).tolist()


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 15, 16, 17, 63, 64, 65, 255, 256, 257])
def test_sizes_around_powers_of_two(n):
    """Sizes next to a power of two walk the cycle right."""
    expected = [reference.permute(n, 3, 1, i) for i in range(n)]
    assert expected == permute(np.arange(n), n, seed=3, epoch=1).tolist()


def test_epochs_and_seeds_differ():
    """Each seed and each epoch has another order, and the shape of the question is that of the answer."""
    orders = [permute(np.arange(64).reshape(8, 8), 64, seed=seed, epoch=epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert all(order.shape == (8, 8) and order.dtype == np.int64 for order in orders)
    assert len({order.tobytes() for order in orders}) == 4


def test_order_looks_random():
    """Neighbours do not stay neighbours: the correlation of places over 4096 is that of chance, within 5 sigma."""
    n = 4096
    places = permute(np.arange(n), n, seed=7).astype(np.float64)
    assert abs(np.corrcoef(places[:-1], places[1:])[0, 1]) < 5 / np.sqrt(n)
    assert abs(np.corrcoef(places, np.arange(n))[0, 1]) < 5 / np.sqrt(n)


@pytest.mark.parametrize(("indices", "n"), [([0], 0), ([0], 2**62 + 1), ([5], 5), ([-1], 5)])
def test_out_of_range(indices, n):
    """A size or an index out of range is refused."""
    with pytest.raises(ValueError, match=r"got"):
        permute(indices, n, seed=0)


@pytest.mark.parametrize(("seed", "epoch"), [(-1, 0), (1 << 64, 0), (0, -1), (0, 1 << 64)])
def test_seeds_out_of_range(seed, epoch):
    """A seed or an epoch that is no u64 is refused, with its value."""
    with pytest.raises(ValueError, match=rf"seed and epoch must be in .*, got {seed} and {epoch}"):
        permute([0], 5, seed=seed, epoch=epoch)


@given(st.integers(1, 200), st.integers(1, 210), SEEDS, SEEDS)
def test_windows_hold_every_index_once(n, window, seed, epoch):
    """Over [0, n) each value comes exactly once, also where the window is as large as n or larger."""
    assert list(range(n)) == sorted(permute_windows(np.arange(n), n, window, seed=seed, epoch=epoch).tolist())


@given(st.integers(1, 2**62), st.integers(1, 2**62) | st.integers(1, 1000), SEEDS, SEEDS, st.data())
def test_the_reference_agrees_on_windows(n, window, seed, epoch, data):
    """Package and reference put an index in the same place, for any size and window up to 2^62."""
    indices = [0, n - 1, data.draw(st.integers(0, n - 1))]
    expected = [reference.permute_windows(n, window, seed, epoch, i) for i in indices]
    assert expected == permute_windows(indices, n, window, seed=seed, epoch=epoch).tolist()


@pytest.mark.parametrize(("n", "window"), [(1000, 64), (1024, 64), (100, 7), (50, 50), (50, 60)])
def test_a_window_is_one_stretch(n, window):
    """Each window of places holds sequences that follow each other modulo n, in another order in each epoch."""
    for epoch in range(3):
        order = permute_windows(np.arange(n), n, window, seed=5, epoch=epoch)
        for first in range(0, n, window):
            some = np.sort(order[first : first + window])
            gaps = np.diff(some, append=some[0] + n)
            assert some.size == 1 or some.size - 1 == np.count_nonzero(gaps == 1) or (gaps == 1).all()


def test_windows_move_between_epochs():
    """The short block at the end of an epoch, which tail="drop" loses, holds other sequences in other epochs."""
    last = {tuple(sorted(permute_windows(np.arange(96, 103), 103, 32, seed=0, epoch=epoch))) for epoch in range(8)}
    assert len(last) > 4


def test_windows_shuffle():
    """Inside of a window and between windows the order is that of chance: correlations within 5 sigma."""
    n, window = 1 << 14, 128
    order = permute_windows(np.arange(n), n, window, seed=3).astype(np.float64)
    blocks = order.reshape(-1, window)
    places = np.arange(window)
    inside = [np.corrcoef(places, (block - block.min()) % n)[0, 1] for block in blocks if np.ptp(block) < window]
    assert abs(np.mean(inside)) < 5 / np.sqrt(n)
    firsts = blocks.min(axis=1)
    assert abs(np.corrcoef(np.arange(firsts.size), firsts)[0, 1]) < 5 / np.sqrt(firsts.size)


@pytest.mark.parametrize("window", [0, -1, 2**62 + 1])
def test_windows_out_of_range(window):
    """A window without a sequence, or beyond the largest permutation, is refused with its value."""
    with pytest.raises(ValueError, match=rf"a window holds 1\.\.2\*\*62 places, got {window}"):
        permute_windows([0], 5, window, seed=0)


def test_a_schedule_with_a_window():
    """A schedule takes the windowed order; without shuffle a window has no meaning, and a float is none."""
    schedule = Schedule(num_sequences=100, batch_size=5, seed=2, window=8)
    got = np.concatenate([numbers for numbers, _ in schedule.batches(3, 0)])
    assert permute_windows(np.arange(100), 100, 8, seed=2, epoch=3).tolist() == got.tolist()
    assert (2, 1, 0) == (
        schedule.algorithm,
        Schedule(num_sequences=9, batch_size=1).algorithm,
        Schedule(num_sequences=9, batch_size=1, shuffle=False).algorithm,
    )
    with pytest.raises(ValueError, match=r"a window needs shuffle .*, got 8, shuffle False"):
        Schedule(num_sequences=100, batch_size=5, window=8, shuffle=False)
    with pytest.raises(TypeError, match=r"window must be an integer, got 2\.0"):
        Schedule(num_sequences=100, batch_size=5, window=2.0)
