"""What the format refuses, each refusal once by its own words; the other tests of this folder say when."""

import dataclasses
import json
import struct

import numpy as np
import pytest
import reference
from strategies import header_of, make_listed_cache, small_settings

import sklformat as skl
from sklformat.cache.contents import scan_directory
from sklformat.cache.manifest import write_manifest
from sklformat.format import layout
from sklformat.format.block import encode_block
from sklformat.format.header import parse_header
from sklformat.format.index import parse_index, parse_trailer
from sklformat.format.listing import pack_listing
from sklformat.format.order import Schedule, permute

HEADER = header_of(small_settings())
TARGETS = skl.SparseTargets(token_ids=[2, 7], counts=[1, 4], offsets=[0, 2, 2, 2])
SHARD = reference.encode_shard(small_settings(), [])
KEY = reference.shard_key_of(SHARD)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: permute([0], 0, seed=0), ValueError, r"a permutation needs 1\.\.2\*\*62 elements, got 0"),
        (lambda: permute([0], 2**62 + 1, seed=0), ValueError, "a permutation needs"),
        (
            lambda: permute([1, 5], 5, seed=0),
            ValueError,
            r"indices must be in \[0, 5\), got values from 1 to 5",
        ),
        (
            lambda: Schedule(num_sequences=4, batch_size=0, seed=0),
            ValueError,
            "need batch_size >= 1 and 0 <= rank < world_size, got batch_size 0, rank 0, world_size 1",
        ),
        (
            lambda: Schedule(num_sequences=4, batch_size=1, seed=0, tail="cut"),
            ValueError,
            "tail must be drop, pad or wrap, got 'cut'",
        ),
        (
            lambda: Schedule(num_sequences=4, batch_size=1, seed=-1),
            ValueError,
            r"^seed must be in 0\.\.2\*\*64 - 1, got -1",
        ),
        (
            lambda: skl.Header(vocab_size=9, seq_len=1, kind="ratios", rounds=0, proposal_temperature=0.0),
            ValueError,
            r"proposal_temperature must be positive and finite, got 0\.0",
        ),
    ],
)
def test_arguments(call, error, message):
    """A value out of range is refused by name, with the value and what it may be."""
    with pytest.raises(error, match=message):
        call()


def test_a_payload_beyond_the_limit(monkeypatch):
    """A sequence that makes a payload larger than the format allows is not encoded."""
    monkeypatch.setattr(layout, "MAX_PAYLOAD_SIZE", 16)
    with pytest.raises(ValueError, match="payload of 17 bytes, the format's limit is 16"):
        encode_block(HEADER, KEY, 0, [1, 2, 3, 4], TARGETS)


def with_capture(capture):
    """A header with this text as its capture and a checksum that fits."""
    data = bytearray(reference.encode_header(small_settings()))
    data[144:148] = struct.pack("<I", len(capture))
    data[256 : 256 + len(capture)] = capture
    data[4088:] = struct.pack("<Q", reference.xxh64(bytes(data[:4088]), 0))
    return bytes(data)


@pytest.mark.parametrize(
    ("capture", "message"),
    [
        (b'{"a":', "capture is not JSON: Expecting value"),
        (b"\xff\xff", "capture is not JSON: 'utf-8' codec"),
        (b"[]", "capture is not a JSON object"),
        (b'{"a": 1}', "capture is not in canonical form"),
        (b'{"b":1,"a":1}', "capture is not in canonical form"),
        (b'{"a":"\xc3\xa9"}', "capture is not in canonical form"),
    ],
)
def test_captures(capture, message):
    """A capture that is not canonical JSON of an object is corrupt, here and in the reference."""
    data = with_capture(capture)
    with pytest.raises(skl.CorruptError, match=f"header: byte 256: {message}"):
        parse_header(data)
    with pytest.raises(reference.CorruptError, match="capture"):
        reference.decode_header(data)


def test_an_unknown_flag():
    """What only a newer version knows says so, and that a newer version is needed."""
    data = bytearray(reference.encode_header(small_settings()))
    data[16] = 4
    data[4088:] = struct.pack("<Q", reference.xxh64(bytes(data[:4088]), 0))
    with pytest.raises(
        skl.UnsupportedError, match=r"incompatible_flags 0x4 is not known to version 1\.0; install a newer sklformat$"
    ):
        parse_header(data)


def test_a_trailer_of_too_many_sequences():
    """2^32 sequences are more than a shard holds, whatever the file's size."""
    trailer = bytearray(SHARD[-64:])
    trailer[16:24] = struct.pack("<Q", 1 << 32)
    trailer[56:] = struct.pack("<Q", reference.xxh64(bytes(trailer[:56]), KEY))
    with pytest.raises(skl.CorruptError, match="4294967296 sequences, a shard holds fewer than 4294967296"):
        parse_trailer(trailer, KEY, len(SHARD))


def test_an_index_that_ends_early():
    """Fewer bytes than the trailer tells of are a truncated index."""
    shard = reference.encode_shard(small_settings(), [reference.Sequence([1, 2, 3, 4], [[(2, 5)], [], []])])
    trailer = parse_trailer(shard[-64:], KEY, len(shard))
    index = shard[trailer.index_offset : -64]
    with pytest.raises(skl.TruncatedError, match=f"index: byte {trailer.index_offset}: 63 bytes of 64"):
        parse_index(index[:-1], trailer, shard[:4096], HEADER, KEY)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (lambda text: text.replace(b'"name": "s', b'"name": "\\u0073', 1), r"shard name .* is not in canonical form"),
        (lambda text: text.replace(b'"fo', b'"\\u0066o', 1), "is not written as SPEC section 11 says, from byte"),
        (lambda text: text[:-5], "not JSON: "),
    ],
)
def test_forms_of_a_manifest(tmp_path, how, message):
    """A manifest in another form says what is other about it."""
    path = make_listed_cache(tmp_path / "cache") / "manifest.json"
    path.write_bytes(how(path.read_bytes()))
    with pytest.raises(skl.CorruptError, match=message):
        skl.open(path.parent)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (
            lambda body: body.update(more=1),
            r"has keys \['digest', 'fingerprint', 'format', 'more', 'shards', 'version'\], must have \['digest'",
        ),
        (
            lambda body: body["shards"][0].update(fingerprint="F" * 32),
            "fingerprint 'F{32}' of shard-00000.skl is not 32 lower-case hexadecimal digits",
        ),
        (lambda body: body["shards"][0].update(name="x" * 252 + ".skl"), "has 256 bytes, the limit is 255"),
        (lambda body: body.update(digest="0" * 32), "digest 0{32} stored, [0-9a-f]{32} computed; remove it to open"),
    ],
)
def test_lies_of_a_manifest(tmp_path, how, message):
    """A manifest that says what none may say names it."""
    path = make_listed_cache(tmp_path / "cache") / "manifest.json"
    body = json.loads(path.read_bytes())
    how(body)
    path.write_text(json.dumps(body, indent=1, sort_keys=True) + "\n")
    with pytest.raises(skl.CorruptError, match=message):
        skl.open(path.parent)


def test_too_many_shards_for_a_manifest(tmp_path, monkeypatch):
    """More shards than a manifest lists are not listed."""
    directory = make_listed_cache(tmp_path / "cache")
    entries = scan_directory(directory)
    monkeypatch.setattr(layout, "MAX_SHARDS", 2)
    message = "3 shards, a manifest lists at most 2; take more sequences per shard"
    with pytest.raises(ValueError, match=message):
        write_manifest(directory, entries)
    with pytest.raises(ValueError, match=message):
        pack_listing(entries, directory)


def test_a_name_that_cannot_be_listed(tmp_path):
    """A shard whose name no manifest may hold is named by it."""
    directory = make_listed_cache(tmp_path / "cache")
    entry = dataclasses.replace(scan_directory(directory)[0], name="a\x00.skl")
    with pytest.raises(
        ValueError, match=r"shard name 'a.x00\.skl' is not a plain file name that ends in \.skl; rename the file"
    ):
        pack_listing([entry], directory)


def test_columns_of_another_shape():
    """A column of another length is refused with both shapes."""
    header = dataclasses.replace(HEADER, columns=("entropy",))
    with pytest.raises(ValueError, match=r"column entropy has shape \(2,\), must be \(3,\)"):
        encode_block(header, KEY, 0, [1, 2, 3, 4], TARGETS, {"entropy": np.zeros(2)})
