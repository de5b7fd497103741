"""What settings of several verbs say of text, and what chats are to those who read and those who encode them."""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

Bos = Literal["auto", "document", "window", "none"]
"""Where the token goes that begins a text; auto: where the tokenizer itself puts it."""

BosPlace = Literal["document", "window", "none"]
"""The same, decided."""

SpecialTokens = Literal["text", "keep"]
"""What the name of a special token inside a text is: characters like any other, or the token."""

BOS_PLACES: tuple[str, ...] = get_args(BosPlace)
SPECIAL_TOKENS: tuple[str, ...] = get_args(SpecialTokens)

Packing = Literal["auto", "packed", "single"]
"""Whether documents fill sequences one after the other, or each is one; auto: chats are one each, text is packed."""

Truncate = Literal["end", "start"]
"""What a document loses that is longer than a sequence."""

ANSWERS = "assistant"
"""Role of the messages of a chat that are learnt from."""

Marked: TypeAlias = tuple[NDArray[np.int64], NDArray[np.bool_]]
"""Token ids of a chat, and which of them are answers."""
