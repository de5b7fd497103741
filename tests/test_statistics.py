"""
What the samplers promise on average, with fixed seeds.

Each bound is a normal deviate of 5: a correct sampler passes any one of them with all but 6e-7 of all seeds, and all of
them with all but 2e-5; the seeds here are fixed, so that a failure is a fault and not chance.
"""

import math

import numpy as np
import pytest
from reference_sampler import dense, normal_quantile_chi_square, probabilities

from sklformat.sampler import draw

DEVIATE = 5.0


def power_law(vocab_size=2000, exponent=1.1, seed=0):
    """One row of logits: a shuffled power law, as a language model's row looks like."""
    ranks = np.random.default_rng(seed).permutation(vocab_size) + 1
    return (-exponent * np.log(ranks)).astype(np.float32)


def repeat(row, positions):
    return np.broadcast_to(row, (positions, row.size))


def shares(row, positions, rounds=50, **call):
    """[V] float64 total of counts / rounds or weights, divided by the number of positions."""
    targets = draw(repeat(row, positions), rounds, **call)
    pairs = targets.weights if targets.weights is not None else targets.counts / rounds
    return np.bincount(targets.token_ids, pairs, row.size) / positions


@pytest.mark.parametrize("seed", range(5))
def test_multinomial_counts_follow_the_probabilities(seed):
    """Chi-square of a row's 400 000 draws over bins of about 40 expected ones, on both sides."""
    row = power_law(seed=seed)
    law, total = probabilities(row), 8000 * 50
    observed = shares(row, 8000, seed=seed) * total
    order = np.argsort(-law)
    bins = np.unique(np.floor(np.cumsum(law[order]) * total / 40).astype(int), return_inverse=True)[1]
    expected, counts = np.bincount(bins, law[order] * total), np.bincount(bins, observed[order])
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert expected.min() > 5
    assert chi_square < normal_quantile_chi_square(expected.size - 1, DEVIATE)
    assert chi_square > normal_quantile_chi_square(expected.size - 1, -DEVIATE)


@pytest.mark.parametrize("sampler", ["multinomial", "systematic"])
def test_head_is_unbiased(sampler):
    """Each of the 200 most probable ids has its probability on average."""
    row = power_law()
    law, positions = probabilities(row), 6000
    mean = shares(row, positions, sampler=sampler, seed=3)
    part = np.modf(50 * law)[0] if sampler == "systematic" else law
    variance = part * (1 - part) / 50 ** (2 if sampler == "systematic" else 1) / positions
    head = np.argsort(-law)[:200]
    bound = math.sqrt(2 * math.log(200)) + DEVIATE  # the largest of 200 deviates
    assert (np.abs(mean - law)[head] <= bound * np.sqrt(variance[head]) + 2e-6 * law[head]).all()


@pytest.mark.parametrize("sampler", ["multinomial", "systematic"])
@pytest.mark.parametrize("layout", ["blocks of their own", "beside the head"])
def test_tail_below_1e_7_is_unbiased(sampler, layout):
    """40 000 ids of probability 5e-8 each are drawn as often as their mass of 2e-3 says, and evenly."""
    vocab_size, tail = 50_000, 40_000
    law = np.full(vocab_size, 5e-8)
    head = slice(0, vocab_size - tail) if layout == "blocks of their own" else slice(0, vocab_size, vocab_size // 100)
    head_ids = np.arange(vocab_size)[head]
    law[head_ids] = 1e-12
    law[head_ids[:: max(1, head_ids.size // 100)]] = 1.0
    tail_ids = np.flatnonzero(law == 5e-8)
    law[law == 1.0] = (1 - tail_ids.size * 5e-8) / (law == 1.0).sum()
    row = np.log(law).astype(np.float32)
    exact = probabilities(row)
    mass, positions, rounds = exact[tail_ids].sum(), 40, 20_000
    assert exact[tail_ids].max() < 1e-7
    mean = shares(row, positions, rounds, sampler=sampler, seed=11)
    draws = positions * rounds
    assert abs(mean[tail_ids].sum() - mass) < DEVIATE * math.sqrt(mass * (1 - mass) / draws)
    thirds = [part.sum() * draws for part in np.array_split(mean[tail_ids], 16)]
    chi_square = sum((count - mass * draws / 16) ** 2 / (mass * draws / 16) for count in thirds)
    assert chi_square < normal_quantile_chi_square(15, DEVIATE)


def test_rare_ids_inside_a_heavy_block_are_drawn_in_proportion():
    """Beside an id of probability almost 1 a tail a hundred thousand times rarer keeps its inner proportions."""
    row = np.full(256, -np.inf, np.float32)
    row[7] = 0.0
    row[8:24] = np.log(np.arange(1, 17) * 1e-5)
    law = probabilities(row)
    draws = 150 * 20_000
    counts = shares(row, 150, 20_000, seed=5)[8:24] * draws
    expected = law[8:24] * draws
    assert ((counts - expected) ** 2 / expected).sum() < normal_quantile_chi_square(16, DEVIATE)


@pytest.mark.parametrize(("vocab_size", "rare"), [(256, 3e-8), (51_200, 1e-10)])
def test_what_a_float32_running_sum_would_lose_is_drawn(vocab_size, rare):
    """Behind an id of probability almost 1, ids below float32's resolution at 1 share their mass evenly."""
    row = np.full(vocab_size, math.log(rare), np.float32)
    row[0] = 0.0
    law, draws = probabilities(row), 200 * 65_535
    counts = shares(row, 200, 65_535, sampler="systematic", seed=6) * draws
    for bins in (np.arange(vocab_size) % 16, np.arange(vocab_size) * 8 // vocab_size):
        drawn, expected = (np.bincount(bins[1:], values[1:]) for values in (counts, law * draws))
        assert ((drawn - expected) ** 2 / expected).sum() < normal_quantile_chi_square(expected.size, DEVIATE)


def test_variance_of_multinomial_is_its_formula_and_systematic_is_far_below():
    """E |t - p|^2 is (1 - sum p^2) / N for multinomial within 5 percent, and at most a third of it for systematic."""
    row = power_law(exponent=1.5)
    law = probabilities(row)
    errors = {}
    for sampler in ("multinomial", "systematic"):
        estimates = dense(draw(repeat(row, 1500), 50, sampler, seed=9), row.size) / 50
        errors[sampler] = ((estimates - law) ** 2).sum(1).mean()
    assert errors["multinomial"] == pytest.approx((1 - (law**2).sum()) / 50, rel=0.05)
    assert errors["systematic"] < errors["multinomial"] / 3


@pytest.mark.parametrize("sampler", ["multinomial", "systematic"])
@pytest.mark.parametrize("t", [0.8, 1.2])
def test_importance_weights_are_unbiased(sampler, t):
    """With weights p / q / rounds each of the 100 most probable ids, and all others together, have their mass."""
    row = power_law(exponent=1.3)
    law, proposal, positions = probabilities(row), probabilities(row, t), 5000
    call = {"sampler": sampler, "proposal_temperature": t, "self_normalise": False, "seed": 21}
    mean = shares(row, positions, **call)
    deviation = np.sqrt((law**2 / proposal - law**2) / 50 / positions)  # systematic: less
    head = np.argsort(-law)[:100]
    bound = math.sqrt(2 * math.log(100)) + DEVIATE
    assert (np.abs(mean - law)[head] < bound * deviation[head]).all()
    rest = np.setdiff1d(np.arange(row.size), head)
    spread = math.sqrt(((law[rest] ** 2 / proposal[rest]).sum() - law[rest].sum() ** 2) / 50 / positions)
    assert abs(mean[rest].sum() - law[rest].sum()) < DEVIATE * spread


@pytest.mark.parametrize("t", [0.8, 1.2])
def test_normalised_importance_weights_are_nearly_unbiased(t):
    """The paper's weights sum to 1, and their bias is below 3 percent for ids that carry more than 1 percent."""
    row = power_law(exponent=1.3)
    law = probabilities(row)
    mean = shares(row, 40_000, proposal_temperature=t, seed=22)
    heavy = law > 0.01
    assert mean.sum() == pytest.approx(1, abs=1e-5)
    np.testing.assert_allclose(law[heavy], mean[heavy], rtol=0.03)


def test_draws_of_positions_are_independent():
    """Counts of one id at neighbouring positions, sequences and seeds do not correlate."""
    row = np.zeros(2, np.float32)
    base = dense(draw(repeat(row, 20_001), 50, seed=1), 2)[:, 0] - 25
    others = {
        "position": base[1:],
        "sequence": dense(draw(repeat(row, 20_000), 50, seed=1, sequence=1), 2)[:, 0] - 25,
        "seed": dense(draw(repeat(row, 20_000), 50, seed=2), 2)[:, 0] - 25,
    }
    for name, other in others.items():
        correlation = (base[:-1] * other).mean() / 12.5
        assert abs(correlation) < DEVIATE / math.sqrt(20_000), name
