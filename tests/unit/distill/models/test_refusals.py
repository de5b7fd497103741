"""What models refuse that test_loading.py leaves out."""

import types

import pytest
import tiny
import torch

from sklformat.distill.models import attention, guards, heads, loading, templates, tokenization


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


class Two:
    """Stands for torch.distributed in the second of two processes, of which the first has what it is told to have."""

    def __init__(self, *others):
        self.others = list(others)

    def get_rank(self):
        return 1

    def get_world_size(self):
        return 2

    def all_gather_object(self, found, mine):
        found[:] = [self.others.pop(0), mine]


def test_a_teacher_that_cannot_be_divided(monkeypatch, tmp_path):
    """By an adapter, by transformers, by its type, or by its head."""
    model = tiny.new_model(60)
    with guards.quiet():
        model.save_pretrained(tmp_path / "model")
    monkeypatch.setattr(loading, "division", lambda processes: None)
    with pytest.raises(ValueError, match="transformers has no plan by which a LlamaForCausalLM is divided; run it who"):
        loading.load_model(tmp_path / "model", tensor_parallel=2)
    monkeypatch.setattr(loading.adapters, "find_adapter", lambda *given, **how: {})
    monkeypatch.setattr(loading.adapters, "require_peft", lambda: None)
    with pytest.raises(ValueError, match="model: an adapter, which is merged into a whole model; save that"):
        loading.load_model(tmp_path / "model", tensor_parallel=2)
    monkeypatch.setattr(guards.transformers.distributed, "DistributedConfig", object)
    with pytest.raises(ValueError, match=r"transformers [\d.]+ does not divide models as tensor_parallel needs it"):
        guards.division(2)

    monkeypatch.setattr(heads, "dist", Two([False, False, False]))
    with pytest.raises(ValueError, match="parts of the head of a LlamaForCausalLM do not give the logits that the mod"):
        heads.divided_head(tiny.new_model(60, tie=True), 50)  # of which the other process says something else
    monkeypatch.setattr(heads, "dist", Two(9))
    weight = torch.ones(9, 4)
    weight.to_local = lambda: weight  # as of one that is not divided by ids
    with pytest.raises(ValueError, match=r"head of LlamaForCausalLM is divided into \[9, 9\] of 9 rows; need parts"):
        heads._own_rows(model, weight, 9)


def test_a_head_that_is_whole_is_divided_here(monkeypatch):
    """The second of two processes takes the second half, up to where the vocabulary ends."""
    monkeypatch.setattr(heads, "dist", Two([True, True, True]))
    model = tiny.new_model(60)
    head = heads.divided_head(model, 51)
    assert (26, 51) == (head.shard.first, head.shard.vocab_size)
    assert torch.equal(head.weight, model.lm_head.weight[26:51])
