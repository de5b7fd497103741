"""
Whether a model predicts each token from those before it alone, as a causal language model must.

Loads nothing.
Shape letters: B sequences, T positions, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch

from sklformat.distill.models import outputs

_PROBE_TOKENS = 8
_NOT_AT_ALL = (AssertionError, AttributeError, IndexError, KeyError, TypeError, ValueError, RuntimeError)


@torch.no_grad()
def check_causal(model: Any) -> None:
    """
    Run a model on a few token ids, then again with other tokens at the end: the logits before them must stay.

    Args:
        model: In eval mode; may be spread over several devices.

    Raises:
        ValueError: They do not (an encoder that sees later tokens, say), or the model cannot be run over token ids
            alone.
        torch.OutOfMemoryError: No room for the model's own run.
    """
    kind, device = type(model).__name__, outputs.input_device(model)
    width = outputs.head_width(model)
    if width < 1:
        raise ValueError(f"a {kind} has no vocabulary of tokens; use a causal language model")
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    length = min(_PROBE_TOKENS, limit) if limit is not None and limit > 0 else _PROBE_TOKENS
    kept = length // 2
    ids_BT = torch.arange(length, device=device)[None] % width
    other_BT = ids_BT.clone()
    other_BT[:, kept:] = (ids_BT[:, kept:] + 1) % width
    try:
        found = [outputs.logits(model, given_BT)[:, :kept].float() for given_BT in (ids_BT, other_BT)]
    except torch.OutOfMemoryError:
        raise
    except _NOT_AT_ALL as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"a {kind} cannot be run over token ids alone ({reason}); use a causal language model"
        ) from error
    if found[0].dim() != 3 or found[0].shape[1] != kept:
        raise ValueError(f"a {kind} gives no logits for each token; use a causal language model")
    # Mixtures of experts may round otherwise when other tokens share an expert.
    allowed = (1e-5 if model.dtype == torch.float32 else 0.01) * float(found[0].abs().max())
    if (found[0] - found[1]).abs().max() > allowed:  # false for NaN, which is another fault
        raise ValueError(
            f"a {kind} sees the tokens that come later, so that it does not predict them; use a causal language model "
            "(an encoder may become one with is_decoder in its config)"
        )
