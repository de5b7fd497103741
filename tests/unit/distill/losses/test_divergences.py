"""
Every divergence of every method against its dense float64 formula, and at temperatures.

Shape letters: P positions, V vocabulary, D hidden size.
"""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from sklformat.distill.losses.divergences import LEAST_REST
from sklformat.distill.losses.kl import (
    DIVERGENCES,
    METHODS,
    DenseTargets,
    DenseTeacher,
    OutputHead,
    linear_sparse_kl,
    sparse_kl,
)
from sklformat.distill.losses.targets import Ragged

REFUSED = [("topk", divergence) for divergence in ("reverse_kl", "forward_reverse_kl", "jsd")]
PAIRS = [pair for pair in itertools.product(METHODS, DIVERGENCES) if pair not in REFUSED]
EXACT = {"rtol": 1e-9, "atol": 1e-12}


def divergence_of(name, q, p, least):
    """The sum over entries of one position, as written in any textbook; ``least`` is what q is at least under a log."""
    if name == "forward_kl":
        return (torch.xlogy(q, q) - torch.where(q > 0, q * p.log(), 0)).sum()
    if name == "reverse_kl":
        return (p * (p.log() - torch.maximum(q, least).log())).sum()
    if name == "forward_reverse_kl":
        return (divergence_of("forward_kl", q, p, least) + divergence_of("reverse_kl", q, p, least)) / 2
    if name == "jsd":
        m = (q + p) / 2
        return (torch.xlogy(q, q) + torch.xlogy(p, p)).sum() / 2 - torch.xlogy(m, m).sum()
    if name == "mse":
        return (q - p).square().sum()
    return (q - p).abs().sum() * (1 if name == "l1" else 0.5)


def target_of(method, ids, t_K, label, V, temperature):
    """[V] the target of one position, and the ids that are one bucket of it."""
    q, outside = torch.zeros(V, dtype=torch.float64), torch.ones(V, dtype=torch.bool)
    q[ids], outside[ids] = t_K, False
    rest = (1 - t_K.sum()).clamp(min=0)
    if method == "topk_normalised":
        q = q.pow(1 / temperature) / q.pow(1 / temperature).sum()
    if method == "label_smoothing":
        q = q + rest / V
    if method == "naive_fix":
        q[label] += rest
        outside[label] = False
    return q, outside


def one_position(method, divergence, x, ids, t_K, label, temperature):
    """T² times the divergence of one position: dense over V, but where a bucket is said to be."""
    p = torch.softmax(x / temperature, 0)
    q, outside = target_of(method, ids, t_K, label, len(x), temperature)
    reverse, zero = divergence in ("reverse_kl", "forward_reverse_kl"), torch.tensor(0.0)
    least = torch.tensor(LEAST_REST, dtype=torch.float64) if reverse else zero
    if method == "label_smoothing":
        q, least = torch.maximum(q, least / len(x)), zero
    elif method == "ghost_token" or reverse:  # of each id outside, the reverse divergence would be infinite
        rest = (1 - t_K.sum()).clamp(min=0) if method == "ghost_token" else zero
        q, p = (torch.cat([each[~outside], last[None]]) for each, last in ((q, rest), (p, p[outside].sum())))
    return temperature**2 * divergence_of(divergence, q, p, least)


def reference(x_PV, targets, labels_P, weights_P, method, divergence, temperature, ce_weight):
    """Weighted mean over positions with records, and its gradient by autograd."""
    x_PV = x_PV.detach().double().requires_grad_()
    total, norm = torch.zeros((), dtype=torch.float64), 0.0
    for i in range(len(x_PV)):
        a, b = int(targets.offsets[i]), int(targets.offsets[i + 1])
        if a == b:
            continue
        label = int(labels_P[i])
        loss = one_position(
            method,
            divergence,
            x_PV[i],
            targets.token_ids[a:b].long(),
            targets.probs[a:b].double(),
            label,
            temperature,
        )
        loss = (1 - ce_weight) * loss + ce_weight * functional.cross_entropy(x_PV[i], torch.tensor(label))
        total, norm = total + float(weights_P[i]) * loss, norm + float(weights_P[i])
    return (total / norm).detach(), torch.autograd.grad(total / norm, x_PV)[0]


def dense_reference(x_PV, q_PV, labels_P, weights_P, divergence, temperature, ce_weight):
    x_PV = x_PV.detach().double().requires_grad_()
    p_PV = torch.softmax(x_PV / temperature, 1)
    rows = zip(q_PV, p_PV, strict=True)
    losses = [temperature**2 * divergence_of(divergence, q, p, torch.tensor(0.0)) for q, p in rows]
    ce_P = functional.cross_entropy(x_PV, labels_P, reduction="none")
    loss = (((1 - ce_weight) * torch.stack(losses) + ce_weight * ce_P) * weights_P).sum() / weights_P.sum()
    return loss.detach(), torch.autograd.grad(loss, x_PV)[0]


def case(seed, method, *, mass=0.9, P=6, V=11):
    """Logits, targets, labels of which half are records, weights; the last position without records."""
    g = torch.Generator().manual_seed(seed)
    x_PV = 2 * torch.randn(P, V, generator=g, dtype=torch.float64)
    labels_P = torch.randint(V, (P,), generator=g)
    weights_P = torch.rand(P, generator=g, dtype=torch.float64) + 0.1
    if method == "full":
        teacher = DenseTeacher(
            torch.randn(P, 4, generator=g, dtype=torch.float64),
            OutputHead(torch.randn(V, 4, generator=g, dtype=torch.float64), softcap=3.0),
        )
        return x_PV, teacher, labels_P, weights_P
    ids, probs = [], []
    for i in range(P - 1):
        k = int(torch.randint(1, V - 2, (), generator=g))
        chosen = torch.randperm(V, generator=g)[:k]
        weights = torch.rand(k, generator=g, dtype=torch.float64) + 0.05
        ids.append(chosen)
        probs.append(mass * weights / weights.sum())
        if i % 2:
            labels_P[i] = chosen[-1]
    offsets = torch.tensor([0, *map(len, ids), 0]).cumsum(0)
    return x_PV, Ragged(torch.cat(ids), torch.cat(probs), offsets), labels_P, weights_P


def found_and_expected(x_PV, targets, labels_P, weights_P, method, divergence, temperature=1.0, ce_weight=0.0):
    settings = {"method": method, "divergence": divergence, "temperature": temperature, "ce_weight": ce_weight}
    x_PV = x_PV.requires_grad_()
    loss = sparse_kl(x_PV, targets, labels_P=labels_P, position_weights_P=weights_P, **settings)
    found = loss.detach(), torch.autograd.grad(loss, x_PV)[0]
    if method == "full":
        q_PV = (
            torch.softmax(targets.head.logits(targets.hidden_PD) / temperature, 1)
            if isinstance(targets, DenseTeacher)
            else targets.probs_PV.pow(1 / temperature)
        )
        q_PV = q_PV / q_PV.sum(1, keepdim=True)
        return found, dense_reference(x_PV, q_PV, labels_P, weights_P, divergence, temperature, ce_weight)
    return found, reference(x_PV, targets, labels_P, weights_P, method, divergence, temperature, ce_weight)


@pytest.mark.parametrize(("method", "divergence"), PAIRS)
@settings(max_examples=6, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    temperature=st.sampled_from([1.0, 0.5, 3.0]),
    ce_weight=st.sampled_from([0.0, 0.3]),
    mass=st.sampled_from([0.9, 0.25, 1.0]),
)
def test_each_divergence_is_its_dense_formula(method, divergence, seed, temperature, ce_weight, mass):
    """Value and gradient, with position weights, cross-entropy at temperature 1, and a rest of any size or none."""
    made = case(seed, method, mass=mass)
    found, expected = found_and_expected(*made, method, divergence, temperature, ce_weight)
    torch.testing.assert_close(found, expected, **EXACT)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_given_probabilities_are_a_teachers(divergence):
    """Method "full" from probabilities, tempered, equals the formula of the teacher's logits over the temperature."""
    x_PV, teacher, labels_P, weights_P = case(3, "full")
    targets = DenseTargets(torch.softmax(teacher.head.logits(teacher.hidden_PD), 1))
    found, expected = found_and_expected(x_PV, targets, labels_P, weights_P, "full", divergence, 2.0, 0.2)
    torch.testing.assert_close(found, expected, **EXACT)


@pytest.mark.parametrize(("method", "divergence"), PAIRS)
def test_bent_heads_in_chunks(method, divergence):
    """Through bias, scale and cap: the derivative by differences, and the value of the whole logits; T = 2 with CE."""
    _, targets, labels_P, weights_P = case(4, method)
    g = torch.Generator().manual_seed(5)
    shapes = (6, 3), (11, 3), (11,)
    inputs = [torch.randn(*shape, generator=g, dtype=torch.float64, requires_grad=True) for shape in shapes]
    args = {"method": method, "divergence": divergence, "temperature": 2.0, "ce_weight": 0.1}
    args |= {"labels_P": labels_P, "position_weights_P": weights_P}

    def loss(hidden_PD, weight_VD, bias_V):
        head = OutputHead(weight_VD, bias_V, softcap=3.0, scale=0.7)
        return linear_sparse_kl(hidden_PD, head, targets, chunk_positions=4, **args)

    assert torch.autograd.gradcheck(loss, inputs, fast_mode=True)
    hidden_PD, weight_VD, bias_V = (each.detach() for each in inputs)
    whole = sparse_kl(OutputHead(weight_VD, bias_V, softcap=3.0, scale=0.7).logits(hidden_PD), targets, **args)
    torch.testing.assert_close(loss(*inputs).detach(), whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("method", "divergence"), PAIRS)
def test_low_precision(method, divergence, dtype):
    """In float32 to its rounding; of bfloat16 logits the gradient to that of its own type."""
    x_PV, targets, labels_P, weights_P = case(6, method, mass=0.5)
    if method == "full":
        targets = DenseTargets(torch.softmax(targets.head.logits(targets.hidden_PD), 1))
    low = x_PV.to(dtype).requires_grad_()
    args = {"method": method, "divergence": divergence, "temperature": 1.5}
    args |= {"labels_P": labels_P, "position_weights_P": weights_P}
    exact = low.detach().double().requires_grad_()
    expected = sparse_kl(exact, targets, **args)
    found = sparse_kl(low, targets, **args)
    for loss in (found, expected):
        loss.backward()
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    bound = 2e-6 if dtype == torch.float32 else 2**-7  # rounded where it is kept, and once more scaled
    assert float((low.grad.double() - exact.grad).norm()) <= bound * float(exact.grad.norm())


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("method", ["random_sampling", "ghost_token", "full"])
def test_ids_that_both_mask_add_nothing(method, divergence):
    """A logit of minus infinity under a target of 0: value and gradient are those of the other ids alone."""
    x_PV, targets, labels_P, _ = case(8, method)
    wider = torch.cat([x_PV, torch.full((6, 2), -torch.inf, dtype=torch.float64)], 1)
    more = targets
    if method == "full":
        targets = DenseTargets(torch.softmax(targets.head.logits(targets.hidden_PD), 1))
        more = DenseTargets(torch.cat([targets.probs_PV, torch.zeros(6, 2, dtype=torch.float64)], 1))
    args = {"method": method, "divergence": divergence, "temperature": 2.0, "labels_P": labels_P, "ce_weight": 0.3}
    found, expected = [], []
    for logits, dense, kept in ((x_PV, targets, expected), (wider, more, found)):
        leaf = logits.detach().requires_grad_()
        loss = sparse_kl(leaf, dense, **args)
        kept += [loss.detach(), *torch.autograd.grad(loss, leaf)]
    assert float(found[1][:, 11:].abs().max()) < 1e-300
    torch.testing.assert_close([found[0], found[1][:, :11]], expected, **EXACT)


@pytest.mark.parametrize("method", ["random_sampling", "label_smoothing", "full"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_student_may_be_far_from_the_label(method, divergence):
    """Cross-entropy and the forward part say how far, also where the probability is no number of float32."""
    x_1V = torch.tensor([[0.0, -250.0, -1e4, 0.0]], dtype=torch.float64)
    given = torch.tensor([[0.25, 0.25, 0.25, 0.25]], dtype=torch.float64)
    targets = DenseTargets(given) if method == "full" else Ragged(torch.arange(4), given[0], torch.tensor([0, 4]))
    args = {"method": method, "divergence": divergence, "labels_P": torch.tensor([2]), "ce_weight": 0.5}
    loss, exact = sparse_kl(x_1V.float(), targets, **args), sparse_kl(x_1V, targets, **args)
    forward = {"forward_kl": 1.0, "forward_reverse_kl": 0.5}.get(divergence, 0.0)
    by_hand = torch.tensor(1e4 / 2 + forward * 10250 / 8, dtype=torch.float64)
    torch.testing.assert_close(exact, by_hand, rtol=2e-2, atol=0)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=0)


def test_a_reverse_divergence_of_draws_is_finite():
    """Where the records are all of the target, the rest counts as 1e-6, and a tiny record as itself."""
    x_1V = torch.log(torch.tensor([[0.5, 0.25, 0.2, 0.05]], dtype=torch.float64))
    targets = Ragged(torch.tensor([0, 1]), torch.tensor([1 - 1e-9, 1e-9], dtype=torch.float64), torch.tensor([0, 2]))
    expected = 0.5 * torch.tensor(0.5).log() + 0.25 * torch.log(torch.tensor(0.25 / 1e-9))
    expected = expected + 0.25 * torch.log(torch.tensor(0.25 / 1e-6))
    for method in ("random_sampling", "topk_normalised", "ghost_token"):
        found = sparse_kl(x_1V, targets, method=method, divergence="reverse_kl")
        torch.testing.assert_close(found, expected.double(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_perfect_student_has_no_loss(divergence):
    """At p = q each is 0 in float32, without gradient where it is smooth; far from it the bounded ones are bounded."""
    x_PV, _, _, _ = case(9, "topk")
    targets = DenseTargets(torch.softmax(x_PV, 1))
    leaf = x_PV.detach().float().requires_grad_()
    loss = sparse_kl(leaf, targets, method="full", divergence=divergence)
    loss.backward()
    assert abs(float(loss.detach())) < 1e-6
    assert divergence in ("l1", "total_variation") or float(leaf.grad.abs().max()) < 1e-6
    far = float(sparse_kl(-5 * x_PV, targets, method="full", divergence=divergence))
    bounds = {"jsd": 0.6932, "total_variation": 1.0, "mse": 2.0, "l1": 2.0}
    assert 0.2 < far < bounds.get(divergence, 100.0)


def test_names_that_do_not_go_together():
    x_PV, targets, _, _ = case(10, "topk")
    for method, divergence in REFUSED:
        with pytest.raises(ValueError, match=f"'{divergence}' with method 'topk': its targets leave 1 - S to no id"):
            sparse_kl(x_PV, targets, method=method, divergence=divergence)
    with pytest.raises(ValueError, match="divergence 'kl' is unknown; one of forward_kl, reverse_kl"):
        sparse_kl(x_PV, targets, divergence="kl")
    for temperature in (0.0, -1.0, torch.inf, torch.nan):
        with pytest.raises(
            ValueError, match=f"temperature is {temperature}; logits are divided by it: above 0, and finite"
        ):
            sparse_kl(x_PV, targets, temperature=temperature)
