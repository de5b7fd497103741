"""A head whose vocabulary is divided: two real processes against one."""

import json

import pytest
import shard_runs
import torch
from forked import run_ranks

from sklformat.distill.losses.heads import OutputHead, Shard
from sklformat.distill.losses.kl import DenseTargets, DenseTeacher, linear_sparse_kl, sparse_kl


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    for done in run_ranks(2, shard_runs.run, folder):
        assert done.status == 0, done.stderr
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize(
    "number",
    range(len(shard_runs.CASES)),
    ids=lambda n: "-".join(v for v in shard_runs.CASES[n].values() if isinstance(v, str)),
)
def test_two_parts_are_the_whole(number, found):
    """Value, gradients of hidden states, and each part's gradients, in float64."""
    whole = {name: torch.tensor(value) for name, value in shard_runs.losses(shard_runs.CASES[number]).items()}
    parts = [{name: torch.tensor(value) for name, value in each["losses"][number].items()} for each in found]
    for name in ("loss", "plain", "hidden"):
        for part in parts:
            torch.testing.assert_close(part[name], whole[name], rtol=1e-12, atol=1e-14)
    for name, dim in (("weight", 0), ("bias", 0), ("logits", 1)):
        together = torch.cat([part[name] for part in parts], dim)
        torch.testing.assert_close(together, whole[name], rtol=1e-12, atol=1e-14)


def test_processes_meet_twice_a_block(found):
    """Twice for records, and twice more for a dense teacher."""
    assert [each["collectives"] for each in found] == [[2, 4], [2, 4]]


def test_processes_put_their_numbers_together(found):
    """Each has as many of its own as it has; all have all of them, in the order of the processes."""
    assert [each["together"] for each in found] == [[0, 10, 11, 12]] * 2


def test_shards_that_cannot_be():
    with pytest.raises(ValueError, match="a shard of ids 3 to 7 is no part of a vocabulary of 7"):
        OutputHead(torch.ones(5, 2), shard=Shard(3, 7))
    with pytest.raises(ValueError, match="a shard of ids -1 to 2 is no part of a vocabulary of 7"):
        sparse_kl(torch.ones(2, 4), shard_runs.problem()[3], shard=Shard(-1, 7))
    with pytest.raises(ValueError, match=r"the teacher's head is Shard\(first=0.*, the student's None; divide both"):
        sparse_kl(
            torch.ones(2, 4),
            DenseTeacher(torch.ones(2, 3), OutputHead(torch.ones(4, 3), shard=Shard(0, 9))),
            method="full",
        )
    with pytest.raises(ValueError, match=r"probs_PV has shape \[2, 9\]; need \[2, 4\]"):
        linear_sparse_kl(
            torch.ones(2, 3),
            OutputHead(torch.ones(4, 3), shard=Shard(0, 9)),
            DenseTargets(torch.full((2, 9), 1 / 9)),
            method="full",
        )
