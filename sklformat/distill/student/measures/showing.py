"""What a page shows beside a cache: the text of its tokens, and what a student says of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sklformat.distill.models.loading import load_model, load_own_tokenizer, load_tokenizer
from sklformat.distill.text.fingerprints import MadeBy
from sklformat.errors import SettingsError
from sklformat.format.records import Sequence
from sklformat.settings.inspection import ViewConfig

_Answer = tuple[NDArray[np.float32], list[NDArray[np.float32] | None]]
_REPLACED = "\ufffd"


def say(config: ViewConfig, stretch: Any) -> dict[str, Any]:
    """
    Texts of the tokens of a stretch and a student's probabilities, as ``render`` takes them.

    Args:
        config: Names the tokenizer and the student.
        stretch: ``views.page.Stretch``.

    Raises:
        SettingsError: The tokenizer gives the ids another meaning; the student has fewer ids than the cache, or would
            read isolated documents as one text.
        OSError, ValueError: One of them cannot be loaded.
    """
    said: dict[str, Any] = {}
    trust = config.trust_remote_code
    if config.tokenizer is not None:
        tokenizer = load_tokenizer(config.tokenizer, trust_remote_code=trust)
        why = MadeBy(stretch.tokenizer, stretch.vocab_size).conflict(tokenizer)
        if why:
            raise SettingsError(f"{config.tokenizer}: not the tokenizer of {stretch.caches[0]}: {why}")
        said["texts"] = texts_of(tokenizer, stretch.ids())
    if config.student is not None:
        if stretch.is_isolated:
            raise SettingsError(
                f"{stretch.caches[0]}: was captured with isolated documents, which a page does not show a student; "
                "leave out --student"
            )
        if config.tokenizer is None:
            own = load_own_tokenizer(config.student, trust_remote_code=trust)
            if own is not None and not MadeBy(stretch.tokenizer, stretch.vocab_size).conflict(own):
                said["texts"] = texts_of(own, stretch.ids())
        said |= {"student": config.student, "answers": _answers(config, stretch)}
    return said


def texts_of(tokenizer: Any, ids: list[int]) -> dict[int, str]:
    """Text of each id; a token that is part of a character as the tokenizer writes it, in ⟨ ⟩."""
    texts = {}
    for token_id in ids:
        text = tokenizer.decode([token_id])
        if _REPLACED in text:
            text = f"⟨{tokenizer.convert_ids_to_tokens(token_id)}⟩"
        texts[token_id] = text
    return texts


@torch.inference_mode()
def _answers(config: ViewConfig, stretch: Any) -> list[_Answer | None]:
    model = load_model(str(config.student), trust_remote_code=config.trust_remote_code)
    answers: list[_Answer | None] = []
    for tokens, said in zip(stretch.tokens, stretch.said, strict=True):
        if tokens is None:
            answers.append(None)
            continue
        ids = torch.from_numpy(tokens.astype(np.int64))
        probs_TV = model(input_ids=ids[None, :-1]).logits[0].float().softmax(-1)
        if probs_TV.shape[-1] < stretch.vocab_size:
            raise SettingsError(
                f"{config.student}: the student has {probs_TV.shape[-1]} ids, the cache {stretch.vocab_size}; "
                "give a student that learnt from this cache"
            )
        rows = torch.arange(ids.numel() - 1)
        answers.append((probs_TV[rows, ids[1:]].numpy(), [_of_records(probs_TV, one) for one in said]))
    return answers


def _of_records(probs_TV: torch.Tensor, one: Sequence | str) -> NDArray[np.float32] | None:
    if isinstance(one, str):
        return None
    rows = np.repeat(np.arange(one.targets.num_positions), np.diff(one.targets.offsets))
    found: NDArray[np.float32] = probs_TV[torch.from_numpy(rows), one.targets.token_ids.astype(np.int64)].numpy()
    return found
