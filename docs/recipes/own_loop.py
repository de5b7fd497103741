"""
Train a transformers student from a cache in a plain loop that resumes exactly where it stopped.

    python own_loop.py CACHE STUDENT CHECKPOINT.pt

The checkpoint holds the state of the batch that was trained on last; the loader resumes right after it.  One process;
ddp.py and fsdp2.py are for several.
"""

import argparse
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from sklformat.distill import SparseLogitDataset, linear_sparse_kl, run_to_head


def save(checkpoint: Path, state: dict) -> None:
    """Replace the checkpoint as a whole, so that a crash leaves the old one or the new one."""
    partial = checkpoint.with_name(checkpoint.name + ".partial")
    torch.save(state, partial)
    partial.replace(checkpoint)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a student from a cache.")
    parser.add_argument("cache")
    parser.add_argument("student")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--num-workers", type=int, default=0)
    parser.add_argument("--save-every", type=int, default=100)
    options = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    student = AutoModelForCausalLM.from_pretrained(options.student, dtype=torch.float32).to(device).train()
    optimizer = torch.optim.AdamW(student.parameters(), lr=options.learning_rate)
    dataset = SparseLogitDataset(options.cache, batch_size=options.batch_size, seed=0)
    step = 0
    if options.checkpoint.exists():
        found = torch.load(options.checkpoint, map_location=device, weights_only=True)
        student.load_state_dict(found["student"])
        optimizer.load_state_dict(found["optimizer"])
        dataset.load_state_dict(found["loader"])
        step = found["step"]

    epoch = dataset.state_dict()["epoch"]
    while step < options.steps:
        dataset.set_epoch(epoch)  # after load_state_dict: the rest of its epoch
        for loaded in DataLoader(dataset, batch_size=None, num_workers=options.num_workers):
            batch = loaded.to(device)
            hidden, head, balance = run_to_head(student, batch.input_ids)
            loss = linear_sparse_kl(hidden, head, batch.targets)
            (loss + balance).backward()
            torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            if step % options.save_every == 0 or step == options.steps:
                state = {"student": student.state_dict(), "optimizer": optimizer.state_dict()}
                save(options.checkpoint, state | {"loader": batch.state, "step": step})
                print(f"step {step}: {loss.item():.4f} nats per position")
            if step == options.steps:
                break
        epoch += 1


if __name__ == "__main__":
    main()
