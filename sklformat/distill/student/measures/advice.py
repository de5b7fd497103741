"""
advise(): how few records are enough for a capture, by the noise that draws add to the gradients of given students.

Measures through ``noise``, and prices each row by ``capture.estimates``.
"""

from __future__ import annotations

import dataclasses
import importlib
import operator
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sklformat.capture.estimates import estimate
from sklformat.distill.models import loading, outputs
from sklformat.distill.models.devices import find_device
from sklformat.distill.student.measures import evaluation, origins
from sklformat.distill.student.measures.noise import Lesson, NoiseTable, measure_noise
from sklformat.distill.student.measures.passages import Passages
from sklformat.distill.text.chats import read_dataset_texts, write_first_rows
from sklformat.errors import SettingsError
from sklformat.files.disk import make_place_of
from sklformat.progress import say, show
from sklformat.settings.estimate import EstimateConfig
from sklformat.settings.eval import EvalConfig
from sklformat.settings.files import TextFiles

_NOMINAL_POSITIONS = 1e9  # of a capture whose bytes per position alone are asked for
_SAME_BYTES = 1.02  # times the bytes of a row: up to there another costs the same


@dataclass(frozen=True, slots=True, kw_only=True)
class NoiseRow:
    """
    One way to draw, what it adds to the noise, and what it costs.

    Attributes:
        sampler, rounds: How it draws.
        unique_tokens: Records per position, mean, as measured.
        bytes_per_position: Tokens, checksums, index and padding included.
        shares, share_errors: Of each student the draws' part of the gradient's noise, and its standard error.
        variances, variance_errors: Of each student the variance that draws add, and its standard error.
        bytes: Of the whole cache; None where ``positions`` are not given.
        disks: How many hold it, likewise.
    """

    sampler: str
    rounds: int
    unique_tokens: float
    bytes_per_position: float
    shares: list[float]
    share_errors: list[float]
    variances: list[float]
    variance_errors: list[float]
    bytes: int | None
    disks: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    """
    What ``advise`` found.

    Attributes:
        teacher: That the students learn from.
        students: As given.
        data_variances, data_errors: Of each student the gradient's variance over sequences, and its standard error.
        num_sequences, num_positions: Measured on.
        noise: The share that is allowed.
        rows: All that was tried.
        recommended: Of the rows whose share is at most that for each student, the one of the fewest bytes, as
            ``choose`` says; None: none is.
        close: What is within a standard error of another choice, in words.
        positions, gpu_hours, days, price: Of the whole capture, whatever its rounds; None where not known.
    """

    teacher: str
    students: list[str]
    data_variances: list[float]
    data_errors: list[float]
    num_sequences: int
    num_positions: int
    noise: float
    rows: list[NoiseRow]
    recommended: NoiseRow | None
    close: list[str]
    positions: float | None
    gpu_hours: float | None
    days: float | None
    price: float | None

    def __str__(self) -> str:
        measured_on = f"{self.num_sequences} sequences, {self.num_positions:,} positions"
        lines = [f"noise that draws add to the gradient, as a share of the text's own, ± standard error; {measured_on}"]
        names = [f"share {letter}" for letter in _letters(self.students)]
        lines += [f"{name}: {student}" for name, student in zip(names, self.students, strict=True)]
        has_size = self.positions is not None
        heads = ["sampler", "N", "records", "bytes/position", *names, *(["TB", "disks"] if has_size else [])]
        table = [heads]
        for row in self.rows:
            shares = [f"{s:.3g} ± {e:.1g}" for s, e in zip(row.shares, row.share_errors, strict=True)]
            size = [f"{(row.bytes or 0) / 1e12:,.3f}", f"{row.disks:,}"] if has_size else []
            cost = [f"{row.unique_tokens:.2f}", f"{row.bytes_per_position:.1f}"]
            table.append([row.sampler, str(row.rounds), *cost, *shares, *size])
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        for first, *others in table:
            cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
            lines.append("  ".join([first.ljust(widths[0]), *cells]))
        if self.gpu_hours is not None:
            price = "" if self.price is None else f", price {self.price:,.2f}"
            lines.append(f"the teacher takes {self.gpu_hours:,.1f} GPU hours, {self.days:,.2f} days{price}, at any N")
        return "\n".join([*lines, self._verdict(), *self.close])

    def _verdict(self) -> str:
        row = self.recommended
        if row is None:
            best = min(self.rows, key=_worst)
            return (
                f"none of these adds at most {self.noise:g} for each student (the least is {_name(best)}, with "
                f"{_worst(best):.3g}); try more rounds"
            )
        return (
            f"recommended: --sampler {row.sampler} --rounds {row.rounds}, the fewest bytes whose share is at most "
            f"{self.noise:g} for each student ({_worst(row):.3g})"
        )


def advise(config: EstimateConfig, *, progress: bool = True) -> Advice:
    """
    Measure what draws add to the noise of the students' gradients, and recommend sampler and rounds.

    Measured on the text that ``config`` names, by the teacher's tokenizer; an adapter is merged into its model, and
    the gradient is that of the whole.

    Args:
        config: With teacher, students and text or a dataset; where a calibration run has given its speed, the cost
            says it.
        progress: Whether to say on stderr how far it is.

    Returns:
        The table and the recommendation; the plot is written to ``config.plot``.

    Raises:
        SettingsError: A student's tokenizer or vocabulary is not the teacher's; shows both.
        ValueError: A wrong argument, no such device, or too few sequences; or as ``measure_noise``.
        OSError: A model or the text cannot be read, or the plot cannot be written.
        ModuleNotFoundError: matplotlib is not installed, and a plot is asked for.
    """
    assert config.teacher is not None
    draw = None if config.plot is None else drawing(config.plot)
    device = find_device(config.device)
    if progress:
        say(f"estimate: loading {config.teacher} and {', '.join(config.student)}")
    with tempfile.TemporaryDirectory(prefix="sklformat-") as place:
        asked = _asked(config, Path(place))
        with evaluation.opened(asked) as passages:
            tokenizer = loading.load_tokenizer(config.teacher, **loading.named_of(config))
            teacher = _load(config, config.teacher, _teacher_dtype(config, device), device)
            known = loading.check_fit(tokenizer, teacher, seq_len=passages.seq_len or None)
            vocab_size = passages.count_ids(config.teacher, tokenizer, teacher, known)
            students = {name: _student(config, name, passages, vocab_size, device) for name in config.student}
            passages.begin(tokenizer)
            lessons = [Lesson(passage.input_ids_BT[0], passage.labels_P >= 0) for passage in passages]
    with show("estimate", 2 * len(lessons), unit="sequence", shown=progress) as reach:
        table = measure_noise(
            teacher,
            students,
            lessons,
            vocab_size=vocab_size,
            rounds=config.noise_rounds,
            seed=config.noise_seed,
            reach=reach,
        )
    advice = _advice(config, table, vocab_size)
    if draw is not None:
        rows: list[Any] = [dataclasses.asdict(row) for row in advice.rows]
        draw(rows, advice.students, config.noise, config.plot)
    return advice


def drawing(path: Path) -> Any:
    """
    What draws the plot, and a directory for it: had before anything is measured, which could else be for nothing.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        OSError: The directory cannot be made.
    """
    draw = importlib.import_module("sklformat.plot").plot_noise  # loads matplotlib
    make_place_of(path)
    return draw


def _asked(config: EstimateConfig, place: Path) -> EvalConfig:
    """The text as eval reads it, by the teacher's tokenizer, a sequence at once."""
    given: dict[str, Any] = {f.name: getattr(config, f.name) for f in dataclasses.fields(TextFiles)}
    if config.dataset:
        rows = place / "rows.jsonl"
        texts = read_dataset_texts(config.dataset, split=config.dataset_split, field=config.text_field)
        write_first_rows(rows, texts, num_sequences=config.noise_sequences, seq_len=config.seq_len)
        given = {"text": (rows,)}
    return EvalConfig(
        **given,
        student=str(config.teacher),
        seq_len=config.seq_len,
        num_sequences=config.noise_sequences,
        batch_size=1,
        trust_remote_code=config.trust_remote_code,
        adapter_base=config.adapter_base,
    )


def _teacher_dtype(config: EstimateConfig, device: torch.device) -> loading.Dtype:
    if config.dtype == "auto":
        return "float32" if device.type == "cpu" else "bfloat16"
    return config.dtype


def _load(config: EstimateConfig, name: str, dtype: loading.Dtype, device: torch.device) -> Any:
    return loading.load_model(name, dtype=dtype, device=device, **loading.named_of(config))


def _student(config: EstimateConfig, name: str, passages: Passages, vocab_size: int, device: torch.device) -> Any:
    """
    A student in float32, whose ids are the teacher's.

    Raises:
        SettingsError, ValueError: They are not, or its weights cannot learn.
    """
    path = origins.find_model(name)
    tokenizer = loading.load_own_tokenizer(path, **loading.named_of(config))
    conflict = "" if tokenizer is None else passages.made_by.conflict(tokenizer)
    if conflict:
        raise SettingsError(
            f"the student {name} has a different tokenizer from the teacher {config.teacher}: {conflict}; the noise is "
            "that of records over the same ids: give a student of the teacher's tokenizer"
        )
    model = _load(config, path, "float32", device)
    width = outputs.head_width(model)
    if width < vocab_size:
        raise SettingsError(
            f"the student {name} has {width} logits, the teacher {config.teacher} {vocab_size} ids; give a student of "
            "the teacher's vocabulary"
        )
    try:
        loading.check_trainable(model)
        if passages.seq_len:
            loading.check_length(model, passages.seq_len)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    return model


def _advice(config: EstimateConfig, table: NoiseTable, vocab_size: int) -> Advice:
    """The table with its costs, and what follows from it."""
    found, rows = [table.students[name] for name in config.student], []
    given = dataclasses.replace(config, positions=config.positions or _NOMINAL_POSITIONS)
    for index, (sampler, rounds) in enumerate(zip(table.samplers, table.rounds, strict=True)):
        unique = min(table.unique_tokens[index], float(rounds))
        cost = estimate(dataclasses.replace(given, rounds=rounds, unique_tokens=unique, vocab_size=vocab_size))
        rows.append(
            NoiseRow(
                sampler=sampler,
                rounds=rounds,
                unique_tokens=unique,
                bytes_per_position=cost.bytes_per_position,
                shares=[student.shares[index] for student in found],
                share_errors=[student.share_errors[index] for student in found],
                variances=[student.variances[index] for student in found],
                variance_errors=[student.variance_errors[index] for student in found],
                bytes=None if config.positions is None else cost.bytes,
                disks=None if config.positions is None else cost.disks,
            )
        )
    recommended, close = choose(rows, config.noise)
    is_whole = config.positions is not None
    return Advice(
        teacher=str(config.teacher),
        students=list(config.student),
        data_variances=[student.data_variance for student in found],
        data_errors=[student.data_error for student in found],
        num_sequences=table.num_sequences,
        num_positions=table.num_positions,
        noise=config.noise,
        rows=rows,
        recommended=recommended,
        close=close,
        positions=config.positions,
        gpu_hours=cost.gpu_hours if is_whole else None,
        days=cost.days if is_whole else None,
        price=cost.price if is_whole else None,
    )


def choose(rows: Sequence[NoiseRow], noise: float) -> tuple[NoiseRow | None, list[str]]:
    """
    The row of the fewest bytes whose share is at most ``noise`` for each student, and what is too close to say.

    Of rows whose bytes are within 2 % of the fewest, that of the smallest share.

    Returns:
        The row, None where there is none; and a line for it if its share is within a standard error of ``noise``, and
        one for the smallest of fewer bytes that may be enough.
    """
    ordered = sorted(rows, key=lambda row: row.bytes_per_position)
    enough = [row for row in ordered if _worst(row) <= noise]
    same = [row for row in enough if row.bytes_per_position <= enough[0].bytes_per_position * _SAME_BYTES]
    chosen = min(same, key=_worst, default=None)
    close = []
    if chosen is not None and not _is_sure(chosen, noise):
        surer = next((row for row in ordered if _is_sure(row, noise)), None)
        advice = "nothing here is surer" if surer is None else f"{_name(surer)} is surer"
        close.append(f"close: its share is within a standard error of {noise:g}; {advice}")
    smaller = [
        row for row in ordered if chosen is None or row.bytes_per_position * _SAME_BYTES < chosen.bytes_per_position
    ]
    may_do = next((row for row in smaller if _may_do(row, noise)), None)
    if may_do is not None and any(map(operator.gt, may_do.share_errors, may_do.shares)):
        close.append(f"the share of {_name(may_do)} is not known: its error is larger; give more --noise-sequences")
    elif may_do is not None:
        close.append(
            f"close: {_name(may_do)} may be enough, within a standard error; more --noise-sequences would tell"
        )
    return chosen, close


def _worst(row: NoiseRow) -> float:
    return max(row.shares)


def _is_sure(row: NoiseRow, noise: float) -> bool:
    return all(share + error <= noise for share, error in zip(row.shares, row.share_errors, strict=True))


def _may_do(row: NoiseRow, noise: float) -> bool:
    return all(share - error <= noise for share, error in zip(row.shares, row.share_errors, strict=True))


def _name(row: NoiseRow) -> str:
    return f"{row.sampler} with {row.rounds} round{'s' * (row.rounds > 1)}"


def _letters(names: Sequence[str]) -> list[str]:
    return [chr(ord("A") + number) for number in range(len(names))]
