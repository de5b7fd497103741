"""
A plugin of Axolotl: training from a cache, asked for in Axolotl's own YAML.

    plugins: [sklformat.integrations.axolotl.SparseKDPlugin]
    sparse_kd: {cache: my-cache, hold_out: 500, method: random_sampling, ce_weight: 0.1}

``datasets`` is left out of it: the sequences are the cache's, and where Axolotl could not load this plugin, which it
says and does not stop for, it then has nothing to train on.  Optimizers, schedules, adapters and sharding are
Axolotl's, data and loss those of ``SparseKDTrainer``.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel, ConfigDict, model_validator

from sklformat.cache.reader import open_cache
from sklformat.distill.loader.sequences import SparseLogitSequences
from sklformat.distill.student.inputs import check_method
from sklformat.errors import SettingsError
from sklformat.integrations.arguments import LossArguments

_PLACE = __name__  # where Axolotl finds what it is told by name
# What would make, cut or put together sequences, or ask for a loss that is not that of the records.
_NOT_BESIDE = (
    "pretraining_dataset", "test_datasets", "sample_packing", "eval_sample_packing", "rl",
    "reward_model", "process_reward_model", "use_eaft", "curriculum_sampling", "kd_trainer",
)  # fmt: skip


class SparseKDSettings(BaseModel):
    """What ``sparse_kd`` holds in the YAML, as ``SparseKDTrainer`` takes it; any other name is refused."""

    model_config = ConfigDict(extra="forbid")

    cache: str
    hold_out: int = 0
    method: str = "random_sampling"
    ce_weight: float = 0.0
    divergence: str = "forward_kl"
    temperature: float = 1.0
    lr_ratio: float = 1.0
    easy_percentile: float = 50.0

    @model_validator(mode="after")
    def _check_loss(self) -> SparseKDSettings:
        """What does not go together is refused with the YAML, before a model is loaded."""
        LossArguments(**self.model_dump(exclude={"cache", "hold_out"}))
        return self


class SparseKDArgs(BaseModel):
    """The names that this plugin adds to Axolotl's YAML."""

    sparse_kd: SparseKDSettings


@dataclass
class SparseKDTrainingArgs:
    """The names that it adds to Axolotl's training arguments."""

    sparse_kd: dict[str, Any] | None = None


class SparseKDPlugin(BasePlugin):  # type: ignore[misc]  # axolotl has no types
    """Trains on a cache instead of datasets; see the module for what to write into the YAML."""

    def register(self, cfg: dict[str, Any]) -> None:
        """
        Check the YAML before Axolotl does, and name the cache as its dataset, without which Axolotl takes no YAML.

        Raises:
            SettingsError: ``sparse_kd`` names no cache, or the YAML asks for other data or another loss beside it.
        """
        settings = cfg.get("sparse_kd") or {}
        if not settings.get("cache"):
            raise SettingsError("the YAML asks for SparseKDPlugin and names no cache; add sparse_kd: {cache: my-cache}")
        # As Axolotl would have it; it registers a plugin twice at times.
        ours = {"datasets": [{"path": str(settings["cache"])}], "val_set_size": float(settings.get("hold_out") or 0)}
        given = [name for name in _NOT_BESIDE if cfg.get(name)]
        given += [name for name, value in ours.items() if cfg.get(name) and cfg[name] != value]
        if given:
            raise SettingsError(
                f"sparse_kd: {settings['cache']} has the sequences and the loss; take {', '.join(given)} out of the "
                "YAML (sparse_kd.hold_out keeps sequences to evaluate on)"
            )
        cfg.update(ours)

    def get_input_args(self) -> str:
        """The model of ``sparse_kd``."""
        return f"{_PLACE}.{SparseKDArgs.__name__}"

    def get_training_args_mixin(self) -> str:
        """The training arguments that carry it to the trainer."""
        return f"{_PLACE}.{SparseKDTrainingArgs.__name__}"

    def get_training_args(self, cfg: Any) -> dict[str, Any]:
        """Its values."""
        return {"sparse_kd": dict(cfg.sparse_kd)}

    def get_trainer_cls(self, cfg: Any) -> type:  # noqa: ARG002  Axolotl's signature
        """``SparseKDTrainer`` with Axolotl's optimizers, schedules and checkpoints."""
        return _trainer_class()

    def load_datasets(self, cfg: Any, preprocess: bool = False) -> Any:  # noqa: ARG002  as above
        """
        The sequences of the cache, as Axolotl counts them; the trainer reads its own stream.

        Raises:
            SettingsError: ``hold_out`` leaves nothing to train on, or the method does not fit the records.
        """
        from axolotl.common.datasets import TrainDatasetMeta  # noqa: PLC0415  it loads what Axolotl patches later

        settings = SparseKDSettings(**cfg.sparse_kd)
        cache = open_cache(settings.cache)
        check_method(cache, settings.method)
        border = len(cache) - settings.hold_out
        if not 0 < border <= len(cache):
            raise SettingsError(
                f"{settings.cache} has {len(cache)} sequences, sparse_kd.hold_out is {settings.hold_out}"
            )
        train = SparseLogitSequences(cache, sequences=range(border))
        held_out = SparseLogitSequences(cache, sequences=range(border, len(cache))) if settings.hold_out else None
        steps = math.ceil(len(train) * cfg.num_epochs / cfg.batch_size)
        return TrainDatasetMeta(train, held_out, min(cfg.max_steps or steps, steps))


@functools.cache
def _trainer_class() -> type:
    from axolotl.core.trainers.base import AxolotlTrainer  # noqa: PLC0415  after Axolotl has patched what it imports

    from sklformat.integrations.transformers import SparseKDTrainer  # noqa: PLC0415  it loads transformers

    class AxolotlSparseKDTrainer(SparseKDTrainer, AxolotlTrainer):  # type: ignore[misc]  # as BasePlugin
        """SparseKDTrainer where Axolotl makes a trainer: the datasets and collators that it hands over are not used."""

        def __init__(
            self, model: Any, args: Any, *, train_dataset: Any, eval_dataset: Any, data_collator: Any, **others: Any
        ) -> None:
            del train_dataset, eval_dataset, data_collator
            super().__init__(model, args, **args.sparse_kd, **others)

    return AxolotlSparseKDTrainer
