"""SPEC.md and the code agree: tables, limits, worked shards, the ratio table, test vectors, which row decides."""

import dataclasses
import itertools
import json
import math
import re
import struct
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import reference
import strategies

import sklformat as skl
from sklformat import checksums, native
from sklformat.cache.contents import scan_directory
from sklformat.cache.manifest import write_manifest
from sklformat.cache.recovery import recover
from sklformat.distill.text.fingerprints import tokenizer_fingerprint
from sklformat.format import columns, layout, order
from sklformat.format.captures import canonical_json
from sklformat.format.mixture import VERSION as MIXTURE_VERSION
from sklformat.format.mixture import Mixture

TEXT = (Path(__file__).parents[1] / "SPEC.md").read_text()
GOLDEN = Path(__file__).parent / "golden"


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
    assert number(limits["bytes of a shard's name"]) == layout.MAX_NAME_SIZE
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


def test_the_index_lies_where_the_formula_says(tmp_path):
    """Section 8's formula gives the place of each value of the index that the package reads."""
    formula = re.search(r"begins at byte (index_offset [\w+* ]+)\.", section("8. Index"))[1]
    (tmp_path / "x.skl").write_bytes(data := strategies.small_shard(3))
    with skl.open(tmp_path / "x.skl") as cache:
        shard = next(cache.shards())
    for offset, size, _, name in ((int(row[0]), int(row[1]), *row[2:4]) for row in table("8. Index")):
        for i in range(3):
            names = {"index_offset": shard.trailer.index_offset, "N": 3, "offset": offset, "i": i, "size": size}
            place = eval(formula, names)
            assert int(getattr(shard.index, name)[i]) == int.from_bytes(data[place : place + size], "little")


def test_columns_of_the_payload():
    """Section 5.1's table has the columns in the order of their bits."""
    rows = {row[0]: row[2] for row in table("5.1 Payload")[3:]}
    assert [f"bit {i} of columns" for i in range(len(rows))] == list(rows.values())
    assert list(layout.COLUMNS) == list(rows)


def test_version_strings():
    """Version and date at the top of SPEC.md are those of its last change, and the version is layout.py's."""
    version, date = re.search(r"^Version (\d+\.\d+), (\d{4}-\d\d-\d\d)\.$", TEXT, re.MULTILINE).groups()
    assert f"{layout.VERSION_MAJOR}.{layout.VERSION_MINOR}" == version
    assert [version, date, version, f"{layout.VERSION_MAJOR}.x"] == table("Appendix C. Versions")[-1][:4]


def test_pages_of_the_document():
    """SPEC.md stays short, its sections are numbered in order, and every section that it refers to exists."""
    assert len(TEXT.splitlines()) <= 720
    titles = re.findall(r"^##+ (?:Appendix )?([\dA-Z.]+?)\.? ", TEXT, re.MULTILINE)
    assert len(set(titles)) == len(titles)
    assert [str(i) for i in range(1, 19)] == [title for title in titles if title.isdigit()]
    named = re.findall(r"\b(?:[Ss]ections?|Appendix|appendices) (\d+(?:\.\d)?|[A-E])\b(?: (?:and|to) (\d+))?", TEXT)
    assert {name for pair in named for name in pair if name} <= set(titles)
    cells = " ".join(" ".join(row[4:]) for title in TABLES for row in table(title))
    assert {"4.1", "4.2", "4.3", "6.3", "6.4", "7.1"} <= set(re.findall(r"\b\d+\.\d\b", cells)) <= set(titles)


def test_errors_of_section_13_exist():
    """Every error that section 13 names is a public exception."""
    names = {row[-1] for row in table("13. What a reader must check")}
    known = "AlignmentError CorruptError MissingShardError TruncatedError UnreadableError UnsupportedError"
    assert set(known.split()) == names
    assert all(issubclass(getattr(skl, name), skl.SklError) for name in names)


# Appendix A

SETTINGS = reference.Settings(vocab_size=10, seq_len=2, rounds=3, token_size=2, sampler=1)
SEQUENCE = reference.Sequence([1, 2, 3], [[(2, 1), (7, 2)], [(3, 3)]])


def worked_shard(title: str = "Appendix A. A worked shard") -> bytes:
    """The bytes of the hexdump; lines that are not listed are zero."""
    lines = re.search(r"```\n(.*?)```", section(title), re.DOTALL)[1].splitlines()
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


@pytest.mark.parametrize(
    ("name", "title"), [("a", "Appendix A. A worked shard"), ("d", "Appendix D. A worked ratio shard")]
)
def test_worked_shards_are_frozen(name, title):
    """The shards of the appendices are those of tests/golden/v1.0."""
    assert worked_shard(title) == (GOLDEN / "v1.0" / f"appendix-{name}.skl").read_bytes()


def test_golden_files_are_named():
    """Every folder and file of tests/golden that SPEC.md names exists, and it names every folder."""
    named = set(re.findall(r"^\* (.*)$", section("15. Conformance"), re.MULTILINE)[3:])
    words = {
        word.removesuffix("/*").removesuffix("/*.skl") for line in named for word in re.findall(r"`([^`]+)`", line)
    }
    files = {"builder.py", "digests.txt"}
    assert files <= words
    assert all((GOLDEN / "v1.0" / name).is_file() for name in files)
    folders = {path for path in words - files if (GOLDEN / path).is_dir()}
    assert folders == words - files == {"valid", "invalid", "caches/valid", "caches/invalid", "v1.0"}
    assert {path.name for path in GOLDEN.iterdir() if path.is_dir()} - {"__pycache__"} == {
        path.partition("/")[0] for path in folders
    }


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


# Appendix D

RATIO_SETTINGS = reference.Settings(
    kind=reference.RATIOS, vocab_size=10, seq_len=2, sampler=3, columns=9, capture={"k": 3}
)
WEIGHTS = [[(7, 0.5), (2, 0.25), (4, 0.25)], [(3, 1.0), (0, 1e-6)]]
LOGPROBS = [math.log(0.5), math.log(0.25), math.log(0.25), 0.0]


def worked_ratios() -> bytes:
    return worked_shard("Appendix D. A worked ratio shard")


def test_worked_ratios_through_the_writer(tmp_path):
    """ShardWriter makes the ratio shard byte for byte, and leaves out the weight that is too small."""
    header = skl.Header(
        vocab_size=10,
        seq_len=2,
        kind="ratios",
        rounds=0,
        sampler="topk",
        store_tokens=False,
        columns=("label_logprob", "record_logprob"),
        capture={"k": 3},
    )
    columns = {"label_logprob": [math.log(0.25), 0.0], "record_logprob": [*LOGPROBS, math.log(1e-6)]}
    with skl.ShardWriter(tmp_path / "d.skl", header=header) as writer:
        writer.append([1, 2, 3], strategies.targets_of(reference.RATIOS, WEIGHTS), columns)
    assert worked_ratios() == (tmp_path / "d.skl").read_bytes()


def test_worked_ratios_through_the_reference():
    """The reference makes and reads the ratio shard; its codes and values are those in words."""
    positions = [reference.encode_ratios(pairs, 0) for pairs in WEIGHTS]
    logprobs = [math.log(0.25), 0.0]
    sequence = reference.Sequence([1, 2, 3], positions, label_logprob=logprobs, record_logprob=LOGPROBS)
    assert worked_ratios() == reference.encode_shard(RATIO_SETTINGS, [sequence])
    words = section("Appendix D. A worked ratio shard")
    pairs = [f"({token_id}, {code})" for records in positions for token_id, code in records]
    assert f"records {', '.join(pairs)}, label_logprob" in words
    (decoded,) = reference.decode_shard(worked_ratios()).sequences
    assert (positions, [[2**30, 2**29, 2**29], [2**31]]) == (decoded.positions, decoded.values())
    assert "the v are 2^30, 2^29, 2^29 and 2^31" in words


def test_worked_ratios_through_the_reader(tmp_path):
    """The package reads the ratio shard."""
    (tmp_path / "d.skl").write_bytes(worked_ratios())
    assert skl.verify(tmp_path / "d.skl") == []
    with skl.open(tmp_path / "d.skl") as cache:
        assert cache[0].tokens is None
        assert strategies.pairs_of(cache[0].targets) == [WEIGHTS[0], WEIGHTS[1][:1]]
        assert np.allclose(LOGPROBS, cache[0].columns["record_logprob"], atol=1e-3)
        cache.check_alignment(0, [1, 2, 3])


# Appendix E


def vectors() -> list[list[str]]:
    """The rows of the first table: the name of a value, then those of a.skl, b.skl and appendix D."""
    return [row for row in table("Appendix E. Test vectors") if len(row) == 4 and ":" not in row[1]][:9]


def second_shard() -> bytes:
    return reference.encode_shard(dataclasses.replace(SETTINGS, shard_number=1, first_sequence=1), [SEQUENCE])


def test_keys_and_checksums_of_the_worked_shards(tmp_path):
    """Every value of the table stands in the bytes, and follows from them in the reference and in the package."""
    assert len(vectors()) == 9
    for place, data in enumerate((worked_shard(), second_shard(), worked_ratios())):
        (tmp_path / "x.skl").write_bytes(data)
        with skl.open(tmp_path / "x.skl") as cache:
            shard = next(cache.shards())
            head, seed = data[:4096], shard.header.shard_key
            computed = {
                "header_checksum": f"{checksums.checksum(head[:-8]):016x}",
                "cache key": shard.header.cache_key,
                "shard key": f"{seed:016x}",
                "alignment": f"{checksums.alignment([1, 2, 3]):016x}",
                "payload_checksum": f"{checksums.checksum(data[4160:4288], seed):016x}",
                "block_checksum": f"{checksums.checksum(data[4096:4152], seed):016x}",
                "index_checksum": f"{checksums.checksum(data[4288:4352], seed):016x}",
                "trailer_checksum": f"{checksums.checksum(data[4352:4408], seed):016x}",
                "root": shard.fingerprint,
            }
        at = {"header_checksum": 4088, "alignment": 4128, "payload_checksum": 4136, "block_checksum": 4152}
        at |= {"index_checksum": 4400, "trailer_checksum": 4408, "root": 4384}
        assert {row[0]: row[place + 1] for row in vectors()} == computed
        for name, offset in at.items():
            size = len(computed[name]) // 2
            assert f"{int.from_bytes(data[offset : offset + size], 'little'):0{2 * size}x}" == computed[name]
        key = reference.shard_key_of(head)
        assert (computed["cache key"], computed["shard key"]) == (f"{reference.cache_key_of(head):032x}", f"{key:016x}")
        assert computed["block_checksum"] == f"{reference.xxh64(data[4096:4152], key):016x}"


def test_the_manifest_of_two_shards(tmp_path):
    """The manifest in section 11 is what package and reference make of a.skl and b.skl, written by the package."""
    header = skl.Header(vocab_size=10, seq_len=2, kind="counts", rounds=3)
    for number, name in enumerate(("a.skl", "b.skl")):
        placed = dataclasses.replace(header, shard_number=number, first_sequence=number)
        with skl.ShardWriter(tmp_path / name, header=placed) as writer:
            writer.append([1, 2, 3], strategies.targets_of(reference.COUNTS, SEQUENCE.positions))
    assert (worked_shard(), second_shard()) == tuple((tmp_path / name).read_bytes() for name in ("a.skl", "b.skl"))
    write_manifest(tmp_path, scan_directory(tmp_path))
    printed = re.search(r"```json\n(.*?)```", section("11. Manifest"), re.DOTALL)[1].encode()
    assert printed == (tmp_path / "manifest.json").read_bytes()
    assert printed == (GOLDEN / "v1.0" / "appendix-e" / "manifest.json").read_bytes()
    named = [
        (reference.decode_shard(data), name) for data, name in ((worked_shard(), "a.skl"), (second_shard(), "b.skl"))
    ]
    assert printed == reference.manifest_bytes(reference.expected_manifest(named))
    assert len(reference.decode_cache(tmp_path)) == 2
    with skl.open(tmp_path) as cache:
        assert json.loads(printed)["fingerprint"] == cache.fingerprint
        assert [SEQUENCE.positions] * 2 == [strategies.pairs_of(sequence.targets) for sequence in cache]


def ratio_vectors() -> list[tuple]:
    """(scale_log2, [(id, weight as text)], [(id, code)], [v]) of each row of the second table."""

    def pairs(text):
        return [tuple(pair.split(": ")) for pair in text.split(", ")] if ":" in text else []

    rows = [row for row in table("Appendix E. Test vectors") if row[0].isdigit()]
    return [
        (
            int(scale),
            pairs(weights),
            [(int(i), int(q)) for i, q in pairs(codes)],
            [int(v) for v in re.findall(r"\d+", vs)],
        )
        for scale, weights, codes, vs in rows
    ]


@pytest.mark.parametrize("row", range(6))
@pytest.mark.parametrize("kind", [float, np.float32])
def test_ratio_vectors(row, kind):
    """The codes of the weights are the same in reference and package, of binary32 and of binary64."""
    assert len(ratio_vectors()) == 6
    scale_log2, texts, expected, values = ratio_vectors()[row]
    weights = [(int(token_id), float(kind(text))) for token_id, text in texts]
    assert expected == reference.encode_ratios(weights, scale_log2)
    assert values == reference.ratio_values([code for _, code in expected])
    ids, raw = zip(*weights, strict=True)
    offsets, token_ids, codes = native.quantise(
        np.array([0, len(ids)]), np.array(ids, np.uint32), np.array(raw, np.float32), scale_log2
    )
    assert expected == list(zip(token_ids.tolist(), codes.tolist(), strict=True))
    unit = 2.0 ** (scale_log2 - 31)
    assert [float(np.float32(v)) * unit for v in values] == native.expand(offsets, codes, scale_log2).tolist()


def test_codes_that_no_writer_chooses(tmp_path):
    """A reader takes a code that is not the smallest of its value: 127, 119, 2 as the text says."""
    codes, values = (
        [int(x) for x in found.split(", ")]
        for found in re.search(
            r"takes the codes ([\d, ]+) as well, whose v are ([\d, ]+) again", section("Appendix E. Test vectors")
        ).groups()
    )
    assert values == reference.ratio_values(codes)
    settings = dataclasses.replace(RATIO_SETTINGS, columns=0, seq_len=1)
    records = list(zip(range(3), codes, strict=True))
    (tmp_path / "x.skl").write_bytes(reference.encode_shard(settings, [reference.Sequence([0, 0], [records])]))
    assert skl.verify(tmp_path / "x.skl") == []
    with skl.open(tmp_path / "x.skl") as cache:
        assert [v * 2.0**-31 for v in values] == cache[0].targets.weights.tolist()


def test_the_tokenizer_fingerprint():
    """The tokenizer of the text has its fingerprint, by the package and by the reference from the JSON printed."""
    digits, text = re.search(r"has the fingerprint `([0-9a-f]{32})`, of `(\{.*\})`\.", TEXT).groups()
    body = json.loads(text)
    tokenizer = SimpleNamespace(
        get_vocab=lambda: {token: token_id for token_id, token in body["tokens"]}, all_special_ids=body["special"]
    )
    assert digits == tokenizer_fingerprint(tokenizer)
    assert text.encode() == reference.canonical_json(body)
    assert digits == f"{reference.xxh128(text.encode()):032x}"


def test_canonical_json():
    """The vector of section 7.1 is what package and reference write, and has the printed size and digest."""
    part = section("7.1 Canonical JSON")
    size, digits = re.search(r"of these (\d+) bytes is `([0-9a-f]{32})`", part).groups()
    text = re.search(r"```json\n(.*?)\n```", part, re.DOTALL)[1].encode("ascii")
    assert (int(size), digits) == (len(text), f"{reference.xxh128(text):032x}")
    assert text == reference.canonical_json(json.loads(text)) == canonical_json(json.loads(text))
    capture = skl.Header(vocab_size=10, seq_len=2, kind="counts", rounds=3, capture=json.loads(text)).pack()[256:]
    assert text == capture[: len(text)]


# Section 13: the first row decides


class Broken:
    """The worked shard with faults, each by its name; everything behind a fault is made to fit it."""

    FAULTS = (
        ("magic", "UnsupportedError"),
        ("no whole header", "TruncatedError"),
        ("version_major", "UnsupportedError"),
        ("header_checksum", "CorruptError"),
        ("incompatible_flags", "UnsupportedError"),
        ("reserved_0", "CorruptError"),
        ("no trailer", "TruncatedError"),
        ("index_checksum", "CorruptError"),
        ("codec", "UnsupportedError"),
        ("payload_checksum", "CorruptError"),
    )

    def __init__(self, *faults: str) -> None:
        self.faults = faults

    def bytes(self) -> bytes:
        header = bytearray(reference.encode_header(SETTINGS))
        for fault, offset in (("magic", 0), ("version_major", 8), ("incompatible_flags", 16), ("reserved_0", 65)):
            header[offset] ^= 2 * (fault in self.faults)
        header[4088:] = struct.pack("<Q", reference.xxh64(bytes(header[:4088]), 0) ^ ("header_checksum" in self.faults))
        key = reference.shard_key_of(bytes(header))
        block = bytearray(reference.encode_block(SETTINGS, SEQUENCE, 0, key))
        block[4] = "codec" in self.faults
        block[40] ^= "payload_checksum" in self.faults
        block[56:64] = struct.pack("<Q", reference.xxh64(bytes(block[:56]), key))
        data = bytearray(reference.join_shard(bytes(header), [bytes(block)]))
        data[-100] ^= "index_checksum" in self.faults
        cut = 4000 if "no whole header" in self.faults else 4159 if "no trailer" in self.faults else len(data)
        return bytes(data[:cut])


PAIRS = [
    (first, second)
    for i, (first, error) in enumerate(Broken.FAULTS)
    for second, other in Broken.FAULTS[i + 1 :]
    if error != other
]


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_the_first_row_that_fails_decides(first, second, tmp_path):
    """Of two faults in a shard the one whose row comes first names the error, in the package and in the reference."""
    data, error = Broken(first, second).bytes(), dict(Broken.FAULTS)[first]
    (tmp_path / "x.skl").write_bytes(data)
    with pytest.raises(skl.FormatError) as caught, skl.open(tmp_path / "x.skl") as cache:
        list(cache)
    assert error == type(caught.value).__name__
    with pytest.raises(getattr(reference, error)):
        reference.decode_shard(data)


def test_faults_stand_in_the_order_of_the_table():
    """The faults above are in the order of section 13's rows, each with its row's error."""
    rows = [(row[1], row[2]) for row in table("13. What a reader must check") if row[0] in PARTS]
    words = {"no whole header": "the file has 4096 bytes", "no trailer": "magic of the last 64"}
    words |= {"reserved_0": "reserved bytes, capture", "codec": "codec is 0", "magic": "magic, as far as"}
    places = [
        next(i for i, (text, error) in enumerate(rows) if words.get(name, name) in text and error == expected)
        for name, expected in Broken.FAULTS
    ]
    assert all(a < b for a, b in itertools.pairwise(places))


PARTS = ("header", "trailer", "index", "block", "payload")


def two_shards(directory: Path, *faults: str) -> None:
    """a.skl and b.skl with their manifest, and faults of section 13's rows about directories."""
    shards = {"a.skl": worked_shard(), "b.skl": second_shard()}
    if "other key" in faults:
        changed = dataclasses.replace(SETTINGS, shard_number=1, first_sequence=1, sampling_seed=1)
        shards["b.skl"] = reference.encode_shard(changed, [SEQUENCE])
    if "gap" in faults:
        del shards["a.skl"]
    if "header" in faults:
        shards["b.skl"] = shards["b.skl"][:33] + b"\xff" + shards["b.skl"][34:]
    for name, data in shards.items():
        (directory / name).write_bytes(data)
    if "manifest" in faults or "listed" in faults or "unlisted" in faults:
        named = [
            (reference.decode_shard(data), name)
            for name, data in (("a.skl", worked_shard()), ("b.skl", second_shard()))
        ]
        text = reference.manifest_bytes(reference.expected_manifest(named))
        text = text.replace(b'"digest": "', b'"digest": "0' if "digest" in faults else b'"digest": "', 1)
        (directory / "manifest.json").write_bytes(text)
    if "listed" in faults:
        (directory / "a.skl").unlink()
    if "unlisted" in faults:
        (directory / "c.skl").write_bytes(b"")
    if "cut" in faults:
        (directory / "c.skl").write_bytes(worked_shard()[:4096])
    if "partial" in faults:
        (directory / "c.skl.partial").write_bytes(b"")


@pytest.mark.parametrize(
    ("faults", "error"),
    [
        (("partial", "header"), "MissingShardError"),
        (("partial", "manifest", "digest"), "CorruptError"),
        (("header", "gap"), "CorruptError"),
        (("gap",), "MissingShardError"),
        (("other key",), "CorruptError"),
        (("other key", "cut"), "TruncatedError"),
        (("manifest", "digest", "listed"), "CorruptError"),
        (("listed", "unlisted"), "MissingShardError"),
        (("unlisted", "header"), "CorruptError"),
        (("manifest", "header"), "CorruptError"),
        (("manifest", "other key"), "CorruptError"),
    ],
)
def test_the_first_row_about_a_directory_decides(faults, error, tmp_path):
    """Of the faults of a directory the one whose row comes first names the error, in package and reference."""
    two_shards(tmp_path, *faults)
    with pytest.raises(skl.FormatError) as caught, skl.open(tmp_path) as cache:
        list(cache)
    assert issubclass(type(caught.value), getattr(skl, error))
    with pytest.raises(getattr(reference, error)):
        reference.decode_cache(tmp_path)


def test_recovery_refuses_a_block_of_an_unknown_codec(tmp_path):
    """Section 10.4: such a block is no torn tail, so nothing is cut."""
    data = Broken("codec").bytes()[:-128]
    (tmp_path / "x.skl.partial").write_bytes(data)
    with pytest.raises(skl.UnsupportedError, match="codec 1 is not known"):
        recover(tmp_path / "x.skl")
    assert data == (tmp_path / "x.skl.partial").read_bytes()


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


def test_mixture_vectors():
    """Section 12's test vectors of mixtures, in the package and in the reference, and the version that states carry."""
    text = section("12. Order")
    pattern = r"n = \(([\d, ]+)\), w = \(([\d., ]+)\), seed (\d+), epoch (\d+): places 0\.\.(\d+) are ([\d:, ]+\d)"
    found = re.findall(pattern, text)
    assert len(found) == 2
    for n, w, *numbers, pairs in found:
        sizes, weights = [int(size) for size in n.split(",")], [float(weight) for weight in w.split(",")]
        seed, epoch, last = map(int, numbers)
        expected = [tuple(map(int, pair.split(":"))) for pair in pairs.split(", ")]
        assert len(expected) == last + 1
        mixed = Mixture.of(sizes, weights)
        schedule = order.Schedule(num_sequences=sum(sizes), batch_size=1, seed=seed, mixture=mixed)
        places = [int(place[0]) for place, _ in itertools.islice(schedule.batches(epoch, 0), last + 1)]
        firsts = np.cumsum([0, *sizes])
        assert places == [firsts[cache] + sequence for cache, sequence in expected]
        shares = reference.shares(sizes, weights)
        assert list(mixed.shares) == shares
        assert expected == [reference.mixed_sequence(sizes, shares, seed, epoch, i) for i in range(last + 1)]
    assert [str(MIXTURE_VERSION)] == re.findall(r"mixture version (\d+)", text)


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
