"""The settings of ``sklformat rescore``."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from sklformat.format.columns import RECORD_LOGPROB, STARTS, check_names
from sklformat.format.layout import COLUMNS
from sklformat.settings.cache import ModelDtype, check_engine, name_and_revision
from sklformat.settings.limits import check_least

Weights = Literal["none", "unbiased", "normalised"]


@dataclass(frozen=True, kw_only=True)
class RescoreConfig:
    """
    Ask another teacher about the records of a cache: its log-probs at the ids that are there. No draws are made.

    The records stay, and the column record_logprob says what the other teacher says of them; or, with --weights, they
    become records of the other teacher. If stopped, the same command resumes it.
    """

    cache: str
    """Cache directory, or one .skl shard, or the URL of either."""

    teacher: str = field(metadata={"flag": "teacher"})
    """The other teacher: a directory saved by transformers' save_pretrained, or a Hugging Face name, or name@revision. Its tokenizer must be that of the cache."""  # noqa: E501

    out: Path = field(metadata={"flag": "out"})
    """Cache to write, a directory. One that a stopped run left is resumed."""

    tokens: Path | None = None
    """The tokens, for a cache that stores none: a .npy array [sequences, seq_len + 1], an mmap-ninja store, or the token store that sklformat cache wrote. None: tokens/ in the cache."""  # noqa: E501

    columns: tuple[str, ...] = ()
    """More of the other teacher's to store, separated by commas: label_logprob, entropy. Those of the cache are replaced in any case, and document_start is kept."""  # noqa: E501

    weights: Weights = "none"
    """unbiased: weights times p_B / p_A, whose mean is the other teacher's distribution; normalised: these divided by their sum, with less variance and a small bias. Both need the log-probs of the teacher that drew (cache --columns record_logprob)."""  # noqa: E501

    largest_weight: float | None = None
    """With unbiased weights: what larger ones are cut to, which is a bias. None: they stay as they are."""

    batch_size: int = 8
    """Sequences in one forward pass. Logits depend on it in their last bits."""

    dtype: ModelDtype = "auto"
    """Type of the teacher's weights and logits; auto: bfloat16 on a GPU, float32 on the CPU."""

    device: str = "auto"
    """Where it runs: cpu, cuda, cuda:1, …; auto: the GPU if there is one."""

    engine: Literal["transformers", "vllm"] = "transformers"
    """What runs the teacher; vllm: any model that vLLM serves, faster, but no other run repeats the bytes (docs/engines.md)."""  # noqa: E501

    tensor_parallel: int = 1
    """With engine vllm: devices that one teacher is divided between."""

    gpu_memory: float | None = None
    """With engine vllm: share of a GPU's memory that it takes, in (0, 1]. None: what vLLM takes."""

    device_map: Literal["one", "auto"] = "one"
    """auto: spread a teacher that is too large for one GPU over all of them (needs accelerate)."""

    trust_remote_code: bool = False
    """Run the code that came with the teacher. Look at it first."""

    adapter_base: str | None = None
    """If the teacher is an adapter (peft): the model that it belongs to; none: as the adapter says."""

    def __post_init__(self) -> None:
        names = {name for given in self.columns for name in given.split(",")}
        check_names(names)
        if STARTS in names:
            raise ValueError(f"columns: {STARTS} is no teacher's to say; where the cache has it, it is kept")
        object.__setattr__(self, "columns", tuple(name for name in COLUMNS if name in names - {RECORD_LOGPROB}))
        check_least(self, 1, "batch_size")
        check_engine(self)
        if self.largest_weight is not None:
            if self.weights != "unbiased":
                raise ValueError(f"largest_weight belongs to weights unbiased, weights is {self.weights}")
            if not (math.isfinite(self.largest_weight) and self.largest_weight > 0):
                raise ValueError(f"largest_weight must be positive and finite, got {self.largest_weight}")

    @property
    def teacher_name(self) -> str:
        """Path or name of the teacher, without its revision."""
        return name_and_revision(self.teacher)[0]

    @property
    def revision(self) -> str | None:
        """Revision of a teacher on the hub; None: its newest."""
        return name_and_revision(self.teacher)[1]
