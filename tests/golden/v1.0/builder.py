"""
Write the files of this folder, which are frozen with version 1.0 of the format, and what they hold as JSON beside each.

Run ``python tests/golden/v1.0/builder.py FOLDER``.  It needs xxhash and nothing else, so that no change of the package
or of the reference changes what it makes.  Never edited: digests.txt has its SHA-256 as well.
"""

import json
import math
import struct
import sys
from pathlib import Path

import xxhash

ID_BITS, RECORD_SIZE = {1: 17, 2: 18, 3: 24}, {1: 3, 2: 3, 3: 4}
DEFAULTS = {
    "kind": 1,
    "profile": 1,
    "record_count_size": 1,
    "token_size": 2,
    "scale_log2": 0,
    "columns": 0,
    "vocab_size": 10,
    "seq_len": 2,
    "rounds": 3,
    "shard_number": 0,
    "first_sequence": 0,
    "sampler": 1,
    "order_algorithm": 0,
    "order_version": 0,
    "proposal_temperature": 1.0,
    "sampling_seed": 0,
    "packing_seed": 0,
    "tokenizer_fingerprint": 0,
    "corpus_fingerprint": 0,
    "teacher_fingerprint": 0,
    "capture": {},
    "version_minor": 0,
    "compatible_flags": 0,
}


def xxh64(data: bytes, seed: int = 0) -> int:
    return xxhash.xxh3_64_intdigest(data, seed)


def xxh128(data: bytes) -> int:
    return xxhash.xxh3_128_intdigest(data)


def canonical(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode("ascii")


def header_of(s: dict) -> bytes:
    """The 4096 bytes of settings."""
    capture = canonical(s["capture"])
    head = bytes.fromhex("89534b4c0d0a1a0a")
    head += struct.pack("<HHIQQ", 1, s["version_minor"], 4096, 0, s["compatible_flags"])
    head += struct.pack("<4B", s["kind"], s["profile"], 1, s["record_count_size"])
    head += struct.pack("<BBH", s["token_size"], s["scale_log2"], s["columns"])
    head += struct.pack("<4I", s["vocab_size"], s["seq_len"], s["rounds"], s["shard_number"])
    head += struct.pack("<QBx2H2x", s["first_sequence"], s["sampler"], s["order_algorithm"], s["order_version"])
    head += struct.pack("<d2Q", s["proposal_temperature"], s["sampling_seed"], s["packing_seed"])
    for name in ("tokenizer", "corpus", "teacher"):
        head += s[f"{name}_fingerprint"].to_bytes(16, "little")
    head += struct.pack("<I108x3832s", len(capture), capture)
    return head + struct.pack("<Q", xxh64(head))


def cache_key_of(header: bytes) -> int:
    return xxh128(header[32:52] + bytes(12) + header[64:4088])


def shard_key_of(header: bytes) -> int:
    return xxh128(cache_key_of(header).to_bytes(16, "little") + header[52:56]) % 2**64


def block_of(s: dict, sequence: dict, number: int, key: int) -> bytes:
    """A block: its header, the payload, the zero bytes."""
    positions, tokens = sequence["positions"], sequence["tokens"]
    records = [record for position in positions for record in position]
    payload = b"".join(len(position).to_bytes(s["record_count_size"], "little") for position in positions)
    for token_id, code in records:
        payload += (token_id + (code << ID_BITS[s["profile"]])).to_bytes(RECORD_SIZE[s["profile"]], "little")
    payload += b"".join(token.to_bytes(s["token_size"], "little") for token in tokens if s["token_size"])
    for bit, name in ((1, "label_logprob"), (2, "entropy"), (4, "document_start"), (8, "record_logprob")):
        if s["columns"] & bit and bit == 4:
            number_of_bits = sum(2**i for i, starts in enumerate(sequence[name]) if starts)
            payload += number_of_bits.to_bytes((len(positions) + 8) // 8, "little")
        elif s["columns"] & bit:
            payload += struct.pack(f"<{len(sequence[name])}e", *sequence[name])
    body = payload + bytes(64 + -len(payload) % 64)
    head = b"SKLB" + bytes(4) + struct.pack("<Q4I", number, len(positions), len(records), len(payload), 0)
    head += struct.pack("<3Q", alignment_of(tokens), xxh64(body, key), 0)
    return head + struct.pack("<Q", xxh64(head, key)) + body


def alignment_of(tokens: list[int]) -> int:
    return xxh64(struct.pack(f"<{len(tokens)}I", *tokens))


def shard_of(s: dict, sequences: list[dict]) -> bytes:
    """A sealed shard."""
    header = header_of(s)
    key = shard_key_of(header)
    blocks = [block_of(s, sequence, number, key) for number, sequence in enumerate(sequences)]
    offsets = [4096 + sum(map(len, blocks[:number])) for number in range(len(blocks))]
    index = struct.pack(f"<{len(blocks)}Q", *offsets)
    for begin, end in ((32, 40), (56, 64), (16, 20), (20, 24)):
        index += b"".join(block[begin:end] for block in blocks)
    index += bytes(-len(index) % 64)
    root = xxh128(header[4088:] + b"".join(block[56:64] for block in blocks))
    num_records = sum(struct.unpack_from("<I", block, 20)[0] for block in blocks)
    tail = b"\x89SKLEND\n" + struct.pack("<3Q", 4096 + sum(map(len, blocks)), len(blocks), num_records)
    tail += root.to_bytes(16, "little") + struct.pack("<Q", xxh64(index, key))
    return header + b"".join(blocks) + index + tail + struct.pack("<Q", xxh64(tail, key))


def root_of(shard: bytes) -> int:
    return int.from_bytes(shard[-32:-16], "little")


def manifest_of(shards: dict[str, bytes]) -> bytes:
    """The manifest of shards in order."""
    entries = []
    for number, (name, data) in enumerate(shards.items()):
        num_sequences, num_records = struct.unpack_from("<QQ", data, len(data) - 48)
        entries.append(
            {
                "fingerprint": f"{root_of(data):032x}",
                "first_sequence": struct.unpack_from("<Q", data, 56)[0],
                "name": name,
                "num_records": num_records,
                "num_sequences": num_sequences,
                "shard_number": number,
                "size_bytes": len(data),
            }
        )
    roots = b"".join(root_of(data).to_bytes(16, "little") for data in shards.values())
    body = {"fingerprint": f"{xxh128(roots):032x}", "format": "sklformat cache", "shards": entries, "version": 1}
    body["digest"] = f"{xxh128(canonical(body)):032x}"
    return (json.dumps(body, indent=1, sort_keys=True) + "\n").encode("ascii")


def table() -> list[int]:
    """round(2^31 * 2^(-q^2 / 1024)), exactly: ten square roots, rounded down, of twice that to the power of 1024."""
    steps = []
    for q in range(128):
        doubled = 2 ** (32 * 1024 - q * q)
        for _ in range(10):
            doubled = math.isqrt(doubled)
        steps.append((doubled + 1) // 2)
    return steps


def expected(s: dict, sequences: list[dict], data: bytes) -> bytes:
    """What a reader finds, as JSON."""
    ratios, found = table() if s["kind"] == 2 else [], []
    for sequence in sequences:
        values = None
        if s["kind"] == 2:
            values = []
            for position in sequence["positions"]:
                falling = [2**31]
                for _, code in position:
                    falling.append(falling[-1] * ratios[code] >> 31)
                values.append(falling[1:])
        found.append(sequence | {"alignment": alignment_of(sequence["tokens"]), "values": values})
    body = {
        "settings": s,
        "fingerprint": f"{root_of(data):032x}",
        "cache_key": f"{cache_key_of(data[:4096]):032x}",
        "sequences": found,
    }
    return json.dumps(body, separators=(",", ":")).encode("ascii") + b"\n"


def appendix_a(**changes: int) -> tuple[dict, list[dict]]:
    return DEFAULTS | changes, [{"tokens": [1, 2, 3], "positions": [[[2, 1], [7, 2]], [[3, 3]]]}]


def appendix_d() -> tuple[dict, list[dict]]:
    halves = {"label_logprob": [-1.38671875, 0.0], "record_logprob": [-0.693359375, -1.38671875, -1.38671875, 0.0]}
    changes = {"kind": 2, "rounds": 0, "sampler": 3, "token_size": 0, "columns": 9, "capture": {"k": 3}}
    return DEFAULTS | changes, [{"tokens": [1, 2, 3], "positions": [[[7, 32], [2, 32], [4, 0]], [[3, 0]]], **halves}]


def option(bits: int) -> tuple[dict, list[dict]]:
    """One shard for each set of columns; with them turn kind, profile, sizes, samplers and ragged shards."""
    kind = 1 + bits // 2 % 2
    profile = (1, 2, 3)[bits % 3] if kind == 1 else (1, 3)[bits % 2]
    vocab_size = 2 ** ID_BITS[profile] - bits
    length = bits % 5 + 1
    settings = DEFAULTS | {
        "kind": kind,
        "profile": profile,
        "record_count_size": 1 + bits // 4 % 2,
        "token_size": (0, 3, 4)[bits % 3],
        "scale_log2": 0 if kind == 1 else (0, 1, 30)[bits % 3],
        "columns": bits,
        "vocab_size": vocab_size,
        "seq_len": length if bits % 3 else 0,
        "rounds": (127, 63, 127)[profile - 1] if kind == 1 else (0, 7, 65535)[bits % 3],
        "sampler": (0, 1, 2, 5)[bits // 4] if kind == 1 else bits % 6,
        "proposal_temperature": 1.0 if kind == 1 else 0.5 + bits / 16,
        "order_algorithm": bits % 3,
        "order_version": bits % 2,
    }
    sequences = []
    for number in range(3):
        positions = [records_of(settings, t + number) for t in range(length if bits % 3 else length + number)]
        many = sum(map(len, positions))
        sequence = {
            "tokens": [(t * t * 7919 + number) % vocab_size for t in range(len(positions) + 1)],
            "positions": positions,
        }
        columns = {
            "label_logprob": [-(t + 0.5) if records else 0.0 for t, records in enumerate(positions)],
            "entropy": [t * 0.25 - 2.0**-24 if records else 0.0 for t, records in enumerate(positions)],
            "document_start": [(t + number) % 3 == 0 for t in range(len(positions) + 1)],
            "record_logprob": [(0.0, -(2.0**-24), -65504.0, -1.5)[i % 4] for i in range(many)],
        }
        if bits & 2:  # of f16 values
            columns["entropy"] = [struct.unpack("<e", struct.pack("<e", x))[0] for x in columns["entropy"]]
        sequences.append(sequence | {name: columns[name] for i, name in enumerate(columns) if bits >> i & 1})
    return settings, sequences


def records_of(s: dict, t: int) -> list[list[int]]:
    """The records of a position: none, one, or some with the first and the last id among them."""
    top, rounds = s["vocab_size"] - 1, s["rounds"]
    if s["kind"] == 1:
        return [[], [[top, rounds]], [[0, 1], [t, 2], [top, rounds - 3]]][t % 3] if t else []
    return [[], [[top, 0]], [[top, 3], [0, 32], [t, 0], [t + 9, 90], [1, 127]]][t % 3]


def every_code() -> tuple[dict, list[dict]]:
    """Each ratio code from 1 on, from 2^31 and from a value below it."""
    positions = [[[q, q], [q + 1, 32], [0, q]] if q < 80 else [[q, q]] for q in range(1, 128)]
    settings = DEFAULTS | {"kind": 2, "rounds": 0, "sampler": 4, "seq_len": 127, "vocab_size": 200}
    return settings, [{"tokens": list(range(128)), "positions": positions}]


def other_codes() -> tuple[dict, list[dict]]:
    """Codes that no writer chooses although a reader takes them, and weights whose sum passes 1."""
    positions = [[[0, 127], [1, 119], [2, 2]], [[0, 0], [1, 0], [2, 0]]]
    return DEFAULTS | {"kind": 2, "rounds": 0, "sampler": 3}, [{"tokens": [1, 2, 3], "positions": positions}]


def every_count() -> tuple[dict, list[dict]]:
    """Each count, with what is left of 127 rounds."""
    positions = [[[5, count], [6, 127 - count]] for count in range(1, 127)] + [[[7, 127]]]
    return DEFAULTS | {"rounds": 127, "seq_len": 127}, [{"tokens": [0] * 128, "positions": positions}]


def last_numbers() -> tuple[dict, list[dict]]:
    """Every number of the header as large as it may be, and a capture that fills its room."""
    capture = {"": [18446744073709551615, -9223372036854775808, -0.0, 5e-324, 1125899906842624.2], "\uffff": None}
    capture |= {"\U0001f600": [True, False, '\x00\x7f"\\/\b\f\n\r\t\u00e9'], "deep": 0}
    for _ in range(30):
        capture["deep"] = [capture["deep"]]
    capture["fill"] = ""
    capture["fill"] = "x" * (3832 - len(canonical(capture)))
    settings = DEFAULTS | {
        "shard_number": 2**32 - 1,
        "first_sequence": 2**64 - 1,
        "sampler": 5,
        "order_algorithm": 65535,
        "order_version": 65535,
        "sampling_seed": 2**64 - 1,
        "packing_seed": 2**64 - 1,
        "tokenizer_fingerprint": 2**128 - 1,
        "corpus_fingerprint": 2**128 - 1,
        "teacher_fingerprint": 2**128 - 1,
        "capture": capture,
        "version_minor": 65535,
        "compatible_flags": 2**64 - 1,
    }
    return settings, appendix_a()[1]


def files() -> dict[str, bytes]:
    """Every file by its name in this folder, but for this program and digests.txt."""
    shards = {"appendix-a": appendix_a(), "appendix-d": appendix_d()}
    shards |= {f"columns-{bits:02}": option(bits) for bits in range(16)}
    shards |= {
        "every-code": every_code(),
        "every-count": every_count(),
        "other-codes": other_codes(),
        "last-numbers": last_numbers(),
    }
    made = {}
    for name, (settings, sequences) in shards.items():
        data = shard_of(settings, sequences)
        made |= {f"{name}.skl": data, f"{name}.json": expected(settings, sequences, data)}
    cache = {"a.skl": shard_of(*appendix_a()), "b.skl": shard_of(*appendix_a(shard_number=1, first_sequence=1))}
    cache["manifest.json"] = manifest_of(dict(cache))
    return made | {f"appendix-e/{name}": data for name, data in cache.items()}


def main(folder: Path) -> None:
    """Write all files."""
    for name, data in files().items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
