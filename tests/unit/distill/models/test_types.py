"""Types of models: what capture sees is the model's own call, or the type is refused by name."""

import model_types
import pytest
import torch
import transformers

from sklformat.distill.models import heads, loading, outputs
from sklformat.distill.models.attention import check_causal

WAYS = {
    "linear": ("bloom", "falcon", "gpt2", "gpt_neox", "llama", "mamba", "mixtral", "olmo2", "opt", "qwen3_moe"),
    "head": ("bert", "cohere", "gemma2", "gemma3", "granite", "phi"),
    "whole": ("prophetnet",),
}


@pytest.mark.parametrize(("way", "model_type"), [(way, name) for way, names in WAYS.items() for name in names])
def test_a_type_is_exact(way, model_type):
    """The logits that capture takes are those of the model's own call, to the last bit, however its head is run."""
    assert (way, 0.0) == model_types.compare(model_types.tiny_model(model_type))


@pytest.mark.parametrize("model_type", ["bert", "xlnet"])
def test_a_model_that_sees_later_tokens_is_refused(model_type, tmp_path):
    """An encoder that transformers loads as a causal type would give its targets away; it is refused by name."""
    model = model_types.tiny_model(model_type, **({"is_decoder": False} if model_type == "bert" else {}))
    model.save_pretrained(tmp_path / "m")
    with pytest.raises(ValueError, match=rf"m: a {type(model).__name__} sees the tokens that come later"):
        loading.load_model(tmp_path / "m")


def test_a_model_that_needs_more_than_ids_is_refused():
    """A type that cannot be run over token ids alone is one line with its own reason."""
    with pytest.raises(ValueError, match=r"cannot be run over token ids alone \(inputs_embeds and .*; use a causal"):
        check_causal(model_types.tiny_model("gemma4_unified_assistant"))


def test_a_model_without_vocabulary_is_refused():
    """A model whose config knows no tokens is refused as such."""
    model = model_types.tiny_model("pi0", auto=transformers.AutoModelForMultimodalLM)
    with pytest.raises(ValueError, match="a PI0ForConditionalGeneration has no vocabulary of tokens"):
        check_causal(model)


def test_a_body_that_is_the_model_itself_is_found():
    """Where a type's class does not say what is below its head (Llama 4), the body is found under its usual name."""
    model = model_types.tiny_model("llama4_text")
    assert model.base_model is model
    assert ("model", model.model) == outputs.body(model)
    assert ("linear", 0.0) == model_types.compare(model)
    with pytest.raises(ValueError, match="Linear keeps no body apart"):
        plain = torch.nn.Linear(1, 1)
        plain.base_model_prefix = ""
        outputs.body(plain)


class Capped(transformers.LlamaForCausalLM):
    """A cap that no config names, far above the logits of small weights."""

    def forward(self, *args, **named):
        output = super().forward(*args, **named)
        output.logits = 30 * torch.tanh(output.logits / 30)
        return output


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_cap_that_no_config_tells_is_found(dtype):
    """A cap changes small logits by less than rounding does; it is found where hidden states are made large."""
    config = model_types.tiny_config(transformers.LlamaConfig)
    torch.manual_seed(0)
    plain = transformers.LlamaForCausalLM(config).to(dtype)
    capped = Capped(config).to(dtype)
    assert heads.plain_weight(plain) is not None
    assert heads.plain_weight(capped) is None
    assert capped.training


def test_the_head_has_the_width():
    """A model whose embedding was resized gives as many logits as its head has rows."""
    model = model_types.tiny_model("llama")
    model.resize_token_embeddings(103)
    assert 103 == outputs.head_width(model)
