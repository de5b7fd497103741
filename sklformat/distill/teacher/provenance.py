"""
What ``sklformat cache`` can be told, and what of it goes into the header of a shard.

Runs nothing.  Everything that a cache's bytes depend on stands in its header, so that a cache made otherwise is never
gone on with.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sklformat.distill.models.loading import Dtype
from sklformat.distill.text.packing import PackedSequences
from sklformat.errors import SettingsError
from sklformat.files import remote
from sklformat.format import layout, order
from sklformat.format.header import Header
from sklformat.sampler import MAX_COUNT_ROUNDS, MAX_K, MAX_ROUNDS

_MAX_SMALL_K = 255  # records of a position that one byte counts
_RAREST_LOG2 = 60  # 2^-60: less probable ids are not met in 10^12 positions


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """
    Run a teacher over text and keep sparse records of its predictions; given again, it goes on where it stopped.

    Many GPUs: torchrun --nproc-per-node 8 -m sklformat cache …, on one machine or many.
    """

    teacher: str
    """Teacher: a directory saved by transformers' save_pretrained, or a Hugging Face name, or name@revision. Its tokenizer is used."""  # noqa: E501

    out: str | Path
    """Cache: a directory, or a URL (s3://, gs://, hf://, …). One that a stopped run left is gone on with."""

    work_dir: Path | None = None
    """With a URL: directory here for the shards that are not uploaded yet."""

    text: tuple[Path, ...] = ()
    """Text to run over: files (UTF-8, or .jsonl with a field "text") and directories of them."""

    dataset: tuple[str, ...] = ()
    """Hugging Face dataset to run over instead: name and, where it has several, configuration; or its directory."""

    dataset_split: str = "train"
    """Part of the dataset."""

    dataset_field: str = "text"
    """Column of the dataset that holds the text."""

    tokens: Path | None = None
    """Tokens to run over instead, made earlier with the teacher's tokenizer: a token store, or a RaggedMmap of mmap_ninja."""  # noqa: E501

    seq_len: int = 1024
    """Positions in a sequence; the student must train on the same."""

    num_sequences: int | None = None
    """How many sequences to cache. None: all that the text gives."""

    first_sequence: int = 0
    """Number of the packed sequence that becomes sequence 0 of the cache."""

    sampler: Literal["multinomial", "systematic", "topk", "topp"] = "multinomial"
    """How records are taken from the teacher's distribution. The first two are unbiased, the others are not."""

    rounds: int = 50
    """Draws a position, for multinomial and systematic."""

    k: int | None = None
    """Tokens kept a position, for topk; bound of the tokens kept, for topp."""

    p: float | None = None
    """Share of the probability kept, in (0, 1], for topp."""

    proposal_temperature: float = 1.0
    """Exponent t of the proposal q ∝ p^t that tokens are drawn from; 1: the teacher's distribution, kept as counts."""

    unbiased_weights: bool = False
    """With a proposal: weights p / q / rounds as they are, unbiased; else divided by their sum, as in the paper."""

    seed: int = 0
    """Seed of the draws."""

    packing_seed: int = 0
    """Seed of the order in which documents are packed; the student must pack by the same."""

    sequences_per_shard: int = 1024
    """Sequences in one file."""

    batch_size: int = 8
    """Sequences in one forward pass of the teacher. Logits depend on it in their last bits."""

    dtype: Dtype | Literal["auto"] = "auto"
    """Type of the teacher's weights and logits; auto: bfloat16 on a GPU, float32 on the CPU."""

    device: str = "auto"
    """Where it runs: cpu, cuda, cuda:1, …; auto: the GPU if there is one. Each process takes a GPU of its own, which draws counts itself."""  # noqa: E501

    device_map: Literal["one", "auto"] = "one"
    """auto: lay a teacher that is too large for one GPU over all those of the process (needs accelerate)."""

    store_tokens: bool = True
    """Whether the cache holds the tokens as well (2 or 3 bytes a position), so that training needs no text."""

    ring_mib: int = 64
    """Shared memory between the teacher and the writer process, MiB."""

    keep_versions: bool = False
    """Go on with a cache that other versions of torch, transformers or sklformat began: sound, but not to be repeated bit for bit."""  # noqa: E501

    def __post_init__(self) -> None:
        if sum((bool(self.text), bool(self.dataset), self.tokens is not None)) != 1:
            raise ValueError("give either text or tokens (a token store), or a dataset")
        for name in ("seq_len", "sequences_per_shard", "batch_size", "ring_mib"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        if self.num_sequences is not None and self.num_sequences < 1:
            raise ValueError(f"num_sequences must be >= 1, got {self.num_sequences}")
        if remote.is_url(self.out) != (self.work_dir is not None):
            raise ValueError(
                f"out {self.out} is a URL: give work_dir, a directory here for shards that are not uploaded yet"
                if self.work_dir is None
                else f"work_dir belongs to an out that is a URL, got {self.out}"
            )
        if self.work_dir is not None and ":/" in str(self.work_dir):
            raise ValueError(f"work_dir {self.work_dir} is a URL, must be a directory here")
        self._check_sampler()

    def _check_sampler(self) -> None:
        if self.draws and not 1 <= self.rounds <= MAX_ROUNDS:
            raise ValueError(f"rounds must be >= 1 and <= {MAX_ROUNDS} for sampler {self.sampler}, got {self.rounds}")
        if self.sampler == "topk" and (self.k is None or not 1 <= self.k <= MAX_K):
            raise ValueError(f"sampler topk needs k in 1..{MAX_K}, got {self.k}")
        if self.sampler == "topp" and (self.p is None or not 0 < self.p <= 1):
            raise ValueError(f"sampler topp needs p in (0, 1], got {self.p}")
        if self.draws and (self.k is not None or self.p is not None):
            raise ValueError(f"k and p belong to topk and topp, not to sampler {self.sampler}")
        if not self.draws and self.proposal_temperature != 1:
            raise ValueError(f"sampler {self.sampler} draws nothing, so proposal_temperature must be 1")
        if not 0.001 <= self.proposal_temperature <= 100:  # false for NaN
            raise ValueError(f"proposal_temperature must be in 0.001..100, got {self.proposal_temperature}")
        if self.unbiased_weights and self.proposal_temperature == 1:
            raise ValueError(
                "unbiased_weights belongs to a proposal_temperature other than 1; at 1 nothing is weighted"
            )

    @property
    def draws(self) -> bool:
        """Whether records are drawn, in ``rounds`` rounds, rather than chosen."""
        return self.sampler in ("multinomial", "systematic")

    @property
    def kind(self) -> str:
        """Kind of the records: "counts" where these say it all, else "ratios"."""
        counted = self.draws and self.proposal_temperature == 1 and self.rounds <= MAX_COUNT_ROUNDS
        return "counts" if counted else "ratios"

    @property
    def directory(self) -> Path:
        """Where shards are written here."""
        return Path(self.out) if self.work_dir is None else self.work_dir

    @property
    def url(self) -> str | None:
        """Where they are uploaded to, if they are."""
        return None if self.work_dir is None else str(self.out)

    @property
    def teacher_name(self) -> str:
        """Path or name of the teacher, without its revision."""
        return self._teacher[0]

    @property
    def revision(self) -> str | None:
        """Revision of a teacher on the hub; None: its newest."""
        return self._teacher[1]

    @property
    def _teacher(self) -> tuple[str, str | None]:
        name, _, revision = self.teacher.partition("@")
        return (self.teacher, None) if not revision or Path(self.teacher).exists() else (name, revision)

    @property
    def sampling(self) -> dict[str, Any]:
        """Arguments of ``skl.draw`` that say how; rounds, sequence and position are not among them."""
        return {
            "sampler": self.sampler,
            "proposal_temperature": self.proposal_temperature,
            "k": self.k,
            "p": self.p,
            "seed": self.seed,
            "self_normalise": not self.unbiased_weights,
        }


def make_header(
    config: CacheConfig,
    packed: PackedSequences,
    vocab_size: int,
    *,
    teacher_fingerprint: str,
    teacher: Mapping[str, str],
    versions: Mapping[str, str],
    on_device: bool = False,
) -> Header:
    """
    Everything the cache's bytes depend on.

    Args:
        config: What was asked for.
        packed: The sequences.
        vocab_size: Ids that mean something.
        teacher_fingerprint: Of config and weights.
        teacher: What else is known of it.
        versions: Of the libraries that logits depend on.
        on_device: Draws are made on the teacher's device, not by C; then the header says so.

    Raises:
        ValueError: Settings that contradict each other, or a vocabulary beyond every profile.
    """
    capture = {
        "teacher": dict(teacher),
        "packing": {
            "separator_id": packed.separator_id,
            "first_sequence": packed.first,
            "num_sequences": len(packed),
            "sequences_per_shard": config.sequences_per_shard,
            "num_documents": packed.facts.num_documents,
            "num_tokens": packed.facts.num_tokens,
        },
        "batch_size": config.batch_size,
        "sampler": {
            "k": config.k,
            "p": config.p,
            "unbiased": config.unbiased_weights,
            **({"draws": "device"} if on_device else {}),
        },
        "versions": dict(versions),
    }
    return Header(
        vocab_size=vocab_size,
        seq_len=config.seq_len,
        kind=config.kind,
        rounds=config.rounds if config.draws else 0,
        sampler=config.sampler,
        proposal_temperature=config.proposal_temperature,
        store_tokens=config.store_tokens,
        record_count_size=None if config.draws else 1 + (config.k is None or config.k > _MAX_SMALL_K),
        scale_log2=_scale_log2(config, vocab_size),
        capture=capture,
        sampling_seed=config.seed,
        packing_seed=config.packing_seed,
        order_algorithm=order.ALGORITHM,
        order_version=order.VERSION,
        tokenizer_fingerprint=packed.facts.tokenizer_fingerprint,
        corpus_fingerprint=packed.facts.corpus_fingerprint,
        teacher_fingerprint=teacher_fingerprint,
    )


def agree_on_versions(header: Header, found: Header | None, *, keep: bool, place: str) -> Header:
    """
    The header to go on with, where a cache was begun by other versions of libraries and by nothing else that differs.

    Args:
        header: What this run would write.
        found: What stands in the cache's shards; None: it is begun now.
        keep: Go on, with the versions that it was begun with in every header.
        place: Of the cache, for the message.

    Raises:
        SettingsError: The versions differ, and are not to be kept; shows both.
    """
    if found is None:
        return header
    by_these = dataclasses.replace(
        found,
        capture={**found.capture, "versions": header.capture["versions"]},
        shard_number=header.shard_number,
        first_sequence=header.first_sequence,
    )
    if by_these != header or found.capture == header.capture:
        return header  # for the survey to refuse, or nothing differs
    if keep:
        return dataclasses.replace(header, capture=found.capture)
    raise SettingsError(
        f"{place}: begun with other versions (there != now): {'; '.join(found.differences(header))}; install those, or "
        "give keep_versions: the cache will be sound, but no other run repeats it bit for bit"
    )


def _scale_log2(config: CacheConfig, vocab_size: int) -> int:
    """
    Power of two that importance weights stay below; 0 where they cannot pass 1.

    A weight is at most p / q = p^(1 - t) Σ p^t. For t < 1 that is at most V^(1 - t); for t > 1 the sum is at most 1,
    and p is as small as anything that is ever drawn.
    """
    t = config.proposal_temperature
    if not config.unbiased_weights:
        return 0
    bound = (1 - t) * math.log2(vocab_size) if t < 1 else (t - 1) * _RAREST_LOG2 - math.log2(config.rounds)
    scale = max(0, math.ceil(bound))
    if scale > layout.MAX_SCALE_LOG2:
        raise ValueError(
            f"unbiased weights at proposal_temperature {t} may reach 2^{scale}, the format holds "
            f"2^{layout.MAX_SCALE_LOG2}; take a proposal_temperature nearer to 1, or the paper's weights"
        )
    return scale
