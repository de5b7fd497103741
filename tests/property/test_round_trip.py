"""What goes into a shard comes out of it, and a second implementation agrees on every byte."""

import tempfile
from pathlib import Path

import numpy as np
import reference
import strategies
from hypothesis import given
from reference import COUNTS, RATIOS

import sklformat as skl


def written(shard, name="shard.skl"):
    settings, sequences, weights = shard
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / name
        data = strategies.write(path, settings, sequences, weights)
        with skl.open(path) as cache:
            return data, cache.header, cache.fingerprint, list(cache)


@given(strategies.shards())
def test_the_package_writes_the_bytes_of_the_reference(shard):
    """Two implementations of SPEC.md agree on every byte of every valid shard."""
    settings, sequences, _ = shard
    assert reference.encode_shard(settings, sequences) == written(shard)[0]


@given(strategies.shards())
def test_the_reference_reads_back_what_went_in(shard):
    """The reference accepts what the package wrote, and finds the same settings and sequences in it."""
    settings, sequences, _ = shard
    decoded = reference.decode_shard(written(shard)[0])
    assert settings == decoded.settings
    for sequence, found in zip(sequences, decoded.sequences, strict=True):
        assert sequence.positions == found.positions
        assert (sequence.tokens if settings.token_size else None) == found.tokens
        assert strategies.columns_of(sequence) == strategies.columns_of(found)
        assert reference.alignment_of(sequence.tokens) == found.alignment


@given(strategies.shards(kinds=(COUNTS,)))
def test_counts_come_back(shard):
    """decode(encode(x)) is x: ids, counts, tokens and columns."""
    settings, sequences, _ = shard
    _, _, fingerprint, found = written(shard)
    root = reference.decode_shard(reference.encode_shard(settings, sequences)).root
    assert f"{reference.cache_fingerprint([root]):032x}" == fingerprint
    for sequence, got in zip(sequences, found, strict=True):
        assert sequence.positions == strategies.pairs_of(got.targets)
        assert strategies.targets_of(COUNTS, sequence.positions) == got.targets
        assert (sequence.tokens if settings.token_size else None) == (
            None if got.tokens is None else got.tokens.tolist()
        )
        assert strategies.columns_of(sequence) == {name: column.tolist() for name, column in got.columns.items()}


@given(strategies.shards(kinds=(RATIOS,)))
def test_ratio_weights_are_the_exact_integers(shard):
    """A decoded weight is v * 2^(scale_log2 - 31), v being the reference's exact integer, rounded once to float32."""
    settings, sequences, _ = shard
    for sequence, got in zip(sequences, written(shard)[3], strict=True):
        expected = [
            [
                (token_id, float(np.float32(v)) * 2.0 ** (settings.scale_log2 - 31))
                for (token_id, _), v in zip(records, values, strict=True)
            ]
            for records, values in zip(sequence.positions, sequence.values(), strict=True)
        ]
        assert expected == strategies.pairs_of(got.targets)


@given(strategies.shards(kinds=(RATIOS,)))
def test_decoding_and_encoding_again_gives_the_same_bytes(shard):
    """A copy of a ratio shard through decoded weights loses nothing more."""
    settings, sequences, _ = shard
    data, _, _, found = written(shard)
    again = [strategies.pairs_of(got.targets) for got in found]
    assert data == written((settings, sequences, again))[0]
