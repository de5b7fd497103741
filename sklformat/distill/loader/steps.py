"""
The batches of a stream by their number, for trainers that count steps and skip those that were done.

Knows no launcher: whoever uses it divides the stream by the dataset's own rank and world size.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

from numpy.typing import NDArray
from torch.utils.data import Dataset, Sampler

from sklformat.distill.loader.batches import Batch
from sklformat.distill.loader.dataset import SparseLogitDataset
from sklformat.errors import ResumeError

_PLACES_AT_ONCE = 4096  # as many as the order gives at one price


class Steps(Dataset[Batch]):
    """
    What a ``SparseLogitDataset`` gives, batch by batch: ``steps[epoch, number]`` is batch ``number`` of an epoch.

    The batches and their states are the dataset's own; asking for one moves nothing, so that any number of workers may
    ask in any order.  ``DataLoader(steps, batch_sampler=StepSampler(dataset), collate_fn=...)``, where collate_fn gets
    a list of one batch, iterates one epoch.

    ``len(steps)`` is the number of sequences, which is what trainers report as examples.
    """

    def __init__(self, dataset: SparseLogitDataset) -> None:
        self.dataset = dataset
        self._at_once = max(1, _PLACES_AT_ONCE // dataset.schedule.batch_size)
        self._known: tuple[int, int] | None = None
        self._places: list[tuple[NDArray[Any], int]] = []

    def __len__(self) -> int:
        return self.dataset.schedule.num_sequences

    def __getitem__(self, place: tuple[int, int]) -> Batch:
        """
        One batch.

        Raises:
            IndexError: The epoch has no such batch on this rank.
            FormatError, AlignmentError: As the iteration of the dataset.
        """
        epoch, number = place
        if not 0 <= number < len(self.dataset):
            raise IndexError(f"epoch {epoch} has {len(self.dataset)} batches, got number {number}")
        block, inside = divmod(number, self._at_once)
        if self._known != (epoch, block):
            schedule = self.dataset.schedule
            rest = schedule.batches(epoch, block * self._at_once * schedule.global_batch)
            self._known, self._places = (epoch, block), list(itertools.islice(rest, self._at_once))
        return self.dataset._batch(epoch, *self._places[inside])  # noqa: SLF001  one room


class StepSampler(Sampler[list[tuple[int, int]]]):
    """
    The places of one epoch in ``Steps``, each as a batch by itself, so that skipping reads nothing; and where a trainer
    stands that skips by itself.

    Args:
        dataset: Whose batches.
        accumulation: Batches of a step.

    Attributes:
        epoch: Of the next iteration.
        taken: Batches of this epoch that were trained on; whoever takes them counts them.
    """

    def __init__(self, dataset: SparseLogitDataset, accumulation: int = 1) -> None:
        self.dataset, self.accumulation = dataset, accumulation
        self.epoch = self.taken = 0

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch = self.epoch
        return ([(epoch, number)] for number in range(len(self.dataset)))

    @property
    def steps_per_epoch(self) -> int:
        """Steps of an epoch, the last of them perhaps a short one."""
        return -(-len(self) // self.accumulation)

    def stand_after(self, steps: int) -> None:
        """Stand where this many steps from the beginning lead."""
        self.epoch, done = divmod(steps, self.steps_per_epoch)
        self.taken = done * self.accumulation

    def next_epoch(self) -> None:
        """Stand at the beginning of the next epoch."""
        self.epoch, self.taken = self.epoch + 1, 0

    def state_dict(self) -> dict[str, Any]:
        """The state that the dataset has there."""
        schedule = self.dataset.schedule
        consumed = self.taken * schedule.global_batch
        over = schedule.num_batches(consumed) == 0
        return self.dataset.state_dict() | {
            "epoch": self.epoch + over,
            "consumed": 0 if over else consumed,
        }

    def check_stands(self, state: Mapping[str, Any]) -> None:
        """
        Make sure that it stands where a saved state does.

        Raises:
            ResumeError: The state belongs to another stream, or stands elsewhere; says both.
        """
        self.dataset.load_state_dict(state)
        there, here = ((place["epoch"], place["consumed"]) for place in (state, self.state_dict()))
        if there != here:
            raise ResumeError(
                f"{self.dataset.cache.path}: the state stands in epoch {there[0]} after {there[1]} sequences, and the "
                f"trainer, which counts steps, in epoch {here[0]} after {here[1]}: an epoch was ended early; begin the "
                "epoch again (ignore_data_skip=True)"
            )
