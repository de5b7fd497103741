"""
What a model is known by, wherever it lies: fingerprints of its weights and of its config.

Loads nothing.  Equal fingerprints say: the same logits, up to libraries and hardware.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from sklformat.checksums import fingerprint, fingerprint_of

# Of a config, what does not change the logits or is stored elsewhere: names, library versions, the type in memory.
_NOT_THE_MODEL = frozenset(
    {"_name_or_path", "_commit_hash", "_attn_implementation", "architectures", "dtype", "torch_dtype"}
    | {"transformers_version", "use_cache", "distributed_config"}
)
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
_READ_BYTES = 16 << 20


def model_fingerprint(model: torch.nn.Module) -> str:
    """
    XXH3-128 of a model: its config's fingerprint, then its weights in the type they have in memory.

    The weights come as names, types, shapes and bytes in the order of names. The config belongs to it, since equal
    weights with another rope_theta, or another number of heads, give other logits.

    Returns:
        32 hexadecimal digits.
    """

    def parts() -> Iterator[bytes | memoryview]:
        yield config_fingerprint(model).encode()
        for name, tensor in sorted(model.state_dict().items()):
            if hasattr(tensor, "full_tensor"):
                tensor = tensor.full_tensor()  # noqa: PLW2901  one after the other is whole
            yield f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode()
            yield tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data

    return fingerprint_of(parts())


def checkpoint_fingerprint(directory: Path, model: Any) -> str:
    """
    XXH3-128 of a model as it lies on disk, for whoever cannot load it: its config's fingerprint, then its weights.

    The weights come as names, sizes and bytes of files in the order of names, so that other files of the same weights
    have another fingerprint.

    Args:
        directory: Where its files are.
        model: What has its ``config``.

    Returns:
        32 hexadecimal digits, never those of ``model_fingerprint``.

    Raises:
        FileNotFoundError: No file of weights.
    """
    files = sorted(path for path in directory.iterdir() if path.suffix in _WEIGHTS)
    if not files:
        raise FileNotFoundError(f"{directory}: holds no weights ({', '.join(_WEIGHTS)})")

    def parts() -> Iterator[bytes]:
        yield b"checkpoint:" + config_fingerprint(model).encode()
        for path in files:
            yield f"{path.name}:{path.stat().st_size};".encode()
            with path.open("rb") as file:
                while part := file.read(_READ_BYTES):
                    yield part

    return fingerprint_of(parts())


def config_fingerprint(model: torch.nn.Module) -> str:
    """
    XXH3-128 of what a model's config says beyond its class's defaults, as canonical JSON; names and versions left out.

    Returns:
        32 hexadecimal digits; those of an empty config for a model that has none.
    """
    config: Any = getattr(model, "config", None)
    values = {} if config is None else config.to_diff_dict()
    text = json.dumps(_of_the_model(values), sort_keys=True, separators=(",", ":"), default=str)
    return fingerprint(text.encode("ascii"))


def _of_the_model(value: Any) -> Any:
    """A config without what does not change the logits, also in the configs inside of it."""
    if not isinstance(value, dict):
        return value
    return {name: _of_the_model(inner) for name, inner in value.items() if name not in _NOT_THE_MODEL}
