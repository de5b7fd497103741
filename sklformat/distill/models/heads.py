"""
What kind of head a model has: one matrix, or more than that (a bias, a scale, a cap).

Loads nothing.
Shape letters: B sequences, T positions, V vocabulary, D hidden size.
"""

from __future__ import annotations

from typing import Any

import torch

from sklformat.distill.models import outputs

_PROBE_TOKENS = 8
# What the configs of transformers' models call a cap on the logits, or a factor or divisor of them.
_CAPS = ("final_logit_softcapping", "output_logit_soft_cap", "logits_soft_cap")
_SCALES = ("logit_scale", "logits_scaling", "lm_head_multiplier", "logits_mup_width_multiplier")


@torch.no_grad()
def has_linear_head(model: Any) -> bool:
    """
    Say whether ``hidden_states @ lm_head_weight.T`` are a model's logits; some add a bias, scale or cap them.

    The config is asked for what it calls a cap or a scale, since a cap hardly shows in small logits; then it is tried
    on a few tokens, since not every model says so there.
    """
    try:
        weight_VD = outputs.lm_head_weight(model)
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
    expected_BTV = outputs.logits(model, ids_BT).float()
    hidden_BTD = outputs.hidden_states(model, ids_BT).to(weight_VD.device)  # a model may be spread over several
    actual_BTV = (hidden_BTD @ weight_VD.T).float().to(expected_BTV.device)
    model.train(training)
    tolerance = 1e-4 if weight_VD.dtype == torch.float32 else 0.02  # bfloat16 has 8 bits
    tolerance *= float(expected_BTV.abs().max())
    return expected_BTV.shape == actual_BTV.shape and float((expected_BTV - actual_BTV).abs().max()) <= tolerance


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
