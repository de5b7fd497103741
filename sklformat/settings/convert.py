"""The settings of ``sklformat convert``."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from sklformat.settings.limits import check_least

SourceKind = Literal[
    "auto", "skl", "npz", "parquet", "arrow", "jsonl", "safetensors",
    "distillkit", "distillkit-raw", "distillkit-legacy", "open-instruct", "megatron", "axolotl", "sampledkd",
    "miniplm", "nemo-aligner", "maxtext", "llama-cpp-kld", "eullm", "vllm", "sglang", "slime", "easydistill",
    "whittle", "automodel",
]  # fmt: skip
DestinationKind = Literal["auto", "skl", "npz", "parquet", "jsonl", "axolotl", "distillkit-raw", "megatron"]
COLUMN_NAMES = (
    "input_ids", "token_ids", "counts", "logprobs", "lse", "mask", "document",
    "label_logprob", "entropy", "document_start", "record_logprob",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """
    Convert a cache, plain columns, or files of another system, into a cache or files.

    Plain columns are input_ids (L ids), token_ids (L - 1 lists of ids) and counts or logprobs (lists beside them).
    Counts become ratios with a small loss, which is stated; ratios become counts only where nothing is lost.
    """

    source: Path
    """Cache directory, .skl shard, or file or directory of another system."""

    destination: Path
    """Cache directory or file to make; must not exist. A cache that a stopped run left is resumed."""

    from_: SourceKind = field(default="auto", metadata={"flag": "from"})
    """What the source is. auto: by what it holds where that is certain, else by the name's end."""

    to: DestinationKind = "auto"
    """What to make. auto: by the name's end; skl, a cache directory, where it has none."""

    kind: Literal["counts", "ratios"] | None = None
    """Kind of records to make; plain columns hold counts, or logprobs for ratios. None: the source's kind."""

    profile: Literal["R24", "R24W", "R32"] | None = None
    """Record layout: 17-bit ids, 18-bit ids with at most 63 rounds, 24-bit ids. None: the source's, or the smallest."""

    drop_tokens: bool = False
    """Leave the tokens out of the cache, 2 or 3 bytes per position; training then needs them from elsewhere."""

    tokens: Path | None = None
    """Token ids of each sequence for a source that has none: a .npy array [sequences, tokens], or npz, jsonl, Parquet with input_ids."""  # noqa: E501

    sequences_per_shard: int | None = None
    """Sequences in one file of a cache. None: as in the source, or 1024."""

    vocab_size: int | None = None
    """Ids are below it. None: the source says it."""

    rounds: int | None = None
    """Draws per position, the sum of its counts. None: the source says it."""

    sampler: Literal["multinomial", "systematic", "topk", "topp", "thinned", "unknown"] | None = None
    """How records were taken; topk, topp: biased. None: the source says it."""

    k: int | None = None
    """Records to keep per position, the most probable: of a source of whole distributions with sampler topk; for a system that has the same number everywhere, where None is as many as any position has."""  # noqa: E501

    seed: int | None = None
    """Seed of the draws from a source of whole distributions. None: 0."""

    drop_last_row: bool = False
    """Leave out the last row of records: for plain columns with as many rows as tokens."""

    convention: Literal["next", "own"] | None = None
    """Which token row t of the source describes: next, token t + 1; own, token t itself. None: as its kind says, or next."""  # noqa: E501

    values: Literal["logprobs", "probs", "logits"] | None = None
    """What the source's values are; logits are normalised over the ids that are there. None: as its kind says, or logprobs."""  # noqa: E501

    columns: tuple[str, ...] = ()
    """Columns under other names, as input_ids=tokens token_ids=targets[1] logprobs=targets[0]; also lse, mask and document. Then the file's own note is not read."""  # noqa: E501

    codec: Path | None = None
    """File that says how the source's values are packed. None: where its kind has it, beside the source."""

    on_bad_row: Literal["refuse", "drop"] = "refuse"
    """What to do with records that cannot be, such as NaN or ids outside the vocabulary: refuse, or drop and count."""

    def __post_init__(self) -> None:
        check_least(self, 1, "sequences_per_shard", "vocab_size", "rounds", "k")
        check_least(self, 0, "seed")
        for pair in self.columns:
            name, equals, source = pair.partition("=")
            if name not in COLUMN_NAMES or not equals or not source:
                raise ValueError(f"--columns takes NAME=NAME with the first of {', '.join(COLUMN_NAMES)}, got {pair!r}")
