"""
Sequences into an engine, as many at once as keep it busy, and their records out of it in order.

The engine may take them in any order, begin one again or lose one.  What is lost is run again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from sklformat.distill.engines.assembly import Assembly
from sklformat.distill.engines.desk import Desk, Given, Gone, Records, Refused, Synced
from sklformat.distill.teacher.forward import Output
from sklformat.errors import CaptureError, EngineError

_RUNS = 3  # of one request, at most
_PATIENCE_SECONDS = 300.0  # its device may still have draws to make


class Engine(Protocol):
    """
    What runs the teacher.

    Attributes:
        window: Sequences that it is given at once.
        runs_alone: Whether a request must have ended before the next one is given.
        is_busy: Whether it has requests that have not ended.
    """

    window: int
    runs_alone: bool

    @property
    def is_busy(self) -> bool: ...

    def submit(self, sequence: int, prompt: NDArray[np.uint32]) -> None:
        """
        Begin a request; its id is the sequence's number.

        Raises:
            EngineError: It has ended.
        """

    def step(self) -> None:
        """
        Let it work.

        Raises:
            EngineError: It has ended.
        """


class Feed:
    """
    Args:
        engine: What runs the teacher.
        desk: Where its worker sends records.
        tokens_of: Tokens of a sequence, [T + 1].
        counted_of: Which of its positions get records, [T]; None: all.
        given_of: Ids that it is asked about, which are its records then, each counted once; None: records are drawn.
        patience: Seconds in which the worker of an engine that has nothing to do must answer.
    """

    def __init__(
        self,
        engine: Engine,
        desk: Desk,
        tokens_of: Callable[[int], NDArray[np.uint32]],
        counted_of: Callable[[int], NDArray[np.bool_] | None],
        given_of: Callable[[int], Given] | None = None,
        patience: float = _PATIENCE_SECONDS,
    ) -> None:
        self._engine, self._desk, self._patience = engine, desk, patience
        self._tokens_of, self._counted_of, self._given_of = tokens_of, counted_of, given_of
        self._assembly = Assembly()
        self._waiting: deque[Output] = deque()
        self._runs: dict[int, int] = {}
        self._syncs = 0

    def records(self, sequences: Iterable[int]) -> Iterator[tuple[Output, Mapping[str, NDArray[Any]]]]:
        """
        Run the engine over sequences.

        Yields:
            In their order: each with its records as ``made``, and the columns that its logits gave.

        Raises:
            ValueError: Logits that may not be drawn from; names sequence and position.
            EngineError: The engine has ended, or gives no rows of a sequence.
            CaptureError: Its worker has ended.
        """
        numbers = iter(sequences)
        while True:
            while len(self._waiting) < self._engine.window and (sequence := next(numbers, None)) is not None:
                self._begin(sequence)
            if not self._waiting:
                return
            if self._engine.is_busy:
                self._engine.step()
            self._collect()
            while self._waiting and self._is_done(self._waiting[0].sequence):
                output = self._waiting.popleft()
                self._desk.close(output.sequence)
                del self._runs[output.sequence]
                targets, columns = self._assembly.take(output.sequence)
                yield output._replace(made=targets), columns

    def _begin(self, sequence: int) -> None:
        tokens, counted = self._tokens_of(sequence), self._counted_of(sequence)
        self._waiting.append(Output(sequence, tokens, counted, None))
        self._runs[sequence] = 0
        self._run(self._waiting[-1])

    def _run(self, output: Output) -> None:
        sequence, tokens = output.sequence, output.tokens
        self._runs[sequence] += 1
        self._assembly.expect(sequence, tokens.size - 1)
        if self._given_of is None:
            self._desk.open(sequence, tokens, output.counted)
        else:
            self._desk.open(sequence, tokens, output.counted, "given", self._given_of(sequence))
        self._engine.submit(sequence, tokens[:-1])

    def _is_done(self, sequence: int) -> bool:
        return self._assembly.is_whole(sequence) and not (self._engine.runs_alone and self._engine.is_busy)

    def _collect(self) -> None:
        """Take what has arrived; of an engine without work, all that is on its way, and run the rest again."""
        waits = not self._engine.is_busy and not self._is_done(self._waiting[0].sequence)
        if waits:
            self._syncs += 1
            self._desk.sync(self._syncs)
        while True:
            arrived = self._desk.next(self._patience if waits else 0.0)
            if isinstance(arrived, Records):
                self._assembly.add(arrived.sequence, arrived.part)
            elif isinstance(arrived, Refused):
                raise ValueError(arrived.reason)  # noqa: TRY004  of logits
            elif isinstance(arrived, Gone):
                raise CaptureError(
                    "the process that draws in the engine has ended, its messages are above; what was captured is "
                    "kept, run the same command again to resume"
                )
            elif isinstance(arrived, Synced):
                if waits and arrived.number == self._syncs:
                    self._run_again()
                    return
            elif arrived is None:
                if waits:
                    raise CaptureError(
                        f"a worker of the engine has said nothing for {self._patience:g} seconds; what was captured is "
                        "kept, end its processes and run the same command again to resume"
                    )
                return

    def _run_again(self) -> None:
        """Run what the engine has lost."""
        for output in self._waiting:
            if self._assembly.is_whole(output.sequence):
                continue
            if self._runs[output.sequence] == _RUNS:
                raise EngineError(
                    f"the engine ended {_RUNS} requests without {self._assembly.describe(output.sequence)}; what was "
                    "captured is kept; see its messages, then run the same command again to resume"
                )
            self._run(output)
            if self._engine.runs_alone:
                return
