"""What the samplers promise on average; a correct one passes all bounds here with all but 2e-5 of all seeds."""

import functools
import math

import numpy as np
import pytest
from chance import (
    DEVIATE,
    assert_drawn_by,
    assert_head_is_unbiased,
    assert_tail_is_unbiased,
    chi_square,
    chi_square_at,
    largest_of,
    law_with_a_tail,
    power_law,
    repeat,
)
from reference_sampler import dense, probabilities

import sklformat as skl

draw = functools.partial(skl.draw, sequence=0)  # of one sequence, where a test names no other


def shares(row, positions, rounds=50, **call):
    """[V] float64 total of counts / rounds or weights, divided by the number of positions."""
    targets = draw(repeat(row, positions), rounds, **call)
    pairs = targets.weights if targets.weights is not None else targets.counts / rounds
    return np.bincount(targets.token_ids, pairs, row.size) / positions


@pytest.mark.parametrize("seed", range(5))
def test_multinomial_counts_follow_the_probabilities(seed):
    """Chi-square of a row's 400 000 draws over bins of about 40 expected ones, on both sides."""
    row = power_law(seed=seed)
    assert_drawn_by(probabilities(row), shares(row, 8000, seed=seed) * 8000 * 50)


@pytest.mark.parametrize("sampler", ["multinomial", "systematic"])
def test_head_is_unbiased(sampler):
    """Each of the 200 most probable ids has its probability on average."""
    row = power_law()
    assert_head_is_unbiased(probabilities(row), shares(row, 6000, sampler=sampler, seed=3), 6000, sampler)


@pytest.mark.parametrize("sampler", ["multinomial", "systematic"])
@pytest.mark.parametrize("layout", ["blocks of their own", "beside the head"])
def test_tail_below_1e_7_is_unbiased(sampler, layout):
    """40 000 ids or more of probability 5e-8 each are drawn as often as their mass of 2e-3 says, and evenly."""
    row, tail = law_with_a_tail(layout)
    draws = 40 * 20_000
    drawn = shares(row, 40, 20_000, sampler=sampler, seed=11)[tail] * draws
    assert_tail_is_unbiased(probabilities(row)[tail].sum(), drawn, draws, 16)


def test_rare_ids_inside_a_heavy_block_are_drawn_in_proportion():
    """Beside an id of probability almost 1 a tail a hundred thousand times rarer keeps its inner proportions."""
    row = np.full(256, -np.inf, np.float32)
    row[7] = 0.0
    row[8:24] = np.log(np.arange(1, 17) * 1e-5)
    law = probabilities(row)
    draws = 150 * 20_000
    counts = shares(row, 150, 20_000, seed=5)[8:24] * draws
    assert chi_square(counts, law[8:24] * draws) < chi_square_at(16, DEVIATE)


@pytest.mark.parametrize(("vocab_size", "rare"), [(256, 3e-8), (51_200, 1e-10)])
def test_what_a_float32_running_sum_would_lose_is_drawn(vocab_size, rare):
    """Behind an id of probability almost 1, ids below float32's resolution at 1 share their mass evenly."""
    row = np.full(vocab_size, math.log(rare), np.float32)
    row[0] = 0.0
    law, draws = probabilities(row), 200 * 65_535
    counts = shares(row, 200, 65_535, sampler="systematic", seed=6) * draws
    for bins in (np.arange(vocab_size) % 16, np.arange(vocab_size) * 8 // vocab_size):
        drawn, expected = (np.bincount(bins[1:], values[1:]) for values in (counts, law * draws))
        assert chi_square(drawn, expected) < chi_square_at(expected.size, DEVIATE)


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
    assert (np.abs(mean - law)[head] < largest_of(100) * deviation[head]).all()
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
