"""
Train a student with Lightning: a module, a data module, and a trainer that resumes in the middle of an epoch.

    python lightning_module.py CACHE STUDENT RUN --devices 8

``--batch-size`` counts the sequences of a step over all processes.  For Lightning the stream is one epoch without an
end; where it stands is part of each checkpoint, as the batch of the step says it, however far Lightning reads ahead.
At the end the student stands in RUN/model, for transformers.
"""

import argparse
import itertools
from collections.abc import Iterator
from pathlib import Path

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from transformers import AutoModelForCausalLM

from sklformat.distill import Batch, SparseLogitDataset, linear_sparse_kl, run_to_head


def endless(dataset: SparseLogitDataset) -> Iterator[Batch]:
    """Epoch after epoch, from where the dataset stands."""
    for epoch in itertools.count(dataset.state_dict()["epoch"]):
        dataset.set_epoch(epoch)
        yield from dataset


class Student(lightning.LightningModule):
    """Any causal language model of transformers.  Lightning's wrapper calls training_step, so all in it is inside."""

    def __init__(self, student: str, learning_rate: float) -> None:
        super().__init__()
        self.student = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32).train()
        self.learning_rate = learning_rate

    def training_step(self, batch: Batch) -> torch.Tensor:
        # Dropout, where there is any, is the same after resuming.
        torch.manual_seed(self.global_step * self.trainer.world_size + self.global_rank)
        # Gradients are averaged over the processes, so each loss is divided by the mean count of one.
        count = self.trainer.strategy.reduce((batch.labels != -100).sum().float(), reduce_op="mean")
        hidden, head, balance = run_to_head(self.student, batch.input_ids)
        loss = linear_sparse_kl(hidden, head, batch.targets, normaliser=count)
        self.log("loss", loss, sync_dist=True, prog_bar=True, batch_size=len(batch.input_ids))
        self.trainer.datamodule.state = batch.state
        return loss + balance

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.learning_rate)


class Stream(lightning.LightningDataModule):
    """Batches of a cache, epoch after epoch, from where the last checkpoint stands."""

    def __init__(self, cache: str, batch_size: int) -> None:
        super().__init__()
        self.cache, self.batch_size = cache, batch_size

    def setup(self, stage: str) -> None:  # noqa: ARG002
        # Called when the processes have met: the dataset gives each its share of every step.
        self.dataset = SparseLogitDataset(self.cache, batch_size=self.batch_size // self.trainer.world_size, seed=0)
        self.state = self.dataset.state_dict()

    def train_dataloader(self) -> Iterator[Batch]:
        return endless(self.dataset)

    def state_dict(self) -> dict:
        return self.state

    def load_state_dict(self, state: dict) -> None:
        self.state = state
        self.dataset.load_state_dict(state)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a student from a cache with Lightning.")
    parser.add_argument("cache")
    parser.add_argument("student")
    parser.add_argument("run", type=Path)
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--precision", choices=["32-true", "bf16-mixed"], default="32-true")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--save-every", type=int, default=100)
    parser.add_argument("--log-every", type=int, default=10)
    options = parser.parse_args()
    if options.batch_size % options.devices:
        parser.error(f"--batch-size {options.batch_size} cannot be divided among {options.devices} processes")

    trainer = lightning.Trainer(
        devices=options.devices,
        strategy="ddp" if options.devices > 1 else "auto",
        use_distributed_sampler=False,  # the stream is divided already
        precision=options.precision,
        max_steps=options.steps,
        gradient_clip_val=1.0,
        logger=CSVLogger(options.run),
        log_every_n_steps=options.log_every,
        callbacks=[
            # Without a counter, so that there is one last.ckpt.
            ModelCheckpoint(
                options.run, every_n_train_steps=options.save_every, save_last=True, enable_version_counter=False
            )
        ],
    )
    student, stream = Student(options.student, options.learning_rate), Stream(options.cache, options.batch_size)
    last = options.run / "last.ckpt"
    trainer.fit(student, stream, ckpt_path=last if last.exists() else None)
    trainer.save_checkpoint(last)  # after the last step, where ModelCheckpoint may have saved none
    if trainer.is_global_zero:
        student.student.save_pretrained(options.run / "model")


if __name__ == "__main__":
    main()
