"""What each of the processes does that draw together from parts of rows; forked.py runs it."""

import pickle
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from sklformat.distill.losses.heads import Shard
from sklformat.distill.teacher.gpu_sampler import DeviceSampler
from sklformat.distill.teacher.logit_columns import LogitColumns
from sklformat.distill.teacher.parts import Part

POSITIONS, VOCAB = 60, 1500
BORDERS = {"at a block": 768, "within a block": 701}
NAMES = ("label_logprob", "entropy", "record_logprob")
LAWS = {
    "multinomial": {"sampler": "multinomial", "rounds": 50},
    "systematic": {"sampler": "systematic", "rounds": 50},
    "many": {"sampler": "multinomial", "rounds": 300},
    "flat proposal": {"sampler": "multinomial", "rounds": 50, "proposal_temperature": 0.8},
    "unbiased": {"sampler": "systematic", "rounds": 40, "proposal_temperature": 1.2, "self_normalise": False},
    "topk": {"sampler": "topk", "k": 9},
    "topp": {"sampler": "topp", "p": 0.7},
    "topp, few": {"sampler": "topp", "p": 0.7, "k": 5},
}


def problem(dtype=torch.float32):
    """Rows of all kinds: steep and flat, with one part masked, with ties; and their sequence's tokens."""
    g = torch.Generator().manual_seed(3)
    logits = torch.randn(POSITIONS, VOCAB, generator=g) * torch.linspace(0.1, 6, POSITIONS)[:, None] + 7
    logits[10, :800] = -torch.inf
    logits[11, 700:] = -torch.inf
    logits[12] = 1.5
    logits[13, 5:] = -torch.inf
    logits[14] += 300
    tokens = torch.randint(VOCAB, (POSITIONS + 1,), generator=g).numpy().astype(np.uint32)
    return logits.to(dtype), tokens


def drawn(law, logits, tokens, part=None, counted=None):
    """Records and columns of one sequence, in slices; rows of both the same places."""
    sampler = DeviceSampler(seed=5, part=part, **law)
    columns = LogitColumns(NAMES, tokens)
    slices = ((first, logits[first : first + 25]) for first in range(0, POSITIONS, 25))
    arrival = sampler.draw(2**33 + 1, POSITIONS, slices, columns, counted)
    result, found = arrival.result(), columns.values()
    if isinstance(result, np.ndarray):
        return {"ids": result, **found}
    column = arrival.record_logprob(found.get("record_logprob"))
    parts = {"ids": result.token_ids, "weights": result.weights, "offsets": result.offsets}
    return {**parts, **found, "record_logprob": column}


def fault(call, *given):
    """What it ends with."""
    try:
        call(*given)
    except ValueError as error:
        return str(error)
    return ""


def run(folder):
    """The records of each law and border, how often processes met for them, and what is refused."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    met = []
    for name in ("all_gather", "all_reduce"):
        plain = getattr(dist, name)
        setattr(dist, name, lambda *given, _plain=plain, _name=name, **how: met.append(_name) or _plain(*given, **how))
    found = {}
    for place, border in BORDERS.items():
        bounds = [0, border, VOCAB]
        own = slice(bounds[rank], bounds[rank + 1])
        part = Part(Shard(bounds[rank], VOCAB), own.stop - own.start)
        for name, law in LAWS.items():
            for dtype in (torch.float32, torch.bfloat16):
                logits, tokens = problem(dtype)
                met.clear()
                found[place, name, dtype] = drawn(law, logits[:, own], tokens, part)
                found[place, name, dtype, "met"] = list(met)
        counted = np.arange(POSITIONS) % 3 == 1
        found[place, "some"] = drawn(LAWS["multinomial"], logits[:, own], tokens, part, counted)
        logits[33, 1400] = torch.nan
        found[place, "fault"] = fault(drawn, LAWS["topk"], logits[:, own], tokens, part)
        logits[20] = -torch.inf
        found[place, "none"] = fault(drawn, LAWS["systematic"], logits[:, own], tokens, part)
    found["apart"] = fault(Part, Shard(rank * 40, 60), 20)
    Path(folder, f"{rank}.pickle").write_bytes(pickle.dumps(found))
    dist.destroy_process_group()
    return 0
