"""
What a student learnt from, as the directory of its training run says; what lies elsewhere says nothing.

Loads no model and opens no cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sklformat.distill.student import runs
from sklformat.errors import SettingsError
from sklformat.progress import say

_NO_FINGERPRINT = "0" * 32


def find_model(student: str) -> str:
    """
    The finished model of a training run, where the directory of one is given; else the student as it is.

    Raises:
        SettingsError: The run is not finished.
    """
    directory = Path(student)
    if runs.read_settings(directory) is None:
        return student
    model = runs.Run(directory).model_directory
    if not model.is_dir():
        raise SettingsError(
            f"{student} is a training run without a model yet; run its command again to finish it, then give {model}"
        )
    return str(model)


@dataclass(frozen=True, slots=True)
class Origin:
    """
    The training run that a student lies in.

    Attributes:
        student: Where the student is.
        directory: Of the run.
        settings: What its ``run.json`` holds.
    """

    student: str
    directory: Path
    settings: dict[str, Any]

    @classmethod
    def of(cls, student: str) -> Origin | None:
        """The run whose directory, or a directory inside of it, the student is; None: it lies in none."""
        place = Path(student).resolve()
        for directory in (place, place.parent):
            settings = runs.read_settings(directory)
            if settings is not None:
                return cls(student, directory, settings)
        return None

    def num_learnt(self, cache_fingerprint: str, num_sequences: int) -> int:
        """How many sequences at the beginning of a cache it learnt from, 0 of another."""
        theirs = self.settings.get("cache")  # of one cache, or of several
        hold_out = self.settings.get("hold_out", 0)
        return max(0, num_sequences - hold_out) if theirs and cache_fingerprint in theirs else 0

    def check_part(self, where: object, cache_fingerprint: str, num_sequences: int, part: range) -> None:
        """
        Refuse to measure the student on what it learnt from.

        Args:
            where: The cache, for the message.
            cache_fingerprint: Of it.
            num_sequences: In it.
            part: Sequences to measure on.

        Raises:
            SettingsError: It learnt from some of them; says which it did not.
        """
        learnt = self.num_learnt(cache_fingerprint, num_sequences)
        if part.start < learnt:
            free = num_sequences - learnt
            action = (
                f"give hold_out {free}, or sequences {learnt}:{num_sequences}"
                if free
                else "that is all of it: give another cache, or train with hold_out"
            )
            raise SettingsError(
                f"{self.student} learnt from sequences 0:{learnt} of {where} ({self.directory / 'run.json'}), and "
                f"{part.start}:{part.stop} are to be measured; {action}"
            )

    def warn_of_corpus(self, where: object, corpus_fingerprint: str, cache_fingerprint: str | None = None) -> None:
        """
        Say where a student is measured on a text that it learnt from, in part at least.

        Which sequences these were is not known here: other caches of a text hold others of it, or the same again.

        Args:
            where: What is measured on, for the message.
            corpus_fingerprint: Of its text.
            cache_fingerprint: Where it is a cache; of one that the run learnt from all is known.
        """
        corpora = self.settings.get("corpora", ())
        is_own = cache_fingerprint is not None and cache_fingerprint in self.settings.get("cache", ())
        known = {*corpora, self.settings.get("corpus")} - {_NO_FINGERPRINT}
        if not is_own and corpus_fingerprint in known:
            own = ", or the run's own cache, whose held-out part is known" if corpora else ""
            say(
                f"note: {self.student} learnt from the text that {where} was made of (corpus {corpus_fingerprint} in "
                f"{self.directory / 'run.json'}); where it saw the same parts, what is measured is too good: give "
                f"other text{own}"
            )

    def check_corpus(self, where: object, corpus_fingerprint: str) -> None:
        """
        Refuse to measure the student on the records of a text that it learnt from without a cache.

        Raises:
            SettingsError: It did.
        """
        if corpus_fingerprint != _NO_FINGERPRINT and self.settings.get("corpus") == corpus_fingerprint:
            raise SettingsError(
                f"{self.student} learnt from the text that {where} was made of (corpus {corpus_fingerprint} in "
                f"{self.directory / 'run.json'}); give a cache of other text"
            )
