"""
Which ids a tokenizer and a model have in common, and what to say of one that they have not.

Loads nothing.
"""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from sklformat.distill.models import tokenization


def common_ids(tokenizer: PreTrainedTokenizerBase, width: int) -> int:
    """
    How many ids both have: a head is often padded beyond its tokenizer, and some tokenizers have tokens added on top.

    Args:
        tokenizer: The tokenizer.
        width: Of the model's head.

    Returns:
        V: the ids below mean something to both. A text may still hold an added token at or above it.

    Raises:
        ValueError: The tokenizer has tokens beyond the head that were not added: the two do not belong together.
    """
    wanted = tokenization.num_ids(tokenizer)
    added = tokenizer.added_tokens_decoder
    strange = [token_id for token_id in tokenizer.get_vocab().values() if token_id >= width and token_id not in added]
    if strange:
        raise ValueError(
            f"the tokenizer has {wanted} ids, the model only {width}; {len(strange)} of those beyond are no added "
            "tokens, so they do not belong together"
        )
    return min(wanted, width)


def why_beyond(tokenizer: PreTrainedTokenizerBase, token_id: int, vocab_size: int) -> str:
    """What to say of an id in a text that a model of ``vocab_size`` ids does not know."""
    token = tokenizer.convert_ids_to_tokens(token_id)
    return (
        f"holds {token!r} (id {token_id}), which the tokenizer has and the model, with ids below {vocab_size}, has "
        "not; take it out of the text, or use a model that knows it"
    )
