"""
What runs on a GPU in Triton; nothing of ours is known here, and torch operations elsewhere are its oracle.

decode_counts  records of kind counts from their bytes to ids and probabilities, checked
dense_rows     a row of logits becomes its loss against a teacher's row and, in place, its gradient
draw_rows      draws from rows of logits by the law of csrc
drawn          what draws from rows give
loss_rows      a row of logits becomes its loss and, in place, its gradient
"""

from __future__ import annotations

import importlib
import importlib.util
from functools import cache

import torch

AS_WRITTEN = {"enable_fp_fusion": False}
"""How kernels are compiled: each operation rounds, as on the host, whatever a version of Triton does by itself."""


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def run_on(device: torch.device) -> bool:
    """Whether kernels run on this device: a CUDA one, where Triton is installed."""
    return device.type == "cuda" and _has_triton()


def versions(device: torch.device) -> dict[str, str]:
    """Of what kernels need beside torch, where they run."""
    # Asked of the module, which packages of several names hold.
    return {"triton": importlib.import_module("triton").__version__} if run_on(device) else {}
