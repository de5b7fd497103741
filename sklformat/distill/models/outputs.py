"""
What a causal language model gives: hidden states, logits, and its head by itself.

Shape letters: B sequences, T positions, V vocabulary, D hidden size.
"""

from __future__ import annotations

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel


def hidden_states(model: PreTrainedModel, input_ids_BT: Tensor) -> Tensor:
    """
    Run a model without its head; with ``lm_head_weight`` this is all that ``linear_sparse_kl`` needs.

    Attention is causal over the whole sequence, not masked at separators (paper, Appendix D).

    Args:
        model: A causal language model.
        input_ids_BT: [B, T] int64.

    Returns:
        hidden_BTD: The head's input, in the model's type.
    """
    hidden_BTD: Tensor = model.base_model(input_ids=input_ids_BT, use_cache=False).last_hidden_state
    return hidden_BTD


def lm_head_weight(model: PreTrainedModel) -> Tensor:
    """
    Weight of the head, [V, D]: the parameter itself, so that gradients reach it.

    Raises:
        ValueError: The model has no head that is one matrix without bias; ``has_linear_head`` looks closer.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, torch.nn.Linear) or head.bias is not None:
        raise ValueError(f"the head of {type(model).__name__} is not one matrix without bias; use its logits instead")
    return head.weight


def logits(model: PreTrainedModel, input_ids_BT: Tensor) -> Tensor:
    """
    Next-token logits.

    Args:
        model: A causal language model.
        input_ids_BT: [B, T] int64.

    Returns:
        logits_BTV: In the model's type; V may be greater than the tokenizer (``check_fit``).
    """
    logits_BTV: Tensor = model(input_ids=input_ids_BT, use_cache=False).logits
    return logits_BTV


class _Given(torch.nn.Module):
    """Stands where a model's body was, and gives hidden states that were made before."""

    def __init__(self, hidden_BTD: Tensor) -> None:
        super().__init__()
        self._hidden_BTD = hidden_BTD

    def forward(self, *_args: object, **_named: object) -> object:
        # Heads of mixtures of experts ask for the router's logits as well, and do without.
        return transformers.modeling_outputs.MoeModelOutputWithPast(last_hidden_state=self._hidden_BTD)


def head_logits(model: PreTrainedModel, hidden_BTD: Tensor) -> Tensor:
    """
    What a model makes of its own hidden states after its body: head, bias, scale and cap, whatever it has.

    Args:
        model: A causal language model whose head reads nothing but the last hidden state.
        hidden_BTD: ``hidden_states`` of it, or some positions of them.

    Returns:
        logits_BTV of these positions.
    """
    name, body = model.base_model_prefix, model.base_model
    setattr(model, name, _Given(hidden_BTD))
    try:
        return logits(model, torch.zeros(hidden_BTD.shape[:2], dtype=torch.int64, device=hidden_BTD.device))
    finally:
        setattr(model, name, body)
