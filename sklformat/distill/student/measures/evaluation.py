"""
evaluate(): how good a student is on text or on part of a cache that it did not learn from, and how close to a teacher.

Trains nothing and draws nothing; the metrics themselves are in ``losses.sums``.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import torch

from sklformat.distill.losses import metrics
from sklformat.distill.models import attention, loading, outputs, tokenization
from sklformat.distill.models.devices import find_device
from sklformat.distill.models.identities import config_fingerprint, model_fingerprint
from sklformat.distill.models.templates import Encoders
from sklformat.distill.student.measures import origins
from sklformat.distill.student.measures.passages import Passages, RecordPassages, TextPassages
from sklformat.distill.student.validation import Validation, check_finite
from sklformat.distill.text.chats import read_texts, write_texts
from sklformat.distill.text.fingerprints import tokenizer_fingerprint, vocabulary_fingerprint
from sklformat.errors import SettingsError
from sklformat.files.disk import make_place_of, write_atomically
from sklformat.progress import say, show
from sklformat.settings.eval import EvalConfig


class ReliabilityBin(TypedDict):
    """One confidence bin: mean confidence, share of right predictions, share of all predictions; fractions."""

    confidence: float
    accuracy: float
    share: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """
    What ``evaluate`` found.

    Attributes:
        num_sequences, num_tokens: Measured on.
        bos: Where the token stood that begins a text: "document", "window" or "none".
        isolated: Whether documents did not see each other.
        lm_loss: Nats per token.
        accuracy: Share of positions whose most likely token came next.
        calibration_error: Expected calibration error (ECE), a fraction.
        confidence_gap: Mean confidence less accuracy, a fraction; positive: over-confident.
        reliability: Bins that hold predictions, in rising confidence: their mean confidence, accuracy and share.
        top1_agreement: Share of positions where student and teacher prefer the same token; None without a teacher.
        acceptance_rate: Mean of sum_v min(student, teacher), a fraction; None without a teacher.
        percent_ce_to_full: Share of the gap between CE and FullKD that is closed, percent; None without the two losses.
        teacher_loss: The teacher's own LM loss, nats per token: by its logits, else by the cache's column
            ``label_logprob``; None where there is neither.
        kl: KL(teacher || student) over the whole vocabulary, nats per position; None without a teacher.
        cache: That it was measured on; None: on text.
        sequences: Of the cache, as first:behind the last.
        cross_entropy, kl_to_records: As in ``Validation``; None without a cache.
        kl_by_records: The ``kl`` of ``Validation``: KL(teacher || student) estimated from records and entropies.
    """

    num_sequences: int
    num_tokens: int
    bos: str
    isolated: bool = False
    lm_loss: float
    accuracy: float
    calibration_error: float
    confidence_gap: float
    reliability: list[ReliabilityBin]
    top1_agreement: float | None
    acceptance_rate: float | None
    percent_ce_to_full: float | None
    teacher_loss: float | None = None
    kl: float | None = None
    cache: str | None = None
    sequences: str | None = None
    cross_entropy: float | None = None
    kl_to_records: float | None = None
    kl_by_records: float | None = None

    def __str__(self) -> str:
        measured_on = (
            f"{self.num_sequences} sequences ({self.num_tokens:,} tokens, --bos {self.bos}"
            f"{', --isolate-documents' if self.isolated else ''})"
            if self.cache is None
            else f"sequences {self.sequences} of {self.cache} ({self.num_tokens:,} positions with records)"
        )
        lines = [f"LM loss: {self.lm_loss:.4f} nats per token, {measured_on}"]
        if self.teacher_loss is not None:
            lines.append(f"LM loss of the teacher itself: {self.teacher_loss:.4f} nats per token")
        side = "above" if self.confidence_gap > 0 else "below"
        lines.append(
            f"calibration error (ECE): {self.calibration_error:.2%}; accuracy {self.accuracy:.2%}, mean confidence "
            f"{100 * abs(self.confidence_gap):.2f} points {side} it"
        )
        if self.kl is not None:
            lines.append(f"KL to the teacher: {self.kl:.4f} nats per position, over its whole distribution")
        if self.kl_by_records is not None:
            lines.append(
                f"KL to the teacher of the cache: {self.kl_by_records:.4f} nats per position, estimated from records "
                "and entropies"
            )
        if self.kl_to_records is not None:
            lines.append(
                f"KL to the records: {self.kl_to_records:.4f} nats per position, as training prints it; to compare "
                "within this cache only"
            )
        if self.top1_agreement is not None:
            lines.append(f"top-1 agreement with the teacher: {self.top1_agreement:.2%}")
        if self.acceptance_rate is not None:
            lines.append(f"sum of min(student, teacher): {self.acceptance_rate:.2%}")
        if self.percent_ce_to_full is not None:
            lines.append(f"share of the gap between CE and FullKD that is closed: {self.percent_ce_to_full:.0f} %")
        return "\n".join(lines)


def evaluate(config: EvalConfig, *, progress: bool = True) -> Evaluation:
    """
    Measure a student, on every position of the chosen sequences.

    Args:
        config: What to measure on what.
        progress: Whether to say on stderr how far it is.

    Returns:
        The figures; also written to ``config.out`` as JSON.

    Raises:
        SettingsError: The student's or the teacher's tokenizer, or vocabulary, is not that of the text or the cache;
            or the student learnt from the part of the cache, as far as the directory of its run says.
        ValueError: A wrong argument, no such device, or too few sequences.
        FormatError: The cache is damaged.
        OSError: A model, the text or the cache cannot be read.

    Source: Anshumann et al. 2025 (arXiv 2503.16870), section 4 and Table 5.
    """
    device = find_device(config.device)
    if config.out is not None:
        make_place_of(config.out)
    config = dataclasses.replace(config, student=origins.find_model(config.student))
    if progress:
        say(f"eval: loading {config.student} and reading {'the text' if config.cache is None else config.cache}")
    with opened(config) as passages:
        evaluation = _evaluate(config, passages, device, progress=progress)
    if config.out is not None:
        text = json.dumps(dataclasses.asdict(evaluation), indent=1)
        write_atomically(config.out, (text + "\n").encode())
    return evaluation


@contextmanager
def opened(config: EvalConfig) -> Iterator[Passages]:
    """What to measure on; of a text the student's own tokens, for as long as they are needed."""
    if config.cache is not None:
        yield RecordPassages(config)
        return
    if config.tokens is not None:
        yield TextPassages(config, config.tokens)
        return
    tokenizer = loading.load_tokenizer(config.tokenizer or config.student, **loading.named_of(config))
    vocab_size = tokenization.num_ids(tokenizer)
    encoders = Encoders(tokenizer, bos=config.bos, special_tokens=config.special_tokens)
    with tempfile.TemporaryDirectory(prefix="sklformat-eval-") as directory:
        store = Path(directory) / "tokens"
        write_texts(
            store,
            read_texts(config),
            encoders,
            vocab_size=vocab_size,
            tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
            vocabulary_fingerprint=vocabulary_fingerprint(tokenizer, vocab_size),
        )
        yield TextPassages(config, store)


def _evaluate(config: EvalConfig, passages: Passages, device: torch.device, *, progress: bool) -> Evaluation:
    tokenizer = _checked_tokenizer(config, passages, config.student)
    student, vocab_size = _load(config, config.student, tokenizer, passages, device)
    teacher = None
    if config.teacher is not None:
        teachers = _checked_tokenizer(config, passages, config.teacher)
        teacher, known = _load(config, config.teacher, teachers, passages, device)
        vocab_size = min(vocab_size, known)
        _note_other_teacher(config, passages, teacher)
    sums, done = metrics.EvaluationSums(config.bins), 0
    count = passages.begin(tokenizer)
    with torch.inference_mode(), show("eval", count, unit="sequence", shown=progress) as reach:
        for passage in passages:
            given = passage.input_ids_BT.to(device), _on(device, passage.position_ids_BT)
            logits = _logits(student, given, vocab_size, config.student)
            reference = None if teacher is None else _logits(teacher, given, vocab_size, str(config.teacher))
            known_P = {name: value.to(device) for name, value in passage.known.items()}
            sums.update(logits, passage.labels_P.to(device), reference, **known_P)
            done += passage.num_sequences
            reach(done)
    return _result(config, sums, passages, count)


def _note_other_teacher(config: EvalConfig, passages: Passages, teacher: Any) -> None:
    """The divergence from records and the one from this teacher are of two models then."""
    header = passages.header if isinstance(passages, RecordPassages) else None
    said = None if header is None else header.capture.get("teacher")
    if header is None or not isinstance(said, Mapping):
        return
    # The fingerprint is that of the weights in one type, or of an engine's files; else only the config tells.
    same_type = said.get("dtype") == config.dtype and "engine" not in header.capture
    known = header.teacher_fingerprint if same_type else said.get("config")
    if known != (model_fingerprint(teacher) if same_type else config_fingerprint(teacher)):
        say(
            f"note: the records of {config.cache} were made by a model that is not {config.teacher}; what is said of "
            "records is of that one"
        )


def _checked_tokenizer(config: EvalConfig, passages: Passages, model: str) -> Any:
    """The tokenizer of the student or of the teacher: the one given, or the model's own, if ids mean the same to it."""
    is_student = model == config.student
    name = config.tokenizer if config.tokenizer is not None and is_student else model
    tokenizer = loading.load_own_tokenizer(name, **loading.named_of(config))
    if tokenizer is None:
        name = name if config.tokenizer is None else config.tokenizer  # which the teacher is taken to share
        tokenizer = loading.load_tokenizer(name, **loading.named_of(config))
    conflict = passages.made_by.conflict(tokenizer)
    if conflict and config.text:  # the student's own tokens, so this is the teacher
        raise SettingsError(
            f"the teacher {model} has a different tokenizer from the student {config.student}: {conflict}; they can be "
            "compared only over the same ids: give a teacher of the student's tokenizer, or train the student with the "
            "teacher's (train --tokenizer)"
        )
    if conflict:
        raise SettingsError(
            f"{passages.name} was made by a different tokenizer from {name}: {conflict}; {passages.advice}"
        )
    return tokenizer


def _load(config: EvalConfig, path: str, tokenizer: Any, passages: Passages, device: torch.device) -> tuple[Any, int]:
    """A model, and how many ids it is asked for."""
    model = loading.load_model(path, dtype=config.dtype, device=device, **loading.named_of(config))
    try:
        known = loading.check_fit(tokenizer, model, seq_len=passages.seq_len or None)
        if passages.isolated:
            attention.check_isolates(model)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return model, passages.count_ids(path, tokenizer, model, known)


def _on(device: torch.device, tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.to(device)


def _logits(model: Any, given: tuple[torch.Tensor, torch.Tensor | None], vocab_size: int, name: str) -> torch.Tensor:
    # A head may be padded beyond the ids that mean something.
    logits_PV = outputs.logits(model, *given).flatten(0, 1)[:, :vocab_size]
    check_finite(logits_PV, name)
    return logits_PV


def _result(config: EvalConfig, sums: metrics.EvaluationSums, passages: Passages, count: int) -> Evaluation:
    table = sums.reliability
    bins: list[ReliabilityBin] = [
        {"confidence": confidence, "accuracy": accuracy, "share": share}
        for confidence, accuracy, share in zip(table.confidence, table.accuracy, table.share, strict=True)
        if share > 0
    ]
    percent = None
    if config.ce_loss is not None and config.full_loss is not None:
        percent = metrics.percent_ce_to_full(config.ce_loss, config.full_loss, sums.lm_loss)
    with_teacher = config.teacher is not None
    of_cache: dict[str, Any] = {}
    if isinstance(passages, RecordPassages):
        found = Validation.of(sums, num_sequences=count, headers=[passages.header])
        of_cache = {
            "cache": passages.name,
            "sequences": f"{passages.part.start}:{passages.part.stop}",
            "cross_entropy": found.cross_entropy,
            "kl_to_records": found.kl_to_records,
            "kl_by_records": found.kl,
        }
    return Evaluation(
        num_sequences=count,
        num_tokens=sums.num_positions,
        bos=passages.bos,
        isolated=passages.isolated,
        lm_loss=sums.lm_loss,
        accuracy=sums.accuracy,
        calibration_error=table.calibration_error,
        confidence_gap=sum(entry["share"] * (entry["confidence"] - entry["accuracy"]) for entry in bins),
        reliability=bins,
        top1_agreement=sums.top1_agreement if with_teacher else None,
        acceptance_rate=sums.acceptance_rate if with_teacher else None,
        percent_ce_to_full=percent,
        teacher_loss=sums.teacher_loss if sums.has("teacher_loss") else None,
        kl=sums.kl if with_teacher else None,
        **of_cache,
    )
