"""
Write the frozen caches beside this file: directories with and without a manifest, valid and with one fault each.

Run ``python tests/golden/make_caches.py``; files that are there stay as they are.  Made by the reference alone.  The
JSON beside a valid cache says what it holds, that beside an invalid one what a reader raises, and a part of what this
package's message says.
"""

import dataclasses
import json
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import make_golden  # noqa: E402
import reference  # noqa: E402
from reference import RATIOS, Sequence, Settings  # noqa: E402

SETTINGS = Settings(vocab_size=100, rounds=7, seq_len=3, sampler=1, token_size=2)
Files = dict[str, bytes]


def sequence(number: int, length: int = 3) -> Sequence:
    """A sequence of kind counts that no other number gives."""
    full = [[(number, 3), (number + 50, 4)], [], [(99 - number, 7)]]
    return Sequence([(number * 7 + i * i) % 100 for i in range(length + 1)], [full[t % 3] for t in range(length)])


def shards(settings: Settings, parts: list[list[Sequence]], names: str = "abcdefgh") -> Files:
    """Shards in order, each with its place."""
    files, first = {}, 0
    for number, (part, name) in enumerate(zip(parts, names, strict=False)):
        placed = dataclasses.replace(settings, shard_number=number, first_sequence=first)
        files[f"{name}.skl"] = reference.encode_shard(placed, part)
        first += len(part)
    return files


def listed(files: Files, *more: tuple[str, bytes]) -> Files:
    """The files with the manifest of those that are shards, in their order, and others that it does not list."""
    named = [(reference.decode_shard(data), name) for name, data in files.items()]
    return files | {"manifest.json": reference.manifest_bytes(reference.expected_manifest(named))} | dict(more)


KNOWN = {reference.alignment_of(sequence(number).tokens): sequence(number).tokens for number in range(5)}
THREE = shards(SETTINGS, [[sequence(0), sequence(1)], [sequence(2)], [sequence(3), sequence(4)]])


def ratios(settings: Settings) -> list[list[Sequence]]:
    made = make_golden.with_all_columns(make_golden.ratios(99, settings.scale_log2))
    return [[dataclasses.replace(made[0], label_logprob=None)], [dataclasses.replace(made[1], label_logprob=None)]]


def valid() -> dict[str, Files]:
    """Every way in which shards lie in a directory."""
    ragged = dataclasses.replace(SETTINGS, seq_len=0)
    columns = dataclasses.replace(SETTINGS, columns=15)
    weighted = dataclasses.replace(SETTINGS, kind=RATIOS, rounds=0, sampler=3, columns=14, scale_log2=2)
    unstored = dataclasses.replace(SETTINGS, token_size=0)
    with_columns = make_golden.with_all_columns(make_golden.counts(99, 7))
    lengths = [[sequence(0, 1), sequence(1, 40)], [sequence(2, 2)]]
    beside = {".lock": b"", ".skl": b"no shard", "notes.txt": b"what lies beside", "manifest.json.old": b"{}"}
    return {
        "one-shard": shards(SETTINGS, [[sequence(0)]]),
        "three-shards": THREE,
        "three-shards-listed": listed(THREE),
        "ragged": listed(shards(ragged, lengths)),
        "columns": listed(shards(columns, [with_columns[:1], with_columns[1:]])),
        "ratios": listed(shards(weighted, ratios(weighted))),
        "tokens-not-stored": listed(shards(unstored, [[sequence(0)], [sequence(1)]])),
        "empty-last-shard": listed(shards(SETTINGS, [[sequence(0)], []])),
        "empty-first-shards": shards(SETTINGS, [[], [], [sequence(0)]], "cba"),
        "only-an-empty-shard": listed(shards(SETTINGS, [[]])),
        "names-in-another-order": listed(shards(SETTINGS, [[sequence(0)], [sequence(1)]], "zb")),
        "names-beyond-ascii": listed(shards(SETTINGS, [[sequence(0)], [sequence(1)]], ["ß 1", "日\U0001f600"])),
        "names-that-begin-with-dots": shards(SETTINGS, [[sequence(0)], [sequence(1)]], [".", ".a"]),
        "others-beside": shards(SETTINGS, [[sequence(0)], [sequence(1)]]) | beside,
        "unfinished-beside-a-manifest": listed(THREE, ("d.skl.partial", b""), *beside.items()),
    }


def changed(how, *, digest: bool = True) -> Files:
    """The three shards and a manifest with other values, its digest made to fit."""
    files = listed(THREE)
    body = json.loads(files["manifest.json"])
    how(body)
    if digest:
        body.pop("digest")
        body["digest"] = f"{reference.xxh128(reference.canonical_json(body)):032x}"
    return files | {"manifest.json": reference.manifest_bytes(body)}


def rewritten(*changes: tuple[bytes, bytes]) -> Files:
    """The three shards and a manifest in which bytes are replaced once each."""
    text = listed(THREE)["manifest.json"]
    for before, after in changes:
        assert before in text
        text = text.replace(before, after, 1)
    return THREE | {"manifest.json": text}


def entry(place: int, **values: object):
    return lambda body: body["shards"][place].update(values)


def relist(*places: int, **values: object):
    """List some shards of the three, perhaps again, as a whole cache with a fitting fingerprint."""

    def how(body: dict) -> None:
        body["shards"] = [dict(body["shards"][place]) for place in places]
        body["shards"][-1].update(values)
        roots = [int(shard["fingerprint"], 16) for shard in body["shards"]]
        body["fingerprint"] = f"{reference.cache_fingerprint(roots):032x}"

    return how


def renumbered(number: int, first: int) -> bytes:
    """Shard b with another place."""
    placed = dataclasses.replace(SETTINGS, shard_number=number, first_sequence=first)
    return reference.encode_shard(placed, [sequence(2)])


def invalid() -> dict[str, tuple[Files, str, str]]:
    """Files, the error that a reader raises, and a part of this package's message."""
    text = listed(THREE)["manifest.json"]
    a, b, c = THREE["a.skl"], THREE["b.skl"], THREE["c.skl"]
    other = reference.encode_shard(
        dataclasses.replace(SETTINGS, sampling_seed=1, shard_number=1, first_sequence=2), [sequence(2)]
    )
    deep = reference.encode_shard(dataclasses.replace(SETTINGS, capture=nested(32)), [sequence(0)])
    root = reference.decode_shard(a).root
    corrupt, missing, unsupported = "CorruptError", "MissingShardError", "UnsupportedError"
    not_plain = "is not a plain file name that ends in .skl"
    form = "is not written as SPEC section 11 says"
    return {
        "no-shard": ({"notes.txt": b"nothing here", ".skl": b""}, missing, "no .skl shards here"),
        "unfinished": ({"a.skl": a, "b.skl.partial": b[:4096]}, missing, "the shard is unfinished"),
        "unfinished-marked": (THREE | {"capture.skl.partial": b""}, missing, "the shard is unfinished"),
        "gap": ({"a.skl": a, "c.skl": c}, missing, "sequences 2..2 are missing before c.skl"),
        "gap-at-the-beginning": ({"b.skl": b, "c.skl": c}, missing, "sequences 0..1 are missing before b.skl"),
        "overlap": (
            {"a.skl": a, "b.skl": renumbered(1, 1)},
            corrupt,
            "b.skl begins at sequence 1, which an earlier shard holds already",
        ),
        "copy": ({"a.skl": a, "copy.skl": a}, corrupt, "copy.skl is a copy of a.skl; remove one of them"),
        "other-number": (
            {"a.skl": a, "b.skl": renumbered(2, 2)},
            corrupt,
            "b.skl has shard_number 2, but it is number 1",
        ),
        "other-key": ({"a.skl": a, "b.skl": other}, corrupt, "belongs to a different cache from a.skl: sampling_seed"),
        "not-a-shard": (THREE | {"d.skl": b"text"}, unsupported, "not a sklformat shard: it begins with 74 65 78 74"),
        "empty-file": (THREE | {"d.skl": b""}, "TruncatedError", "the file is empty"),
        "cut-shard": (THREE | {"c.skl": c[:-64]}, "TruncatedError", "no trailer at the end"),
        "capture-nested-too-deep": ({"a.skl": deep}, corrupt, "capture is nested 33 deep, the limit is 32"),
        "damaged-block": (THREE | {"c.skl": flipped(c, 4096 + 70)}, corrupt, "payload checksum"),
        "manifest-lists-a-missing-shard": (
            {"a.skl": a, "b.skl": b, "manifest.json": text},
            missing,
            "sequences 3..4 are missing",
        ),
        "manifest-leaves-out-a-shard": (changed(relist(0, 1)), corrupt, "the manifest does not list c.skl"),
        "manifest-leaves-a-gap": (changed(relist(0, 2)), missing, "sequences 2..2 are missing before c.skl"),
        "manifest-lists-a-copy": (
            changed(relist(0, 0, name="copy.skl", shard_number=1)) | {"copy.skl": a},
            corrupt,
            "copy.skl is a copy of a.skl",
        ),
        "manifest-lists-a-shard-twice": (
            changed(relist(0, 1, 2, 2, first_sequence=5, shard_number=3)),
            corrupt,
            "lists a shard twice",
        ),
        "manifest-in-another-order": (changed(relist(1, 0, 2)), missing, "sequences 0..1 are missing before b.skl"),
        "manifest-lists-a-cut-shard": (listed(THREE) | {"b.skl": b[:-64]}, "TruncatedError", "no trailer at the end"),
        "manifest-with-another-root": (
            listed(THREE) | {"b.skl": other},
            corrupt,
            f"fingerprint is {reference.decode_shard(other).root:032x}",
        ),
        "manifest-with-another-size": (changed(entry(0, size_bytes=1)), corrupt, f"size_bytes is {len(a)}, 1 expected"),
        "manifest-with-another-count": (changed(entry(2, num_sequences=3)), corrupt, "num_sequences is 2, 3 expected"),
        "manifest-with-a-wrong-digest": (changed(entry(0, size_bytes=1), digest=False), corrupt, "digest"),
        "manifest-with-a-wrong-fingerprint": (
            changed(lambda body: body.update(fingerprint="0" * 32)),
            corrupt,
            "fingerprint does not follow from the shards'",
        ),
        "manifest-of-a-later-version": (
            changed(lambda body: body.update(version=2)),
            unsupported,
            "manifest version 2, this library reads 1",
        ),
        "manifest-of-another-format": (
            changed(lambda body: body.update(format="other")),
            unsupported,
            "not a manifest of a sklformat cache",
        ),
        "manifest-with-one-more-key": (changed(lambda body: body.update(more=1)), corrupt, "has keys"),
        "manifest-with-one-key-less": (
            changed(lambda body: body["shards"][0].pop("name")),
            corrupt,
            "a shard has fields",
        ),
        "manifest-without-shards": (changed(lambda body: body.update(shards=[])), corrupt, "lists no shards"),
        "manifest-empty": (THREE | {"manifest.json": b""}, corrupt, "not JSON"),
        "manifest-cut": (THREE | {"manifest.json": text[:-20]}, corrupt, "not JSON"),
        "manifest-with-more-behind": (THREE | {"manifest.json": text + b"\n"}, corrupt, form),
        "manifest-in-one-line": (
            THREE | {"manifest.json": reference.canonical_json(json.loads(text)) + b"\n"},
            corrupt,
            form,
        ),
        "manifest-with-a-byte-order-mark": (THREE | {"manifest.json": b"\xef\xbb\xbf" + text}, corrupt, "not JSON"),
        "manifest-in-utf-16": (THREE | {"manifest.json": text.decode().encode("utf-16-le")}, corrupt, "not JSON"),
        "manifest-with-carriage-returns": (THREE | {"manifest.json": text.replace(b"\n", b"\r\n")}, corrupt, form),
        "manifest-with-a-key-twice": (
            rewritten((b' "version": 1', b' "version": 1,\n "version": 1')),
            corrupt,
            form,
        ),
        "manifest-with-keys-in-another-order": (
            rewritten((b'   "shard_number": 0,\n   "size_bytes": ', b'   "size_bytes": 1,\n   "shard_number": ')),
            corrupt,
            form,
        ),
        "manifest-with-a-float": (
            rewritten((b'"first_sequence": 0,', b'"first_sequence": 0.0,')),
            corrupt,
            "a number of",
        ),
        "manifest-with-a-leading-zero": (rewritten((b'"shard_number": 1', b'"shard_number": 01')), corrupt, "not JSON"),
        "manifest-of-version-01": (rewritten((b'"version": 1', b'"version": 01')), corrupt, "not JSON"),
        "manifest-with-a-number-beyond-64-bits": (
            changed(entry(0, size_bytes=2**64)),
            corrupt,
            "a number of a.skl is not in 0..2**64 - 1",
        ),
        "manifest-with-upper-case-digits": (
            changed(entry(0, fingerprint=f"{root:032X}")),
            corrupt,
            f"fingerprint '{root:032X}' of a.skl is not 32 lower-case hexadecimal digits",
        ),
        "manifest-with-an-escape-too-many": (
            rewritten((b'"a.skl"', b'"\\u0061.skl"')),
            corrupt,
            "is not in canonical form",
        ),
        "manifest-with-a-name-without-skl": (changed(entry(0, name="a.bin")) | {"a.bin": a}, corrupt, not_plain),
        "manifest-with-a-name-of-skl-alone": (changed(entry(0, name=".skl")) | {".skl": a}, corrupt, not_plain),
        "manifest-with-a-name-elsewhere": (changed(entry(0, name="../a.skl")), corrupt, not_plain),
        "manifest-with-a-name-that-is-a-path": (changed(entry(0, name="x\\a.skl")), corrupt, not_plain),
        "manifest-with-a-name-with-a-line-feed": (changed(entry(0, name="a\n.skl")), corrupt, not_plain),
        "manifest-with-a-name-of-half-a-pair": (changed(entry(0, name="\ud800.skl")), corrupt, not_plain),
        "manifest-with-a-long-name": (
            changed(entry(0, name="x" * 252 + ".skl")),
            corrupt,
            "has 256 bytes, the limit is 255",
        ),
    }


def nested(depth: int) -> dict:
    value: dict = {"a": 0}
    for _ in range(depth):
        value = {"a": value}
    return value


def flipped(data: bytes, offset: int) -> bytes:
    return data[:offset] + bytes([data[offset] ^ 0x10]) + data[offset + 1 :]


def contents(directory: Path) -> dict:
    """What a reader finds, as JSON."""
    decoded = reference.decode_cache(directory)
    found = []
    for shard in decoded:
        for s in shard.sequences:
            values = s.values() if shard.settings.kind == RATIOS else None
            tokens = s.tokens or KNOWN[s.alignment]  # not in the shard, and in the JSON all the same
            found.append(make_golden.fields_of(dataclasses.replace(s, tokens=tokens)) | {"values": values})
    settings = dataclasses.replace(decoded[0].settings, shard_number=0, first_sequence=0)
    return {
        "settings": dataclasses.asdict(settings),
        "fingerprint": f"{reference.cache_fingerprint([shard.root for shard in decoded]):032x}",
        "cache_key": f"{decoded[0].cache_key:032x}",
        "shards": [len(shard.sequences) for shard in decoded],
        "sequences": found,
    }


def put(directory: Path, files: Files, beside: dict) -> None:
    """Write a cache and the JSON beside it; what is there stays."""
    if not directory.exists():
        directory.mkdir(parents=True)
        for name, data in files.items():
            (directory / name).write_bytes(data)
        text = json.dumps(beside | ({} if "error" in beside else contents(directory)), separators=(",", ":"))
        directory.with_name(f"{directory.name}.json").write_text(text + "\n")


def main() -> None:
    """Write all caches, after checking that the reference agrees."""
    for name, files in valid().items():
        put(HERE / "caches" / "valid" / name, files, {})
    for name, (files, error, message) in invalid().items():
        directory = HERE / "caches" / "invalid" / name
        put(directory, files, {"error": error, "message": message})
        try:
            reference.decode_cache(directory)
        except getattr(reference, error):
            continue
        raise AssertionError(name)


if __name__ == "__main__":
    main()
