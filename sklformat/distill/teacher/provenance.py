"""
What the header of a shard says of its capture: everything that a sequence's bytes depend on, and nothing else.

A capture with other settings is refused instead of resuming the cache.  How many sequences a capture makes is none of
them, so that it may be asked for more.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import sklformat
from sklformat.distill.models import loading
from sklformat.distill.models.identities import config_fingerprint, model_fingerprint
from sklformat.distill.text.facts import StoreFacts
from sklformat.distill.text.packing import Sequences
from sklformat.distill.text.singles import SingleSequences
from sklformat.errors import SettingsError
from sklformat.format import layout, order
from sklformat.format.header import Header
from sklformat.settings.cache import CacheConfig

_MAX_SMALL_K = 255  # records of a position that one byte counts
_FINGERPRINT = re.compile("[0-9a-f]{32}")
_RAREST_LOG2 = 60  # 2^-60: less probable ids are not met in 10^12 positions


def make_header(
    config: CacheConfig,
    packed: Sequences,
    vocab_size: int,
    vocabulary: str,
    model: Any,
    dtype: str,
    device_type: str,
    *,
    on_device: bool = False,
    kernel_versions: Mapping[str, str] | None = None,
    fingerprint: str | None = None,
    engine: Mapping[str, Any] | None = None,
) -> Header:
    """
    Everything a sequence's bytes depend on; what the text is, its fingerprint says, and the two numbers of it.

    Args:
        config: What was asked for.
        packed: The sequences.
        vocab_size: Ids that mean something.
        vocabulary: ``vocabulary_fingerprint`` of the tokenizer, of these ids.
        model: The teacher, known by its fingerprint; a name from the hub is stored as well, a path is not: it may move.
        dtype: Of its weights and logits.
        device_type: Kind of device that it runs on.
        on_device: Draws are made on the teacher's device, not by C; then the header says so.
        kernel_versions: Of libraries that these draws depend on beside torch.
        fingerprint: Of the teacher, where ``model`` is only its config; None: of the model.
        engine: What ran the teacher, if not transformers: its name, version and what else of it matters. Then it makes
            its own batches, and another run has other bytes.

    Raises:
        ValueError: Settings that contradict each other, or a vocabulary beyond every profile.
    """
    teacher: dict[str, Any] = {"dtype": dtype, "device": device_type, "config": config_fingerprint(model)}
    if not Path(config.teacher_name).exists():
        teacher["name"] = config.teacher_name
        teacher["revision"] = getattr(model.config, "_commit_hash", None) or config.revision or "main"
    if config.tensor_parallel > 1 and engine is None:
        teacher["tensor_parallel"] = config.tensor_parallel  # sums over so many parts round in another way
    fingerprint = fingerprint or model_fingerprint(model)
    versions = {**loading.versions(), **(kernel_versions or {}), "sklformat": sklformat.__version__}
    ran: dict[str, Any] = {"batch_size": config.batch_size}
    if engine is not None:
        ran = {"engine": {k: v for k, v in engine.items() if k != "version"}, "repeatable": False}
        versions[engine["name"]] = engine["version"]
    capture = {
        "teacher": teacher,
        **_author(config, fingerprint),
        "tokenizer": {"vocabulary": vocabulary},
        "packing": {
            "separator_id": packed.separator_id,
            "first_sequence": packed.first,
            "sequences_per_shard": config.sequences_per_shard,
            "num_documents": packed.facts.num_documents,
            "num_tokens": packed.facts.num_tokens,
            **_encoding(packed.facts),
            **({"single": _single(packed)} if isinstance(packed, SingleSequences) else {}),
            **({"isolated": True} if packed.isolated else {}),
        },
        **ran,
        "sampler": {
            "k": config.k,
            "p": config.p,
            "unbiased": config.unbiased_weights,
            **({"draws": "device"} if on_device else {}),
        },
        "versions": versions,
    }
    return Header(
        vocab_size=vocab_size,
        seq_len=0 if packed.is_ragged else config.seq_len,
        kind=config.kind,
        rounds=config.rounds if config.draws else 0,
        sampler=config.sampler,
        proposal_temperature=config.proposal_temperature,
        store_tokens=config.store_tokens,
        columns=config.columns,
        record_count_size=None if config.draws else 1 + (config.k is None or config.k > _MAX_SMALL_K),
        scale_log2=_scale_log2(config, vocab_size),
        capture=capture,
        sampling_seed=config.seed,
        packing_seed=config.packing_seed,
        order_algorithm=0 if packed.is_ragged else order.ALGORITHM,
        order_version=0 if packed.is_ragged else order.VERSION,
        tokenizer_fingerprint=packed.facts.tokenizer_fingerprint,
        corpus_fingerprint=packed.facts.corpus_fingerprint,
        teacher_fingerprint=fingerprint,
    )


def _single(packed: SingleSequences) -> dict[str, Any]:
    """How sequences of one document each were cut, as ``open_sequences`` takes it."""
    said: dict[str, Any] = {"seq_len": packed.seq_len, "truncate": packed.truncate}
    keeps_bos = packed.truncate == "start" and packed.bos_id is not None
    return said | ({"bos_id": packed.bos_id} if keeps_bos else {})


def _author(config: CacheConfig, teacher: str) -> dict[str, Any]:
    """Who wrote the text, where that was said: name, fingerprint where it is known, how the text was sampled."""
    if not config.author:
        return {}
    name, *settings = config.author
    known = {"fingerprint": teacher} if name == "teacher" else {}
    if _FINGERPRINT.fullmatch(name):
        known = {"fingerprint": name}
    return {"author": {"name": name, **known, "sampling": dict(word.split("=", 1) for word in settings)}}


def _encoding(facts: StoreFacts) -> dict[str, Any]:
    """How text was encoded, where it is not as it was before this was said: without BOS, names of tokens as text."""
    said: dict[str, Any] = {}
    if facts.bos != "none":
        said["bos"] = {"at": facts.bos, "id": facts.bos_id}
    if facts.special_tokens == "keep":
        said["special_tokens"] = "keep"
    if facts.marks_answers:
        said["answers"] = {"chat_template": facts.chat_template}
    return said


def agree_on_versions(header: Header, found: Header | None, *, keep: bool, place: str) -> Header:
    """
    The header to resume with, where a cache was begun by other versions of libraries and nothing else differs.

    Args:
        header: What this run would write.
        found: What stands in the cache's shards; None: it is begun now.
        keep: Resume, with the versions that it was begun with in every header.
        place: Of the cache, for the message.

    Raises:
        SettingsError: The versions differ, and are not to be kept; shows both.
    """
    if found is None:
        return header
    if "tokenizer" not in found.capture:  # begun before the map from ids to tokens was said
        header = dataclasses.replace(header, capture={k: v for k, v in header.capture.items() if k != "tokenizer"})
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
