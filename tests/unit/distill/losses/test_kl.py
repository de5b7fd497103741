"""
Values and gradients of the losses against dense float64 formulas written straight from the paper.

Shape letters: P positions, V vocabulary, D hidden size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from sklformat.distill.losses import operators
from sklformat.distill.losses.kl import METHODS, DenseTargets, DenseTeacher, OutputHead, linear_sparse_kl, sparse_kl
from sklformat.distill.losses.operators import linear_sparse_kl_operator, parts_of, sparse_kl_operator

SPARSE_METHODS = [method for method in METHODS if method != "full"]


@dataclass
class Ragged:
    token_ids: Tensor
    probs: Tensor
    offsets: Tensor


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_case(num_positions: int, vocab_size: int, *, seed: int = 0, empty: bool = True, normalised: bool = False):
    """Logits, Top-K-like targets (S < 1 unless normalised) with empty positions, and labels, some inside K."""
    g = generator(seed)
    logits_PV = 3 * torch.randn(num_positions, vocab_size, generator=g, dtype=torch.float64)
    ids, probs, lengths, labels = [], [], [], []
    for position in range(num_positions):
        most = min(vocab_size - 1, 12)
        k = 0 if empty and position % 4 == 3 else int(torch.randint(1, most + 1, (), generator=g))
        chosen = torch.randperm(vocab_size, generator=g)[:k]
        weights = torch.rand(k, generator=g) + 0.01
        mass = 1.0 if normalised else 0.9
        ids.append(chosen)
        probs.append((mass * weights / weights.sum()).float() if k else weights)
        lengths.append(k)
        inside = k > 0 and position % 2 == 0
        labels.append(int(chosen[-1]) if inside else int(torch.randint(vocab_size, (), generator=g)))
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    targets = Ragged(torch.cat(ids).to(torch.int32), torch.cat(probs), offsets)
    return logits_PV, targets, torch.tensor(labels)


def one_position_loss(x: Tensor, ids: Tensor, t_K: Tensor, method: str, label: int | None) -> Tensor:
    """The paper's formula for one position, dense: sum over v of t_v log(t_v / p_v), 0 log 0 = 0 (Eq. 3)."""
    p = torch.softmax(x, 0)
    t = torch.zeros_like(x)
    t[ids] = t_K
    residual = 1 - t.sum()
    if method == "topk_normalised":
        t = t / t.sum()
    if method == "label_smoothing":
        t = t + residual / len(x)
    if method == "naive_fix":
        t = t + residual * functional.one_hot(torch.tensor(label), len(x))
    used = t > 0
    loss = (t[used] * (t[used].log() - torch.log_softmax(x, 0)[used])).sum()
    if method == "ghost_token":
        outside = torch.ones_like(x, dtype=torch.bool)
        outside[ids] = False
        loss = loss + residual * (residual / p[outside].sum()).log()
    return loss


def reference(logits_PV, targets, method, labels_P, ce_weight=0.0, weights_P=None):
    """Mean over positions that count, and its gradient by autograd, in float64."""
    x_PV = logits_PV.detach().double().requires_grad_()
    total, norm = torch.zeros((), dtype=torch.float64), 0.0
    for i in range(len(x_PV)):
        a, b = int(targets.offsets[i]), int(targets.offsets[i + 1])
        label = int(labels_P[i])
        if a == b or (label == -100 and (ce_weight > 0 or method == "naive_fix")):
            continue
        loss = one_position_loss(x_PV[i], targets.token_ids[a:b].long(), targets.probs[a:b].double(), method, label)
        if ce_weight > 0:
            loss = (1 - ce_weight) * loss - ce_weight * torch.log_softmax(x_PV[i], 0)[label]
        weight = 1.0 if weights_P is None else float(weights_P[i])
        total, norm = total + weight * loss, norm + weight
    value = total / norm
    (grad_PV,) = torch.autograd.grad(value, x_PV)
    return value.detach(), grad_PV


def value_and_grads(loss: Tensor, *inputs: Tensor):
    return loss.detach(), *torch.autograd.grad(loss, inputs)


# bfloat16 keeps 8 bits: 2^-8 of each entry's own size, plus the same of the largest one for what autograd rescales.
TOLERANCES = {
    torch.float64: {"rtol": 1e-12, "atol": 1e-14},
    torch.float32: {"rtol": 2e-5, "atol": 2e-7},
    torch.bfloat16: {"rtol": 2**-7, "atol": 1e-6},
    torch.float16: {"rtol": 2**-10, "atol": 1e-6},
}


@pytest.mark.parametrize("ce_weight", [0.0, 0.3])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize(("num_positions", "vocab_size"), [(1, 7), (9, 7), (6, 253)])
@pytest.mark.parametrize("method", SPARSE_METHODS)
def test_sparse_methods_match_the_paper(method, num_positions, vocab_size, dtype, ce_weight):
    """Value and gradient equal the dense formula at the logits as rounded, for each method, type and odd shape."""
    logits_PV, targets, labels_P = make_case(num_positions, vocab_size)
    x_PV = logits_PV.to(dtype).requires_grad_()
    expected = reference(x_PV, targets, method, labels_P, ce_weight)
    loss = sparse_kl(x_PV, targets, method=method, labels_P=labels_P, ce_weight=ce_weight)
    value, grad_PV = value_and_grads(loss, x_PV)
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    assert exact == value.dtype
    torch.testing.assert_close(
        value.double(),
        expected[0],
        rtol=TOLERANCES[exact]["rtol"],
        atol=1e-6 if exact != dtype or exact == torch.float32 else 1e-13,
    )
    torch.testing.assert_close(grad_PV.double(), expected[1], **TOLERANCES[dtype])
    empty_P = targets.offsets.diff() == 0
    assert not grad_PV[empty_P].any(), "a position without records has exactly no gradient"


@pytest.mark.parametrize("ce_weight", [0.0, 0.3])
@pytest.mark.parametrize("method", SPARSE_METHODS)
def test_gradcheck(method, ce_weight):
    """The closed-form gradients are the derivatives of the values, for logits, hidden states and weight."""
    logits_PV, targets, labels_P = make_case(5, 7)
    weights_P = torch.tensor([1.0, 0.5, 0.0, 2.0, 0.25])
    args = {"method": method, "labels_P": labels_P, "ce_weight": ce_weight, "position_weights_P": weights_P}
    assert torch.autograd.gradcheck(lambda x: sparse_kl(x, targets, **args), logits_PV.requires_grad_())
    g = generator(1)
    hidden_PD = torch.randn(5, 3, generator=g, dtype=torch.float64, requires_grad=True)
    weight_VD = torch.randn(7, 3, generator=g, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda h, w: linear_sparse_kl(h, w, targets, chunk_positions=2, **args), (hidden_PD, weight_VD)
    )


@pytest.mark.parametrize("ce_weight", [0.0, 0.3])
@pytest.mark.parametrize("given", ["targets", "teacher"])
def test_full_is_the_dense_divergence(given, ce_weight):
    """Method "full" is torch's kl_div of the whole distributions, from probabilities or from the teacher's layer."""
    g = generator(2)
    P, V, D = 6, 253, 5
    x_PV = torch.randn(P, V, generator=g, dtype=torch.float64, requires_grad=True)
    teacher = DenseTeacher(
        torch.randn(P, D, generator=g, dtype=torch.float64), torch.randn(V, D, generator=g, dtype=torch.float64)
    )
    labels_P = torch.randint(V, (P,), generator=g)
    logt_PV = torch.log_softmax(teacher.hidden_PD @ teacher.head.T, 1)
    kl = functional.kl_div(torch.log_softmax(x_PV, 1), logt_PV, log_target=True, reduction="batchmean")
    expected = value_and_grads((1 - ce_weight) * kl + ce_weight * functional.cross_entropy(x_PV, labels_P), x_PV)
    targets = teacher if given == "teacher" else DenseTargets(logt_PV.exp())
    args = {"method": "full", "labels_P": labels_P, "ce_weight": ce_weight}
    actual = value_and_grads(sparse_kl(x_PV, targets, **args), x_PV)
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-14)
    assert torch.autograd.gradcheck(
        lambda x: sparse_kl(x, targets, **args), x_PV[:, :].detach().requires_grad_(), fast_mode=True
    )


def test_full_leaves_out_vocabulary_that_neither_model_has():
    """Padding ids with a logit of minus infinity and a target of 0 add nothing, rather than NaN."""
    x_PV = torch.tensor([[0.5, -1.0, -math.inf]], requires_grad=True)
    t_PV = torch.tensor([[0.25, 0.75, 0.0]])
    expected = value_and_grads(
        functional.kl_div(torch.log_softmax(x_PV[:, :2], 1), t_PV[:, :2], reduction="batchmean"), x_PV
    )
    torch.testing.assert_close(value_and_grads(sparse_kl(x_PV, DenseTargets(t_PV), method="full"), x_PV), expected)


def test_topk_optimum_is_the_scaled_teacher():
    """The gradient of unnormalised Top-K vanishes at p = t / S on K and 0 elsewhere, and the loss is negative (A.4)."""
    t_K = torch.tensor([0.5, 0.2, 0.1])
    targets = Ragged(torch.tensor([4, 0, 2]), t_K, torch.tensor([0, 3]))
    x_PV = torch.full((1, 7), -1e4, dtype=torch.float64)
    x_PV[0, targets.token_ids] = (t_K.double() / t_K.double().sum()).log()
    value, grad_PV = value_and_grads(sparse_kl(x_PV.requires_grad_(), targets, method="topk"), x_PV)
    torch.testing.assert_close(grad_PV, torch.zeros(1, 7, dtype=torch.float64), rtol=0, atol=1e-15)
    assert value < 0
    torch.testing.assert_close(value, t_K.double().sum() * t_K.double().sum().log())


def test_ghost_token_gradient_is_the_papers():
    """p - t on K, as in full distillation; outside, p times sum_K(t - p) / (1 - sum_K p) (A.5)."""
    logits_PV, targets, _ = make_case(1, 253)
    x_PV = logits_PV.requires_grad_()
    _, grad_PV = value_and_grads(sparse_kl(x_PV, targets, method="ghost_token"), x_PV)
    p, ids, t = torch.softmax(logits_PV[0].detach(), 0), targets.token_ids.long(), targets.probs.double()
    expected = p * (t - p[ids]).sum() / (1 - p[ids].sum())
    expected[ids] = p[ids] - t
    torch.testing.assert_close(grad_PV[0], expected, rtol=1e-12, atol=1e-15)


def test_ghost_token_keeps_its_precision_where_the_student_has_almost_no_tail():
    """With 1e-9 of the student's mass outside K, float32 still pushes the tail up by the residual's full weight."""
    x_PV = torch.full((1, 50), -25.0)
    x_PV[0, 3] = 0.0
    targets = Ragged(torch.tensor([3]), torch.tensor([0.9]), torch.tensor([0, 1]))
    expected = reference(x_PV, targets, "ghost_token", torch.tensor([0]))
    actual = value_and_grads(sparse_kl(x_PV.requires_grad_(), targets, method="ghost_token"), x_PV)
    torch.testing.assert_close(actual[0].double(), expected[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(actual[1].double(), expected[1], rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("method", SPARSE_METHODS)
def test_ce_weight_one_is_cross_entropy(method):
    """With all weight on CE every method is torch's cross_entropy, ignored labels included."""
    logits_PV, targets, labels_P = make_case(8, 253, empty=False)
    labels_P[2] = -100
    x_PV = logits_PV.requires_grad_()
    expected = value_and_grads(functional.cross_entropy(x_PV, labels_P), x_PV)
    loss = sparse_kl(x_PV, targets, method=method, labels_P=labels_P, ce_weight=1.0)
    torch.testing.assert_close(value_and_grads(loss, x_PV), expected, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("method", SPARSE_METHODS)
def test_records_that_are_the_label_alone_give_cross_entropy(method):
    """One record, the label with probability 1, is cross-entropy for each method, whatever the CE weight."""
    logits_PV, _, labels_P = make_case(6, 253)
    targets = Ragged(labels_P, torch.ones(6), torch.arange(7))
    x_PV = logits_PV.requires_grad_()
    expected = value_and_grads(functional.cross_entropy(x_PV, labels_P), x_PV)
    loss = sparse_kl(x_PV, targets, method=method, labels_P=labels_P, ce_weight=0.25)
    torch.testing.assert_close(value_and_grads(loss, x_PV), expected, rtol=1e-11, atol=1e-14)


def test_a_student_equal_to_the_teacher_has_no_loss_and_no_gradient():
    """At p = t, differences are formed before rounding: the float32 gradient is a few rounding errors, not 1e-3."""
    x_PV = torch.randn(4, 12, generator=generator(4)).bfloat16().requires_grad_()
    probs = torch.softmax(x_PV.detach().float(), 1).flatten()
    targets = Ragged(torch.arange(12).repeat(4), probs, 12 * torch.arange(5))
    value, grad_PV = value_and_grads(sparse_kl(x_PV, targets), x_PV)
    assert abs(float(value)) < 1e-6
    assert float(grad_PV.abs().max()) < 1e-7


@pytest.mark.parametrize("method", SPARSE_METHODS)
def test_position_weights_give_the_weighted_mean(method):
    """The result is sum(w L) / sum(w) over positions that count; weight 0 takes a position out."""
    logits_PV, targets, labels_P = make_case(9, 31)
    labels_P[4] = -100
    weights_P = torch.rand(9, generator=generator(3)) * (torch.arange(9) != 1)
    expected = reference(logits_PV, targets, method, labels_P, 0.1, weights_P)
    x_PV = logits_PV.requires_grad_()
    loss = sparse_kl(x_PV, targets, method=method, labels_P=labels_P, ce_weight=0.1, position_weights_P=weights_P)
    actual = value_and_grads(loss, x_PV)
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-14)
    assert not actual[1][[1, 3, 4]].any()


def linear_case(dtype=torch.float64, P=21, V=253, D=6, seed=5):
    _, targets, labels_P = make_case(P, V, seed=seed)
    g = generator(seed)
    hidden_PD = torch.randn(P, D, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    weight_VD = torch.randn(V, D, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    return hidden_PD, weight_VD, targets, labels_P


@pytest.mark.parametrize("chunk_positions", [None, 1, 4, 20, 21, 1000])
@pytest.mark.parametrize("method", METHODS)
def test_linear_equals_sparse_kl_of_the_product(method, chunk_positions):
    """Chunking changes no more than the order of sums: value and both gradients, any chunk, blocks cut or not."""
    hidden_PD, weight_VD, targets, labels_P = linear_case()
    if method == "full":
        g = generator(6)
        targets = DenseTeacher(
            torch.randn(21, 4, generator=g, dtype=torch.float64), torch.randn(253, 4, generator=g, dtype=torch.float64)
        )
    args = {"method": method, "labels_P": labels_P, "ce_weight": 0.2}
    expected = value_and_grads(sparse_kl(hidden_PD @ weight_VD.T, targets, **args), hidden_PD, weight_VD)
    loss = linear_sparse_kl(hidden_PD, weight_VD, targets, chunk_positions=chunk_positions, **args)
    torch.testing.assert_close(value_and_grads(loss, hidden_PD, weight_VD), expected, rtol=1e-12, atol=1e-15)


def test_blocks_smaller_than_a_chunk_change_nothing(monkeypatch):
    """The cache-sized blocks inside a chunk change no more than the order of sums."""
    hidden_PD, weight_VD, targets, _ = linear_case(torch.float32)
    results = []
    for elements in (1, 253 * 4, 1 << 21):
        monkeypatch.setattr("sklformat.distill.losses.rows.BLOCK_ELEMENTS_CPU", elements)
        results.append(value_and_grads(linear_sparse_kl(hidden_PD, weight_VD, targets), hidden_PD, weight_VD))
    for other in results[1:]:
        torch.testing.assert_close(other[0], results[0][0], rtol=1e-6, atol=0)
        torch.testing.assert_close(other[1:], results[0][1:], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_linear_in_low_precision(dtype):
    """Gradients keep the parameters' types and stay within the type's rounding of the float64 result."""
    hidden_PD, weight_VD, targets, _ = linear_case(dtype)
    h64, w64 = hidden_PD.detach().double().requires_grad_(), weight_VD.detach().double().requires_grad_()
    expected = value_and_grads(linear_sparse_kl(h64, w64, targets), h64, w64)
    actual = value_and_grads(linear_sparse_kl(hidden_PD, weight_VD, targets, chunk_positions=8), hidden_PD, weight_VD)
    assert (torch.float32, dtype, dtype) == tuple(t.dtype for t in actual)
    # Logits themselves are rounded in half precision: an error of 2^-8 of their size (about 8) in bfloat16.
    bound = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    for ours, exact in zip(actual, expected, strict=True):
        assert float((ours.double() - exact).norm() / exact.norm()) < bound


@pytest.fixture
def unwritten_is_nan():
    """Memory that nobody has written holds no numbers."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("chunk_positions", [8, 100])
@pytest.mark.parametrize("accumulate", ["float32", "weight"])
def test_the_first_chunk_writes_over_what_is_there(unwritten_is_nan, dtype, chunk_positions, accumulate):
    """No gradient's memory is filled with zeros first; those of no position at all are zeros."""
    assert torch.empty(1).isnan()
    hidden_PD, weight_VD, targets, _ = linear_case(dtype)
    bias_V = torch.randn(253, generator=generator(8)).requires_grad_()
    for positions in (21, 0):
        end = int(targets.offsets[positions])
        some = Ragged(targets.token_ids[:end], targets.probs[:end], targets.offsets[: positions + 1])
        head = OutputHead(weight_VD, bias_V)
        loss = linear_sparse_kl(
            hidden_PD[:positions], head, some, chunk_positions=chunk_positions, accumulate=accumulate
        )
        _, *grads = value_and_grads(loss, hidden_PD, weight_VD, bias_V)
        assert all(grad.isfinite().all() and bool(grad.any()) == (positions > 0) for grad in grads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_weights_gradient_is_summed_where_it_stays(dtype, monkeypatch):
    """With accumulate="weight" it is of the weight's type from the first chunk on, in one tensor; then once only."""
    hidden_PD, weight_VD, targets, _ = linear_case(dtype)
    sums, real = [], operators._add_product
    monkeypatch.setattr(operators, "_add_product", lambda to, *rest, **own: sums.append(to) or real(to, *rest, **own))
    by_float32 = linear_sparse_kl(hidden_PD, weight_VD, targets, chunk_positions=8)
    expected = value_and_grads(by_float32, hidden_PD, weight_VD)
    assert {torch.float32} == {to.dtype for to in sums}
    sums.clear()
    hidden_PD.grad = weight_VD.grad = None
    loss = linear_sparse_kl(hidden_PD, weight_VD, targets, chunk_positions=8, accumulate="weight") * 3
    loss.backward(retain_graph=True)
    assert {dtype} == {to.dtype for to in sums}
    assert weight_VD.grad.data_ptr() == sums[0].data_ptr()
    for ours, wanted in zip((hidden_PD.grad, weight_VD.grad), expected[1:], strict=True):
        assert (ours - 3 * wanted).norm() <= {torch.float32: 1e-6, torch.bfloat16: 2e-2}[dtype] * (3 * wanted).norm()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_ways_to_sum_that_there_are_not():
    hidden_PD, weight_VD, targets, _ = linear_case(torch.float16)
    with pytest.raises(ValueError, match="accumulate='weight' of a float16 weight: sums over positions pass 65504"):
        linear_sparse_kl(hidden_PD, weight_VD, targets, accumulate="weight")
    with pytest.raises(ValueError, match="accumulate is 'bfloat16'; one of 'float32', 'weight'"):
        linear_sparse_kl(hidden_PD, weight_VD, targets, accumulate="bfloat16")


def test_autocast_takes_its_type_and_returns_the_parameters_types():
    """Under autocast float32 parameters meet bfloat16 products; gradients come back in float32, the loss too."""
    hidden_PD, weight_VD, targets, labels_P = linear_case(torch.float32)
    exact = value_and_grads(linear_sparse_kl(hidden_PD, weight_VD, targets), hidden_PD, weight_VD)
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_sparse_kl(hidden_PD.bfloat16(), weight_VD, targets, chunk_positions=8)
        teacher = DenseTeacher(hidden_PD.bfloat16(), weight_VD)
        full = linear_sparse_kl(hidden_PD, weight_VD, teacher, method="full", labels_P=labels_P)
    actual = value_and_grads(loss, hidden_PD, weight_VD)
    assert [torch.float32] * 3 == [t.dtype for t in actual]
    for ours, wanted in zip(actual, exact, strict=True):
        assert float((ours - wanted).norm() / wanted.norm()) < 2e-2
    assert abs(float(full.detach())) < 1e-4, "a student that is its own teacher"


def test_tied_weight_collects_both_gradients():
    """An embedding used as output layer gets the sum of both paths' gradients."""
    _, weight_VD, targets, _ = linear_case()
    ids_P = torch.randint(253, (21,), generator=generator(7))
    hidden_PD = torch.tanh(weight_VD[ids_P])
    expected = torch.autograd.grad(sparse_kl(hidden_PD @ weight_VD.T, targets), weight_VD)
    actual = torch.autograd.grad(linear_sparse_kl(torch.tanh(weight_VD[ids_P]), weight_VD, targets), weight_VD)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_a_frozen_input_gets_no_gradient_and_changes_no_other(frozen):
    """requires_grad=False of one side leaves the other's gradient as it was."""
    hidden_PD, weight_VD, targets, _ = linear_case()
    full = value_and_grads(linear_sparse_kl(hidden_PD, weight_VD, targets), hidden_PD, weight_VD)
    (weight_VD if frozen == "weight" else hidden_PD).requires_grad_(False)
    kept = hidden_PD if frozen == "weight" else weight_VD
    actual = value_and_grads(linear_sparse_kl(hidden_PD, weight_VD, targets), kept)
    torch.testing.assert_close(actual, (full[0], full[1 if frozen == "weight" else 2]), rtol=0, atol=0)


def test_upstream_gradient_scales_and_graph_may_be_kept():
    """Backward multiplies by the upstream scalar, and a kept graph gives the same gradient again."""
    hidden_PD, weight_VD, targets, _ = linear_case()
    loss = linear_sparse_kl(hidden_PD, weight_VD, targets)
    once = torch.autograd.grad(loss, (hidden_PD, weight_VD), retain_graph=True)
    thrice = torch.autograd.grad(3 * loss, (hidden_PD, weight_VD))
    torch.testing.assert_close(thrice, tuple(3 * g for g in once), rtol=1e-14, atol=0)


def test_no_gradient_is_computed_where_none_is_wanted():
    """Under no_grad the value is the same and nothing of the gradient's size is made."""
    hidden_PD, weight_VD, targets, _ = linear_case()
    expected = linear_sparse_kl(hidden_PD, weight_VD, targets).detach()
    with torch.no_grad(), LargestAllocation() as largest:
        actual = linear_sparse_kl(hidden_PD, weight_VD, targets, chunk_positions=2)
    torch.testing.assert_close(actual, expected)
    assert not actual.requires_grad
    assert largest.elements < weight_VD.numel()


@pytest.mark.parametrize("name", ["sparse_kl", "linear_sparse_kl"])
def test_second_derivative_is_refused(name):
    """Differentiating the gradient raises, rather than taking it for a constant."""
    hidden_PD, weight_VD, targets, _ = linear_case()
    if name == "sparse_kl":
        loss = sparse_kl(hidden_PD @ weight_VD.T, targets)
    else:
        loss = linear_sparse_kl(hidden_PD, weight_VD, targets)
    (grad_PD,) = torch.autograd.grad(loss, hidden_PD, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        grad_PD.sum().backward()


def test_the_weight_gradient_does_not_stall_over_many_chunks():
    """1024 equal bfloat16 contributions add up to 1024 of them; a bfloat16 sum would stop growing at about 256."""
    P = 1024
    targets = Ragged(torch.zeros(P, dtype=torch.int32), torch.ones(P), torch.arange(P + 1))
    hidden_PD = torch.ones(P, 1, dtype=torch.bfloat16)
    weight_VD = torch.zeros(4, 1, dtype=torch.bfloat16, requires_grad=True)
    loss = linear_sparse_kl(hidden_PD, weight_VD, targets, chunk_positions=1)
    expected = torch.tensor([[-0.75], [0.25], [0.25], [0.25]], dtype=torch.bfloat16)
    torch.testing.assert_close(torch.autograd.grad(loss, weight_VD)[0], expected, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("far", "mass"), [(0.0, 0.4), (-math.inf, 0.4), (0.0, 1.0)])
def test_a_tail_that_underflows_gives_the_ghost_token_no_nan(far, mass, dtype):
    """One over a rest that is too small for the type is no number, and 0 times that no gradient."""
    x_PV = torch.full((1, 12), far, dtype=dtype)
    x_PV[0, :8] = 1000.0
    targets = Ragged(torch.arange(8), torch.full((8,), mass / 8), torch.tensor([0, 8]))
    loss = sparse_kl(
        x_PV.requires_grad_(), targets, method="ghost_token", position_weights_P=torch.tensor([30.0]), normaliser=30.0
    )
    value, grad_PV = value_and_grads(loss, x_PV)
    assert value.isfinite()
    expected = torch.tensor([(1 - mass) / 8] * 8 + [0.0] * 4, dtype=torch.float64)
    torch.testing.assert_close(grad_PV[0].double(), expected, rtol=0.01, atol=0)


@pytest.mark.parametrize("method", SPARSE_METHODS)
def test_masked_ids_give_no_nan(method):
    """An id with a logit of minus infinity outside the records takes nothing and breaks nothing where S = 1."""
    x_PV = torch.tensor([[0.5, -1.0, 2.0, -math.inf]], requires_grad=True)
    targets = Ragged(torch.tensor([0, 1]), torch.tensor([0.25, 0.75]), torch.tensor([0, 2]))
    expected = value_and_grads(
        functional.kl_div(torch.log_softmax(x_PV[:, :3], 1), torch.tensor([[0.25, 0.75, 0.0]]), reduction="batchmean"),
        x_PV,
    )
    loss = sparse_kl(x_PV, targets, method=method, labels_P=torch.tensor([3]))
    value, grad_PV = value_and_grads(loss, x_PV)
    torch.testing.assert_close(value, expected[0])
    if method != "ghost_token":
        torch.testing.assert_close(grad_PV, expected[1])
    assert grad_PV.isfinite().all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_an_accelerator_gives_the_same(method, dtype):
    """Value and gradients on a CUDA device equal the CPU's within the type's rounding, offsets on either side."""
    hidden_PD, weight_VD, targets, labels_P = linear_case(dtype)
    args = {"method": method, "ce_weight": 0.2, "chunk_positions": 8}
    if method == "full":
        targets = DenseTeacher(0.5 * hidden_PD.detach(), weight_VD.detach())
        moved = DenseTeacher(targets.hidden_PD.cuda(), targets.head.cuda())
    else:
        moved = replace(targets, token_ids=targets.token_ids.cuda(), probs=targets.probs.cuda())
    expected = value_and_grads(
        linear_sparse_kl(hidden_PD, weight_VD, targets, labels_P=labels_P, **args), hidden_PD, weight_VD
    )
    h, w = (t.detach().cuda().requires_grad_() for t in (hidden_PD, weight_VD))
    bound = {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 2e-2}[dtype]
    actual = value_and_grads(linear_sparse_kl(h, w, moved, labels_P=labels_P.cuda(), **args), h, w)
    for ours, wanted in zip(actual, expected, strict=True):
        assert float((ours.cpu().double() - wanted.double()).norm() / wanted.double().norm()) < bound


OPERATORS = {each._opoverload: each for each in (sparse_kl_operator, linear_sparse_kl_operator)}


class LargestAllocation(TorchDispatchMode):
    """Elements of each new storage that any operation returns, inside of the losses too, and of the largest."""

    def __init__(self):
        super().__init__()
        self.sizes = [0]

    @property
    def elements(self):
        return max(self.sizes)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if (ours := OPERATORS.get(func)) is not None:
            with self:
                return ours._init_fn(*args, **(kwargs or {}))
        out = func(*args, **(kwargs or {}))
        known = {t.untyped_storage().data_ptr() for t in (*args, *(kwargs or {}).values()) if isinstance(t, Tensor)}
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in known:
                self.sizes.append(tensor.untyped_storage().nbytes() // tensor.itemsize)
        return out


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_linear_never_holds_all_logits(method, dtype):
    """The largest tensor made, forward and backward, is one chunk's logits or the weight's gradient, never [P, V]."""
    P, V, D, chunk = 640, 1009, 2, 16
    hidden_PD, weight_VD, targets, labels_P = linear_case(dtype, P, V, D)
    if method == "full":
        targets = DenseTeacher(hidden_PD.detach(), weight_VD.detach())
    with LargestAllocation() as largest:
        linear_sparse_kl(
            hidden_PD, weight_VD, targets, method=method, labels_P=labels_P, ce_weight=0.1, chunk_positions=chunk
        ).backward()
    expected = max(chunk * V, V * D)
    assert expected == largest.elements
    with LargestAllocation() as control:
        sparse_kl(hidden_PD @ weight_VD.T, targets, method=method, labels_P=labels_P).backward()
    whole = P * V
    assert whole == control.elements


# What of a head learns, and how many tensors of the weight's size there are at a step: of the weight its gradient, in
# float32 and in its own type, and of an adapter the weight that has it as more columns.
LEARNING = {
    ("weight", "bias"): 2,
    ("weight", "adapter"): 3,
    ("adapter",): 1,
    ("bias",): 0,
    (): 0,
}


@pytest.mark.parametrize("learning", LEARNING, ids="+".join)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_frozen_takes_no_room(dtype, learning):
    """A weight that does not learn has no gradient made of its size, neither alone nor under an adapter."""
    P, V, D, K = 8, 1009, 40, 2
    hidden_PD, weight_VD, targets, _ = linear_case(dtype, P, V, D)
    weight_VD = weight_VD.detach()
    g = generator(8)
    bias_V, down_KD, up_VK = (torch.randn(*shape, generator=g).to(dtype) for shape in ((V,), (K, D), (V, K)))
    head = OutputHead(weight_VD, bias_V, low_rank=((down_KD, up_VK, 0.5),) if "adapter" in learning else ())
    parts = {"weight": [weight_VD], "bias": [bias_V], "adapter": [down_KD, up_VK]}
    leaves = [hidden_PD, *(part.requires_grad_() for name in learning for part in parts[name])]
    with LargestAllocation() as made:
        linear_sparse_kl(hidden_PD, head, targets).backward()
    chunks = int(dtype == torch.bfloat16 and "weight" in learning)  # whose product is rounded before it is added
    assert LEARNING[learning] + chunks == sum(size >= V * D for size in made.sizes)
    assert V * (D + K) >= made.elements
    assert all(leaf.grad.any() for leaf in leaves)


def test_default_chunks_hold_at_most_2048_positions(monkeypatch):
    """Without chunk_positions the logits of at most 2048 positions are held, in equal chunks."""
    seen = []
    original = torch.mm

    def spy(a, b, **kwargs):
        seen.append(len(a))
        return original(a, b, **kwargs)

    monkeypatch.setattr(torch, "mm", spy)
    P = 2048 + 100
    targets = Ragged(torch.zeros(P, dtype=torch.int32), torch.ones(P), torch.arange(P + 1))
    with torch.no_grad():
        linear_sparse_kl(torch.ones(P, 1), torch.ones(3, 1), targets)
    expected = [1074, 1074]
    assert expected == seen


def test_inputs_are_left_as_they_were():
    """Neither logits nor targets are written to, even where rows are made in place."""
    logits_PV, targets, labels_P = make_case(9, 31)
    x_PV = logits_PV.clone().requires_grad_()
    before = replace(targets, token_ids=targets.token_ids.clone(), probs=targets.probs.clone())
    for method in SPARSE_METHODS:
        sparse_kl(x_PV, targets, method=method, labels_P=labels_P, ce_weight=0.5).backward()
    t_PV = torch.softmax(logits_PV, 1)
    sparse_kl(x_PV, DenseTargets(t_PV), method="full").backward()
    torch.testing.assert_close(x_PV.detach(), logits_PV, rtol=0, atol=0)
    torch.testing.assert_close(t_PV, torch.softmax(logits_PV, 1), rtol=0, atol=0)
    torch.testing.assert_close(targets.probs, before.probs, rtol=0, atol=0)
    assert torch.equal(before.token_ids, targets.token_ids)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_logits_may_be_a_strided_view(dtype):
    """A transposed or sliced logits tensor gives the same loss and gradient as its copy."""
    logits_PV, targets, _ = make_case(6, 31)
    strided = logits_PV.to(dtype).T.contiguous().T.requires_grad_()
    plain = logits_PV.to(dtype).requires_grad_()
    expected = value_and_grads(sparse_kl(plain, targets), plain)
    torch.testing.assert_close(value_and_grads(sparse_kl(strided, targets), strided), expected, rtol=1e-13, atol=1e-16)
    torch.testing.assert_close(sparse_kl(strided.detach(), targets), expected[0], rtol=1e-13, atol=1e-16)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_rows_that_do_not_count_may_hold_anything(method, dtype):
    """Logits that are no numbers, of a position of weight 0 or, with CE mixing, without label, give no gradient."""
    logits_PV, targets, labels_P = make_case(9, 31)
    given = DenseTargets(torch.softmax(logits_PV, 1)) if method == "full" else targets
    logits_PV[1], logits_PV[4], logits_PV[5] = math.nan, math.inf, -math.inf
    labels_P[4:6] = -100
    x_PV = logits_PV.to(dtype).requires_grad_()
    weights_P = (torch.arange(9) != 1).float()
    loss = sparse_kl(x_PV, given, method=method, labels_P=labels_P, ce_weight=0.1, position_weights_P=weights_P)
    value, grad_PV = value_and_grads(loss, x_PV)
    assert value.isfinite()
    assert grad_PV.isfinite().all()
    assert not grad_PV[[1, 4, 5]].any()
    assert grad_PV[0].any()


def test_hidden_states_that_do_not_count_and_are_no_numbers():
    """As in torch the value is without them, and the gradient of the weight is NaN; unlike there, theirs is 0."""
    g = generator(0)
    hidden_PD, weight_VD = torch.randn(3, 4, generator=g), torch.randn(7, 4, generator=g)
    hidden_PD[1] = math.nan
    labels_P = torch.tensor([2, -100, 5])
    targets = Ragged(torch.tensor([2, 0, 5]), torch.ones(3), torch.arange(4))
    ours = [t.clone().requires_grad_() for t in (hidden_PD, weight_VD)]
    theirs = [t.clone().requires_grad_() for t in (hidden_PD, weight_VD)]
    loss = linear_sparse_kl(*ours, targets, labels_P=labels_P, position_weights_P=(labels_P >= 0).float())
    expected = functional.cross_entropy(functional.linear(*theirs), labels_P)
    found, wanted = value_and_grads(loss, *ours), value_and_grads(expected, *theirs)
    torch.testing.assert_close([found[0], found[1][[0, 2]]], [wanted[0], wanted[1][[0, 2]]])
    torch.testing.assert_close(found[2], wanted[2], equal_nan=True)
    assert found[2].isnan().all()
    assert wanted[1][1].isnan().all()
    assert not found[1][1].any()


def take(arguments):
    """The loss of arguments by name."""
    named = dict(arguments)
    return sparse_kl(named.pop("logits_PV"), named.pop("targets"), **named)


def good():
    logits_PV, targets, labels_P = make_case(5, 7)
    return {"logits_PV": logits_PV, "targets": targets, "labels_P": labels_P}


def with_targets(**changes):
    return lambda a: a.update(targets=replace(a["targets"], **changes))


def repeat_first_id(a):
    ids = a["targets"].token_ids.clone()
    ids[:] = ids[0]
    a["targets"] = replace(a["targets"], token_ids=ids)


WRONG = {
    "unknown method": (lambda a: a.update(method="jsd"), "method 'jsd' is unknown; one of random_sampling"),
    "logits of three dimensions": (
        lambda a: a.update(logits_PV=a["logits_PV"][None]),
        r"logits_PV has shape \[1, 5, 7\]; need \[positions, V\]: flatten the sequences",
    ),
    "integer logits": (lambda a: a.update(logits_PV=a["logits_PV"].long()), "need a float type"),
    "offsets of another batch": (with_targets(offsets=torch.tensor([0, 1])), r"offsets has shape \[2\]; need \[6\]"),
    "offsets past the records": (
        with_targets(offsets=99 * torch.arange(6)),
        "offsets must rise from 0 to the number of records, ",
    ),
    "ids beyond the vocabulary": (
        lambda a: a.update(logits_PV=a["logits_PV"][:, :4]),
        r"token_ids go from \d to \d; outside \[0, 4\)",
    ),
    "float ids": (with_targets(token_ids=torch.ones(3)), "token_ids, probs, offsets have types torch.float32, "),
    "fewer ids than probs": (with_targets(token_ids=torch.ones(3, dtype=torch.int32)), r"shape \[3\]"),
    "repeated ids": (repeat_first_id, "repeat within a position"),
    "dense targets, sparse method": (
        lambda a: a.update(targets=DenseTargets(torch.ones(5, 7))),
        "with DenseTargets: DenseTargets, DenseTeacher go with 'full'",
    ),
    "full with records": (lambda a: a.update(method="full"), "go with 'full'"),
    "no labels for the naive fix": (lambda a: a.update(method="naive_fix", labels_P=None), "labels_P is missing"),
    "no labels for CE": (lambda a: a.update(ce_weight=0.5, labels_P=None), "labels_P is missing"),
    "label beyond the vocabulary": (
        lambda a: a.update(ce_weight=0.5, labels_P=torch.full((5,), 7)),
        r"label 7 is outside \[0, 7\) and not -100",
    ),
    "labels of another batch": (
        lambda a: a.update(ce_weight=0.5, labels_P=torch.zeros(4)),
        r"labels_P has shape \[4\]",
    ),
    "CE weight above 1": (lambda a: a.update(ce_weight=1.5), r"ce_weight 1\.5 is outside \[0, 1\]"),
    "a negative normaliser": (
        lambda a: a.update(normaliser=-1),
        r"normaliser is -1\.0; need a finite number of positi",
    ),
    "a normaliser of nothing": (
        lambda a: a.update(normaliser=0),
        "normaliser is 0, and positions of weight 4 count he",
    ),
    "a normaliser for each position": (
        lambda a: a.update(normaliser=torch.ones(5)),
        r"normaliser has shape \[5\]; need one number, the positions to divide by",
    ),
    "padded ids alone": (
        lambda a: a.update(targets=(torch.zeros(5, 2), torch.zeros(5, 3))),
        r"padded targets have the shapes \[\[5, 2\], \[5, 3\]\]; need token_ids and probs, both",
    ),
    "negative weight": (lambda a: a.update(position_weights_P=-torch.ones(5)), "negative or not finite"),
    "weights of another batch": (lambda a: a.update(position_weights_P=torch.ones(6)), r"shape \[6\]; need \[5\]"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_raise(name):
    """Each misuse is a ValueError that names the argument and what was found."""
    arguments = good()
    take(arguments)
    change, message = WRONG[name]
    change(arguments)
    with pytest.raises(ValueError, match=message):
        take(arguments)


@pytest.mark.parametrize("bad", [-0.5, math.nan])
def test_bad_probabilities_raise(bad):
    """A negative or undefined probability is refused before it reaches the gradient."""
    arguments = good()
    arguments["targets"].probs[1] = bad
    with pytest.raises(ValueError, match="probs holds a value"):
        take(arguments)


@pytest.mark.parametrize("method", ["label_smoothing", "ghost_token", "naive_fix"])
def test_methods_with_a_residual_refuse_sums_above_one(method):
    """Counts passed for probabilities would make the residual negative: refused."""
    arguments = good()
    arguments["targets"].probs.mul_(50)
    with pytest.raises(ValueError, match=r"probs of a position sum to .*; method .* needs at most 1"):
        take(arguments | {"method": method})


def test_normalising_refuses_sums_of_zero():
    """Records of probability 0 alone are no distribution; the other methods take them."""
    arguments = good()
    arguments["targets"].probs[: int(arguments["targets"].offsets[1])] = 0
    assert take(arguments | {"method": "topk"}).isfinite()
    with pytest.raises(ValueError, match="probs of a position sum to 0, which cannot be normalised; leave its records"):
        take(arguments | {"method": "topk_normalised"})


def test_linear_refuses_parts_that_do_not_fit():
    """Hidden size, types and chunk size are checked by name."""
    hidden_PD, weight_VD, targets, _ = linear_case()
    with pytest.raises(
        ValueError,
        match=r"^hidden_PD has shape \[\d+, 2\], its head's weight .*; need \[positions, D\] and \[V, D\]",
    ):
        linear_sparse_kl(hidden_PD[:, :2], weight_VD, targets)
    with pytest.raises(ValueError, match=r"hidden_PD has type .*, its head's weight torch\.float32; need one type"):
        linear_sparse_kl(hidden_PD, weight_VD.float(), targets)
    with pytest.raises(ValueError, match="chunk_positions is 0"):
        linear_sparse_kl(hidden_PD, weight_VD, targets, chunk_positions=0)
    with pytest.raises(ValueError, match="the teacher's hidden_PD has shape"):
        linear_sparse_kl(hidden_PD, weight_VD, DenseTeacher(hidden_PD[:5], weight_VD), method="full")


# --- as operators ----------------------------------------------------------------------------------------------------


def operator_cases(dtype=torch.float32):
    """Arguments of the two operators, as the public losses make them, for sparse and dense targets."""
    P, V, D = 6, 30, 8
    hidden_PD, weight_VD, targets, labels_P = linear_case(dtype, P, V, D)
    teacher = DenseTeacher(torch.randn(P, 5, generator=generator(1)), torch.randn(V, 5, generator=generator(2)))
    bias_V = torch.randn(V, generator=generator(3)).requires_grad_()
    rest = ("forward_kl", 1.0, labels_P, 0.3, torch.ones(P), None, "")
    for given, method in ((targets, "ghost_token"), (teacher, "full")):
        parts = parts_of(given)
        logits_PV = (hidden_PD @ weight_VD.T).detach().requires_grad_()
        yield sparse_kl_operator, (logits_PV, *parts, method, *rest, True)
        head = (hidden_PD, weight_VD, None, bias_V, 0.5, 3.0)
        for accumulate in ("float32", "weight"):
            settings = (4, dtype, accumulate, [True, True, False, True])
            yield linear_sparse_kl_operator, (*head, *parts, method, *rest, *settings)


@pytest.mark.parametrize("number", range(6))
def test_operators_say_the_truth_of_themselves(number):
    """Schema, shapes without data, and gradients under tracing, as torch checks them."""
    operator, args = list(operator_cases())[number]
    tests = ["test_schema", "test_autograd_registration", "test_faketensor"]
    # Where it stays, a gradient is scaled in place, which the comparison below would meet; compiled losses have it.
    if "weight" not in [arg for arg in args if isinstance(arg, str)]:
        tests.append("test_aot_dispatch_static")
    torch.library.opcheck(operator, args, test_utils=tests)


@pytest.mark.parametrize(("method", "accumulate"), [("random_sampling", "float32"), ("full", "weight")])
def test_compiled_losses_are_the_losses(method, accumulate):
    """Whole in one graph: value and gradients are bit for bit those of the plain call."""
    P, V, D = 6, 40, 8
    hidden_PD, weight_VD, targets, _ = linear_case(torch.float32, P, V, D)
    teacher = DenseTeacher(torch.randn(P, 5, generator=generator(1)), torch.randn(V, 5, generator=generator(2)))
    given = teacher if method == "full" else targets

    def loss_of(hidden_PD, weight_VD):
        return linear_sparse_kl(hidden_PD.tanh(), weight_VD, given, method=method, accumulate=accumulate) * 2

    found = []
    for run in (loss_of, torch.compile(loss_of, backend="aot_eager", fullgraph=True)):
        leaves = [t.detach().clone().requires_grad_() for t in (hidden_PD, weight_VD)]
        loss = run(*leaves)
        loss.backward()
        found.append([loss.detach(), *(leaf.grad for leaf in leaves)])
    for plain, compiled in zip(*found, strict=True):
        assert torch.equal(plain, compiled)
