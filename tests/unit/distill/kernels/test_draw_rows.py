"""
The kernels that draw against C's sampler: the same ids and weights from the same logits; on the CPU interpreted.

Shape letters: P positions, V vocabulary, N rounds.
"""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

import sklformat as skl
from sklformat.distill.kernels.draw_rows import draw_rows

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SEED, SEQUENCE, FIRST = 2**63 + 5, 2**40 + 9, 3


def rows(positions, vocab_size, dtype=torch.float32, *, spread=4.0):
    g = torch.Generator().manual_seed(positions * 7919 + vocab_size)
    return (spread * torch.randn(positions, vocab_size, generator=g)).to(dtype)


def drawn(logits, rounds, **settings):
    places = torch.arange(FIRST, FIRST + len(logits), device=DEVICE)
    return draw_rows(logits.to(DEVICE), places, rounds=rounds, seed=SEED, sequence=SEQUENCE, **settings)


def records(found, row):
    """Ids of a row with how often each was drawn, or its weight."""
    ids = found.ids[row].cpu().numpy()
    assert (np.diff(ids) >= 0).all()
    each = np.ones(ids.size) if found.weights is None else found.weights[row].cpu().numpy().astype(np.float64)
    distinct, place = np.unique(ids, return_inverse=True)
    return dict(zip(distinct.tolist(), np.bincount(place, each).tolist(), strict=True))


def check_as_c(found, logits, rounds, *, sampler="multinomial", temperature=1.0, self_normalise=True):
    """C's records of the same logits; the interpreter and a GPU round sums of exponentials otherwise, ids seldom."""
    expected = skl.draw(
        logits,
        rounds=rounds,
        sampler=sampler,
        proposal_temperature=temperature,
        self_normalise=self_normalise,
        seed=SEED,
        sequence=SEQUENCE,
        first_position=FIRST,
    )
    values = expected.counts if expected.counts is not None else expected.weights
    assert not found.is_bad.any()
    for row in range(len(logits)):
        span = slice(expected.offsets[row], expected.offsets[row + 1])
        of_c = dict(zip(expected.token_ids[span].tolist(), values[span].tolist(), strict=True))
        assert records(found, row) == pytest.approx(of_c, rel=1e-5)


@pytest.mark.parametrize("sampler", ["multinomial", "systematic"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_draws_are_cs(sampler, dtype):
    logits = rows(2, 1009, dtype)
    check_as_c(drawn(logits, 20, systematic=sampler == "systematic"), logits, 20, sampler=sampler)


@pytest.mark.parametrize(("vocab_size", "rounds"), [(1, 1), (3, 5), (256, 17), (8193, 127), (131_075, 16)])
def test_rows_of_any_width_and_any_number_of_rounds(vocab_size, rounds):
    """Less than a block, a block, a tile and one id more; the last is wider than 17 bits hold."""
    logits = rows(1 if rounds > 20 else 2, vocab_size)
    check_as_c(drawn(logits, rounds), logits, rounds)


def test_draws_from_a_proposal_carry_their_weights():
    logits = rows(2, 500, spread=3)
    for self_normalise in (True, False):
        settings = {"temperature": 0.7, "self_normalise": self_normalise}
        check_as_c(drawn(logits, 12, **settings), logits, 12, **settings)
    check_as_c(drawn(logits, 12, temperature=1.4, systematic=True), logits, 12, sampler="systematic", temperature=1.4)


def test_more_rounds_than_counts_hold():
    logits = rows(1, 700)
    found, weights = (
        drawn(logits, 300),
        skl.draw(logits, rounds=300, seed=SEED, sequence=SEQUENCE, first_position=FIRST),
    )
    of_c = dict(zip(weights.token_ids.tolist(), (300 * weights.weights).round().tolist(), strict=True))
    assert records(found, 0) == of_c


def test_rows_may_lie_apart_and_come_one_by_one():
    logits = rows(3, 400)
    wide = torch.zeros(3, 450)
    wide[:, :400] = logits
    together = drawn(wide[:, :400], 9).ids
    for row in range(3):
        place = torch.tensor([FIRST + row], device=DEVICE)
        alone = draw_rows(logits[row : row + 1].to(DEVICE), place, rounds=9, seed=SEED, sequence=SEQUENCE)
        assert torch.equal(alone.ids[0], together[row])


def test_entropy_and_log_sum_come_from_the_same_pass():
    logits = rows(3, 9001)
    logits[0, ::2] = -torch.inf
    found = drawn(logits, 2, want_entropy=True)
    exact = logits.double()
    torch.testing.assert_close(found.log_sum.cpu().double(), exact.logsumexp(1), rtol=0, atol=5e-6)
    entropy = torch.special.entr(exact.softmax(1)).sum(1)
    torch.testing.assert_close(found.entropy.cpu().double(), entropy, rtol=0, atol=2e-5)


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # the interpreter computes with what is bad
@pytest.mark.parametrize("value", [torch.nan, torch.inf, 2.0**21])
def test_rows_that_no_draw_may_come_from(value):
    logits = rows(3, 300)
    logits[1, 299] = value
    assert drawn(logits, 4).is_bad.tolist() == [False, True, False]


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
def test_a_row_of_nothing_is_bad():
    assert drawn(torch.full((1, 300), -torch.inf), 4).is_bad.tolist() == [True]


@triton.jit
def largest_uniforms(_seed, _sequence, _place, rounds):
    return tl.zeros_like(rounds).to(tl.int64) + (2**53 - 1)


@pytest.mark.skipif(DEVICE == "cuda", reason="a kernel that is compiled already keeps its uniforms")
def test_a_point_that_rounds_to_the_total_is_of_the_last_id_that_adds_to_it(monkeypatch):
    """Not of one behind it, whose mass is lost in the rounding of the running sums."""
    monkeypatch.setattr("sklformat.distill.kernels.draw_rows._uniforms", largest_uniforms)
    logits = torch.full((1, 8197), -torch.inf)
    logits[0, 3], logits[0, 8192], logits[0, 8193] = 0, -87.2, -86
    for systematic in (True, False):
        assert drawn(logits, 50, systematic=systematic).ids.unique().tolist() == [3]


def test_no_row_at_all():
    assert drawn(rows(0, 300), 4).ids.shape == (0, 4)
