"""
What chance allows: bounds that a correct sampler keeps with fixed seeds, and rows of logits to hold it to them.

A bound is a normal deviate: a correct sampler passes one of them with all but 6e-7 of all seeds.  The seeds are fixed,
so that a failure is a fault and not chance.
"""

import math
from statistics import NormalDist

import numpy as np
from reference_sampler import probabilities

DEVIATE = 5.0


def power_law(vocab_size=2000, exponent=1.1, seed=0):
    """One row of logits: a shuffled power law, as a language model's row looks like."""
    ranks = np.random.default_rng(seed).permutation(vocab_size) + 1
    return (-exponent * np.log(ranks)).astype(np.float32)


def repeat(row, positions):
    return np.broadcast_to(row, (positions, row.size))


def law_with_a_tail(layout, vocab_size=50_000):
    """A row in which 40 000 ids or more have a probability of 5e-8 each, beside the head or in blocks of their own."""
    law = np.full(vocab_size, 5e-8)
    head = np.arange(0, 10_000 if layout == "blocks of their own" else vocab_size, 100)
    if layout == "blocks of their own":
        law[:10_000] = 1e-12
    law[head] = 0
    tail = np.flatnonzero(law == 5e-8)
    weights = 1 / np.arange(1, head.size + 1)  # equal ones would beat with the even steps of systematic draws
    law[head] = (1 - law.sum()) * weights / weights.sum()
    row = np.log(law).astype(np.float32)
    assert tail.size >= 39_000
    assert probabilities(row)[tail].max() < 1e-7
    return row, tail


def largest_of(deviates):
    """What the largest of so many deviates keeps."""
    return math.sqrt(2 * math.log(deviates)) + DEVIATE


def chi_square_at(degrees, deviate):
    """Chi-square value that a normal deviate stands for (Wilson and Hilferty 1931)."""
    return degrees * (1 - 2 / (9 * degrees) + deviate * math.sqrt(2 / (9 * degrees))) ** 3


def chi_square(drawn, expected):
    return ((drawn - expected) ** 2 / expected).sum()


def assert_drawn_by(law, drawn):
    """[V] numbers of draws follow [V] probabilities, over bins of about 40 expected ones, neither worse nor better."""
    total = drawn.sum()
    order = np.argsort(-law)
    bins = np.unique(np.floor(np.cumsum(law[order]) * total / 40).astype(int), return_inverse=True)[1]
    expected, counts = np.bincount(bins, law[order] * total), np.bincount(bins, drawn[order])
    assert expected.min() > 5
    assert chi_square(counts, expected) < chi_square_at(expected.size - 1, DEVIATE)
    assert chi_square(counts, expected) > chi_square_at(expected.size - 1, -DEVIATE)


def assert_head_is_unbiased(law, mean, positions, sampler, rounds=50):
    """Each of the 200 most probable ids has its probability on average over positions of so many rounds."""
    part = np.modf(rounds * law)[0] if sampler == "systematic" else law
    variance = part * (1 - part) / rounds ** (2 if sampler == "systematic" else 1) / positions
    head = np.argsort(-law)[:200]
    assert (np.abs(mean - law)[head] <= largest_of(200) * np.sqrt(variance[head]) + 2e-6 * law[head]).all()


def assert_tail_is_unbiased(mass, drawn, draws, parts):
    """Numbers of draws of a tail's ids have its mass, evenly over so many parts of it."""
    assert abs(drawn.sum() - mass * draws) < DEVIATE * math.sqrt(mass * (1 - mass) * draws)
    shares = np.array([part.sum() for part in np.array_split(drawn, parts)])
    assert chi_square(shares, mass * draws / parts) < chi_square_at(parts - 1, DEVIATE)


def largest_z(samples, expected):
    """Largest distance of a mean over [R, M] samples from [M] expected values, in standard errors."""
    error = samples.std(0, ddof=1) / np.sqrt(len(samples))
    return float(np.max(np.abs(samples.mean(0) - expected) / error))


def z_of_false_alarm(coordinates, probability=1e-6):
    """What ``largest_z`` of unbiased samples passes with this probability (Bonferroni, normal tails)."""
    return NormalDist().inv_cdf(1 - probability / (2 * coordinates))
