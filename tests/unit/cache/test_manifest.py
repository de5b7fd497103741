"""The manifest: written in order and whole, read with distrust."""

import dataclasses
import json
import tracemalloc
from pathlib import Path

import pytest
import reference
from strategies import make_listed_cache, small_shard

import sklformat as skl
from sklformat.cache.contents import scan_directory
from sklformat.cache.manifest import read_manifest, write_manifest
from sklformat.format import layout
from sklformat.format.listing import Entry, pack_listing, parse_listing


@pytest.fixture
def directory(tmp_path):
    return make_listed_cache(tmp_path / "cache")


def change(directory, how, *, digest=True):
    """Change the manifest's object, and fit its digest."""
    path = directory / "manifest.json"
    body = json.loads(path.read_text())
    how(body)
    if digest:
        body.pop("digest")
        body["digest"] = f"{reference.xxh128(reference.canonical_json(body)):032x}"
    path.write_bytes(reference.manifest_bytes(body))


def test_content_is_the_references(directory):
    """The manifest says what section 11 says, and reads back as what the shards say of themselves."""
    named = [(reference.decode_shard(p.read_bytes()), p.name) for p in sorted(directory.glob("*.skl"))]
    assert reference.expected_manifest(named) == json.loads((directory / "manifest.json").read_text())
    assert scan_directory(directory) == read_manifest(directory / "manifest.json")
    assert len(reference.decode_cache(directory)) == 3


def test_nothing_is_left_beside_it(directory):
    """Writing leaves no temporary file."""
    write_manifest(directory, scan_directory(directory))
    assert len(list(directory.iterdir())) == 4


def test_what_could_not_be_read_is_not_written(directory, monkeypatch):
    """A manifest beyond the format's limit is refused when it is written, and the old one stays."""
    before = (directory / "manifest.json").read_bytes()
    monkeypatch.setattr(layout, "MAX_MANIFEST_SIZE", len(before) - 1)
    with pytest.raises(
        ValueError, match=f"a manifest of {len(before)} bytes, the format's limit is .*; take shorter names, or more"
    ):
        write_manifest(directory, scan_directory(directory))
    assert before == (directory / "manifest.json").read_bytes()


def test_gaps_are_not_written(directory):
    """A manifest of shards with a gap is refused, and the old one stays."""
    before = (directory / "manifest.json").read_bytes()
    entries = scan_directory(directory)
    with pytest.raises(skl.MissingShardError, match=r"sequences 3\.\.4 are missing"):
        write_manifest(directory, [entries[0], entries[2]])
    assert before == (directory / "manifest.json").read_bytes()


def shard(place, **changes):
    return lambda body: body["shards"][place].update(changes)


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        (lambda body: body.update(format="other"), skl.UnsupportedError, "not a manifest of a sklformat cache"),
        (
            lambda body: body.update(version=2),
            skl.UnsupportedError,
            "manifest version 2, this library reads 1; install",
        ),
        (lambda body: body.update(shards=[]), skl.CorruptError, "lists no shards"),
        (lambda body: body.update(shards=[1]), skl.CorruptError, "lists no shards"),
        (lambda body: body.update(fingerprint="0" * 32), skl.CorruptError, "fingerprint does not follow"),
        (shard(0, more=1), skl.CorruptError, "a shard has fields"),
        (shard(0, name="../a.skl"), skl.CorruptError, "'../a.skl' is not a plain file name"),
        (shard(0, name=".."), skl.CorruptError, "is not a plain file name"),
        (shard(0, name=""), skl.CorruptError, "is not a plain file name"),
        (shard(0, name=7), skl.CorruptError, "shard name 7"),
        (shard(0, num_sequences=-1), skl.CorruptError, r"a number of shard-00000.skl is not in 0\.\.2\*\*64 - 1"),
        (shard(0, num_sequences=True), skl.CorruptError, "a number of"),
        (shard(0, num_sequences=3.0), skl.CorruptError, "a number of"),
        (shard(0, fingerprint="X"), skl.CorruptError, "fingerprint 'X' of shard-00000.skl is not 32"),
        (lambda body: body.update(more=1), skl.CorruptError, r"has keys \['digest', 'fingerprint', 'format', 'more', "),
        (lambda body: body.pop("fingerprint"), skl.CorruptError, "has keys"),
        (lambda body: body.update(version=True), skl.UnsupportedError, "manifest version True"),
        (shard(2, num_sequences=2**63), skl.CorruptError, "has 9223372036854775808 sequences, the limit is 4294967295"),
        (shard(1, first_sequence=2), skl.CorruptError, "begins at sequence 2, which an earlier shard holds"),
        (shard(1, first_sequence=4), skl.MissingShardError, r"sequences 3\.\.3 are missing"),
        (shard(1, shard_number=2), skl.CorruptError, "has shard_number 2, but it is number 1"),
    ],
)
def test_lies_are_refused_on_opening(directory, how, error, message):
    """A manifest that fits its digest and contradicts itself is refused, by name."""
    change(directory, how)
    with pytest.raises(error, match=message):
        skl.open(directory)


@pytest.mark.parametrize(
    "how",
    [
        shard(2, num_sequences=5),
        shard(2, num_records=1),
        shard(2, size_bytes=1),
        lambda body: [shard(1, num_sequences=3)(body), shard(2, first_sequence=6)(body)],
    ],
)
def test_lies_about_a_shard_are_found_when_it_is_touched(directory, how):
    """A manifest that says of a shard what the shard does not say is a CorruptError, never a wrong sequence."""
    change(directory, how)
    with skl.open(directory) as cache, pytest.raises(skl.CorruptError, match=r"is .*, .* expected"):
        list(cache)


def test_a_name_that_no_file_has(directory):
    """A listed shard that is not there is named by its sequences when the cache is opened."""
    change(directory, shard(2, name="gone.skl"))
    with pytest.raises(skl.MissingShardError, match=r"gone\.skl: sequences 5\.\.8 are missing"):
        skl.open(directory)


@pytest.mark.parametrize(
    "name", ["a\0b.skl", "\udcff.skl", "\x9f.skl", "a/b.skl", "a\\b.skl", "x", ".skl", "a.SKL", "x" * 252 + ".skl"]
)
def test_names_that_no_shard_may_have(directory, name):
    """A name that is no plain file name of a shard is refused, read and written; the longest one is taken."""
    change(directory, shard(2, name=name))
    with pytest.raises(skl.CorruptError, match=r"shard name .* (is not a plain file name|has 256 bytes)"):
        skl.open(directory)
    entries = scan_directory(directory)
    with pytest.raises(ValueError, match="rename the file"):
        write_manifest(directory, [*entries[:2], dataclasses.replace(entries[2], name=name)])
    (directory / "shard-00002.skl").rename(directory / ("é" * 125 + "x.skl"))
    write_manifest(directory, scan_directory(directory))
    assert 9 == len(skl.open(directory))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda text: b"\xef\xbb\xbf" + text,
        lambda text: text.decode().encode("utf-16"),
        lambda text: text.replace(b"\n", b"\r\n"),
        lambda text: text.rstrip(b"\n"),
        lambda text: text + b"\n",
        lambda text: text.replace(b'"version": 1', b'"version":  1'),
        lambda text: text.replace(b'"version": 1', b'"version": 1.0'),
        lambda text: text.replace(b'"version": 1', b'"version": 01'),
        lambda text: text.replace(b'"num_records": ', b'"num_records": 0', 1),
        lambda text: text.replace(b'"shard_number": 0', b'"shard_number": -0'),
        lambda text: text.replace(b'"name": "s', b'"name": "\\u0073', 1),
        lambda text: text.replace(b' "version": 1', b' "version": 1,\n "version": 1'),
        lambda text: text.replace(b'"shard_number": 0', b'"shard_number": 0,\n   "shard_number": 0'),
    ],
)
def test_another_form(directory, spoil):
    """A manifest has one form: no other white space, encoding, order, number or escape, and no key twice."""
    path = directory / "manifest.json"
    spoilt = spoil(path.read_bytes())
    assert spoilt != path.read_bytes()
    path.write_bytes(spoilt)
    with pytest.raises((skl.CorruptError, skl.UnsupportedError)) as caught:
        skl.open(directory)
    with pytest.raises(getattr(reference, type(caught.value).__name__)):
        reference.decode_cache(directory)


@pytest.mark.parametrize("filling", [b"[]", b"{}", b"0", b'"a":[]', b"[[]]"])
def test_what_another_form_costs(directory, filling):
    """Of a large manifest of another form no object is made: memory stays at its bytes, whatever they would mean."""
    path = directory / "manifest.json"
    head = path.read_bytes().partition(b"  {")[0]
    size = 16 << 20
    path.write_bytes(head + b",".join([filling] * (size // (len(filling) + 1))) + b"]}")
    tracemalloc.start()
    with pytest.raises(skl.CorruptError, match="is not written as SPEC section 11 says, from byte"):
        skl.open(directory)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 * size


def test_what_the_largest_costs():
    """An honest manifest of many shards costs at most four times its bytes, in objects and all."""
    many = 1 << 15
    entries = [
        Entry(Path(), f"shard-{number:07}.skl", number, number << 20, 1 << 20, 1 << 34, 1 << 36, f"{number:032x}")
        for number in range(many)
    ]
    text = pack_listing(entries, Path())
    assert len(text) * (layout.MAX_SHARDS // many) <= layout.MAX_MANIFEST_SIZE
    tracemalloc.start()
    assert entries == parse_listing(text, Path(), Path("manifest.json"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak <= 3 * len(text)  # and the bytes themselves


def test_a_newer_version_of_any_size(directory):
    """A newer version is named as such although its form is not known."""
    path = directory / "manifest.json"
    text = path.read_bytes().replace(b' "version": 1', b' "version": 2')
    for bytes_more in (0, 2 << 20):
        path.write_bytes(text.replace(b' "shards": [', b' "shards": [' + b" " * bytes_more))
        with pytest.raises(skl.UnsupportedError, match="manifest version 2, this library reads 1"):
            skl.open(directory)


def test_encoding_comes_before_version(directory):
    """What is not UTF-8, or begins with a byte order mark, is corrupt, whatever version it might have."""
    path = directory / "manifest.json"
    text = path.read_bytes().replace(b' "version": 1', b' "version": 2')
    for spoilt in (b"\xef\xbb\xbf" + text, text.decode().encode("utf-16"), text.decode().encode("utf-32-le")):
        path.write_bytes(spoilt)
        with pytest.raises(skl.CorruptError, match="manifest: not JSON"):
            skl.open(directory)
        with pytest.raises(reference.CorruptError):
            reference.decode_cache(directory)


@pytest.mark.parametrize(
    "how",
    [shard(0, name="../a.skl"), shard(0, size_bytes=2**64), shard(0, name="a.bin"), shard(0, num_sequences=2**32)],
)
def test_version_comes_before_what_shards_say(directory, how):
    """A later version may have other rules for names and numbers, so it is named first."""
    change(directory, lambda body: [how(body), body.update(version=2)])
    with pytest.raises(skl.UnsupportedError, match="manifest version 2, this library reads 1"):
        skl.open(directory)
    with pytest.raises(reference.UnsupportedError):
        reference.decode_cache(directory)


def test_a_shard_listed_twice(directory):
    """An empty shard that is listed twice is refused, although no sequence is held twice."""
    (directory / "shard-00003.skl").write_bytes(small_shard(0, shard_number=3, first_sequence=9))
    entries = scan_directory(directory)
    write_manifest(directory, [*entries, dataclasses.replace(entries[3], shard_number=4)])
    with pytest.raises(skl.CorruptError, match="lists a shard twice"):
        skl.open(directory)


@pytest.mark.parametrize(
    "text", [b"", b"nonsense", b"\xff\xfe", b"[" * 100_000, b'{"format":' * 5_000, b'{"a":' + b"9" * 5000 + b"}"]
)
def test_garbage(directory, text):
    """Anything that is no JSON is corrupt."""
    (directory / "manifest.json").write_bytes(text)
    with pytest.raises(skl.CorruptError, match=r"manifest\.json: manifest: not JSON"):
        skl.open(directory)


def test_nested_too_deep(directory):
    """Nesting that can be read and not written again is corrupt like any other."""
    for depth in range(100, 1100, 50):
        text = '{"digest": 1, "format": "sklformat cache", "version": 1, "x": ' + "[" * depth + "]" * depth + "}"
        (directory / "manifest.json").write_text(text)
        with pytest.raises(skl.CorruptError):
            skl.open(directory)


@pytest.mark.parametrize("text", [b"[]", b"5", b"{}"])
def test_other_json(directory, text):
    """JSON that is no manifest is of an unsupported format."""
    (directory / "manifest.json").write_bytes(text)
    with pytest.raises(skl.UnsupportedError, match="not a manifest"):
        skl.open(directory)


def test_a_changed_manifest(directory):
    """Without a fitting digest the manifest is refused; the message says how to go on without it."""
    change(directory, shard(0, num_records=1), digest=False)
    with pytest.raises(
        skl.CorruptError, match=r"digest .* stored, .* computed; remove it to open the shards without it"
    ):
        skl.open(directory)
    with pytest.raises(reference.CorruptError):
        reference.decode_cache(directory)


def test_a_huge_manifest(directory):
    """A manifest beyond its limit is not read."""
    with (directory / "manifest.json").open("r+b") as file:
        file.truncate(2**28 + 1)
    with pytest.raises(skl.CorruptError, match="larger than 268435456 bytes"):
        skl.open(directory)
