"""
``rescore``: ask another teacher about the records of a cache, and weight them for it if that is wanted.

Two passes: one with the teacher writes its log-probs; one without, over what the first wrote, the weights.
Source: Anshumann et al. 2025 (arXiv 2503.16870), section 6.1.
"""

from __future__ import annotations

import contextlib
import math
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from sklformat.cache.contents import (
    UNFINISHED_NAME,
    mark_unfinished,
    shard_header,
    shard_path,
    unmark_unfinished,
)
from sklformat.cache.manifest import MANIFEST_NAME, has_manifest, write_manifest
from sklformat.cache.reader import Cache
from sklformat.cache.sharding import other_settings
from sklformat.cache.writer import ShardWriter
from sklformat.capture.destinations import Target
from sklformat.capture.plan import ShardWork, find_header, sealed_entries, survey
from sklformat.distill.rescoring.headers import (
    check_weighable,
    scored_columns,
    scored_header,
    weighted_header,
)
from sklformat.distill.rescoring.questions import Questions
from sklformat.distill.rescoring.scores import Scorer, load_scorer
from sklformat.distill.rescoring.weights import importance_weights
from sklformat.distill.teacher.ranks import stoppable
from sklformat.files.directories import refuse_foreign
from sklformat.files.disk import locked_directory
from sklformat.format.columns import RECORD_LOGPROB, STARTS, follow_records
from sklformat.format.header import Header
from sklformat.format.records import Sequence, SparseTargets
from sklformat.progress import show
from sklformat.settings.rescore import RescoreConfig

_SCORES = (
    "scores"  # in a directory whose cache is to be weighted: what the first pass wrote, until the second has ended
)
_OWN = re.compile(
    rf"shard-\d{{5,}}\.skl(\.partial)?|\.lock|{re.escape(UNFINISHED_NAME)}|\.?{re.escape(MANIFEST_NAME)}(\.tmp)?"
    rf"|{_SCORES}"
)
# Beyond, the ratio code would leave too little of itself to weights near 1: those below 2^-9 are lost at 2^8.
_MOST_SCALE_LOG2 = 8

_Written: TypeAlias = tuple[NDArray[np.uint32], SparseTargets, dict[str, NDArray[Any]]]
_Make: TypeAlias = Callable[[list[ShardWork]], Iterator[_Written]]


@dataclass(frozen=True, kw_only=True)
class Rescored:
    """
    What ``rescore`` did.

    Attributes:
        directory: The cache.
        fingerprint: Identity of its content.
        sequences: Sequences in it.
        sequences_scored: Of these, those that the teacher was run over now; the others were there.
        records: Records in it.
        records_asked: Records of the cache that was scored; with weights, those that are too small for the ratio code
            are left out.
        largest_weight: Of all weights, before any was cut; None without weights, or where they are divided by their
            sum, or all was there already.
    """

    directory: Path
    fingerprint: str
    sequences: int
    sequences_scored: int
    records: int
    records_asked: int
    largest_weight: float | None

    def __str__(self) -> str:
        lost = self.records_asked - self.records
        left_out = f", {lost:,} left out that are too small for the ratio code" if lost else ""
        largest = "" if self.largest_weight is None else f"; the largest weight is {self.largest_weight:.4g}"
        return (
            f"{self.directory}: {self.sequences} sequences ({self.sequences_scored} scored now), {self.records:,} "
            f"records{left_out}{largest}"
        )


def rescore(config: RescoreConfig) -> Rescored:
    """
    Write a cache with another teacher's log-probs at the records of one that is there, or with weights from these.

    Whatever stops it, run it again with the same settings: what is written is kept, and the finished cache has the
    bytes of an undisturbed run. What the weights keep of the second teacher: ``importance_weights``.

    Args:
        config: The settings.

    Returns:
        What was done.

    Raises:
        OSError: Teacher or disk; as the operating system reports it.
        EngineError: The engine is not there, is not understood, or has ended.
        SettingsError: The teacher has another tokenizer or vocabulary; the cache stores no tokens and none are given;
            weights need log-probs that it has not got; ``out`` holds something else.
        AlignmentError: The tokens given are not those of the cache.
        ValueError: No such device; the cache is empty; a weight is too large, or not finite.
        FormatError: The cache is damaged.
        InUseError: Another run writes into ``out``.
        KeyboardInterrupt: Ctrl-C or SIGTERM; the message says what is kept.
    """
    with stoppable(), locked_directory(config.out):
        refuse_foreign(config.out, [path.name for path in config.out.iterdir()], "rescored cache", _OWN)
        questions = Questions(config.cache, config.tokens)
        with questions.cache:
            if config.weights != "none":
                check_weighable(questions.cache)
            with _asked(config, questions) as (scorer, how):
                header = scored_header(config, questions.cache, how, questions.sequences_per_shard)
                return _Passes(config, questions, header).run(scorer)


@contextlib.contextmanager
def _asked(config: RescoreConfig, questions: Questions) -> Iterator[tuple[Scorer, dict[str, Any]]]:
    """Whatever runs the teacher, and what a header says of it."""
    if config.engine == "transformers":
        yield load_scorer(config, questions)
        return
    from sklformat.distill.rescoring.served import served_scorer  # noqa: PLC0415  it loads what engines need

    with served_scorer(config, questions, scored_columns(config, questions.cache.header)) as found:
        yield found


class _Passes:
    """
    Both passes over one cache; a pass that was stopped resumes.

    Args:
        config: The settings.
        questions: The cache.
        scored: Header of what the first pass writes.
    """

    def __init__(self, config: RescoreConfig, questions: Questions, scored: Header) -> None:
        self._config, self._questions, self._scored = config, questions, scored
        self._count, self._per_shard = len(questions.cache), questions.sequences_per_shard
        self._sequences_scored = 0
        self._largest: float | None = None

    def run(self, scorer: Scorer) -> Rescored:
        out, weighted = self._config.out, self._config.weights != "none"
        if not weighted:
            self._write(out, self._scored, lambda works: self._score(scorer, works))
        elif not self._has_weighted():
            self._write(out / _SCORES, self._scored, lambda works: self._score(scorer, works))
            with closing(Cache(out / _SCORES)) as scores:
                header = weighted_header(self._config, self._questions.cache.header, self._scored, self._scale(scores))
                self._write(out, header, lambda works: self._weight(scores, works))
            shutil.rmtree(out / _SCORES)
        with closing(Cache(out)) as cache:
            return Rescored(
                directory=out,
                fingerprint=cache.fingerprint,
                sequences=len(cache),
                sequences_scored=self._sequences_scored,
                records=cache.num_records,
                records_asked=self._questions.cache.num_records,
                largest_weight=self._largest,
            )

    def _has_weighted(self) -> bool:
        """Whether a finished cache is there, weighted as is asked for."""
        out = self._config.out
        if not has_manifest(out):
            return False
        found = find_header(out)
        assert found is not None
        asked = weighted_header(self._config, self._questions.cache.header, self._scored, found.scale_log2)
        if differing := shard_header(found, 0, 0).differences(asked):
            raise other_settings(out, differing)
        shutil.rmtree(out / _SCORES, ignore_errors=True)  # a run was killed before it came to that
        return True

    def _write(self, directory: Path, header: Header, make: _Make) -> None:
        """Write what is not there yet of a cache, then its manifest."""
        directory.mkdir(exist_ok=True)
        works = survey(directory, header, self._count, self._per_shard)
        if works:
            mark_unfinished(directory)
        name = f"rescore {self._config.out.name}" + (", weights" if header.capture.get("weighted") else "")
        there = self._count - sum(work.end - work.next_sequence for work in works)
        try:
            with show(name, self._count, unit="sequence", first=there) as reach:
                made = make(works)
                for work in works:
                    placed = shard_header(header, work.number, work.first_sequence)
                    with ShardWriter(shard_path(directory, work.number), header=placed, resume=True) as writer:
                        for _ in range(work.next_sequence, work.end):
                            writer.append(*next(made))
                            there += 1
                            reach(there)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"stopped: {there} of {self._count} sequences of {directory} are kept; run the same command again to "
                "resume"
            ) from None
        write_manifest(directory, sealed_entries(Target(directory), header, self._count, self._per_shard))
        unmark_unfinished(directory)

    def _score(self, scorer: Scorer, works: list[ShardWork]) -> Iterator[_Written]:
        """What shards still need of the first pass."""
        names = scored_columns(self._config, self._questions.cache.header)
        for question, columns in scorer.answers(works, self._questions.read, names):
            self._sequences_scored += 1
            sequence = question.sequence
            kept = {name: sequence.columns[name] for name in self._scored.columns if name == STARTS}
            yield question.tokens, sequence.targets, {**kept, **columns}

    def _weight(self, scores: Cache, works: list[ShardWork]) -> Iterator[_Written]:
        """What shards still need of the second pass."""
        cut = self._config.largest_weight
        for number in (number for work in works for number in range(work.next_sequence, work.end)):
            question, scored = self._questions.read(number), scores[number]
            weights = self._weights(question.sequence, scored, cut)
            before, after = scored.targets, weights
            columns = follow_records(
                scored.columns, (before.offsets, before.token_ids), (after.offsets, after.token_ids)
            )
            yield question.tokens, weights, columns

    def _weights(self, sequence: Sequence, scored: Sequence, largest: float | None = None) -> SparseTargets:
        return importance_weights(
            sequence.targets,
            self._questions.cache.header.rounds,
            sequence.columns[RECORD_LOGPROB],
            scored.columns[RECORD_LOGPROB],
            normalised=self._config.weights == "normalised",
            largest=largest,
        )

    def _scale(self, scores: Cache) -> int:
        """
        Power of two that no weight passes: what the header says of all of them.

        Raises:
            ValueError: One is too large.
        """
        config, cache = self._config, self._questions.cache
        if config.weights == "normalised":
            return 0
        most, at = 0.0, 0
        for number in range(self._count):
            weights = self._weights(cache[number], scores[number]).weights
            assert weights is not None
            if (largest := float(weights.max(initial=0.0))) > most:
                most, at = largest, number
        self._largest = most
        kept = most if config.largest_weight is None else min(most, config.largest_weight)
        scale = max(0, math.ceil(math.log2(kept))) if 0 < kept < math.inf else 0
        if kept > 1 << _MOST_SCALE_LOG2:
            raise ValueError(
                f"{cache.path}: sequence {at} has an importance weight of {most:.4g}, and beside weights above "
                f"{1 << _MOST_SCALE_LOG2} the ratio code would lose the others; give largest_weight, which cuts "
                "what is larger, or weights normalised"
            )
        return scale
