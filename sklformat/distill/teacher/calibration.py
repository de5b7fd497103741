"""A short capture that is thrown away, to know what a long one will cost: its speed here, its records per position."""

from __future__ import annotations

import dataclasses
import math
import tempfile
from pathlib import Path
from typing import Any

from sklformat.cache.reader import open_cache
from sklformat.capture.outcome import Cached
from sklformat.distill.teacher.caching import cache_teacher
from sklformat.distill.teacher.token_sources import TOKENS_NAME
from sklformat.distill.text.chats import read_dataset_texts, write_first_rows
from sklformat.settings.cache import CacheConfig
from sklformat.settings.estimate import EstimateConfig
from sklformat.settings.files import TextFiles


def calibrate(config: EstimateConfig) -> EstimateConfig:
    """
    Run the teacher over some sequences, twice: the first run warms the device up.

    Args:
        config: With a teacher, and text or a dataset.

    Returns:
        The same with vocab_size, unique_tokens and positions_per_second as measured; what was given stays. For chats
        also with the positions that are learnt from in a sequence, and with its mean length as seq_len.

    Raises:
        ValueError, OSError, SklError: As ``cache_teacher``.
    """
    assert config.teacher is not None
    with tempfile.TemporaryDirectory(prefix="sklformat-") as place:
        given: dict[str, Any] = {f.name: getattr(config, f.name) for f in dataclasses.fields(TextFiles)}
        if config.dataset:
            rows = Path(place) / "rows.jsonl"
            write_first_rows(
                rows,
                read_dataset_texts(config.dataset, split=config.dataset_split, field=config.text_field),
                num_sequences=config.calibration_sequences,
                seq_len=config.seq_len,
            )
            given = {"text": (rows,)}
        for name in ("warm-up", "measured"):
            out = Path(place) / name
            cached = cache_teacher(
                CacheConfig(
                    teacher=config.teacher,
                    out=out,
                    **given,
                    seq_len=config.seq_len,
                    num_sequences=config.calibration_sequences,
                    rounds=config.rounds,
                    proposal_temperature=config.proposal_temperature,
                    batch_size=config.batch_size,
                    store_tokens=config.store_tokens,
                    dtype=config.dtype,
                    device=config.device,
                    trust_remote_code=config.trust_remote_code,
                    adapter_base=config.adapter_base,
                )
            )
            given = {"tokens": out / TOKENS_NAME}  # the text is tokenised once
        assert isinstance(cached, Cached)  # no rank of a run
        with open_cache(out) as cache:
            vocab_size = cache.header.vocab_size
            is_ragged = cache.header.seq_len == 0
            length = sum(len(sequence.targets.offsets) - 1 for sequence in cache) / len(cache)
    if is_ragged and config.learnt_per_sequence is None:
        learnt = cached.positions / cached.sequences
        config = dataclasses.replace(config, learnt_per_sequence=learnt, seq_len=math.ceil(length))
    return dataclasses.replace(
        config,
        vocab_size=config.vocab_size or vocab_size,
        unique_tokens=config.unique_tokens or cached.unique_tokens,
        positions_per_second=config.positions_per_second or cached.positions_per_second,
    )
