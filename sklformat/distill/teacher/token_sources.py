"""
From what the user gives (text, a dataset, token stores) to the packed sequences that a teacher runs over.

Knows no model; a tokenizer comes in with its fingerprint.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sklformat.distill.models import tokenization
from sklformat.distill.text.corpus import (
    Document,
    TokenStore,
    copy_ragged,
    is_token_store,
    open_ragged,
    read_documents,
    tokenizer_fingerprint,
    write_token_store,
)
from sklformat.distill.text.documents import read_dataset
from sklformat.distill.text.packing import PackedSequences
from sklformat.errors import SettingsError
from sklformat.settings.cache import CacheConfig

TOKENS_NAME = "tokens"
"""Directory of the token store inside a cache that was made from text."""


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
        self._documents: Iterator[Document] | None = None
        if config.text:
            self._documents = read_documents(config.text)
        elif config.dataset:
            self._documents = read_dataset(config.dataset, split=config.dataset_split, field=config.dataset_field)
        elif self._is_ragged():
            open_ragged(self._given())
        else:
            self._check_tokenizer(TokenStore(self._given()))

    def pack(self, *, check: bool) -> PackedSequences:
        """
        The sequences to run over.

        Args:
            check: Make the token store if it is not there, and read all of it. A process that another has done this
                for, on the same machine, opens what is there.

        Raises:
            ValueError: Too little text, or ids that are not the tokenizer's.
            CorruptError, InUseError, OSError: As ``write_token_store``.
            SettingsError: The tokens in the cache's directory are of other text.
        """
        path = self._given() if self._is_store() else self._config.directory / TOKENS_NAME
        made_now = check and not path.exists()
        if check:
            self._make(path).verify()
        try:
            return PackedSequences(
                path,
                seq_len=self._config.seq_len,
                separator_id=tokenization.separator_id(self._tokenizer),
                seed=self._config.packing_seed,
                first=self._config.first_sequence,
                count=self._config.num_sequences,
            )
        except ValueError:
            if made_now:  # else the next run, with more text, would be refused because of it
                shutil.rmtree(path)
            raise

    def _make(self, path: Path) -> TokenStore:
        facts: dict[str, Any] = {
            "vocab_size": tokenization.num_ids(self._tokenizer),
            "tokenizer_fingerprint": self._fingerprint,
        }
        if self._is_store():
            return TokenStore(path)
        if self._is_ragged():
            return copy_ragged(path, self._given(), **facts)
        assert self._documents is not None
        return write_token_store(
            path, self._documents, lambda texts: tokenization.encode(self._tokenizer, texts), **facts
        )

    def _is_store(self) -> bool:
        return self._config.tokens is not None and is_token_store(self._config.tokens)

    def _is_ragged(self) -> bool:
        return self._config.tokens is not None and not self._is_store()

    def _given(self) -> Path:
        assert self._config.tokens is not None
        return self._config.tokens

    def _check_tokenizer(self, store: TokenStore) -> None:
        if store.facts.tokenizer_fingerprint != self._fingerprint:
            raise SettingsError(
                f"{store.directory}: made by tokenizer {store.facts.tokenizer_fingerprint}, the teacher's is "
                f"{self._fingerprint}; make the tokens with the teacher's tokenizer"
            )
