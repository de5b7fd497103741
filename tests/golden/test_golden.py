"""Frozen shards: what version 1.0 wrote stays readable, and what it must refuse stays refused."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import reference
import strategies

import sklformat as skl

HERE = Path(__file__).parent
VALID = sorted((HERE / "valid").glob("*.skl"))
INVALID = sorted((HERE / "invalid").glob("*.skl"))
ERRORS = {"corrupt": skl.CorruptError, "truncated": skl.TruncatedError, "unsupported": skl.UnsupportedError}


def stem(path):
    return path.stem


def load(path):
    """Expected settings, sequences and the rest of the JSON beside a shard."""
    body = json.loads(path.with_suffix(".json").read_text())
    settings = reference.Settings(**body["settings"])
    sequences = []
    for item in body["sequences"]:
        fields = {name: value for name, value in item.items() if name != "values"}
        fields["positions"] = [[(token_id, code) for token_id, code in pairs] for pairs in fields["positions"]]
        sequences.append(reference.Sequence(**fields))
    return settings, sequences, body


def test_all_files_are_there():
    """Neither folder is empty, each valid shard has its JSON, and all together stay small."""
    assert len(VALID) == 18
    assert len(INVALID) == 45
    assert all(path.with_suffix(".json").exists() for path in VALID)
    assert sum(path.stat().st_size for path in HERE.rglob("*") if path.suffix != ".pyc") < 400_000


@pytest.mark.parametrize("path", VALID, ids=stem)
def test_valid(path):
    """The package finds the settings, sequences, weights and fingerprints that were frozen."""
    settings, sequences, body = load(path)
    assert skl.verify(path) == []
    with skl.open(path) as cache:
        shard = next(cache.shards())
        assert strategies.header_of(settings) == shard.header
        assert (body["fingerprint"], body["cache_key"]) == (shard.fingerprint, shard.header.cache_key)
        assert settings.first_sequence == cache.first_sequence
        for i, (sequence, item, got) in enumerate(zip(sequences, body["sequences"], cache, strict=True)):
            assert (sequence.tokens if settings.token_size else None) == (
                None if got.tokens is None else got.tokens.tolist()
            )
            cache.check_alignment(i, sequence.tokens)
            assert sequence.alignment == got.alignment
            assert strategies.columns_of(sequence) == {name: values.tolist() for name, values in got.columns.items()}
            pairs = sequence.positions
            if item["values"] is not None:
                unit = 2.0 ** (settings.scale_log2 - 31)
                pairs = [
                    [(token_id, float(np.float32(v)) * unit) for (token_id, _), v in zip(records, values, strict=True)]
                    for records, values in zip(sequence.positions, item["values"], strict=True)
                ]
            assert pairs == strategies.pairs_of(got.targets)


@pytest.mark.parametrize("path", VALID, ids=stem)
def test_valid_is_written_again(path, tmp_path):
    """The package writes the frozen bytes from what they hold, where it can: flags it ignores it does not write."""
    settings, sequences, body = load(path)
    assert path.read_bytes() == reference.encode_shard(settings, sequences)
    if settings.compatible_flags:
        return
    weights = None
    if settings.kind == reference.RATIOS:
        unit = 2.0 ** (settings.scale_log2 - 31)
        weights = [
            [
                [(token_id, v * unit) for (token_id, _), v in zip(records, values, strict=True)]
                for records, values in zip(sequence.positions, item["values"], strict=True)
            ]
            for sequence, item in zip(sequences, body["sequences"], strict=True)
        ]
    assert path.read_bytes() == strategies.write(tmp_path / "again.skl", settings, sequences, weights)


@pytest.mark.parametrize("path", INVALID, ids=stem)
def test_invalid(path):
    """A file with one fault raises the error that its name begins with; verify lists or raises it."""
    error = ERRORS[path.stem.split("-")[0]]
    with pytest.raises(skl.FormatError) as caught, skl.open(path) as cache:
        list(cache)
    assert error is type(caught.value)
    assert path == caught.value.path
    assert caught.value.section is not None
    if (error, caught.value.section) == (skl.UnsupportedError, "header"):
        with pytest.raises(skl.UnsupportedError, match=re.escape(str(caught.value))):
            skl.verify(path)
    else:
        assert {error.__name__} == {problem.error for problem in skl.verify(path)}
    with pytest.raises(getattr(reference, error.__name__)):
        reference.decode_shard(path.read_bytes())
