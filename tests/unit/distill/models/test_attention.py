"""Documents of one sequence: models that keep them apart where positions begin at 0 again, and those that do not."""

import re
import sys

import pytest
import torch
import transformers

from sklformat.distill.models import outputs
from sklformat.distill.models.attention import check_isolates

SIZES = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
}
OLD = {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 32}
APART = {
    "llama": {},
    "qwen2": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0},
    "qwen3": {"head_dim": 4},
    "mistral": {"sliding_window": 4},
    "gemma2": {"head_dim": 4, "sliding_window": 4},
    "gemma3_text": {"head_dim": 4, "sliding_window": 4},
    "mixtral": {"num_local_experts": 4},
    "gpt2": OLD,
    "gpt_neox": {},
    "phi3": {},
    "olmo2": {},
    "falcon": {},
    "opt": {"ffn_dim": 32, "word_embed_proj_dim": 16},
    "mpt": {"d_model": 16, "n_heads": 4, "n_layers": 2},
    "gpt_oss": {"head_dim": 4, "sliding_window": 4, "num_local_experts": 2, "num_experts_per_tok": 2},
}
TOGETHER = {
    "mamba": {"state_size": 4},
    "bloom": {"n_layer": 2, "n_head": 4},
    "rwkv": {"attention_hidden_size": 16},
    "recurrent_gemma": {},
}


def make_model(kind, extra):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **SIZES | extra)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("kind", APART)
def test_documents_in_a_sequence_are_as_alone(kind):
    """Logits of a packed row equal those of each document alone within 1e-5, at other borders in each row too."""
    model = make_model(kind, APART[kind])
    check_isolates(model)
    ids = torch.randint(1, 64, (2, 24), generator=torch.Generator().manual_seed(1))
    lengths = ((7, 1, 11, 5), (3, 12, 9))
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    with torch.inference_mode():
        packed = outputs.logits(model, ids, positions)
        together = outputs.logits(model, ids)
        for row, parts in enumerate(lengths):
            begin = 0
            for n in parts:
                alone = outputs.logits(model, ids[row : row + 1, begin : begin + n])[0]
                assert (packed[row, begin : begin + n] - alone).abs().max() <= 1e-5
                begin += n
    assert (packed - together).abs().max() > 1e-3  # so that the test can fail


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", APART)
def test_documents_are_kept_apart_on_a_gpu(kind, dtype):
    """What another document says changes no logit of the next, in either type."""
    model = make_model(kind, APART[kind]).to("cuda", dtype)
    check_isolates(model)
    ids = torch.randint(1, 64, (2, 24), generator=torch.Generator().manual_seed(1)).cuda()
    positions = (torch.arange(24) % 8).repeat(2, 1).cuda()
    other = torch.where(torch.arange(24).cuda() < 16, (ids + 1) % 64, ids)
    with torch.inference_mode():
        found, behind_others = (outputs.logits(model, given, positions)[:, 16:].float() for given in (ids, other))
    assert (found - behind_others).abs().max() <= (1e-5 if dtype == torch.float32 else 0.02)


@pytest.mark.parametrize("kind", TOGETHER)
def test_models_that_mix_documents_are_refused_by_name(kind):
    """A state that goes on to the next, or no masks: one line with the kind of model and the flag; its mode stays."""
    model = make_model(kind, TOGETHER[kind]).train()
    with pytest.raises(ValueError, match=rf"a {type(model).__name__} does not keep documents apart") as caught:
        check_isolates(model)
    assert "--isolate-documents" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert model.training


def test_models_of_few_positions_are_looked_at_too():
    """The documents that are tried fit the positions that a model takes, and its dropout is out of the way."""
    few = OLD | {"n_positions": 4, "max_position_embeddings": 4, "resid_pdrop": 0.5}
    model = make_model("gpt2", few).train()
    check_isolates(model)
    assert model.training


def test_a_transformers_without_such_masks_is_named(monkeypatch):
    """The refusal has its version."""
    monkeypatch.setitem(sys.modules, "transformers.masking_utils", None)
    with pytest.raises(ValueError, match=re.escape(f"keep documents apart (transformers {transformers.__version__})")):
        check_isolates(make_model("llama", {}))


def test_a_model_that_takes_no_positions_is_refused():
    """Whatever the call ends with."""
    model = make_model("llama", {})
    forward = model.forward

    def without(input_ids, use_cache):
        return forward(input_ids=input_ids, use_cache=use_cache)

    model.forward = without
    with pytest.raises(ValueError, match="a LlamaForCausalLM does not keep documents apart"):
        check_isolates(model)


def test_half_precision_is_looked_at_with_its_own_tolerance():
    """Bfloat16 rounds, and is taken; a state that documents share is not."""
    check_isolates(make_model("llama", {}).to(torch.bfloat16))
    with pytest.raises(ValueError, match="does not keep documents apart"):
        check_isolates(make_model("mamba", TOGETHER["mamba"]).to(torch.bfloat16))
