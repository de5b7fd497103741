"""
What eval measures on: held-out text, a token store of it, or a part of a cache with its records.

Runs no model.
Shape letters: B sequences, T positions, P = B·T positions.
"""

# ruff: noqa: N815 - shape suffixes

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from torch import Tensor

from sklformat.cache.reader import Cache, open_cache
from sklformat.distill.models import outputs, tokenization
from sklformat.distill.student import streams
from sklformat.distill.student.measures.origins import Origin
from sklformat.distill.student.validation import HeldOut, check_width
from sklformat.distill.text.corpus import IdError, TokenStore
from sklformat.distill.text.singles import open_sequences
from sklformat.errors import SettingsError
from sklformat.format import order
from sklformat.settings.eval import EvalConfig


@dataclass(frozen=True)
class Passage:
    """
    A batch of sequences.

    Attributes:
        input_ids_BT: int64.
        position_ids_BT: Places in the documents, where these do not see each other; else None.
        labels_P: Tokens that follow, -100 where none counts.
        known: What is known of the positions beside, as ``EvaluationSums.update`` takes it.
        num_sequences: B, those without padding.
    """

    input_ids_BT: Tensor
    position_ids_BT: Tensor | None
    labels_P: Tensor
    num_sequences: int
    known: dict[str, Any] = field(default_factory=dict)


class TextPassages:
    """
    Sequences of held-out text, spread over it.

    Args:
        config: What to measure on.
        store: The token store of the text.
    """

    advice = (
        "make the token store with the model's tokenizer, or give that of the store as tokenizer if the model was "
        "trained with it"
    )

    def __init__(self, config: EvalConfig, store: Path) -> None:
        self._config, self._path, self._store = config, store, TokenStore(store)
        facts, origin = self._store.facts, Origin.of(config.student)
        if origin is not None:
            origin.warn_of_corpus(config.tokens or "the text", facts.corpus_fingerprint)
        self.name, self.made_by, self.bos = str(store), facts.made_by, facts.bos
        self.isolated, self.seq_len = config.isolate_documents, config.seq_len

    def count_ids(self, path: str, tokenizer: Any, _model: Any, known: int) -> int:
        """
        How many ids of the text a model is asked for.

        Args:
            path: Of the model.
            tokenizer: Its.
            known: Ids that mean something to it.

        Raises:
            SettingsError: The text holds others.
        """
        vocab_size = min(self._store.facts.vocab_size, known)
        try:
            self._store.check_ids(vocab_size)
        except IdError as error:
            raise SettingsError(
                f"{path}: {error.document} {tokenization.why_beyond(tokenizer, error.token_id, vocab_size)}"
            ) from None
        return vocab_size

    def begin(self, tokenizer: Any) -> int:
        """
        Pack the text, and choose; the number of sequences.

        Raises:
            ValueError: The text is too short for as many as are asked for.
        """
        config = self._config
        self._sequences = open_sequences(
            self._path,
            packing=config.packing,
            truncate=config.truncate,
            bos_id=tokenizer.bos_token_id,
            seq_len=config.seq_len,
            separator_id=tokenization.separator_id(tokenizer),
            seed=config.packing_seed,
            isolated=config.isolate_documents,
        )
        available = len(self._sequences)
        count = config.num_sequences or available
        if count > available:
            raise ValueError(
                f"the held-out text gives {available} sequences of {config.seq_len} positions, asked for are {count}; "
                "give fewer, or more text"
            )
        # Neighbouring sequences are often of one document: take them from all over the text.
        self._chosen = np.sort(order.permute(np.arange(count), available, seed=config.packing_seed))
        return count

    def __iter__(self) -> Iterator[Passage]:
        sequences, size = self._sequences, self._config.batch_size
        for start in range(0, self._chosen.size, size):
            chosen = self._chosen[start : start + size]
            ids_BL = streams.tokens_of(sequences, chosen)
            labels_BT = streams.labels_of(sequences, chosen, ids_BL)
            places_BT = streams.position_ids_of(sequences, chosen)
            yield Passage(ids_BL[:, :-1], places_BT, labels_BT.flatten(), chosen.size)


class RecordPassages:
    """
    A part of a cache, which its student did not learn from.

    Args:
        config: What to measure on.

    Raises:
        SettingsError: The student learnt from it; or as ``HeldOut``.
        ValueError: The cache does not have these sequences, or their length is not the one asked for.
        FormatError, FileNotFoundError: As ``skl.open``.
    """

    advice = (
        "take a cache of the model's own tokenizer, or give that of the cache as tokenizer if the model was trained "
        "with it"
    )

    def __init__(self, config: EvalConfig) -> None:
        assert config.cache is not None
        cache = open_cache(config.cache)
        self.header = header = cache.header
        if config.seq_len not in (0, header.seq_len):
            theirs = f"{header.seq_len} positions each" if header.seq_len else "each a length of its own"
            raise ValueError(
                f"seq_len {config.seq_len} is given, and the sequences of {config.cache} have {theirs}; leave it out"
            )
        self.part = _choose_part(config, cache)
        self._held_out = HeldOut(cache, self.part, batch_size=config.batch_size, rank=0, world_size=1)
        packing = header.capture.get("packing")
        bos = packing.get("bos") if isinstance(packing, dict) else None
        self.bos = str(bos["at"]) if isinstance(bos, dict) and "at" in bos else "none"
        self.name, self.made_by, self.seq_len = str(config.cache), streams.made_by(header), header.seq_len
        self.isolated = self._held_out.isolated

    def count_ids(self, path: str, _tokenizer: Any, model: Any, _known: int) -> int:
        """
        How many ids of the cache a model is asked for: all, since any may be in a record.

        Raises:
            SettingsError: The model has fewer.
        """
        return check_width(outputs.head_width(model), self.header.vocab_size, path)

    def begin(self, _tokenizer: Any) -> int:
        """The number of sequences."""
        return len(self.part)

    def __iter__(self) -> Iterator[Passage]:
        rest = len(self.part)
        for batch, columns in self._held_out:
            known = {"targets": batch.targets} | {f"{name}_P": values for name, values in columns.items()}
            places_BT = batch.position_ids if self.isolated else None
            size = min(rest, len(batch.input_ids))
            yield Passage(batch.input_ids, places_BT, batch.labels.flatten(), size, known)
            rest -= size


Passages: TypeAlias = TextPassages | RecordPassages


def _choose_part(config: EvalConfig, cache: Cache) -> range:
    """The sequences asked for; where none are, those that the student's run held out, of another cache all."""
    count = len(cache)
    origin = Origin.of(config.student)
    learnt = 0 if origin is None else origin.num_learnt(cache.fingerprint, count)
    if config.sequences:
        first, _, last = config.sequences.partition(":")
        part = range(int(first or 0), int(last or count))
    else:
        part = range(count - config.hold_out if config.hold_out else learnt % count, count)
    if not 0 <= part.start < part.stop <= count:
        asked = f"hold_out {config.hold_out}" if config.hold_out else f"sequences {config.sequences}"
        raise ValueError(f"{config.cache} has sequences 0:{count}; {asked} asks for others, or for none")
    if origin is not None:
        origin.check_part(config.cache, cache.fingerprint, count, part)
        origin.check_corpus(config.cache, cache.header.corpus_fingerprint)
        origin.warn_of_corpus(config.cache, cache.header.corpus_fingerprint, cache.fingerprint)
    return part
