"""
Train a student from a cache in TRL's SFTTrainer, with what it adds: its logs, its callbacks, PEFT by ``peft_config``.

    accelerate launch trl_sft.py CACHE STUDENT RUN

SFTTrainer takes datasets of the ``datasets`` library alone: here one of numbers, by which the collator reads sequences.
Where nothing of SFTTrainer is needed, ``SparseKDTrainer`` takes the same SFTConfig and does more: see docs/trainers.md.
"""

import argparse
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from trl import SFTConfig, SFTTrainer

from sklformat.distill import SparseLogitSequences, collate, linear_sparse_kl, run_to_head


class Collator:
    """Sequences by their numbers, as a dict of tensors."""

    def __init__(self, cache: str) -> None:
        self.sequences = SparseLogitSequences(cache)

    def __call__(self, rows: list[dict[str, int]]) -> dict[str, Tensor]:
        batch = collate([self.sequences[row["sequence"]] for row in rows], form="dict")
        if not self.sequences.isolated:  # documents see each other: positions count through
            batch.pop("position_ids", None)
        # The labels belong to their positions already: under this name the Trainer counts all of them.
        return batch | {"shift_labels": batch["labels"]}


class DistillingSFTTrainer(SFTTrainer):
    """SFTTrainer whose loss is the cache's; in evaluation too."""

    def compute_loss(
        self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        hidden, head, balance = run_to_head(model, inputs["input_ids"], inputs.get("position_ids"))
        total = (inputs["labels"] != -100).sum() if num_items_in_batch is None else num_items_in_batch
        loss = linear_sparse_kl(hidden, head, (inputs["target_ids"], inputs["target_probs"]), normaliser=total)
        if num_items_in_batch is not None:  # counted over micro-batches and processes, whose gradients are averaged
            loss = loss * (self.accelerator.num_processes if self.args.average_tokens_across_devices else 1)
            balance = balance / self.current_gradient_accumulation_steps
        loss = loss + balance
        return (loss, {"loss": loss}) if return_outputs else loss


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a student from a cache with TRL.")
    parser.add_argument("cache")
    parser.add_argument("student")
    parser.add_argument("run")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--log-every", type=int, default=10)
    parser.add_argument("--hold-out", type=int, default=0, help="sequences at the end of the cache to evaluate on")
    options = parser.parse_args()

    collator = Collator(options.cache)
    border = len(collator.sequences) - options.hold_out
    config = SFTConfig(
        options.run,
        max_steps=options.steps,
        per_device_train_batch_size=options.batch_size,
        gradient_accumulation_steps=options.accumulation,
        learning_rate=options.learning_rate,
        logging_steps=options.log_every,
        eval_strategy="steps" if options.hold_out else "no",
        prediction_loss_only=True,  # the loss makes no logits
        bf16=torch.cuda.is_available(),
        use_cpu=not torch.accelerator.is_available(),
        remove_unused_columns=False,  # or the numbers go
        dataset_kwargs={"skip_prepare_dataset": True},  # they are no text
        report_to=[],
    )
    trainer = DistillingSFTTrainer(
        options.student,
        config,
        data_collator=collator,
        train_dataset=Dataset.from_dict({"sequence": range(border)}),
        eval_dataset=Dataset.from_dict({"sequence": range(border, len(collator.sequences))})
        if options.hold_out
        else None,
    )
    trainer.train()
    trainer.save_model(options.run)


if __name__ == "__main__":
    main()
