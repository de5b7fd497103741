"""
The training loss that a trainer's log has: a sum over the steps since its last line and over all processes.

Knows no trainer.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class LossSum:
    """
    The losses of the steps since the last line of a log; they wait on the device until somebody asks for them.

    Attributes:
        steps: How many.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Begin again, after a line of the log or where training begins."""
        self.steps = 0
        self._unsettled: Tensor | None = None
        self._sum = 0.0

    def add(self, loss: Tensor) -> None:
        """A micro-batch's share of its step's loss, on this process."""
        if self._unsettled is None:
            self._unsettled = torch.zeros((), dtype=loss.dtype, device=loss.device)
        self._unsettled += loss.detach()

    def settle(self, over_processes: Callable[[Tensor], Tensor]) -> float:
        """The sum so far, of all processes, which ``over_processes`` makes of theirs; here alone the host waits."""
        if self._unsettled is not None:
            self._sum += float(over_processes(self._unsettled))
            self._unsettled = None
        return self._sum
