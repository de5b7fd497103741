"""
Write the frozen shards beside this file: valid ones with what they hold, invalid ones named after their fault.

Run ``python tests/golden/make_golden.py`` to add files; those that are there stay as they are, and the test reads them
and never makes them.
Made by the reference alone, so that a change of the package cannot change what it is tested against.
"""

import dataclasses
import json
import struct
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import reference  # noqa: E402
from reference import R24, R24W, R32, RATIOS, Sequence, Settings  # noqa: E402


def counts(top: int, rounds: int) -> list[Sequence]:
    """Ids 0 and top, a single count of all rounds, a position without records."""
    return [
        Sequence([0, top, 1, top], [[(0, 1), (top, rounds - 1)], [], [(top - 1, rounds)]]),
        Sequence([top, top, 0, 0], [[(1, rounds)], [(0, rounds)], [(top, rounds)]]),
    ]


def ratios(top: int, scale_log2: int) -> list[Sequence]:
    """Equal weights, a long fall, a weight of the whole scale, a position without records."""
    scale = 2.0**scale_log2
    weights = [
        [[(top, 0.25 * scale), (0, 0.25 * scale), (5, 0.5 * scale)], [], [(i, scale * 0.6**i) for i in range(1, 40)]],
        [[(top, scale)], [(7, scale * 2.0**-30), (8, scale)], [(3, scale * 0.999), (2, scale * 0.998)]],
    ]
    tokens = [[0, top, 1, top], [top, top, 0, 0]]
    return [
        Sequence(ids, [reference.encode_ratios(pairs, scale_log2) for pairs in positions])
        for ids, positions in zip(tokens, weights, strict=True)
    ]


def with_columns(sequences: list[Sequence]) -> list[Sequence]:
    """The same with values in both columns, the smallest and the largest float16 among them."""
    values = [-0.5, 65504.0, 2.0**-24]
    return [
        dataclasses.replace(
            s,
            label_logprob=[-abs(v) if p else 0.0 for v, p in zip(values, s.positions, strict=True)],
            entropy=[v if p else 0.0 for v, p in zip(values, s.positions, strict=True)],
        )
        for s in sequences
    ]


def with_all_columns(sequences: list[Sequence]) -> list[Sequence]:
    """The same with values in all columns; documents begin at the first and at the last token."""
    made = []
    for s in with_columns(sequences):
        num_records = sum(len(records) for records in s.positions)
        made.append(
            dataclasses.replace(
                s,
                entropy=[abs(value) for value in s.entropy],
                document_start=[True, *[False] * (len(s.tokens) - 2), True],
                record_logprob=[(0.0, -(2.0**-24), -65504.0, -0.5)[i % 4] for i in range(num_records)],
            )
        )
    return made


def valid() -> dict[str, tuple[Settings, list[Sequence]]]:
    """Every kind with every profile, and every option once."""
    common = {"seq_len": 3, "sampler": 1, "token_size": 2}
    r24, r24w, r32 = 1 << 17, 1 << 18, 1 << 24
    capture = {"teacher": "tiny", "é": [1, 2.5, None, True, {"b": "\n\x7f", "a": -1e-7}]}
    named = Settings(
        **common | {"sampler": 2},
        vocab_size=100,
        rounds=7,
        shard_number=3,
        first_sequence=2**40,
        order_algorithm=1,
        order_version=1,
        sampling_seed=2**64 - 1,
        packing_seed=5,
        tokenizer_fingerprint=0x0123456789ABCDEF0123456789ABCDEF,
        corpus_fingerprint=1,
        teacher_fingerprint=2**128 - 1,
        capture=capture,
    )
    ragged = [Sequence([n] * (n + 1), [[(n, 7)]] * n) for n in (1, 5, 2)]
    small = Settings(**common, vocab_size=100, rounds=7)
    return {
        "counts-r24": (Settings(**common | {"token_size": 3}, vocab_size=r24, rounds=127), counts(r24 - 1, 127)),
        "counts-r24w": (
            Settings(**common | {"token_size": 3}, vocab_size=r24w, rounds=63, profile=R24W),
            counts(r24w - 1, 63),
        ),
        "counts-r32": (
            Settings(**common | {"token_size": 4}, vocab_size=r32, rounds=127, profile=R32),
            counts(r32 - 1, 127),
        ),
        "ratios-r24": (
            Settings(**common | {"token_size": 3, "sampler": 3}, kind=RATIOS, profile=R24, vocab_size=r24),
            ratios(r24 - 1, 0),
        ),
        "ratios-r32": (
            Settings(
                **common | {"token_size": 3, "sampler": 4},
                kind=RATIOS,
                profile=R32,
                vocab_size=r32,
                rounds=65535,
                record_count_size=2,
                scale_log2=30,
                proposal_temperature=0.75,
            ),
            ratios(r32 - 1, 30),
        ),
        "tokens-not-stored": (Settings(**common | {"token_size": 0}, vocab_size=100, rounds=7), counts(99, 7)),
        "columns": (Settings(**common, vocab_size=100, rounds=7, columns=3), with_columns(counts(99, 7))),
        "column-entropy": (
            Settings(**common, vocab_size=100, rounds=7, columns=2),
            [dataclasses.replace(s, label_logprob=None) for s in with_columns(counts(99, 7))],
        ),
        "columns-all": (
            Settings(**common, vocab_size=100, rounds=7, columns=15),
            with_all_columns(counts(99, 7)),
        ),
        "columns-ratios": (
            Settings(**common | {"token_size": 3, "sampler": 3}, kind=RATIOS, vocab_size=r24, columns=12),
            [dataclasses.replace(s, label_logprob=None, entropy=None) for s in with_all_columns(ratios(r24 - 1, 0))],
        ),
        "column-document-start": (
            Settings(**common | {"seq_len": 0}, vocab_size=100, rounds=7, columns=4),
            [
                Sequence([n] * (n + 1), [[(n, 7)]] * n, document_start=[i % 3 == 0 for i in range(n + 1)])
                for n in (6, 7, 8, 16)
            ],
        ),
        "ragged": (Settings(**common | {"seq_len": 0}, vocab_size=100, rounds=7, record_count_size=2), ragged),
        # Refused as an unknown sampler before there was this one.
        "sampler-thinned": (dataclasses.replace(small, sampler=5), counts(99, 7)),
        "empty-shard": (small, []),
        "no-records": (small, [Sequence([1, 2, 3, 4], [[], [], []])]),
        "smallest-vocabulary": (
            Settings(**common | {"seq_len": 1}, vocab_size=1, rounds=1),
            [Sequence([0, 0], [[(0, 1)]])],
        ),
        "every-field": (named, counts(99, 7)),
        "ignorable-flags": (
            dataclasses.replace(small, compatible_flags=1 << 63 | 1, version_minor=7),
            counts(99, 7),
        ),
    }


SETTINGS = Settings(vocab_size=100, rounds=7, seq_len=3, sampler=1, token_size=2)
SHARD = reference.encode_shard(SETTINGS, counts(99, 7))
KEY = reference.shard_key_of(SHARD)
BLOCKS = [SHARD[4096:4288], SHARD[4288:4480]]


def header(offset: int, value: bytes, *, fit: bool = True) -> bytes:
    """The shard under a header with a change, everything behind it fitted."""
    changed = bytearray(SHARD[:4096])
    changed[offset : offset + len(value)] = value
    if fit:
        changed[4088:] = struct.pack("<Q", reference.xxh64(bytes(changed[:4088]), 0))
    key = reference.shard_key_of(bytes(changed))
    blocks = [reference.encode_block(SETTINGS, s, i, key) for i, s in enumerate(counts(99, 7))]
    return reference.join_shard(bytes(changed), blocks)


def block(offset: int, value: bytes) -> bytes:
    """The shard with a change in its second block, every checksum fitted."""
    changed = bytearray(BLOCKS[1])
    changed[offset : offset + len(value)] = value
    changed[40:48] = struct.pack("<Q", reference.xxh64(bytes(changed[64:]), KEY))
    changed[56:64] = struct.pack("<Q", reference.xxh64(bytes(changed[:56]), KEY))
    return reference.join_shard(SHARD[:4096], [BLOCKS[0], bytes(changed)])


def behind(offset: int, value: bytes) -> bytes:
    """The shard with a change in index or trailer, counted from byte 4480, and their checksums fitted."""
    changed = bytearray(SHARD)
    changed[4480 + offset : 4480 + offset + len(value)] = value
    changed[-16:-8] = struct.pack("<Q", reference.xxh64(bytes(changed[4480:-64]), KEY))
    changed[-8:] = struct.pack("<Q", reference.xxh64(bytes(changed[-64:-8]), KEY))
    return bytes(changed)


def sequence(positions: list, tokens: tuple = (1, 2, 3, 4), **changes) -> bytes:
    """A shard of one sequence that may break a rule, every checksum fitted."""
    return reference.encode_shard(dataclasses.replace(SETTINGS, **changes), [Sequence(list(tokens), positions)])


def column(bit: int, data: bytes) -> bytes:
    """A shard of one sequence with one optional column of these bytes, every checksum fitted."""
    settings = dataclasses.replace(SETTINGS, columns=bit)
    zeros = Sequence([1, 2, 3, 4], [[(5, 7)]] * 3, [0.0] * 3, [0.0] * 3, [False] * 4, [0.0] * 3)
    head = reference.encode_header(settings)
    key = reference.shard_key_of(head)
    changed = bytearray(reference.encode_block(settings, zeros, 0, key))
    at = 64 + 3 + 3 * 3 + 4 * 2
    assert struct.unpack_from("<I", changed, 24)[0] == at - 64 + len(data)
    changed[at : at + len(data)] = data
    changed[40:48] = struct.pack("<Q", reference.xxh64(bytes(changed[64:]), key))
    changed[56:64] = struct.pack("<Q", reference.xxh64(bytes(changed[:56]), key))
    return reference.join_shard(head, [bytes(changed)])


def flipped(offset: int) -> bytes:
    changed = bytearray(SHARD)
    changed[offset] ^= 0x10
    return bytes(changed)


def with_capture(text: bytes) -> bytes:
    """The shard with another capture."""
    return header(144, struct.pack("<I", len(text)) + bytes(108) + text)


def captures() -> dict[str, bytes]:
    """Captures that say something and are not in their one form."""
    return {
        "key-order": b'{"b":1,"a":1}',
        "key-twice": b'{"a":1,"a":1}',
        "white-space": b'{"a": 1}',
        "not-ascii": '{"a":"é"}'.encode(),
        "upper-case-escape": b'{"a":"\\u00E9"}',
        "escaped-slash": b'{"a":"\\/"}',
        "half-a-pair": b'{"a":"\\ud800"}',
        "pairs-in-utf-16-order": b'{"\\ud83d\\ude00":1,"\\uffff":1}',
        "minus-zero": b'{"a":-0}',
        "integer-beyond-64-bits": b'{"a":18446744073709551616}',
        "too-many-digits": b'{"a":0.10000000000000001}',
        "exponent": b'{"a":1e16}',
        "infinity": b'{"a":1e999}',
        "nan": b'{"a":NaN}',
        "nested-too-deep": b'{"a":' + b"[" * 32 + b"]" * 32 + b"}",
        "number": b"17",
    }


def invalid() -> dict[str, bytes]:
    """Names say the error first: corrupt, truncated, unsupported."""
    full = [(5, 7)]
    ratio = {"kind": RATIOS, "rounds": 0, "sampler": 3}
    return {
        "unsupported-magic": b"\x89PNG" + SHARD[4:],
        "unsupported-major-version": header(8, b"\x02"),
        "unsupported-flag": header(16, b"\x01"),
        "unsupported-kind": header(32, b"\x03"),
        "unsupported-sampler-number": header(64, b"\xff"),
        "unsupported-codec": block(4, b"\x01"),
        "corrupt-header-checksum": header(80, b"\x01", fit=False),
        "corrupt-header-reserved": header(200, b"\x01"),
        "corrupt-capture": header(256, b"[]"),
        "corrupt-vocab-size": header(40, struct.pack("<I", (1 << 17) + 1)),
        "corrupt-rounds": header(48, bytes(4)),
        "truncated-header": SHARD[:4000],
        "truncated-trailer": SHARD[:-1],
        "truncated-never-sealed": SHARD[:4480],
        "truncated-appended": SHARD + bytes(64),
        "corrupt-trailer-checksum": flipped(len(SHARD) - 40),
        "corrupt-index-checksum": flipped(4480 + 9),
        "corrupt-index-offset": behind(8, struct.pack("<Q", 4288 + 64)),
        "corrupt-root": behind(64 + 32, b"X"),
        "corrupt-sum-of-records": behind(64 + 24, b"\x07"),
        "corrupt-block-header": flipped(4288 + 33),
        "corrupt-block-number": reference.join_shard(SHARD[:4096], [BLOCKS[1], BLOCKS[0]]),
        "corrupt-block-reserved": block(50, b"\x01"),
        "corrupt-payload": flipped(4288 + 70),
        "corrupt-padding": block(191, b"\x01"),
        "corrupt-alignment": block(32, b"XXXXXXXX"),
        "corrupt-foreign-block": reference.join_shard(
            SHARD[:4096], [BLOCKS[0], reference.encode_block(SETTINGS, counts(99, 7)[1], 1, KEY ^ 1)]
        ),
        "corrupt-id": sequence([[(100, 7)], full, full]),
        "corrupt-id-order": sequence([[(6, 3), (5, 4)], full, full]),
        "corrupt-id-twice": sequence([full, [(5, 3), (5, 4)], full]),
        "corrupt-count-zero": sequence([full, [(5, 0), (6, 7)], full]),
        "corrupt-count-sum": sequence([full, full, [(5, 6)]]),
        "corrupt-token": sequence([full, full, full], (1, 2, 3, 100)),
        "corrupt-reserved-bit": sequence([[(5, 7 | 0x80)], full, full], profile=R32),
        "corrupt-ratio-zero": sequence([[(5, 127), (6, 127)], [], []], **ratio),
        "corrupt-ratio-order": sequence([[(6, 3), (5, 0)], [], []], **ratio),
        "corrupt-column-infinite": reference.encode_shard(
            dataclasses.replace(SETTINGS, columns=1),
            [Sequence([1, 2, 3, 4], [full, full, []], [float("inf"), 0.0, 0.0])],
        ),
        **{f"corrupt-capture-{name}": with_capture(text) for name, text in captures().items()},
        "corrupt-capture-size": header(144, struct.pack("<I", 1)),
        "corrupt-numbers-beyond-64-bits": reference.encode_shard(
            dataclasses.replace(SETTINGS, first_sequence=2**64 - 1), counts(99, 7)
        ),
        "corrupt-block-magic": block(0, b"X"),
        "unsupported-columns": header(38, b"\x10"),
        "corrupt-column-minus-zero": column(2, b"\x00\x80" + bytes(4)),
        "corrupt-column-above-zero": column(1, bytes(4) + b"\x01\x00"),
        "corrupt-document-start-bit": column(4, b"\x11"),
        "corrupt-record-logprob-infinite": column(8, bytes(4) + b"\x00\xfc"),
        "corrupt-record-logprob-above-zero": column(8, bytes(4) + b"\x00\x3c"),
        "corrupt-record-logprob-minus-zero": column(8, b"\x00\x80" + bytes(4)),
        "corrupt-column-without-record": reference.encode_shard(
            dataclasses.replace(SETTINGS, columns=1), [Sequence([1, 2, 3, 4], [full, full, []], [-1.0, -1.0, -1.0])]
        ),
    }


def expected(settings: Settings, sequences: list[Sequence], data: bytes) -> dict:
    """What a reader must find, as JSON; weights as exact integers v."""
    decoded = reference.decode_shard(data)
    values = [s.values() if settings.kind == RATIOS else None for s in sequences]
    return {
        "settings": dataclasses.asdict(settings),
        "fingerprint": f"{decoded.root:032x}",
        "cache_key": f"{decoded.cache_key:032x}",
        "sequences": [
            fields_of(dataclasses.replace(s, alignment=reference.alignment_of(s.tokens))) | {"values": v}
            for s, v in zip(sequences, values, strict=True)
        ],
    }


def fields_of(sequence: Sequence) -> dict:
    """Its fields; the columns that came last only where they are, so that older files stay as they are."""
    fields = dataclasses.asdict(sequence)
    late = ("document_start", "record_logprob")
    return {name: value for name, value in fields.items() if value is not None or name not in late}


def main() -> None:
    """Write all files, after checking that the reference agrees."""
    errors = {
        "corrupt": reference.CorruptError,
        "truncated": reference.TruncatedError,
        "unsupported": reference.UnsupportedError,
    }
    for folder in ("valid", "invalid"):
        (HERE / folder).mkdir(exist_ok=True)
    for name, (settings, sequences) in valid().items():
        data = reference.encode_shard(settings, sequences)
        text = json.dumps(expected(settings, sequences, data), separators=(",", ":"))
        put(HERE / "valid" / f"{name}.skl", data)
        put(HERE / "valid" / f"{name}.json", text.encode() + b"\n")
    for name, data in invalid().items():
        assert errors[name.split("-")[0]] is type(fault_of(data)), name
        put(HERE / "invalid" / f"{name}.skl", data)


def put(path: Path, data: bytes) -> None:
    """Write a file that is not there, and be sure that one that is there stays as it is."""
    if not path.exists():
        path.write_bytes(data)
    assert data == path.read_bytes(), path


def fault_of(data: bytes) -> Exception | None:
    """What the reference raises for these bytes."""
    try:
        reference.decode_shard(data)
    except (reference.CorruptError, reference.TruncatedError, reference.UnsupportedError) as error:
        return error
    return None


if __name__ == "__main__":
    main()
