"""
What kind of head a model has: one matrix, or more than that (a bias, a scale, a cap, an adapter).

Loads nothing.
Shape letters: B sequences, T positions, V vocabulary, D hidden size.
"""

from __future__ import annotations

import dataclasses
import weakref
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sklformat.distill.losses.heads import OutputHead, Shard
from sklformat.distill.models import outputs
from sklformat.errors import is_memory_short

_PROBE_TOKENS = 8
_PROBE_LOGIT = 100.0  # beyond every cap in use, the greatest of which is 50
# What the configs of transformers' models call a cap on the logits, a factor or a divisor of them.
_CAPS = ("final_logit_softcapping", "output_logit_soft_cap", "logits_soft_cap")
_FACTORS = ("logit_scale", "lm_head_multiplier")
_DIVISORS = ("logits_scaling", "logits_mup_width_multiplier")

# The scale of models whose heads were tried: in a loop it is done once.
_scales: weakref.WeakKeyDictionary[Any, float] = weakref.WeakKeyDictionary()
# The models of whose own calls one was compared with hidden states and head.
_compared: weakref.WeakSet[Any] = weakref.WeakSet()
_COMPARED_WITHIN = 0.02  # of the greatest logit: bfloat16 has 8 bits


def run_to_head(
    model: Any, input_ids_BT: Tensor, position_ids_BT: Tensor | None = None
) -> tuple[Tensor, OutputHead, Tensor]:
    """
    Run a student up to its head: what ``linear_sparse_kl`` takes, under every wrapper of parallel training.

    ``hidden, head, balance = run_to_head(student, batch.input_ids)``, then
    ``(linear_sparse_kl(hidden, head, batch.targets) + balance).backward()``.

    It calls the outermost module, once, and all that a loss needs is part of what that call gives or of the modules
    inside: DistributedDataParallel then sums the gradients of all parameters, the head's among them, and fully_shard
    keeps the head whole until the backward pass has reached it.  Calling what is inside a wrapper instead leaves the
    processes with different gradients.  So call it once for each backward pass, and no other part of the model.

    Both wrappers average gradients over their processes, and accelerate over the micro-batches of a step as well.  The
    gradient is that of the whole step where each loss has as ``normaliser`` the mean number of positions that count
    in one of them: those of the whole step, ``(batch.labels != -100).sum()`` summed over its micro-batches and
    processes, divided by how many of these there are.

    The first call of each model is compared with the model's own logits of the last position.  That is all where it was
    sharded before ``output_head(model)`` was called once, as transformers can load it; a cap is then the config's.

    Args:
        model: A causal language model of transformers or, around that, of peft; whole, under fully_shard, or in
            DistributedDataParallel, torch.compile or what accelerate's ``prepare`` gives.
        input_ids_BT: [B, T] int64.
        position_ids_BT: [B, T] int64, for models whose documents do not see each other (``dataset.isolated``); None:
            all tokens of a sequence are one document.

    Returns:
        hidden_PD: P = B·T positions, in the model's type.
        head: As ``output_head`` gives it; for the loss of this call alone.
        balance: The weighted balancing loss of a mixture of experts whose config asks for it, with
            ``output_router_logits``: a mean over this call, scalar; else 0.

    Raises:
        ValueError: As ``output_head``; or the model does not call its head once and with all positions, or makes
            something else of what it gives.
    """
    plain = outputs.unwrapped(model)
    hidden_BTD, logits_BV, balance = outputs.root_outputs(model, input_ids_BT, position_ids_BT)
    if plain not in _compared:
        _compare(_without_peft(plain), hidden_BTD[:, -1].detach(), logits_BV.detach())
        _compared.add(plain)
    balance = torch.zeros(()).to(hidden_BTD.device) if balance is None else balance
    return hidden_BTD.flatten(0, 1), output_head(plain), balance


def _compare(plain: Any, hidden_BD: Tensor, logits_BV: Tensor) -> None:
    """Make sure that the head gives a model's logits; of one that was sharded before it was tried, find the scale."""
    if plain in _scales or not _is_sharded(plain):
        heads = [output_head(plain)]
    else:
        heads = [_scaled(head, scale) for head in [_described(plain)] for scale in _possible_scales(head)]
    for head in heads:
        found_BV = head.logits(hidden_BD.to(head.weight.device)).float()
        wanted_BV = logits_BV.float().to(found_BV.device)
        # False for NaN, which is another fault.
        if not (found_BV - wanted_BV).abs().max() > _COMPARED_WITHIN * wanted_BV.abs().max():
            _scales[plain] = head.scale
            return
    raise ValueError(
        f"the logits of {type(plain).__name__} are not what its head makes of the hidden states that it is given; use "
        "sparse_kl of its logits"
    )


def output_head(model: Any) -> OutputHead:
    """
    The head of a causal language model as ``linear_sparse_kl`` takes it, so that gradients reach its parameters.

    Bias, scale and cap are the model's own; a head under LoRA of peft brings its adapter, and one of
    ``modules_to_save`` is the copy that learns.  The config says what scales and caps the logits; then the head is
    tried on hidden states of a few tokens, made so large that a cap shows, and on zeros, where a bias is all there is,
    since not every model says so.  That is done once for each model.

    Args:
        model: Of transformers or, around that, of peft.  Not a wrapper such as DistributedDataParallel.

    Returns:
        The head, of the model's own parameters; it stays right while they learn.  Under fully_shard each step
        takes its own, after the model's own call.

    Raises:
        ValueError: The logits are something else, the weight is a DTensor or quantised, or the adapter is one that
            hidden states and a matrix cannot stand for (dropout, DoRA, a tied head).
    """
    plain = _without_peft(model)
    head = _described(plain)
    if plain not in _scales:
        if _is_sharded(plain):
            raise ValueError(
                f"the head of {type(plain).__name__} cannot be tried while the model is sharded; call "
                "output_head(model) once before fully_shard"
            )
        fitting = (scale for scale in _possible_scales(head) if _tried_well(plain, _scaled(head, scale)))
        scale = next(fitting, None)
        if scale is None:
            raise ValueError(
                f"the logits of {type(plain).__name__} are not its hidden states times its head with the bias, scale "
                "and cap that its config names; the chunked loss cannot train it: use sparse_kl of its logits"
            )
        _scales[plain] = scale
    return _scaled(head, _scales[plain])


def divided_head(model: Any, vocab_size: int) -> OutputHead:
    """
    This process's part of the head of a model that transformers divided among all processes, for its logits alone.

    All of them call this at once.  A head that is whole on each of them is divided here.

    Args:
        model: As ``load_model`` gives it with ``tensor_parallel``.
        vocab_size: Ids beyond it are padding and left out.

    Raises:
        ValueError: As ``output_head``; or the head is divided otherwise than by ids.
    """
    layer = model.get_output_embeddings()
    _check_matrix(model, layer)
    weight_VD, first = _own_rows(model, layer.weight, vocab_size)
    bias_V = None if layer.bias is None else _own_rows(model, layer.bias, vocab_size)[0]
    softcap, scale = _bent(model)
    head = OutputHead(weight_VD, bias_V, softcap, scale, shard=Shard(first, vocab_size))
    # Each process tries all of them, so that they meet as often.
    candidates = [_scaled(head, scale) for scale in _possible_scales(head)]
    tried: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(tried, [_tried_well(model, candidate) for candidate in candidates])
    found: OutputHead | None = next((head for head, *well in zip(candidates, *tried, strict=True) if all(well)), None)
    if found is None:
        raise ValueError(
            f"parts of the head of a {type(model).__name__} do not give the logits that the model gives; leave "
            "tensor_parallel out"
        )
    return found


def _own_rows(model: Any, tensor: Tensor, vocab_size: int) -> tuple[Tensor, int]:
    """The rows that this process has, or is to have, up to the vocabulary's end; and the id of the first."""
    rank, number = dist.get_rank(), dist.get_world_size()
    if hasattr(tensor, "to_local"):
        own = tensor.to_local()
        counts: list[Any] = [None] * number
        dist.all_gather_object(counts, len(own))
        if sum(counts) != len(tensor):
            raise ValueError(
                f"the head of {type(model).__name__} is divided into {counts} of {len(tensor)} rows; need parts that "
                "are ids and together all of them: leave tensor_parallel out"
            )
        first = min(sum(counts[:rank]), vocab_size)
    else:
        rows = -(-vocab_size // number)
        first = min(rank * rows, vocab_size)
        own = tensor[first : first + rows]
    return own.detach()[: vocab_size - first], first


def _is_sharded(model: Any) -> bool:
    return any(hasattr(parameter, "full_tensor") for parameter in model.parameters())


def _possible_scales(head: OutputHead) -> tuple[float, ...]:
    """A factor by one model's name is a divisor by another's, or nothing."""
    return head.scale, 1 / head.scale, 1.0


def _scaled(head: OutputHead, scale: float) -> OutputHead:
    return dataclasses.replace(head, scale=scale)


def _without_peft(model: Any) -> Any:
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not hasattr(plain, "get_output_embeddings"):
        raise ValueError(
            f"a {type(plain).__name__} is no causal language model of transformers or peft; of a wrapper give what it "
            "wraps (.module)"
        )
    return plain


def _described(model: Any) -> OutputHead:
    """The head as config and layers describe it."""
    layer = model.get_output_embeddings()
    if hasattr(layer, "modules_to_save"):
        layer = layer.modules_to_save[layer.active_adapters[0]]
    low_rank: tuple[tuple[Tensor, Tensor, float], ...] = ()
    if hasattr(layer, "base_layer"):
        low_rank = _adapters(model, layer)
        layer = layer.base_layer
    _check_matrix(model, layer)
    softcap, scale = _bent(model)
    return OutputHead(layer.weight, layer.bias, softcap, scale, low_rank)


def _check_matrix(model: Any, layer: Any) -> None:
    """Refuse a head that is no matrix of numbers."""
    name = type(model).__name__
    is_linear = isinstance(layer, torch.nn.Linear)
    if not is_linear:
        raise ValueError(f"the head of {name} is a {type(layer).__name__}, not one matrix; use sparse_kl of its logits")
    weight = layer.weight
    # A quantised layer calls itself linear and holds packed numbers, integers, or a tensor of a type of its own.
    whole = weight.shape == (layer.out_features, layer.in_features) and weight.is_floating_point()
    if not hasattr(weight, "full_tensor") and not (whole and type(weight.data) is Tensor):
        raise ValueError(
            f"the head of {name} is quantised ({type(layer).__name__}, {weight.dtype}) and gives no gradient; leave it "
            "out of the quantisation, or use sparse_kl of the model's logits"
        )


def _bent(model: Any) -> tuple[float | None, float]:
    """Cap and scale of the logits as a config names them."""
    config = model.config.get_text_config()
    caps = [value for value in (getattr(config, key, None) for key in _CAPS) if value]
    scale = 1.0
    for key in _FACTORS:
        scale *= getattr(config, key, None) or 1
    for key in _DIVISORS:
        scale /= getattr(config, key, None) or 1
    return caps[0] if caps else None, scale


def _adapters(model: Any, layer: Any) -> tuple[tuple[Tensor, Tensor, float], ...]:
    """What a layer of peft adds to the matrix below it."""
    name = type(model).__name__
    if layer.disable_adapters or layer.merged:
        return ()
    active = [adapter for adapter in layer.active_adapters if adapter in getattr(layer, "lora_A", ())]
    if not active or any(adapter in layer.lora_variant or layer.lora_B[adapter].bias is not None for adapter in active):
        raise ValueError(
            f"the adapter on the head of {name} is not plain LoRA ({type(layer).__name__}); leave the head out of "
            "target_modules, or use sparse_kl of the model's logits"
        )
    if layer.base_layer.weight is model.get_input_embeddings().weight:
        raise ValueError(
            f"the head of {name} is tied to the embedding, and LoRA changes it alone: merged, the adapter would change "
            "both; leave the head out of target_modules, or untie the two"
        )
    rates = [getattr(layer.lora_dropout[adapter], "p", 0) for adapter in active]
    if any(rates):
        raise ValueError(
            f"LoRA on the head of {name} has lora_dropout {max(rates)}, which the chunked loss would leave out; set it "
            "to 0, or leave the head out of target_modules"
        )
    return tuple((layer.lora_A[a].weight, layer.lora_B[a].weight, float(layer.scaling[a])) for a in active)


def plain_weight(model: Any) -> Tensor | None:
    """The weight of a head that is nothing more, [V, D]: hidden states times it are the logits. Else None."""
    try:
        plain = _without_peft(model)
        head = _described(plain)
    except ValueError:
        return None
    return head.weight if head.is_plain and _tried_well(plain, head) else None


@torch.no_grad()
def _tried_well(model: Any, head: OutputHead) -> bool:
    vocab_size = len(head.weight) if head.shard is None else head.shard.vocab_size
    ids_BT = torch.arange(_PROBE_TOKENS, device=outputs.input_device(model))[None] % vocab_size
    try:
        with outputs.evaluated(model):
            return _is_product(model, head, ids_BT)
    except outputs.HEAD_FAILURES as error:  # the head needs more from the body than hidden states
        if is_memory_short(error):
            raise
        return False


def _is_product(model: Any, head: OutputHead, ids_BT: Tensor) -> bool:
    """Whether the logits of these tokens, and of hidden states at the ends of the range, are the head's."""
    hidden_BTD = outputs.hidden_states(model, ids_BT)
    found = [outputs.logits(model, ids_BT)]
    factor = min(
        _PROBE_LOGIT / max(1e-6, float(found[0].abs().max())),
        torch.finfo(hidden_BTD.dtype).max / 2 / max(1e-6, float(hidden_BTD.abs().max())),
    )
    inputs = [hidden_BTD, hidden_BTD * factor, torch.zeros_like(hidden_BTD)]
    found += [outputs.head_logits(model, given_BTD) for given_BTD in inputs[1:]]
    if head.shard is not None:
        found = [whole[..., head.shard.first : head.shard.first + len(head.weight)] for whole in found]
    relative = 1e-4 if head.weight.dtype == torch.float32 else 0.02  # bfloat16 has 8 bits
    for given_BTD, found_BTV in zip(inputs, found, strict=True):
        # A model may be spread over devices.
        product_PV = head.logits(given_BTD.flatten(0, 1).to(head.weight.device))
        product_BTV = product_PV.view(*ids_BT.shape, -1).to(found_BTV)
        allowed = relative * float(found_BTV.abs().max())
        if found_BTV.shape != product_BTV.shape or not (found_BTV - product_BTV).abs().max() <= allowed:
            return False
    return True
