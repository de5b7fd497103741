"""
Inside a worker of an engine: draws from the rows that it sees, and sends the records to the driving process.

Knows no engine.  Rows come in the engine's order; what a row gives depends on its logits, the seed, the sequence and
the position alone.
Shape letters: P rows of one chunk, T positions of the sequence, K of them that count, V vocabulary, N rounds.
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
from collections.abc import Callable, Iterable
from dataclasses import replace
from queue import Full, Queue, SimpleQueue
from threading import Thread
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sklformat.capture import merge_draws
from sklformat.distill.engines import messages
from sklformat.distill.engines.assembly import Part
from sklformat.distill.engines.hooks import Step, logits_of
from sklformat.distill.engines.messages import Line, Settings, Wanted
from sklformat.distill.teacher.arrivals import Arrival, Draws
from sklformat.distill.teacher.drawing import Drawer, on_host
from sklformat.distill.teacher.gpu_sampler import DeviceSampler
from sklformat.distill.teacher.logit_columns import LogitColumns
from sklformat.errors import CaptureError
from sklformat.format.columns import RECORD_LOGPROB
from sklformat.format.records import SparseTargets

_OF_ONE = 4  # arrays that tell of one sequence
_WAITING = 64  # chunks at most that are drawn and not sent
_LOOK_SECONDS = 1.0  # between looks at whether anybody is still told
_here: dict[str, Worker] = {}


class _Known(NamedTuple):
    """
    A sequence: what is wanted of its rows, its tokens [T + 1], which of its positions count, [T]; and where ids are
    given, [T + 1] offsets of each position's, and the ids.
    """

    wanted: Wanted
    tokens: NDArray[np.uint32]
    counted: NDArray[np.bool_]
    offsets: NDArray[np.int64]
    token_ids: NDArray[np.uint32]


class Worker:
    """
    Args:
        line: To the driving process.

    Raises:
        CaptureError: There is nobody at its other end.
    """

    def __init__(self, line: Line) -> None:
        self._line = line
        self._answers: SimpleQueue[messages.Message | None] = SimpleQueue()
        self._queue: Queue[Callable[[], None]] = Queue(_WAITING)
        self._lost = self._is_apart = False
        for work in (self._listen, self._tell):
            Thread(target=work, name="sklformat", daemon=True).start()
        said, _ = self._answer()
        self._is_apart = said.pop("driver") != os.getpid()
        self._settings = replace(Settings(**said), columns=tuple(said["columns"]))
        how: dict[str, Any] = {"rounds": self._settings.rounds, **self._settings.sampling}
        self._sampler = DeviceSampler(**how) if self._settings.on_device else None
        self._drawer = Drawer(kind=self._settings.kind, rounds=self._settings.rounds, sampling=self._settings.sampling)
        self._known: dict[int, _Known] = {}
        self._alone: _Alone | None = None

    def show(self, step: Step) -> None:
        """
        Draw from all rows of a step.

        Raises:
            CaptureError: The driving process is gone.
        """
        self._ask(number for rows in step.rows if (number := number_of(rows.request)) not in self._known)
        for block, logits_PV in logits_of(step):
            assert logits_PV is not None
            at = 0
            for rows in block:
                self._take(number_of(rows.request), rows.first, rows.prompt, logits_PV[at : at + rows.size])
                at += rows.size

    def show_layer(self, logits_PV: Tensor) -> None:
        """
        Draw from the logits of a layer that knows no request: there is one at a time, in one chunk.

        The engine asks for the logits of its last row first, to sample from them, and then for those of its prompt.

        Raises:
            CaptureError: The driving process is gone.
        """
        said, arrays = self._answer({"ask": None})
        if said["sequence"] is None:
            return  # the engine tries itself out
        run = said["sequence"], said["run"]
        if self._alone is None or self._alone.run != run:
            self._known[said["sequence"]] = _Known(said["wanted"], *arrays)
            self._alone = _Alone(run, logits_PV[:1].clone())
            if len(logits_PV) > 1:
                self._refuse(f"the layer showed {len(logits_PV)} rows first, 1 was expected")
            logits_PV = logits_PV[1:]
        alone, sequence = self._alone, said["sequence"]
        prompt = arrays[0].size - 1
        rows_PV = logits_PV[: max(0, prompt - 1 - alone.next)]
        if len(rows_PV):
            self._take(sequence, alone.next, prompt, rows_PV)
            alone.next += len(rows_PV)
        if alone.next == prompt - 1:
            self._take(sequence, alone.next, prompt, alone.last_1V)
            alone.next += 1

    def _take(self, sequence: int, first: int, prompt: int, logits_PV: Tensor) -> None:
        """Draw from rows of a sequence, and queue what comes of it."""
        if self._lost:
            raise CaptureError("the process that drives this capture is gone; the engine ends")
        known = self._known[sequence]
        end = first + len(logits_PV)
        if end == prompt:  # begun again, it is asked for again
            del self._known[sequence]
        if known.wanted == "nothing":
            return
        if prompt != known.counted.size:
            self._refuse(
                f"sequence {sequence}: the engine's prompt has {prompt} tokens, it was given {known.counted.size}"
            )
            return
        if known.wanted == "log-probs":
            self._test(sequence, first, known, logits_PV)
            return
        within_T = np.zeros_like(known.counted)
        within_T[first:end] = known.counted[first:end]
        taken = LogitColumns(self._settings.columns, known.tokens)
        columns = taken if self._settings.columns else None
        slices = [(first, logits_PV[:, : self._settings.vocab_size])]
        try:
            if known.wanted == "given":
                drawn: Arrival | SparseTargets = _asked(known, first, end)
                taken.add_given(*slices[0], known.offsets, known.token_ids)
                taken.fetch()
            elif self._sampler is not None and within_T.any():
                drawn = self._sampler.draw(sequence, prompt, slices, columns, within_T)
            else:
                drawn = self._drawer.draw(sequence, on_host(slices), columns, within_T)
        except ValueError as error:
            self._refuse(str(error))
            return

        def tell() -> None:
            part = _part(first, end, drawn, taken, within_T)
            said = {"rows": sequence, "first": first, "columns": list(part.columns)}
            self._line.send(said, part.lengths, part.token_ids, part.pairs, *part.columns.values())

        self._put(tell)

    def _test(self, sequence: int, first: int, known: _Known, logits_PV: Tensor) -> None:
        """Send log-probs in place of records: of the tokens that follow, and the greatest of each row."""
        scores_PV = logits_PV.float().log_softmax(-1)
        labels_P = torch.from_numpy(known.tokens[first + 1 : first + 1 + len(logits_PV)].astype(np.int64))
        labels = scores_PV.gather(1, labels_P.to(scores_PV.device)[:, None])[:, 0].cpu().numpy()
        said = {"tested": sequence, "first": first, "width": logits_PV.shape[1], "type": str(logits_PV.dtype)}
        self._line.send(said, labels, scores_PV.amax(-1).cpu().numpy())

    def _refuse(self, reason: str) -> None:
        self._put(functools.partial(self._line.send, {"refused": reason}))

    def _put(self, tell: Callable[[], None]) -> None:
        """Queue what is to be told, and wait while too much is; once nobody is told any more, let go of it."""
        while not self._lost:
            with contextlib.suppress(Full):
                self._queue.put(tell, timeout=_LOOK_SECONDS)
                return

    def _tell(self) -> None:
        """Tell what is queued, when its device has it; a thread of its own."""
        try:
            with contextlib.suppress(OSError):
                while not self._lost:
                    tell = self._queue.get()
                    try:
                        tell()
                    except ValueError as error:  # logits that may not be drawn from
                        self._line.send({"refused": str(error)})
        finally:  # whatever else ended it, an error of its device say, nobody may wait for what is not told
            self._hang_up()

    def _listen(self) -> None:
        """Take what the driving process says; a thread of its own."""
        try:
            with contextlib.suppress(OSError):
                while (message := self._line.receive()) is not None:
                    number = message[0].get("sync")
                    if number is None:
                        self._answers.put(message)
                    else:
                        self._put(functools.partial(self._line.send, {"synced": number}))
        finally:
            is_abandoned = self._is_apart and not self._lost
            self._hang_up()
            self._answers.put(None)
            if is_abandoned:  # an engine that has nothing to do would wait for requests, and keep its device, for ever
                os.kill(os.getpid(), signal.SIGTERM)

    def _hang_up(self) -> None:
        self._lost = True
        self._line.close()
        with contextlib.suppress(Full):
            self._queue.put_nowait(lambda: None)  # so that who waits for something to tell looks

    def _ask(self, numbers: Iterable[int]) -> None:
        """Learn what these sequences are."""
        asked = list(dict.fromkeys(numbers))
        if not asked:
            return
        said, arrays = self._answer({"ask": asked})
        for at, (sequence, wanted) in enumerate(zip(asked, said["wanted"], strict=True)):
            self._known[sequence] = _Known(wanted, *arrays[_OF_ONE * at : _OF_ONE * (at + 1)])

    def _answer(self, question: dict[str, Any] | None = None) -> messages.Message:
        answer = None
        if not self._lost:
            with contextlib.suppress(OSError):
                if question is not None:
                    self._line.send(question)
                answer = self._answers.get()
        if answer is None:
            raise CaptureError("the process that drives this capture does not answer; the engine ends")
        return answer


class _Alone:
    """The sequence that runs alone, in which run of it; the logits of its last row; the next row that comes."""

    def __init__(self, run: tuple[int, int], last_1V: Tensor) -> None:
        self.run, self.last_1V, self.next = run, last_1V, 0


def worker_here() -> Worker | None:
    """This process's worker, connected when it is first asked for; None where it belongs to no capture."""
    address = messages.find_address()
    if address is None:
        return None
    path = address[1]
    if path not in _here:
        _here.clear()
        _here[path] = Worker(messages.dial(path))
    return _here[path]


def number_of(request: str) -> int:
    """The sequence that a request is about; vLLM puts letters of its own behind the id that it was given."""
    return int(request.partition("-")[0])


def _part(
    first: int, end: int, drawn: Arrival | SparseTargets, taken: LogitColumns, within_T: NDArray[np.bool_]
) -> Part:
    """
    What came of rows first..end - 1, when the device has it.

    Raises:
        ValueError: Logits that ``skl.draw`` refuses.
    """
    if isinstance(drawn, Draws):
        draws_KN = drawn.result()
        merged, columns = merge_draws(draws_KN), taken.values()
        if RECORD_LOGPROB in columns:  # of the first of equal draws
            begins_KN = np.ones(draws_KN.shape, bool)
            begins_KN[:, 1:] = draws_KN[:, 1:] != draws_KN[:, :-1]
            columns[RECORD_LOGPROB] = columns[RECORD_LOGPROB].reshape(draws_KN.shape)[begins_KN]
        lengths_T = np.zeros(within_T.size, np.int64)
        lengths_T[within_T] = np.diff(merged.offsets)
        return _of(first, lengths_T[first:end], merged, columns, end)
    targets = drawn if isinstance(drawn, SparseTargets) else drawn.result()
    columns = taken.values()
    if not isinstance(drawn, SparseTargets) and RECORD_LOGPROB in columns:
        columns[RECORD_LOGPROB] = drawn.record_logprob(columns[RECORD_LOGPROB])
    return _of(first, np.diff(targets.offsets)[first:end], targets, columns, end)


def _asked(known: _Known, first: int, end: int) -> SparseTargets:
    """The ids that rows first..end - 1 are asked about, each drawn once, as records of all positions."""
    offsets = np.clip(known.offsets, known.offsets[first], known.offsets[end])
    token_ids = known.token_ids[offsets[0] : offsets[-1]]
    return SparseTargets(token_ids=token_ids, counts=np.ones(token_ids.size, np.uint8), offsets=offsets - offsets[0])


def _of(
    first: int, lengths: NDArray[np.int64], targets: SparseTargets, columns: dict[str, NDArray[np.float16]], end: int
) -> Part:
    pairs = targets.counts if targets.counts is not None else targets.weights
    assert pairs is not None
    columns = {name: values if name == RECORD_LOGPROB else values[first:end] for name, values in columns.items()}
    return Part(first, lengths, targets.token_ids, pairs, columns)


def show_logits(step: Step, worker: Worker | None) -> None:
    """A step to the worker that draws; another rank of the group takes part in the making of logits alone."""
    if worker is not None:
        worker.show(step)
        return
    for _ in logits_of(step):
        pass
