"""Records of one teacher, weighted for another, teach what the other says; a bound has a chance of a false alarm."""

import numpy as np
import pytest
import torch
from chance import largest_z, z_of_false_alarm

import sklformat as skl
from sklformat.distill import SparseLogitDataset, sparse_kl
from sklformat.distill.rescoring.weights import importance_weights

VOCAB, POSITIONS, ROUNDS = 12, 40_000, 8
SAMPLERS = ("multinomial", "systematic")
# What correct weights pass with one in a million of all seeds.
BOUND = z_of_false_alarm(VOCAB)


def log_softmax(row):
    row = row.astype(np.float64)
    return row - np.log(np.exp(row).sum())


@pytest.fixture(scope="module")
def teachers():
    """log p of two teachers that differ much: the ids that the second prefers, the first gives one part in fifty."""
    rng = np.random.default_rng(1)
    own = rng.normal(0, 1.2, VOCAB).astype(np.float32)
    other = (own + rng.normal(0, 1.5, VOCAB)).astype(np.float32)
    return own, log_softmax(own), log_softmax(other)


def drawn_by(row, sampler, positions=POSITIONS, **call):
    return skl.draw(np.broadcast_to(row, (positions, VOCAB)), ROUNDS, sampler=sampler, seed=5, sequence=0, **call)


def dense(targets):
    weights = np.zeros((targets.num_positions, VOCAB))
    weights[np.repeat(np.arange(targets.num_positions), np.diff(targets.offsets)), targets.token_ids] = targets.weights
    return weights


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_their_mean_is_the_other_teacher(teachers, sampler):
    """E[w] = p_B at each id, and so E[(Σw) s - w] = s - p_B for a student s; false alarm: 1e-6 each."""
    row, own, other = teachers
    targets = drawn_by(row, sampler)
    weights = dense(importance_weights(targets, ROUNDS, own[targets.token_ids], other[targets.token_ids]))
    assert largest_z(weights, np.exp(other)) < BOUND
    student = np.exp(log_softmax(np.linspace(-1, 1, VOCAB)))
    gradients = weights.sum(1, keepdims=True) * student - weights
    assert largest_z(gradients, student - np.exp(other)) < BOUND
    assert largest_z(dense_counts(targets), np.exp(other)) > 100  # it would show


def dense_counts(targets):
    shares = skl.SparseTargets(token_ids=targets.token_ids, weights=targets.counts / ROUNDS, offsets=targets.offsets)
    return dense(shares)


def test_a_proposal_keeps_its_weights(teachers):
    """Unbiased weights p_A / q of a proposal q, times p_B / p_A, have the mean p_B too; false alarm: 1e-6."""
    row, own, other = teachers
    targets = drawn_by(row, "multinomial", proposal_temperature=0.6, self_normalise=False)
    weights = dense(importance_weights(targets, 0, own[targets.token_ids], other[targets.token_ids]))
    assert largest_z(weights, np.exp(other)) < BOUND


def test_divided_by_their_sum_they_are_a_distribution(teachers):
    """Normalised weights sum to 1 at each position, and are nearer to B than A is, though not exact."""
    row, own, other = teachers
    targets = drawn_by(row, "systematic", 2000)
    some = importance_weights(targets, ROUNDS, own[targets.token_ids], other[targets.token_ids], normalised=True)
    assert np.allclose(dense(some).sum(1), 1)
    distance = np.abs(dense(some).mean(0) - np.exp(other)).sum()
    assert distance < np.abs(np.exp(own) - np.exp(other)).sum() / 4
    assert distance > 0.01


@pytest.mark.parametrize("gap", [-1000.0, 1000.0], ids=["less by far", "more by far"])
def test_divided_by_their_sum_no_position_loses_all(gap):
    """Where the teachers differ by more than a float64 can say, weights still sum to 1, and no record of a tie goes."""
    targets = skl.SparseTargets(token_ids=[1, 2, 3], counts=[1, 3, 4], offsets=[0, 2, 2, 3])
    own = np.array([-2.0, -2.0, -1.0])
    weighted = importance_weights(targets, 4, own, own + gap, normalised=True)
    assert [0, 2, 2, 3] == weighted.offsets.tolist()
    assert [0.25, 0.75, 1.0] == weighted.weights.tolist()


def test_they_are_cut_and_vanish():
    """Weights are cut to the largest that is allowed; a record whose weight is 0 in float32 is left out."""
    targets = skl.SparseTargets(token_ids=[0, 1, 2, 5], counts=[1, 2, 1, 4], offsets=[0, 3, 3, 4])
    own, other = np.log([0.25, 0.5, 0.25, 1.0]), np.array([np.log(0.9), -300.0, np.log(0.1), 0.0])
    weighted = importance_weights(targets, 4, own, other, largest=0.8)
    assert [0, 2, 5] == weighted.token_ids.tolist()
    assert [0, 2, 2, 3] == weighted.offsets.tolist()
    assert np.allclose([0.8, 0.1, 0.8], weighted.weights)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_gradient_of_a_student_is_the_other_teachers(teachers, sampler, tmp_path):
    """
    From the cache through dataset and loss: the mean gradient is full distillation's from B.

    The ratio code rounds each weight by at most 6 % here and the half-precision log-probs by 0.5 %, which may not
    average out; so the bound is the statistical one (false alarm: 1e-6) and 2 % of p_B, a third of the rounding.
    """
    row, own, other = teachers
    targets = drawn_by(row, sampler, 20_000)
    half = [x[targets.token_ids].astype(np.float16) for x in (own, other)]
    weighted = importance_weights(targets, ROUNDS, *half)
    scale = max(0, int(np.ceil(np.log2(weighted.weights.max()))))
    header = skl.Header(vocab_size=VOCAB, seq_len=1000, kind="ratios", rounds=ROUNDS, sampler=sampler, scale_log2=scale)
    with skl.ShardWriter(tmp_path / "shard-00000.skl", header=header) as writer:
        for begin in range(0, 20_000, 1000):
            offsets = weighted.offsets[begin : begin + 1001]
            some = slice(offsets[0], offsets[-1])
            writer.append(
                np.zeros(1001, int),
                skl.SparseTargets(
                    token_ids=weighted.token_ids[some], weights=weighted.weights[some], offsets=offsets - offsets[0]
                ),
            )
    student = torch.linspace(-1, 1, VOCAB, dtype=torch.float64)
    gradients = []
    for batch in SparseLogitDataset(tmp_path, batch_size=4, shuffle=False):
        logits = student.repeat(4000, 1).requires_grad_()
        sparse_kl(logits, batch.targets).backward()
        gradients.append(logits.grad * 4000)
    gradients = torch.cat(gradients).numpy()
    expected = torch.softmax(student, 0).numpy() - np.exp(other)
    error = gradients.std(0, ddof=1) / np.sqrt(len(gradients))
    assert (np.abs(gradients.mean(0) - expected) < BOUND * error + 0.02 * np.exp(other)).all()
    towards_the_first = torch.softmax(student, 0).numpy() - np.exp(own)
    assert np.abs(gradients.mean(0) - towards_the_first).max() > 10 * np.abs(gradients.mean(0) - expected).max()
