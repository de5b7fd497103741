"""
The kernel of the losses against its oracle in torch operations, through the public losses; on the CPU interpreted.

Shape letters: P positions, V vocabulary, D hidden size.
"""

from dataclasses import dataclass, replace

import pytest
import torch

from sklformat.distill import kernels
from sklformat.distill.kernels import dense_rows, loss_rows
from sklformat.distill.losses.heads import OutputHead
from sklformat.distill.losses.kl import METHODS, DenseTeacher, linear_sparse_kl, sparse_kl

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALVES = [torch.bfloat16, torch.float16]
# Of the greatest gradient.  The interpreter cuts bfloat16 off where a GPU rounds.
TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}
CE_WEIGHTS = {"naive_fix": 0.0, "random_sampling": 0.3, "ghost_token": 0.5, "label_smoothing": 0.2, "full": 0.4}


@dataclass
class Targets:
    token_ids: torch.Tensor
    probs: torch.Tensor
    offsets: torch.Tensor


@pytest.fixture
def in_kernels(monkeypatch):
    """The losses go through the kernels on every device; a list that grows with each of their runs."""
    runs = []
    monkeypatch.setattr(kernels, "run_on", lambda _device: True)
    for module, name in ((loss_rows, "run_sparse"), (dense_rows, "run_dense")):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, _real=real, **k: runs.append(1) or _real(*a, **k))
    return runs


def seeded(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def case(positions, vocab_size, width, dtype, *, most=12, mass=0.9):
    """Hidden states, a weight, targets with empty and one-record positions, labels, some of them among the records."""
    g = torch.Generator().manual_seed(positions * 1000 + vocab_size)
    most = min(most, vocab_size)
    ids, probs, counts, labels = [], [], [], []
    for position in range(positions):
        k = [0, 1, most, (most + 1) // 2][position % 4]
        chosen = torch.randperm(vocab_size, generator=g)[:k].sort().values
        weights = torch.rand(k, generator=g) + 0.01
        ids.append(chosen)
        probs.append(mass * weights / weights.sum() if k else weights)
        counts.append(k)
        labels.append(int(chosen[-1]) if k and position % 3 else int(torch.randint(vocab_size, (), generator=g)))
    labels[-1] = -100
    offsets = torch.tensor([0, *counts]).cumsum(0)
    targets = Targets(torch.cat(ids).int().to(DEVICE), torch.cat(probs).to(DEVICE), offsets.to(DEVICE))
    hidden, weight = seeded(1, positions, width), seeded(2, vocab_size, width) * 2 / width**0.5
    return hidden.to(DEVICE, dtype), weight.to(DEVICE, dtype), targets, torch.tensor(labels, device=DEVICE)


def check(loss_of, tensors, monkeypatch):
    """Value and gradients by the kernel, from tensors as they are, are those by torch operations from float64."""
    dtype = tensors[0].dtype
    ours = [t.detach().clone().requires_grad_() for t in tensors]
    value = loss_of(*ours)
    value.backward()
    exact = [t.detach().double().requires_grad_() for t in tensors]
    with monkeypatch.context() as patch:
        patch.setattr(kernels, "run_on", lambda _device: False)
        reference = loss_of(*exact)
    reference.backward()
    assert value.item() == pytest.approx(reference.item(), rel=max(1e-5, TOLERANCE[dtype] / 2))
    for mine, truth in zip(ours, exact, strict=True):
        assert torch.isfinite(mine.grad).all()
        assert (mine.grad.double() - truth.grad).abs().max() <= 4 * TOLERANCE[dtype] * truth.grad.abs().max()


@pytest.mark.parametrize(
    ("method", "dtype"),
    [*((method, torch.float32) for method in METHODS), *(("random_sampling", dtype) for dtype in HALVES)],
    ids=str,
)
def test_each_method_has_its_oracles_value_and_gradients(method, dtype, in_kernels, monkeypatch):
    positions, vocab_size, width = 9, 157, 8
    hidden, weight, targets, labels = case(positions, vocab_size, width, dtype)
    teacher, teachers = seeded(3, positions, 5).to(hidden), seeded(4, vocab_size, 5).to(hidden)
    weights = seeded(5, positions).abs().to(DEVICE)

    def loss_of(hidden, weight):
        return linear_sparse_kl(
            hidden,
            weight,
            DenseTeacher(teacher.to(hidden), teachers.to(hidden)) if method == "full" else targets,
            method=method,
            labels_P=labels if method in CE_WEIGHTS else None,
            ce_weight=CE_WEIGHTS.get(method, 0.0),
            position_weights_P=weights,
            chunk_positions=4,
        )

    check(loss_of, [hidden, weight], monkeypatch)
    assert len(in_kernels) == 3  # a chunk each


def test_a_tail_that_underflows_gives_the_ghost_token_no_nan(in_kernels):
    x_PV = torch.zeros(1, 12, device=DEVICE)
    x_PV[0, :8] = 1000.0
    targets = Targets(torch.arange(8).to(DEVICE), torch.full((8,), 0.05).to(DEVICE), torch.tensor([0, 8]).to(DEVICE))
    weights = torch.tensor([30.0], device=DEVICE)
    sparse_kl(x_PV.requires_grad_(), targets, method="ghost_token", position_weights_P=weights).backward()
    assert in_kernels
    torch.testing.assert_close(x_PV.grad[0].cpu(), torch.tensor([0.075] * 8 + [0.0] * 4), rtol=1e-4, atol=0)


HEADS = [{"bias": True}, {"softcap": 3.0, "scale": 0.5}, {"bias": True, "scale": -1.5}]


@pytest.mark.parametrize("settings", HEADS, ids="+".join)
@pytest.mark.parametrize("method", ["random_sampling", "ghost_token", "full"])
def test_heads_that_are_more_than_a_matrix(method, settings, in_kernels, monkeypatch):
    hidden, weight, targets, _ = case(6, 83, 8, torch.float32)
    tensors = [hidden, weight, *([seeded(6, 83).to(DEVICE)] if "bias" in settings else [])]

    def loss_of(hidden, weight, bias=None):
        head = OutputHead(weight, bias, settings.get("softcap"), settings.get("scale", 1.0))
        teachers = replace(head, weight=weight.detach().flip(0), bias=None if bias is None else bias.detach())
        teacher = DenseTeacher(hidden.detach() * 1.5, teachers)
        return linear_sparse_kl(hidden, head, teacher if method == "full" else targets, method=method)

    check(loss_of, tensors, monkeypatch)
    assert in_kernels


@pytest.mark.parametrize("vocab_size", [1, 2, 64, 40_000, 131_075])
def test_rows_of_any_width(vocab_size, in_kernels, monkeypatch):
    """One id, powers of two, and more than a block; the last is wider than 17 bits hold."""
    positions = 2 if vocab_size > 1 << 17 else 4
    hidden, weight, targets, _ = case(positions, vocab_size, 4, torch.float32)
    if vocab_size > 1:  # else the gradient is 0
        check(lambda h, w: linear_sparse_kl(h, w, targets), [hidden, weight], monkeypatch)
    assert linear_sparse_kl(hidden, weight, targets).isfinite()
    assert in_kernels


@pytest.mark.parametrize("method", ["ghost_token", "naive_fix"])
def test_more_records_than_a_tile(method, in_kernels, monkeypatch):
    hidden, weight, targets, labels = case(5, 400, 4, torch.float32, most=190)
    check(lambda h, w: linear_sparse_kl(h, w, targets, method=method, labels_P=labels), [hidden, weight], monkeypatch)


@pytest.mark.parametrize("method", ["random_sampling", "ghost_token"])
def test_logits_that_are_given_stay_as_they_are(method, in_kernels, monkeypatch):
    _, _, targets, _ = case(7, 90, 4, torch.float32)
    logits = 3 * seeded(7, 90, 7).to(DEVICE)
    before = logits.clone()
    check(lambda x: sparse_kl(x.t(), targets, method=method), [logits], monkeypatch)
    with torch.no_grad():
        value = sparse_kl(logits.t(), targets, method=method)
    assert torch.equal(logits, before)
    with_gradient = sparse_kl(logits.t().clone().requires_grad_(), targets, method=method)
    assert value.item() == pytest.approx(with_gradient.item(), rel=1e-6)


def test_records_and_bias_may_lie_apart(in_kernels, monkeypatch):
    """As columns of other tensors."""
    hidden, weight, targets, _ = case(6, 50, 4, torch.float32)
    apart = Targets(*(torch.stack([part, 0 * part], 1)[:, 0] for part in vars(targets).values()))
    bias = torch.stack([seeded(6, 50), seeded(7, 50)], 1)[:, 0].to(DEVICE)
    assert not any(part.is_contiguous() for part in (*vars(apart).values(), bias))
    check(lambda h, w: linear_sparse_kl(h, OutputHead(w, bias.to(h)), apart), [hidden, weight], monkeypatch)
    assert in_kernels


def test_rows_that_do_not_count_are_not_looked_at(in_kernels):
    hidden, weight, targets, _ = case(8, 50, 4, torch.float32)
    hidden[0] = float("nan")  # it has no record
    hidden[3] = float("inf")
    weights = torch.ones(8, device=DEVICE)
    weights[3] = 0
    hidden.requires_grad_()
    value = linear_sparse_kl(hidden, weight, targets, position_weights_P=weights)
    value.backward()
    assert torch.isfinite(value)
    assert (hidden.grad[[0, 3]] == 0).all()
    assert torch.isfinite(hidden.grad).all()


def test_ids_that_are_masked(in_kernels, monkeypatch):
    """A bias of minus infinity takes an id out."""
    hidden, weight, targets, _ = case(6, 50, 4, torch.float32)
    bias = torch.zeros(50, device=DEVICE)
    bias[next(i for i in range(50) if not (targets.token_ids == i).any())] = -torch.inf
    for method in ("random_sampling", "ghost_token"):
        check(
            lambda h, w, m=method: linear_sparse_kl(h, OutputHead(w, bias.to(h)), targets, method=m),
            [hidden, weight],
            monkeypatch,
        )


def test_a_whole_block_that_is_masked(in_kernels, monkeypatch):
    """The first ids of a row are all taken out, as many as a program has in hand; the greatest is found later."""
    hidden, weight, targets, labels = case(4, 40_000, 4, torch.float32)
    bias = torch.zeros(40_000, device=DEVICE)
    bias[: loss_rows.launch(40_000, has_room=True)["BLOCK"]] = -torch.inf
    teacher = DenseTeacher(hidden.detach() * 1.5, OutputHead(weight.detach().flip(0), bias))
    labels = torch.where(labels < 0, labels, 39_000)
    check(
        lambda h, w: linear_sparse_kl(h, OutputHead(w, bias.to(h)), teacher, method="full", labels_P=labels),
        [hidden, weight],
        monkeypatch,
    )
    none = Targets(targets.token_ids[:0], targets.probs[:0], 0 * targets.offsets)
    check(
        lambda h, w: linear_sparse_kl(h, OutputHead(w, bias.to(h)), none, method="naive_fix", labels_P=labels),
        [hidden, weight],
        monkeypatch,
    )
    assert len(in_kernels) == 2


def test_nothing_counts(in_kernels):
    hidden, weight, targets, _ = case(3, 20, 4, torch.float32)
    offsets = torch.zeros(4, dtype=torch.int64, device=DEVICE)
    hidden.requires_grad_()
    value = linear_sparse_kl(hidden, weight, Targets(targets.token_ids[:0], targets.probs[:0], offsets))
    value.backward()
    assert value.item() == 0
    assert (hidden.grad == 0).all()
