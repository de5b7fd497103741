"""
Train a student whose weights, gradients and moments are divided among processes, in a plain loop: FSDP2.

    torchrun --nproc-per-node 8 fsdp2.py CACHE STUDENT RUN

``--batch-size`` counts the sequences of a step over all processes.  The checkpoint is divided as the student is,
and read on any number of processes; at the end the student stands in RUN/model, whole.
"""

import argparse
import itertools
import os
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import state_dict as states
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import AutoModelForCausalLM
from transformers.modeling_layers import GradientCheckpointingLayer

from sklformat.distill import Batch, SparseLogitDataset, linear_sparse_kl, output_head, run_to_head


def endless(dataset: SparseLogitDataset) -> Iterator[Batch]:
    """Epoch after epoch, from where the dataset stands."""
    for epoch in itertools.count(dataset.state_dict()["epoch"]):
        dataset.set_epoch(epoch)
        yield from dataset


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a student that is divided among processes from a cache.")
    parser.add_argument("cache")
    parser.add_argument("student")
    parser.add_argument("run", type=Path)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the matrix products")
    parser.add_argument("--save-every", type=int, default=100)
    parser.add_argument("--log-every", type=int, default=10)
    options = parser.parse_args()

    dist.init_process_group()
    rank, world_size = dist.get_rank(), dist.get_world_size()
    if options.batch_size % world_size:
        parser.error(f"--batch-size {options.batch_size} cannot be divided among {world_size} processes")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
    student = AutoModelForCausalLM.from_pretrained(options.student, dtype=torch.float32).train()
    output_head(student)  # tried once, while it is whole
    policy = MixedPrecisionPolicy(param_dtype=getattr(torch, options.dtype), reduce_dtype=torch.float32)
    mesh = init_device_mesh(device.type, (world_size,))
    for module in [module for module in student.modules() if isinstance(module, GradientCheckpointingLayer)]:
        fully_shard(module, mesh=mesh, mp_policy=policy)
    fully_shard(student, mesh=mesh, mp_policy=policy)  # the rest, and the head with it
    warnings.filterwarnings("ignore", "FSDP2-wrapped module")  # of views among the states, which nothing changes
    optimizer = torch.optim.AdamW(student.parameters(), lr=options.learning_rate)
    dataset = SparseLogitDataset(options.cache, batch_size=options.batch_size // world_size, seed=0)

    def state_of(step: int, loader: dict) -> dict:
        weights, moments = states.get_state_dict(student, optimizer)
        return {"student": weights, "optimizer": moments, "step": step, "loader": loader}

    done = 0
    if found := sorted(options.run.glob("step-*/.metadata")):  # which is written last
        state = state_of(done, dataset.state_dict())
        dcp.load(state, checkpoint_id=found[-1].parent)
        weights, moments = state["student"], state["optimizer"]
        states.set_state_dict(student, optimizer, model_state_dict=weights, optim_state_dict=moments)
        dataset.load_state_dict(state["loader"])
        done = state["step"]

    batches = endless(dataset)
    for step in range(done + 1, options.steps + 1):
        batch = next(batches).to(device)
        count = (batch.labels != -100).sum()
        dist.all_reduce(count)  # the positions of the whole step
        torch.manual_seed(step * world_size + rank)  # dropout, where there is any, is the same after resuming
        # The student itself is called, which gathers its weights and keeps the head until the backward pass.
        hidden, head, balance = run_to_head(student, batch.input_ids)
        # Gradients are averaged over the processes, so each loss is divided by the mean count of one.
        loss = linear_sparse_kl(hidden, head, batch.targets, normaliser=count / world_size)
        (loss + balance).backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % options.log_every == 0 or step == options.steps:
            mean = loss.detach() / world_size
            dist.all_reduce(mean)
            if rank == 0:
                print(f"step {step}: {mean.item():.6f} nats per position", flush=True)
        if step % options.save_every == 0 or step == options.steps:
            dcp.save(state_of(step, batch.state), checkpoint_id=options.run / f"step-{step:08}")
            for old in sorted(options.run.glob("step-*"))[:-1] if rank == 0 else ():
                shutil.rmtree(old)
    whole = states.StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = states.get_model_state_dict(student, options=whole)
    if rank == 0:
        student.save_pretrained(options.run / "model", state_dict=weights)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
