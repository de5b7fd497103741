"""
Random sampling preserves the gradient of full distillation in expectation (A.6); Top-K does not.

For R seeded multinomial draws of the targets, each coordinate of the mean gradient, less the full gradient, is divided
by its standard error.  Under unbiasedness the largest of M such z-scores exceeds the bound of a false alarm with
probability 1e-6 (the seeds are fixed, so that the tests cannot flicker).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from chance import largest_z, z_of_false_alarm
from torch import Tensor

from sklformat.distill.losses.confidence import easy_hard_weights, label_confidence
from sklformat.distill.losses.kl import DenseTargets, linear_sparse_kl, sparse_kl

VOCAB_SIZE, ROUNDS, REPETITIONS = 40, 50, 4000


@dataclass
class Ragged:
    token_ids: Tensor
    probs: Tensor
    offsets: Tensor


def teacher_and_student() -> tuple[np.ndarray, Tensor]:
    """A teacher with a Zipf-like tail, and the logits of a student that differs from it."""
    rng = np.random.default_rng(11)
    weights = 1 / np.arange(1, VOCAB_SIZE + 1)
    teacher = rng.permutation(weights / weights.sum())
    return teacher, torch.from_numpy(np.log(teacher) + rng.normal(size=VOCAB_SIZE))


def ragged(probs_RV: np.ndarray) -> Ragged:
    rows, ids = np.nonzero(probs_RV)
    offsets = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=len(probs_RV)))])
    values = torch.from_numpy(probs_RV[rows, ids])
    return Ragged(torch.from_numpy(ids), values, torch.from_numpy(offsets))


def drawn(seed: int) -> np.ndarray:
    teacher, _ = teacher_and_student()
    return np.random.default_rng(seed).multinomial(ROUNDS, teacher, size=REPETITIONS) / ROUNDS


def gradients(
    probs_RV: np.ndarray, method: str, divergence: str = "forward_kl", weights_R: Tensor | None = None
) -> np.ndarray:
    """Gradient of each repetition's own loss, [R, V]: the repetitions are the positions of one batch."""
    _, logits = teacher_and_student()
    x_RV = logits.repeat(len(probs_RV), 1).requires_grad_()
    labels_R = torch.zeros(len(probs_RV), dtype=torch.int64)
    settings = {"method": method, "divergence": divergence, "labels_P": labels_R, "position_weights_P": weights_R}
    loss = sparse_kl(x_RV, ragged(probs_RV), normaliser=float(len(probs_RV)), **settings)
    return (torch.autograd.grad(loss, x_RV)[0] * len(probs_RV)).numpy()


def full_gradient(divergence: str = "forward_kl") -> np.ndarray:
    teacher, logits = teacher_and_student()
    x_1V = logits[None].requires_grad_()
    loss = sparse_kl(x_1V, DenseTargets(torch.from_numpy(teacher)[None]), method="full", divergence=divergence)
    return torch.autograd.grad(loss, x_1V)[0][0].numpy()


def test_random_sampling_preserves_the_gradient_in_expectation():
    """The mean over draws equals full distillation's gradient at each logit, within the sampling error."""
    assert z_of_false_alarm(VOCAB_SIZE) > largest_z(gradients(drawn(1), "random_sampling"), full_gradient())


@pytest.mark.parametrize("method", ["label_smoothing", "naive_fix"])
def test_methods_linear_in_the_target_stay_unbiased_where_the_records_sum_to_one(method):
    """With counts over rounds there is no residual, and these methods are random sampling."""
    _, logits = teacher_and_student()
    probs_RV = drawn(2)
    x_RV = logits.repeat(len(probs_RV), 1).requires_grad_()
    labels_P = torch.zeros(len(probs_RV), dtype=torch.int64)
    loss = sparse_kl(x_RV, ragged(probs_RV), method=method, labels_P=labels_P)
    samples_RV = (torch.autograd.grad(loss, x_RV)[0] * len(probs_RV)).numpy()
    assert z_of_false_alarm(VOCAB_SIZE) > largest_z(samples_RV, full_gradient())


def test_the_weight_gradient_is_unbiased_too():
    """Through the output layer and position weights the mean over draws is still full distillation's."""
    teacher, _ = teacher_and_student()
    g = torch.Generator().manual_seed(3)
    P, D, repetitions = 2, 2, 200
    hidden_PD = torch.randn(P, D, generator=g, dtype=torch.float64)
    weight_VD = torch.randn(VOCAB_SIZE, D, generator=g, dtype=torch.float64, requires_grad=True)
    weights_P = torch.tensor([1.0, 2.0])
    draws = np.random.default_rng(4).multinomial(ROUNDS, teacher, size=(repetitions, P)) / ROUNDS
    samples = [
        torch.autograd.grad(
            linear_sparse_kl(hidden_PD, weight_VD, ragged(draw), position_weights_P=weights_P), weight_VD
        )[0]
        for draw in draws
    ]
    dense = DenseTargets(torch.from_numpy(np.tile(teacher, (P, 1))))
    full = linear_sparse_kl(hidden_PD, weight_VD, dense, method="full", position_weights_P=weights_P)
    expected = torch.autograd.grad(full, weight_VD)[0].flatten().numpy()
    samples_RM = torch.stack(samples).flatten(1).numpy()
    assert z_of_false_alarm(samples_RM.shape[1]) > largest_z(samples_RM, expected)


@pytest.mark.parametrize("method", ["topk", "topk_normalised", "ghost_token"])
def test_the_same_test_rejects_top_k(method):
    """Control: Top-K records of noisy teachers, at as many records, fail by far, so that the test can see a bias."""
    unique = round(float((drawn(1) > 0).sum(1).mean()))
    probs_RV = drawn(5)
    order = np.argsort(-teacher_and_student()[0])[:unique]
    kept = np.zeros(VOCAB_SIZE, dtype=bool)
    kept[order] = True
    topk_RV = np.where(kept, probs_RV, 0.0)
    assert z_of_false_alarm(VOCAB_SIZE) * 3 < largest_z(gradients(topk_RV, method), full_gradient())


def test_ghost_token_is_biased_under_sampled_targets():
    """Control of the docstring's claim: with S just below 1 the ghost's random K shifts the expected gradient."""
    probs_RV = drawn(6) * 0.9
    assert z_of_false_alarm(VOCAB_SIZE) * 3 < largest_z(gradients(probs_RV, "ghost_token"), full_gradient())


@pytest.mark.parametrize("method", ["random_sampling", "label_smoothing", "naive_fix"])
def test_the_squares_gradient_is_linear_in_the_target(method):
    """MSE over all ids: the mean over draws is the gradient to the teacher itself."""
    samples_RV = gradients(drawn(7), method, "mse")
    assert z_of_false_alarm(VOCAB_SIZE) > largest_z(samples_RV, full_gradient("mse"))


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_reverse_kl", "jsd", "l1", "total_variation"])
def test_other_divergences_are_biased_under_sampled_targets(divergence):
    """Control of the docstring's claim: with the same draws each of them fails by far."""
    samples_RV = gradients(drawn(7), "random_sampling", divergence)
    assert z_of_false_alarm(VOCAB_SIZE) * 3 < largest_z(samples_RV, full_gradient(divergence))


@pytest.mark.parametrize("source", ["teacher", "records"])
def test_rates_are_unbiased_by_the_teachers_confidence_and_not_by_the_draws(source):
    """Of w (p - t) - w (p - q), with one label easy and another, often, hard, the mean is 0 if w does not follow t."""
    teacher, _ = teacher_and_student()
    probs_RV = drawn(8)
    labels_R = torch.from_numpy(
        np.random.default_rng(9).choice(np.argsort(-teacher)[[0, 4]], REPETITIONS, p=[0.2, 0.8])
    )
    confidence_R = label_confidence(ragged(probs_RV), labels_R)
    if source == "teacher":
        confidence_R = torch.from_numpy(teacher)[labels_R]
    weights_R = easy_hard_weights(confidence_R, labels_R, lr_ratio=8.0)
    samples_RV = gradients(probs_RV, "random_sampling", weights_R=weights_R)
    z = largest_z(samples_RV - weights_R.numpy()[:, None] * full_gradient(), np.zeros(VOCAB_SIZE))
    bound = z_of_false_alarm(VOCAB_SIZE)
    assert z < bound if source == "teacher" else z > 2 * bound
