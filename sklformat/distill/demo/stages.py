"""
run_demo(): the whole pipeline once, from text to the paper's table, on a machine without GPU and network.

It only puts the public verbs one after the other: it has no training loop, no metric and no file format of its own.
Source: Anshumann et al. 2025 (arXiv 2503.16870), Table 5 and section 4, at a size for two cores.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sklformat.cache.report import inspect, verify
from sklformat.distill.demo.plan import (
    SIZES,
    TOPK,
    Size,
    Student,
    cache_configs,
    student_configs,
    teacher_configs,
    view_config,
)
from sklformat.distill.demo.processes import Job, run_jobs
from sklformat.distill.demo.report import Check, Row, check_order, commands, report
from sklformat.distill.losses.metrics import percent_ce_to_full
from sklformat.distill.models import loading, outputs, tokenization
from sklformat.distill.models.devices import available_cores
from sklformat.distill.student import runs
from sklformat.distill.student.measures import showing
from sklformat.distill.student.measures.evaluation import Evaluation, evaluate
from sklformat.distill.student.training import train
from sklformat.distill.teacher.caching import cache_teacher
from sklformat.distill.text.corpus import Encoding, write_token_store
from sklformat.distill.text.documents import (
    Document,
    cut_documents,
    read_documents,
    split_documents,
    standard_library_documents,
)
from sklformat.distill.text.fingerprints import tokenizer_fingerprint, vocabulary_fingerprint
from sklformat.distill.text.packing import PackedSequences
from sklformat.errors import CorruptError
from sklformat.files.directories import published
from sklformat.files.disk import write_atomically
from sklformat.plot import plot_comparison
from sklformat.progress import say
from sklformat.settings.cache import CacheConfig
from sklformat.settings.demo import DemoConfig
from sklformat.settings.eval import EvalConfig
from sklformat.settings.files import TEXT_FIELD, TextFiles
from sklformat.settings.inspection import ViewConfig
from sklformat.settings.train import TrainConfig
from sklformat.views.page import read_stretch, render

_UNIQUE_TOKENS = 12.0
_MAX_ROUNDS = 127
_PIECE_CHARS = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoResult:
    """
    What the demo found; printed, it is the report.

    Attributes:
        directory: Where everything lies.
        rows: One per method, in the table's order; the teacher is the last.
        checks: Whether this run shows what the paper shows.
        seconds: Time this call took.
        text: The report, Markdown.
    """

    directory: Path
    rows: list[Row]
    checks: list[Check]
    seconds: float
    text: str

    def __str__(self) -> str:
        return self.text


def run_demo(config: DemoConfig) -> DemoResult:
    """
    Run the demo to its end, or finish one that was stopped; finished parts are not made again.

    Writes REPORT.md, result.json, comparison.png and page.html into ``config.out``, beside the text, models and caches.

    Args:
        config: The settings.

    Returns:
        The table, the checks and the report.

    Raises:
        SettingsError: ``out`` holds a demo with other settings.
        InUseError: Another demo works there.
        CorruptError: A cache did not pass its verification.
        ValueError: No text, or too little of it.
    """
    started = time.monotonic()
    size = SIZES[config.size]
    settings = {
        "text": None if config.text is None else str(config.text.resolve()),
        "seed": config.seed,
        **dataclasses.asdict(size),
    }
    workers = config.processes or min(4, available_cores())
    if config.field not in (None, TEXT_FIELD):  # as it was before there was a choice
        settings["field"] = config.field
    with runs.opened(config.out, settings):
        with _stage("1/6 text: documents, tokenizer, token stores"):
            eval_count = prepare_text(config, size)
        teacher = teacher_configs(config, size, eval_count)
        with _stage("2/6 teacher: training on the text"):
            # One thread here as everywhere, so that the figures depend on the seed and not on how busy the machine is.
            [(teacher_eval, rounds)] = run_jobs([Job(_train_teacher, (*teacher, size))], processes=workers, threads=1)
        caches = cache_configs(config, size, rounds, _num_packed(config, size, "tokens"))
        with _stage(f"3/6 caches: random sampling in {rounds} rounds, Top-K {TOPK}"):
            run_jobs([Job(cache_teacher, (cache,)) for cache in caches], processes=workers, threads=1)
        with _stage("4/6 verify: every byte of the caches"):
            _verify(caches)
        students = student_configs(config, size, eval_count, caches)
        with _stage("5/6 students: CE, Top-K, random sampling, FullKD from the same start"):
            # The slowest first, so that no core waits for it at the end.
            found = run_jobs([Job(_train_student, (s,)) for s in reversed(students)], processes=workers, threads=1)[
                ::-1
            ]
        with _stage("6/6 report"):
            rows = _rows(students, found, caches, teacher_eval)
            checks = check_order(rows) if size.shows else []
            page = view_config(config, caches, students)
            run_jobs([Job(_show, (page,))], processes=1, threads=1)
            lines = commands(teacher, caches, [(s.train, s.eval) for s in students], page)
            seconds = time.monotonic() - started
            result = DemoResult(
                directory=config.out, rows=rows, checks=checks, seconds=seconds,
                text=report(rows, checks, lines, directory=config.out, seed=config.seed, seconds=seconds),
            )  # fmt: skip
            _write(config, result)
    return result


@contextmanager
def _stage(name: str) -> Iterator[None]:
    say(name)
    started = time.monotonic()
    yield
    say(f"    done in {time.monotonic() - started:.1f} s")


# --- text ------------------------------------------------------------------------------------------------------------


def prepare_text(config: DemoConfig, size: Size) -> int:
    """Make tokenizer and token stores; return how many held-out sequences there are to evaluate on."""
    documents = _documents(config, size)
    training, held_out = split_documents(documents)
    path = config.out / "tokenizer"
    if not path.exists():
        tokenizer = tokenization.train_tokenizer((document.text for document in training), size.vocab_size)
        with published(path) as partial:
            tokenizer.save_pretrained(partial)
    tokenizer = loading.load_tokenizer(path)
    encode = tokenization.TextEncoder(tokenizer)
    for name, part in (("tokens", training), ("held-out", held_out)):
        store = write_token_store(
            config.out / name,
            part,
            encode,
            vocab_size=tokenization.num_ids(tokenizer),
            tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
            vocabulary_fingerprint=vocabulary_fingerprint(tokenizer, tokenization.num_ids(tokenizer)),
            encoding=Encoding.of(encode),
        )
        say(f"    {name}: {store.facts.num_documents} documents, {store.facts.num_tokens:,} tokens")
    return min(size.eval_sequences, _num_packed(config, size, "held-out"))


def _documents(config: DemoConfig, size: Size) -> list[Document]:
    if config.text is None:
        return list(itertools.islice(standard_library_documents(), size.max_documents))
    documents = list(read_documents(TextFiles(text=(config.text,), field=config.field)))
    # One long file, or a short text, must still split into text to learn from and text held out.
    length = sum(len(document.text) for document in documents)
    return list(cut_documents(documents, max_chars=max(256, min(_PIECE_CHARS, length // 200))))


def _num_packed(config: DemoConfig, size: Size, name: str) -> int:
    return len(_packed(config.out / name, loading.load_tokenizer(config.out / "tokenizer"), size, config.seed))


def _packed(store: Path, tokenizer: Any, size: Size, seed: int) -> PackedSequences:
    return PackedSequences(store, seq_len=size.seq_len, separator_id=tokenization.separator_id(tokenizer), seed=seed)


# --- teacher ---------------------------------------------------------------------------------------------------------


def _train_teacher(training: TrainConfig, measuring: EvalConfig, size: Size) -> tuple[Evaluation, int]:
    """A job: the teacher, what it reaches on held-out text, and the rounds that give about 12 unique tokens."""
    train(training)
    path = training.out / "rounds.json"
    if not path.exists():
        assert training.tokens is not None
        write_atomically(path, json.dumps(_choose_rounds(training, size)).encode())
    return _evaluated(measuring), int(json.loads(path.read_text()))


@torch.inference_mode()
def _choose_rounds(training: TrainConfig, size: Size) -> int:
    """The number of rounds N for which the mean over positions of sum_v 1 − (1 − p_v)^N comes closest to 12."""
    assert training.tokens is not None
    model_directory = training.out / "model"
    model, tokenizer = loading.load_model(model_directory), loading.load_tokenizer(model_directory)
    sequences = _packed(training.tokens, tokenizer, size, training.packing_seed)
    rounds = np.arange(1, _MAX_ROUNDS + 1, 4)
    unique = np.zeros(rounds.size)
    # From all over the text that is cached: neighbouring sequences are of one document.
    for index in np.linspace(0, min(size.cached_sequences, len(sequences)) - 1, 32).astype(int):
        tokens = torch.from_numpy(sequences[int(index)][None, :-1].astype(np.int64))
        log_missed_PV = torch.log1p(-outputs.logits(model, tokens)[0].softmax(-1).clamp(max=1 - 1e-7))
        unique += [float(-torch.expm1(int(n) * log_missed_PV).sum(1).mean()) / 32 for n in rounds]
    every = np.arange(1, _MAX_ROUNDS + 1)
    return int(every[np.abs(np.interp(every, rounds, unique) - _UNIQUE_TOKENS).argmin()])


def _evaluated(config: EvalConfig) -> Evaluation:
    """Evaluate once; the directory's settings guarantee that a result that is there is the same one."""
    assert config.out is not None
    if config.out.exists():
        try:
            return Evaluation(**json.loads(config.out.read_text()))
        except (TypeError, ValueError):
            say(f"    {config.out}: is not what this version writes; measuring again")
    return evaluate(config)


# --- caches and students ---------------------------------------------------------------------------------------------


def _verify(caches: list[CacheConfig]) -> None:
    for cache in caches:
        problems = verify(cache.out)
        if problems:
            raise CorruptError(
                f"{len(problems)} problems, the first: {problems[0]}; delete this cache and run again", path=cache.out
            )
        facts = inspect(cache.out)
        say(
            f"    {cache.out}: {facts['sequences']} sequences sound, {facts['unique_tokens_per_position']:.2f} unique "
            f"tokens and {facts['bytes_per_position']:.1f} bytes per position"
        )


def _train_student(student: Student) -> Evaluation:
    """A job: one student and its evaluation."""
    train(student.train)
    return _evaluated(student.eval)


# --- result ----------------------------------------------------------------------------------------------------------


def _rows(
    students: list[Student], found: list[Evaluation], caches: list[CacheConfig], teacher: Evaluation
) -> list[Row]:
    losses = {student.train.method: evaluation.lm_loss for student, evaluation in zip(students, found, strict=True)}
    facts = {cache.out: inspect(cache.out) for cache in caches}
    rows = []
    for student, evaluation in zip(students, found, strict=True):
        cached = student.train.method in ("topk", "random_sampling")
        of_cache = facts[Path(student.train.cache[0])] if cached else {}
        gap = losses["ce"] != losses["full"]
        rows.append(
            Row(
                method=student.name,
                evaluation=evaluation,
                unique_tokens=of_cache.get("unique_tokens_per_position"),
                bytes_per_position=of_cache.get("bytes_per_position"),
                percent_ce_to_full=percent_ce_to_full(losses["ce"], losses["full"], evaluation.lm_loss)
                if gap
                else None,
            )
        )
    return [
        *rows,
        Row(method="(teacher)", evaluation=teacher, unique_tokens=None, bytes_per_position=None,
            percent_ce_to_full=None),
    ]  # fmt: skip


def _show(config: ViewConfig) -> None:
    """A job: the page of the caches, with the students beside the teacher."""
    assert config.out is not None
    stretch = read_stretch(config)
    write_atomically(config.out, render(stretch, **showing.say(config, stretch)).encode())


def _write(config: DemoConfig, result: DemoResult) -> None:
    values = {
        "seed": config.seed,
        "size": config.size,
        "seconds": result.seconds,
        "rows": [dataclasses.asdict(row) for row in result.rows],
        "checks": [dataclasses.asdict(check) for check in result.checks],
    }
    runs.write_json(config.out / "result.json", values)
    write_atomically(config.out / "REPORT.md", result.text.encode())
    plot_comparison(
        [
            {
                "method": row.method,
                "lm_loss": row.evaluation.lm_loss,
                "calibration_error": row.evaluation.calibration_error,
                "reliability": row.evaluation.reliability,
            }
            for row in result.rows[:-1]
        ],
        config.out / "comparison.png",
    )
