"""
Tokenised documents on disk, and sequences of equal length packed from them.

Knows no model and no torch; a tokenizer comes in as a function from texts to token ids.
Source of the packing: Anshumann et al. 2025 (arXiv 2503.16870), Appendix D: documents shuffled by a seed that teacher
and student share, joined by a separator, attention not masked across documents.
"""

from __future__ import annotations

import itertools
import json
import operator
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from mmap_ninja import RaggedMmap
from mmap_ninja import numpy as ninja_arrays
from numpy.typing import ArrayLike, NDArray

from sklformat.distill.directories import published
from sklformat.distill.documents import (
    Document,
    cut_documents,
    is_held_out,
    read_documents,
    split_documents,
    standard_library_documents,
)
from sklformat.distill.fingerprints import (
    corpus_fingerprint,
    document_fingerprint,
    joined,
    text_fingerprint,
    tokenizer_fingerprint,
)
from sklformat.errors import CorruptError, SettingsError, UnsupportedError
from sklformat.order import permute

__all__ = [
    "Document",
    "Encode",
    "PackedSequences",
    "StoreFacts",
    "TokenStore",
    "corpus_fingerprint",
    "cut_documents",
    "is_held_out",
    "is_token_store",
    "open_ninja",
    "read_documents",
    "split_documents",
    "standard_library_documents",
    "tokenizer_fingerprint",
    "write_token_store",
]

STORE_VERSION = 1
_FACTS_NAME = "store.json"
_TOKENS_NAME = "tokens"
_DOCUMENTS_PER_BATCH = 256  # tokenised together, and written to the store in one go


Encode = Callable[[list[str]], Sequence[ArrayLike]]
"""Texts to their token ids, without special tokens."""


# --- token store ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreFacts:
    """
    What a token store says of itself in ``store.json``.

    Attributes:
        version: Version of the store's layout.
        vocab_size: Every token id is below it.
        num_documents: Documents with at least one token.
        num_tokens: Tokens of all documents, separators not among them.
        dtype: "uint16" when ``vocab_size`` allows, else "uint32".
        corpus_fingerprint: ``corpus_fingerprint`` of the documents' tokens.
        tokenizer_fingerprint: ``tokenizer_fingerprint`` of what made them.
        text_fingerprint: XXH3-128 of the documents' names and texts.
    """

    version: int
    vocab_size: int
    num_documents: int
    num_tokens: int
    dtype: str
    corpus_fingerprint: str
    tokenizer_fingerprint: str
    text_fingerprint: str


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
        self.facts = _read_facts(self.directory)
        # RaggedMmap makes a directory that is not there and believes its index, hence the checks around it.
        if not (self.directory / _TOKENS_NAME).is_dir():
            raise CorruptError("the tokens are missing; delete the store and make it again", path=self.directory)
        try:
            ragged = RaggedMmap(self.directory / _TOKENS_NAME, mode="r")
            index = [np.asarray(part) for part in (ragged.starts, ragged.ends, ragged.flattened_shapes)]
            shapes = np.asarray(ragged.shapes)
            tokens = np.asarray(ragged.memmap)
        except (FileNotFoundError, ValueError, TypeError, AttributeError, struct.error) as error:
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
        """Tokens of one document, a read-only view of type ``facts.dtype``."""
        end = self._ends[document]
        return self._tokens[end - self.lengths[document] : end]

    def verify(self) -> None:
        """
        Read every token and hold it against the store's fingerprint.

        Raises:
            CorruptError: They differ.
        """
        digits = corpus_fingerprint(self[document] for document in range(len(self)))
        if digits != self.facts.corpus_fingerprint:
            raise _damaged(self.directory, f"its tokens give {digits}, stored is {self.facts.corpus_fingerprint}")


def write_token_store(
    directory: Path | str,
    documents: Iterable[Document],
    encode: Encode,
    *,
    vocab_size: int,
    tokenizer_fingerprint: str,
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

    Returns:
        The store, opened.

    Raises:
        ValueError: No tokens at all, or an id outside [0, vocab_size).
        SettingsError: A store is there that was made of other documents or by another tokenizer.
        InUseError: Another process writes it.
        CorruptError, UnsupportedError: The store that is there cannot be read.
        OSError: As the operating system reports it.
    """
    directory = Path(directory)
    if directory.exists():
        store = TokenStore(directory)
        for what, there, wanted in (
            ("by another tokenizer", store.facts.tokenizer_fingerprint, tokenizer_fingerprint),
            ("for another vocab_size", store.facts.vocab_size, vocab_size),
            ("of other text", store.facts.text_fingerprint, joined(map(text_fingerprint, documents))),
        ):
            if there != wanted:
                raise SettingsError(
                    f"{directory}: the tokens there were made {what} than is given now ({there}, now {wanted}); "
                    f"give what they were made with, use another directory, or delete this one"
                )
        return store
    if not 1 <= vocab_size <= 1 << 32:
        raise ValueError(f"vocab_size must be in [1, 2^32], got {vocab_size}")
    dtype = "uint16" if vocab_size <= 1 << 16 else "uint32"
    texts: list[str] = []
    digests: list[str] = []
    num_tokens = 0

    def tokenised() -> Iterator[NDArray[np.unsignedinteger[Any]]]:
        nonlocal num_tokens
        for batch in _batched(documents, _DOCUMENTS_PER_BATCH):
            for document, ids in zip(batch, encode([document.text for document in batch]), strict=True):
                texts.append(text_fingerprint(document))
                tokens = _checked_ids(ids, vocab_size, document.name)
                if tokens.size:
                    digests.append(document_fingerprint(tokens))
                    num_tokens += tokens.size
                    yield tokens.astype(dtype)

    with published(directory) as partial:
        RaggedMmap.from_generator(partial / _TOKENS_NAME, tokenised(), batch_size=_DOCUMENTS_PER_BATCH, verbose=False)
        if not digests:
            raise ValueError("no text found: the documents hold no tokens")
        facts = StoreFacts(
            version=STORE_VERSION,
            vocab_size=vocab_size,
            num_documents=len(digests),
            num_tokens=num_tokens,
            dtype=dtype,
            corpus_fingerprint=joined(digests),
            tokenizer_fingerprint=tokenizer_fingerprint,
            text_fingerprint=joined(texts),
        )
        (partial / _FACTS_NAME).write_text(json.dumps(asdict(facts), indent=1) + "\n", encoding="utf-8")
        TokenStore(partial).verify()  # what was written is what was meant
    return TokenStore(directory)


def is_token_store(path: Path) -> bool:
    """Whether ``write_token_store`` wrote this directory."""
    return (path / _FACTS_NAME).is_file()


def open_ninja(path: Path) -> Any:
    """An mmap-ninja store, ragged or one array, read-only, whose [i] is its i-th array; None: this is no such store."""
    if (path / "shapes_are_flat.ninja").is_file():
        return RaggedMmap(path, mode="r")
    return ninja_arrays.open_existing(path, mode="r") if (path / "data.ninja").is_file() else None


def _read_facts(directory: Path) -> StoreFacts:
    path = directory / _FACTS_NAME
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{directory} is no token store: it has no {_FACTS_NAME}") from None
    except ValueError as error:
        raise CorruptError(f"not JSON: {error}", path=path) from None
    if isinstance(values, dict) and isinstance(values.get("version"), int) and values["version"] > STORE_VERSION:
        raise UnsupportedError(f"store version {values['version']}, this package reads {STORE_VERSION}", path=path)
    types = {name: int if annotation == "int" else str for name, annotation in StoreFacts.__annotations__.items()}
    if not isinstance(values, dict) or {name: type(value) for name, value in values.items()} != types:
        raise CorruptError(f"must hold exactly the fields {', '.join(types)}", path=path)
    return StoreFacts(**values)


def _damaged(directory: Path, what: str) -> CorruptError:
    return CorruptError(f"token store is damaged: {what}; delete it and make it again", path=directory)


def _checked_ids(ids: ArrayLike, vocab_size: int, name: str) -> NDArray[np.int64]:
    tokens = np.asarray(ids, dtype=np.int64).reshape(-1)
    if tokens.size and (tokens.min() < 0 or tokens.max() >= vocab_size):
        raise ValueError(
            f"{name}: token ids from {tokens.min()} to {tokens.max()} are not all in [0, {vocab_size}); "
            f"vocab_size belongs to another tokenizer"
        )
    return tokens


def _batched(documents: Iterable[Document], size: int) -> Iterator[list[Document]]:
    iterator = iter(documents)
    while batch := list(itertools.islice(iterator, size)):
        yield batch


# --- packing ----------------------------------------------------------------------------------------------------------


class PackedSequences:
    """
    Windows of ``seq_len + 1`` tokens over all documents, shuffled by seed and joined by a separator.

    The stream is document after document in the order ``permute(arange(n), n, seed=seed)``, each followed by the
    separator. Window i holds tokens ``[i·seq_len, i·seq_len + seq_len]`` of it, both ends included, so neighbours
    share one token and every token but the first is predicted exactly once. What fills no window is dropped.
    A window is a function of (documents, seed, seq_len, separator) alone. Memory: 16 bytes a document.

    Pickled, it is its arguments; the store is opened again, on first use, in the process that unpickled it.

    Args:
        store_path: A token store.
        seq_len: Positions in a sequence, >= 1.
        separator_id: Token id put after each document, >= 0.
        seed: Seed of the documents' order.
        first: Number of the first window of the stream to show; ``self[0]`` is this one.
        count: How many windows to show; None: all from ``first`` on.

    Raises:
        ValueError: An argument out of range, or a text too short for the windows asked; the message has both numbers.
        FileNotFoundError, CorruptError, UnsupportedError: As ``TokenStore``.
    """

    def __init__(
        self,
        store_path: Path | str,
        *,
        seq_len: int,
        separator_id: int,
        seed: int,
        first: int = 0,
        count: int | None = None,
    ) -> None:
        if seq_len < 1:
            raise ValueError(f"seq_len must be >= 1, got {seq_len}")
        if not 0 <= separator_id < 1 << 32 or not 0 <= seed < 1 << 64:
            raise ValueError(f"separator_id must be in [0, 2^32) and seed in [0, 2^64), got {separator_id} and {seed}")
        if first < 0 or (count is not None and count < 1):
            raise ValueError(f"first must be >= 0 and count >= 1, got {first} and {count}")
        self.store_path = Path(store_path)
        self.seq_len = seq_len
        self.separator_id = separator_id
        self.seed = seed
        self.first = first
        self._store: TokenStore | None = None
        store = self._opened()
        num_tokens = store.facts.num_tokens + len(store)
        num_windows = (num_tokens - 1) // seq_len
        wanted = first + (1 if count is None else count)
        if num_windows < wanted:
            need = wanted * seq_len + 1
            raise ValueError(
                f"the text is too short: {wanted} sequences of {seq_len} positions take {need} tokens, "
                f"it has {num_tokens} (separators included); give more text or a smaller seq_len"
            )
        self._count = num_windows - first if count is None else count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> NDArray[np.uint32]:
        """Tokens of one sequence, [seq_len + 1] uint32, a copy."""
        index = operator.index(index)
        if not -self._count <= index < self._count:
            raise IndexError(f"sequence {index} of {self._count}")
        store = self._opened()
        start = (self.first + index % self._count) * self.seq_len
        end = start + self.seq_len + 1
        window = np.empty(self.seq_len + 1, dtype=np.uint32)
        place = int(np.searchsorted(self._stream_ends, start, side="right"))
        at = start
        while at < end:
            document = int(self._order[place])
            document_end = int(self._stream_ends[place])  # one past the separator
            document_start = document_end - 1 - int(store.lengths[document])
            stop = min(end, document_end - 1)
            if at < stop:
                window[at - start : stop - start] = store[document][at - document_start : stop - document_start]
            if document_end <= end:
                window[document_end - 1 - start] = self.separator_id
            at = document_end
            place += 1
        return window

    def __getstate__(self) -> dict[str, Any]:
        dropped = ("_store", "_order", "_stream_ends")
        return {name: value for name, value in self.__dict__.items() if name not in dropped} | {"_store": None}

    @property
    def facts(self) -> StoreFacts:
        """What the token store says of itself."""
        return self._opened().facts

    def _opened(self) -> TokenStore:
        if self._store is None:
            store = TokenStore(self.store_path)
            self._order = permute(np.arange(len(store), dtype=np.int64), len(store), seed=self.seed)
            self._stream_ends = np.cumsum(store.lengths[self._order] + 1)
            self._store = store
        return self._store
