"""What losses refuse that test_kl.py and test_metrics.py leave out: tensors on devices that differ."""

from dataclasses import dataclass

import pytest
import torch

from sklformat.distill.losses.kl import linear_sparse_kl, sparse_kl


@dataclass(frozen=True)
class Targets:
    """One record at each of two positions."""

    token_ids: torch.Tensor
    probs: torch.Tensor
    offsets: torch.Tensor


TARGETS = Targets(torch.tensor([1, 2]), torch.ones(2), torch.tensor([0, 1, 2]))


def test_devices_that_differ():
    """Both devices are named; nothing is moved silently."""
    with pytest.raises(ValueError, match="the head's weight is on meta, hidden_PD on cpu"):
        linear_sparse_kl(torch.ones(2, 4), torch.ones(5, 4, device="meta"), TARGETS)
    with pytest.raises(ValueError, match="labels_P is on meta, the student on cpu; move it there first"):
        sparse_kl(torch.ones(2, 5), TARGETS, labels_P=torch.zeros(2, dtype=torch.int64, device="meta"), ce_weight=0.5)
