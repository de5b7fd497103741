"""
``cache_teacher``: run a teacher over packed text once and leave its sparse distributions on disk.

Puts together what the others know: corpus, models, sampler, capture. Holds no bytes of the format and no statistics.
Source: Anshumann et al. 2025 (arXiv 2503.16870), section 3.2 and Appendix D.
Shape letters: B sequences, T positions, V vocabulary, D hidden size.
"""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

import sklformat
from sklformat import order
from sklformat.capture import Capture, ShardWork
from sklformat.disk import locked_directory
from sklformat.distill import models
from sklformat.distill.corpus import (
    Document,
    PackedSequences,
    TokenStore,
    read_documents,
    tokenizer_fingerprint,
    write_token_store,
)
from sklformat.distill.directories import refuse_foreign
from sklformat.errors import SettingsError
from sklformat.header import Header
from sklformat.records import SparseTargets
from sklformat.report import inspect
from sklformat.sampler import MAX_COUNT_ROUNDS, draw

TOKENS_NAME = "tokens"
"""Directory of the token store inside a cache that was made from text."""


_SHARD = re.compile(r"shard-\d{5,}\.skl(\.partial)?")
_BEFORE_SHARDS = re.compile(rf"\.lock|\.writer\.lock|{TOKENS_NAME}(\.partial)?")  # what a run leaves that stopped early
_MAX_SMALL_K = 255  # records of a position that one byte counts
_LOGITS_PER_DRAW = 1 << 24  # at most so many logits are there at once: 64 MiB of float32


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """Run a teacher over text and keep sparse records of its predictions; given again, it goes on where it stopped."""

    teacher: str
    """Teacher: a directory saved by transformers' save_pretrained, or a Hugging Face name. Its tokenizer is used."""

    out: Path
    """Directory of the cache. One that a stopped run left is gone on with."""

    text: tuple[Path, ...] = ()
    """Text to run over: files (UTF-8, or .jsonl with a field "text") and directories of them."""

    tokens: Path | None = None
    """Token store to run over instead of text, made earlier with the same tokenizer."""

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

    seed: int = 0
    """Seed of the draws."""

    packing_seed: int = 0
    """Seed of the order in which documents are packed; the student must pack by the same."""

    sequences_per_shard: int = 1024
    """Sequences in one file."""

    batch_size: int = 8
    """Sequences in one forward pass of the teacher. Logits depend on it in their last bits."""

    dtype: models.Dtype = "float32"
    """Type of the teacher's weights and logits."""

    device: str = "auto"
    """Where it runs: cpu, cuda, cuda:1, …; auto: the GPU if there is one."""

    store_tokens: bool = True
    """Whether the cache holds the tokens as well (2 or 3 bytes a position), so that training needs no text."""

    ring_mib: int = 64
    """Shared memory between the teacher and the writer process, MiB."""

    def __post_init__(self) -> None:
        if bool(self.text) == (self.tokens is not None):
            raise ValueError("give either text or tokens (a token store)")
        for name in ("seq_len", "sequences_per_shard", "batch_size", "ring_mib"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        if self.num_sequences is not None and self.num_sequences < 1:
            raise ValueError(f"num_sequences must be >= 1, got {self.num_sequences}")
        if self.draws and self.rounds < 1:
            raise ValueError(f"rounds must be >= 1 for sampler {self.sampler}, got {self.rounds}")
        if self.sampler == "topk" and (self.k is None or self.k < 1):
            raise ValueError(f"sampler topk needs k >= 1, got {self.k}")
        if self.sampler == "topp" and (self.p is None or not 0 < self.p <= 1):
            raise ValueError(f"sampler topp needs p in (0, 1], got {self.p}")
        if self.draws and (self.k is not None or self.p is not None):
            raise ValueError(f"k and p belong to topk and topp, not to sampler {self.sampler}")
        if not self.draws and self.proposal_temperature != 1:
            raise ValueError(f"sampler {self.sampler} draws nothing, so proposal_temperature must be 1")

    @property
    def draws(self) -> bool:
        """Whether records are drawn, in ``rounds`` rounds, rather than chosen."""
        return self.sampler in ("multinomial", "systematic")

    @property
    def kind(self) -> str:
        """Kind of the records: "counts" where these say it all, else "ratios"."""
        return (
            "counts" if self.draws and self.proposal_temperature == 1 and self.rounds <= MAX_COUNT_ROUNDS else "ratios"
        )


@dataclass(frozen=True, kw_only=True)
class Cached:
    """
    What ``cache_teacher`` did.

    Attributes:
        directory: The cache.
        fingerprint: Identity of its content.
        sequences: Sequences in it.
        sequences_made: Sequences that this run added; the others were there.
        positions: Positions in it.
        unique_tokens: Records a position, mean.
        bytes_per_position: Bytes on disk a position, tokens and checksums included.
        seconds: Time this run took, teacher's loading not included.
        positions_per_second: Positions that this run added, a second; 0 where there were none.
        waited_share: Share of the time in which the teacher waited for the writer.
    """

    directory: Path
    fingerprint: str
    sequences: int
    sequences_made: int
    positions: int
    unique_tokens: float
    bytes_per_position: float
    seconds: float
    positions_per_second: float
    waited_share: float

    def __str__(self) -> str:
        made = (
            f"{self.sequences_made} made now at {self.positions_per_second:,.0f} positions/s, "
            f"{self.waited_share:.1%} of the time waited for the writer"
            if self.sequences_made
            else "all there already"
        )
        return (
            f"{self.directory}: {self.sequences} sequences, {self.positions:,} positions "
            f"({made}); {self.unique_tokens:.2f} unique tokens and {self.bytes_per_position:.1f} bytes a position"
        )


def cache_teacher(config: CacheConfig) -> Cached:
    """
    Capture a teacher's sparse distributions over packed text into a cache directory.

    Whatever stops it, run it again with the same settings: sealed shards are kept, an unfinished one is gone on with,
    and the finished cache has the bytes of an undisturbed run.

    Args:
        config: The settings.

    Returns:
        What was done, for the user and for tests.

    Raises:
        OSError: Text, teacher or disk; as the operating system reports it.
        ValueError: No such device, no text, text too short, a teacher that does not fit its tokenizer or ``seq_len``,
            logits that are not finite.
        SettingsError: ``out`` holds a cache made with other settings, or files that are no cache; ``tokens`` were made
            by another tokenizer.
        InUseError: Another process writes into ``out``.
        CaptureError, RingClosedError: The writer process failed.
    """
    device = models.find_device(config.device)
    tokenizer = models.load_tokenizer(config.teacher)
    documents = read_documents(config.text) if config.text else None
    _check_directory(config.out)
    # Held already here, so that a second run is refused before it works; the capture takes the same lock again, and
    # is refused itself should another come in between.
    with locked_directory(config.out):
        model = models.load_model(config.teacher, dtype=config.dtype, device=device)
        vocab_size = models.check_fit(tokenizer, model, seq_len=config.seq_len)
        packed = _packed(config, tokenizer, documents)
        header = _header(config, packed, vocab_size, models.model_fingerprint(model), device)
    teacher = _Teacher(model, vocab_size)
    capture = Capture(
        config.out,
        header=header,
        num_sequences=len(packed),
        sequences_per_shard=config.sequences_per_shard,
        ring_bytes=config.ring_mib << 20,
    )
    start, made, missing = time.perf_counter(), 0, 0
    try:
        with capture:
            works = list(capture.shards())
            missing = sum(work.first_sequence + work.num_sequences - work.next_sequence for work in works)
            there = len(packed) - missing
            with tqdm(total=len(packed), initial=there, desc="cache", unit="seq", disable=None) as progress:
                for sequence, tokens, targets in _captured(config, teacher, packed, works):
                    capture.push(sequence, tokens, targets)
                    made += 1
                    progress.update()
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"stopped: {len(packed) - missing + made} of {len(packed)} sequences are in {config.out}; "
            "run the same command again to go on"
        ) from None
    waited = capture.wait_seconds
    seconds = time.perf_counter() - start
    facts = inspect(config.out)
    return Cached(
        directory=config.out,
        fingerprint=facts["fingerprint"],
        sequences=facts["sequences"],
        sequences_made=made,
        positions=facts["positions"],
        unique_tokens=facts["unique_tokens_per_position"],
        bytes_per_position=facts["bytes_per_position"],
        seconds=seconds,
        positions_per_second=made * config.seq_len / seconds,
        waited_share=waited / seconds if made else 0.0,
    )


def _check_directory(directory: Path) -> None:
    """A cache is begun where nothing is; where shards are, finished or not, the capture compares their settings."""
    names = [path.name for path in directory.iterdir()] if directory.is_dir() else []
    if not any(_SHARD.fullmatch(name) for name in names):
        refuse_foreign(directory, "cache", _BEFORE_SHARDS)


def _packed(config: CacheConfig, tokenizer: Any, documents: Iterator[Document] | None) -> PackedSequences:
    """The sequences to run over, from a token store that is there or is made now."""
    fingerprint, separator_id = tokenizer_fingerprint(tokenizer), models.separator_id(tokenizer)
    made_now = False
    if documents is None:
        assert config.tokens is not None
        path = config.tokens
        store = TokenStore(path)
        if store.facts.tokenizer_fingerprint != fingerprint:
            raise SettingsError(
                f"{path}: made by tokenizer {store.facts.tokenizer_fingerprint}, the teacher's is {fingerprint}; "
                f"make the tokens with the teacher's tokenizer"
            )
    else:
        path = config.out / TOKENS_NAME
        made_now = not path.exists()
        store = write_token_store(
            path,
            documents,
            lambda texts: models.encode(tokenizer, texts),
            vocab_size=models.num_ids(tokenizer),
            tokenizer_fingerprint=fingerprint,
        )
    store.verify()
    try:
        return PackedSequences(
            path,
            seq_len=config.seq_len,
            separator_id=separator_id,
            seed=config.packing_seed,
            first=config.first_sequence,
            count=config.num_sequences,
        )
    except ValueError:
        if made_now:  # else the next run, with more text, would be refused because of it
            shutil.rmtree(path)
        raise


def _header(
    config: CacheConfig, packed: PackedSequences, vocab_size: int, teacher_fingerprint: str, device: torch.device
) -> Header:
    """
    Everything the cache's bytes depend on, so that a cache made otherwise is never gone on with.

    A teacher is known by its fingerprint; a name from the hub is told as well, a path is not: it may move.
    """
    teacher = {"dtype": config.dtype, "device": device.type}
    if not Path(config.teacher).exists():
        teacher["name"] = config.teacher
    capture = {
        "teacher": teacher,
        "packing": {
            "separator_id": packed.separator_id,
            "first_sequence": packed.first,
            "num_sequences": len(packed),
            "sequences_per_shard": config.sequences_per_shard,
            "num_documents": packed.facts.num_documents,
            "num_tokens": packed.facts.num_tokens,
        },
        "batch_size": config.batch_size,
        "sampler": {"k": config.k, "p": config.p},
        "versions": {**models.versions(), "sklformat": sklformat.__version__},
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
        capture=capture,
        sampling_seed=config.seed,
        packing_seed=config.packing_seed,
        order_algorithm=order.ALGORITHM,
        order_version=1,
        tokenizer_fingerprint=packed.facts.tokenizer_fingerprint,
        corpus_fingerprint=packed.facts.corpus_fingerprint,
        teacher_fingerprint=teacher_fingerprint,
    )


def _captured(
    config: CacheConfig, teacher: _Teacher, packed: PackedSequences, works: Sequence[ShardWork]
) -> Iterator[tuple[int, NDArray[np.uint32], SparseTargets]]:
    """
    Run the teacher over what is missing and draw.

    Logits depend in their last bits on the shape of a batch, so batches are a fixed grid within the shard: a shard
    that is gone on with computes the batch of its next sequence again and skips what it has.
    """
    for work in works:
        end = work.first_sequence + work.num_sequences
        for first in range(work.first_sequence, end, config.batch_size):
            last = min(first + config.batch_size, end)
            if last <= work.next_sequence:
                continue
            tokens_BL = np.stack([packed[sequence] for sequence in range(first, last)])
            outputs = teacher.run(tokens_BL[:, :-1])
            for sequence in range(max(first, work.next_sequence), last):
                tokens = tokens_BL[sequence - first]
                yield sequence, tokens, _drawn(config, teacher, outputs[sequence - first], sequence)


def _drawn(config: CacheConfig, teacher: _Teacher, output: Tensor, sequence: int) -> SparseTargets:
    """Draw the records of one sequence, a slice of its positions at a time."""
    parts: list[SparseTargets] = []
    for first_position, logits_TV in teacher.logits(output):
        parts.append(
            draw(
                logits_TV.cpu(),
                rounds=config.rounds,
                sampler=config.sampler,
                proposal_temperature=config.proposal_temperature,
                k=config.k,
                p=config.p,
                seed=config.seed,
                sequence=sequence,
                first_position=first_position,
            )
        )
    return _joined(parts, config)


def _joined(parts: Sequence[SparseTargets], config: CacheConfig) -> SparseTargets:
    """The records of consecutive slices as those of one sequence, of the cache's kind."""
    lengths = np.concatenate([np.diff(part.offsets) for part in parts])
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    token_ids = np.concatenate([part.token_ids for part in parts])
    if config.kind == "counts":
        return SparseTargets(
            token_ids=token_ids, counts=np.concatenate([part.counts for part in parts]), offsets=offsets
        )
    weights = [_weights(part, config.rounds) for part in parts]
    return SparseTargets(token_ids=token_ids, weights=np.concatenate(weights), offsets=offsets)


def _weights(part: SparseTargets, rounds: int) -> NDArray[np.float32]:
    if part.weights is not None:
        return part.weights
    assert part.counts is not None
    return part.counts.astype(np.float32) / np.float32(rounds)


class _Teacher:
    """
    A teacher whose logits come a slice of positions at a time, so that [B, T, V] need not exist.

    A head that is more than one matrix (it scales or caps) is run whole, as transformers does.
    """

    def __init__(self, model: Any, vocab_size: int) -> None:
        self._model = model
        self._vocab_size = vocab_size
        self._positions = max(1, _LOGITS_PER_DRAW // vocab_size)
        self._weight_VD = models.lm_head_weight(model)[:vocab_size] if models.has_linear_head(model) else None

    @torch.inference_mode()
    def run(self, input_ids_BT: NDArray[np.uint32]) -> Tensor:
        """[B, T, D] hidden states, or [B, T, V] logits where the head is not one matrix."""
        ids_BT = torch.from_numpy(input_ids_BT.astype(np.int64)).to(self._model.device)
        if self._weight_VD is not None:
            return models.hidden_states(self._model, ids_BT)
        return models.logits(self._model, ids_BT)[..., : self._vocab_size]

    @torch.inference_mode()
    def logits(self, output_T: Tensor) -> Iterator[tuple[int, Tensor]]:
        """One sequence's logits as (first position, [positions, V])."""
        for first in range(0, output_T.shape[0], self._positions):
            part = output_T[first : first + self._positions]
            yield first, part if self._weight_VD is None else part @ self._weight_VD.T
