"""
Tokenizers: trained, asked for their ids, and run over text.

Shapes are ragged: one list of ids per text.
"""

from __future__ import annotations

from collections.abc import Iterable

import tokenizers
import transformers
from transformers import PreTrainedTokenizerBase

END_OF_TEXT = "<|endoftext|>"
_NUM_BYTES = 256


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerBase:
    """
    Train a byte-level BPE tokenizer; every text can be encoded and comes back unchanged.

    Args:
        texts: Text to learn the merges from.
        vocab_size: Number of ids at most, >= 257: all bytes and the end-of-text token, which has id 0 and separates
            documents. Little text gives fewer.

    Returns:
        A tokenizer that ``save_pretrained`` writes and ``load_tokenizer`` reads.

    Raises:
        ValueError: ``vocab_size`` is too small.
    """
    if vocab_size <= _NUM_BYTES:
        raise ValueError(f"vocab_size must be >= {_NUM_BYTES + 1} (bytes and end of text), got {vocab_size}")
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT)


def encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """
    Token ids of texts, no special tokens added; the name of a special token inside a text is text like any other.

    Args:
        tokenizer: Any tokenizer.
        texts: Texts.

    Returns:
        Ids of each text.
    """
    encoding = tokenizer(
        texts,
        add_special_tokens=False,
        split_special_tokens=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    ids: list[list[int]] = encoding["input_ids"]
    return ids


def separator_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """
    Id of the token that separates documents: the tokenizer's end-of-text token.

    Raises:
        ValueError: It has none.
    """
    token_id = tokenizer.eos_token_id
    if token_id is None:
        raise ValueError("the tokenizer has no end-of-text token to separate documents with; set its eos_token")
    return int(token_id)


def num_ids(tokenizer: PreTrainedTokenizerBase) -> int:
    """One more than the greatest id of a tokenizer."""
    return 1 + int(max(tokenizer.get_vocab().values()))
