"""
The directory of a training run: its lock, its settings, its checkpoint, its log and what it leaves at the end.

Knows nothing of models or losses. Every file appears whole or not at all, so a killed run can always be resumed.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from sklformat.errors import CorruptError, SettingsError, describe_bad_json
from sklformat.files.directories import published, refuse_foreign
from sklformat.files.disk import LOCK_NAME, Disk, locked_directory, naming, write_atomically
from sklformat.progress import Reach, say, show

_SETTINGS, _SUMMARY, _CHECKPOINT, _LOG, _MODEL = "run.json", "summary.json", "checkpoint.pt", "metrics.jsonl", "model"
_BOARD = "tensorboard"
_LOCK = re.compile(re.escape(LOCK_NAME))


Report = Callable[[int, int, float], None]
"""Called with (steps done, steps in total, mean loss since the last call, nats per position)."""


class Run:
    """
    One training run on disk; made by ``opened``.

    Attributes:
        directory: Where it is.
        model_directory: Where the finished model goes, in transformers' layout.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.model_directory = directory / _MODEL

    def summary(self) -> dict[str, Any] | None:
        """What a finished run said at its end; None while it is not finished."""
        path = self.directory / _SUMMARY
        return _read_json(path) if path.exists() else None

    def finish(self, save_model: Callable[[Path], None], summary: Mapping[str, Any]) -> None:
        """
        Publish the model, then the summary, then drop the checkpoint, in this order so that each crash can be resumed.

        Args:
            save_model: Writes the model's files into the directory it is given.
            summary: What ``summary`` returns from now on; JSON values.
        """
        with published(self.model_directory, replace=True) as partial:
            save_model(partial)
        write_json(self.directory / _SUMMARY, summary)
        (self.directory / _CHECKPOINT).unlink(missing_ok=True)

    def save_checkpoint(self, state: Mapping[str, Any]) -> None:
        """Replace the checkpoint, durably; ``state`` holds tensors, numbers, strings, lists and dicts."""
        path = self.directory / _CHECKPOINT
        partial = path.with_name(path.name + ".partial")
        try:
            with naming(path), partial.open("wb") as file:
                torch.save(dict(state), file)
                file.flush()
                os.fsync(file.fileno())
            Disk().rename(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise

    def load_checkpoint(self) -> dict[str, Any] | None:
        """
        Return the last checkpoint, on the CPU; None if there is none.

        Raises:
            CorruptError: It cannot be read.
        """
        path = self.directory / _CHECKPOINT
        if not path.exists():
            return None
        try:
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        except (RuntimeError, ValueError, KeyError, EOFError, TypeError, pickle.UnpicklingError) as error:
            reason = str(error).partition("\n")[0]
            raise CorruptError(f"no readable checkpoint ({reason}); delete it to start again", path=path) from error
        return state

    def start_log(self, step: int) -> None:
        """
        Drop the log's lines after ``step``: the steps that a killed run did past its checkpoint come again.

        Raises:
            CorruptError: A line is not one of the log's.
        """
        path = self.directory / _LOG
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True) if path.exists() else []
        # A line without its end was cut off by the crash.
        whole = [line for line in lines if line.endswith("\n")]
        kept = [line for number, line in enumerate(whole, 1) if _step_of(line, path, number) <= step]
        write_atomically(path, "".join(kept).encode())

    def log(self, row: Mapping[str, Any]) -> None:
        """Add one line of JSON to the log; ``row`` has the key "step"."""
        with (self.directory / _LOG).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


@contextlib.contextmanager
def opened(directory: Path | str, settings: Mapping[str, Any], *, writes: bool = True) -> Iterator[Run]:
    """
    Make or open the directory of a run and hold it until the block ends.

    Args:
        directory: Made with its parents when it is not there.
        settings: What the run's result depends on; JSON values. A directory made with others is refused.
        writes: False for the further processes of one run, which neither lock nor write.

    Yields:
        The run.

    Raises:
        SettingsError: The directory holds a run with other settings, or files that are no run; shows the differences.
        InUseError: Another process trains here.
    """
    directory = Path(directory)
    if not writes:
        yield Run(directory)
        return
    with locked_directory(directory):
        path = directory / _SETTINGS
        if path.exists():
            _compare_settings(directory, _read_json(path), json.loads(json.dumps(settings)))
        else:
            refuse_foreign(directory, (file.name for file in directory.iterdir()), "run", _LOCK)
            write_json(path, settings)
        yield Run(directory)


def read_settings(directory: Path) -> dict[str, Any] | None:
    """
    What the run of a directory depends on; None: the directory is none of a run.

    Raises:
        CorruptError: It cannot be read.
    """
    path = directory / _SETTINGS
    return _read_json(path) if path.is_file() else None


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file that appears whole or not at all."""
    write_atomically(path, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CorruptError(describe_bad_json(error), path=path) from None
    if not isinstance(value, dict):
        raise CorruptError("must hold one JSON object", path=path)
    return value


def _step_of(line: str, path: Path, number: int) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError):
        raise CorruptError(
            f'line {number} is no JSON object with a "step": {line.strip()[:60]!r}; remove the line to resume',
            path=path,
        ) from None


def _compare_settings(directory: Path, there: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    differing = "; ".join(
        f"{name} was {there.get(name)!r}, asked for is {wanted.get(name)!r}"
        for name in sorted(there.keys() | wanted.keys())
        if there.get(name) != wanted.get(name)
    )
    if differing:
        raise SettingsError(
            f"{directory} was made with other settings: {differing}; use another directory, or delete this one"
        )


class Reporter:
    """
    Tells of a run's progress: log, TensorBoard where it is installed, and stderr or a callback.

    A context.

    Args:
        run: Where the log goes; None: say nothing (the further processes of one run).
        first: Steps done before.
        steps: Steps in total.
        name: Stands before what is said.
        report: Called instead of saying anything.
    """

    def __init__(self, run: Run | None, *, first: int, steps: int, name: str, report: Report | None) -> None:
        self._run, self._first, self._steps, self._name, self._report = run, first, steps, name, report
        self._board: Any = None
        self._reach: Reach = lambda _done, _note="": None
        self._note = ""
        self._held = contextlib.ExitStack()

    def __enter__(self) -> Reporter:
        if self._run is not None:
            self._board = _tensorboard(self._run.directory / _BOARD, self._first)
            if self._board is not None:
                self._held.callback(self._board.close)
            if self._report is None:
                curves = "" if self._board is None else f", and in {self._run.directory / _BOARD} for TensorBoard"
                say(f"{self._name}: the log is in {self._run.directory / _LOG}{curves}")
                self._reach = self._held.enter_context(show(self._name, self._steps, unit="step", first=self._first))
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()

    def reach(self, step: int) -> None:
        """Tell that ``step`` steps are done."""
        self._reach(step, self._note)

    def line(self, step: int, row: Mapping[str, float]) -> None:
        """Log what ``step`` steps have come to; ``row`` has at least the key "loss"."""
        if self._run is None:
            return
        self._run.log({"step": step, **row})
        if self._board is not None:
            for name, value in row.items():
                self._board.add_scalar(name, value, step)
        self._note = f"loss {row['loss']:.4f}"
        if self._report is not None:
            self._report(step, self._steps, row["loss"])


def _tensorboard(directory: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415  (optional, and slow to import)
    except ImportError:
        return None
    return SummaryWriter(str(directory), purge_step=step + 1)
