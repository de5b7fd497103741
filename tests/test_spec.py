"""SPEC.md and the code say the same: tables, limits, the worked shard, the ratio table and the test vectors."""

import re
import struct
from pathlib import Path

import numpy as np
import pytest
import reference
import strategies

import sklformat as skl
from sklformat import checksums, native
from sklformat.cache.contents import scan_directory
from sklformat.cache.manifest import write_manifest
from sklformat.format import columns, layout, order

TEXT = (Path(__file__).parents[1] / "SPEC.md").read_text()


def section(title: str) -> str:
    """The text from a heading to the next of any level."""
    found = re.search(rf"^#+ {re.escape(title)}$(.*?)(?=^#+ |\Z)", TEXT, re.MULTILINE | re.DOTALL)
    assert found, title
    return found[1]


def table(title: str) -> list[list[str]]:
    """The rows of the first table of a section, without its head."""
    rows = [line for line in section(title).splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[2:]]


def number(text: str) -> int:
    """A number of a table: 12, 2^24, 2^32 - 1."""
    base, _, rest = text.partition(" - ")
    root, _, power = base.partition("^")
    return int(root) ** int(power or 1) - int(rest or 0)


TABLES = {
    "7. Header": (layout.HEADER_FIELDS, layout.HEADER_SIZE),
    "5.2 Block header": (layout.BLOCK_FIELDS, layout.BLOCK_HEADER_SIZE),
    "8. Index": (layout.INDEX_COLUMNS, layout.INDEX_ROW_SIZE),
    "9. Trailer": (layout.TRAILER_FIELDS, layout.TRAILER_SIZE),
}


@pytest.mark.parametrize("title", TABLES)
def test_fields_are_those_of_the_table(title):
    """Offset, size, type and name of every field are the same in SPEC.md and in layout.py."""
    rows = [(int(row[0]), int(row[1]), row[2], row[3]) for row in table(title)]
    assert rows == [(field.offset, field.size, field.type, field.name) for field in TABLES[title][0]]


@pytest.mark.parametrize("title", TABLES)
def test_fields_leave_no_hole(title):
    """Fields follow each other without hole or overlap, to the end of their part, and their types have their sizes."""
    fields, size = TABLES[title]
    at = 0
    for field in fields:
        assert at == field.offset
        assert field.type in ("zero", "bytes") or field.size == int(field.type[1:]) // 8
        at += field.size
    assert size == at


def test_parts_of_a_shard():
    """The overview names the parts with their sizes: header, index row, trailer, and the multiple of 64."""
    parts = {row[0]: row[1] for row in table("3. Overview")}
    assert str(layout.HEADER_SIZE) == parts["header"]
    assert f"a multiple of {layout.ALIGN} each" == parts["blocks"]
    assert f"{layout.INDEX_ROW_SIZE} per sequence, rounded up to a multiple of {layout.ALIGN}" == parts["index"]
    assert str(layout.TRAILER_SIZE) == parts["trailer"]


def test_magics():
    """The magic bytes of header, block and trailer are those of their tables."""
    for title, magic in (
        ("7. Header", layout.HEADER_MAGIC),
        ("5.2 Block header", layout.BLOCK_MAGIC),
        ("9. Trailer", layout.TRAILER_MAGIC),
    ):
        found = re.search(r"`([0-9a-f ]+)`", " ".join(table(title)[0]))
        assert found is not None
        assert bytes.fromhex(found[1]) == magic


def test_profiles():
    """Number, record size and bits of each profile are those of section 4.1."""
    rows = table("4.1 Profiles")
    assert list(layout.PROFILES) == [row[0] for row in rows]
    for name, number_text, size, ids, codes, zero in rows:
        low, high = (int(bit) for bit in codes.split(".."))
        assert int(number_text) == layout.PROFILES[name]
        assert int(size) == layout.RECORD_SIZE[name]
        assert f"0..{layout.ID_BITS[name] - 1}" == ids
        assert (layout.ID_BITS[name], layout.CODE_BITS[name]) == (low, high - low + 1)
        assert (layout.RECORD_SIZE[name] * 8 == high + 1) == (zero == "")


def test_limits():
    """The limits of section 14 are the constants of layout.py."""
    limits = {row[0]: row[1] for row in table("14. Limits and growth")}
    assert number(limits["vocab_size"]) == layout.MAX_VOCAB_SIZE
    assert number(limits["positions of a sequence"]) == layout.MAX_POSITIONS
    assert number(limits["bytes of a payload"]) == layout.MAX_PAYLOAD_SIZE
    assert number(limits["sequences of a shard"]) == layout.MAX_SEQUENCES - 1
    assert number(limits["bytes of a manifest"]) == layout.MAX_MANIFEST_SIZE
    assert number(limits["shards of a cache"]) == layout.MAX_SHARDS
    assert "2^64" == limits["first_sequence + number of sequences"]
    assert str(layout.MAX_CAPTURE_DEPTH) == limits["objects and lists inside each other in capture, itself counted"]
    assert limits["rounds"] == f"{layout.MAX_ROUNDS} (counts: {2 ** layout.CODE_BITS['R24'] - 1})"
    assert limits["records of a position"].startswith("255 or 65535")


def must_be() -> dict[str, str]:
    return {row[3]: row[5] for row in table("7. Header")}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("vocab_size", f"1..2^{layout.MAX_VOCAB_SIZE.bit_length() - 1}"),
        ("seq_len", f"0..2^{layout.MAX_POSITIONS.bit_length() - 1}"),
        ("scale_log2", f"0..{layout.MAX_SCALE_LOG2}; 0 for counts"),
        ("capture_size", f"2..{layout.MAX_CAPTURE_SIZE}"),
        ("columns", f"0..{sum(layout.COLUMNS.values())}"),
        ("kind", ", ".join(str(n) for n in layout.KINDS.values())),
        ("profile", f"1..{max(layout.PROFILES.values())}"),
        ("sampler", f"0..{max(layout.SAMPLERS.values())}"),
        ("rounds", f"counts: 4.2; ratios: 0..{layout.MAX_ROUNDS}"),
        ("version_major", str(layout.VERSION_MAJOR)),
        ("header_size", str(layout.HEADER_SIZE)),
    ],
)
def test_ranges_of_header_fields(name, expected):
    """What a header field must be, in SPEC.md, follows from the constants of layout.py."""
    assert expected == must_be()[name]


def test_numbers_of_names():
    """The numbers of kinds, samplers and columns are those of section 7."""
    meanings = {row[3]: row[4] for row in table("7. Header")}
    assert dict.fromkeys(layout.KINDS) == dict.fromkeys(re.findall(r"\d (\w+)", meanings["kind"]))
    pairs = {name: int(n) for n, name in re.findall(r"(\d) (\w+)", meanings["sampler"])}
    assert pairs == layout.SAMPLERS
    bits = {name: 1 << int(n) for n, name in re.findall(r"bit (\d) (\w+)", meanings["columns"])}
    assert bits == layout.COLUMNS


@pytest.mark.parametrize("bits", range(16))
def test_columns_lie_where_the_formulas_say(bits):
    """Section 5.1's offsets are those of the reference's payload, and the sizes of its table those of the package."""
    sequence = reference.Sequence(
        list(range(10)),
        [[(1, 1), (2, 2)], *[[(3, 3)]] * 8],
        [-1.0] * 9,
        [2.0] * 9,
        [True, *[False] * 9],
        [-3.0] * 10,
    )
    settings = reference.Settings(vocab_size=10, rounds=3, token_size=3, record_count_size=2, columns=bits)
    payload = reference.encode_payload(settings, sequence)
    a, b, T, n = 9 * 2 + 10 * 3 + 10 * 3, bits, 9, 10
    formulas = dict(re.findall(r"^    (\w[\w ]*\w) +at (.*)$", section("5.1 Payload"), re.MULTILINE))
    places = {}
    for name, text in formulas.items():
        places[name] = eval(text.replace(" mod ", " % ").replace("/", "//"), {"a": a, "b": b, "T": T, "n": n})
    assert len(payload) == places.pop("end of payload")
    assert list(layout.COLUMNS) == list(places)
    names = [name for name, bit in layout.COLUMNS.items() if bits & bit]
    ends = [*(places[name] for name in names[1:]), len(payload)][: len(names)]
    assert [columns.size_of(name, T, n) for name in names] == [
        end - places[name] for name, end in zip(names, ends, strict=True)
    ]
    first = {"label_logprob": b"\x00\xbc", "entropy": b"\x00\x40", "document_start": b"\x01\x00"}
    for name in names:
        assert payload[places[name] :][:2] == first.get(name, b"\x00\xc2")


def test_columns_of_the_payload():
    """Section 5.1's table has the columns in the order of their bits."""
    rows = {row[0]: row[2] for row in table("5.1 Payload")[3:]}
    assert [f"bit {i} of columns" for i in range(len(rows))] == list(rows.values())
    assert list(layout.COLUMNS) == list(rows)


def test_version_strings():
    """Version and date at the top of SPEC.md are those of its last change, and the version is layout.py's."""
    version, date = re.search(r"^Version (\d+\.\d+), (\d{4}-\d\d-\d\d)\.$", TEXT, re.MULTILINE).groups()
    assert f"{layout.VERSION_MAJOR}.{layout.VERSION_MINOR}" == version
    assert [version, date] == table("Appendix C. Versions")[-1][:2]


def test_errors_of_section_13_exist():
    """Every error that section 13 names is a public exception."""
    names = {row[1] for row in table("13. What a reader must check")}
    known = "AlignmentError CorruptError MissingShardError TruncatedError UnreadableError UnsupportedError"
    assert set(known.split()) == names
    assert all(issubclass(getattr(skl, name), skl.SklError) for name in names)


# Appendix A

SETTINGS = reference.Settings(vocab_size=10, seq_len=2, rounds=3, token_size=2, sampler=1)
SEQUENCE = reference.Sequence([1, 2, 3], [[(2, 1), (7, 2)], [(3, 3)]])


def worked_shard() -> bytes:
    """The bytes of the hexdump; lines that are not listed are zero."""
    lines = re.search(r"```\n(.*?)```", section("Appendix A. A worked shard"), re.DOTALL)[1].splitlines()
    data = bytearray(int(lines[-1], 16))
    for line in lines[:-1]:
        at, rest = int(line[:8], 16), bytes.fromhex(line[8:])
        assert len(rest) == 16
        data[at : at + 16] = rest
    return bytes(data)


def test_worked_shard_through_the_writer(tmp_path):
    """ShardWriter makes the worked shard byte for byte from the settings that the appendix names."""
    header = skl.Header(vocab_size=10, seq_len=2, kind="counts", rounds=3)
    with skl.ShardWriter(tmp_path / "a.skl", header=header) as writer:
        writer.append([1, 2, 3], skl.SparseTargets(token_ids=[2, 7, 3], counts=[1, 2, 3], offsets=[0, 2, 3]))
    assert worked_shard() == (tmp_path / "a.skl").read_bytes()


def test_the_manifest_of_the_worked_shard(tmp_path):
    """The manifest in section 11 is what is written for the worked shard, and what the reference makes."""
    (tmp_path / "a.skl").write_bytes(worked_shard())
    write_manifest(tmp_path, scan_directory(tmp_path))
    printed = re.search(r"```json\n(.*?)```", section("11. Manifest"), re.DOTALL)[1]
    assert printed.encode() == (tmp_path / "manifest.json").read_bytes()
    assert 1 == len(reference.decode_cache(tmp_path))


def test_worked_shard_through_the_reference():
    """The reference makes and reads the worked shard."""
    assert worked_shard() == reference.encode_shard(SETTINGS, [SEQUENCE])
    assert [SEQUENCE.positions] == [s.positions for s in reference.decode_shard(worked_shard()).sequences]


def test_worked_shard_through_the_reader(tmp_path):
    """The package reads the worked shard."""
    (tmp_path / "a.skl").write_bytes(worked_shard())
    with skl.open(tmp_path / "a.skl") as cache:
        assert [1, 2, 3] == cache[0].tokens.tolist()
        assert SEQUENCE.positions == strategies.pairs_of(cache[0].targets)


# Test vectors


def test_record_vector():
    """Section 4.1's example: id 1000 with code 3 in R24 is e8 03 06."""
    stored = re.search(r"stored as `([0-9a-f ]+)`", section("4.1 Profiles"))[1]
    settings = reference.Settings(vocab_size=1 << 17, seq_len=1, rounds=3)
    sequence = reference.Sequence([0, 0], [[(1000, 3)]])
    assert bytes.fromhex(stored) == reference.encode_payload(settings, sequence)[1:]


def test_alignment_vector():
    """Section 6.3's test vector."""
    expected = int(re.search(r"tokens \(1, 2, 3\) give `(0x[0-9a-f]+)`", TEXT)[1], 16)
    assert expected == checksums.alignment([1, 2, 3]) == reference.alignment_of([1, 2, 3])


def test_order_vectors():
    """Section 12's test vectors, in the package and in the reference."""
    found = re.findall(r"n = (\d+), seed (\d+), epoch (\d+): 0\.\.(\d+) go to ([\d, ]+\d)", section("12. Order"))
    assert len(found) == 2
    for n, seed, epoch, last, places in found:
        expected = [int(place) for place in places.split(",")]
        indices = list(range(int(last) + 1))
        assert expected == order.permute(indices, int(n), seed=int(seed), epoch=int(epoch)).tolist()
        assert expected == [reference.permute(int(n), int(seed), int(epoch), i) for i in indices]


def test_windowed_order_vectors():
    """Section 12's test vectors of the windowed order, in the package and in the reference."""
    pattern = r"n = (\d+), window (\d+), seed (\d+), epoch (\d+): (\d+)\.\.(\d+) go to ([\d, ]+\d)"
    found = re.findall(pattern, section("12. Order"))
    assert len(found) == 3
    for *numbers, places in found:
        n, window, seed, epoch, first, last = map(int, numbers)
        expected = [int(place) for place in places.split(",")]
        indices = list(range(first, last + 1))
        assert expected == order.permute_windows(indices, n, window, seed=seed, epoch=epoch).tolist()
        assert expected == [reference.permute_windows(n, window, seed, epoch, i) for i in indices]


def test_order_identifiers():
    """Section 12's algorithms and version are those that headers and loader states carry."""
    found = re.findall(r"order_algorithm (\d+), version (\d+)", section("12. Order"))
    assert [(str(number), str(order.VERSION)) for number in (order.ALGORITHM, order.WINDOWED_ALGORITHM)] == found


def test_proposal_vector():
    """Section 2's proposal is p to the power of proposal_temperature, normalised."""
    numbers = re.search(r"p = \(([^)]+)\) and proposal_temperature ([\d.]+), q = .* = \(([^)]+)\)", TEXT)
    p, q = (np.array([float(x) for x in numbers[i].split(",")]) for i in (1, 3))
    raised = p ** float(numbers[2])
    assert np.allclose(q, raised / raised.sum(), atol=5e-5)


def ratio_table() -> list[int]:
    return [int(x) for x in re.search(r"```\n(.*?)```", section("Appendix B. The ratio table"), re.DOTALL)[1].split()]


def test_ratio_table_is_the_rounded_power():
    """Appendix B is round(2^31 * 2^(-q^2 / 1024)), computed exactly."""
    assert ratio_table() == reference.T


def test_ratio_table_is_that_of_c():
    """Every code, as the first of a position, decodes in C to its entry of appendix B."""
    codes = np.arange(128, dtype=np.uint8)
    weights = native.expand(np.arange(129), codes, 0)
    assert [float(np.float32(v)) / 2.0**31 for v in ratio_table()] == weights.tolist()
    # float32 rounds the entries; two steps from a small value show the integers themselves
    pairs = native.expand(np.arange(0, 257, 2), np.array([[127, q] for q in codes], np.uint8).ravel(), 0)
    assert [reference.ratio_values([127, int(q)])[1] for q in codes] == [int(w * 2**31) for w in pairs[1::2].tolist()]


def test_header_in_words():
    """The sentence under the hexdump says what bytes 32 ff. hold."""
    data = worked_shard()
    assert (1, 1, 1, 1, 2, 0, 0, 10, 2, 3) == struct.unpack_from("<6BHIII", data, 32)
    assert "vocab_size 10, seq_len 2, rounds 3" in section("Appendix A. A worked shard")
