"""
What a run tells while it goes: its log, stderr and the trackers that people look at; and how fast it is.

The only door to accelerate's trackers. What a tracker does never ends a run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import os
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from sklformat.distill.models.devices import peak_flops, peak_memory_bytes
from sklformat.distill.student.runs import Run
from sklformat.errors import SettingsError
from sklformat.progress import Reach, say, show
from sklformat.settings.train import TrainConfig

Report = Callable[[int, int, float], None]
"""Called with (steps done, steps in total, mean loss since the last call, nats per position)."""

_BOARD = "tensorboard"


class Pace:
    """
    How fast a run is, from one line of its log to the next.

    Args:
        device: Where this process computes.
        world_size: How many processes there are, each with such a device.
        flops: Floating point operations of the student's own training per position; None: not known.
        dtype: Of its products.
    """

    def __init__(self, device: torch.device, world_size: int, flops: float | None, dtype: str) -> None:
        self._device = device
        peak = peak_flops(torch.cuda.get_device_name(device), dtype) if device.type == "cuda" else None
        self._full = None if peak is None or flops is None else world_size * peak / flops
        self._begin = time.monotonic()
        self._positions, self._waited = 0, 0.0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time of the block as waiting for data."""
        begin = time.monotonic()
        yield
        self._waited += time.monotonic() - begin

    @contextlib.contextmanager
    def apart(self) -> Iterator[None]:
        """Leave out the time of the block: it trains nothing."""
        begin = time.monotonic()
        yield
        self._begin += time.monotonic() - begin

    def add(self, positions: int) -> None:
        """Count the positions of a step, of all processes."""
        self._positions += positions

    def figures(self) -> dict[str, float]:
        """
        Since the last call: positions per second, the share of time that went by waiting for data, and MFU.

        MFU, model FLOPs utilisation, is the share of the devices' greatest rate that the student's own operations take
        (Chowdhery et al. 2022, arXiv 2204.02311, appendix B); it is left out where either is not known.
        """
        now = time.monotonic()
        seconds = max(now - self._begin, 1e-9)
        rate = self._positions / seconds
        found = {"tokens_per_second": round(rate, 1), "data_wait": round(min(1.0, self._waited / seconds), 4)}
        if self._full is not None:
            found["mfu"] = round(rate / self._full, 4)
        self._begin, self._positions, self._waited = now, 0, 0.0
        return {**found, "peak_memory_bytes": peak_memory_bytes(self._device)}


def training_flops(model: Any, seq_len: int) -> float | None:
    """
    Floating point operations of a model's forward and backward pass per position.

    6 for each weight that learns and 4 for each that does not, the input embedding apart, and 12 times layers, width
    and positions for attention (Chowdhery et al. 2022, arXiv 2204.02311, appendix B).

    Args:
        model: A causal language model.
        seq_len: Positions of a sequence; 0: of any length, of which attention's part is left out.

    Returns:
        None where experts share the work, so that the weights do not say it.
    """
    config = model.config.get_text_config()
    if any(getattr(config, name, None) for name in ("num_local_experts", "num_experts", "n_routed_experts")):
        return None
    looked_up = model.get_input_embeddings().weight
    is_tied = looked_up is getattr(model.get_output_embeddings(), "weight", None)
    weights = [p for p in model.parameters() if p is not looked_up or is_tied]
    products: float = sum((6.0 if p.requires_grad else 4.0) * p.numel() for p in weights)
    return products + 12.0 * int(config.num_hidden_layers * config.hidden_size) * seq_len


class Reporter:
    """
    Tells of a run's progress: log, trackers, and stderr or a callback.

    A context.

    Args:
        run: Where the log goes; None: say nothing (the further processes of one run).
        config: The run's.
        first: Steps done before.
        again: Lines of the log that come again, as ``start_log`` gives them: most trackers have them already.
        report: Called instead of saying anything.
    """

    def __init__(
        self, run: Run | None, config: TrainConfig, *, first: int, again: set[tuple[int, bool]], report: Report | None
    ) -> None:
        self._run, self._config, self._first, self._again, self._report = run, config, first, again, report
        self._trackers: dict[str, Any] = {}
        self._reach: Reach = lambda _done, _note="": None
        self._notes = {"loss": "", "evaluation": ""}
        self._held = contextlib.ExitStack()

    def __enter__(self) -> Reporter:
        if self._run is None:
            return self
        config, run = self._config, self._run
        self._trackers = _opened(run, config, self._first)
        for name, tracker in self._trackers.items():
            self._held.callback(_survives, name, tracker.finish)
        if self._report is None:
            name = f"train {config.method}"
            if self._first:
                say(f"{name}: resumed after step {self._first:,}")
            curves = f", and in {run.directory / _BOARD} for TensorBoard" if _BOARD in self._trackers else ""
            say(f"{name}: the log is in {run.log_path}{curves}; its loss is the {config.loss_name}, nats per position")
            self._reach = self._held.enter_context(show(name, config.steps, unit="step", first=self._first))
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()

    def reach(self, step: int) -> None:
        """Tell that ``step`` steps are done."""
        self._reach(step, ", ".join(filter(None, self._notes.values())))

    def line(self, step: int, row: Mapping[str, float]) -> None:
        """Log what ``step`` steps have come to; ``row`` has at least loss, tokens_per_second and data_wait."""
        if self._run is None:
            return
        self._tell(step, row, is_evaluation=False)
        self._notes["loss"] = (
            f"{self._config.loss_name} {row['loss']:.4f}, {row['tokens_per_second']:,.0f} tokens/s, "
            f"{row['data_wait']:.0%} waiting for data"
        )
        if self._report is not None:
            self._report(step, self._config.steps, row["loss"])

    def evaluation(self, step: int, row: Mapping[str, float]) -> None:
        """Log how good the student is after ``step`` steps; ``row`` has at least eval_lm_loss."""
        if self._run is None:
            return
        self._tell(step, row, is_evaluation=True)
        self._notes["evaluation"] = f"held-out LM loss {row['eval_lm_loss']:.4f}"

    def _tell(self, step: int, row: Mapping[str, float], *, is_evaluation: bool) -> None:
        assert self._run is not None
        self._run.log({"step": step, **row})
        for name, tracker in list(self._trackers.items()):
            # TensorBoard forgets what comes again; the others would show it twice.
            told = name == _BOARD or (step, is_evaluation) not in self._again
            if told and not _survives(name, tracker.log, dict(row), step=step):
                del self._trackers[name]


# --- trackers --------------------------------------------------------------------------------------------------------


def check_installed(config: TrainConfig) -> None:
    """
    Make sure that the trackers of a run can be had, before anything is loaded.

    Raises:
        SettingsError: The package of one is missing.
        ModuleNotFoundError: That of them all, accelerate, is.
    """
    for name in _names(config):
        if not _is_installed(name):
            raise SettingsError(
                f"report_to {name}: the package {name} is not installed; install it, or leave it out of report_to"
            )
        if not _is_installed("accelerate"):
            raise ModuleNotFoundError(f"report_to {name} needs accelerate", name="accelerate")


def _names(config: TrainConfig) -> list[str]:
    """Of the trackers of a run, each once; where nothing is said, TensorBoard if it is installed."""
    if config.report_to:
        return [name for name in dict.fromkeys(config.report_to) if name != "none"]
    return [_BOARD] if _is_installed(_BOARD) and _is_installed("accelerate") else []


def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _opened(run: Run, config: TrainConfig, first: int) -> dict[str, Any]:
    """
    The trackers of a run, by name, each in the same run of its own as before.

    Raises:
        SettingsError: One does not start.
    """
    names = _names(config)
    if not names:
        return {}
    from accelerate import PartialState  # noqa: PLC0415  slow to import
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS  # noqa: PLC0415

    PartialState(cpu=config.device == "cpu")  # without which accelerate's trackers say nothing
    ids = run.tracker_ids()
    opened = {name: _start(LOGGER_TYPE_TO_CLASS[name], name, ids, run, config, first) for name in names}
    if ids:
        run.keep_tracker_ids(ids)
    return opened


def _start(made: Any, name: str, ids: dict[str, str], run: Run, config: TrainConfig, first: int) -> Any:
    """
    A tracker that speaks of the run that ``ids`` names, or of a new one, which ``ids`` then names.

    Raises:
        SettingsError: It does not start.
    """
    project = _BOARD if name == _BOARD else os.environ.get("WANDB_PROJECT", "sklformat")
    folder = [str(run.directory)] if made.requires_logging_directory else []
    is_new = name not in ids
    if is_new and name != _BOARD:  # which knows it by its directory
        ids[name] = f"{run.directory.name}-{uuid.uuid4().hex[:8]}"
    own = ids.get(name)
    known: dict[str, dict[str, Any]] = {
        "mlflow": {"run_name": own} if is_new else {"run_id": own},
        "tensorboard": {"purge_step": first + 1},
        "trackio": {"name": own, "resume": "allow"},
        "wandb": {"id": own, "name": run.directory.name, "resume": "allow", "dir": str(run.directory)},
    }
    try:
        with contextlib.redirect_stdout(sys.stderr):  # stdout is for the result
            tracker = made(project, *folder, **known[name])
            tracker.main_process_only = False  # only the first process comes here
            tracker.start()
            if name == "mlflow":
                ids[name] = tracker.tracker.info.run_id
            if is_new and name != _BOARD:  # where settings would be a run of their own
                values = dataclasses.asdict(config).items()
                tracker.store_init_configuration({k: v if isinstance(v, int | float) else str(v) for k, v in values})
    except Exception as error:
        said = str(error).strip().partition("\n")[0]
        raise SettingsError(
            f"the tracker {name} does not start ({type(error).__name__}: {said}); set it up, or leave it out of "
            "report_to"
        ) from error
    return tracker


def _survives(name: str, call: Callable[..., None], *arguments: Any, **named: Any) -> bool:
    """Whether a tracker takes what it is told; what it raises is said."""
    try:
        with contextlib.redirect_stdout(sys.stderr):
            call(*arguments, **named)
    except Exception as error:  # noqa: BLE001  another's program; training is worth more than its curves
        said = str(error).strip().partition("\n")[0]
        say(f"note: the tracker {name} has failed ({type(error).__name__}: {said}); training continues without it")
        return False
    return True
