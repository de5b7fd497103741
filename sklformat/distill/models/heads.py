"""
What kind of head a model has: one matrix, or more than that (a bias, a scale, a cap).

Loads nothing.
Shape letters: B sequences, T positions, V vocabulary, D hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sklformat.distill.models import outputs

_PROBE_TOKENS = 8
_PROBE_LOGIT = 100.0  # beyond every cap in use, the greatest of which is 50
# What the configs of transformers' models call a cap on the logits, or a factor or divisor of them.
_CAPS = ("final_logit_softcapping", "output_logit_soft_cap", "logits_soft_cap")
_SCALES = ("logit_scale", "logits_scaling", "lm_head_multiplier", "logits_mup_width_multiplier")


@torch.no_grad()
def has_linear_head(model: Any) -> bool:
    """
    Say whether ``hidden_states @ lm_head_weight.T`` are a model's logits; some add a bias, scale or cap them.

    The config is asked for what it calls a cap or a scale; then the head is tried on hidden states of a few tokens,
    made so large that a cap shows, and on zeros, where a bias is all there is, since not every model says so.
    """
    try:
        weight_VD = outputs.lm_head_weight(model)
        outputs.body(model)
    except ValueError:
        return False
    config = model.config.get_text_config()
    if any(getattr(config, name, None) for name in _CAPS):
        return False
    if any(getattr(config, name, None) not in (None, 1) for name in _SCALES):
        return False
    ids_BT = torch.arange(_PROBE_TOKENS, device=weight_VD.device)[None] % weight_VD.shape[0]
    training = model.training
    model.eval()
    try:
        return _is_product(model, weight_VD, ids_BT)
    except outputs.HEAD_FAILURES:  # the head needs more from the body than hidden states
        return False
    finally:
        model.train(training)


def _is_product(model: Any, weight_VD: Tensor, ids_BT: Tensor) -> bool:
    """Whether the logits of these tokens, and of hidden states at the ends of the range, are the product."""
    hidden_BTD = outputs.hidden_states(model, ids_BT)
    found = [outputs.logits(model, ids_BT)]
    factor = min(
        _PROBE_LOGIT / max(1e-6, float(found[0].abs().max())),
        torch.finfo(hidden_BTD.dtype).max / 2 / max(1e-6, float(hidden_BTD.abs().max())),
    )
    inputs = [hidden_BTD, hidden_BTD * factor, torch.zeros_like(hidden_BTD)]
    found += [outputs.head_logits(model, given_BTD) for given_BTD in inputs[1:]]
    relative = 1e-4 if weight_VD.dtype == torch.float32 else 0.02  # bfloat16 has 8 bits
    for given_BTD, found_BTV in zip(inputs, found, strict=True):
        product_BTV = (given_BTD.to(weight_VD.device) @ weight_VD.T).to(found_BTV)  # a model may be spread over devices
        allowed = relative * float(found_BTV.abs().max())
        if found_BTV.shape != product_BTV.shape or not (found_BTV - product_BTV).abs().max() <= allowed:
            return False
    return True


def check_linear_head(model: Any) -> None:
    """
    Make sure that ``hidden_states`` and ``lm_head_weight`` are all that a loss needs.

    Raises:
        ValueError: The model's logits are something else than their product.
    """
    if not has_linear_head(model):
        raise ValueError(
            f"the logits of {type(model).__name__} are not hidden states times one matrix "
            f"(a bias, a scale or a cap?); the chunked loss cannot train it"
        )
