"""
What the header of a rescored cache says of both teachers, and whose log-probs a cache has.

In a cache that was scored, the records are still the first teacher's, and ``rescored`` in its capture says whose
log-probs stand beside them. In one that was weighted, records and log-probs are the second teacher's, and ``weighted``
says who drew.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import sklformat
from sklformat.cache.reader import Cache
from sklformat.distill.models import loading
from sklformat.distill.models.identities import config_fingerprint
from sklformat.errors import SettingsError
from sklformat.format.columns import RECORD_LOGPROB, STARTS
from sklformat.format.header import Header, is_unbiased, other_teacher
from sklformat.format.layout import COLUMNS, UNBIASED_SAMPLERS
from sklformat.settings.rescore import RescoreConfig

_TEACHER, _RESCORED, _WEIGHTED = "teacher", "rescored", "weighted"
_RAN_BY = ("engine", "repeatable")


def describe_teacher(
    config: RescoreConfig, model: Any, fingerprint: str, dtype: str, device_type: str
) -> dict[str, Any]:
    """The second teacher, as a header knows it: by its fingerprint, and a name from the hub."""
    teacher = {
        "fingerprint": fingerprint,
        "dtype": dtype,
        "device": device_type,
        "config": config_fingerprint(model),
    }
    if not Path(config.teacher_name).exists():
        teacher["name"] = config.teacher_name
        teacher["revision"] = getattr(model.config, "_commit_hash", None) or config.revision or "main"
    return teacher


def versions() -> dict[str, str]:
    """Of the libraries that scores depend on."""
    return {**loading.versions(), "sklformat": sklformat.__version__}


def scored_header(config: RescoreConfig, cache: Cache, how: Mapping[str, Any], sequences_per_shard: int) -> Header:
    """
    Of a cache with the records of ``cache`` and another teacher's columns.

    Args:
        config: The settings.
        cache: What is scored.
        how: By whom, and what else the scores depend on.
        sequences_per_shard: Of what is written.

    Raises:
        ValueError: The capture has become too long for a header.
    """
    source = cache.header
    columns = (*source.columns, *config.columns, RECORD_LOGPROB)
    said = {"versions": versions(), "cache": cache.fingerprint, "sequences_per_shard": sequences_per_shard, **how}
    return dataclasses.replace(source, columns=columns, capture={**source.capture, _RESCORED: said})


def weighted_header(config: RescoreConfig, source: Header, scored: Header, scale_log2: int) -> Header:
    """
    Of a cache whose records were weighted: they are the second teacher's now.

    Args:
        config: The settings.
        source: Of the cache that was scored.
        scored: Of what came of it.
        scale_log2: Of the weights.
    """
    capture = dict(scored.capture)
    said = dict(capture.pop(_RESCORED))
    teacher = dict(said.pop(_TEACHER))
    fingerprint = teacher.pop("fingerprint")
    # What ran a teacher stands beside it: the first one's moves away with it, the second one's comes.
    ran_first = {name: capture.pop(name) for name in _RAN_BY if name in capture}
    ran_second = {name: said.pop(name) for name in _RAN_BY if name in said}
    was_unbiased = is_unbiased(source.sampler, source.proposal_temperature, source.capture)
    said |= {
        "drawn_by": {"fingerprint": source.teacher_fingerprint, _TEACHER: source.capture.get(_TEACHER), **ran_first},
        "weights": config.weights,
        "largest_weight": config.largest_weight,
        "unbiased": was_unbiased and config.weights == "unbiased" and config.largest_weight is None,
    }
    return dataclasses.replace(
        scored,
        kind="ratios",
        profile=None,
        record_count_size=None,
        scale_log2=scale_log2,
        teacher_fingerprint=fingerprint,
        capture={**capture, **ran_second, _TEACHER: teacher, _WEIGHTED: said},
    )


def check_weighable(cache: Cache) -> None:
    """
    Make sure that importance weights can be computed from a cache: its records were drawn, and it has the log-probs of
    the teacher that drew them.

    Raises:
        SettingsError: They cannot; says why, and what to do.
    """
    header = cache.header
    if header.sampler not in UNBIASED_SAMPLERS:
        raise SettingsError(
            f"{cache.path}: its sampler {header.sampler} did not draw, so no weights make the mean of its records "
            "another teacher's distribution; leave weights out, and keep the log-probs alone"
        )
    why = ""
    if RECORD_LOGPROB not in header.columns:
        why = f"it has no column {RECORD_LOGPROB}"
    elif (other := other_teacher(header)) is not None:
        why = f"those in it are of the teacher {other}, its records are of {header.teacher_fingerprint}"
    if why:
        raise SettingsError(
            f"{cache.path}: importance weights need the log-probs of the teacher that drew the records, and {why}; "
            "capture with --columns record_logprob, or rescore it with that teacher, in the same dtype, and take what "
            "comes of it"
        )


def scored_columns(config: RescoreConfig, source: Header) -> tuple[str, ...]:
    """The columns that a teacher is asked for, in the order of the format."""
    names = {*source.columns, *config.columns, RECORD_LOGPROB} - {STARTS}
    return tuple(name for name in COLUMNS if name in names)
