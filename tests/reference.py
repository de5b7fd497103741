"""A second reader and writer of the format, written from SPEC.md alone.

Slow, short and independent: plain integers and lists, no arrays, and nothing of the package that it checks.
Each function names the section of SPEC.md that it follows.
"""

import itertools
import json
import math
import struct
from collections.abc import Sequence as ListLike
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import xxhash

HEADER_MAGIC = bytes.fromhex("89534b4c0d0a1a0a")
BLOCK_MAGIC = bytes.fromhex("534b4c42")
TRAILER_MAGIC = bytes.fromhex("89534b4c454e440a")
HEADER_SIZE, BLOCK_HEADER_SIZE, TRAILER_SIZE, ROW_SIZE = 4096, 64, 64, 32
COUNTS, RATIOS = 1, 2
R24, R24W, R32 = 1, 2, 3
ID_BITS = {R24: 17, R24W: 18, R32: 24}
CODE_BITS = {R24: 7, R24W: 6, R32: 7}
RECORD_SIZE = {R24: 3, R24W: 3, R32: 4}
MAX_POSITIONS, MAX_PAYLOAD, MAX_CAPTURE = 2**22, 2**30, 3832


class UnreadableError(Exception):
    """What is there is no regular file."""


class UnsupportedError(Exception):
    """The file needs something that this reader does not know."""


class TruncatedError(Exception):
    """The file ends too early."""


class CorruptError(Exception):
    """The file contradicts itself or the specification."""


class MissingShardError(Exception):
    """The shards of a cache leave a gap."""


def xxh64(data: bytes, seed: int) -> int:
    """Section 2: XXH3-64."""
    return xxhash.xxh3_64_intdigest(data, seed)


def xxh128(data: bytes) -> int:
    """Section 2: XXH3-128; the integer whose 32 digits are the canonical text."""
    return int(xxhash.xxh3_128_hexdigest(data), 16)


# Section 7: canonical JSON


def canonical_json(value: Any) -> bytes:
    """A value in the one form that section 7 gives it; what a capture may not hold, ``check_capture`` knows."""
    return json_text(value).encode("ascii")


def json_text(value: Any, line: str = "") -> str:
    """JSON in one line, or in the lines of a manifest, which begin with ``line``: a line feed and indentation."""
    inner, space = (line + " ", " ") if line else ("", "")
    if isinstance(value, dict):
        parts = [f"{string_text(key)}:{space}{json_text(value[key], inner)}" for key in sorted(value)]
        return "{" + ",".join(inner + part for part in parts) + line * bool(parts) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(inner + json_text(part, inner) for part in value) + line * bool(value) + "]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int):
        return f"{value:d}"
    return float_text(value) if isinstance(value, float) else string_text(value)


def string_text(text: str) -> str:
    """ASCII between quotes; everything else as an escape, of 16 bits each."""
    short = {'"': '\\"', "\\": "\\\\", "\b": "\\b", "\f": "\\f", "\n": "\\n", "\r": "\\r", "\t": "\\t"}
    written = ""
    for character in text:
        if character in short:
            written += short[character]
        elif " " <= character <= "~":
            written += character
        else:
            units = character.encode("utf-16-be", "surrogatepass")
            written += "".join(f"\\u{int.from_bytes(units[i : i + 2], 'big'):04x}" for i in range(0, len(units), 2))
    return f'"{written}"'


def float_text(value: float) -> str:
    """The fewest digits that round to the value, with a point or an exponent."""
    if not math.isfinite(value):
        raise ValueError(f"{value} is not JSON")
    sign = "-" if math.copysign(1.0, value) < 0 else ""
    if value == 0:
        return sign + "0.0"
    digits, exponent = shortest(abs(value))
    if not -4 <= exponent < 16:
        return (
            f"{sign}{digits[0]}{'.' * (len(digits) > 1)}{digits[1:]}e{'-' if exponent < 0 else '+'}{abs(exponent):02d}"
        )
    if exponent < 0:
        return sign + "0." + "0" * (-exponent - 1) + digits
    whole, rest = digits[: exponent + 1], digits[exponent + 1 :]
    return sign + whole + "0" * (exponent + 1 - len(whole)) + "." + (rest or "0")


def shortest(value: float) -> tuple[str, int]:
    """Digits d and an exponent e: d[0].d[1]d[2]... * 10^e rounds to the value, and no fewer digits do."""
    exact = Fraction(value)
    exponent = len(str(exact.numerator)) - len(str(exact.denominator)) + 1
    while Fraction(10) ** exponent > exact:
        exponent -= 1
    for count in range(1, 18):
        unit = Fraction(10) ** (exponent - count + 1)
        below = exact // unit
        for n in sorted((below, below + 1), key=lambda n: (abs(n * unit - exact), n % 2)):
            if float(f"{n}e{exponent - count + 1}") == value:
                return str(n).rstrip("0"), exponent + len(str(n)) - count
    raise AssertionError(value)


def check_capture(value: Any) -> None:
    """What section 7 forbids in a capture, whatever its form."""
    if isinstance(value, dict):
        for key, part in value.items():
            check_capture(key)
            check_capture(part)
    elif isinstance(value, list):
        for part in value:
            check_capture(part)
    elif isinstance(value, str):
        check(not any(0xD800 <= ord(character) <= 0xDFFF for character in value), "half of a surrogate pair")
    elif isinstance(value, int):
        check(-(2**63) <= value < 2**64, "an integer beyond 64 bits")


def round_up(size: int) -> int:
    """The next multiple of 64."""
    return (size + 63) // 64 * 64


# Section 4.3: ratios


def ratio_table() -> list[int]:
    """T[q], rounded exactly: the 1024th root of a power of two is ten integer square roots."""
    table = []
    for q in range(128):
        doubled = 2 ** (32 * 1024 - q * q)
        for _ in range(10):
            doubled = math.isqrt(doubled)
        table.append((doubled + 1) // 2)
    return table


T = ratio_table()


def encode_ratios(pairs: ListLike[tuple[int, float]], scale_log2: int) -> list[tuple[int, int]]:
    """The (id, code) pairs of (id, weight) pairs with weights in (0, 2^scale_log2]; section 4.3, steps 1 to 3."""
    for _, weight in pairs:
        if not 0 < weight <= 2**scale_log2:
            raise ValueError(f"weight {weight} is not in (0, {2**scale_log2}]")
    v = 2**31
    ids, codes, values = [], [], []
    for token_id, weight in sorted(pairs, key=lambda pair: (-pair[1], pair[0])):
        u = math.floor(Fraction(weight) * Fraction(2) ** (31 - scale_log2) + Fraction(1, 2))
        steps = [(v * ratio) >> 31 for ratio in T]
        m = min(step for step in steps if step != 0)
        if u >= v:
            code = 0
        elif 2 * u < m:
            break
        elif u <= m:
            code = steps.index(m)
        else:
            q_b = next(q for q in range(128) if steps[q] <= u)
            a, b = steps[q_b - 1], steps[q_b]
            code = q_b if a * b > u * u else steps.index(a)
        v = steps[code]
        ids.append(token_id)
        codes.append(code)
        values.append(v)
    order = sorted(range(len(ids)), key=lambda i: (-values[i], ids[i]))
    return [(ids[i], code) for i, code in zip(order, codes, strict=True)]


def ratio_values(codes: ListLike[int]) -> list[int]:
    """v_1, v_2, ... of the codes of a position; section 4.3."""
    v, values = 2**31, []
    for code in codes:
        v = (v * T[code]) >> 31
        values.append(v)
    return values


# Sections 5 and 7: the things that a shard holds


@dataclass
class Settings:
    """Every free field of a header; section 7."""

    kind: int = COUNTS
    profile: int = R24
    record_count_size: int = 1
    token_size: int = 0
    scale_log2: int = 0
    columns: int = 0
    vocab_size: int = 1
    seq_len: int = 0
    rounds: int = 0
    shard_number: int = 0
    first_sequence: int = 0
    sampler: int = 0
    order_algorithm: int = 0
    order_version: int = 0
    proposal_temperature: float = 1.0
    sampling_seed: int = 0
    packing_seed: int = 0
    tokenizer_fingerprint: int = 0
    corpus_fingerprint: int = 0
    teacher_fingerprint: int = 0
    capture: dict[str, Any] = field(default_factory=dict)
    version_minor: int = 0
    compatible_flags: int = 0


@dataclass
class Sequence:
    """One sequence: T + 1 tokens and, at each of T positions, (id, count) or (id, ratio code) pairs in stored order."""

    tokens: list[int] | None
    positions: list[list[tuple[int, int]]]
    label_logprob: list[float] | None = None
    entropy: list[float] | None = None
    document_start: list[bool] | None = None
    record_logprob: list[float] | None = None
    alignment: int = 0

    def values(self) -> list[list[int]]:
        """The exact integer weights v_i of kind ratios, in units of 2^(scale_log2 - 31)."""
        return [ratio_values([code for _, code in records]) for records in self.positions]


@dataclass
class Opened:
    """A shard without its blocks: what a reader knows once it is open."""

    data: bytes
    settings: Settings
    seed: int
    rows: list[tuple[int, int, int, int, int]]
    cache_key: int
    root: int
    num_records: int


@dataclass
class Shard:
    """A decoded shard."""

    settings: Settings
    sequences: list[Sequence]
    cache_key: int
    root: int
    num_records: int
    size_bytes: int


# Writing


def cache_key_of(header: bytes) -> int:
    """Section 6.2."""
    data = bytearray(header[32:4088])
    data[52 - 32 : 64 - 32] = bytes(12)
    return xxh128(bytes(data))


def shard_key_of(header: bytes) -> int:
    """Section 6.2."""
    shard_number = struct.unpack_from("<I", header, 52)[0]
    return xxh128(cache_key_of(header).to_bytes(16, "little") + struct.pack("<I", shard_number)) & (2**64 - 1)


def alignment_of(tokens: ListLike[int]) -> int:
    """Section 6.3."""
    return xxh64(b"".join(struct.pack("<I", token) for token in tokens), 0)


def root_of(header: bytes, block_checksums: ListLike[int]) -> int:
    """Section 6.4."""
    return xxh128(header[4088:4096] + b"".join(struct.pack("<Q", checksum) for checksum in block_checksums))


def cache_fingerprint(roots: ListLike[int]) -> int:
    """Section 6.4."""
    return xxh128(b"".join(root.to_bytes(16, "little") for root in roots))


def encode_header(settings: Settings) -> bytes:
    """Section 7."""
    s = settings
    capture = canonical_json(s.capture)
    header = HEADER_MAGIC + struct.pack("<HHIQQ", 1, s.version_minor, HEADER_SIZE, 0, s.compatible_flags)
    header += struct.pack("<6BH", s.kind, s.profile, 1, s.record_count_size, s.token_size, s.scale_log2, s.columns)
    header += struct.pack("<IIIIQ", s.vocab_size, s.seq_len, s.rounds, s.shard_number, s.first_sequence)
    header += struct.pack("<BBHHH", s.sampler, 0, s.order_algorithm, s.order_version, 0)
    header += struct.pack("<dQQ", s.proposal_temperature, s.sampling_seed, s.packing_seed)
    for fingerprint in (s.tokenizer_fingerprint, s.corpus_fingerprint, s.teacher_fingerprint):
        header += fingerprint.to_bytes(16, "little")
    header += struct.pack("<I", len(capture)) + bytes(108) + capture + bytes(MAX_CAPTURE - len(capture))
    return header + struct.pack("<Q", xxh64(header, 0))


def encode_payload(settings: Settings, sequence: Sequence) -> bytes:
    """Section 5.1."""
    assert sequence.tokens is not None
    counts = b"".join(len(p).to_bytes(settings.record_count_size, "little") for p in sequence.positions)
    records = b"".join(
        (token_id + (code << ID_BITS[settings.profile])).to_bytes(RECORD_SIZE[settings.profile], "little")
        for position in sequence.positions
        for token_id, code in position
    )
    tokens = b"".join(token.to_bytes(settings.token_size, "little") for token in sequence.tokens if settings.token_size)
    columns = b""
    if settings.columns & 1:
        columns += halves(sequence.label_logprob or [])
    if settings.columns & 2:
        columns += halves(sequence.entropy or [])
    if settings.columns & 4:
        bits = sum(2**i for i, starts in enumerate(sequence.document_start or []) if starts)
        columns += bits.to_bytes((len(sequence.positions) + 8) // 8, "little")
    if settings.columns & 8:
        columns += halves(sequence.record_logprob or [])
    return counts + records + tokens + columns


def halves(values: ListLike[float]) -> bytes:
    """Section 5.1: f16, and 0 instead of -0."""
    return b"".join(struct.pack("<e", value + 0.0) for value in values)


def encode_block(settings: Settings, sequence: Sequence, number: int, seed: int) -> bytes:
    """Section 5.2."""
    assert sequence.tokens is not None
    payload = encode_payload(settings, sequence)
    padded = payload + bytes(round_up(len(payload) + 64) - len(payload))
    num_records = sum(len(position) for position in sequence.positions)
    header = BLOCK_MAGIC + bytes(4) + struct.pack("<Q", number)
    header += struct.pack("<IIII", len(sequence.positions), num_records, len(payload), 0)
    header += struct.pack("<QQQ", alignment_of(sequence.tokens), xxh64(padded, seed), 0)
    return header + struct.pack("<Q", xxh64(header, seed)) + padded


def join_shard(header: bytes, blocks: ListLike[bytes]) -> bytes:
    """Sections 8 and 9: put index and trailer behind a header and its blocks."""
    seed = shard_key_of(header)
    offsets, at = [], HEADER_SIZE
    for block in blocks:
        offsets.append(at)
        at += len(block)
    rows = [struct.unpack_from("<II", block, 16) for block in blocks]
    index = b"".join(struct.pack("<Q", offset) for offset in offsets)
    index += b"".join(block[32:40] for block in blocks) + b"".join(block[56:64] for block in blocks)
    index += b"".join(struct.pack("<I", row[0]) for row in rows) + b"".join(struct.pack("<I", row[1]) for row in rows)
    index += bytes(round_up(len(index)) - len(index))
    root = root_of(header, [struct.unpack_from("<Q", block, 56)[0] for block in blocks])
    trailer = TRAILER_MAGIC + struct.pack("<QQQ", at, len(blocks), sum(row[1] for row in rows))
    trailer += root.to_bytes(16, "little") + struct.pack("<Q", xxh64(index, seed))
    return header + b"".join(blocks) + index + trailer + struct.pack("<Q", xxh64(trailer, seed))


def encode_shard(settings: Settings, sequences: ListLike[Sequence]) -> bytes:
    """The bytes of a sealed shard."""
    header = encode_header(settings)
    seed = shard_key_of(header)
    return join_shard(header, [encode_block(settings, s, number, seed) for number, s in enumerate(sequences)])


# Reading


def check(condition: bool, message: str) -> None:
    """Raise CorruptError unless the condition holds."""
    if not condition:
        raise CorruptError(message)


def nesting(text: bytes) -> int:
    """Objects and lists inside each other in JSON, by its brackets outside of strings."""
    deepest = depth = 0
    in_string = escaped = False
    for byte in text:
        if in_string:
            in_string = escaped or byte != ord('"')
            escaped = byte == ord("\\") and not escaped
        elif byte == ord('"'):
            in_string, escaped = True, False
        else:
            depth += (byte in b"[{") - (byte in b"]}")
            deepest = max(deepest, depth)
    return deepest


def decode_header(header: bytes) -> Settings:
    """Section 13, the rows that concern the header, behind its magic and its size."""
    major, minor, header_size, incompatible, compatible = struct.unpack_from("<HHIQQ", header, 8)
    if major != 1:
        raise UnsupportedError(f"version_major {major}")
    check(struct.unpack_from("<Q", header, 4088)[0] == xxh64(header[:4088], 0), "header_checksum")
    if incompatible:
        raise UnsupportedError(f"incompatible_flags {incompatible:#x}")
    kind, profile, row_convention, record_count_size, token_size, scale, columns = struct.unpack_from(
        "<6BH", header, 32
    )
    vocab_size, seq_len, rounds, shard_number, first_sequence = struct.unpack_from("<IIIIQ", header, 40)
    sampler, zero_0, order_algorithm, order_version, zero_1 = struct.unpack_from("<BBHHH", header, 64)
    temperature, sampling_seed, packing_seed = struct.unpack_from("<dQQ", header, 72)
    for name, value, known in (
        ("header_size", header_size, range(HEADER_SIZE, HEADER_SIZE + 1)),
        ("kind", kind, range(1, 3)),
        ("profile", profile, range(1, 4)),
        ("row_convention", row_convention, range(1, 2)),
        ("sampler", sampler, range(6)),
        ("columns", columns, range(16)),
    ):
        if value not in known:
            raise UnsupportedError(f"{name} {value}")
    check(record_count_size in (1, 2), "record_count_size")
    check(token_size in (0, 2, 3, 4), "token_size")
    check(scale <= 30 and (kind == RATIOS or scale == 0), "scale_log2")
    check(profile != R24W or kind == COUNTS, "R24W holds counts only")
    check(kind != COUNTS or sampler not in (3, 4), "counts are drawn")
    check(1 <= vocab_size <= 2 ** ID_BITS[profile], "vocab_size")
    check(token_size == 0 or vocab_size <= 2 ** (8 * token_size), "vocab_size does not fit token_size")
    check(seq_len <= MAX_POSITIONS, "seq_len")
    check(1 <= rounds <= 2 ** CODE_BITS[profile] - 1 if kind == COUNTS else rounds <= 65535, "rounds")
    check(math.isfinite(temperature) and temperature > 0, "proposal_temperature")
    check(kind == RATIOS or temperature == 1, "proposal_temperature of counts")
    capture_size = struct.unpack_from("<I", header, 144)[0]
    check(capture_size <= MAX_CAPTURE, "capture_size")
    check(zero_0 == 0 and zero_1 == 0 and not any(header[148:256]), "reserved")
    check(not any(header[256 + capture_size : 4088]), "zero bytes behind the capture")
    text = header[256 : 256 + capture_size]
    check(nesting(text) <= 32, "capture is nested too deep")
    try:
        capture = json.loads(text.decode("ascii"))
        canonical = canonical_json(capture)
    except (ValueError, RecursionError) as error:
        raise CorruptError("capture") from error
    check(isinstance(capture, dict) and canonical == text, "capture")
    check_capture(capture)
    fingerprints = [int.from_bytes(header[at : at + 16], "little") for at in (96, 112, 128)]
    return Settings(
        kind,
        profile,
        record_count_size,
        token_size,
        scale,
        columns,
        vocab_size,
        seq_len,
        rounds,
        shard_number,
        first_sequence,
        sampler,
        order_algorithm,
        order_version,
        temperature,
        sampling_seed,
        packing_seed,
        *fingerprints,
        capture,
        minor,
        compatible,
    )


def check_records(settings: Settings, records: list[tuple[int, int]]) -> None:
    """Sections 4.2 and 4.3: what the records of one position must be."""
    ids = [token_id for token_id, _ in records]
    check(all(token_id < settings.vocab_size for token_id in ids), "id")
    if settings.kind == COUNTS:
        check(all(a < b for a, b in itertools.pairwise(ids)), "ids increase")
        check(all(1 <= count <= settings.rounds for _, count in records), "count")
        check(not records or sum(count for _, count in records) == settings.rounds, "sum of counts")
    else:
        values = ratio_values([code for _, code in records])
        check(len(set(ids)) == len(ids), "id twice")
        check(0 not in values, "weight of 0")
        for i in range(1, len(ids)):
            check(values[i] != values[i - 1] or ids[i] > ids[i - 1], "ids of equal weights increase")


def decode_payload(settings: Settings, payload: bytes, num_positions: int, num_records: int) -> Sequence:
    """Section 5.1 of a payload of the right size."""
    s = settings
    at = 0

    def take(count: int, size: int) -> list[int]:
        nonlocal at
        values = [int.from_bytes(payload[at + i * size : at + (i + 1) * size], "little") for i in range(count)]
        at += count * size
        return values

    numbers = take(num_positions, s.record_count_size)
    check(sum(numbers) == num_records, "num_records")
    words = take(num_records, RECORD_SIZE[s.profile])
    id_bits, code_bits = ID_BITS[s.profile], CODE_BITS[s.profile]
    check(all(word >> (id_bits + code_bits) == 0 for word in words), "bits that must be 0")
    records = [(word % 2**id_bits, word >> id_bits) for word in words]
    positions, first = [], 0
    for number in numbers:
        positions.append(records[first : first + number])
        check_records(s, positions[-1])
        first += number
    tokens = take(num_positions + 1, s.token_size) if s.token_size else None
    check(tokens is None or all(token < s.vocab_size for token in tokens), "token")
    label_logprob = entropy = document_start = record_logprob = None
    if s.columns & 1:
        label_logprob = check_halves(take(num_positions, 2), positive=False)
        check_where_records(label_logprob, numbers)
    if s.columns & 2:
        entropy = check_halves(take(num_positions, 2), positive=True)
        check_where_records(entropy, numbers)
    if s.columns & 4:
        octets = take((num_positions + 8) // 8, 1)
        bits = [octet >> i & 1 for octet in octets for i in range(8)]
        check(not any(bits[num_positions + 1 :]), "bits behind the last token")
        document_start = [bit == 1 for bit in bits[: num_positions + 1]]
    if s.columns & 8:
        record_logprob = check_halves(take(num_records, 2), positive=False)
    return Sequence(tokens, positions, label_logprob, entropy, document_start, record_logprob)


def check_halves(words: list[int], *, positive: bool) -> list[float]:
    """Section 5.1: f16 values of an optional column, which may be above 0 or not."""
    check(all(word != 0x8000 for word in words), "-0 in a column")
    values = [struct.unpack("<e", struct.pack("<H", word))[0] for word in words]
    check(all(math.isfinite(value) for value in values), "column is not finite")
    check(positive or all(value <= 0 for value in values), "log-probability above 0")
    return values


def check_where_records(column: list[float], numbers: list[int]) -> None:
    """Section 5.1: 0 where a position has no record."""
    for value, number in zip(column, numbers, strict=True):
        check(number != 0 or value == 0, "column of a position without records")


def open_shard(data: bytes) -> Opened:
    """Read and check header, trailer and index; section 13 in its order."""
    if data[:8] != HEADER_MAGIC[: len(data)]:
        raise UnsupportedError("magic")
    if len(data) < HEADER_SIZE:
        raise TruncatedError("the file is shorter than a header")
    header, trailer = data[:HEADER_SIZE], data[-TRAILER_SIZE:]
    settings = decode_header(header)
    seed = shard_key_of(header)
    if len(data) < HEADER_SIZE + TRAILER_SIZE or trailer[:8] != TRAILER_MAGIC:
        raise TruncatedError("no trailer")
    index_offset, num_sequences, num_records = struct.unpack_from("<QQQ", trailer, 8)
    root = int.from_bytes(trailer[32:48], "little")
    index_checksum, trailer_checksum = struct.unpack_from("<QQ", trailer, 48)
    check(trailer_checksum == xxh64(trailer[:56], seed), "trailer_checksum")
    check(num_sequences < 2**32, "num_sequences")
    check(settings.first_sequence + num_sequences <= 2**64, "numbers of the sequences")
    check(index_offset + round_up(ROW_SIZE * num_sequences) + TRAILER_SIZE == len(data), "size of the file")
    check(index_offset >= HEADER_SIZE, "index_offset")
    index = data[index_offset : len(data) - TRAILER_SIZE]
    check(index_checksum == xxh64(index, seed), "index_checksum")
    n = num_sequences
    check(not any(index[ROW_SIZE * n :]), "zero bytes of the index")
    offsets = struct.unpack_from(f"<{n}Q", index, 0)
    alignments = struct.unpack_from(f"<{n}Q", index, 8 * n)
    checksums = struct.unpack_from(f"<{n}Q", index, 16 * n)
    positions = struct.unpack_from(f"<{n}I", index, 24 * n)
    records = struct.unpack_from(f"<{n}I", index, 28 * n)
    check(root == root_of(header, checksums), "root digest")
    check(num_records == sum(records), "num_records of the trailer")
    at = HEADER_SIZE
    for i in range(n):
        check(offsets[i] == at, "offset")
        check(1 <= positions[i] <= MAX_POSITIONS, "num_positions")
        check(settings.seq_len in (0, positions[i]), "num_positions is not seq_len")
        size = payload_size(settings, positions[i], records[i])
        check(size <= MAX_PAYLOAD, "payload_size")
        at += BLOCK_HEADER_SIZE + round_up(size + 64)
    check(at == index_offset, "the blocks fill the file up to the index")
    rows = list(zip(offsets, alignments, checksums, positions, records, strict=True))
    return Opened(data, settings, seed, rows, cache_key_of(header), root, num_records)


def payload_size(settings: Settings, num_positions: int, num_records: int) -> int:
    """Section 5.1."""
    size = num_positions * settings.record_count_size + num_records * RECORD_SIZE[settings.profile]
    size += (num_positions + 1) * settings.token_size + 2 * num_positions * (settings.columns & 3).bit_count()
    size += (num_positions + 8) // 8 if settings.columns & 4 else 0
    return size + (2 * num_records if settings.columns & 8 else 0)


def decode_shard(data: bytes) -> Shard:
    """Read and check a whole shard; section 13 in its order."""
    return decode_blocks(open_shard(data))


def decode_blocks(opened: Opened) -> Shard:
    """Read and check the blocks of a shard; section 13 in its order."""
    settings, seed, sequences = opened.settings, opened.seed, []
    for i, (at, index_alignment, index_checksum, positions, records) in enumerate(opened.rows):
        size = payload_size(settings, positions, records)
        block = opened.data[at : at + BLOCK_HEADER_SIZE + round_up(size + 64)]
        check(block[:4] == BLOCK_MAGIC, "magic of a block")
        block_checksum = struct.unpack_from("<Q", block, 56)[0]
        check(block_checksum == xxh64(block[:56], seed), "block_checksum")
        if block[4] != 0:
            raise UnsupportedError("codec")
        check(not any(block[5:8]) and not any(block[28:32]) and not any(block[48:56]), "reserved")
        number, num_positions, num_records, stored_size = struct.unpack_from("<QIII", block, 8)
        alignment, payload_checksum = struct.unpack_from("<QQ", block, 32)
        check(number == i, "block_number")
        check((num_positions, num_records) == (positions, records), "block header and index")
        check(stored_size == size, "payload_size")
        check((alignment, block_checksum) == (index_alignment, index_checksum), "block header and index")
        check(payload_checksum == xxh64(block[64:], seed), "payload_checksum")
        check(not any(block[64 + size :]), "zero bytes of a block")
        sequence = decode_payload(settings, block[64 : 64 + size], num_positions, num_records)
        check(sequence.tokens is None or alignment_of(sequence.tokens) == alignment, "alignment")
        sequence.alignment = alignment
        sequences.append(sequence)
    return Shard(settings, sequences, opened.cache_key, opened.root, opened.num_records, len(opened.data))


def decode_cache(directory: Path) -> list[Shard]:
    """Read and check a whole cache; sections 11 and 13 in their order."""
    names = sorted(path.name for path in directory.iterdir())
    files = [name for name in names if name.endswith(".skl") and name != ".skl"]
    listed = None
    if "manifest.json" in names:
        listed = decode_manifest(read_file(directory / "manifest.json"), files)
    elif any(name.endswith(".skl.partial") for name in names):
        raise MissingShardError("a shard is unfinished")
    elif not files:
        raise MissingShardError("no shard")
    named = [(open_shard(read_file(directory / name)), name) for name in files]
    named.sort(key=lambda pair: (pair[0].settings.first_sequence, pair[0].settings.shard_number))
    entries = [entry_of(opened, name) for opened, name in named]
    check(listed is None or listed == entries, "a shard is not what the manifest says")
    check(len({opened.cache_key for opened, _ in named}) == 1, "shards of two caches")
    check_follow(entries)
    return [decode_blocks(opened) for opened, _ in named]


def read_file(path: Path) -> bytes:
    """The bytes of a regular file, or of one that a link leads to."""
    if not path.is_file():
        raise UnreadableError(path.name)
    return path.read_bytes()


def check_follow(entries: list[dict[str, Any]]) -> None:
    """Section 11: each shard begins where the one before ends, and has its place as its number."""
    expected = 0
    for place, entry in enumerate(entries):
        if entry["first_sequence"] > expected:
            raise MissingShardError(f"no shard holds sequence {expected}")
        check(entry["first_sequence"] == expected, "shards overlap")
        check(entry["shard_number"] == place, "shard_number")
        expected += entry["num_sequences"]


NUMBERS = ("first_sequence", "num_records", "num_sequences", "shard_number", "size_bytes")


def decode_manifest(text: bytes, files: list[str]) -> list[dict[str, Any]]:
    """What a manifest says of its shards; ``files`` lie beside it.  Section 11, section 13 in its order."""
    check(len(text) <= 2**28, "size of the manifest")
    try:
        body = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CorruptError("manifest") from error
    if not isinstance(body, dict) or body.get("format") != "sklformat cache":
        raise UnsupportedError("format of the manifest")
    if type(body.get("version")) is not int or body["version"] != 1:
        raise UnsupportedError("version of the manifest")
    check(set(body) == {"digest", "fingerprint", "format", "shards", "version"}, "keys of the manifest")
    entries = body["shards"]
    check(isinstance(entries, list) and 1 <= len(entries) <= 2**20, "shards of the manifest")
    for entry in entries:
        check(isinstance(entry, dict) and set(entry) == {"fingerprint", "name", *NUMBERS}, "keys of a shard")
        check_hexadecimal(entry["fingerprint"])
        check_name(entry["name"])
        check(all(type(entry[key]) is int and 0 <= entry[key] < 2**64 for key in NUMBERS), "numbers of a shard")
        check(entry["num_sequences"] < 2**32, "num_sequences")
    check_hexadecimal(body["fingerprint"])
    check(text == manifest_bytes(body), "form of the manifest")
    digest = body.pop("digest")
    check(digest == f"{xxh128(canonical_json(body)):032x}", "digest")
    check_follow(entries)
    listed = [entry["name"] for entry in entries]
    check(len(set(listed)) == len(listed), "a shard is listed twice")
    roots = [int(entry["fingerprint"], 16) for entry in entries]
    check(body["fingerprint"] == f"{cache_fingerprint(roots):032x}", "fingerprint of the manifest")
    if not set(listed) <= set(files):
        raise MissingShardError("a listed shard")
    check(set(files) <= set(listed), "a shard that is not listed")
    return entries


def check_hexadecimal(value: Any) -> None:
    """Section 11: 32 lower-case hexadecimal digits."""
    check(isinstance(value, str) and len(value) == 32 and set(value) <= set("0123456789abcdef"), "hexadecimal digits")


def check_name(name: Any) -> None:
    """Section 11: what the name of a shard may be."""
    check(isinstance(name, str) and name.endswith(".skl") and name != ".skl", "name without .skl")
    forbidden = {*range(0x20), *range(0x7F, 0xA0), *range(0xD800, 0xE000), ord("/"), ord("\\")}
    check(not any(ord(character) in forbidden for character in name), "character of a name")
    check(len(name.encode()) <= 255, "length of a name")


def manifest_bytes(manifest: dict[str, Any]) -> bytes:
    """The one form of a manifest."""
    return (json_text(manifest, "\n") + "\n").encode("ascii")


def entry_of(shard: Opened | Shard, name: str) -> dict[str, Any]:
    """What a manifest says of a shard."""
    return {
        "name": name,
        "shard_number": shard.settings.shard_number,
        "first_sequence": shard.settings.first_sequence,
        "num_sequences": len(shard.rows if isinstance(shard, Opened) else shard.sequences),
        "num_records": shard.num_records,
        "size_bytes": len(shard.data) if isinstance(shard, Opened) else shard.size_bytes,
        "fingerprint": f"{shard.root:032x}",
    }


def expected_manifest(named: list[tuple[Shard, str]]) -> dict[str, Any]:
    """The manifest of shards and their file names."""
    manifest = {
        "format": "sklformat cache",
        "version": 1,
        "fingerprint": f"{cache_fingerprint([shard.root for shard, _ in named]):032x}",
        "shards": [entry_of(shard, name) for shard, name in named],
    }
    return manifest | {"digest": f"{xxh128(canonical_json(manifest)):032x}"}


# Section 12


def mix(x: int) -> int:
    """The mix of section 12, of x modulo 2^64."""
    x %= 2**64
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return x ^ (x >> 31)


def thin(records: list[tuple[int, int]], kept: int, seed: int, sequence: int, t: int) -> list[tuple[int, int]]:
    """docs/operations.md, Thinning: what is left of a position's (id, count) pairs."""
    step, mask = 0x9E3779B97F4A7C15, (1 << 64) - 1
    word = xxh64(seed.to_bytes(8, "little") + sequence.to_bytes(8, "little"), 0)
    start = mix((word + (t + 1) * step) & mask)
    draws = [token_id for token_id, count in records for _ in range(count)]
    order = sorted(range(len(draws)), key=lambda j: mix((start + (j + 1) * step) & mask))
    left = [draws[j] for j in order[:kept]]
    return [(token_id, left.count(token_id)) for token_id, _ in records if token_id in left]


def permute(n: int, seed: int, epoch: int, i: int) -> int:
    """Where place i of an epoch finds its sequence; order_algorithm 1, version 1."""
    half = (max(2, (n - 1).bit_length()) + 1) // 2
    keys = [xxh64(struct.pack("<QQQ", seed, epoch, r), 0) for r in range(8)]
    x = i
    while True:
        left, right = x >> half, x % 2**half
        for key in keys:
            left, right = right, left ^ mix(right + key) % 2**half
        x = left * 2**half + right
        if x < n:
            return x


def permute_windows(n: int, window: int, seed: int, epoch: int, i: int) -> int:
    """The same for order_algorithm 2, version 1."""

    def word(k: int) -> int:
        return xxh64(struct.pack("<QQQ", seed, epoch, k), 0)

    whole, b, j = n // window, i // window, i % window
    if b < whole:
        size, first = window, permute(whole, seed, epoch, b) * window
    else:
        size, first = n % window, whole * window
    return (first + permute(size, word(9 + b), epoch, j) + word(8)) % n


def shares(sizes: list[int], weights: list[float]) -> list[int]:
    """What each cache of a mixture gives to an epoch."""
    places, total = sum(sizes), sum(map(Fraction, weights))
    quotas = [places * Fraction(weight) / total for weight in weights]
    out = [int(quota) for quota in quotas]
    while sum(out) < places:
        lost = [quota - share for quota, share in zip(quotas, out, strict=True)]
        out[lost.index(max(lost))] += 1
    return out


def mixed(shares: list[int], seed: int, epoch: int, i: int, *, shuffle: bool = True) -> tuple[int, int]:
    """The cache of place i of a mixture's epoch, and the number of its sequence from epoch 0 on; mixture version 1."""
    first, end, k = 0, len(shares), i
    while end - first > 1:
        middle = (first + end) // 2
        left, total = sum(shares[first:middle]), sum(shares[first:end])
        b, j = divmod(k, 16)
        size = min(16, total - 16 * b)
        before = 16 * b * left // total
        here = (16 * b + size) * left // total - before
        turn = mix(xxh64(struct.pack("<QQQQ", seed, epoch, first, end), 0) + b) % size if shuffle else 0
        taken, after = (before + (t + turn) * here // size - turn * here // size for t in (j, j + 1))
        if after > taken:
            end, k = middle, taken
        else:
            first, k = middle, k - taken
    return first, epoch * shares[first] + k


def mixed_sequence(
    sizes: list[int], shares: list[int], seed: int, epoch: int, i: int, window: int | None = None
) -> tuple[int, int]:
    """The cache and the sequence at place i of a mixture's shuffled epoch."""
    cache, number = mixed(shares, seed, epoch, i)
    own = xxh64(struct.pack("<QQ", seed, cache), 0)
    walk, place = divmod(number, sizes[cache])
    if window is None:
        return cache, permute(sizes[cache], own, walk, place)
    return cache, permute_windows(sizes[cache], window, own, walk, place)
