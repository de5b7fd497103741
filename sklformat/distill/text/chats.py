"""
Chats as rows hold them, in one shape: messages with roles, or a prompt and its completion.

Knows no tokenizer.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

from sklformat.distill.text.corpus import Encoding, TokenStore, write_encoded, write_token_store
from sklformat.distill.text.documents import Document, check_characters, document_of, some
from sklformat.distill.text.facts import Encoder
from sklformat.distill.text.fingerprints import text_fingerprint
from sklformat.distill.text.sources import hub
from sklformat.distill.text.sources.json_rows import kind_of
from sklformat.distill.text.sources.rows import Row, UnlikeError, read_made
from sklformat.errors import describe_bad_json
from sklformat.settings.files import TextFiles
from sklformat.settings.text import ANSWERS, Marked

_MESSAGES = ("messages", "conversations")
_PROMPT, _COMPLETION, _TOOLS = "prompt", "completion", "tools"
# What ShareGPT's rows call roles.
_ROLES = {
    **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "model", "function_call", ANSWERS), ANSWERS),
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("tool", "observation"), "tool"),
    "system": "system",
}
_MOST_CHARS = 64  # of a token, as long runs of spaces are
_ROWS_PER_SEQUENCE = 4  # of chats, each of which is a sequence, and of which some may be left out


@dataclass(frozen=True, slots=True)
class Chat:
    """
    One chat.

    Attributes:
        name: As of a document; decides the held-out split.
        place: Of its row, for messages.
        messages: Each with "role" and what the chat template knows: "content", "tool_calls", …; empty where ``prompt``
            and ``completion`` are text without a template.
        tools: Descriptions of the tools that the template shows.
        prompt, completion: Text that is read, and text that is learnt from.
    """

    name: str
    place: str
    messages: tuple[Mapping[str, Any], ...] = ()
    tools: tuple[Any, ...] = ()
    prompt: str = ""
    completion: str = ""

    @property
    def text(self) -> str:
        """All that it says, in one form, for its fingerprint."""
        parts = [self.messages, self.tools, self.prompt, self.completion]
        return json.dumps(parts, sort_keys=True, ensure_ascii=False, default=str)  # tables hold dates and the like


Text = Document | Chat
"""What a row becomes."""


def read_texts(files: TextFiles) -> Iterator[Text]:
    """
    The rows of files as documents or as chats, whichever the first row is; all others must be the same.

    A row's field (``files.text_field``) is a document where it holds text, and a chat where it holds messages. A row
    that has no field "text" is a chat if it has "messages", "conversations", or "prompt" and "completion".

    Args:
        files: The choice.

    Raises:
        ValueError: As ``read_documents``, and for rows that are no such thing, or another than the first, which is no
            file to be skipped; names them.
    """
    source = ", ".join(map(str, files.text))
    wanted = {files.text_field, *_MESSAGES, _PROMPT, _COMPLETION, _TOOLS}
    texts: Iterator[Text] = read_made(files, _Reader(files.text_field), wanted=wanted)
    return some(texts, f"every file in {source} is empty, or cannot be read and is skipped")


def read_dataset_texts(words: Sequence[str], *, split: str = "train", field: str = "text") -> Iterator[Text]:
    """
    The same of a Hugging Face dataset.

    Args:
        words: As ``hub.read_dataset_rows``: a directory, or a name and, where it has several, its configuration.
        split: Part of it.
        field: As ``read_texts``.

    Raises:
        ModuleNotFoundError: ``datasets`` is not installed.
        FileNotFoundError: There is no such dataset, split or configuration.
        ValueError: As ``read_texts``.
    """
    reader = _Reader(field)
    texts = (text for row in hub.read_dataset_rows(words, split=split) if (text := reader(row)) is not None)
    return some(texts, f"dataset {' '.join(words)} has none in column {field!r} of split {split!r}")


class DocumentEncoder(Encoder, Protocol):
    """Encodes text: that of ``models.tokenization``."""

    def __call__(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text."""


class ChatEncoder(Encoder, Protocol):
    """Encodes chats: that of ``models.templates``."""

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] = ()) -> Marked:
        """Ids of a chat, and which of them are answers."""

    def encode_completion(self, prompt: str, completion: str) -> Marked:
        """Ids of a prompt and what follows it, and which of them are answers."""


class Encoders(Protocol):
    """Makes the encoder that texts turn out to need: ``models.templates.Encoders``."""

    def for_documents(self) -> DocumentEncoder:
        """For text."""

    def for_chats(self, *, is_completion: bool) -> ChatEncoder:
        """For chats, or for prompts with completions."""


def write_texts(directory: Path, texts: Iterator[Text], encoders: Encoders, **facts: Any) -> TokenStore:
    """
    A token store of documents or chats, whichever the first is; arguments and errors as ``write_token_store``.

    Args:
        directory: Where the store goes.
        texts: At least one.
        encoders: Of the tokenizer.
        facts: vocab_size and fingerprints.
    """
    first = next(texts)
    texts = itertools.chain([first], texts)
    if isinstance(first, Document):
        encode = encoders.for_documents()
        documents = cast("Iterator[Document]", texts)
        return write_token_store(directory, documents, encode, **facts, encoding=Encoding.of(encode))
    encoder, chats = encoders.for_chats(is_completion=not first.messages), cast("Iterator[Chat]", texts)
    return write_encoded(
        directory,
        ((chat.name, _digest(chat), *_encoded(chat, encoder)) for chat in chats),
        lambda: map(_digest, chats),
        **facts,
        encoding=Encoding.of(encoder),
    )


def _digest(chat: Chat) -> str:
    check_characters(chat.text, chat.place)
    return text_fingerprint((chat.name, chat.text))


def _encoded(chat: Chat, encoder: ChatEncoder) -> Marked:
    try:
        if chat.messages:
            return encoder.encode_chat(chat.messages, chat.tools)
        return encoder.encode_completion(chat.prompt, chat.completion)
    except ValueError as error:
        raise ValueError(f"{chat.place}: {error}") from None


class _Reader:
    """Makes of each row what it made of the first."""

    def __init__(self, field: str) -> None:
        self._field = field
        self._first: tuple[str | None, str] | None = None  # its chat's field, None of a document; where it stood

    def __call__(self, row: Row) -> Text | None:
        chat_field = self._chat_field(row)
        if self._first is not None and chat_field != self._first[0]:
            there, here = (f"a chat in {field!r}" if field else "text" for field in (self._first[0], chat_field))
            raise UnlikeError(
                f"{row.place} holds {here}, {self._first[1]} holds {there}; give files of one kind, and leave the "
                "others out (--include, --exclude)"
            )
        made: Text | None
        if chat_field is None:
            made = document_of(row, self._field)
        else:
            made = read_chat(row.name, row.values, chat_field, row.place)
        if self._first is None:  # a row that is neither says nothing of the others
            self._first = (chat_field, row.place)
        return made

    def _chat_field(self, row: Row) -> str | None:
        given = row.values.get(self._field)
        if isinstance(given, (list, tuple)):
            return self._field
        found = [name for name in _MESSAGES if isinstance(row.values.get(name), (list, tuple))]
        if not found and _PROMPT in row.values and _COMPLETION in row.values:
            found = [_PROMPT]
        if self._field != "text" or not found:
            return None
        if isinstance(given, str):
            raise ValueError(  # noqa: TRY004  the data is wrong
                f"{row.place} has text in 'text' and a chat in {found[0]!r}; give --field {found[0]} for the chat, "
                "or leave one of the two out"
            )
        return found[0]


def read_chat(name: str, row: Mapping[str, Any], field: str, where: str) -> Chat:
    """
    The chat of a row.

    Args:
        name: Of the chat.
        row: Column → value, of any reader; a message's values that are None are left out, as columnar files give them.
        field: Column of the messages; "prompt": prompt and completion.
        where: File and row, for messages.

    Raises:
        ValueError: The row holds no such chat; names row, field and what is wrong there.
    """
    tools = _decoded(row.get(_TOOLS) or (), f"{where}: field 'tools'")
    if field == _PROMPT:
        prompt, completion = row.get(_PROMPT), row.get(_COMPLETION)
        if isinstance(prompt, str) and isinstance(completion, str):
            if not completion:
                raise ValueError(f"{where}: field 'completion' is empty; there is no answer to learn from")
            return Chat(name, where, prompt=prompt, completion=completion)
        if not isinstance(prompt, (list, tuple)) or not isinstance(completion, (list, tuple)):
            raise ValueError(
                f"{where}: prompt is {kind_of(prompt)} and completion {kind_of(completion)}; both must be text, or "
                "both lists of messages"
            )
        parts = {_PROMPT: prompt, _COMPLETION: completion}
        messages = tuple(
            _message(message, f"{where}: field {part!r}, message {number}")
            for part, given in parts.items()
            for number, message in enumerate(given)
        )
    else:
        given = row.get(field)
        if not isinstance(given, (list, tuple)):
            raise ValueError(f"{where}: field {field!r} is {kind_of(given)}, must be a list of messages")
        messages = tuple(
            _message(message, f"{where}: field {field!r}, message {number}") for number, message in enumerate(given)
        )
    if not messages:
        raise ValueError(f"{where}: field {field!r} is an empty chat")
    return Chat(name, where, messages, tuple(tools))


def _message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise ValueError(f"{where} is {kind_of(message)}, must have role and content")  # noqa: TRY004  the data is wrong
    kept = {key: value for key, value in message.items() if value is not None}
    if "from" in kept and "role" not in kept:
        speaker = kept.pop("from")
        if speaker not in _ROLES:
            raise ValueError(f"{where} is from {speaker!r}; known are {', '.join(sorted(_ROLES))}")
        kept = {"role": _ROLES[speaker], "content": kept.pop("value", None), **kept}
    if not isinstance(kept.get("role"), str) or not kept["role"]:
        raise ValueError(f"{where} has no role; it has {', '.join(sorted(map(str, kept))) or 'nothing'}")
    if "tool_calls" in kept:
        kept["tool_calls"] = [_without_none(call) for call in _decoded(kept["tool_calls"], f"{where}, 'tool_calls'")]
    if "content" in kept and not isinstance(kept["content"], (str, list, tuple)):
        raise ValueError(f"{where}: content is {kind_of(kept['content'])}, must be text")
    if kept.get("content") is None and not kept.get("tool_calls"):
        raise ValueError(f"{where} ({kept['role']}) has neither content nor tool_calls")
    return kept


def _without_none(value: Any) -> Any:
    """Columnar files give every struct the fields of all; those that are None were not there."""
    if isinstance(value, Mapping):
        return {key: _without_none(inner) for key, inner in value.items() if inner is not None}
    return [_without_none(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def _decoded(value: Any, where: str) -> list[Any]:
    """A list, or the JSON of one, as some data sets keep tools."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise ValueError(describe_bad_json(error, where)) from None
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"{where} is {kind_of(value)}, must be a list")  # noqa: TRY004  the data is wrong
    return [_without_none(inner) for inner in value]


def write_first_rows(path: Path, texts: Iterator[Text], *, num_sequences: int, seq_len: int) -> None:
    """
    A .jsonl file of as many texts as a short run needs: a dataset may be larger than any disk here.

    Args:
        path: Where it goes.
        texts: Of which the first are taken.
        num_sequences: How many sequences they have to fill.
        seq_len: Positions of each.
    """
    rows = chars = 0
    with path.open("w", encoding="utf-8") as file:
        for text in texts:
            file.write(json.dumps(_as_row(text), default=str) + "\n")
            rows, chars = rows + 1, chars + len(text.text)
            if rows >= num_sequences * _ROWS_PER_SEQUENCE and chars >= num_sequences * seq_len * _MOST_CHARS:
                break


def _as_row(text: Text) -> dict[str, Any]:
    if not isinstance(text, Chat):
        return {"text": text.text}
    if text.messages:
        return {"messages": text.messages, "tools": text.tools}
    return {"prompt": text.prompt, "completion": text.completion}
