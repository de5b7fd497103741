"""
Losses of heads that are more than one matrix, of padded targets, and of batches where little or nothing counts.

Everything is held against dense float64 formulas under autograd.
Shape letters: P positions, V vocabulary, D hidden size, K records that a position has room for, R rank.
"""

import math

import pytest
import torch
from torch.nn import functional

from sklformat.distill.loader.batches import Batch, Targets
from sklformat.distill.losses.kl import METHODS, DenseTargets, DenseTeacher, OutputHead, linear_sparse_kl, sparse_kl

P, V, D, K, R = 9, 31, 5, 4, 2
SPARSE_METHODS = [method for method in METHODS if method != "full"]
# Scales and caps of models at hand: Gemma 2, Cohere, Granite (which divides), Phi (a bias), and all of it at once.
SHAPES = {
    "plain": {},
    "bias": {"bias": True},
    "scale": {"scale": 0.0625},
    "divisor": {"scale": 1 / 13},
    "cap": {"softcap": 3.0},
    "all": {"bias": True, "softcap": 2.0, "scale": 1.5, "low_rank": True},
    "low rank": {"low_rank": True},
}


class Ragged:
    """Targets of three records at each position but the third, which has none."""

    def __init__(self, seed=0):
        g = torch.Generator().manual_seed(seed)
        lengths = torch.tensor([0 if i == 2 else 3 for i in range(P)])
        self.token_ids = torch.cat([torch.randperm(V, generator=g)[:n] for n in lengths])
        self.probs = 0.3 * torch.rand(len(self.token_ids), generator=g) + 0.01
        self.offsets = torch.tensor([0, *lengths]).cumsum(0)

    def padded(self):
        """The same with room for K records; what is left over has an id that would be out of place."""
        ids_PK, probs_PK = torch.full((P, K), -1), torch.zeros(P, K)
        for position in range(P):
            first, end = self.offsets[position : position + 2].tolist()
            # The first place stays free: where a record is has no meaning.
            ids_PK[position, 1 : 1 + end - first] = self.token_ids[first:end]
            probs_PK[position, 1 : 1 + end - first] = self.probs[first:end]
        return ids_PK, probs_PK


def make(*, bias=False, low_rank=False, dtype=torch.float64, seed=1, vocab_size=V, **shape):
    """Hidden states, and a head with all its leaves wanting gradients."""
    g = torch.Generator().manual_seed(seed)

    def leaf(*sizes):
        return torch.randn(*sizes, generator=g, dtype=torch.float64).to(dtype).requires_grad_()

    hidden_PD, weight_VD = leaf(P, D), leaf(vocab_size, D)
    more = {"bias": leaf(vocab_size)} if bias else {}
    parts = ((leaf(rank, D), leaf(vocab_size, rank), factor) for rank, factor in ((R, 0.5), (1, 2.0)))
    more |= {"low_rank": tuple(parts)} if low_rank else {}
    return hidden_PD, OutputHead(weight_VD, **more, **shape)


def leaves(head):
    low_rank = [tensor for down, up, _ in head.low_rank for tensor in (down, up)]
    return [leaf for leaf in (head.weight, head.bias, *low_rank) if leaf is not None]


def rebuilt(head, parts):
    """The same head of other leaves."""
    weight_VD, *more = parts
    bias_V = None if head.bias is None else more.pop(0)
    factors = [factor for *_, factor in head.low_rank]
    low_rank = tuple(zip(more[::2], more[1::2], factors, strict=True))
    return OutputHead(weight_VD, bias_V, head.softcap, head.scale, low_rank)


def dense_logits(hidden_PD, head):
    """The formula, under autograd."""
    weight_VD = head.weight
    for down, up, factor in head.low_rank:
        weight_VD = weight_VD + factor * up @ down
    x_PV = hidden_PD @ weight_VD.T
    x_PV = head.scale * (x_PV if head.bias is None else x_PV + head.bias)
    return x_PV if head.softcap is None else head.softcap * torch.tanh(x_PV / head.softcap)


def value_and_grads(loss, inputs):
    return loss.detach(), *torch.autograd.grad(loss, inputs)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_head_is_its_formula(shape, method):
    """Value and all gradients are those of the dense logits, for each kind of head and method, chunks cut or not."""
    hidden_PD, head = make(**SHAPES[shape])
    targets = Ragged() if method != "full" else DenseTargets(torch.softmax(torch.randn(P, V, dtype=torch.float64), 1))
    labels_P = torch.arange(P)
    args = {"method": method, "labels_P": labels_P, "ce_weight": 0.2}
    inputs = [hidden_PD, *leaves(head)]
    expected = value_and_grads(sparse_kl(dense_logits(hidden_PD, head), targets, **args), inputs)
    for chunk_positions in (None, 4):
        loss = linear_sparse_kl(hidden_PD, head, targets, chunk_positions=chunk_positions, **args)
        torch.testing.assert_close(value_and_grads(loss, inputs), expected, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("padding", [0, 4])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_teachers_head_is_its_formula(shape, padding):
    """Method "full" learns from the teacher's own logits, of its ids that the student has, whatever head it has."""
    teachers_PD, whole = make(**SHAPES[shape], seed=3, vocab_size=V + padding)
    t_PV = torch.softmax(dense_logits(teachers_PD, whole)[:, :V], 1).detach()
    teacher = DenseTeacher(teachers_PD, whole.narrowed(V))
    hidden_PD, head = make(**SHAPES["all"])
    args = {"method": "full", "labels_P": torch.arange(P), "ce_weight": 0.2}
    inputs = [hidden_PD, *leaves(head)]
    expected = value_and_grads(linear_sparse_kl(hidden_PD, head, DenseTargets(t_PV), **args), inputs)
    for chunk_positions in (None, 4):
        loss = linear_sparse_kl(hidden_PD, head, teacher, chunk_positions=chunk_positions, **args)
        torch.testing.assert_close(value_and_grads(loss, inputs), expected, rtol=1e-11, atol=1e-14)
    linear_sparse_kl(hidden_PD, head, teacher, **args).backward()
    assert [None] * (1 + len(leaves(whole))) == [leaf.grad for leaf in (teachers_PD, *leaves(whole))]


def test_a_teachers_head_in_half_precision():
    """Under autocast the teacher's product is rounded, and its bias, scale and cap are not."""
    hidden_PD, head = make(**SHAPES["all"], dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        own = linear_sparse_kl(hidden_PD, head, DenseTeacher(hidden_PD, head), method="full")
    assert abs(float(own.detach())) < 1e-6, "a student that is its own teacher"


@pytest.mark.parametrize("shape", SHAPES)
def test_gradcheck(shape):
    """The gradients are the derivatives of the value, for hidden states and every part of the head."""
    hidden_PD, head = make(**SHAPES[shape])
    targets = Ragged()

    def loss(hidden_PD, *parts):
        return linear_sparse_kl(hidden_PD, rebuilt(head, parts), targets, chunk_positions=4)

    assert torch.autograd.gradcheck(loss, (hidden_PD, *leaves(head)), fast_mode=True)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 3e-6), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_rounding_is_that_of_the_type(dtype, bound):
    """In float32 and half precision all parts are near the float64 formula at the rounded parameters."""
    hidden_PD, head = make(**SHAPES["all"], dtype=dtype)
    loss = linear_sparse_kl(hidden_PD, head, Ragged())
    found = value_and_grads(loss, [hidden_PD, *leaves(head)])
    parts = [part.detach().double().requires_grad_() for part in (hidden_PD, *leaves(head))]
    exact = dense_logits(parts[0], rebuilt(head, parts[1:]))
    wanted = value_and_grads(sparse_kl(exact, Ragged()), parts)
    for ours, theirs in zip(found, wanted, strict=True):
        assert float((ours.double() - theirs).norm() / theirs.norm()) < bound


def test_a_small_adapter_is_not_lost_in_the_weights_rounding():
    """What a low-rank part adds is far below a bfloat16 weight's last bit, and shows in the loss all the same."""
    signs_D = torch.tensor([1.0, -1.0]).repeat(32).bfloat16()
    hidden_PD, weight_VD, up_VR = signs_D.repeat(P, 1), torch.ones(V, 64).bfloat16(), torch.zeros(V, 1).bfloat16()
    up_VR[3] = 1e-3
    adapted = OutputHead(weight_VD, low_rank=((signs_D[None], up_VR, 1.0),))
    assert torch.equal(weight_VD, weight_VD + up_VR @ signs_D[None])
    pair = (torch.full((P, 1), 3), torch.ones(P, 1))
    gain = linear_sparse_kl(hidden_PD, weight_VD, pair) - linear_sparse_kl(hidden_PD, adapted, pair)
    # All logits are 0 but that of id 3, which the adapter raises by 64 · 1e-3.
    torch.testing.assert_close(gain, torch.tensor(0.064 * (1 - 1 / V)), rtol=0.05, atol=0)


def test_a_frozen_weight_under_an_adapter_gets_no_gradient():
    """Where the adapter alone learns, it does."""
    hidden_PD, head = make(**SHAPES["low rank"])
    head.weight.requires_grad_(False)
    linear_sparse_kl(hidden_PD, head, Ragged()).backward()
    assert head.weight.grad is None
    assert all(part.grad.any() for part in leaves(head)[1:])


@pytest.mark.parametrize("ce_weight", [0.0, 0.3])
@pytest.mark.parametrize("method", SPARSE_METHODS)
def test_padded_targets_are_the_ragged_ones(method, ce_weight):
    """The pair (ids, probs) gives what the same records give ragged, bit for bit, in two dimensions or three."""
    hidden_PD, head = make()
    targets = Ragged()
    args = {"method": method, "labels_P": torch.arange(P), "ce_weight": ce_weight}
    expected = value_and_grads(linear_sparse_kl(hidden_PD, head, targets, **args), [hidden_PD])
    ids_PK, probs_PK = targets.padded()
    for pair in [(ids_PK, probs_PK), (ids_PK.reshape(3, 3, K), probs_PK.reshape(3, 3, K))]:
        found = value_and_grads(linear_sparse_kl(hidden_PD, head, pair, **args), [hidden_PD])
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
        logits_PV = (hidden_PD @ head.weight.T).detach()
        assert sparse_kl(logits_PV, pair, **args) == sparse_kl(logits_PV, targets, **args)


def test_padded_targets_of_a_batch_and_of_one_position():
    """What ``batch.padded()`` gives is what the losses take, and one position's own row too."""
    hidden_PD, head = make()
    ragged = Ragged()
    targets = Targets(ragged.token_ids.int(), ragged.probs, ragged.offsets)
    nothing = torch.zeros(3, P // 3, dtype=torch.int64)
    ids, probs, _ = Batch(nothing, nothing, targets, {}).padded(5)
    expected = linear_sparse_kl(hidden_PD, head, targets)
    assert linear_sparse_kl(hidden_PD, head, (ids, probs)) == expected
    one = linear_sparse_kl(hidden_PD[:1], head, (ids[0, 0], probs[0, 0]))
    assert one == linear_sparse_kl(hidden_PD[:1], head, (ids[0, :1], probs[0, :1]))


NOTHING = {
    "no records": {},
    "no labels": {"labels_P": torch.full((P,), -100), "ce_weight": 0.5},
    "no weight": {"position_weights_P": torch.zeros(P)},
    "no records, 7 positions elsewhere": {"normaliser": 7},
    "nothing anywhere": {"normaliser": torch.tensor(0)},
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", NOTHING)
def test_where_nothing_counts_loss_and_gradients_are_zero(name, method):
    """A micro-batch of prompts alone adds nothing, and its backward pass gives zeros to hidden states and head."""
    args = NOTHING[name] | {"method": method}
    args.setdefault("labels_P", torch.full((P,), -100) if method in ("naive_fix", "full") else None)
    targets = Ragged()
    if method == "full":
        targets = DenseTargets(torch.full((P, V), 1 / V, dtype=torch.float64))
        args["position_weights_P"] = torch.zeros(P)
    elif name not in ("no labels", "no weight"):
        targets = (torch.zeros(P, K, dtype=torch.int64), torch.zeros(P, K))
    hidden_PD, head = make(**SHAPES["all"])
    for loss in (
        linear_sparse_kl(hidden_PD, head, targets, **args),
        sparse_kl(hidden_PD @ head.weight.T, targets, **args),
    ):
        hidden_PD.grad = head.weight.grad = None
        loss.backward()
        assert 0 == loss.item()
        assert not hidden_PD.grad.any()
        assert not head.weight.grad.any()


def test_no_positions_at_all_give_zero():
    """An empty batch, as a filter may leave it, is no error."""
    hidden_PD, head = make()
    empty = (torch.zeros(0, K, dtype=torch.int64), torch.zeros(0, K))
    for loss in (
        linear_sparse_kl(hidden_PD[:0], head, empty),
        sparse_kl(hidden_PD[:0] @ head.weight.T, empty),
        sparse_kl(hidden_PD[:0] @ head.weight.T, DenseTargets(torch.zeros(0, V)), method="full"),
    ):
        head.weight.grad = None
        loss.backward()
        assert 0 == loss.item()
        assert not head.weight.grad.any()


@pytest.mark.parametrize("weights_P", [None, torch.linspace(0, 2, P)])
def test_parts_of_a_step_add_up_to_the_whole(weights_P):
    """Micro-batches that divide by the whole step's positions sum to its loss and gradients, as means do not."""
    hidden_PD, head = make(**SHAPES["all"])
    ids_PK, probs_PK = Ragged().padded()
    inputs = [hidden_PD, *leaves(head)]
    whole = linear_sparse_kl(hidden_PD, head, (ids_PK, probs_PK), position_weights_P=weights_P)
    expected = value_and_grads(whole, inputs)
    counted_P = (probs_PK > 0).any(1)
    total = counted_P.sum() if weights_P is None else (weights_P * counted_P).sum()
    for normaliser in (total, float(total)):
        parts = 0
        for span in (slice(0, 2), slice(2, 3), slice(3, P)):  # the second has no record
            args = {"position_weights_P": None if weights_P is None else weights_P[span], "normaliser": normaliser}
            parts += linear_sparse_kl(hidden_PD[span], head, (ids_PK[span], probs_PK[span]), **args)
        torch.testing.assert_close(value_and_grads(parts, inputs), expected, rtol=1e-6, atol=1e-12)


def test_a_padded_vocabulary_shares_in_the_softmax():
    """Rows of the head beyond the tokenizer's ids are pushed down as the model's own logits are."""
    hidden_PD, head = make()
    _, probs_PK = Ragged().padded()
    pair = torch.arange(K).expand(P, K), probs_PK
    linear_sparse_kl(hidden_PD, head, pair).backward()
    x_PV = hidden_PD @ head.weight.T
    loss = -(probs_PK.double() * torch.log_softmax(x_PV, 1)[:, :K]).sum() / (probs_PK > 0).any(1).sum()
    (wanted_VD,) = torch.autograd.grad(loss, head.weight)
    torch.testing.assert_close(head.weight.grad, wanted_VD, rtol=1e-9, atol=1e-12)
    assert head.weight.grad[V - 5 :].any()


def test_cross_entropy_of_a_capped_head_is_torchs():
    """With all weight on the labels the loss of a head with everything is torch's cross_entropy of its logits."""
    hidden_PD, head = make(**SHAPES["all"])
    labels_P = torch.arange(P)
    pair = labels_P[:, None], torch.ones(P, 1)
    inputs = [hidden_PD, *leaves(head)]
    expected = value_and_grads(functional.cross_entropy(dense_logits(hidden_PD, head), labels_P), inputs)
    found = value_and_grads(linear_sparse_kl(hidden_PD, head, pair), inputs)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-13)


WRONG = {
    "bias": ({"bias": torch.ones(V + 1)}, r"the head's bias has shape \[32\], its weight \[31, 5\]"),
    "cap": ({"softcap": 0.0}, r"the head's softcap is 0\.0; need a number above 0, or None"),
    "endless cap": ({"softcap": math.inf}, "the head's softcap is inf; need a number above 0"),
    "scale": ({"scale": 0.0}, r"the head's scale is 0\.0; need a finite number that is not 0"),
    "low rank": (
        {"low_rank": ((torch.ones(V, R), torch.ones(R, D), 1.0),)},
        r"the head's low rank has shapes \[31, 2\] and \[2, 5\], its weight \[31, 5\]; need \[K, D\], \[V, K\]",
    ),
    "devices": ({"bias": torch.ones(V, device="meta")}, "the head's bias is on meta, its weight on cpu"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_head_whose_parts_do_not_fit_is_refused(name):
    """Each part is named, with its shape or value."""
    changes, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        OutputHead(torch.ones(V, D), **changes)


def test_a_teachers_head_of_other_ids_is_refused():
    """Neither is a padded teacher cut in silence, nor are ids made up that it has not."""
    hidden_PD, head = make()
    with pytest.raises(ValueError, match=r"the teacher's head has shape \[31, 5\]; need \[30, 5\]"):
        linear_sparse_kl(hidden_PD, head.narrowed(V - 1), DenseTeacher(hidden_PD, head), method="full")
    with pytest.raises(ValueError, match="the head has 31 ids; 32 of them cannot be taken"):
        head.narrowed(V + 1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("shape", SHAPES)
def test_an_accelerator_gives_the_same(shape):
    """Value and gradients on a CUDA device equal the CPU's; zero where nothing counts, too."""
    hidden_PD, head = make(**SHAPES[shape])
    expected = value_and_grads(linear_sparse_kl(hidden_PD, head, Ragged()), [hidden_PD, *leaves(head)])
    parts = [part.detach().cuda().requires_grad_() for part in (hidden_PD, *leaves(head))]
    moved = rebuilt(head, parts[1:])
    pair = tuple(part.cuda() for part in Ragged().padded())
    for ours, wanted in zip(value_and_grads(linear_sparse_kl(parts[0], moved, pair), parts), expected, strict=True):
        torch.testing.assert_close(ours.cpu(), wanted, rtol=1e-10, atol=1e-12)
    nothing = linear_sparse_kl(parts[0], moved, (pair[0], 0 * pair[1]))
    nothing.backward()
    assert 0 == nothing.item()
    assert not parts[1].grad.any()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_an_accelerator_gives_an_adapter_on_a_frozen_head_the_same():
    """In bfloat16, where the columns that learn are a part of the weight's, the adapter's gradients are the CPU's."""
    hidden_PD, head = make(**SHAPES["low rank"], dtype=torch.bfloat16)
    head.weight.requires_grad_(False)
    learning = [hidden_PD, *leaves(head)[1:]]
    expected = value_and_grads(linear_sparse_kl(hidden_PD, head, Ragged()), learning)
    parts = [part.detach().cuda().requires_grad_(part.requires_grad) for part in (hidden_PD, *leaves(head))]
    moved = rebuilt(head, parts[1:])
    pair = tuple(part.cuda() for part in Ragged().padded())
    found = value_and_grads(linear_sparse_kl(parts[0], moved, pair), [parts[0], *parts[2:]])
    for ours, wanted in zip(found, expected, strict=True):
        assert float((ours.cpu().double() - wanted.double()).norm() / wanted.double().norm()) < 2e-2
