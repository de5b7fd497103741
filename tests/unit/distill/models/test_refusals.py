"""What models refuse that test_loading.py leaves out."""

import types

import pytest
import torch

from sklformat.distill.models import attention, loading, templates, tokenization


def test_a_model_without_logits_of_each_token(monkeypatch):
    """What answers for a whole text at once is no language model."""
    model = types.SimpleNamespace(
        config=types.SimpleNamespace(get_text_config=types.SimpleNamespace), dtype=torch.float32
    )
    monkeypatch.setattr(attention.outputs, "input_device", lambda model: torch.device("cpu"))
    monkeypatch.setattr(attention.outputs, "head_width", lambda model: 9)
    monkeypatch.setattr(attention.outputs, "logits", lambda model, ids: torch.zeros(2, 9))
    with pytest.raises(
        ValueError, match="a SimpleNamespace gives no logits for each token; use a causal language model"
    ):
        attention.check_causal(model)
    monkeypatch.setattr(attention.outputs, "head_width", lambda model: 0)
    with pytest.raises(ValueError, match="a SimpleNamespace has no vocabulary of tokens; use a causal language model"):
        attention.check_causal(model)


def test_quantised_weights_do_not_learn():
    """A student of integers would stay as it is."""
    model = types.SimpleNamespace(hf_quantizer=object(), parameters=lambda: [torch.zeros(2, dtype=torch.int8)])
    with pytest.raises(ValueError, match="the weights of this SimpleNamespace are quantised and cannot learn; use o"):
        loading.check_trainable(model)


def test_a_slow_tokenizer():
    """Answers are told by characters, which slow tokenizers do not report."""
    with pytest.raises(ValueError, match="chats need a fast tokenizer, which says what characters a token stands"):
        templates.ChatEncoder(types.SimpleNamespace(is_fast=False))


def test_a_tokenizer_that_encodes_otherwise(monkeypatch):
    """A text must be the same ids with and without what the tokenizer puts around it."""
    monkeypatch.setattr(
        tokenization, "_ids", lambda tokenizer, texts, *, add_special_tokens: [[1, int(add_special_tokens)]]
    )
    message = r"the tokenizer encodes a text in another way with its special tokens: \[1, 1\], not \[1, 0\]"
    with pytest.raises(ValueError, match=message):
        tokenization.template_ids(None)


def test_a_tokenizer_without_end_of_text():
    """Documents are separated by the end-of-text token; a tokenizer without one says what to set."""
    message = "the tokenizer has no end-of-text token to separate documents with; set its eos_token"
    with pytest.raises(ValueError, match=message):
        tokenization.separator_id(types.SimpleNamespace(eos_token_id=None))
