"""
What a causal language model gives: hidden states, logits, and its head by itself.

Shape letters: B sequences, T positions, V vocabulary, D hidden size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

# Where models keep what is below their head, if not where their class says.
_BODIES = ("model", "transformer", "backbone")
# What configs call the weight of the loss that balances experts: most of them, and JetMoe's.
_BALANCES = ("router_aux_loss_coef", "aux_loss_coef")


def body(model: PreTrainedModel) -> tuple[str, Any]:
    """
    What a model has below its head, and the name of the attribute that holds it.

    Raises:
        ValueError: Nothing of the kind: the model can only be run whole.
    """
    for name in (model.base_model_prefix, *_BODIES):
        module = getattr(model, name, None) if name else None
        if isinstance(module, torch.nn.Module) and module is not model:
            return name, module
    raise ValueError(f"{type(model).__name__} keeps no body apart from its head; use its logits instead")


def hidden_states(model: PreTrainedModel, input_ids_BT: Tensor, position_ids_BT: Tensor | None = None) -> Tensor:
    """
    Run a model without its head; with ``output_head`` this is all that ``linear_sparse_kl`` needs.

    Attention is causal over the whole sequence, not masked at separators (paper, Appendix D), unless position ids
    say where documents begin, and the model heeds them (``attention.check_isolates``).

    Args:
        model: A causal language model.
        input_ids_BT: [B, T] int64.
        position_ids_BT: [B, T] int64, each token's place in its document; None: all are one.

    Returns:
        hidden_BTD: The head's input, in the model's type.

    Raises:
        ValueError: As ``body``.
    """
    named = _documents(model, position_ids_BT)
    hidden_BTD: Tensor = body(model)[1](input_ids=input_ids_BT, use_cache=False, **named).last_hidden_state
    return hidden_BTD


def balance_weight(model: PreTrainedModel) -> float:
    """Weight of the balancing loss that a mixture of experts has in its config, 0 for none; added only where asked."""
    config = model.config.get_text_config()
    known = [getattr(config, name, None) for name in _BALANCES]
    known.append(getattr(getattr(config, "ffn_config", None), "moe_loss_weight", None))  # DBRX's
    return float(next(filter(None, known), 0))


def asks_for_balance(model: PreTrainedModel) -> bool:
    """Whether a model's own training adds its balancing loss: as transformers has it, with output_router_logits."""
    return balance_weight(model) > 0 and bool(getattr(model.config.get_text_config(), "output_router_logits", False))


def balance_note(model: PreTrainedModel) -> str:
    """What whoever trains a mixture of experts whose balancing loss is left out may want to know; "" for all others."""
    if balance_weight(model) == 0 or asks_for_balance(model):
        return ""
    return (
        "the balancing loss of the student's experts is left out, since its config has output_router_logits off; set "
        "it to true there to add the loss"
    )


def hidden_states_and_balance(
    model: PreTrainedModel, input_ids_BT: Tensor, position_ids_BT: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """
    ``hidden_states``, and the weighted balancing loss of a mixture of experts whose config asks for one, else None.

    The model itself makes the loss of what its routers gave, over all positions.

    Raises:
        ValueError: As ``body``; or the config asks for the loss, and the model makes none.
    """
    if not asks_for_balance(model):
        return hidden_states(model, input_ids_BT, position_ids_BT), None
    name, own = body(model)
    named = _documents(model, position_ids_BT)
    given = own(input_ids=input_ids_BT, use_cache=False, output_router_logits=True, **named)
    setattr(model, name, _Given(given.last_hidden_state, own, given.router_logits))
    try:
        output = model(input_ids=input_ids_BT, use_cache=False, output_router_logits=True, logits_to_keep=1)
    finally:
        setattr(model, name, own)
    return given.last_hidden_state, balance_weight(model) * _balance_of(model, output)


def unwrapped(model: Any) -> Any:
    """
    The model of transformers or peft inside DistributedDataParallel, torch.compile and the like.

    Raises:
        ValueError: There is none, or torch's first FSDP is around it.
    """
    plain = model
    while True:
        if type(plain).__name__ == "FullyShardedDataParallel":  # which answers for the model that it holds
            raise ValueError(
                "FullyShardedDataParallel keeps weights in flat pieces, of which no head can be had; use fully_shard, "
                "which accelerate and Trainer take as fsdp_version 2"
            )
        if hasattr(plain, "get_output_embeddings"):
            return plain
        plain = getattr(plain, "module", None) or getattr(plain, "_orig_mod", None)
        if plain is None:
            raise ValueError(f"a {type(model).__name__} is no causal language model of transformers or peft")


def root_outputs(
    model: Any, input_ids_BT: Tensor, position_ids_BT: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """
    ``hidden_states_and_balance`` by the model's own call, as the wrappers of parallel training need it.

    Of the logits only the last position's are made.

    Args:
        model: A causal language model, or a wrapper around one.
        input_ids_BT: [B, T] int64.
        position_ids_BT: As for ``hidden_states``.

    Returns:
        hidden_BTD: What the model gives its head.
        logits_BV: What it makes of the last position's.
        balance: The weighted balancing loss, or None.

    Raises:
        ValueError: There is no such model, it does not call its head once and with all positions, or its config asks
            for a balancing loss that it does not give.
    """
    plain = unwrapped(model)
    own = plain.get_base_model() if hasattr(plain, "get_base_model") else plain
    named = _documents(own, position_ids_BT)
    if asks_for_balance(own):
        named["output_router_logits"] = True
    with _heard(plain, own):
        output = model(input_ids=input_ids_BT, use_cache=False, **named)
    states = output.hidden_states
    if states is None or states[0].shape[:2] != input_ids_BT.shape:
        given = "nothing" if states is None else f"hidden states {list(states[0].shape)}"
        raise ValueError(
            f"{type(own).__name__} gives its head {given} for inputs {list(input_ids_BT.shape)}; use sparse_kl of its "
            "logits"
        )
    if not asks_for_balance(own):
        return states[0], output.logits[:, -1], None
    return states[0], output.logits[:, -1], balance_weight(own) * _balance_of(own, output)


@contextlib.contextmanager
def _heard(plain: Any, own: PreTrainedModel) -> Iterator[None]:
    """
    Make the call of a model give its head's input as ``hidden_states``, and make the head's output of one position.

    The states are part of what the outermost of its own modules gives, so that wrappers around it see them; asked for
    as transformers has it, those of all layers would come, and a copy of each where a wrapper copies.
    """
    given: list[Tensor] = []

    # Not traced by torch.compile, which may take these hooks of one call for those of the next.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def hear(_head: object, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        given.append(inputs[0])
        return (inputs[0][:, -1:], *inputs[1:])

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def tell(_model: object, _inputs: object, output: Any) -> Any:
        output.hidden_states = (given[0],) if len(given) == 1 else None
        return output

    hooks = [
        own.get_output_embeddings().register_forward_pre_hook(hear),
        plain.register_forward_hook(tell, prepend=True),  # before what fully_shard does with an output
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _balance_of(model: PreTrainedModel, output: Any) -> Tensor:
    balance: Tensor | None = getattr(output, "aux_loss", None)
    if balance is None:
        raise ValueError(
            f"the config of {type(model).__name__} asks for a balancing loss (router_aux_loss_coef, "
            "output_router_logits), and the model gives none; set output_router_logits to false"
        )
    return balance


@contextlib.contextmanager
def evaluated(model: PreTrainedModel) -> Iterator[None]:
    """A model without dropout for a while; each of its modules is left as it was."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def input_device(model: PreTrainedModel) -> torch.device:
    """Where a model, perhaps spread over several devices, takes its token ids."""
    try:
        device: torch.device = model.get_input_embeddings().weight.device
    except (AttributeError, NotImplementedError):
        device = model.device
    return device


def head_width(model: PreTrainedModel) -> int:
    """Number of a model's logits: the rows that its head has, whatever its config says; 0: it has no vocabulary."""
    head = model.get_output_embeddings()
    return int(getattr(head, "out_features", 0) or getattr(model.config.get_text_config(), "vocab_size", 0))


def logits(model: PreTrainedModel, input_ids_BT: Tensor, position_ids_BT: Tensor | None = None) -> Tensor:
    """
    Next-token logits.

    Args:
        model: A causal language model.
        input_ids_BT: [B, T] int64.
        position_ids_BT: As for ``hidden_states``.

    Returns:
        logits_BTV: In the model's type; V may be greater than the tokenizer (``check_fit``).
    """
    logits_BTV: Tensor = model(input_ids=input_ids_BT, use_cache=False, **_documents(model, position_ids_BT)).logits
    return logits_BTV


def _documents(model: PreTrainedModel, position_ids_BT: Tensor | None) -> dict[str, Any]:
    """
    What keeps documents apart: where they begin, and masks made of that by transformers itself.

    Most models make the same masks of the positions alone; some, such as OPT and gpt-oss, do not look.
    """
    if position_ids_BT is None:
        return {}
    from transformers.masking_utils import create_masks_for_generate  # noqa: PLC0415  older versions do without

    # Only the type, the device and two sizes of it are read.
    embeds_BT1 = torch.empty((*position_ids_BT.shape, 1), dtype=model.dtype, device=position_ids_BT.device)
    masks = create_masks_for_generate(
        config=model.config, inputs_embeds=embeds_BT1, attention_mask=None, cache=None, position_ids=position_ids_BT
    )
    return {"position_ids": position_ids_BT, "attention_mask": masks}


HEAD_FAILURES = (AttributeError, IndexError, KeyError, TypeError, ValueError, RuntimeError)
"""What ``head_logits`` ends with where a head needs more from its body than the last hidden state."""


class _Output(transformers.modeling_outputs.BaseModelOutputWithPast):  # type: ignore[misc]
    """What a body gives. What else a head may ask for (images) is not there; it does without."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


class _Given(torch.nn.Module):
    """Stands where a model's body was, and gives hidden states that were made before; all else is the body's."""

    def __init__(self, hidden_BTD: Tensor, own: torch.nn.Module, router_logits: Any = None) -> None:
        super().__init__()
        self._hidden_BTD, self._router_logits = hidden_BTD, router_logits
        self.__dict__["_own"] = own  # no module of this one

    def __getattr__(self, name: str) -> Any:
        # Some call what their body consists of, its decoder alone.
        return self if name == "decoder" else getattr(self.__dict__["_own"], name)

    def forward(self, *_args: object, **_named: object) -> object:
        output = _Output(last_hidden_state=self._hidden_BTD)
        output.router_logits = self._router_logits
        return output


def head_logits(model: PreTrainedModel, hidden_BTD: Tensor) -> Tensor:
    """
    What a model makes of its own hidden states after its body: head, bias, scale and cap, whatever it has.

    Args:
        model: A causal language model whose head reads nothing but the last hidden state.
        hidden_BTD: ``hidden_states`` of it, or some positions of them.

    Returns:
        logits_BTV of these positions.

    Raises:
        ValueError: As ``body``.
    """
    name, own = body(model)
    setattr(model, name, _Given(hidden_BTD, own))
    try:
        return logits(model, torch.zeros(hidden_BTD.shape[:2], dtype=torch.int64, device=hidden_BTD.device))
    finally:
        setattr(model, name, own)
