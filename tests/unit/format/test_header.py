"""The settings of a shard: what is refused, what is filled in, and what a damaged header says."""

import dataclasses
import json
import re
import struct

import pytest
import reference
import strategies
import xxhash
from hypothesis import given

import sklformat as skl
from sklformat.format.header import parse_header

BASE = {"vocab_size": 20, "seq_len": 3, "kind": "counts", "rounds": 5}


def patched(offset: int, data: bytes, header: bytes | None = None) -> bytes:
    """Header bytes with a change and a checksum that fits."""
    changed = bytearray(header or reference.encode_header(strategies.small_settings()))
    changed[offset : offset + len(data)] = data
    changed[4088:] = struct.pack("<Q", xxhash.xxh3_64_intdigest(bytes(changed[:4088])))
    return bytes(changed)


def with_capture(text: bytes) -> bytes:
    return patched(256, text + bytes(3832 - len(text)), patched(144, struct.pack("<I", len(text))))


@given(strategies.settings())
def test_headers_come_back(settings):
    """Packing gives the reference's bytes, parsing gives the same settings back, and the keys agree."""
    header = strategies.header_of(settings)
    packed = header.pack()
    assert reference.encode_header(settings) == packed
    assert header == parse_header(packed)
    assert f"{reference.cache_key_of(packed):032x}" == header.cache_key
    assert reference.shard_key_of(packed) == header.shard_key


def test_defaults_are_the_smallest_that_fit():
    """Profile, token size and record count size are the smallest that hold the data."""
    for vocab_size, rounds, kind, expected in (
        (1 << 16, 127, "counts", ("R24", 2)),
        ((1 << 16) + 1, 127, "counts", ("R24", 3)),
        ((1 << 17) + 1, 63, "counts", ("R24W", 3)),
        ((1 << 17) + 1, 64, "counts", ("R32", 3)),
        ((1 << 17) + 1, 10, "ratios", ("R32", 3)),
        ((1 << 18) + 1, 10, "counts", ("R32", 3)),
        (1 << 24, 10, "counts", ("R32", 3)),
    ):
        header = skl.Header(vocab_size=vocab_size, seq_len=1, kind=kind, rounds=rounds)
        assert expected == (header.profile, header.token_size)
    assert skl.Header(**BASE | {"kind": "ratios", "rounds": 255}).record_count_size == 1
    assert skl.Header(**BASE | {"kind": "ratios", "rounds": 256}).record_count_size == 2
    assert skl.Header(**BASE, store_tokens=False).token_size == 0
    assert skl.Header(**BASE).sampler == "multinomial"
    assert skl.Header(**BASE | {"kind": "ratios", "rounds": 0}).sampler == "unknown"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 0}, r"vocab_size must be in 1\.\.16777216, got 0"),
        ({"vocab_size": (1 << 24) + 1}, "vocab_size must be in"),
        ({"seq_len": -1}, "seq_len must be in"),
        ({"seq_len": (1 << 22) + 1}, "seq_len must be in"),
        ({"kind": "logits"}, "kind must be one of counts, ratios, got 'logits'"),
        ({"rounds": 0}, r"need rounds in 1\.\.127, got 0"),
        ({"rounds": 128}, r"need rounds in 1\.\.127, got 128; more rounds go through kind 'ratios'"),
        ({"rounds": 64, "profile": "R24W"}, r"1\.\.63, got 64"),
        ({"rounds": 65536, "kind": "ratios"}, "rounds must be in"),
        (
            {"profile": "R24", "vocab_size": (1 << 17) + 1},
            "holds ids below 131072, but vocab_size is 131073; use profile R24W",
        ),
        ({"profile": "R24W", "kind": "ratios"}, "R24W holds counts only"),
        ({"profile": "R8"}, "profile must be one of"),
        ({"sampler": "greedy"}, "sampler must be one of"),
        ({"proposal_temperature": 0.5}, "counts need proposal_temperature 1"),
        ({"proposal_temperature": 0.0, "kind": "ratios"}, "must be positive and finite, got 0.0"),
        ({"proposal_temperature": float("nan"), "kind": "ratios"}, "must be positive and finite"),
        ({"sampler": "topk"}, "sampler topk draws none; use kind 'ratios'"),
        ({"sampler": "topp"}, "sampler topp draws none"),
        ({"scale_log2": 1}, "scale_log2 belongs to kind 'ratios'"),
        ({"scale_log2": 31, "kind": "ratios"}, r"scale_log2 must be in 0\.\.30"),
        ({"columns": ("logits",)}, "columns may be label_logprob, entropy, document_start, record_logprob, got logits"),
        ({"token_size": 2, "vocab_size": 70000}, "token_size 2 does not hold ids below 70000"),
        ({"token_size": 2, "store_tokens": False}, "token_size must be 0 where tokens are not stored, got 2"),
        ({"record_count_size": 3}, "record_count_size must be 1 or 2, got 3"),
        ({"shard_number": 1 << 32}, "shard_number must be in"),
        ({"sampling_seed": -1}, "sampling_seed must be in"),
        ({"teacher_fingerprint": "ABC"}, "teacher_fingerprint must be 32 lower-case hexadecimal digits, got 'ABC'"),
        ({"row_convention": "same-token"}, "row_convention must be one of next-token"),
        ({"capture": {"x": "y" * 3832}}, "capture takes 3840 bytes as JSON, the header has room for 3832"),
        ({"capture": {"x": float("nan")}}, "not JSON compliant"),
    ],
)
def test_wrong_settings_are_refused(changes, message):
    """A setting that no reader would accept raises ValueError, and the message holds the value and the limit."""
    with pytest.raises(ValueError, match=message):
        skl.Header(**BASE | changes)


@pytest.mark.parametrize("capture", [[1], "text", 3])
def test_capture_is_an_object(capture):
    """A capture that is no JSON object is refused: its shard could not be read again."""
    with pytest.raises(TypeError, match="capture must be a JSON object"):
        skl.Header(**BASE, capture=capture)


def test_equal_headers_have_equal_hashes():
    """A header can be a key, whatever its capture holds and however that was written."""
    one, two = (skl.Header(**BASE, capture={"a": value}) for value in (1, 1.0))
    assert 1 == len({one, two})
    assert 2 == len({one, skl.Header(**BASE | {"rounds": 4}, capture={"a": 1})})


def test_columns_are_names():
    """One name given as a string is refused, not taken letter by letter."""
    with pytest.raises(TypeError, match=r"columns must be a tuple of names, got the string 'entropy'; write"):
        skl.Header(**BASE, columns="entropy")


def test_wrong_types_are_refused():
    """A float where an integer belongs is a TypeError, never rounded."""
    with pytest.raises(TypeError):
        skl.Header(**BASE | {"rounds": 5.0})


def test_cache_key_leaves_out_the_place():
    """Shards of one cache have one cache key and different shard keys; any other setting changes the cache key."""
    first = skl.Header(**BASE)
    second = dataclasses.replace(first, shard_number=1, first_sequence=7)
    assert first.cache_key == second.cache_key
    assert first.shard_key != second.shard_key
    assert first.differences(second) == []
    other = dataclasses.replace(first, sampling_seed=1)
    assert first.cache_key != other.cache_key
    assert first.differences(other) == ["sampling_seed: 0 != 1"]


def test_capture_is_canonical():
    """Equal captures give equal bytes, whatever the order of their keys."""
    one = skl.Header(**BASE, capture={"b": 1, "a": {"d": 2, "c": [1.5, None, "é\x7f"]}})
    two = skl.Header(**BASE, capture={"a": {"c": [1.5, None, "é\x7f"], "d": 2}, "b": 1})
    assert one.pack() == two.pack()
    assert b'{"a":{"c":[1.5,null,"\\u00e9\\u007f"],"d":2},"b":1}' == one.pack()[256:4088].rstrip(b"\0")


@pytest.mark.parametrize("size", [0, 7])
def test_no_header_at_all(size):
    """Fewer bytes than the magic are a truncated file."""
    with pytest.raises(skl.TruncatedError, match=f"header: byte 0: {size} bytes, a header has 4096"):
        parse_header(reference.HEADER_MAGIC[:size])


def test_short_header():
    """A header that ends early is a truncated file, not a corrupt one."""
    with pytest.raises(skl.TruncatedError, match="4095 bytes"):
        parse_header(reference.encode_header(strategies.small_settings())[:-1])


def test_other_files_are_named():
    """A file of another format is refused, and its first bytes are shown."""
    with pytest.raises(skl.UnsupportedError, match="not a sklformat shard: it begins with 50 4b 03 04"):
        parse_header(b"PK\x03\x04" + bytes(5000))


@pytest.mark.parametrize(
    ("offset", "data", "error", "message"),
    [
        (
            8,
            b"\x02",
            skl.UnsupportedError,
            "byte 8: format version 2.0, this library reads 1.x; install the sklformat that wrote it",
        ),
        (12, b"\x00\x20", skl.UnsupportedError, "header_size 0x2000 is not known"),
        (16, b"\x04", skl.UnsupportedError, "incompatible_flags 0x4 is not known to version 1.0; install"),
        (32, b"\x03", skl.UnsupportedError, "byte 32: kind 0x3"),
        (33, b"\x04", skl.UnsupportedError, "profile 0x4"),
        (34, b"\x02", skl.UnsupportedError, "row_convention 0x2"),
        (38, b"\x10", skl.UnsupportedError, "columns 0x10"),
        (64, b"\x06", skl.UnsupportedError, "sampler 0x6"),
        (35, b"\x03", skl.CorruptError, "record_count_size must be 1 or 2, got 3"),
        (36, b"\x01", skl.CorruptError, "token_size 1"),
        (37, b"\x01", skl.CorruptError, "scale_log2 belongs to kind 'ratios'"),
        (40, bytes(4), skl.CorruptError, "vocab_size must be in"),
        (44, b"\x01\x00\x40\x00", skl.CorruptError, "seq_len must be in"),
        (48, b"\x80", skl.CorruptError, "rounds in 1..127, got 128"),
        (65, b"\x01", skl.CorruptError, "byte 65: reserved_0 is not zero"),
        (70, b"\x01", skl.CorruptError, "reserved_1 is not zero"),
        (255, b"\x01", skl.CorruptError, "byte 148: reserved_2 is not zero"),
        (72, struct.pack("<d", float("inf")), skl.CorruptError, "proposal_temperature"),
        (72, struct.pack("<d", -1.0), skl.CorruptError, "proposal_temperature"),
        (144, struct.pack("<I", 3833), skl.CorruptError, "capture_size 3833 does not fit the capture"),
        (144, struct.pack("<I", 1), skl.CorruptError, "capture_size 1 does not fit"),
        (4087, b"\x01", skl.CorruptError, "capture_size 2 does not fit"),
    ],
)
def test_wrong_fields_are_named(offset, data, error, message):
    """A header that is sound by its checksum and wrong in a field names the field, its place and its value."""
    with pytest.raises(error) as caught:
        parse_header(patched(offset, data))
    assert message in str(caught.value)
    assert caught.value.section == "header"
    with pytest.raises(getattr(reference, error.__name__)):
        reference.decode_header(patched(offset, data))


def test_another_major_version_is_named_whatever_its_checksum():
    """The version is looked at before the checksum, which may lie elsewhere in a later version."""
    header = bytearray(reference.encode_header(strategies.small_settings()))
    header[8] = 2
    with pytest.raises(skl.UnsupportedError, match="format version 2"):
        parse_header(bytes(header))


def test_unknown_compatible_flags_and_minor_versions_are_ignored():
    """What a reader may ignore changes nothing for it."""
    settings = strategies.small_settings(version_minor=9, compatible_flags=1 << 63)
    assert strategies.header_of(strategies.small_settings()) == parse_header(reference.encode_header(settings))


@pytest.mark.parametrize(
    "text",
    [
        b"[]",
        b"nonsense",
        b'{"b":1,"a":1}',
        b'{"a": 1}',
        b'{"a":1,"a":1}',
        b'{"a":NaN}',
        b'{"a":1e999}',
        b'{"a":1.0E5}',
        b'{"a":"\x7f"}',
        b'{"a":"\xff"}',
        b'{"a":"\xc3\xa9"}',
        b'{"a":"\\u00E9"}',
        b'{"a":"\\ud800"}',
        b'{"\\udfff":1}',
        b'{"a":-0}',
        b'{"a":01}',
        b'{"a":1e16}',
        b'{"a":1e-5}',
        b'{"a":0.00001}',
        b'{"a":0.10000000000000001}',
        b'{"a":18446744073709551616}',
        b'{"a":-9223372036854775809}',
        b'{"a":' + b"9" * 3800 + b"}",
        b'{"a":"\\/"}',
        b'{"a":[1],}',
        b'{"a":' + b"[" * 1900 + b"]" * 1900 + b"}",
    ],
    ids=lambda text: repr(text[:16]),
)
def test_captures_that_are_not_canonical(text):
    """Any capture but the one canonical form is corrupt, and nothing but a typed error comes of it."""
    with pytest.raises(skl.CorruptError, match="header"):
        parse_header(with_capture(text))
    with pytest.raises(reference.CorruptError):
        reference.decode_header(with_capture(text))


@pytest.mark.parametrize(
    "text",
    [
        b"{}",
        b'{"a":[18446744073709551615,-9223372036854775808,0]}',
        b'{"a":[-0.0,1e+16,1e-05,0.0001,9007199254740992.0,1125899906842624.2,5e-324,1.7976931348623157e+308]}',
        b'{"a":"\\ud83d\\ude00\\u007f\\u0000\\b\\f\\n\\r\\t\\"\\\\/"}',
        b'{"\\uffff":1,"\\ud83d\\ude00":2}',
    ],
)
def test_captures_that_are_canonical(text):
    """What SPEC section 7 allows is read, and written the same by package and reference."""
    header = parse_header(with_capture(text))
    assert with_capture(text) == header.pack()
    settings = reference.decode_header(with_capture(text))
    assert text == reference.canonical_json(settings.capture)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (2**64, "capture holds the integer 18446744073709551616, which is not in -2**63..2**64 - 1; write it as a"),
        (
            10**3700,
            "capture holds the integer 10000000000000000000… of 3701 digits, which is not in -2**63..2**64 - 1;",
        ),
        (-(2**63) - 1, "capture holds the integer -9223372036854775809, which is not in"),
        ("\ud800", r"capture holds U\+D800, half of a surrogate pair, which is no character; replace it"),
        ({"\udfff": 1}, r"capture holds U\+DFFF, half of a surrogate pair"),
    ],
)
def test_captures_that_other_programs_could_not_hold(value, message):
    """An integer beyond 64 bits and half of a surrogate pair are refused when the header is made."""
    with pytest.raises(ValueError, match=re.escape(message) if "**" in message else message):
        skl.Header(**BASE, capture={"a": [value]})


def test_a_pair_of_surrogates_is_a_character():
    """Python keeps the two halves of a pair apart; a capture has the character."""
    assert {"a": "\U0001f600"} == skl.Header(**BASE, capture={"a": "\ud83d\ude00"}).capture


def test_damage_is_named():
    """A flipped bit shows both checksums and where the stored one lies."""
    header = bytearray(reference.encode_header(strategies.small_settings()))
    header[80] ^= 1
    with pytest.raises(skl.CorruptError, match=r"byte 4088: checksum 0x[0-9a-f]{16} stored, 0x[0-9a-f]{16} computed"):
        parse_header(bytes(header))


def test_biased_samplers():
    """Top-k and top-p are biased by design; drawn records are not."""
    made = {name: skl.Header(**BASE | {"kind": "ratios"}, sampler=name).biased for name in strategies.SAMPLERS}
    assert {"topk", "topp"} == {name for name, biased in made.items() if biased}


@pytest.mark.parametrize(("opening", "closing"), [(b'{"a":', b"}"), (b"[", b"]")], ids=["objects", "lists"])
def test_captures_nested_deep(opening, closing):
    """A capture is nested at most 32 deep, for writer and reader alike and whatever the caller's stack."""
    inside = json.loads(opening * 31 + b'"[[[{{{"' + closing * 31)  # brackets in a string count for nothing
    header = skl.Header(**BASE, capture={"a": inside})
    assert {"a": inside} == parse_header(header.pack()).capture
    assert {"a": inside} == reference.decode_header(header.pack()).capture
    with pytest.raises(ValueError, match="capture has objects and lists nested more than 32 deep"):
        skl.Header(**BASE, capture={"a": {"a": inside}})
    for depth in (33, 600, 3800):
        nested = opening * (depth - 1) + b"0" + closing * (depth - 1)
        text = b'{"a":' + nested + b"}" if len(nested) < 3800 else b"[" * depth
        for decode, error in ((parse_header, skl.CorruptError), (reference.decode_header, reference.CorruptError)):
            with pytest.raises(error, match="capture is nested"):
                decode(with_capture(text))
