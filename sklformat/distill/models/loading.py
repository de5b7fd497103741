"""
Causal language models and tokenizers: loaded, created, compared and saved through transformers.

Knows no cache, no loss and no training loop. Everything works offline; nothing is printed.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypedDict

import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sklformat.distill.models import adapters, outputs, tokenization
from sklformat.distill.models.attention import check_causal
from sklformat.distill.models.guards import RefusedError, division, named, quiet, writing
from sklformat.files.directories import published

Dtype = Literal["float32", "bfloat16", "float16"]


class Named(TypedDict, total=False):
    """How what a user names is loaded; see ``load_model``."""

    revision: str | None
    trust_remote_code: bool
    adapter_base: str | None


def named_of(config: Any) -> Named:
    """What the settings of a verb say of it."""
    return {"trust_remote_code": config.trust_remote_code, "adapter_base": config.adapter_base}


_OF_TOKENIZERS = (
    *("tokenizer_config.json", "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt"),
    *("spiece.model", "sentencepiece.bpe.model", "tekken.json"),
)


def load_tokenizer(
    path: Path | str, *, revision: str | None = None, trust_remote_code: bool = False, adapter_base: str | None = None
) -> PreTrainedTokenizerBase:
    """
    Load a tokenizer.

    Args:
        path: A directory that ``save_pretrained`` wrote, or a name that the Hugging Face cache (or hub) knows. Of an
            adapter without a tokenizer of its own, it is the base model's.
        revision: Of a name on the hub: branch, tag or commit.
        trust_remote_code: Whether code that came with it may be run.
        adapter_base: As for ``load_model``.

    Raises:
        OSError: No tokenizer there.
        ValueError: It needs code that came with it; or the model of an adapter is not there.
    """
    path = str(path)
    with quiet(), named(path, "tokenizer") as local:
        adapter = adapters.find_adapter(path, revision=revision, local=local) if _is_bare(path) else None
        if adapter is None:
            return transformers.AutoTokenizer.from_pretrained(
                path, revision=revision or "main", local_files_only=local, trust_remote_code=trust_remote_code
            )
    with adapters.of_another(path):
        base = adapters.base_of(path, adapter, adapter_base)
        return load_tokenizer(base, revision=adapter.get("revision"), trust_remote_code=trust_remote_code)


def load_own_tokenizer(path: str, **how: Any) -> PreTrainedTokenizerBase | None:
    """
    As ``load_tokenizer``; None for the directory of a model that holds none, which is no fault of it.

    Raises:
        OSError, ValueError: There is one, and it cannot be loaded.
    """
    if _is_bare(path) and adapters.find_adapter(path, revision=how.get("revision"), local=True) is None:
        return None
    return load_tokenizer(path, **how)


def _is_bare(path: str) -> bool:
    """Whether a path is a directory without anything of a tokenizer."""
    return Path(path).is_dir() and not any((Path(path) / name).is_file() for name in _OF_TOKENIZERS)


def load_model(
    path: Path | str,
    *,
    dtype: Dtype = "float32",
    device: torch.device | str = "cpu",
    revision: str | None = None,
    over: Sequence[int] = (),
    tensor_parallel: int = 1,
    trust_remote_code: bool = False,
    adapter_base: str | None = None,
) -> PreTrainedModel:
    """
    Load a causal language model, ready for inference: its logits are those of transformers' own call.

    A model for images and text as well is run over text; an adapter is merged into the model that it belongs to.
    Nothing is asked on the terminal.

    Args:
        path: A directory that ``save_pretrained`` wrote, or a name that the Hugging Face cache (or hub) knows.
        dtype: Type of its weights in memory.
        device: "cpu", "cuda", "cuda:1", …
        revision: Of a name on the hub: branch, tag or commit.
        over: Numbers of GPUs to spread its layers over, instead of ``device``; needs accelerate.
        tensor_parallel: Processes of ``torch.distributed``; more than 1: each has a part, by the plan of transformers.
        trust_remote_code: Whether code that came with the model may be run. A type that transformers itself knows needs
            none.
        adapter_base: Where ``path`` is an adapter: the model that it belongs to; None: as the adapter says.

    Returns:
        The model in eval mode (no dropout).

    Raises:
        OSError: No model there, or a library missing that its weights are quantised by.
        ValueError: The files lack some of the model's weights, or hold some of another shape; it does not fit ``over``;
            it cannot be divided; it is no causal language model; it needs code that came with it; the model of an
            adapter is not there.
        ModuleNotFoundError: ``over`` is given and accelerate is not installed; an adapter, and peft is not.
    """
    if over and importlib.util.find_spec("accelerate") is None:  # transformers would say so in several lines
        raise ModuleNotFoundError("spreading a model over several GPUs needs accelerate", name="accelerate")
    path = str(path)
    with quiet(), named(path, "model") as local:
        adapter = adapters.find_adapter(path, revision=revision, local=local)
    if adapter is None:
        model = _load_whole(path, dtype, device, revision, over, tensor_parallel, trust_remote_code)
    elif tensor_parallel > 1:
        raise ValueError(f"{path}: an adapter, which is merged into a whole model; save that, and divide it")
    else:
        adapters.require_peft()
        base = adapters.base_of(path, adapter, adapter_base)
        with adapters.of_another(path):
            model = load_model(
                base,
                dtype=dtype,
                device=device,
                revision=adapter.get("revision"),
                over=over,
                trust_remote_code=trust_remote_code,
            )
        with quiet(), named(path, "adapter") as local:
            model = adapters.merged(model, path, adapter, revision=revision, local=local)
    model.eval()
    try:
        check_causal(model)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return model


def load_adapted(
    path: str,
    lora: adapters.Lora,
    *,
    dtype: Dtype = "float32",
    revision: str | None = None,
    trust_remote_code: bool = False,
    adapter_base: str | None = None,
) -> Any:
    """
    Load a model with an adapter that alone learns: a new one beside a whole model, or the one at ``path``.

    Args:
        path: A model, or an adapter that is to be trained further.
        lora: The adapter.
        dtype: Type of the model's weights; the adapter's are float32.
        revision: As for ``load_model``.
        trust_remote_code: As for ``load_model``.
        adapter_base: As for ``load_model``.

    Returns:
        A model of peft, on the CPU.

    Raises:
        OSError, ValueError, ModuleNotFoundError: As ``load_model``, ``adapters.with_lora`` and
            ``adapters.with_adapter``.
    """
    adapters.require_peft()
    how: dict[str, Any] = {"dtype": dtype, "trust_remote_code": trust_remote_code}
    with quiet(), named(path, "model") as local:
        adapter = adapters.find_adapter(path, revision=revision, local=local)
    if adapter is None:
        model = load_model(path, revision=revision, **how)
        check_trainable(model)
        return adapters.with_lora(model, lora, base=path)
    base = adapters.base_of(path, adapter, adapter_base)
    with adapters.of_another(path):
        model = load_model(base, revision=adapter.get("revision"), **how)
    check_trainable(model)
    values = adapter | {"base_model_name_or_path": str(Path(base).absolute()) if Path(base).is_dir() else base}
    with quiet(), named(path, "adapter") as local:
        return adapters.with_adapter(model, path, values, lora, revision=revision, local=local)


def _load_whole(
    path: str,
    dtype: Dtype,
    device: torch.device | str,
    revision: str | None,
    over: Sequence[int],
    tensor_parallel: int,
    trust_remote_code: bool,
) -> PreTrainedModel:
    """A model that is no adapter, on its devices."""
    with quiet(), named(path, "model") as local:
        source = {"revision": revision or "main", "local_files_only": local, "trust_remote_code": trust_remote_code}
        config = transformers.AutoConfig.from_pretrained(path, **source)
        placed: dict[str, object] = {}
        if tensor_parallel > 1:
            placed = {"distributed_config": division(tensor_parallel)}
        elif over:
            memory = {number: torch.cuda.mem_get_info(number)[0] * 9 // 10 for number in over}
            placed = {"device_map": "auto", "max_memory": memory}
        elif getattr(config, "quantization_config", None) is not None:  # such weights cannot be moved later
            placed = {"device_map": {"": device}}
        model, info = _auto_class(path, config).from_pretrained(
            path, dtype=getattr(torch, dtype), output_loading_info=True, **source, **placed
        )
    for what in ("missing_keys", "mismatched_keys"):
        if info[what]:  # transformers would continue with random weights
            names = ", ".join(sorted(map(str, info[what]))[:3])
            raise ValueError(f"{path}: not all weights of a {type(model).__name__} are there ({what}: {names})")
    elsewhere = sorted({str(place) for place in getattr(model, "hf_device_map", {}).values() if place not in over})
    if over and elsewhere:
        raise ValueError(
            f"{path}: does not fit the CUDA devices {', '.join(map(str, over))}, a part would lie on "
            f"{', '.join(elsewhere)}; give it more devices, or a smaller dtype"
        )
    if tensor_parallel > 1 and not any(hasattr(parameter, "full_tensor") for parameter in model.parameters()):
        raise ValueError(f"{path}: transformers has no plan by which a {type(model).__name__} is divided; run it whole")
    return model if placed else model.to(device)


def _auto_class(path: str, config: Any) -> Any:
    """What loads a model of a config: a causal language model, or one for images, sound and text, run over text."""
    if getattr(config, "is_encoder_decoder", False):
        raise RefusedError(f"{path}: a {config.model_type} is an encoder with a decoder; use a causal language model")
    if type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING or hasattr(config, "auto_map"):
        return transformers.AutoModelForCausalLM
    for kind in ("MULTIMODAL_LM", "IMAGE_TEXT_TO_TEXT"):  # the first is in newer versions of transformers
        if type(config) in getattr(transformers, f"MODEL_FOR_{kind}_MAPPING", ()):
            auto = {"MULTIMODAL_LM": "AutoModelForMultimodalLM", "IMAGE_TEXT_TO_TEXT": "AutoModelForImageTextToText"}
            return getattr(transformers, auto[kind])
    raise RefusedError(f"{path}: transformers has no causal language model of type {config.model_type}; use another")


def new_llama(
    *,
    vocab_size: int,
    hidden_size: int,
    num_layers: int,
    num_heads: int,
    max_positions: int,
    seed: int,
    tie: bool = False,
    separator_id: int | None = None,
) -> PreTrainedModel:
    """
    Make a small Llama with random weights: RMSNorm, rotary positions, SwiGLU of 8/3 the hidden size, no dropout.

    Args:
        vocab_size: V.
        hidden_size: D, a multiple of twice ``num_heads``.
        num_layers: Number of layers.
        num_heads: Attention heads of a layer.
        max_positions: Longest sequence, positions.
        seed: Seed of the weights: equal seeds give equal weights. The global generator is left as it is.
        tie: Whether input and output share one embedding.
        separator_id: Token that begins and ends texts, for ``generate``.

    Returns:
        A float32 model on the CPU, in train mode.

    Raises:
        ValueError: ``hidden_size`` does not divide.
    """
    if hidden_size % (2 * num_heads):
        raise ValueError(f"hidden_size must be a multiple of twice num_heads, got {hidden_size} and {num_heads}")
    config = transformers.LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=-(-8 * hidden_size // 96) * 32,  # 8/3, up to a multiple of 32
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_heads,
        max_position_embeddings=max_positions,
        tie_word_embeddings=tie,
        bos_token_id=separator_id,
        eos_token_id=separator_id,
    )
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return transformers.LlamaForCausalLM(config).train()


def check_fit(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, *, seq_len: int | None = None) -> int:
    """
    Make sure that a model can read a tokenizer's ids, and sequences of a length.

    Many models pad their head to a round number; ids at and above the returned number mean nothing, so leave their
    logits out: ``logits[..., :check_fit(tokenizer, model)]``. Some tokenizers have tokens added beyond the head: these
    do not widen it, and a text that holds one is refused where it is read.

    Args:
        tokenizer: The tokenizer.
        model: The model.
        seq_len: Positions the model has to take at once; None: not checked.

    Returns:
        Number of ids that mean something, at most the width of the head.

    Raises:
        ValueError: The tokenizer has ids beyond the model's that are no added tokens, or the model takes fewer
            positions than ``seq_len``.
    """
    vocab_size = tokenization.common_ids(tokenizer, outputs.head_width(model))
    if seq_len is not None:
        check_length(model, seq_len)
    return vocab_size


def check_length(model: PreTrainedModel, seq_len: int) -> None:
    """
    Make sure that a model takes sequences of a length.

    Raises:
        ValueError: It takes fewer positions.
    """
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and seq_len > limit:
        raise ValueError(f"seq_len {seq_len} is beyond the {limit} positions that the model takes; use a smaller one")


def check_trainable(model: PreTrainedModel) -> None:
    """
    Make sure that a model's weights can learn.

    Raises:
        ValueError: They are quantised.
    """
    if getattr(model, "hf_quantizer", None) is not None and not all(map(torch.is_floating_point, model.parameters())):
        raise ValueError(f"the weights of this {type(model).__name__} are quantised and cannot learn; use others")


def versions() -> dict[str, str]:
    """Versions of the libraries that a model's logits depend on."""
    return {"torch": str(torch.__version__), "transformers": str(transformers.__version__)}


def save(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: Path | str, *, replace: bool = False
) -> None:
    """
    Save model and tokenizer for transformers; the directory appears whole or not at all.

    Args:
        model: The model.
        tokenizer: The tokenizer of its ids.
        directory: Where to.
        replace: Whether an existing directory may be replaced.

    Raises:
        FileExistsError, InUseError, OSError: As ``published``.
    """
    with published(directory, replace=replace) as partial:
        write(model, tokenizer, partial)


def write(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    directory: Path,
    weights: dict[str, torch.Tensor] | None = None,
) -> None:
    """
    Write the files of model and tokenizer into a directory that someone else publishes.

    Args:
        model: The model, or one of peft, of which the adapter is written.
        tokenizer: The tokenizer of its ids.
        directory: Where to.
        weights: Its weights, whole, where the model's own are divided between processes; None: the model's own.

    Raises:
        OSError: The system's own, of a full disk for one.
    """
    # Beside an adapter on the head peft would write the head as well, which its model has.
    alone = {"save_embedding_layers": False} if adapters.is_adapted(model) else {}
    with quiet(), writing(directory):
        model.save_pretrained(directory, state_dict=weights, **alone)
        tokenizer.save_pretrained(directory)
