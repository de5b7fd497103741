"""
Train a student with accelerate: any number of processes, mixed precision, accumulation, its own checkpoints.

    accelerate launch accelerate_loop.py CACHE STUDENT RUN --mixed-precision bf16

A step has ``--batch-size`` sequences on each process, ``--accumulation`` times.  At the end the student stands in
RUN/model, for transformers.
"""

import argparse
import itertools
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM

from sklformat.distill import Batch, SparseLogitDataset, linear_sparse_kl, output_head, run_to_head


class Progress:
    """What accelerate keeps beside weights, moments and random states."""

    def __init__(self, loader: dict) -> None:
        self.step, self.loader = 0, loader

    def state_dict(self) -> dict:
        return {"step": self.step, "loader": self.loader}

    def load_state_dict(self, state: dict) -> None:
        self.step, self.loader = state["step"], state["loader"]


def endless(dataset: SparseLogitDataset) -> Iterator[Batch]:
    """Epoch after epoch, from where the dataset stands."""
    for epoch in itertools.count(dataset.state_dict()["epoch"]):
        dataset.set_epoch(epoch)
        yield from dataset


def save(accelerator: Accelerator, run: Path, step: int) -> None:
    """A checkpoint gets its name when it is whole; then the older ones go."""
    accelerator.save_state(run / "partial")
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        older = list(run.glob("step-*"))
        (run / "partial").rename(run / f"step-{step:08}")
        for checkpoint in older:
            shutil.rmtree(checkpoint)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a student from a cache with accelerate.")
    parser.add_argument("cache")
    parser.add_argument("student")
    parser.add_argument("run", type=Path)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--mixed-precision", choices=["no", "bf16", "fp16"], default="no")
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--save-every", type=int, default=100)
    parser.add_argument("--log-every", type=int, default=10)
    options = parser.parse_args()

    micro = options.accumulation
    accelerator = Accelerator(
        mixed_precision=options.mixed_precision,
        gradient_accumulation_steps=micro,
        cpu=not torch.accelerator.is_available(),  # else it takes no notice of the other processes there
    )
    student = AutoModelForCausalLM.from_pretrained(options.student, dtype=torch.float32).train()
    output_head(student)  # tried once, while it is whole: prepare may divide it
    optimizer = torch.optim.AdamW(student.parameters(), lr=options.learning_rate)
    student, optimizer = accelerator.prepare(student, optimizer)
    # Made after the accelerator, it gives each process its share of every step; prepare would divide it again.
    dataset = SparseLogitDataset(options.cache, batch_size=options.batch_size, seed=0)
    progress = Progress(dataset.state_dict())
    accelerator.register_for_checkpointing(progress)
    if found := sorted(options.run.glob("step-*")):
        accelerator.load_state(found[-1])
        dataset.load_state_dict(progress.loader)

    batches = endless(dataset)
    for step in range(progress.step + 1, options.steps + 1):
        group = [batch.to(accelerator.device) for batch in itertools.islice(batches, micro)]
        count = sum((batch.labels != -100).sum() for batch in group) / micro
        # Gradients are averaged over micro-batches and processes, so each loss is divided by the mean count of one.
        count = accelerator.reduce(count, "mean")
        losses = []
        for batch in group:
            with accelerator.accumulate(student), accelerator.autocast():
                # What prepare gave is called, never what is inside: so the processes' gradients become one.
                hidden, head, balance = run_to_head(student, batch.input_ids)
                loss = linear_sparse_kl(hidden, head, batch.targets, normaliser=count)
                accelerator.backward(loss + balance)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(student.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.detach())
        progress.step, progress.loader = step, group[-1].state
        if step % options.log_every == 0 or step == options.steps:
            mean = accelerator.reduce(torch.stack(losses).mean(), "mean")
            accelerator.print(f"step {step}: {mean.item():.6f} nats per position", flush=True)
        if step % options.save_every == 0 or step == options.steps:
            save(accelerator, options.run, step)
    weights = accelerator.get_state_dict(student)
    if accelerator.is_main_process:
        accelerator.unwrap_model(student).save_pretrained(options.run / "model", state_dict=weights)
    student, optimizer = accelerator.free_memory(student, optimizer)  # gloo may wait for ever for what outlives it
    accelerator.end_training()


if __name__ == "__main__":
    main()
