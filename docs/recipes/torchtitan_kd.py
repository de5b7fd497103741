"""
Train a torchtitan model from a cache: its loader, its loss inside torchtitan's chunks, its trainer.

    PYTHONPATH=. torchrun --nproc-per-node 8 -m torchtitan.train --module torchtitan_kd --config llama3_debugmodel \
        --dataloader.dataset-path CACHE --training.seq-len 512 --hf-assets-path TOKENIZER

For another model add a function below that gives its config to ``distilled``.  Runs under FSDP and HSDP; what splits a
sequence or the vocabulary (context, pipeline and tensor parallelism) would part the targets from their logits and is
refused.  torchtitan's validator hands no targets to the loss: measure with ``sklformat eval`` instead.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torchtitan.components.dataloader import BaseDataLoader
from torchtitan.components.loss import BaseLoss, ChunkedLossWrapper
from torchtitan.models.llama3 import config_registry as llama3
from torchtitan.trainer import Trainer

from sklformat.distill import SparseLogitDataset, sparse_kl

TARGETS = ("target_ids", "target_probs")  # both [B, T, K]: padded, since torchtitan cuts what has a place per token


class CacheLoader(BaseDataLoader):
    """The batches of a cache, epoch after epoch; its state resumes on any number of ranks."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseDataLoader.Config):
        """``dataset_path`` is the cache; ``k`` cuts positions off at their k heaviest records, which is biased."""

        seed: int = 0
        k: int | None = None
        num_workers: int = 0

    def __init__(
        self, config: Config, *, dp_world_size: int, dp_rank: int, seq_len: int, local_batch_size: int, **_: Any
    ) -> None:
        self.config = config
        self.dataset = SparseLogitDataset(
            config.dataset_path, local_batch_size, config.seed, rank=dp_rank, world_size=dp_world_size
        )
        self.state = self.dataset.state_dict()
        stored = self.dataset.cache.header.seq_len
        if stored != seq_len:
            raise ValueError(f"the cache has sequences of {stored} positions; give --training.seq-len {stored}")

    def __iter__(self) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        epoch = self.state["epoch"]
        while True:
            self.dataset.set_epoch(epoch)  # after load_state_dict: the rest of its epoch
            for batch in DataLoader(self.dataset, batch_size=None, num_workers=self.config.num_workers):
                self.state = batch.state  # of the batch that is trained on, not of one that is made ahead
                positions = torch.arange(batch.input_ids.shape[1]).expand_as(batch.input_ids)
                inputs = {
                    "input": batch.input_ids,
                    "positions": batch.position_ids if self.dataset.isolated else positions,
                    **dict(zip(TARGETS, batch.padded(self.config.k)[:2], strict=True)),
                }
                yield inputs, batch.labels
            epoch += 1

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.dataset.load_state_dict(state_dict)
        self.state = state_dict


class SparseKL(BaseLoss):
    """The loss of a chunk's logits; ``ChunkedLossWrapper`` cuts the targets as it cuts the labels."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseLoss.Config):
        method: str = "random_sampling"
        ce_weight: float = 0.0
        divergence: str = "forward_kl"

    def __init__(self, config: Config, **_: Any) -> None:
        self.config = config  # sparse_kl has a backward pass of its own: there is nothing to compile

    def __call__(
        self,
        pred: Tensor,
        labels: Tensor,
        global_valid_tokens: Tensor | None = None,
        *,
        target_ids: Tensor,
        target_probs: Tensor,
        **_: Any,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        loss = sparse_kl(
            pred.flatten(0, 1),
            (target_ids, target_probs),
            method=self.config.method,
            divergence=self.config.divergence,
            labels_P=labels.flatten(),
            ce_weight=self.config.ce_weight,
            normaliser=1 if global_valid_tokens is None else global_valid_tokens,
        )
        return loss, {}


class KDTrainer(Trainer):
    """torchtitan's trainer, which would give the targets to the model, and only ``positions`` to the loss."""

    @dataclass(kw_only=True, slots=True)
    class Config(Trainer.Config):
        pass

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        dims = self.parallel_dims
        if dims.cp_enabled or dims.pp_enabled or dims.tp_enabled:
            raise ValueError("the targets stay whole: use data parallelism alone (FSDP, HSDP), not CP, PP or TP")

    def post_dataloading_process(
        self, input_dict: dict[str, Tensor], labels: Tensor
    ) -> tuple[Tensor, Tensor, dict[str, Any]]:
        of_model = {name: value for name, value in input_dict.items() if name not in TARGETS}
        inputs, labels, extra = super().post_dataloading_process(of_model, labels)
        return inputs, labels, extra | {name: input_dict[name] for name in TARGETS}

    def _forward_backward_body(
        self, inputs: Tensor, labels: Tensor, global_valid_tokens: Tensor, extra_kwargs: dict[str, Any]
    ) -> Tensor:
        of_model = {name: value for name, value in extra_kwargs.items() if name not in TARGETS}
        targets = {name: extra_kwargs[name] for name in TARGETS}
        with self.train_context():
            pred = self.model_parts[0](inputs, **of_model)
            loss, _ = self.loss_fn(pred, labels, global_valid_tokens, **targets)
            loss.backward()
        return loss


def distilled(config: Trainer.Config) -> KDTrainer.Config:
    """A config of torchtitan's, with a cache for its data."""
    kept = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    out = KDTrainer.Config(**kept)
    out.loss = ChunkedLossWrapper.Config(loss_fn=SparseKL.Config())
    out.dataloader = CacheLoader.Config()
    out.training.disable_cuda_graphs = True  # picking the records synchronises
    out.validator.enable = False
    return out


def llama3_debugmodel() -> KDTrainer.Config:
    return distilled(llama3.llama3_debugmodel())
