import pytest
import tiny
import torch
import transformers
from torch import nn

from sklformat.distill.models import layers


def test_the_layers_of_a_model_are_those_that_transformers_keeps_whole():
    """Each decoder layer once, in order; a model that names none, or none that is there, is refused."""
    model = tiny.new_model(32, num_layers=3)
    assert [*model.model.layers] == layers.repeated_layers(model)
    model._no_split_modules = None
    with pytest.raises(ValueError, match="does not say what the layers of LlamaForCausalLM are; train it without"):
        layers.repeated_layers(model)


def test_experts_apart_are_seen():
    """Experts in a list may go without a gradient; those in one tensor, and no experts, do not."""
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 2, "vocab_size": 16, "num_local_experts": 2}
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes))
    assert not layers.has_separate_experts(model)
    model.model.layers[0].mlp.experts = nn.ModuleList([nn.Linear(8, 8)])
    assert layers.has_separate_experts(model)


def test_recomputed_activations_change_no_gradient():
    """Bit for bit; a type that cannot do it is refused."""
    model, ids_BT = tiny.new_model(32).train(), torch.arange(8)[None]
    model(ids_BT).logits.square().mean().backward()
    wanted = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    layers.recompute_activations(model)
    assert model.is_gradient_checkpointing
    model(ids_BT).logits.square().mean().backward()
    assert all(map(torch.equal, wanted, (parameter.grad for parameter in model.parameters())))
    type(model).supports_gradient_checkpointing, was = False, type(model).supports_gradient_checkpointing
    try:
        with pytest.raises(ValueError, match="a LlamaForCausalLM cannot recompute its activations; train it without"):
            layers.recompute_activations(model)
    finally:
        type(model).supports_gradient_checkpointing = was


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")
def test_a_layer_that_cannot_be_compiled_is_named():
    """What torch says in many lines comes in one, and nothing runs uncompiled instead."""

    def broken(*_):
        raise NotImplementedError("no compiler here\nand more lines")

    model = tiny.new_model(32)
    for layer in layers.repeated_layers(model):
        layer.compile(backend=broken)
    words = r"^torch could not compile the student's layers \(.*no compiler here\); train without --compile$"
    with pytest.raises(ValueError, match=words), layers.naming_compile_failures():
        model(torch.arange(8)[None])
    torch._dynamo.reset()
