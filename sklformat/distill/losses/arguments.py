"""
What a loss is asked for, checked once: targets, labels, weights, and what they are divided by.

Values are read on the CPU alone, since reading them would hold up an accelerator at every step.

Shape letters: P positions, V vocabulary, D hidden size, N records.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sklformat.distill.losses.divergences import check_divergence, check_temperature
from sklformat.distill.losses.heads import OutputHead, Shape, Shard, refuse_sharded
from sklformat.distill.losses.methods import METHODS, segment_sum
from sklformat.distill.losses.targets import AnyTargets, DenseTargets, DenseTeacher, Ragged, RaggedTargets

IGNORED_LABEL = -100


class Arguments:
    """
    The arguments of one loss, each in the form that the passes over its rows take.

    Args:
        targets: Of P positions; a teacher's head is an OutputHead without low-rank parts.
        method: One of METHODS.
        labels_P: Read only where the method or ce_weight uses them.
        ce_weight: In [0, 1].
        position_weights_P: None: 1 everywhere.
        num_positions: P.
        vocab_size: V, of all processes together where the logits are divided among them.
        width: Of these the ids that are here.
        like: Logits or hidden states, for their device and type.
        normaliser: None: the weights of the positions that count here.
        shape: What makes logits of a head's product; None: the product is the logits.
        shard: Which of V ids the logits are of; None: all.
        divergence: One of DIVERGENCES.
        temperature: T > 0, by which the logits of student and teacher are divided; the weights carry its square.

    Raises:
        ValueError: They do not fit each other, or hold what cannot be.
    """

    def __init__(
        self,
        targets: AnyTargets,
        method: str,
        labels_P: Tensor | None,
        ce_weight: float,
        position_weights_P: Tensor | None,
        *,
        num_positions: int,
        vocab_size: int,
        width: int,
        like: Tensor,
        normaliser: Tensor | float | None = None,
        shape: Shape | None = None,
        shard: Shard | None = None,
        divergence: str = "forward_kl",
        temperature: float = 1.0,
    ) -> None:
        refuse_sharded("what the loss is taken of", like)
        self.method, self.ce_weight, self.shard = method, ce_weight, shard
        self.divergence, self.temperature = divergence, temperature
        self.num_positions, self.vocab_size, self.width = num_positions, vocab_size, width
        self.device = like.device
        self.dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        if method not in METHODS:
            raise ValueError(f"method {method!r} is unknown; one of {', '.join(METHODS)}")
        check_divergence(divergence, method)
        check_temperature(temperature)
        if not 0 <= ce_weight <= 1:
            raise ValueError(f"ce_weight {ce_weight} is outside [0, 1]")
        if not like.is_floating_point():
            raise ValueError(f"logits or hidden states have type {like.dtype}; need a float type")
        self.shape = Shape.tempered(shape, temperature)
        self.dense: DenseTargets | DenseTeacher | None = None
        self.teacher_shape: Shape | None = None
        self.ragged: RaggedTargets | None = None
        if (method == "full") != isinstance(targets, DenseTargets | DenseTeacher):
            raise ValueError(
                f"method {method!r} with {type(targets).__name__}: DenseTargets, DenseTeacher go with 'full'"
            )
        if isinstance(targets, DenseTargets | DenseTeacher):
            counted_P = self._check_dense(targets)
        else:
            counted_P = self._check_ragged(Ragged.of(targets) if isinstance(targets, tuple) else targets)
        self.labels_P: Tensor | None = None
        if ce_weight > 0 or method == "naive_fix":
            self.labels_P = self._check_labels(labels_P)
            counted_P = counted_P & (self.labels_P != IGNORED_LABEL)
        weights_P = counted_P.to(self.dtype)
        if position_weights_P is not None:
            self._check_shape("position_weights_P", position_weights_P, (num_positions,))
            if self._checks_values and not bool(((position_weights_P >= 0) & position_weights_P.isfinite()).all()):
                raise ValueError("position_weights_P holds a weight that is negative or not finite")
            weights_P = torch.where(counted_P, position_weights_P.detach().to(self.dtype), weights_P)
        own_total = weights_P.sum()
        self.weights_P = weights_P if temperature == 1 else weights_P * temperature**2
        total = own_total if normaliser is None else self._check_normaliser(normaliser, own_total)
        # Where nothing counts, value and gradients are 0, on every device without asking.
        self.total = torch.where(own_total > 0, total, torch.ones_like(total))

    @property
    def _checks_values(self) -> bool:
        # Reading a value of an accelerator's tensor would hold up the host at every step.
        return self.device.type == "cpu"

    def _check_shape(self, name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} has shape {list(tensor.shape)}; need {list(shape)}")

    def _check_normaliser(self, normaliser: Tensor | float, own_total: Tensor) -> Tensor:
        total = torch.as_tensor(normaliser).detach().to(own_total, non_blocking=True)
        if total.numel() != 1:
            raise ValueError(f"normaliser has shape {list(total.shape)}; need one number, the positions to divide by")
        if self._checks_values and not 0 <= float(total) < math.inf:
            raise ValueError(f"normaliser is {float(total)}; need a finite number of positions")
        if self._checks_values and float(total) == 0 < float(own_total):
            raise ValueError(
                f"normaliser is 0, and positions of weight {float(own_total):g} count here; "
                "sum what counts over all micro-batches and processes"
            )
        return total.reshape(())

    def _check_dense(self, targets: DenseTargets | DenseTeacher) -> Tensor:
        if isinstance(targets, DenseTargets):
            self._check_shape("probs_PV", targets.probs_PV, (self.num_positions, self.width))
        else:
            hidden_PD, head = targets.hidden_PD, targets.head
            assert isinstance(head, OutputHead)
            self._check_shape("the teacher's hidden_PD", hidden_PD, (self.num_positions, *hidden_PD.shape[1:]))
            self._check_shape("the teacher's head", head.weight, (self.width, *hidden_PD.shape[1:]))
            self.teacher_shape = Shape.tempered(Shape.of(head), self.temperature)
            targets = DenseTeacher(hidden_PD, head.weight)
        self.dense = targets
        return torch.ones(self.num_positions, dtype=torch.bool, device=self.device)

    def _check_ragged(self, targets: RaggedTargets) -> Tensor:
        ids, probs, offsets = targets.token_ids, targets.probs, targets.offsets
        if ids.is_floating_point() or not probs.is_floating_point() or offsets.dtype != torch.int64:
            raise ValueError(
                f"token_ids, probs, offsets have types {ids.dtype}, {probs.dtype}, {offsets.dtype}; "
                "need an integer, a float, int64"
            )
        self._check_shape("token_ids", ids, tuple(probs.shape[:1]))
        self._check_shape("probs", probs, tuple(ids.shape))
        if offsets.shape != (self.num_positions + 1,):
            raise ValueError(f"offsets has shape {list(offsets.shape)}; need [{self.num_positions + 1}], positions + 1")
        if self._checks_values:
            self._check_records(ids.long(), probs, offsets)
        if self.method == "topk_normalised" and self.temperature != 1:  # the teacher's on these ids, up to their sum
            targets = Ragged(ids, probs.detach().to(self.dtype).pow(1 / self.temperature), offsets)
        self.ragged = targets
        return (offsets.diff() > 0).to(self.device, non_blocking=True)

    def _check_records(self, ids: Tensor, probs: Tensor, offsets: Tensor) -> None:
        if int(offsets[0]) != 0 or int(offsets[-1]) != len(ids) or bool((offsets.diff() < 0).any()):
            raise ValueError(f"offsets must rise from 0 to the number of records, {len(ids)}")
        if len(ids) == 0:
            return
        low, high = (int(v) for v in ids.aminmax())
        if low < 0 or high >= self.vocab_size:
            raise ValueError(f"token_ids go from {low} to {high}; outside [0, {self.vocab_size})")
        if not bool(((probs >= 0) & probs.isfinite()).all()):
            raise ValueError("probs holds a value that is negative or not finite")
        rows_N = torch.repeat_interleave(offsets.diff(), output_size=len(ids))
        keys_N = rows_N * self.vocab_size + ids
        if bool((keys_N.diff() <= 0).any()) and bool((keys_N.sort().values.diff() == 0).any()):
            raise ValueError("token_ids repeat within a position; add up their probs first")
        if self.method in ("label_smoothing", "ghost_token", "naive_fix"):
            most = float(segment_sum(probs.float(), offsets).max())
            if most > 1 + 1e-3:
                raise ValueError(f"probs of a position sum to {most}; method {self.method!r} needs at most 1")
        if self.method == "topk_normalised":
            sums_P = segment_sum(probs.float(), offsets)
            if bool(((offsets.diff() > 0) & (sums_P == 0)).any()):
                raise ValueError("probs of a position sum to 0, which cannot be normalised; leave its records out")

    def _check_labels(self, labels_P: Tensor | None) -> Tensor:
        if labels_P is None:
            raise ValueError(f"labels_P is missing; method {self.method!r} with ce_weight {self.ce_weight} needs it")
        self._check_shape("labels_P", labels_P, (self.num_positions,))
        if self._checks_values:
            bad = (labels_P != IGNORED_LABEL) & ((labels_P < 0) | (labels_P >= self.vocab_size))
            if bool(bad.any()):
                raise ValueError(f"label {int(labels_P[bad][0])} is outside [0, {self.vocab_size}) and not -100")
        return labels_P.long()


def matmul_dtype(name: str, hidden_PD: Tensor, weight_VD: Tensor) -> torch.dtype:
    """Type of the products of hidden states and weight: autocast's where it is on, else the one type of both."""
    if hidden_PD.dim() != 2 or weight_VD.dim() != 2 or hidden_PD.shape[1] != weight_VD.shape[1]:
        raise ValueError(
            f"{name} has shape {list(hidden_PD.shape)}, its head's weight {list(weight_VD.shape)}; "
            "need [positions, D] and [V, D]"
        )
    device = hidden_PD.device.type
    if torch.is_autocast_enabled(device) and torch.float64 not in (hidden_PD.dtype, weight_VD.dtype):
        return torch.get_autocast_dtype(device)
    if hidden_PD.dtype != weight_VD.dtype:
        raise ValueError(f"{name} has type {hidden_PD.dtype}, its head's weight {weight_VD.dtype}; need one type")
    return hidden_PD.dtype
