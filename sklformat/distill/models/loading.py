"""
Causal language models and tokenizers: loaded, created, compared and saved through transformers.

Knows no cache, no loss and no training loop. Everything works offline; nothing is printed.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import torch
import transformers
from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sklformat.distill.models import hub, tokenization
from sklformat.distill.models.causality import check_causal
from sklformat.files.directories import published

Dtype = Literal["float32", "bfloat16", "float16"]


def load_tokenizer(path: Path | str, *, revision: str | None = None) -> PreTrainedTokenizerBase:
    """
    Load a tokenizer.

    Args:
        path: A directory that ``save_pretrained`` wrote, or a name that the Hugging Face cache (or hub) knows.
        revision: Of a name on the hub: branch, tag or commit.

    Raises:
        OSError: No tokenizer there.
    """
    with _quiet(), _named(path, "tokenizer") as local:
        return transformers.AutoTokenizer.from_pretrained(
            str(path), revision=revision or "main", local_files_only=local
        )


def load_model(
    path: Path | str,
    *,
    dtype: Dtype = "float32",
    device: torch.device | str = "cpu",
    revision: str | None = None,
    over: Sequence[int] = (),
) -> PreTrainedModel:
    """
    Load a causal language model, ready for inference.

    Args:
        path: A directory that ``save_pretrained`` wrote, or a name that the Hugging Face cache (or hub) knows.
        dtype: Type of its weights in memory.
        device: "cpu", "cuda", "cuda:1", …
        revision: Of a name on the hub: branch, tag or commit.
        over: Numbers of GPUs to spread its layers over, instead of ``device``; needs accelerate.

    Returns:
        The model in eval mode (no dropout).

    Raises:
        OSError: No model there.
        ValueError: The files lack some of the model's weights, or hold some of another shape; it does not fit ``over``;
            it is no causal language model.
        ModuleNotFoundError: ``over`` is given and accelerate is not installed.
    """
    spread: dict[str, object] = {}
    if over:
        if importlib.util.find_spec("accelerate") is None:  # transformers would say so in several lines
            raise ModuleNotFoundError("spreading a model over several GPUs needs accelerate", name="accelerate")
        memory = {number: torch.cuda.mem_get_info(number)[0] * 9 // 10 for number in over}
        spread = {"device_map": "auto", "max_memory": memory}
    with _quiet(), _named(path, "model") as local:
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            str(path),
            dtype=getattr(torch, dtype),
            output_loading_info=True,
            revision=revision or "main",
            local_files_only=local,
            **spread,
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
    model = (model if over else model.to(device)).eval()
    try:
        check_causal(model)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return model


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
    with _quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return transformers.LlamaForCausalLM(config).train()


def check_fit(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, *, seq_len: int | None = None) -> int:
    """
    Make sure that a model can read a tokenizer's ids, and sequences of a length.

    Many models pad their head to a round number; ids at and above the returned number mean nothing, so leave their
    logits out: ``logits[..., :check_fit(tokenizer, model)]``.

    Args:
        tokenizer: The tokenizer.
        model: The model.
        seq_len: Positions the model has to take at once; None: not checked.

    Returns:
        Number of ids that mean something, at most the width of the head.

    Raises:
        ValueError: The model has fewer ids than the tokenizer, or takes fewer positions than ``seq_len``.
    """
    wanted, width = tokenization.num_ids(tokenizer), int(model.config.get_text_config().vocab_size)
    if width < wanted:
        raise ValueError(f"the tokenizer has {wanted} ids, the model only {width}; they do not belong together")
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if seq_len is not None and limit is not None and seq_len > limit:
        raise ValueError(f"seq_len {seq_len} is beyond the {limit} positions that the model takes; use a smaller one")
    return wanted


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


def write(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """Write the files of model and tokenizer into a directory that someone else publishes."""
    with _quiet():
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' log lines and progress bars out of ours; what matters in them is checked here instead."""
    log = transformers.utils.logging
    verbosity, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(verbosity)
        if bars:
            log.enable_progress_bar()


@contextlib.contextmanager
def _named(path: Path | str, what: str) -> Iterator[bool]:
    """Say in one line what could not be loaded from where; gives whether the hub must not be asked for it."""
    not_asked = ""
    try:
        not_asked = hub.why_not_asked(str(path))
        yield bool(not_asked)
    except (OSError, ValueError, SafetensorError) as error:
        raise OSError(f"{path}: cannot load a {what}{_reason(path, not_asked, error)}") from error


def _reason(path: Path | str, not_asked: str, error: Exception) -> str:
    """Why nothing can be loaded from a path or name, and what the user may have meant by it."""
    if isinstance(error, FileNotFoundError) and error.filename == str(path):
        return f"; {error.strerror}"
    if not_asked:
        return f"; there is no such directory, it is not (or not whole) in the Hugging Face cache, and {not_asked}"
    # A first line that ends in a colon says nothing without what it announces.
    first, _, rest = str(error).strip().partition("\n")
    reason = " ".join(f"{first} {rest}".split()) if first.rstrip().endswith(":") else first
    if not Path(path).exists():
        return f"; there is no such directory, and the Hugging Face hub does not give it ({reason})"
    inside = Path(path) / "model"  # of a directory that sklformat train made
    return (f"; did you mean {inside}?" if (inside / "config.json").exists() else "") + f" ({reason})"
