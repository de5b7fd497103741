"""
Chats to token ids by a tokenizer's chat template, with their answers marked.

An answer is what the model itself would have said: the words of the assistant and the token that ends its turn.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from transformers import BatchEncoding, PreTrainedTokenizerBase

from sklformat.checksums import fingerprint
from sklformat.distill.models.tokenization import TextEncoder, separator_id, special_names, template_ids
from sklformat.settings.text import ANSWERS, Bos, BosPlace, Marked, SpecialTokens

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")  # a template that marks answers itself


class Encoders:
    """
    A tokenizer's encoders, each made when it is asked for.

    Args:
        tokenizer: Of the model.
        bos: Where packing puts BOS in text; chats bring their own.
        special_tokens: What names of special tokens become.

    Attributes:
        documents: The encoder of text, if there was one.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, bos: Bos, special_tokens: SpecialTokens) -> None:
        self._tokenizer, self._bos, self._special_tokens = tokenizer, bos, special_tokens
        self.documents: TextEncoder | None = None

    def for_documents(self) -> TextEncoder:
        """
        For text.

        Raises:
            ValueError: As ``choose_bos``.
        """
        self.documents = TextEncoder(self._tokenizer, bos=self._bos, special_tokens=self._special_tokens)
        return self.documents

    def for_chats(self, *, is_completion: bool) -> ChatEncoder:
        """
        For chats, or for prompts with completions.

        Raises:
            ValueError: A BOS is asked for; or as ``ChatEncoder``.
        """
        if self._bos not in ("auto", "none"):
            raise ValueError(f"bos {self._bos}: a chat begins as its template says; leave --bos out")
        return ChatEncoder(self._tokenizer, special_tokens=self._special_tokens, is_completion=is_completion)


class ChatEncoder:
    """
    Chats to token ids with their answers marked.

    The template's own ``{% generation %}`` marks them. Where it has none, the chat is rendered once more up to each
    answer, as the model was asked for it, and once with it: what was added is the answer, if the whole chat begins
    with both.

    Args:
        tokenizer: A fast tokenizer, with a chat template unless all chats are prompts with completions.
        special_tokens: Names of special tokens inside messages: "text", which no template can keep apart from its own,
            so that such chats are refused, or "keep", the tokens they name.
        is_completion: Whether ``encode_completion`` will be called instead of ``encode_chat``.

    Raises:
        ValueError: There is no chat template, or the tokenizer cannot say which characters a token stands for.

    Attributes:
        bos, bos_id: "none" and None; templates put BOS themselves.
        special_tokens: As given.
        chat_template: XXH3-128 of the template; None: prompts with completions need none.
        marks_answers: True.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, *, special_tokens: SpecialTokens = "text", is_completion: bool = False
    ) -> None:
        if not tokenizer.is_fast:
            raise ValueError(
                f"chats need a fast tokenizer, which says what characters a token stands for; "
                f"{type(tokenizer).__name__} does not"
            )
        self._tokenizer = tokenizer
        self._names = special_names(tokenizer)
        self.bos: BosPlace = "none"
        self.bos_id: int | None = None
        self.special_tokens = special_tokens
        self.marks_answers = True
        self.chat_template: str | None = None
        if not is_completion:
            template = tokenizer.chat_template
            if template is None:
                raise ValueError("the tokenizer has no chat template; take the model's chat variant, or its tokenizer")
            if isinstance(template, dict):  # one of several is chosen by whether there are tools
                template = json.dumps(template, sort_keys=True)
            self.chat_template = fingerprint(template.encode())

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] = ()) -> Marked:
        """
        One chat by the template.

        Args:
            messages: At least one; as the template knows them.
            tools: Descriptions of tools for the template.

        Raises:
            ValueError: The template fails, no answer can be found, or there is none.
        """
        if self.special_tokens == "text" and (name := self._find_name([*messages, *tools])):
            raise ValueError(
                f"a message holds {name}, the name of a special token; give --special-tokens keep to take it as the "
                "token, or leave the chat out"
            )
        if not any(message["role"] == ANSWERS for message in messages):
            raise ValueError("no message is the assistant's; there is no answer to learn from")
        template = self._tokenizer.get_chat_template(tools=list(tools) or None)
        if _GENERATION.search(template):
            ids, answers = self._by_generation(messages, tools)
        else:
            ids, answers = self._by_prefixes(messages, tools)
        if not answers[1:].any():
            raise ValueError("the chat template marks no token as an answer")
        return ids, answers

    def encode_completion(self, prompt: str, completion: str) -> Marked:
        """A prompt and what follows it, each encoded by itself, as a text is begun, and the end-of-text token."""
        before, _ = template_ids(self._tokenizer)
        ids, answer = (
            self._tokenizer(
                part, add_special_tokens=False, split_special_tokens=self.special_tokens == "text", verbose=False
            )["input_ids"]
            for part in (prompt, completion)
        )
        end = separator_id(self._tokenizer)
        if self.special_tokens == "keep":  # either may bring what stands around a text
            before = [] if ids[: len(before)] == before else before
            answer = answer[:-1] if answer[-1:] == [end] else answer
        answer = [*answer, end]
        marked = np.array([*before, *ids, *answer], np.int64)
        return marked, np.arange(marked.size) >= marked.size - len(answer)

    def _by_generation(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any]) -> Marked:
        self._check_shown(messages, tools, self._apply(messages, tools, tokenize=False))
        encoding = self._apply(messages, tools, return_dict=True, return_assistant_tokens_mask=True, tokenize=True)
        return np.array(encoding["input_ids"], np.int64), np.array(encoding["assistant_masks"], np.bool_)

    def _by_prefixes(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any]) -> Marked:
        whole: str = self._apply(messages, tools, tokenize=False)
        self._check_shown(messages, tools, whole)
        encoding = self._tokenizer(whole, add_special_tokens=False, verbose=False)
        ids = np.array(encoding["input_ids"], np.int64)
        answers = np.zeros(ids.size, np.bool_)
        closing: str | None = None
        for number, message in enumerate(messages):
            if message["role"] != ANSWERS:
                continue
            if number == 0:
                raise ValueError("the chat begins with an answer; nothing was asked")
            asked: str = self._apply(messages[:number], tools, tokenize=False, add_generation_prompt=True)
            if not whole.startswith(asked):
                raise ValueError(
                    f"the chat template asks for message {number} with other words than stand before it in the chat, "
                    "as templates do that begin the thinking themselves or move what the system says, so that answers "
                    "cannot be found; take a template with {% generation %}"
                )
            if closing is None:
                closing = self._closing(self._apply(messages[:number], tools, tokenize=False), asked)
            answered = whole
            if number + 1 < len(messages):
                answered = self._apply(messages[: number + 1], tools, tokenize=False)
            answered = answered.removesuffix(closing)
            if not whole.startswith(answered) or len(answered) <= len(asked):
                raise ValueError(
                    f"the chat template renders the first {number + 1} of {len(messages)} messages in another way when "
                    "others follow, as templates do that drop earlier thinking, so that answers cannot be found; take "
                    "a template with {% generation %}, or chats whose last message is the only answer"
                )
            first, last = self._tokens_of(encoding, len(asked), len(asked) + len(self._said(answered[len(asked) :])))
            answers[first : last + 1] = True
        return ids, answers

    def _check_shown(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any], whole: str) -> None:
        """Refuse a template that leaves calls of tools out, or prints a list of parts as Python would."""
        if any(isinstance(content := message.get("content"), (list, tuple)) and str(content) in whole
               for message in messages):  # fmt: skip
            raise ValueError("the chat template knows no content that is a list of parts; give it as text")
        if not any("tool_calls" in message for message in messages):
            return
        bare = [{"content": "", **message} | {"tool_calls": []} for message in messages]
        try:
            without = self._apply(bare, tools, tokenize=False)
        except ValueError:
            return  # it looks at them
        if without == whole:
            raise ValueError("the chat template leaves tool_calls out; take one that shows them, or leave the chat out")

    def _closing(self, rendered: str, asked: str) -> str:
        """The end-of-text token where a template closes each chat with it, whoever spoke last; else nothing."""
        end = self._tokenizer.eos_token
        return end if end and rendered.endswith(end) and not asked.startswith(rendered) else ""

    def _said(self, answer: str) -> str:
        """An answer without the space that a template puts behind the token that ends a turn."""
        stripped = answer.rstrip()
        ends = self._names is not None and any(name.end() == len(stripped) for name in self._names.finditer(stripped))
        return stripped if ends else answer

    @staticmethod
    def _tokens_of(encoding: BatchEncoding, begin: int, end: int) -> tuple[int, int]:
        """First and last token of some characters; one that begins before them is not theirs."""
        found = (encoding.char_to_token(place) for place in range(begin, end))
        first = next((token for token in found if token is not None), 0)
        if encoding.token_to_chars(first).start < begin:
            first += 1
        found = (encoding.char_to_token(place) for place in range(end - 1, begin - 1, -1))
        return first, next((token for token in found if token is not None), -1)

    def _apply(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any], **settings: Any) -> Any:
        try:
            return self._tokenizer.apply_chat_template(list(messages), tools=list(tools) or None, **settings)
        except Exception as error:  # a template is another's program, and raises what it likes
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(f"the chat template fails: {reason}") from error

    def _find_name(self, value: Any) -> str | None:
        """A special token's name in any text of messages."""
        if self._names is None:
            return None
        if isinstance(value, str):
            found = self._names.search(value)
            return None if found is None else found.group()
        inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
        return next((name for part in inner if (name := self._find_name(part)) is not None), None)
