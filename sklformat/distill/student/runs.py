"""
The directory of a training run: its lock, its settings, its checkpoints, its log and the models that it leaves.

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
from typing import IO, Any

import torch

from sklformat.checksums import fingerprint_of
from sklformat.errors import CorruptError, SettingsError, describe_bad_json
from sklformat.files.directories import published, refuse_foreign
from sklformat.files.disk import LOCK_NAME, Disk, locked_directory, naming, write_atomically

_SETTINGS, _SUMMARY, _LOG, _TRACKERS = "run.json", "summary.json", "metrics.jsonl", "trackers.json"
_MODEL, _BEST, _FIGURES = "model", "best", "evaluation.json"
_CHECKPOINT, _BEFORE_DECAY = "checkpoint.pt", "checkpoint-before-decay.pt"
_LOCK = re.compile(re.escape(LOCK_NAME))
_PIECE_BYTES = 1 << 22


class Run:
    """
    One training run on disk; made by ``opened``.

    Attributes:
        directory: Where it is.
        model_directory: Where the finished model goes, in transformers' layout.
        best_directory: Where the best model so far goes, likewise.
        log_path: The log.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.model_directory, self.best_directory = directory / _MODEL, directory / _BEST
        self.log_path = directory / _LOG

    def summary(self) -> dict[str, Any] | None:
        """What the run said when it was last finished; None if it never was."""
        path = self.directory / _SUMMARY
        if not path.exists():
            return None
        return {name: value for name, value in _read_json(path).items() if name != "files"}

    def finish(self, save_model: Callable[[Path], None], summary: Mapping[str, Any], *, keep: bool) -> None:
        """
        Publish the model, then the summary, in this order so that each crash can be resumed.

        Args:
            save_model: Writes the model's files into the directory it is given.
            summary: What ``summary`` returns from now on; JSON values.
            keep: Whether the checkpoints stay.
        """
        with published(self.model_directory, replace=True) as partial:
            save_model(partial)
        write_json(self.directory / _SUMMARY, {**summary, "files": self._files()})
        if not keep:
            for name in (_CHECKPOINT, _BEFORE_DECAY):
                (self.directory / name).unlink(missing_ok=True)

    def missing(self, *, best: bool) -> str | None:
        """
        Look whether what a finished run wrote is still there, every byte of it.

        Args:
            best: Whether the best model is looked at as well.

        Returns:
            The name of a file of the finished model that is missing; None: all are there.

        Raises:
            CorruptError: A file is not as it was written.
        """
        files = _read_json(self.directory / _SUMMARY).get("files")
        if files is None:  # of before they were listed
            weights = next(self.model_directory.glob("*.safetensors"), self.model_directory / "model.safetensors")
            files = {f"{_MODEL}/config.json": None, f"{_MODEL}/{weights.name}": None}
        lost = None
        for name, fingerprint in files.items():
            path, is_best = self.directory / name, name.startswith(f"{_BEST}/")
            if is_best and not best:
                continue
            if not path.is_file():
                if is_best:
                    raise CorruptError(
                        "is missing, and no checkpoint holds it; take model/, and best_by none to do without best/",
                        path=path,
                    )
                lost = lost or name
            elif fingerprint is not None and fingerprint_of(_pieces(path)) != fingerprint:
                raise CorruptError(
                    "is not as training wrote it; put it back, or delete model/ for the same command to write it again",
                    path=path,
                )
        return lost

    def save_best(self, save_model: Callable[[Path], None], figures: Mapping[str, Any]) -> None:
        """Replace the best model so far; ``figures``, JSON values, go with it."""
        with published(self.best_directory, replace=True) as partial:
            save_model(partial)
            write_json(partial / _FIGURES, figures)

    def best_step(self) -> int | None:
        """The step of the model in best/; None: there is none, or it does not say."""
        path = self.best_directory / _FIGURES
        step = _read_json(path).get("step") if path.is_file() else None
        return step if isinstance(step, int) else None

    def _files(self) -> dict[str, str]:
        """The files of the models, and the fingerprints of their content."""
        folders = (self.model_directory, self.best_directory)
        paths = sorted(path for folder in folders for path in folder.rglob("*") if path.is_file())
        return {path.relative_to(self.directory).as_posix(): fingerprint_of(_pieces(path)) for path in paths}

    def save_checkpoint(self, state: Mapping[str, Any], *, before_decay: bool = False) -> None:
        """
        Replace the checkpoint, durably.

        Args:
            state: Tensors, numbers, strings, lists and dicts.
            before_decay: Replace the one from which a longer run resumes instead.
        """
        path = self.directory / (_BEFORE_DECAY if before_decay else _CHECKPOINT)
        partial = path.with_name(path.name + ".partial")
        try:
            with naming(path), partial.open("wb") as file:
                _save(state, file)
                file.flush()
                os.fsync(file.fileno())
            Disk().rename(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise

    def load_checkpoint(self, *, before_decay: bool = False) -> dict[str, Any] | None:
        """
        Return the last checkpoint, or that from before the decay, on the CPU; None if there is none.

        Raises:
            CorruptError: It cannot be read.
        """
        path = self.directory / (_BEFORE_DECAY if before_decay else _CHECKPOINT)
        if not path.exists():
            return None
        try:
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        except (RuntimeError, ValueError, KeyError, EOFError, TypeError, pickle.UnpicklingError) as error:
            # What torch says of a file that is not its own tells how to load it with any code that it holds.
            foreign = isinstance(error, pickle.UnpicklingError)
            reason = "not as torch.save writes plain data" if foreign else str(error).partition("\n")[0]
            raise CorruptError(f"no readable checkpoint ({reason}); delete it to start again", path=path) from error
        return state

    def start_log(self, step: int, *, evaluated: bool = True) -> set[tuple[int, bool]]:
        """
        Drop the log's lines after ``step``: the steps that a killed run did past its checkpoint come again.

        Args:
            step: Where the run resumes.
            evaluated: Whether the evaluation after ``step`` was done; else its line comes again as well.

        Returns:
            Of each line dropped its step, and whether it is of an evaluation.

        Raises:
            CorruptError: A line is not one of the log's.
        """
        path = self.log_path
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True) if path.exists() else []
        kept, dropped = [], set()
        # A line without its end was cut off by the crash.
        for number, line in enumerate((line for line in lines if line.endswith("\n")), 1):
            at = _step_of(line, path, number)
            if at[0] < step or (at[0] == step and (evaluated or not at[1])):
                kept.append(line)
            else:
                dropped.add(at)
        write_atomically(path, "".join(kept).encode())
        return dropped

    def log(self, row: Mapping[str, Any]) -> None:
        """Add one line of JSON to the log; ``row`` has the key "step"."""
        with naming(self.log_path), self.log_path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def tracker_ids(self) -> dict[str, str]:
        """By which names trackers know this run."""
        path = self.directory / _TRACKERS
        return _read_json(path) if path.exists() else {}

    def keep_tracker_ids(self, ids: Mapping[str, str]) -> None:
        """Keep them for when the run is resumed."""
        write_json(self.directory / _TRACKERS, ids)


@contextlib.contextmanager
def opened(
    directory: Path | str,
    settings: Mapping[str, Any],
    *,
    facts: Mapping[str, Any] | None = None,
    writes: bool = True,
    grows: str | None = None,
) -> Iterator[Run]:
    """
    Make or open the directory of a run and hold it until the block ends.

    Args:
        directory: Made with its parents when it is not there.
        settings: What the run's result depends on; JSON values. A directory made with others is refused.
        facts: What else ``run.json`` keeps; follows from the settings and is not compared, so that a run may be older.
        writes: False for the further processes of one run, which neither lock nor write.
        grows: The setting, a number, that may be greater than it was, as long as there is a checkpoint to resume.

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
    facts = facts or {}
    kept = {**settings, **facts}
    with locked_directory(directory):
        path = directory / _SETTINGS
        if path.exists():
            there, wanted = _read_json(path), json.loads(json.dumps(kept))
            before, asked = ({name: each[name] for name in each if name not in facts} for each in (there, wanted))
            _compare_settings(directory, before, asked, grows)
            if there != wanted:
                write_json(path, kept)
        else:
            refuse_foreign(directory, (file.name for file in directory.iterdir()), "run", _LOCK)
            write_json(path, kept)
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


def _save(state: Mapping[str, Any], file: IO[bytes]) -> None:
    try:
        torch.save(dict(state), file)
    except RuntimeError as error:  # torch ends its archive also where the disk was full, and tells of that end alone
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def _pieces(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while piece := file.read(_PIECE_BYTES):
            yield piece


def _step_of(line: str, path: Path, number: int) -> tuple[int, bool]:
    """Step of a line of the log, and whether it is of an evaluation."""
    try:
        row = json.loads(line)
        return int(row["step"]), "loss" not in row
    except (ValueError, TypeError, KeyError):
        raise CorruptError(
            f'line {number} is no JSON object with a "step": {line.strip()[:60]!r}; remove the line to resume',
            path=path,
        ) from None


def _compare_settings(directory: Path, there: Mapping[str, Any], wanted: Mapping[str, Any], grows: str | None) -> None:
    differing = [name for name in sorted(there.keys() | wanted.keys()) if there.get(name) != wanted.get(name)]
    values = "; ".join(f"{name} was {there.get(name)!r}, asked for is {wanted.get(name)!r}" for name in differing)
    if grows is None or differing != [grows]:
        if differing:
            raise SettingsError(
                f"{directory} was made with other settings: {values}; use another directory, or delete this one"
            )
        return
    if wanted[grows] < there[grows]:
        raise SettingsError(
            f"{directory}: {values}; a run may become longer, not shorter: use another directory, or ask for more"
        )
    if (directory / _SUMMARY).exists() and not (directory / _CHECKPOINT).exists():
        raise SettingsError(
            f"{directory}: {values}; the run is finished, and {_CHECKPOINT}, from which it could resume, is not there: "
            "use another directory, where --student begins from its model"
        )
