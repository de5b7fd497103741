"""
A teacher's passes over the sequences that a capture still needs, in batches of a fixed grid.

Draws nothing.
Shape letters: B sequences, T positions, L = T + 1 tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sklformat.capture import ShardWork
from sklformat.distill.teacher.forward import Teacher
from sklformat.distill.text.packing import Sequences
from sklformat.settings.cache import CacheConfig


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
