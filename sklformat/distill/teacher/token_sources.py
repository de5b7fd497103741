"""
From what the user gives (text, a dataset, token stores) to the packed sequences that a teacher runs over.

Knows no model; a tokenizer comes in with its fingerprint.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from sklformat.distill.models import tokenization
from sklformat.distill.models.templates import Encoders
from sklformat.distill.text.chats import Text, read_dataset_texts, read_texts, write_texts
from sklformat.distill.text.corpus import (
    Encoding,
    IdError,
    TokenStore,
    copy_ragged,
    first_of_ragged,
    is_token_store,
    open_ragged,
    tokenizer_fingerprint,
)
from sklformat.distill.text.fingerprints import vocabulary_fingerprint
from sklformat.distill.text.packing import Sequences
from sklformat.distill.text.singles import SingleSequences, open_sequences
from sklformat.errors import SettingsError
from sklformat.progress import say
from sklformat.settings.cache import CacheConfig
from sklformat.settings.text import Bos, BosPlace

TOKENS_NAME = "tokens"
"""Directory of the token store inside a cache that was made from text."""

_RENDERED_SHARE = 0.05  # of texts with two names of special tokens or more: more than talk about them


class TokenSource:
    """
    What one capture runs over; the paths that are given are looked at when it is made, their content later.

    Args:
        config: Of the capture.
        tokenizer: The teacher's.

    Raises:
        FileNotFoundError, PermissionError: A path does not exist or cannot be read.
        ValueError: No text found.
        SettingsError: A token store of another tokenizer.
        ModuleNotFoundError: A dataset is given, and ``datasets`` is not installed.
    """

    def __init__(self, config: CacheConfig, tokenizer: Any) -> None:
        self._config, self._tokenizer = config, tokenizer
        self._fingerprint = tokenizer_fingerprint(tokenizer)
        self._texts: Iterator[Text] | None = None
        if config.text:
            self._texts = read_texts(config)
        elif config.dataset:
            self._texts = read_dataset_texts(config.dataset, split=config.dataset_split, field=config.text_field)
        elif self._is_ragged():
            open_ragged(self._given())
        else:
            self._check_tokenizer(TokenStore(self._given()))

    def pack(self, vocab_size: int, *, check: bool) -> Sequences:
        """
        The sequences to run over.

        Args:
            vocab_size: Ids that teacher and tokenizer have in common.
            check: Make the token store if it is not there, and read all of it. A process that another has done this
                for, on the same machine, opens what is there.

        Raises:
            ValueError: Too little text, none of it to be learnt from, or ids that are not the tokenizer's or not the
                teacher's.
            CorruptError, InUseError, OSError: As ``write_token_store``.
            SettingsError: The tokens in the cache's directory are of other text.
        """
        path = self._given() if self._is_store() else self._config.directory / TOKENS_NAME
        made_now = check and not path.exists()
        if check:
            try:
                store = self._make(path, vocab_size)
            except IdError as error:
                if not vocab_size <= error.token_id < tokenization.num_ids(self._tokenizer):
                    raise
                raise ValueError(
                    f"{error.document}: {tokenization.why_beyond(self._tokenizer, error.token_id, vocab_size)}"
                ) from None
            if not made_now:  # else it was read when it was written
                store.verify()
        try:
            sequences = open_sequences(
                path,
                packing=self._config.packing,
                truncate=self._config.truncate,
                bos_id=self._tokenizer.bos_token_id,
                seq_len=self._config.seq_len,
                separator_id=tokenization.separator_id(self._tokenizer),
                seed=self._config.packing_seed,
                first=self._config.first_sequence,
                count=self._config.num_sequences,
                isolated=self._config.isolate_documents,
            )
            if check and isinstance(sequences, SingleSequences):
                self._warn_of_length(sequences)
            if check:
                _check_counted(sequences)
        except ValueError:
            if made_now:  # else the next run, with more text, would be refused because of it
                shutil.rmtree(path)
            raise
        return sequences

    def _make(self, path: Path, vocab_size: int) -> TokenStore:
        if self._is_store():
            store = TokenStore(path)
            store.check_ids(vocab_size)
            return self._follow(store)
        facts: dict[str, Any] = {
            "vocab_size": vocab_size,
            "tokenizer_fingerprint": self._fingerprint,
            "vocabulary_fingerprint": vocabulary_fingerprint(self._tokenizer, vocab_size),
        }
        bos = self._choose_bos(path)
        if self._is_ragged():
            place, bos_id = tokenization.choose_bos(self._tokenizer, bos)
            encoding = Encoding(bos=place, bos_id=bos_id, special_tokens="given")
            return self._look_at(copy_ragged(path, self._given(), **facts, encoding=encoding), self._given())
        assert self._texts is not None
        encoders = Encoders(self._tokenizer, bos=bos, special_tokens=self._config.special_tokens)
        store = write_texts(path, self._texts, encoders, **facts)
        if encoders.documents is None:
            return self._look_at(store, path)
        self._warn_of_names(encoders.documents)
        return store

    def _choose_bos(self, path: Path) -> Bos:
        """As asked; with auto as the tokens were made that an earlier run left, whatever the rule was then."""
        if self._config.bos != "auto":
            return self._config.bos
        if self._is_ragged() and self._has_bos(self._given()):
            return "none"
        if not path.exists():
            return "auto"
        facts = TokenStore(path).facts
        if facts.bos == "none" and not facts.marks_answers and tokenization.template_ids(self._tokenizer)[0]:
            _warn(
                f"{self._config.out} was begun without BOS, which the tokenizer puts before a text, and is resumed so"
            )
        return cast("BosPlace", facts.bos)

    def _has_bos(self, source: Path) -> bool:
        """Whether documents that come as ids begin with what the tokenizer puts before a text."""
        before, _ = tokenization.template_ids(self._tokenizer)
        return bool(before) and _are_most(first_of_ragged(source) == before[0])

    def _follow(self, store: TokenStore) -> TokenStore:
        """A token store says where its BOS goes; a flag may repeat that."""
        if self._config.bos not in ("auto", store.facts.bos):
            raise SettingsError(
                f"{store.directory}: its tokens go with --bos {store.facts.bos}, asked for is --bos "
                f"{self._config.bos}; leave --bos out, or make the tokens from the text again"
            )
        return self._look_at(store, store.directory)

    def _look_at(self, store: TokenStore, source: Path) -> TokenStore:
        """Warn of tokens without the BOS that the teacher is used to, and refuse to put a second one."""
        bos_id = store.facts.bos_id
        if store.facts.bos == "document" and _are_most(store.first_tokens() == bos_id):
            raise SettingsError(f"{source}: its documents begin with BOS (id {bos_id}) already; give --bos none")
        before, _ = tokenization.template_ids(self._tokenizer)
        if store.facts.bos != "none" or self._config.bos == "none" or not before:
            return store
        others = store.first_tokens() != before[0]
        if _are_most(others):
            without = np.count_nonzero(others)
            _warn(
                f"{source}: {without} of {len(store)} documents do not begin with {self._name(before[0])}, which the "
                "tokenizer puts before a text: the teacher reads what it was not trained to read; make the tokens "
                "with it, or say --bos none"
            )
        return store

    def _warn_of_length(self, sequences: SingleSequences) -> None:
        """Say how many documents are longer than a sequence, and what becomes of them."""
        if sequences.num_truncated:
            lost = f"; {sequences.num_lost} of them lose all answers so and are left out" if sequences.num_lost else ""
            _warn(
                f"{sequences.num_truncated} of {sequences.facts.num_documents} documents are longer than seq_len "
                f"{sequences.seq_len} and lose their {self._config.truncate}{lost}"
            )

    def _warn_of_names(self, encode: tokenization.TextEncoder) -> None:
        """Say how often text holds the names of special tokens, and whether that looks like rendered chats."""
        if not encode.num_names:
            return
        kept = self._config.special_tokens == "keep"
        became = "the tokens themselves" if kept else "plain characters"
        advice = ""
        if encode.num_rendered >= max(1, encode.num_texts * _RENDERED_SHARE):
            advice = "; this looks like chats that a template rendered: give --special-tokens keep"
            if kept:
                advice = "; this looks like chats that a template rendered: prompts get records like answers"
        _warn(
            f"the text holds {encode.num_names} names of special tokens such as {encode.example}, taken as {became}"
            f"{advice}"
        )

    def _name(self, token_id: int) -> str:
        return str(self._tokenizer.convert_ids_to_tokens(token_id))

    def _is_store(self) -> bool:
        return self._config.tokens is not None and is_token_store(self._config.tokens)

    def _is_ragged(self) -> bool:
        return self._config.tokens is not None and not self._is_store()

    def _given(self) -> Path:
        assert self._config.tokens is not None
        return self._config.tokens

    def _check_tokenizer(self, store: TokenStore) -> None:
        conflict = store.facts.made_by.conflict(self._tokenizer)
        if conflict:
            raise SettingsError(
                f"{store.directory}: made by a different tokenizer from the teacher's: {conflict}; make the tokens "
                "with the teacher's tokenizer"
            )


def _check_counted(sequences: Sequences) -> None:
    if not sequences.has_counted():
        raise ValueError(
            f"{len(sequences)} sequences were packed, and no position of them predicts an answer; take more of the "
            "text, a larger seq_len, or --packing single"
        )


def _are_most(of_documents: NDArray[np.bool_]) -> bool:
    return 2 * int(np.count_nonzero(of_documents)) > of_documents.size


def _warn(what: str) -> None:
    say(f"warning: {what}")
