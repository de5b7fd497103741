"""
Tokenised documents on disk: written once, checked, read by many.

Knows no model and no torch; a tokenizer comes in as a function from texts to token ids.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sklformat.checksums import Fingerprint
from sklformat.distill.text.documents import (
    Document,
    cut_documents,
    is_held_out,
    read_documents,
    split_documents,
    standard_library_documents,
)
from sklformat.distill.text.facts import FACTS_NAME, STORE_VERSION, Encoding, StoreFacts, read_facts, write_facts
from sklformat.distill.text.fingerprints import (
    corpus_fingerprint,
    document_fingerprint,
    joined,
    text_fingerprint,
    tokenizer_fingerprint,
)
from sklformat.distill.text.ragged import first_of_ragged, open_ninja, open_ragged, parts_of_ragged, write_ragged
from sklformat.distill.text.sources.prose import MAX_CHARS
from sklformat.errors import CorruptError, SettingsError
from sklformat.files.directories import published

__all__ = [
    "Document",
    "Encode",
    "Encoding",
    "IdError",
    "StoreFacts",
    "TokenStore",
    "copy_ragged",
    "corpus_fingerprint",
    "cut_documents",
    "first_of_ragged",
    "is_held_out",
    "is_token_store",
    "open_ninja",
    "open_ragged",
    "read_documents",
    "split_documents",
    "standard_library_documents",
    "tokenizer_fingerprint",
    "write_token_store",
]

_TOKENS_NAME = "tokens"
_DOCUMENTS_PER_BATCH = 256  # tokenised together, and written to the store in one go, unless they are large
_TOKENS_PER_BATCH = 1 << 20


Item = TypeVar("Item")

Encode = Callable[[list[str]], Sequence[ArrayLike]]
"""Texts to their token ids, without special tokens."""

Encoded = tuple[str, str, ArrayLike, "NDArray[np.bool_] | None"]
"""Name and digest of a document, its token ids, and which of them are answers, where these are marked."""

_ANSWER = 1 << 31  # set in the tokens of answers, where these are marked


# --- token store ------------------------------------------------------------------------------------------------------


class IdError(ValueError):
    """
    A document holds ids that are none of the vocabulary's.

    Attributes:
        document: Its name.
        token_id: One of them, the greatest or one below 0.
    """

    def __init__(self, message: str, *, document: str, token_id: int) -> None:
        super().__init__(message)
        self.document, self.token_id = document, token_id


class TokenStore:
    """
    Tokenised documents on disk, memory-mapped and read-only; ``store[d]`` is document d's tokens.

    Args:
        directory: What ``write_token_store`` wrote.

    Raises:
        FileNotFoundError: No store there.
        CorruptError: Its files contradict each other; ``verify`` looks at every token as well.
        UnsupportedError: A newer layout.

    Attributes:
        directory: Where it is.
        facts: What it says of itself.
        lengths: [num_documents] int64, tokens of each document.
    """

    def __init__(self, directory: Path | str) -> None:
        self.directory = Path(directory)
        self.facts = read_facts(self.directory)
        if not (self.directory / _TOKENS_NAME).is_dir():
            raise CorruptError("the tokens are missing; delete the store and make it again", path=self.directory)
        try:
            index, shapes, tokens = parts_of_ragged(self.directory / _TOKENS_NAME)
        except ValueError as error:
            raise _damaged(self.directory, f"cannot be opened: {error}") from error
        starts, ends, lengths = index
        facts = self.facts
        if shapes.shape != (facts.num_documents, 1) or any(part.shape != shapes.shape[:1] for part in index):
            raise _damaged(self.directory, f"the index is not one of {facts.num_documents} documents")
        if tokens.dtype != facts.dtype or tokens.shape != (facts.num_tokens,):
            found = f"{tokens.shape} of {tokens.dtype}"
            raise _damaged(self.directory, f"holds {found} tokens, should be ({facts.num_tokens},) of {facts.dtype}")
        if (lengths < 1).any() or (ends - starts != lengths).any() or (np.cumsum(lengths) != ends).any():
            raise _damaged(self.directory, "the index does not cover the tokens one document after the other")
        self.lengths = np.array(lengths, dtype=np.int64)
        self._ends = np.array(ends, dtype=np.int64)
        self._tokens = tokens

    def __len__(self) -> int:
        return self.facts.num_documents

    def __getitem__(self, document: int) -> NDArray[np.unsignedinteger[Any]]:
        """Tokens of one document, read-only or a copy, of type ``facts.dtype``."""
        return self._without_marks(self._stored(document))

    def answers(self, document: int) -> NDArray[np.bool_]:
        """Which tokens of a document are answers; all where none are marked."""
        stored = self._stored(document)
        return stored >= _ANSWER if self.facts.marks_answers else np.ones(stored.size, np.bool_)

    def _without_marks(self, stored: NDArray[np.unsignedinteger[Any]]) -> NDArray[np.unsignedinteger[Any]]:
        return stored & np.uint32(_ANSWER - 1) if self.facts.marks_answers else stored

    def _stored(self, document: int) -> NDArray[np.unsignedinteger[Any]]:
        end = self._ends[document]
        return self._tokens[end - self.lengths[document] : end]

    def first_tokens(self) -> NDArray[np.unsignedinteger[Any]]:
        """What each document begins with, [num_documents]."""
        return self._without_marks(self._tokens[self._ends - self.lengths])

    def check_ids(self, vocab_size: int) -> None:
        """
        Look at every token where the store itself promises no such bound.

        Raises:
            IdError: One is not below ``vocab_size``; names the first document that holds one, by its number.
        """
        if self.facts.vocab_size <= vocab_size:
            return
        for document in range(len(self)):
            _checked_ids(self[document], vocab_size, f"{self.directory}: document {document}")

    def verify(self) -> None:
        """
        Read every token and hold it against the store's fingerprint.

        Raises:
            CorruptError: They differ.
        """
        digits = corpus_fingerprint(self._stored(document) for document in range(len(self)))
        if digits != self.facts.corpus_fingerprint:
            raise _damaged(self.directory, f"its tokens give {digits}, stored is {self.facts.corpus_fingerprint}")


def is_token_store(directory: Path | str) -> bool:
    """Whether a directory says that it is a token store, sound or not."""
    return (Path(directory) / FACTS_NAME).exists()


def write_token_store(
    directory: Path | str,
    documents: Iterable[Document],
    encode: Encode,
    *,
    vocab_size: int,
    tokenizer_fingerprint: str,
    vocabulary_fingerprint: str = "",
    encoding: Encoding = Encoding(),  # noqa: B008  frozen
) -> TokenStore:
    """
    Tokenise documents once and keep them on disk; the store appears complete or not at all.

    A store that is already there is used again if it was made of the same documents by the same tokenizer.
    Documents without any token are left out.

    Args:
        directory: Where the store goes.
        documents: Read once, in order.
        encode: Texts to token ids.
        vocab_size: Bound of the ids, in [1, 2^32].
        tokenizer_fingerprint: ``tokenizer_fingerprint`` of what ``encode`` uses.
        vocabulary_fingerprint: ``vocabulary_fingerprint`` of it, of the ids below ``vocab_size``.
        encoding: How ``encode`` works, and where packing puts BOS; the store keeps it.

    Returns:
        The store, opened.

    Raises:
        IdError: An id outside [0, vocab_size).
        ValueError: No tokens at all.
        SettingsError: A store is there that was made of other documents, by another tokenizer or in another way.
        InUseError: Another process writes it.
        CorruptError, UnsupportedError: The store that is there cannot be read.
        OSError: As the operating system reports it.
    """
    directory = Path(directory)
    if directory.exists():
        texts = map(text_fingerprint, documents)
        return _found_again(directory, vocab_size, tokenizer_fingerprint, encoding, texts)
    fingerprints = (tokenizer_fingerprint, vocabulary_fingerprint)
    return _write(directory, _encoded(documents, encode), vocab_size, fingerprints, encoding)


def write_encoded(
    directory: Path | str,
    documents: Iterable[Encoded],
    texts: Callable[[], Iterable[str]],
    *,
    vocab_size: int,
    tokenizer_fingerprint: str,
    vocabulary_fingerprint: str = "",
    encoding: Encoding,
) -> TokenStore:
    """
    As ``write_token_store``, of documents that are encoded already, with their answers marked.

    Args:
        directory: Where the store goes.
        documents: Read once, in order, unless the store is there.
        texts: Gives the digests of the same documents, in order, without encoding them.
        vocab_size: Bound of the ids, in [1, 2^31].
        tokenizer_fingerprint: Of the tokenizer that made them.
        vocabulary_fingerprint: Of the same, of the ids below ``vocab_size``.
        encoding: How; the store keeps it.
    """
    directory = Path(directory)
    if directory.exists():
        return _found_again(directory, vocab_size, tokenizer_fingerprint, encoding, texts())
    return _write(directory, documents, vocab_size, (tokenizer_fingerprint, vocabulary_fingerprint), encoding)


def copy_ragged(
    directory: Path | str,
    source: Path | str,
    *,
    vocab_size: int,
    tokenizer_fingerprint: str,
    vocabulary_fingerprint: str = "",
    encoding: Encoding,
) -> TokenStore:
    """
    Make a token store of a directory that ``mmap_ninja.RaggedMmap`` wrote: one array of token ids per document.

    Such a directory knows neither its tokenizer nor a checksum, so every id is looked at, once.

    Args:
        directory: Where the store goes; one that was made of the same arrays is used again.
        source: The RaggedMmap's directory.
        vocab_size: Bound of the ids, in [1, 2^32].
        tokenizer_fingerprint: Of the tokenizer that the caller says made them.
        vocabulary_fingerprint: Of the same, of the ids below ``vocab_size``.
        encoding: Where packing puts BOS; the store keeps it.

    Returns:
        The store, opened.

    Raises:
        FileNotFoundError: No RaggedMmap there.
        CorruptError: Its files contradict each other.
        ValueError, SettingsError, InUseError, OSError: As ``write_token_store``.
    """
    directory, source = Path(directory), Path(source)
    documents = open_ragged(source)
    if directory.exists():
        texts = (document_fingerprint(ids) for ids in documents if ids.size)
        return _found_again(directory, vocab_size, tokenizer_fingerprint, encoding, texts)
    numbered = ((f"{source}: document {i}", document_fingerprint(ids), ids, None) for i, ids in enumerate(documents))
    found = (part for part in numbered if part[2].size)
    return _write(directory, found, vocab_size, (tokenizer_fingerprint, vocabulary_fingerprint), encoding)


def _found_again(
    directory: Path, vocab_size: int, tokenizer_fingerprint: str, encoding: Encoding, texts: Iterable[str]
) -> TokenStore:
    """The store that is there, if it is the one that would be made."""
    store = TokenStore(directory)
    for what, there, value in (
        ("by another tokenizer", store.facts.tokenizer_fingerprint, lambda: tokenizer_fingerprint),
        ("for another vocab_size", store.facts.vocab_size, lambda: vocab_size),
        ("in another way", str(store.facts.encoding), lambda: str(encoding)),
        ("of other text", store.facts.text_fingerprint, lambda: joined(texts)),
    ):
        if there != (wanted := value()):
            apart = " (sklformat merge joins their caches)" if what == "of other text" else ""
            raise SettingsError(
                f"{directory}: the tokens there were made {what} ({there}, now {wanted}); "
                f"give what they were made with, use another directory{apart}, or delete this one"
            )
    return store


def _encoded(documents: Iterable[Document], encode: Encode) -> Iterator[Encoded]:
    """Name, digest and token ids of each document."""
    for batch in _batched(documents, lambda document: len(document.text), MAX_CHARS):
        for document, ids in zip(batch, encode([document.text for document in batch]), strict=True):
            yield document.name, text_fingerprint(document), ids, None


def _write(
    directory: Path,
    documents: Iterable[Encoded],
    vocab_size: int,
    fingerprints: tuple[str, str],
    encoding: Encoding,
) -> TokenStore:
    bits = 31 if encoding.marks_answers else 32
    if not 1 <= vocab_size <= 1 << bits:
        raise ValueError(f"vocab_size must be in [1, 2^{bits}], got {vocab_size}")
    dtype = "uint16" if vocab_size <= 1 << 16 and not encoding.marks_answers else "uint32"
    texts, digests = Fingerprint(), Fingerprint()
    num_documents = num_tokens = 0

    def tokenised() -> Iterator[NDArray[np.unsignedinteger[Any]]]:
        nonlocal num_documents, num_tokens
        for name, text, ids, answers in documents:
            texts.update(text.encode("ascii"))
            tokens = _checked_ids(ids, vocab_size, name)
            if tokens.size:
                if answers is not None:
                    tokens |= np.where(answers, _ANSWER, 0)
                digests.update(document_fingerprint(tokens).encode("ascii"))
                num_documents += 1
                num_tokens += tokens.size
                yield tokens.astype(dtype)

    with published(directory) as partial:
        write_ragged(partial / _TOKENS_NAME, _batched(tokenised(), len, _TOKENS_PER_BATCH))
        if not num_documents:
            raise ValueError("no text found: the documents hold no tokens")
        facts = StoreFacts(
            version=STORE_VERSION,
            vocab_size=vocab_size,
            num_documents=num_documents,
            num_tokens=num_tokens,
            dtype=dtype,
            corpus_fingerprint=digests.digits(),
            tokenizer_fingerprint=fingerprints[0],
            vocabulary_fingerprint=fingerprints[1],
            text_fingerprint=texts.digits(),
            **dataclasses.asdict(encoding),
        )
        write_facts(partial, facts)
        TokenStore(partial).verify()  # what was written is what was meant
    return TokenStore(directory)


def _damaged(directory: Path, what: str) -> CorruptError:
    return CorruptError(f"token store is damaged: {what}; delete it and make it again", path=directory)


def _checked_ids(ids: ArrayLike, vocab_size: int, name: str) -> NDArray[np.int64]:
    tokens = np.asarray(ids, dtype=np.int64).reshape(-1)
    least, greatest = (int(tokens.min()), int(tokens.max())) if tokens.size else (0, 0)
    if least < 0 or greatest >= vocab_size:
        raise IdError(
            f"{name}: token ids from {least} to {greatest} are not all in [0, {vocab_size}); vocab_size belongs to "
            "another tokenizer",
            document=name,
            token_id=greatest if greatest >= vocab_size else least,
        )
    return tokens


def _batched(items: Iterable[Item], size_of: Callable[[Item], int], max_size: int) -> Iterator[list[Item]]:
    """Lists of at most ``_DOCUMENTS_PER_BATCH``, and of at most ``max_size`` together, unless one alone is larger."""
    batch, size = list[Item](), 0
    for item in items:
        if batch and (len(batch) == _DOCUMENTS_PER_BATCH or size + size_of(item) > max_size):
            yield batch
            batch, size = [], 0
        batch.append(item)
        size += size_of(item)
    if batch:
        yield batch
