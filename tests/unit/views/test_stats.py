"""What a cache holds, in numbers; what each payload adds up to is proven in tests/unit/native/test_stats.py."""

import json

import numpy as np
import pytest

import sklformat as skl
from sklformat.cli import main
from sklformat.settings.inspection import StatsConfig


def make(path, *, shift=0):
    """12 sequences of 64 positions, of 8 rounds that all fall on the label or beside it."""
    rng = np.random.default_rng(0)
    header = skl.Header(vocab_size=400, seq_len=64, kind="counts", rounds=8, sampler="multinomial")
    with skl.ShardWriter(path, header=header) as writer:
        for _ in range(12):
            tokens = rng.integers(0, 399, 65)
            labels = np.roll(tokens, shift)[1:]
            ids = np.stack([labels, labels + 1], 1).ravel()
            writer.append(
                tokens,
                skl.SparseTargets(token_ids=ids, counts=np.tile([6, 2], 64), offsets=np.arange(0, 130, 2)),
            )
    return path


def test_what_is_said_of_a_sound_cache(tmp_path, capsys):
    """By the command line as in Python; nothing is suspicious."""
    path = make(tmp_path / "a.skl")
    found = skl.stats(path)
    labels = found["labels"]
    assert (1.0, False) == (labels["in_support"]["mean"], labels["suspicious"])
    assert 0.75 == found["confidence"]["mean"] == labels["confidence"]["mean"]
    assert found["entropy"]["mean"] == pytest.approx(0.5623351446 + 1 / 16)
    assert sum(size for name, size in found["bytes"].items() if name != "total") == path.stat().st_size
    assert 0 == main(["stats", str(path), "--json"])
    assert found == json.loads(capsys.readouterr().out)


def test_misaligned_records_are_suspicious(tmp_path, capsys):
    """One sentence says so."""
    path = make(tmp_path / "a.skl", shift=1)
    assert skl.stats(path)["labels"]["suspicious"]
    assert 0 == main(["stats", str(path)])
    assert "tokens and records look misaligned" in capsys.readouterr().out


def test_a_sample_states_its_error(tmp_path):
    """By the seed; at least two sequences."""
    path = make(tmp_path / "a.skl")
    assert skl.stats(path, sample=5) == skl.stats(path, sample=5)
    assert skl.stats(path, sample=5)["labels"]["chance"]["error"] > 0
    with pytest.raises(ValueError, match="sample must be >= 2, got 1"):
        StatsConfig(path="x", sample=1)
