"""
What a token store says of itself in its ``store.json``.

Knows no tokens.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from sklformat.distill.text.fingerprints import MadeBy
from sklformat.errors import CorruptError, UnsupportedError, describe_bad_json
from sklformat.settings.text import BOS_PLACES, SPECIAL_TOKENS, BosPlace, SpecialTokens

FACTS_NAME = "store.json"
STORE_VERSION = 2
_MISSING = object()


class Encoder(Protocol):
    """What encodes text and says how: the encoders of ``models``."""

    bos: BosPlace
    bos_id: int | None
    special_tokens: SpecialTokens
    chat_template: str | None
    marks_answers: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoding:
    """
    How text became tokens, and where packing puts BOS, the token that begins a text.

    Attributes:
        bos: "none"; "document": before each document; "window": before each packed sequence.
        bos_id: Its id; None where ``bos`` is "none".
        special_tokens: What the name of a special token inside a text became: "text", characters like any other, or
            "keep", the token itself; "given" where tokens came instead of text.
        chat_template: XXH3-128 of the template that rendered chats; None: none did.
        marks_answers: Whether answers are marked among the tokens; nothing else is learnt from then.
    """

    bos: str = "none"
    bos_id: int | None = None
    special_tokens: str = "text"
    chat_template: str | None = None
    marks_answers: bool = False

    @classmethod
    def of(cls, encoder: Encoder) -> Encoding:
        """How an encoder works."""
        return cls(**{f.name: getattr(encoder, f.name) for f in dataclasses.fields(Encoding)})

    def __str__(self) -> str:
        """As flags say it, with the id."""
        token = "" if self.bos_id is None else f" (id {self.bos_id})"
        kept = " --special-tokens keep" if self.special_tokens == "keep" else ""
        template = "" if self.chat_template is None else f" and chat template {self.chat_template}"
        return f"--bos {self.bos}{token}{kept}{template}"


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreFacts(Encoding):
    """
    What a token store says of itself, how its text was encoded among it.

    Attributes:
        version: Version of the store's layout; 1 knew no BOS.
        vocab_size: Every token id is below it.
        num_documents: Documents with at least one token.
        num_tokens: Tokens of all documents; what packing puts around them is not among them.
        dtype: "uint16" when ``vocab_size`` allows, else "uint32".
        corpus_fingerprint: ``corpus_fingerprint`` of the documents' tokens.
        tokenizer_fingerprint: ``tokenizer_fingerprint`` of what made them.
        text_fingerprint: XXH3-128 of the documents' names and texts.
        vocabulary_fingerprint: ``vocabulary_fingerprint`` of its ids below ``vocab_size``; "": not said, as in earlier
            stores.
    """

    version: int
    vocab_size: int
    num_documents: int
    num_tokens: int
    dtype: str
    corpus_fingerprint: str
    tokenizer_fingerprint: str
    text_fingerprint: str
    vocabulary_fingerprint: str = ""

    @property
    def encoding(self) -> Encoding:
        """The part of it that says how text was encoded."""
        return Encoding(**{f.name: getattr(self, f.name) for f in dataclasses.fields(Encoding)})

    @property
    def made_by(self) -> MadeBy:
        """The part of it that says which tokenizer."""
        return MadeBy(self.tokenizer_fingerprint, self.vocab_size, self.vocabulary_fingerprint)


def read_facts(directory: Path) -> StoreFacts:
    """
    The facts of a store.

    Raises:
        FileNotFoundError: No store there.
        CorruptError: They are no such facts.
        UnsupportedError: A newer layout.
    """
    path = directory / FACTS_NAME
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{directory} is no token store: it has no {FACTS_NAME}") from None
    except ValueError as error:
        raise CorruptError(describe_bad_json(error), path=path) from None
    version = values.get("version") if isinstance(values, dict) else None
    if isinstance(version, int) and version > STORE_VERSION:
        raise UnsupportedError(f"store version {version}, this package reads {STORE_VERSION}", path=path)
    added = {f.name for f in dataclasses.fields(Encoding)}
    types = {f.name: int if f.type == "int" else str for f in dataclasses.fields(StoreFacts) if f.name not in added}
    if isinstance(values, dict):
        values = {"vocabulary_fingerprint": ""} | values
    if not isinstance(values, dict) or {n: type(v) for n, v in values.items() if n not in added} != types:
        raise CorruptError(f"must hold exactly the fields {', '.join(types)}", path=path)
    if version != 1 and not _is_encoding({name: values.get(name, _MISSING) for name in added}):
        raise CorruptError(f"must say how text was encoded, as {Encoding()!r} does", path=path)
    return StoreFacts(**values)


def write_facts(directory: Path, facts: StoreFacts) -> None:
    """Write the facts of a store that someone else publishes."""
    text = json.dumps(dataclasses.asdict(facts), indent=1)
    (directory / FACTS_NAME).write_text(text + "\n", encoding="utf-8")


def _is_encoding(values: dict[str, Any]) -> bool:
    return (
        values["bos"] in BOS_PLACES
        and values["special_tokens"] in (*SPECIAL_TOKENS, "given")
        and (values["bos_id"] is None if values["bos"] == "none" else type(values["bos_id"]) is int)
        and (values["chat_template"] is None or isinstance(values["chat_template"], str))
        and type(values["marks_answers"]) is bool
    )
