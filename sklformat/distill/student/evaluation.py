"""
evaluate(): how good a student is on held-out text, and how close to its teacher.

Trains nothing and draws nothing; the metrics themselves are in ``losses.metrics``.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch

from sklformat.distill.losses import metrics
from sklformat.distill.models import attention, loading, outputs, tokenization
from sklformat.distill.models.devices import find_device
from sklformat.distill.models.templates import Encoders
from sklformat.distill.student import streams
from sklformat.distill.student.validation import check_finite
from sklformat.distill.text.chats import read_texts, write_texts
from sklformat.distill.text.corpus import IdError, StoreFacts, TokenStore
from sklformat.distill.text.fingerprints import tokenizer_fingerprint, vocabulary_fingerprint
from sklformat.distill.text.singles import open_sequences
from sklformat.errors import SettingsError
from sklformat.files.disk import write_atomically
from sklformat.format import order
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

    def __str__(self) -> str:
        lines = [
            (
                f"LM loss: {self.lm_loss:.4f} nats per token, {self.num_sequences} sequences ({self.num_tokens:,} "
                f"tokens, --bos {self.bos}{', --isolate-documents' if self.isolated else ''})"
            ),
            (
                f"calibration error (ECE): {self.calibration_error:.2%}; mean confidence less accuracy "
                f"({self.accuracy:.2%}): {100 * self.confidence_gap:+.2f} points"
            ),
        ]
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
        SettingsError: The student's or the teacher's tokenizer, or vocabulary, is not that of the text.
        ValueError: A wrong argument, no such device, or a text too short for the sequences asked.
        OSError: A model or the text cannot be read.

    Source: Anshumann et al. 2025 (arXiv 2503.16870), section 4 and Table 5.
    """
    device = find_device(config.device)
    if progress:
        say(f"eval: loading {config.student} and reading the text")
    with _token_store(config) as store:
        return _evaluate(config, store, device, progress=progress)


@contextmanager
def _token_store(config: EvalConfig) -> Iterator[Path]:
    """The held-out tokens: those that are there, or the student's own of the text, for as long as they are needed."""
    if config.tokens is not None:
        yield config.tokens
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
        yield store


def _evaluate(config: EvalConfig, store: Path, device: torch.device, *, progress: bool) -> Evaluation:
    tokens = TokenStore(store)
    facts = tokens.facts
    tokenizer = _checked_tokenizer(config, facts, config.student)
    student, vocab_size = _load(config, config.student, tokenizer, tokens, device)
    teacher = None
    if config.teacher is not None:
        teachers = _checked_tokenizer(config, facts, config.teacher)
        teacher, known = _load(config, config.teacher, teachers, tokens, device)
        vocab_size = min(vocab_size, known)
    sequences = open_sequences(
        store,
        packing=config.packing,
        truncate=config.truncate,
        bos_id=tokenizer.bos_token_id,
        seq_len=config.seq_len,
        separator_id=tokenization.separator_id(tokenizer),
        seed=config.packing_seed,
        isolated=config.isolate_documents,
    )
    count = config.num_sequences or len(sequences)
    if count > len(sequences):
        raise ValueError(
            f"the held-out text gives {len(sequences)} sequences of {config.seq_len} positions, asked for are {count}; "
            "give fewer, or more text"
        )
    # Neighbouring sequences are often of one document: take them from all over the text.
    chosen = np.sort(order.permute(np.arange(count), len(sequences), seed=config.packing_seed))
    sums = metrics.EvaluationSums(config.bins)
    with torch.inference_mode(), show("eval", count, unit="sequence", shown=progress) as reach:
        for start in range(0, count, config.batch_size):
            indices = chosen[start : start + config.batch_size]
            ids_BL = streams.tokens_of(sequences, indices).to(device)
            given = ids_BL[:, :-1], _on(device, streams.position_ids_of(sequences, indices))
            logits = _logits(student, given, vocab_size, config.student)
            reference = None if teacher is None else _logits(teacher, given, vocab_size, str(config.teacher))
            sums.update(logits, streams.labels_of(sequences, indices, ids_BL).flatten(), reference)
            reach(start + len(indices))
    evaluation = _result(config, sums, count, facts.bos)
    if config.out is not None:
        config.out.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(dataclasses.asdict(evaluation), indent=1)
        write_atomically(config.out, (text + "\n").encode())
    return evaluation


def _checked_tokenizer(config: EvalConfig, facts: StoreFacts, model: str) -> Any:
    """The tokenizer of the student or of the teacher: the one given, or the model's own, if ids mean the same to it."""
    is_student = model == config.student
    name = config.tokenizer if config.tokenizer is not None and is_student else model
    tokenizer = loading.load_own_tokenizer(name, **loading.named_of(config))
    if tokenizer is None:
        name = name if config.tokenizer is None else config.tokenizer  # which the teacher is taken to share
        tokenizer = loading.load_tokenizer(name, **loading.named_of(config))
    conflict = facts.made_by.conflict(tokenizer)
    if conflict and config.tokens is None:  # the student's own tokens, so this is the teacher
        raise SettingsError(
            f"the teacher {model} has a different tokenizer from the student {config.student}: {conflict}; they can be "
            "compared only over the same ids: give a teacher of the student's tokenizer, or train the student with the "
            "teacher's (train --tokenizer)"
        )
    if conflict:
        raise SettingsError(
            f"{config.tokens} was made by a different tokenizer from {name}: {conflict}; make the token store with "
            "the model's tokenizer, or give that of the store as tokenizer if the model was trained with it"
        )
    return tokenizer


def _load(config: EvalConfig, path: str, tokenizer: Any, tokens: TokenStore, device: torch.device) -> tuple[Any, int]:
    """A model, and how many of the ids of the text it knows."""
    model = loading.load_model(path, dtype=config.dtype, device=device, **loading.named_of(config))
    try:
        vocab_size = min(tokens.facts.vocab_size, loading.check_fit(tokenizer, model, seq_len=config.seq_len))
        if config.isolate_documents:
            attention.check_isolates(model)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    try:
        tokens.check_ids(vocab_size)
    except IdError as error:
        raise SettingsError(
            f"{path}: {error.document} {tokenization.why_beyond(tokenizer, error.token_id, vocab_size)}"
        ) from None
    return model, vocab_size


def _on(device: torch.device, tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.to(device)


def _logits(model: Any, given: tuple[torch.Tensor, torch.Tensor | None], vocab_size: int, name: str) -> torch.Tensor:
    # A head may be padded beyond the ids that mean something.
    logits_PV = outputs.logits(model, *given).flatten(0, 1)[:, :vocab_size]
    check_finite(logits_PV, name)
    return logits_PV


def _result(config: EvalConfig, sums: metrics.EvaluationSums, count: int, bos: str) -> Evaluation:
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
    return Evaluation(
        num_sequences=count,
        num_tokens=sums.num_positions,
        bos=bos,
        isolated=config.isolate_documents,
        lm_loss=sums.lm_loss,
        accuracy=sums.accuracy,
        calibration_error=table.calibration_error,
        confidence_gap=sum(entry["share"] * (entry["confidence"] - entry["accuracy"]) for entry in bins),
        reliability=bins,
        top1_agreement=sums.top1_agreement if with_teacher else None,
        acceptance_rate=sums.acceptance_rate if with_teacher else None,
        percent_ce_to_full=percent,
    )
