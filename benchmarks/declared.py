"""
Each Triton kernel, declared once: its axes, what it is called with, and what gives the same by torch operations.

Tests run every declaration on small odd shapes, interpreted, and compile it for cards that are not there; gpu.py checks
and times it on the one that is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sklformat.distill.loader.packed import decode_by_torch
from sklformat.distill.losses.kl import DenseTargets, sparse_kl
from sklformat.distill.teacher.row_draws import RowDraws
from sklformat.format import layout

Axes = Mapping[str, int]
Given = dict[str, Any]
Found = dict[str, Tensor]

HALVES = (torch.bfloat16, torch.float16)
FLOATS = (torch.float32, *HALVES)


@dataclass(frozen=True)
class Kernel:
    """
    One kernel.

    Attributes:
        axes: What the letters of a shape mean.
        dtypes: Of what is read.
        variants: Settings of a call, by name; those of the first are measured.
        shapes: Small odd ones.
        full: The one that is measured.
        given: Makes the tensors of a call from a shape, a type, a device and a variant's settings.
        run: Calls it.
        reference: The same by torch operations.
        rounding: Of the largest value of each float result, how far it may be from the reference's, by type; integers
            are equal, draws but for one in two hundred at most.
        bytes_moved: What it must read and write at least.
    """

    axes: Mapping[str, str]
    dtypes: tuple[torch.dtype, ...]
    variants: Mapping[str, Given]
    shapes: tuple[Axes, ...]
    full: Axes
    given: Callable[[Axes, torch.dtype, str, Given], Given]
    run: Callable[..., Found]
    reference: Callable[..., Found]
    rounding: Mapping[torch.dtype, float]
    bytes_moved: Callable[[Axes, torch.dtype], int]

    def check(self, shape: Axes, dtype: torch.dtype, device: str, variant: str) -> None:
        """Call it and its reference, and compare."""
        settings = self.variants[variant]
        given = self.given(shape, dtype, device, settings)
        found = self.run(**{name: value.clone() for name, value in given.items()}, **settings)
        expected = self.reference(**given, **settings)
        assert expected.keys() <= found.keys()
        for name, truth in expected.items():
            ours = found[name]
            assert ours.shape == truth.shape, name
            if not ours.is_floating_point():
                share = float((ours == truth).double().mean()) if ours.numel() else 1.0
                assert share >= (0.995 if name == "ids" else 1.0), (name, share)
            elif ours.numel():
                apart = float((ours.double() - truth.double()).abs().max())
                assert apart <= self.rounding[dtype] * float(truth.double().abs().max()) + 1e-30, (name, apart)


def random(shape: tuple[int, ...], dtype: torch.dtype, device: str, *, seed: int = 0) -> Tensor:
    g = torch.Generator(device).manual_seed(seed)
    return torch.randn(*shape, generator=g, device=device).to(dtype)


# --- draws ---


def rows_to_draw_from(shape: Axes, dtype: torch.dtype, device: str, _: Given) -> Given:
    places = torch.arange(3, 3 + shape["P"], device=device)
    return {"logits_PV": 3 * random((shape["P"], shape["V"]), dtype, device, seed=shape["V"]), "places_P": places}


def draw(logits_PV: Tensor, places_P: Tensor, **settings: Any) -> Found:
    from sklformat.distill.kernels.draw_rows import draw_rows

    drawn = draw_rows(logits_PV, places_P, seed=2**63 + 5, sequence=2**40 + 9, **settings)
    return {name: value for name, value in vars(drawn).items() if value is not None}


def draw_by_torch(logits_PV: Tensor, places_P: Tensor, *, want_entropy: bool = False, **law: Any) -> Found:
    drawn = RowDraws(**{"systematic": False} | law, seed=2**63 + 5).draw(logits_PV, places_P, 2**40 + 9)
    log_p_PV = logits_PV.double().log_softmax(1)
    found = {"ids": drawn.ids, "is_bad": drawn.is_bad, "log_sum": logits_PV.double().logsumexp(1)}
    if drawn.weights is not None:
        found["weights"] = drawn.weights
    if want_entropy:
        found["entropy"] = torch.special.entr(log_p_PV.exp()).sum(1)
    return found


DRAWS = Kernel(
    axes={"P": "positions", "V": "vocabulary"},
    dtypes=FLOATS,
    variants={
        "multinomial": {"rounds": 17},
        "systematic": {"rounds": 17, "systematic": True},
        "with entropies": {"rounds": 9, "want_entropy": True},
        "proposal": {"rounds": 9, "temperature": 0.7},
        "even proposal, unbiased": {"rounds": 9, "temperature": 1.4, "systematic": True, "self_normalise": False},
    },
    shapes=({"P": 2, "V": 1009}, {"P": 1, "V": 1}, {"P": 1, "V": 8193}),
    full={"P": 2048, "V": 128_256},
    given=rows_to_draw_from,
    run=draw,
    reference=draw_by_torch,
    rounding=dict.fromkeys(FLOATS, 2e-5),
    bytes_moved=lambda shape, dtype: shape["P"] * shape["V"] * dtype.itemsize,
)


# --- losses ---


def rows_of_a_loss(shape: Axes, dtype: torch.dtype, device: str, settings: Given) -> Given:
    """Logits, records (none, one, some, many in turn), labels of which some are records, and weights, one of them 0."""
    positions, vocab_size = shape["C"], shape["V"]
    rng = np.random.default_rng(positions)
    counts = np.array([(0, 1, shape["K"], shape["K"] // 2 + 1)[c % 4] for c in range(positions)]).clip(max=vocab_size)
    ids = [rng.choice(vocab_size, k, replace=False) for k in counts]
    probs = [0.9 * (part := rng.random(k) + 0.01) / max(part.sum(), 1e-9) for k in counts]
    labels = [i[-1] if i.size and c % 3 else rng.integers(vocab_size) for c, i in enumerate(ids)]
    given = {
        "x_CV": 2 * random((positions, vocab_size), dtype, device),
        "token_ids": torch.from_numpy(np.concatenate(ids)).int().to(device),
        "probs": torch.from_numpy(np.concatenate(probs)).float().to(device),
        "offsets": torch.from_numpy(np.concatenate([[0], counts.cumsum()])).to(device),
        "weights_C": torch.from_numpy((counts > 0) * (1 + np.arange(positions) % 3) * 0.5).float().to(device),
        "labels_C": torch.tensor(np.array(labels, np.int64), device=device),
        "bias_V": random((vocab_size,), dtype, device, seed=1),
    }
    return {name: value for name, value in given.items() if name != "bias_V" or "softcap" in settings}


def gradient_of(x_CV: Tensor, loss_of: Callable[[Tensor], Tensor], bias_V: Tensor | None, head: Given) -> Found:
    """Of a loss of the logits in float64, with what a head makes of its product before."""
    exact_CV = x_CV.double().requires_grad_()
    logits_CV = exact_CV if bias_V is None else exact_CV + bias_V.double()
    logits_CV = logits_CV * head.get("scale", 1.0)
    if "softcap" in head:
        logits_CV = head["softcap"] * torch.tanh(logits_CV / head["softcap"])
    loss = loss_of(logits_CV)
    (grad_CV,) = torch.autograd.grad(loss, exact_CV)
    return {"loss": loss.detach(), "grad_CV": grad_CV}


def sparse_loss(
    x_CV: Tensor, token_ids: Tensor, probs: Tensor, offsets: Tensor, weights_C: Tensor, **rest: Any
) -> Found:
    from sklformat.distill.kernels.loss_rows import run_sparse

    labels_C = rest.pop("labels_C")
    if rest.get("ce_weight") or rest["method"] == "naive_fix":
        rest["labels_C"] = labels_C
    losses_C = run_sparse(x_CV, token_ids, probs, offsets, weights_C, **rest)
    return {"loss": losses_C.double().sum(), "grad_CV": x_CV}


@dataclass
class Records:
    token_ids: Tensor
    probs: Tensor
    offsets: Tensor


def sparse_loss_by_torch(
    x_CV: Tensor, token_ids: Tensor, probs: Tensor, offsets: Tensor, weights_C: Tensor, labels_C: Tensor, *,
    method: str, ce_weight: float = 0.0, bias_V: Tensor | None = None, **head: Any,
) -> Found:  # fmt: skip
    def loss_of(logits_CV: Tensor) -> Tensor:
        return sparse_kl(
            logits_CV, Records(token_ids, probs.double(), offsets), method=method, labels_P=labels_C,
            ce_weight=ce_weight, position_weights_P=weights_C, normaliser=1,
        )  # fmt: skip

    return gradient_of(x_CV, loss_of, bias_V, head)


HEAD = {"scale": 0.5, "softcap": 3.0}
METHODS = ("random_sampling", "topk", "topk_normalised", "label_smoothing", "ghost_token", "naive_fix")
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}  # the interpreter cuts bits off

SPARSE_LOSS = Kernel(
    axes={"C": "positions of a chunk", "V": "vocabulary", "K": "records of a position, at most"},
    dtypes=FLOATS,
    variants={method: {"method": method} for method in METHODS}
    | {f"{method}, labels": {"method": method, "ce_weight": 0.3} for method in METHODS if method != "naive_fix"}
    | {f"{method}, a head": {"method": method} | HEAD for method in ("random_sampling", "ghost_token")},
    shapes=({"C": 9, "V": 157, "K": 12}, {"C": 4, "V": 1031, "K": 190}, {"C": 4, "V": 3, "K": 2}),
    full={"C": 2048, "V": 128_256, "K": 24},
    given=rows_of_a_loss,
    run=sparse_loss,
    reference=sparse_loss_by_torch,
    rounding=ROUNDING,
    bytes_moved=lambda shape, dtype: 2 * shape["C"] * shape["V"] * dtype.itemsize,
)


def rows_of_two(shape: Axes, dtype: torch.dtype, device: str, settings: Given) -> Given:
    given = rows_of_a_loss({**shape, "K": 1}, dtype, device, settings)
    teacher_CV = 2 * random((shape["C"], shape["V"]), dtype, device, seed=2)
    return {"teacher_CV": teacher_CV} | {n: given[n] for n in given if n not in ("token_ids", "probs", "offsets")}


def dense_loss(x_CV: Tensor, teacher_CV: Tensor, weights_C: Tensor, **rest: Any) -> Found:
    from sklformat.distill.kernels.dense_rows import run_dense

    labels_C = rest.pop("labels_C")
    if rest.get("ce_weight"):
        rest["labels_C"] = labels_C
    losses_C = run_dense(x_CV, teacher_CV, weights_C, **rest)
    return {"loss": losses_C.double().sum(), "grad_CV": x_CV}


def dense_loss_by_torch(
    x_CV: Tensor, teacher_CV: Tensor, weights_C: Tensor, labels_C: Tensor, *,
    ce_weight: float = 0.0, bias_V: Tensor | None = None, teacher_softcap: float | None = None, **head: Any,
) -> Found:  # fmt: skip
    teacher_CV = teacher_CV.double()
    if teacher_softcap is not None:
        teacher_CV = teacher_softcap * torch.tanh(teacher_CV / teacher_softcap)
    targets = DenseTargets(teacher_CV.softmax(1))

    def loss_of(logits_CV: Tensor) -> Tensor:
        return sparse_kl(
            logits_CV, targets, method="full", labels_P=labels_C, ce_weight=ce_weight, position_weights_P=weights_C,
            normaliser=1,
        )  # fmt: skip

    return gradient_of(x_CV, loss_of, bias_V, head)


DENSE_LOSS = Kernel(
    axes={"C": "positions of a chunk", "V": "vocabulary"},
    dtypes=FLOATS,
    variants={
        "plain": {},
        "labels": {"ce_weight": 0.4},
        "two heads": {"ce_weight": 0.4, "teacher_softcap": 2.0} | HEAD,
    },
    shapes=({"C": 9, "V": 157}, {"C": 4, "V": 1031}, {"C": 4, "V": 2}),
    full={"C": 2048, "V": 128_256},
    given=rows_of_two,
    run=dense_loss,
    reference=dense_loss_by_torch,
    rounding=ROUNDING,
    bytes_moved=lambda shape, dtype: 3 * shape["C"] * shape["V"] * dtype.itemsize,
)


# --- records ---


def stored_records(shape: Axes, _dtype: torch.dtype, device: str, settings: Given) -> Given:
    """Positions with none, one, some and many records in turn, each of ``rounds`` draws, as a profile stores them."""
    rng = np.random.default_rng(shape["P"])
    most, rounds = min(shape["K"], settings["rounds"]), settings["rounds"]
    numbers = np.array([(0, 1, most, most // 2 + 1)[p % 4] for p in range(shape["P"])])
    begins = np.repeat(numbers.cumsum() - numbers, numbers)
    place = np.arange(begins.size) - begins
    step = max(1, settings["vocab_size"] // (most + 1))
    ids = place * step + rng.integers(step, size=place.size)
    last = np.repeat(numbers, numbers) - 1 == place
    codes = np.where(last, rounds - place, 1)
    shift = 24 if settings["record_size"] == 4 else settings["id_bits"]
    words = (ids | codes << shift).astype("<u4").view(np.uint8).reshape(-1, 4)[:, : settings["record_size"]]
    return {
        "records": torch.from_numpy(words.ravel().copy()).to(device),
        "offsets": torch.from_numpy(np.concatenate([[0], numbers.cumsum()])).to(device),
    }


def decode(**given: Any) -> Found:
    from sklformat.distill.kernels.decode_counts import decode_counts

    return dict(zip(("token_ids", "probs", "fault"), decode_counts(**given), strict=True))


def decode_reference(**given: Any) -> Found:
    return dict(zip(("token_ids", "probs", "fault"), decode_by_torch(**given), strict=True))


def of_profile(name: str, vocab_size: int) -> Given:
    record_size = 4 if name == "R32" else 3
    return {"id_bits": layout.ID_BITS[name], "record_size": record_size, "rounds": 50, "vocab_size": vocab_size}


DECODE = Kernel(
    axes={"P": "positions", "K": "records of a position, at most"},
    dtypes=(torch.uint8,),
    variants={
        "R24": of_profile("R24", 128_256), "R24W": of_profile("R24W", 151_936), "R32": of_profile("R32", 1 << 20),
    },
    shapes=({"P": 9, "K": 12}, {"P": 5, "K": 50}, {"P": 1, "K": 1}),
    full={"P": 1 << 18, "K": 24},
    given=stored_records,
    run=decode,
    reference=decode_reference,
    rounding={torch.uint8: 0.0},
    bytes_moved=lambda shape, _: 11 * shape["P"] * (shape["K"] + 2 + shape["K"] // 2) // 4 + 8 * shape["P"],
)  # fmt: skip


KERNELS = {"draw_rows": DRAWS, "loss_rows": SPARSE_LOSS, "dense_rows": DENSE_LOSS, "decode_counts": DECODE}
"""By the names of their modules in ``sklformat.distill.kernels``."""
