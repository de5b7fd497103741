"""What each of the processes does that have a part of a vocabulary; forked.py runs it."""

import json
from pathlib import Path

import torch
import torch.distributed as dist

from sklformat.distill.losses.heads import OutputHead, Shard
from sklformat.distill.losses.kl import linear_sparse_kl, sparse_kl
from sklformat.distill.losses.targets import DenseTargets, DenseTeacher, Ragged
from sklformat.distill.student.processes import Process

POSITIONS, VOCAB, WIDTH = 10, 57, 8
BOUNDS = [0, 23, VOCAB]  # of two parts, which need not be equal
CASES = [
    {"method": "random_sampling"},
    {"method": "topk_normalised", "ce_weight": 0.3},
    {"method": "label_smoothing", "ce_weight": 0.2},
    {"method": "ghost_token"},
    {"method": "naive_fix"},
    {"method": "full"},
    {"method": "full", "ce_weight": 0.3, "dense": True},
    {"method": "random_sampling", "divergence": "mse", "ce_weight": 0.3},
    {"method": "naive_fix", "divergence": "forward_reverse_kl", "temperature": 2.0, "ce_weight": 0.3},
    {"method": "label_smoothing", "divergence": "jsd", "ce_weight": 0.2},
    {"method": "full", "divergence": "jsd", "temperature": 2.0},
    {"method": "full", "divergence": "forward_reverse_kl", "temperature": 2.0, "ce_weight": 0.3, "dense": True},
]


def problem(dtype=torch.float64):
    """Hidden states, head, targets and labels of the whole vocabulary; records of no part, of one and of both."""
    g = torch.Generator().manual_seed(5)
    hidden = torch.randn(POSITIONS, WIDTH, generator=g, dtype=dtype)
    weight, bias = (torch.randn(*shape, generator=g, dtype=dtype) for shape in ((VOCAB, WIDTH), (VOCAB,)))
    counts = [0, 1, 3, 7, 12] * 2
    ids = [torch.randperm(VOCAB, generator=g)[:count].sort().values for count in counts]
    ids[3] = torch.arange(7)  # in the first part alone
    probs = [0.9 * torch.softmax(torch.randn(count, generator=g), 0) for count in counts]
    offsets = torch.tensor([0, *counts]).cumsum(0)
    labels = torch.randint(VOCAB, (POSITIONS,), generator=g)
    labels[4] = -100
    labels[2] = ids[2][-1]
    return hidden, weight, bias, Ragged(torch.cat(ids).int(), torch.cat(probs), offsets), labels


def dense_targets(shard, part, *, whole):
    """A teacher's distributions of a part of the ids: as they are, or as hidden states and a capped head."""
    g = torch.Generator().manual_seed(7)
    hidden = torch.randn(POSITIONS, WIDTH - 3, generator=g, dtype=torch.float64)
    weight, bias = (torch.randn(*shape, generator=g, dtype=torch.float64) for shape in ((VOCAB, WIDTH - 3), (VOCAB,)))
    bias[[3, 40]] = -torch.inf  # ids that the teacher masks
    head = OutputHead(weight, bias, softcap=None, scale=1.5)
    if whole:
        return DenseTargets(head.logits(hidden).softmax(1)[:, part])
    return DenseTeacher(hidden, OutputHead(weight[part], bias[part], scale=1.5, shard=shard))


def losses(case, shard=None, part=slice(None)):
    """Both losses of a case with the gradients that one process gets; of a capped head with a bias."""
    hidden, weight, bias, targets, labels = problem()
    case = dict(case)
    whole = case.pop("dense", False)
    if case["method"] == "full":
        targets = dense_targets(shard, part, whole=whole)
    hidden, weight, bias = (leaf.requires_grad_() for leaf in (hidden, weight[part].clone(), bias[part].clone()))
    head = OutputHead(weight, bias, softcap=4.0, scale=0.7, shard=shard)
    labels = labels if case.get("ce_weight") or case["method"] == "naive_fix" else None
    loss = linear_sparse_kl(hidden, head, targets, labels_P=labels, chunk_positions=4, **case)
    loss.backward()
    logits = (hidden.detach() @ weight.detach().T).requires_grad_()
    plain = sparse_kl(logits, targets, labels_P=labels, shard=shard, **case)
    plain.backward()
    found = {"loss": loss, "plain": plain, "hidden": hidden.grad, "weight": weight.grad, "bias": bias.grad}
    return {name: tensor.tolist() for name, tensor in (found | {"logits": logits.grad}).items()}


def run(folder):
    """The losses of this process's part, as JSON in ``folder``; and how often processes met for one block."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    part = slice(BOUNDS[rank], BOUNDS[rank + 1])
    shard = Shard(BOUNDS[rank], VOCAB)
    meetings, reduce = [], dist.all_reduce
    dist.all_reduce = lambda tensor, *args, **settings: meetings.append(1) or reduce(tensor, *args, **settings)
    hidden, weight, _, targets, _ = problem()
    counts = []
    for method, given in (("random_sampling", targets), ("full", dense_targets(shard, part, whole=False))):
        with torch.no_grad():
            linear_sparse_kl(hidden, OutputHead(weight[part], shard=shard), given, method=method)
        counts.append(len(meetings))
    dist.all_reduce = reduce
    together = Process(rank, 2, torch.device("cpu")).together(torch.arange(2 * rank + 1.0) + 10 * rank).tolist()
    found = {"collectives": counts, "together": together, "losses": [losses(case, shard, part) for case in CASES]}
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()
    return 0
