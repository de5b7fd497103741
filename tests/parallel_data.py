"""
Runs of one student on one process or two, which must come to the same: a cache, the ways to train on it, their results.

As a program, under torchrun, it runs the ways that it is given: ``parallel_data.py ROOT WAY…``.
"""

import json
import sys
import warnings
from pathlib import Path
from unittest import mock

import numpy as np
import tiny
import torch
from safetensors.torch import load_file
from torch import nn

import sklformat as skl
from sklformat.distill.models import tokenization
from sklformat.distill.student import parallelism, processes
from sklformat.distill.student.learner import Learner
from sklformat.distill.student.training import train
from sklformat.distill.text.fingerprints import tokenizer_fingerprint
from sklformat.distill.text.packing import PackedSequences
from sklformat.settings.train import TrainConfig

STEPS, STOP, SEQ_LEN, SEQUENCES = 20, 14, 16, 48

# A step of four sequences on one process, and on two.
ONE, TWO = {"batch_size": 2, "accumulation": 2}, {"batch_size": 1, "accumulation": 2}
SHARD = {"shard": True}
ADAPTER = {"lora_rank": 4, "lora_targets": ("all-linear", "lm_head"), "student": "student"}
HALF = {"dtype": "bfloat16"}
WAYS = {
    "one": ONE,
    "ddp": TWO,
    "shard": TWO | SHARD,
    "tied": ONE | {"student": "tied-student"},
    "tied-shard": TWO | SHARD | {"student": "tied-student"},
    "adapter": ONE | ADAPTER,
    "adapter-ddp": TWO | ADAPTER,
    "adapter-shard": TWO | SHARD | ADAPTER,
    "recomputed-shard": TWO | SHARD | {"gradient_checkpointing": True},
    "compiled": ONE | {"compile": True},
    "compiled-ddp": TWO | {"compile": True, "gradient_checkpointing": True},
    "compiled-shard": TWO | SHARD | {"compile": True},
    "half": ONE | HALF,
    "half-ddp": TWO | HALF,
    "half-shard": TWO | SHARD | HALF,
    "half-parameters": ONE | HALF | {"param_dtype": "bfloat16"},
    "half-parameters-shard": TWO | SHARD | HALF | {"param_dtype": "bfloat16"},
}


def write_place(root):
    """A cache, every third sequence of which has no record, its tokenizer, and students."""
    tokenizer = tiny.write_place(root)
    vocab_size = tokenization.num_ids(tokenizer)
    packed = PackedSequences(
        root / "tokens", seq_len=SEQ_LEN, separator_id=tokenization.separator_id(tokenizer), seed=0, count=SEQUENCES
    )
    made_by = {"vocab_size": vocab_size, "tokenizer_fingerprint": tokenizer_fingerprint(tokenizer)}
    header = skl.Header(seq_len=SEQ_LEN, kind="counts", rounds=8, **made_by)
    (root / "cache").mkdir()
    with skl.ShardWriter(root / "cache" / "shard-00000.skl", header=header) as writer:
        for number in range(SEQUENCES):
            tokens = packed[number]
            ids = np.sort(np.stack([tokens[1:], (tokens[1:] + 1) % vocab_size], 1), axis=1)
            each = 0 if number % 3 == 1 else 2
            counts = np.where(ids == tokens[1:, None], 6, 2)
            records = {"token_ids": ids.ravel()[: each * SEQ_LEN], "counts": counts.ravel()[: each * SEQ_LEN]}
            writer.append(tokens, skl.SparseTargets(offsets=np.arange(SEQ_LEN + 1) * each, **records))
    for name in ("student", "tied-student"):
        tiny.write_model(root / name, tokenizer, num_layers=2, separator_id=None, tie=name == "tied-student")


def config_of(root, out, way):
    given = WAYS[way] | ({"student": str(root / WAYS[way]["student"])} if "student" in WAYS[way] else {})
    return TrainConfig(
        out=root / out, cache=root / "cache", tokenizer=str(root / "tokenizer"), hidden_size=16, num_layers=2,
        num_heads=2, steps=STEPS, save_every=5, log_every=1, device="cpu", learning_rate=1e-2, **given,
    )  # fmt: skip


def run(root, way, *, out=None, stop=None):
    """One run to its end, or until it is stopped after so many steps; a note of what this process held of it."""
    steps = 0

    def watched(update, held):
        def taken(learner, *arguments, **named):
            nonlocal steps
            if steps == stop:
                raise KeyboardInterrupt
            steps += 1
            result = update(learner, *arguments, **named)
            held[f"{out or way} {learner.process.rank}"] = bytes_of(learner)
            return result

        return taken

    held = {}
    warnings.simplefilter("ignore")
    with mock.patch.object(Learner, "update", watched(Learner.update, held)):
        try:
            train(config_of(root, out or way, way), report=lambda *_: None)
        except KeyboardInterrupt:
            assert stop is not None
    for name, number in held.items():
        (root / f"held {name}.json").write_text(json.dumps(number))


def bytes_of(learner):
    """Bytes of parameters and of AdamW's moments that this process holds between steps."""
    states = [value for state in learner.optimizer.state.values() for value in state.values() if value.dim()]
    tensors = [*learner.parameters, *states]
    own = [tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in tensors]
    return sum(tensor.numel() * tensor.element_size() for tensor in own)


TWO_RUNS = (
    {"way": "ddp"},
    {"way": "shard"},
    {"way": "shard", "out": "two-then-one", "stop": STOP},
    {"way": "shard", "out": "one-then-two"},
)
"""What the tests of every day ask of two processes."""


def run_two(root):
    """One group of processes for all of it."""
    with processes.joined("cpu") as process:
        for given in TWO_RUNS:
            run(root, **given)
        (root / f"experts {process.rank}.json").write_text(json.dumps(gradients_of_experts(process)))


class Experts(nn.Module):
    """Two experts, one of which a process uses."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)])

    def forward(self, chosen, x):
        return self.experts[chosen](x).sum()


def gradients_of_experts(process):
    """In two steps: what process r gives expert r is r + 1."""
    root = parallelism.replicated(Experts())
    found = []
    for _ in range(2):
        root(process.rank, torch.full((1, 1), process.rank + 1.0)).backward()
        found.append([float(parameter.grad) for parameter in root.parameters()])
        root.zero_grad()
    return found


def refused(root):
    """A run that the first process refuses, as a command."""
    from sklformat.cli import main

    (root / "foreign").mkdir(exist_ok=True)
    (root / "foreign" / "thesis.tex").touch()
    flags = ["--cache", "cache", "--tokenizer", "tokenizer", "--out", "foreign"]
    return main(["train", *(str(root / flag) if flag[0] != "-" else flag for flag in flags), "--device", "cpu"])


def rows_of(root, out):
    return [json.loads(line) for line in (root / out / "metrics.jsonl").read_text().splitlines()]


def weights_of(root, out):
    (path,) = (root / out / "model").glob("*.safetensors")
    return load_file(path)


def difference(root, out, other):
    """The greatest relative difference of losses, and the greatest of weights, of two runs."""
    rows, others = rows_of(root, out), rows_of(root, other)
    assert STEPS == len(rows) == len(others)
    losses = max(abs(row["loss"] - one["loss"]) / one["loss"] for row, one in zip(rows, others, strict=True))
    weights, wanted = weights_of(root, out), weights_of(root, other)
    assert weights.keys() == wanted.keys()
    return losses, max(float((weights[name].float() - wanted[name].float()).abs().max()) for name in wanted)


if __name__ == "__main__":
    torch.set_num_threads(1)
    with processes.joined("cpu"):
        for each in sys.argv[2:]:
            run(Path(sys.argv[1]), each)
