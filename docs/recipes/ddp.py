"""
Train a student on several processes that each hold all of it, in a plain loop: DistributedDataParallel.

    torchrun --nproc-per-node 8 ddp.py CACHE STUDENT CHECKPOINT.pt

``--batch-size`` counts the sequences of a step over all processes.  The stream is the same for any number of them, so
that a run may be resumed on another number, too.
"""

import argparse
import gc
import itertools
import os
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM

from sklformat.distill import Batch, SparseLogitDataset, linear_sparse_kl, run_to_head


def save(checkpoint: Path, state: dict) -> None:
    """Replace the checkpoint as a whole, so that a crash leaves the old one or the new one."""
    partial = checkpoint.with_name(checkpoint.name + ".partial")
    torch.save(state, partial)
    partial.replace(checkpoint)


def endless(dataset: SparseLogitDataset) -> Iterator[Batch]:
    """Epoch after epoch, from where the dataset stands."""
    for epoch in itertools.count(dataset.state_dict()["epoch"]):
        dataset.set_epoch(epoch)
        yield from dataset


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a student from a cache on several processes.")
    parser.add_argument("cache")
    parser.add_argument("student")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--save-every", type=int, default=100)
    parser.add_argument("--log-every", type=int, default=10)
    options = parser.parse_args()

    dist.init_process_group()
    rank, world_size = dist.get_rank(), dist.get_world_size()
    if options.batch_size % world_size:
        parser.error(f"--batch-size {options.batch_size} cannot be divided among {world_size} processes")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
    student = AutoModelForCausalLM.from_pretrained(options.student, dtype=torch.float32).to(device).train()
    optimizer = torch.optim.AdamW(student.parameters(), lr=options.learning_rate)
    # Made after init_process_group, it gives each process its share of every step.
    dataset = SparseLogitDataset(options.cache, batch_size=options.batch_size // world_size, seed=0)
    done = 0
    if options.checkpoint.exists():
        found = torch.load(options.checkpoint, map_location=device, weights_only=True)
        student.load_state_dict(found["student"])
        optimizer.load_state_dict(found["optimizer"])
        dataset.load_state_dict(found["loader"])
        done = found["step"]
    ddp = DistributedDataParallel(student)

    batches = endless(dataset)
    for step in range(done + 1, options.steps + 1):
        batch = next(batches).to(device)
        count = (batch.labels != -100).sum()
        dist.all_reduce(count)  # the positions of the whole step
        torch.manual_seed(step * world_size + rank)  # dropout, where there is any, is the same after resuming
        # The wrapper is called, never what is inside: that is how it knows of the backward pass to come.
        hidden, head, balance = run_to_head(ddp, batch.input_ids)
        # It averages gradients over the processes, so each loss is divided by the mean count of one.
        loss = linear_sparse_kl(hidden, head, batch.targets, normaliser=count / world_size)
        (loss + balance).backward()
        torch.nn.utils.clip_grad_norm_(ddp.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % options.log_every == 0 or step == options.steps:
            mean = loss.detach() / world_size
            dist.all_reduce(mean)
            if rank == 0:
                print(f"step {step}: {mean.item():.6f} nats per position", flush=True)
        if rank == 0 and (step % options.save_every == 0 or step == options.steps):
            state = {"student": student.state_dict(), "optimizer": optimizer.state_dict()}
            save(options.checkpoint, state | {"loader": batch.state, "step": step})
    del ddp
    gc.collect()  # gloo may wait for ever at the end of a wrapper that outlives its group
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
