"""
Tokenizers: trained, asked for their ids, and run over text.

Shapes are ragged: one list of ids per text.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

import tokenizers
import transformers
from transformers import PreTrainedTokenizerBase

from sklformat.distill.models.guards import FAILURES, quiet
from sklformat.settings.text import Bos, BosPlace, SpecialTokens

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


def load_here(name: str, *, revision: str) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a name on the hub as an earlier download left it; None: none did. The hub is not asked."""
    try:
        with quiet():
            return transformers.AutoTokenizer.from_pretrained(name, revision=revision, local_files_only=True)
    except FAILURES:
        return None


class TextEncoder:
    """
    Texts to token ids, without what stands around a text; counts the names of special tokens that it meets.

    Args:
        tokenizer: Any tokenizer.
        bos: Where packing puts BOS; where that is before each text, one that a text begins with itself is left out.
        special_tokens: What the name of a special token inside a text becomes: "text", characters like any other, or
            "keep", the token.

    Raises:
        ValueError: As ``choose_bos``.

    Attributes:
        bos, bos_id: What ``choose_bos`` chose.
        special_tokens: As given.
        chat_template, marks_answers: None and False; there are no chats.
        num_texts: Encoded so far.
        num_names: Names of special tokens in them.
        num_rendered: Texts with two or more of them, as a text has that was rendered by a chat template.
        example: The name met most often; "": none.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, *, bos: Bos = "auto", special_tokens: SpecialTokens = "text"
    ) -> None:
        self._tokenizer, self.special_tokens = tokenizer, special_tokens
        self.chat_template: str | None = None
        self.marks_answers = False
        self.bos, self.bos_id = choose_bos(tokenizer, bos)
        self._names = special_names(tokenizer)
        self._met: Counter[str] = Counter()
        self.num_texts = self.num_rendered = 0

    def __call__(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text."""
        self.num_texts += len(texts)
        if self._names is not None:
            for text in texts:
                met = self._names.findall(text)
                self._met.update(met)
                self.num_rendered += len(met) > 1
        ids = _ids(self._tokenizer, texts, split_special_tokens=self.special_tokens == "text")
        if self.bos == "document" and self.special_tokens == "keep":
            ids = [text[1:] if text[:1] == [self.bos_id] else text for text in ids]
        return ids

    @property
    def num_names(self) -> int:
        return self._met.total()

    @property
    def example(self) -> str:
        return max(self._met, key=self._met.__getitem__, default="")


def _ids(tokenizer: PreTrainedTokenizerBase, texts: list[str], **settings: bool) -> list[list[int]]:
    encoding = tokenizer(
        texts,
        **{"add_special_tokens": False, "split_special_tokens": True} | settings,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    ids: list[list[int]] = encoding["input_ids"]
    return ids


def special_names(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str] | None:
    """Finds the names of special tokens in a text; None: there are none."""
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    names = sorted((name for name in added | set(tokenizer.all_special_tokens) if name.strip()), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, names))) if names else None


def choose_bos(tokenizer: PreTrainedTokenizerBase, wanted: Bos) -> tuple[BosPlace, int | None]:
    """
    Where the token stands that begins a text, and its id.

    Args:
        tokenizer: Any tokenizer.
        wanted: "auto" follows the tokenizer's own call: what it puts before a text stands before each document.

    Returns:
        ("document" or "window", id) or ("none", None).

    Raises:
        ValueError: It puts several tokens before a text, or behind it another than the separator; or a BOS is wanted
            and it has none.
    """
    if wanted == "none":
        return "none", None
    before, after = template_ids(tokenizer)
    if wanted == "auto" and (len(before) > 1 or after not in ([], [tokenizer.eos_token_id])):
        around = " … ".join(" ".join(map(str, tokenizer.convert_ids_to_tokens(ids))) for ids in (before, after))
        raise ValueError(
            f"the tokenizer puts {around} around a text, which packing does not; give bos none, or document for its "
            f"BOS token {tokenizer.bos_token!r} alone"
        )
    if wanted == "auto" and not before:
        return "none", None
    token_id = before[0] if len(before) == 1 else tokenizer.bos_token_id
    if token_id is None:
        raise ValueError(f"bos {wanted}: the tokenizer has no BOS token; give bos none, or set its bos_token")
    return "document" if wanted == "auto" else wanted, int(token_id)


def template_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """
    What a tokenizer's own call puts before and behind a text.

    Raises:
        ValueError: The text itself is encoded in another way then.
    """
    whole, inside = (_ids(tokenizer, ["a"], add_special_tokens=added)[0] for added in (True, False))
    for place in range(len(whole) - len(inside) + 1):
        if whole[place : place + len(inside)] == inside:
            return whole[:place], whole[place + len(inside) :]
    raise ValueError(f"the tokenizer encodes a text in another way with its special tokens: {whole}, not {inside}")


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
    wanted = num_ids(tokenizer)
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
