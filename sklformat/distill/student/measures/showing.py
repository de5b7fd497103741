"""What pages show beside a cache: the text of its tokens, and what students say of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sklformat.distill.models import loading, outputs, tokenization
from sklformat.distill.models.devices import find_device
from sklformat.distill.student.measures.origins import find_model
from sklformat.distill.student.streams import made_by
from sklformat.distill.student.validation import check_finite
from sklformat.errors import SettingsError
from sklformat.settings.inspection import InspectConfig, ViewConfig
from sklformat.views.page import Stretch
from sklformat.views.passage import NO_TOKENIZER, Passage

_REPLACED = "\ufffd"


def say(config: ViewConfig, stretch: Stretch) -> dict[str, Any]:
    """
    Texts of the tokens of a stretch and its students' probabilities, as ``render`` takes them.

    Args:
        config: Names the tokenizer and the students.
        stretch: What the page shows.

    Raises:
        SettingsError: A tokenizer gives the ids another meaning; a student has fewer ids than the cache, or would
            read isolated documents as one text, or tokens that no cache stores.
        OSError, ValueError: One of them cannot be loaded, or there is no such device.
    """
    said: dict[str, Any] = {}
    device = find_device(config.device)
    made = made_by(stretch.headers[0])
    if config.tokenizer is not None:
        tokenizer = loading.load_tokenizer(config.tokenizer, trust_remote_code=config.trust_remote_code)
        why = made.conflict(tokenizer)
        if why:
            raise SettingsError(f"{config.tokenizer}: not the tokenizer of {stretch.caches[0]}: {why}")
        said["texts"] = texts_of(tokenizer, stretch.ids())
    if config.students and stretch.is_isolated:
        raise SettingsError(
            f"{stretch.caches[0]}: was captured with isolated documents, which a page does not show a student; "
            "leave out --student"
        )
    if config.students and not any(header.store_tokens for header in stretch.headers):
        raise SettingsError(
            f"{stretch.caches[0]}: stores no tokens for a student to read; leave out --student, or capture with "
            "stored tokens"
        )
    for student in config.students:
        own = loading.load_own_tokenizer(find_model(student), trust_remote_code=config.trust_remote_code)
        why = "" if own is None else made.conflict(own)
        if why:
            raise SettingsError(
                f"the student {student} has another tokenizer, not that of {stretch.caches[0]}: {why}; give a student "
                "that learnt from this cache"
            )
        if own is not None and "texts" not in said:
            said["texts"] = texts_of(own, stretch.ids())
    if config.students:
        answers = [_answers(student, stretch, config, device) for student in config.students]
        said |= {"students": config.students, "answers": answers}
    return said


def find_texts(config: InspectConfig, passage: Passage) -> tuple[dict[int, str] | None, str]:
    """
    Texts of the tokens of a passage, by the tokenizer that was asked for, or the teacher's if an earlier download left
    it here; nothing is fetched that was not asked for.

    Args:
        config: Names the tokenizer.
        passage: What is shown.

    Returns:
        Text of each id, and the tokenizer's name; or None, and why.

    Raises:
        SettingsError: The tokenizer that was asked for gives the ids another meaning; shows both fingerprints.
        OSError, ValueError: It cannot be loaded.
    """
    maker = made_by(passage.header)
    if config.tokenizer is not None:
        tokenizer = loading.load_tokenizer(config.tokenizer, trust_remote_code=config.trust_remote_code)
        if why := maker.conflict(tokenizer):
            raise SettingsError(
                f"{config.tokenizer}: did not make the ids of {passage.path}: {why}; give the one that did"
            )
        return texts_of(tokenizer, passage.ids()), config.tokenizer
    if passage.teacher is None:
        return None, NO_TOKENIZER
    name, revision = passage.teacher
    found = tokenization.load_here(name, revision=revision)
    if found is None:
        return None, f"the tokenizer of {name} is not on this machine; --tokenizer {name} fetches it"
    if why := maker.conflict(found):
        return None, f"the tokenizer of {name} that is on this machine did not make them: {why}"
    return texts_of(found, passage.ids()), name


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
def _answers(
    student: str, stretch: Stretch, config: ViewConfig, device: torch.device
) -> list[NDArray[np.float32] | None]:
    """Of each sequence a student's probability of each row [n]; None where its tokens are not known."""
    model = loading.load_model(
        find_model(student), dtype=config.dtype, device=device, trust_remote_code=config.trust_remote_code
    )
    vocab_size = max(header.vocab_size for header in stretch.headers)
    width = outputs.head_width(model)
    if width < vocab_size:
        raise SettingsError(
            f"{student}: the student has {width} ids, the cache {vocab_size}; give a student that learnt from this "
            "cache"
        )
    try:
        loading.check_length(model, max((rows.sizes.size for rows in stretch.rows), default=0))
    except ValueError as error:
        raise ValueError(f"{student}: {error}") from None
    answers: list[NDArray[np.float32] | None] = []
    for tokens, rows in zip(stretch.tokens, stretch.rows, strict=True):
        if tokens is None:
            answers.append(None)
            continue
        ids = torch.from_numpy(tokens.astype(np.int64)).to(device)
        # A head may be padded beyond the ids that mean something.
        logits_TV = outputs.logits(model, ids[None, :-1])[0, :, :vocab_size].float()
        check_finite(logits_TV, student)
        probs_TV = logits_TV.softmax(-1)
        answers.append(probs_TV[torch.from_numpy(rows.positions), torch.from_numpy(rows.ids)].cpu().numpy())
    return answers
