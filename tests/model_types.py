"""
Every causal type that transformers knows, at a size for a test; run as a program, a table of which are exact.

Types that read images or sound as well are run over text.

A type's config is made small by the names of its fields; what that breaks is mended by hand in ``_MENDED``.
"""

import re
import sys
import warnings

import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES as WRAPPERS

from sklformat.distill.models.attention import check_causal
from sklformat.distill.models.outputs import head_width, logits
from sklformat.distill.teacher.forward import Teacher

VOCAB, SEQUENCES, POSITIONS = 96, 2, 24
_MOST_WEIGHTS = 30_000_000

# What fields become where they are greater, by their names.
_SMALL = {
    VOCAB: ("(n_)?vocab(_size)?", "vocab_size_per_layer_input"),
    64: ("max_position_embeddings", "n_positions", "n_ctx", "max_seq(uence)?_len(gth)?"),
    32: (
        "hidden_(size|dim)", "d_model", "(model_)?dim", "(n_|d_|word_)?emb(d|ed|edding)?(_dim|_size|_proj_dim)?",
        "lru_width", "attention_hidden_size", "(moe_)?(shared_)?(expert_)?intermediate_size(_mlp)?",
        "((en|de)coder_)?ffn_dim", "n_inner", "(expert_)?ffn_hidden_size", "d_ff|d_inner|dim_ff|dff|mlp_dim",
        "block_ff_dim", "feed_forward_size",
    ),
    16: ("(attention_|global_)?head_dim", "kv_channels"),
    8: (
        "(q|kv)_lora_rank", "(qk_nope|qk_rope|v)_head_dim", "hidden_size_per_layer_input", "(ssm_)?state_size",
        "mamba_d_state", "sliding_window", "attention_window_size", "rotary_dim",
    ),
    4: ("num_(local_|routed_)?experts", "n_routed_experts", "moe_num_experts"),
    2: (
        "num_hidden_layers", "n_layers?", "num_layers", "(num_)?(en|de)coder_layers", "num_blocks", "n_heads?",
        "num_heads", "(num_)?((en|de)coder_)?attention_heads", "num_(key_value|kv)_heads", "top_k_experts",
        "(num_)?experts_per_tok(en)?", "moe_top_?k", "moe_k",
    ),
    1: (
        "n_group", "topk_group", "num_expert_group", "moe_layer_start_index", "first_k_dense_replace",
        "num_dense_layers",
    ),
    0: ("pad_token_id",),
}  # fmt: skip
# Neutral or absent by default; a head that is more than one matrix is what there is to test.
_NOT_NEUTRAL = {
    **dict.fromkeys(("final_logit_softcapping", "output_logit_soft_cap", "logits_soft_cap"), 2.0),
    **dict.fromkeys(("logit_scale", "logits_scaling", "lm_head_multiplier", "logits_mup_width_multiplier"), 0.5),
}
_HYBRID = {"num_hidden_layers": 4, "layer_types": ["linear_attention", "hybrid"] * 2, "attention_hidden_size": 64}
_MENDED = {
    **{name: {"head_dim": 8} for name in ("axk1", "deepseek_v3", "longcat_flash", "youtu")},
    **{name: {"mamba_n_heads": 4, "mamba_d_head": 16} for name in ("bamba", "granitemoehybrid")},
    **{name: {"head_dim": 16} for name in ("hunyuan_v1_dense", "hunyuan_v1_moe", "ministral")},
    "bert": {"is_decoder": True},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 4, "head_dim": 16, "n_groups": 2},
    "mimo_v2_flash": {"num_key_value_heads": 1, "v_head_dim": 16, "head_dim": 16},
    "nemotron": {"num_key_value_heads": 2},
    "reformer": {
        "is_decoder": True, "axial_pos_embds_dim": (8, 24), "axial_pos_shape": (4, 6), "num_attention_heads": 2,
        "attention_head_size": 16, "attn_layers": ("local", "lsh"), "num_buckets": 2, "hash_seed": 0,
    },
    "xmod": {"default_language": "en_XX"},
    **{
        name: {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}
        for name in (
            "glm4v_text", "glm_ocr_text", "paddleocr_vl_text", "qwen2_5_omni_text", "qwen2_5_vl_text", "qwen2_vl_text",
        )
    },
    "zamba": _HYBRID,
    "zamba2": _HYBRID | {"hybrid_layer_ids": [1, 3], "mamba_headdim": 8},
}  # fmt: skip


def tiny_config(config_class, **more):
    """A config of a class, small in every field whose name is known, and in the configs inside of it."""
    values = {}
    for name, value in vars(config_class()).items():
        if isinstance(value, transformers.PretrainedConfig):
            values[name] = tiny_config(type(value))
        elif type(value) is int:
            sizes = [most for most, names in _SMALL.items() if re.fullmatch("|".join(names), name)]
            if sizes:
                values[name] = min(value, sizes[0])
        if name in _NOT_NEUTRAL:
            values[name] = _NOT_NEUTRAL[name]
    return config_class(**values | _MENDED.get(config_class.model_type, {}) | more)


def tiny_model(model_type, *, auto=transformers.AutoModelForCausalLM, **more):
    """
    A model of a type with random weights, large enough for every part to show in the logits.

    Raises:
        Exception: As transformers sees fit.
    """
    config = tiny_config(CONFIG_MAPPING[model_type], **more)
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in auto.from_config(config).parameters())
    if size > _MOST_WEIGHTS:
        raise ValueError(f"{size:,} weights; no small config is known")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = auto.from_config(config).eval()
        with torch.no_grad():
            for parameter in filter(torch.is_floating_point, model.parameters()):
                width = parameter.shape[-1] if parameter.dim() > 1 else 10
                parameter.add_(torch.randn(parameter.shape), alpha=0.5 * width**-0.5)
    return model


def compare(model):
    """
    What capture sees of a model against the model's own call, over a batch that fits one slice: max |Δ|.

    Returns:
        "linear", "head" or "whole", as the teacher runs its head, and the greatest difference.

    Raises:
        ValueError: The model is refused.
    """
    check_causal(model)
    ids = torch.arange(SEQUENCES * POSITIONS).reshape(SEQUENCES, POSITIONS) % VOCAB
    with torch.inference_mode():
        expected = logits(model, ids)
    assert expected.isfinite().all()
    teacher = Teacher(model, head_width(model))
    given = teacher.run(ids.numpy().astype("uint32"))
    found = torch.stack([torch.cat([part for _, part in teacher.logits(sequence)]) for sequence in given])
    assert expected.shape == found.shape
    return teacher.way, float((expected - found).abs().max())


def judge(model_type):
    """What becomes of a type: exact, refused, not built or DIFFERS, and why."""
    auto = transformers.AutoModelForCausalLM if model_type in NAMES else transformers.AutoModelForMultimodalLM
    try:
        model = tiny_model(model_type, auto=auto)
    except Exception as error:  # noqa: BLE001
        return "not built", f"{type(error).__name__}: {error}"
    try:
        way, difference = compare(model)
    except ValueError as error:
        return "refused", str(error)
    return ("exact", way) if difference == 0 else ("DIFFERS", f"{way}, max |Δ| = {difference:.1e}")


def main():
    """Print a table of causal types and one of the others, and how many there are of each; exit 1 where any differs."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    found = []
    for title, names in (("causal", sorted(NAMES)), ("with images or sound", sorted(WRAPPERS.keys() - NAMES.keys()))):
        counts = dict.fromkeys(("exact", "refused", "not built", "DIFFERS"), 0)
        chosen = [name for name in names if len(sys.argv) == 1 or name in sys.argv[1:]]
        for model_type in chosen:
            became, why = judge(model_type)
            counts[became] += 1
            name = (NAMES | WRAPPERS)[model_type]
            print(f"{model_type:26} {name:46} {became:10} {' '.join(why.split())[:150]}", flush=True)
        print(f"{title}: {', '.join(f'{count} {became}' for became, count in counts.items())}\n")
        found.append(counts)
    return int(any(counts["DIFFERS"] for counts in found))


if __name__ == "__main__":
    sys.exit(main())
