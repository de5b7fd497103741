"""The order of sequences: a permutation for every (seed, epoch, n), the same as the reference's."""

import numpy as np
import pytest
import reference
from hypothesis import given
from hypothesis import strategies as st

from sklformat.order import permute

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
