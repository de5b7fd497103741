"""
Chats as rows hold them, in one shape: messages with roles, or a prompt and its completion.

Knows no tokenizer; reads no files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

CHAT_FIELDS = ("messages", "conversations")
"""Columns that hold messages."""

PROMPT, COMPLETION = "prompt", "completion"

_ANSWERS = "assistant"
# What ShareGPT's rows call roles.
_ROLES = {
    **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "model", "function_call", _ANSWERS), _ANSWERS),
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("tool", "observation"), "tool"),
    "system": "system",
}


@dataclass(frozen=True, slots=True)
class Chat:
    """
    One chat.

    Attributes:
        name: As of a document; decides the held-out split.
        messages: Each with "role" and what the chat template knows: "content", "tool_calls", …; empty where ``prompt``
            and ``completion`` are text without a template.
        tools: Descriptions of the tools that the template shows.
        prompt, completion: Text that is read, and text that is learnt from.
    """

    name: str
    messages: tuple[Mapping[str, Any], ...] = ()
    tools: tuple[Any, ...] = ()
    prompt: str = ""
    completion: str = ""

    @property
    def text(self) -> str:
        """All that it says, in one form, for its fingerprint."""
        return json.dumps([self.messages, self.tools, self.prompt, self.completion], sort_keys=True, ensure_ascii=False)


def find_chat_field(row: Mapping[str, Any]) -> str | None:
    """The column of a row that holds a chat; None: it holds none."""
    for field in CHAT_FIELDS:
        if isinstance(row.get(field), (list, tuple)):
            return field
    return PROMPT if PROMPT in row and COMPLETION in row else None


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
    tools = _decoded(row.get("tools") or (), f"{where}: field 'tools'")
    if field == PROMPT:
        prompt, completion = row.get(PROMPT), row.get(COMPLETION)
        if isinstance(prompt, str) and isinstance(completion, str):
            if not completion:
                raise ValueError(f"{where}: field 'completion' is empty; there is no answer to learn from")
            return Chat(name, prompt=prompt, completion=completion)
        if not isinstance(prompt, (list, tuple)) or not isinstance(completion, (list, tuple)):
            raise ValueError(
                f"{where}: prompt is {_kind(prompt)} and completion {_kind(completion)}; both must be text, or both "
                "lists of messages"
            )
        parts = {PROMPT: prompt, COMPLETION: completion}
        messages = tuple(
            _message(message, f"{where}: field {part!r}, message {number}")
            for part, given in parts.items()
            for number, message in enumerate(given)
        )
    else:
        given = row.get(field)
        if not isinstance(given, (list, tuple)):
            raise ValueError(f"{where}: field {field!r} is {_kind(given)}, must be a list of messages")
        messages = tuple(
            _message(message, f"{where}: field {field!r}, message {number}") for number, message in enumerate(given)
        )
    if not messages:
        raise ValueError(f"{where}: field {field!r} is an empty chat")
    return Chat(name, messages, tuple(tools))


def _message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise ValueError(f"{where} is {_kind(message)}, must have role and content")  # noqa: TRY004  the data is wrong
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
        raise ValueError(f"{where}: content is {_kind(kept['content'])}, must be text")
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
            raise ValueError(f"{where} is not JSON: {error}") from None
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"{where} is {_kind(value)}, must be a list")  # noqa: TRY004  the data is wrong
    return [_without_none(inner) for inner in value]


def _kind(value: Any) -> str:
    names = {
        str: "text",
        dict: "an object",
        list: "a list",
        tuple: "a list",
        bool: "a truth value",
        type(None): "missing",
    }
    return names.get(type(value), f"a {type(value).__name__}")
