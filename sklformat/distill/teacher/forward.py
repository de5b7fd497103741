"""
A teacher as capture sees it: hidden states for a batch of sequences, then logits a slice of positions at a time; and
its passes over the sequences that a capture still needs, in batches of a fixed grid.

Logits of a whole batch, [B, T, V], never exist: at V = 128 256 they would take 525 MB per sequence of 1024 positions.
Shape letters: B sequences, T positions, V vocabulary, D hidden size, L = T + 1 tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sklformat.capture import ShardWork
from sklformat.distill.models import heads, outputs
from sklformat.distill.models.devices import to_device
from sklformat.distill.teacher.parts import Part
from sklformat.distill.text.packing import Sequences
from sklformat.errors import is_memory_short
from sklformat.settings.cache import CacheConfig

LOGITS_AT_ONCE = {"cpu": 1 << 22, "cuda": 1 << 27}
"""The most logits that are there at once, by kind of device, but no fewer than of ``LEAST_ROWS`` positions. On a CPU
16 MiB of float32 are memory that is used again and not given back to the system; a GPU needs more rows in one product:
1024 of 128 256 logits of 2 bytes are 263 MB."""

LEAST_ROWS = {"cpu": 16, "cuda": 1024}
"""Positions of a slice at least; fewer than 16 are multiplied by another method, which rounds otherwise."""

_PROBE_TOKENS = 8
_ROWS = LEAST_ROWS["cpu"]


class Teacher:
    """
    Runs a model without its head, and the head over slices of what came out.

    A head that is one matrix is multiplied by the rows that mean something; any other is called as the model has it
    (with bias, scale and cap). A model whose head cannot be called by itself is run whole. So the logits are those of
    the model's own call, bit for bit where the product does not depend on how many rows and columns it has at once:
    ``make sweep`` compares the two for every type of model. Where it does, the last bits differ.

    Args:
        model: A causal language model in eval mode.
        vocab_size: Logits beyond it are padding and left out.
        divided: Whether processes have a part of the model each.  All of them run it together then, and logits are of
            the ids of a part: those of all are never on one process.

    Attributes:
        device: Where input ids go.
        way: How the head is run: "linear" (one matrix), "head" (called by itself), "whole" (with its model) or "part".
        part: This process's part of the logits; None: all of them.

    Raises:
        ValueError: A head that cannot be divided.
    """

    def __init__(self, model: Any, vocab_size: int, *, divided: bool = False) -> None:
        self._model = model
        self._vocab_size = vocab_size
        self.device = outputs.input_device(model)
        rows = max(LEAST_ROWS[self.device.type], LOGITS_AT_ONCE[self.device.type] // vocab_size)
        self._positions = rows // _ROWS * _ROWS
        self.part: Part | None = None
        if divided:
            self._own = heads.divided_head(model, vocab_size)
            assert self._own.shard is not None
            self.part = Part(self._own.shard, len(self._own.weight))
            self._weight_VD, self._head_alone, self.way = None, True, "part"
            return
        weight_VD = heads.plain_weight(model)
        self._weight_VD = None if weight_VD is None else weight_VD[:vocab_size]
        self._head_alone = self._weight_VD is not None or self._can_call_head()
        self.way = "linear" if self._weight_VD is not None else "head" if self._head_alone else "whole"

    @torch.inference_mode()
    def run(self, input_ids_BT: NDArray[np.uint32], position_ids_BT: NDArray[np.int64] | None = None) -> Tensor:
        """
        [B, T, D] hidden states; [B, T, V] logits of a model that must be run whole.

        Args:
            input_ids_BT: Tokens.
            position_ids_BT: Each token's place in its document, where documents do not see each other.
        """
        ids_BT = to_device(torch.from_numpy(input_ids_BT.astype(np.int64)), self.device)
        positions_BT = None if position_ids_BT is None else to_device(torch.from_numpy(position_ids_BT), self.device)
        if self._head_alone:
            return outputs.hidden_states(self._model, ids_BT, positions_BT)
        return outputs.logits(self._model, ids_BT, positions_BT)[..., : self._vocab_size]

    @torch.inference_mode()
    def logits(self, output_T: Tensor, counted_T: NDArray[np.bool_] | None = None) -> Iterator[tuple[int, Tensor]]:
        """
        One sequence of what ``run`` gave as (first position, logits [positions, V] where the head lies).

        Slices lie on a fixed grid, whatever counts in them; those where no position counts are left out.
        """
        count = output_T.shape[0]
        for first in range(0, count, self._positions):
            if counted_T is not None and not counted_T[first : first + self._positions].any():
                continue
            # A rest of few rows is multiplied together with rows before it.
            before = min(first, max(0, count - _ROWS)) if self._head_alone else first
            part = output_T[before : first + self._positions]
            if self.part is not None:
                part = self._own.logits(part.to(self._own.weight.device))
            elif self._weight_VD is not None:
                part = part.to(self._weight_VD.device) @ self._weight_VD.T
            elif self._head_alone:
                part = outputs.head_logits(self._model, part[None])[0, :, : self._vocab_size]
            yield first, part[first - before :]

    @torch.inference_mode()
    def _can_call_head(self) -> bool:
        """Whether the head by itself gives the model's logits, tried on a few tokens."""
        ids_BT = torch.arange(_PROBE_TOKENS, device=self.device)[None] % self._vocab_size
        expected = outputs.logits(self._model, ids_BT)
        try:
            found = outputs.head_logits(self._model, outputs.hidden_states(self._model, ids_BT))
        except outputs.HEAD_FAILURES as error:
            if is_memory_short(error):
                raise
            return False
        return torch.equal(expected, found)


class Output(NamedTuple):
    """
    Of one sequence.

    Attributes:
        sequence: Its number.
        tokens: [T + 1].
        counted: Which positions get records, [T]; None: all.
        made: What the teacher gave, [T, …]; its records, where an engine's worker drew them.
    """

    sequence: int
    tokens: NDArray[np.uint32]
    counted: NDArray[np.bool_] | None
    made: Any

    @property
    def num_counted(self) -> int:
        """Positions that get records."""
        return self.tokens.size - 1 if self.counted is None else int(self.counted.sum())


def outputs_of(
    config: CacheConfig, teacher: Teacher, packed: Sequences, works: Sequence[ShardWork]
) -> Iterator[Output]:
    """
    Run the teacher over what is missing.

    Logits depend in their last bits on the shape of a batch, so batches are a fixed grid within the shard: a shard
    that is resumed computes the batch of its next sequence again and skips what it has.  Where the cache ends before
    the grid of a whole shard does, the last sequence fills the batch up: nothing depends on where the cache ends.
    """
    for work in works:
        whole = work.first_sequence + config.sequences_per_shard
        for first in range(work.first_sequence, work.end, config.batch_size):
            last = min(first + config.batch_size, work.end)
            if last <= work.next_sequence:
                continue
            end = min(first + config.batch_size, whole)
            rows = [packed[sequence] for sequence in range(first, last)]
            rows += rows[-1:] * (end - last)
            # No token sees a later one, so what shorter rows are filled up with is seen by none that counts.
            tokens_BL = np.full((len(rows), packed.width(first, end) + 1), packed.separator_id, np.uint32)
            for row, tokens in enumerate(rows):
                tokens_BL[row, : tokens.size] = tokens
            places = [packed.position_ids(sequence) for sequence in range(first, last)]
            isolated = [place for place in places + places[-1:] * (end - last) if place is not None]
            outputs = teacher.run(tokens_BL[:, :-1], *([np.stack(isolated)] if isolated else []))
            for sequence in range(max(first, work.next_sequence), last):
                tokens, made = rows[sequence - first], outputs[sequence - first]
                yield Output(sequence, tokens, packed.counted(sequence), made[: tokens.size - 1])
