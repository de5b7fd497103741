"""
Write the seed corpus of the C fuzz targets: python tests/fuzz/make_corpus.py

One small input for each kind, profile and shape, in the layout that the head of each target states.  The payloads are
the reference writer's.
"""

import struct
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import reference  # noqa: E402
from reference import COUNTS, R24, R24W, R32, RATIOS  # noqa: E402

EXACT, PADDED, PARTS = 0, 4, 8


def shape_bytes(flags, settings, num_positions, num_records) -> bytes:
    """The 24 bytes that fuzz_decode begins with."""
    s = settings
    head = struct.pack("<6B", flags, s.kind, s.profile, s.record_count_size, s.token_size, s.columns)
    return head + struct.pack("<HIIQ", s.rounds, s.vocab_size, num_positions, num_records)


def sequence_of(kind, vocab_size, rounds, lengths, scale=1):
    """A sequence whose positions have these numbers of records, ids up to the top of the vocabulary."""
    positions = []
    for t, n in enumerate(lengths):
        ids = sorted({(t * 31 + i * scale) % vocab_size for i in range(n)} | ({vocab_size - 1} if n else set()))
        if kind == COUNTS:
            ids = ids[:rounds]
            positions.append([(i, 1) for i in ids[:-1]] + [(i, rounds - len(ids) + 1) for i in ids[-1:]])
        else:
            weights = [(i, 0.6 * 0.7 ** (place // 2)) for place, i in enumerate(ids)]
            positions.append(reference.encode_ratios(weights, 0))
    length = len(lengths)
    tokens = [(i * i * 7) % vocab_size for i in range(length)] + [vocab_size - 1]
    column = [-1.5 if n else 0.0 for n in lengths]
    records = sum(len(position) for position in positions)
    return reference.Sequence(tokens, positions, column, column, [i % 3 == 0 for i in tokens], [-2.5] * records)


def decode_inputs():
    """Payloads of every kind and profile."""
    for kind, profile, vocab_size, rounds in (
        (COUNTS, R24, 1 << 17, 127),
        (COUNTS, R24W, 1 << 18, 63),
        (COUNTS, R32, 1 << 24, 50),
        (COUNTS, R24, 300, 5),
        (RATIOS, R24, 1 << 17, 0),
        (RATIOS, R32, 1 << 24, 0),
    ):
        for count_size, token_size, columns, lengths in (
            (1, 0, 0, [1]),
            (1, 4, 1, [3, 0, 12, 1]),
            (2, 3, 3, [0, 2, 25, 0, 17, 40]),
            (1, 2 if vocab_size <= 65536 else 3, 15, [4, 0, 1, 2, 2, 2, 2, 5]),
        ):
            settings = reference.Settings(
                kind=kind,
                profile=profile,
                vocab_size=vocab_size,
                rounds=rounds,
                record_count_size=count_size,
                token_size=token_size,
                columns=columns,
            )
            sequence = sequence_of(kind, vocab_size, rounds, lengths, scale=97)
            payload = reference.encode_payload(settings, sequence)
            records = sum(len(position) for position in sequence.positions)
            name = f"{kind}-{profile}-{vocab_size}-{count_size}{token_size}{columns}"
            yield name, shape_bytes(PADDED, settings, len(lengths), records) + payload
    settings = reference.Settings(kind=COUNTS, vocab_size=10, rounds=3)
    yield "claims-much", shape_bytes(EXACT, settings, 0xFFFFFFFF, 0xFFFFFFFF) + bytes(100)
    yield "no-positions", shape_bytes(PADDED, settings, 0, 0)
    yield "no-vocabulary", shape_bytes(PADDED, reference.Settings(vocab_size=0, rounds=3), 1, 0) + bytes(1)
    yield "unknown-kind", shape_bytes(PADDED, reference.Settings(kind=9, vocab_size=10), 1, 0) + bytes(1)
    wide = reference.Settings(kind=COUNTS, profile=R32, vocab_size=1 << 17, rounds=3, token_size=2)
    yield "token-size-too-small", shape_bytes(PADDED, wide, 1, 0) + bytes(5)
    padding = shape_bytes(EXACT, settings, 1, 0) + bytes(65)
    yield "empty", padding
    yield "padding", padding[:-1] + b"\x01"
    yield "parts", shape_bytes(PARTS, settings, 1, 0) + bytes(65)
    # Each fault that a payload can have, one at a time.
    r32 = reference.Settings(kind=COUNTS, profile=R32, vocab_size=10, rounds=3, token_size=2)
    tokens = struct.pack("<HH", 1, 2)
    for name, number, records, end in (
        ("sum", 1, [(1, 2)], tokens),
        ("zero", 2, [(1, 0), (2, 3)], tokens),
        ("large-count", 1, [(1, 100)], tokens),
        ("order", 2, [(2, 1), (1, 2)], tokens),
        ("id", 1, [(11, 3)], tokens),
        ("reserved", 1, [(1, 3 + 128)], tokens),
        ("number", 3, [(1, 3)], tokens),
        ("token", 1, [(1, 3)], struct.pack("<HH", 1, 10)),
    ):
        payload = bytes([number]) + b"".join(struct.pack("<I", i | code << 24) for i, code in records) + end
        yield "fault-" + name, shape_bytes(PADDED, r32, 1, len(records)) + payload
    ratios = reference.Settings(kind=RATIOS, profile=R32, vocab_size=10, rounds=0)
    for name, records in (
        ("ratio-zero", [(1, 127), (2, 127), (3, 127), (4, 127)]),
        ("ratio-order", [(2, 3), (1, 0)]),
        ("ratio-id", [(10, 3)]),
    ):
        payload = bytes([len(records)]) + b"".join(struct.pack("<I", i | code << 24) for i, code in records)
        yield "fault-" + name, shape_bytes(PADDED, ratios, 1, len(records)) + payload


def batch_inputs():
    """The sound payloads again, two rows of each: the input as it is, and with its first byte of payload changed."""
    for name, data in decode_inputs():
        if not name.startswith("fault") or name in ("fault-token", "fault-sum"):
            yield name, data[:24] + bytes([2]) + data[24:]
    small = reference.Settings(kind=COUNTS, profile=R32, vocab_size=20, rounds=127, token_size=2)
    payload = b"\1" + struct.pack("<IHH", 1 | 127 << 24, 1, 2)
    for name, flags in (
        ("stored", 3),
        ("given", 2 + 16),
        ("given-large", 3 + 16),
        ("padded", 2 + 32),
        ("scale", 2 + 8),
    ):
        yield "tokens-" + name, shape_bytes(PADDED, small, 1, 1) + bytes([flags]) + payload
    yield "given-tokens", dict(decode_inputs())["1-1-131072-141"][:24] + bytes([2 + 16]) + bytes(200)
    yield "no-tokens", dict(decode_inputs())["1-1-131072-100"][:24] + bytes([2]) + bytes(200)


def column_inputs():
    """The sound payloads again, as columns."""
    for name, data in decode_inputs():
        if not name.startswith("fault"):
            yield name, data


def encode_inputs():
    """Shapes and records of encode: sound ones, and one for each refusal."""

    def made(flags, kind, profile, sizes, rounds, vocab_size, numbers, rest, scale=16, start=0):
        head = struct.pack("<7B", flags, kind, profile, sizes[0], sizes[1], sizes[2], rounds)
        return head + struct.pack("<IBBB", vocab_size, len(numbers), scale - 1, start) + bytes(numbers) + rest

    def records(*pairs):
        return b"".join(struct.pack("<IB", *pair) for pair in pairs)

    tokens = struct.pack("<HH", 1, 2)
    two = (1, 2, 0)
    yield "counts", made(0, 1, 1, two, 3, 10, [2], records((1, 1), (2, 2)) + tokens)
    yield "counts-columns", made(0, 1, 3, (2, 4, 15), 3, 10, [1], records((9, 3)) + bytes(8) + bytes(range(7)))
    yield "wide", made(0, 1, 2, (2, 3, 1), 63, 1 << 18, [1], records(((1 << 18) - 1, 63)) + bytes(8))
    yield "ratios", made(0, 2, 1, (1, 0, 0), 0, 1 << 17, [3], records((5, 3), (7, 0), (2, 9)))
    yield "ratios-many", made(32, 2, 3, (1, 0, 0), 0, 1 << 24, [255], bytes(5 * 300), scale=17)
    yield "ratios-two-bytes", made(32, 2, 3, (2, 0, 0), 0, 1 << 24, [255], bytes(5 * 300), scale=32)
    yield "sum", made(0, 1, 1, two, 3, 10, [1], records((1, 1)) + tokens)
    yield "order", made(0, 1, 1, two, 3, 10, [2], records((2, 1), (2, 2)) + tokens)
    yield "ratio-code", made(0, 2, 1, two, 0, 10, [1], records((2, 200)) + tokens)
    yield "ratio-order", made(0, 2, 1, two, 0, 10, [2], records((2, 5), (1, 0)) + tokens)
    yield "token", made(0, 1, 1, two, 3, 10, [1], records((2, 3)) + struct.pack("<HH", 10, 1))
    yield "token-size", made(0, 1, 3, two, 3, 1 << 24, [1], records((2, 3)) + tokens)
    yield "offsets-start", made(2, 1, 1, two, 3, 10, [1], records((2, 3)) + tokens, start=1)
    yield "offsets-fall", made(4, 1, 1, two, 3, 10, [12, 4, 10], records((2, 3)) * 6 + tokens)
    yield "offsets-end", made(16, 1, 1, two, 3, 10, [1], records((2, 3)) * 2 + tokens)


def roundtrip_inputs():
    """Weights: alike, tiny, out of range; ids twice; offsets that fall; too little scratch."""

    def made(flags, scale_log2, *positions):
        body = b"".join(struct.pack("<If", *pair) for pairs in positions for pair in pairs)
        return bytes([flags, scale_log2, len(positions), *(len(pairs) for pairs in positions)]) + body

    usual = [(5, 0.5), (3, 0.25), (9, 0.25), (1, 0.001)]
    yield "usual", made(0, 0, usual, [], [(7, 1.0)])
    yield "scaled", made(0, 5, [(1, 32.0), (2, 0.5)])
    yield "tiny", made(0, 0, [(1, 1e-40), (2, 2.0**-149), (3, 2.0**-32), (4, 0.5)], [(i, 2.0**-i) for i in range(40)])
    yield "equal", made(0, 0, [(40 - i, 0.025) for i in range(40)])
    yield "steep", made(0, 0, [(i, 1e-4**i) for i in range(1, 9)], [(i, 4.7e-10) for i in range(9)])
    yield "long", made(16, 0, [(i * 37 % 251, 0.9 * 0.93**i) for i in range(250)])
    yield "twice", made(0, 0, [(1, 0.5), (1, 0.25)])
    yield "zero", made(0, 0, [(1, 0.0)])
    yield "large", made(0, 0, [(1, 1.5)])
    yield "nan", made(0, 0, [(1, float("nan"))])
    yield "scale", made(0, 31, [(1, 0.5)])
    yield "offsets", made(4, 0, usual, usual)
    yield "offsets-start", made(4, 0, usual)
    yield "scratch", made(8, 0, usual)
    yield "any-weights", made(17, 3, [(i * 977, 3e5 * i) for i in range(60)])
    yield "spread-weights", made(19, 3, [(i * 977, 3e5 * i) for i in range(60)])


def merge_inputs():
    """Draws: sorted, equal, unsorted, of no and of too many rounds."""
    yield "sorted", bytes([0, 5]) + bytes(sorted([4, 9, 9, 200, 1])) + bytes([7] * 5)
    yield "steps", bytes([3, 50]) + struct.pack("<50I", *[(i % 3) * 1000 for i in range(50)])
    yield "unsorted", bytes([0, 4, 1, 3, 2, 9])
    yield "one", bytes([0, 1, 9, 3])
    yield "most", bytes([0, 127]) + bytes(127)
    yield "none", bytes([0, 0])
    yield "too-many", bytes([0, 128]) + bytes(128)


def ring_inputs():
    """Pushes and pops, around the end of the data too; then words overwritten one at a time."""
    push, peek, release = struct.pack("<BHBBB", 0, 900, 3, 1, 2), b"\3", b"\6"

    def poke(word, value, in_data=0):
        return struct.pack("<4BQ", 11, word, in_data, 1, value)

    yield "frames", b"\0" + (push + peek + release) * 12 + b"\x08" + struct.pack("<BQ", 10, 5) + bytes([9, 0]) + peek
    yield "full", b"\0" + push * 6 + (peek + release) * 6 + bytes([9, 1]) + push + release + b"\x09\2"
    yield "too-large", b"\0" + struct.pack("<BHBBB", 0, 4095, 255, 1, 2) + struct.pack("<BHBBB", 0, 10, 0, 255, 0)
    yield "no-ring", b"\3" + push + peek + release + b"\x08\x09\0" + b"\x0a" + bytes(8)
    yield "odd-size", b"\1" + push + peek
    yield "small", b"\2" + push + peek
    for word in range(64):
        if word < 2 or word % 16 < 6:
            for value in (64, 1 << 40, 2**64 - 1):
                yield f"word-{word}-{value}", b"\0" + push * 2 + poke(word, value) + peek + release + push + b"\x08"
    for word in range(4):
        for value in (1 << 40, (1 << 32) - 1, 0):
            yield f"header-{word}-{value}", b"\0" + push * 2 + poke(word, value, 1) + peek + release


def main() -> None:
    """Write every input."""
    for target, inputs in (
        ("decode", decode_inputs()),
        ("batch", batch_inputs()),
        ("columns", column_inputs()),
        ("encode", encode_inputs()),
        ("roundtrip", roundtrip_inputs()),
        ("merge", merge_inputs()),
        ("ring", ring_inputs()),
    ):
        folder = HERE / "corpus" / target
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in inputs:
            (folder / name).write_bytes(data)


if __name__ == "__main__":
    main()
