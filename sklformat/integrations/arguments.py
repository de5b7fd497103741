"""
Arguments that contradict each other, or would quietly spoil distillation from a cache, refused by name.

Knows those of a trainer by their names alone, so that it holds for every version of transformers and loads none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from sklformat.distill.loader.teachers import Teachers
from sklformat.distill.losses.confidence import check_rates
from sklformat.distill.losses.divergences import check_divergence, check_temperature
from sklformat.settings.train import Decode, Divergence

Method = Literal[
    "random_sampling", "topk", "topk_normalised", "label_smoothing", "ghost_token", "naive_fix", "ce"
]  # fmt: skip

_OURS = (
    "train_dataset", "eval_dataset", "data_collator", "compute_loss_func", "compute_metrics",
    "preprocess_logits_for_metrics",
)  # fmt: skip


def check_arguments(args: Any, others: Mapping[str, Any]) -> None:
    """
    Look at arguments before a trainer is made.

    Args:
        args: A TrainingArguments.
        others: What else the trainer is to be made with.

    Raises:
        ValueError: Names the argument, and what to use instead.
    """
    given = [name for name in _OURS if others.get(name) is not None]
    if given:
        raise ValueError(
            f"SparseKDTrainer takes no {', '.join(given)}: its sequences come from cache, hold_out and eval_cache, and "
            "its loss and figures are its own; figures of yours belong into a callback's on_evaluate"
        )
    strategy = getattr(args, "train_sampling_strategy", "random")
    if getattr(args, "group_by_length", False):  # of earlier versions
        strategy = "group_by_length"
    parallel = getattr(args, "parallelism_config", None)
    divided = [f"{kind}_size" for kind in ("tp", "cp", "sp") if (getattr(parallel, f"{kind}_size", 1) or 1) > 1]
    reads = "each process reads its own share, and per_device_train_batch_size is of one process"
    refused = {
        "label_smoothing_factor": (args.label_smoothing_factor, 'method="label_smoothing" is its like for records'),
        "dispatch_batches": (args.accelerator_config.dispatch_batches, reads),
        "split_batches": (args.accelerator_config.split_batches, reads),
        f"{strategy} sampling": (
            strategy not in ("random", "sequential"), "window= keeps sequences of like length together"
        ),
        "dataloader_in_order=False": (not getattr(args, "dataloader_in_order", True), "it could not resume exactly"),
        "deepspeed": (args.deepspeed, "use fsdp"),
        ", ".join(divided): (divided, "processes must not share sequences; use data parallelism"),
        f"{args.n_gpu} GPUs in one process": (args.n_gpu > 1, "start one process for each with torchrun"),
    }  # fmt: skip
    for name, (is_given, instead) in refused.items():
        if is_given:
            raise ValueError(f"{name} would spoil training from a cache: {instead}")


@dataclass(frozen=True, kw_only=True)
class LossArguments:
    """
    How the loss is taken from the records, as every integration takes it.

    Attributes:
        method: As in ``sparse_kl``, "full" apart; "ce": cross-entropy on the text's own next token.
        ce_weight: As in ``sparse_kl``.
        divergence: As in ``sparse_kl``.
        temperature: As in ``sparse_kl``; of "topk_normalised" alone, whose records are logits on their ids.
        lr_ratio: As in ``easy_hard_weights``.
        easy_percentile: As in ``easy_hard_weights``.

    Raises:
        ValueError: One is out of range, or does not go with the method.
    """

    method: Method = "random_sampling"
    ce_weight: float = 0.0
    divergence: Divergence = "forward_kl"
    temperature: float = 1.0
    lr_ratio: float = 1.0
    easy_percentile: float = 50.0

    def __post_init__(self) -> None:
        if self.method not in get_args(Method):
            raise ValueError(f"method is {self.method!r}; one of {', '.join(get_args(Method))}")
        if not 0 <= self.ce_weight <= 1 or (self.method == "ce" and self.ce_weight):
            raise ValueError(
                f"ce_weight is {self.ce_weight}, method {self.method}; need 0..1, and 0 where ce is the method"
            )
        check_divergence(self.divergence, self.method)
        check_rates(self.lr_ratio, self.easy_percentile)
        if self.lr_ratio == 1 and self.easy_percentile != LossArguments.easy_percentile:
            raise ValueError(f"easy_percentile is {self.easy_percentile}, and belongs to an lr_ratio, which is 1")
        check_temperature(self.temperature)
        if self.method == "ce" and self.divergence != "forward_kl":
            raise ValueError(f"divergence is {self.divergence!r}, method 'ce', which is cross-entropy and nothing else")
        if self.temperature != 1 and self.method != "topk_normalised":
            raise ValueError(
                f"temperature is {self.temperature}, method {self.method!r}: records keep the temperature of their "
                "capture; only topk_normalised has the teacher's logits on their ids"
            )

    @property
    def of_loss(self) -> dict[str, Any]:
        """What ``linear_sparse_kl`` is asked for; the divergence from all of the probability on the label is CE."""
        method = "random_sampling" if self.method == "ce" else self.method
        return {
            "method": method,
            "ce_weight": self.ce_weight,
            "divergence": self.divergence,
            "temperature": self.temperature,
        }

    def named(self, logs: dict[str, float], mean: float) -> dict[str, float]:
        """A line of the log, with the mean loss under the name that it has where it is one figure."""
        is_plain = self.divergence == "forward_kl" and self.temperature == self.lr_ratio == 1 and not self.ce_weight
        if not is_plain or self.method not in _NAMES:
            return logs
        return {"loss": logs["loss"], _NAMES[self.method]: mean, **logs}

    def mixture(self, lm_loss: float, kl_to_records: float) -> float:
        """Of the two figures of an evaluation, as cross-entropy is mixed in."""
        alpha = 1.0 if self.method == "ce" else self.ce_weight
        return alpha * lm_loss + (1 - alpha) * kl_to_records


_NAMES = {"random_sampling": "kl_to_records", "topk": "kl_to_records", "ce": "cross_entropy"}


def check_decode(decode: str, loss: LossArguments) -> None:
    """
    Look at where records are to be decoded.

    Raises:
        ValueError: There is no such way, or it does not fit the method or the rates.
    """
    if decode not in get_args(Decode) or (loss.method == "ce" and decode == "cuda"):
        raise ValueError(
            f"decode is {decode!r}, method {loss.method}; one of auto, cpu, cuda, which ce has no records for"
        )
    if decode == "cuda" and loss.lr_ratio != 1:
        raise ValueError(
            f"decode is 'cuda', lr_ratio {loss.lr_ratio}, for which the host reads the records; decode=\"cpu\""
        )


def check_hold_out(cache: Any, available: int, hold_out: int, eval_cache: Any) -> range:
    """
    Look at what is to be evaluated on.

    Args:
        cache: One, or several.
        available: Sequences of the first.
        hold_out: How many of them to hold out.
        eval_cache: What else to evaluate on.

    Returns:
        What is left to train on.

    Raises:
        ValueError: There are several caches, too few sequences, or something else to evaluate on.
    """
    several = isinstance(cache, list | tuple | Teachers)
    if several:
        raise ValueError(f"hold_out is {hold_out}, and is of one cache; with several, or Teachers, give eval_cache")
    if eval_cache is not None:
        raise ValueError(f"hold_out is {hold_out}, and eval_cache is given; evaluation is on one of the two")
    if not 0 < hold_out < available:
        raise ValueError(f"hold_out is {hold_out} of {available} sequences; it must leave some to train on")
    return range(available - hold_out)


def check_launched(args: Any, accelerator: Any, model: Any) -> None:
    """
    Look at what shows only once a trainer has set up its processes.

    Raises:
        ValueError: FSDP is asked for where nothing would be sharded, or its first version is; or the model is in parts
            on processes that would have to share sequences.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if args.fsdp and plugin is None:
        raise ValueError(
            f"fsdp is asked for, and accelerate does not shard on {args.device.type}, where each process would hold "
            "the whole student; leave fsdp out, or load the student sharded (transformers' distributed_config)"
        )
    if plugin is not None and plugin.fsdp_version != 2:
        raise ValueError('fsdp of version 1 hides the head from the loss; give fsdp_config={"version": 2}')
    if (getattr(model, "_tp_size", None) or 1) > 1:
        raise ValueError(
            "the student is loaded with tensor parallelism, where processes share sequences; use fsdp_size"
        )


def precision_note(model: Any) -> str:
    """What whoever trains weights of fewer than 32 bits may want to know; "" for all others."""
    learning = {parameter.dtype for parameter in model.parameters() if parameter.requires_grad}
    low = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in learning if dtype.itemsize < 4))
    if not low:
        return ""
    return (
        f"the student learns in {low}, where small updates are rounded away; load it with dtype=torch.float32 "
        "(bf16=True still runs the matrix products in bfloat16)"
    )
