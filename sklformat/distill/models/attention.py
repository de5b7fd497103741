"""
What the tokens of a model see: those before them, and where it is asked for those of their own document alone.

Loads nothing.  Where positions begin at 0 again, transformers' masks keep attention within each document, on any
device; a model may still carry a state across, or take neither positions nor masks, and older versions make no such
masks.
Shape letters: B sequences, T positions, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor

from sklformat.distill.models import outputs
from sklformat.errors import is_memory_short

_PROBE_TOKENS = 8
_DOCUMENT_TOKENS = 7
_NOT_AT_ALL = (AssertionError, *outputs.HEAD_FAILURES)


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
    except _NOT_AT_ALL as error:
        if is_memory_short(error):
            raise
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


@torch.no_grad()
def check_isolates(model: Any) -> None:
    """
    Run a model on two short documents in one sequence, then on the second alone, and behind another first one.

    Args:
        model: A causal language model; may be spread over several devices.

    Raises:
        ValueError: The second document's logits are not the same; names the kind of model.
        torch.OutOfMemoryError: No room for the model's own run.
    """
    with outputs.evaluated(model):
        isolates = _isolates(model)
    if not isolates:
        raise ValueError(
            f"a {type(model).__name__} does not keep documents apart (transformers {transformers.__version__}): one "
            "changes the logits of the next, or its positions cannot begin at 0 again; do without --isolate-documents, "
            "or use a model of attention alone, such as a Llama, Qwen or Gemma"
        )


def _isolates(model: Any) -> bool:
    device, width = outputs.input_device(model), outputs.head_width(model)
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2 * _DOCUMENT_TOKENS + 2
    # Two sequences with borders at different places, as batches have them; no longer than the model takes.
    first = max(1, min(_DOCUMENT_TOKENS, limit // 2))
    lengths = ((first, first + 1), (first + 1, first))
    ids_BT = (torch.arange(2 * (2 * first + 1), device=device).view(2, -1) * 5 + 3) % width
    positions_BT = torch.stack([torch.cat([torch.arange(n, device=device) for n in row]) for row in lengths])
    is_second_BT = torch.stack([torch.arange(2 * first + 1, device=device) >= n for n, _ in lengths])
    other_BT = torch.where(is_second_BT, ids_BT, (ids_BT + 1) % width)
    alone = torch.cat(
        [outputs.logits(model, row[None, n:])[0].float() for row, (n, _) in zip(ids_BT, lengths, strict=True)]
    )
    try:
        packed, behind_another = (_second(model, ids, positions_BT, is_second_BT) for ids in (ids_BT, other_BT))
    except (*_NOT_AT_ALL, ImportError) as error:  # it takes no positions, or no masks
        if is_memory_short(error):
            raise
        return False
    # What a document before it says must change no bit, but that mixtures of experts may round otherwise; alone, all
    # products have another shape.
    leaks, moves = (1e-5, 1e-4) if model.dtype == torch.float32 else (0.01, 0.05)
    largest = float(alone.abs().max())
    # False for NaN, which is another fault.
    return not (_differ(packed, behind_another) > leaks * largest or _differ(packed, alone) > moves * largest)


def _second(model: Any, ids_BT: Tensor, positions_BT: Tensor, is_second_BT: Tensor) -> Tensor:
    """Logits of the second documents, one after the other."""
    logits_BTV = outputs.logits(model, ids_BT, positions_BT)
    return logits_BTV[is_second_BT.to(logits_BTV.device)].float()


def _differ(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())
