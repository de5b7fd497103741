"""Frozen shards and caches: what version 1.0 wrote stays readable, and what it must refuse stays refused."""

import hashlib
import json
import re
import runpy
import shutil
from pathlib import Path

import numpy as np
import pytest
import reference
import strategies

import sklformat as skl
from sklformat.cache.contents import scan_directory
from sklformat.cache.manifest import write_manifest
from sklformat.format.listing import parse_listing

HERE = Path(__file__).parent
FROZEN = HERE / "v1.0"
VALID = sorted([*(HERE / "valid").glob("*.skl"), *FROZEN.glob("*.skl")])
INVALID = sorted((HERE / "invalid").glob("*.skl"))
CACHES = sorted(path.with_suffix("") for path in (HERE / "caches" / "valid").glob("*.json"))
NO_CACHES = sorted(path.with_suffix("") for path in (HERE / "caches" / "invalid").glob("*.json"))
ERRORS = {"corrupt": skl.CorruptError, "truncated": skl.TruncatedError, "unsupported": skl.UnsupportedError}


def stem(path):
    return path.stem


def load(path):
    """Expected settings, sequences and the rest of the JSON beside a shard or a cache."""
    body = json.loads(path.with_name(f"{path.stem}.json").read_text())
    settings = reference.Settings(**body["settings"])
    sequences = []
    for item in body["sequences"]:
        fields = {name: value for name, value in item.items() if name != "values"}
        fields["positions"] = [[(token_id, code) for token_id, code in pairs] for pairs in fields["positions"]]
        sequences.append(reference.Sequence(**fields))
    return settings, sequences, body


def refusal(look, errors=skl.FormatError):
    """What looking at a cache raises, or None."""
    try:
        look()
    except errors as error:
        return error
    return None


def first_refusal(path, io):
    """What opening raises, or the first ``cache[i]`` that raises."""
    if refused := refusal(lambda: skl.open(path, io=io).close()):
        return refused
    with skl.open(path, io=io) as cache:
        return next(filter(None, (refusal(lambda i=i: cache[i]) for i in range(len(cache)))))


def check_sequences(settings, sequences, body, cache):
    """What is read is what was frozen, one by one and in a row."""
    for i, (sequence, item, got) in enumerate(zip(sequences, body["sequences"], cache, strict=True)):
        assert got == cache[i]
        assert (sequence.tokens if settings.token_size else None) == (
            None if got.tokens is None else got.tokens.tolist()
        )
        cache.check_alignment(i, sequence.tokens)
        assert sequence.alignment == got.alignment
        assert strategies.columns_of(sequence) == {name: values.tolist() for name, values in got.columns.items()}
        pairs = sequence.positions
        if item["values"] is not None:
            unit = 2.0 ** (settings.scale_log2 - 31)
            pairs = [
                [(token_id, float(np.float32(v)) * unit) for (token_id, _), v in zip(records, values, strict=True)]
                for records, values in zip(sequence.positions, item["values"], strict=True)
            ]
        assert pairs == strategies.pairs_of(got.targets)


def test_all_files_are_there():
    """No folder is empty, each valid shard and each cache has its JSON, and all together stay small."""
    assert (len(VALID), len(INVALID), len(CACHES), len(NO_CACHES)) == (40, 64, 15, 53)
    assert all(path.with_suffix(".json").exists() for path in VALID)
    for folder, listed in (("valid", CACHES), ("invalid", NO_CACHES)):
        assert sorted(path for path in (HERE / "caches" / folder).iterdir() if path.is_dir()) == listed
    assert sum(path.stat().st_size for path in HERE.rglob("*") if path.suffix != ".pyc") < 2_000_000


def test_no_file_was_edited():
    """
    Every file of version 1.0 is what its SHA-256 in v1.0/digests.txt says; files may be added beside them.

    ``cd tests/golden && sha256sum -c v1.0/digests.txt`` says the same.
    """
    lines = [line.split("  ", 1) for line in (FROZEN / "digests.txt").read_text("utf-8").splitlines()]
    digests = {name: digest for digest, name in lines}
    assert digests == {name: hashlib.sha256((HERE / name).read_bytes()).hexdigest() for name in digests}
    frozen = {path.relative_to(HERE).as_posix() for path in FROZEN.rglob("*") if path.is_file()}
    frozen = {name for name in frozen if "__pycache__" not in name}
    assert frozen - {"v1.0/digests.txt"} == {name for name in digests if name.startswith("v1.0/")}
    assert {name.partition("/")[0] for name in digests} == {"valid", "invalid", "caches", "v1.0"}


def test_the_builder_makes_the_frozen_files():
    """The program beside the files of version 1.0 makes each of them, byte for byte."""
    made = runpy.run_path(str(FROZEN / "builder.py"))["files"]()
    here = {path.relative_to(FROZEN).as_posix() for path in FROZEN.rglob("*") if path.is_file()}
    assert here - {"builder.py", "digests.txt"} == set(made)
    assert made == {name: (FROZEN / name).read_bytes() for name in made}


@pytest.mark.parametrize("path", VALID, ids=stem)
def test_valid(path):
    """Package, mapped and not, and reference find the settings, sequences, weights and digests that were frozen."""
    settings, sequences, body = load(path)
    assert skl.verify(path) == []
    for io in ("mmap", "pread"):
        with skl.open(path, io=io) as cache:
            shard = next(cache.shards())
            assert strategies.header_of(settings) == shard.header
            assert (body["fingerprint"], body["cache_key"]) == (shard.fingerprint, shard.header.cache_key)
            assert settings.first_sequence == cache.first_sequence
            check_sequences(settings, sequences, body, cache)
    decoded = reference.decode_shard(path.read_bytes())
    assert settings == decoded.settings
    assert [s.positions for s in sequences] == [s.positions for s in decoded.sequences]


@pytest.mark.parametrize("path", VALID, ids=stem)
def test_valid_is_written_again(path, tmp_path):
    """The package writes the frozen bytes from what they hold, but for flags and codes that it reads only."""
    settings, sequences, body = load(path)
    assert path.read_bytes() == reference.encode_shard(settings, sequences)
    if settings.compatible_flags or path.stem == "other-codes":
        return
    weights = None
    if settings.kind == reference.RATIOS:
        unit = 2.0 ** (settings.scale_log2 - 31)
        weights = [
            [
                [(token_id, v * unit) for (token_id, _), v in zip(records, values, strict=True)]
                for records, values in zip(sequence.positions, item["values"], strict=True)
            ]
            for sequence, item in zip(sequences, body["sequences"], strict=True)
        ]
    assert path.read_bytes() == strategies.write(tmp_path / "again.skl", settings, sequences, weights)


@pytest.mark.parametrize("path", INVALID, ids=stem)
def test_invalid(path):
    """A file with one fault raises the error that its name begins with, mapped and not; verify lists or raises it."""
    error = ERRORS[path.stem.split("-")[0]]
    with pytest.raises(skl.FormatError) as caught, skl.open(path) as cache:
        list(cache)
    assert str(caught.value) == str(first_refusal(path, "mmap")) == str(first_refusal(path, "pread"))
    assert error is type(caught.value)
    assert path == caught.value.path
    assert caught.value.section is not None
    if (error, caught.value.section) == (skl.UnsupportedError, "header"):
        with pytest.raises(skl.UnsupportedError, match=re.escape(str(caught.value))):
            skl.verify(path)
    else:
        assert {error.__name__} == {problem.error for problem in skl.verify(path)}
    with pytest.raises(getattr(reference, error.__name__)):
        reference.decode_shard(path.read_bytes())


# Caches


def copied(path, tmp_path):
    """A copy of a cache under a name of its own, so that nothing is written beside the frozen files."""
    return shutil.copytree(path, tmp_path / path.name)


@pytest.mark.parametrize("path", [*CACHES, FROZEN / "appendix-e"], ids=lambda path: path.name)
def test_cache(path):
    """A whole directory is read, iterated, verified and read by the reference, mapped and not, as it was frozen."""
    if path.parent == FROZEN:
        settings, sequences, body = load(FROZEN / "appendix-a.skl")
        sequences, body = sequences * 2, body | {"sequences": body["sequences"] * 2, "shards": [1, 1]}
        body["fingerprint"] = json.loads((path / "manifest.json").read_text())["fingerprint"]
    else:
        settings, sequences, body = load(path)
    assert skl.verify(path) == []
    for io in ("mmap", "pread"):
        with skl.open(path, io=io) as cache:
            assert (len(sequences), body["fingerprint"]) == (len(cache), cache.fingerprint)
            assert strategies.header_of(settings) == cache.header
            assert body["cache_key"] == cache.header.cache_key
            assert body["shards"] == [len(shard) for shard in cache.shards()]
            check_sequences(settings, sequences, body, cache)
    decoded = reference.decode_cache(path)
    assert body["shards"] == [len(shard.sequences) for shard in decoded]
    assert [s.positions for s in sequences] == [s.positions for shard in decoded for s in shard.sequences]


@pytest.mark.parametrize("path", [path for path in CACHES if (path / "manifest.json").exists()], ids=stem)
def test_a_manifest_is_written_again(path, tmp_path):
    """From the shards the package makes the frozen manifest byte for byte."""
    directory = copied(path, tmp_path)
    for name in ("manifest.json", "d.skl.partial"):
        (directory / name).unlink(missing_ok=True)
    write_manifest(directory, scan_directory(directory))
    assert (path / "manifest.json").read_bytes() == (directory / "manifest.json").read_bytes()


def neighbours(text):
    """A text with one byte removed, replaced or inserted, anywhere."""
    for at in range(len(text)):
        yield text[:at] + text[at + 1 :]
        for byte in (b"0", b"A", b" ", b"\xff"):
            yield text[:at] + byte + text[at + 1 :]
            yield text[:at] + byte + text[at:]


def test_every_change_of_a_manifest():
    """Whatever byte is removed, replaced or inserted, package and reference refuse the manifest, with one error."""
    path = FROZEN / "appendix-e" / "manifest.json"
    text, files = path.read_bytes(), ["a.skl", "b.skl"]
    assert len(parse_listing(text, path.parent, path)) == len(reference.decode_manifest(text, files)) == 2
    errors = (reference.CorruptError, reference.UnsupportedError, reference.MissingShardError)
    for changed in set(neighbours(text)) - {text}:
        ours = refusal(lambda text=changed: parse_listing(text, path.parent, path))
        theirs = refusal(lambda text=changed: reference.decode_manifest(text, files), errors)
        assert type(ours).__name__ == type(theirs).__name__ != "NoneType", changed


@pytest.mark.parametrize("path", NO_CACHES, ids=stem)
def test_no_cache(path):
    """A directory with one fault is refused by name: opened, iterated, by cache[i], verified, and by the reference."""
    body = json.loads(path.with_name(f"{path.name}.json").read_text())
    expected = getattr(skl, body["error"])
    with pytest.raises(expected, match=re.escape(body["message"])) as caught, skl.open(path) as cache:
        list(cache)
    assert caught.value.path is not None
    assert str(caught.value) == str(first_refusal(path, "mmap")) == str(first_refusal(path, "pread"))
    problems: list[skl.Problem] = []
    refused = refusal(lambda: problems.extend(skl.verify(path)))
    found = [type(refused)] if refused else [getattr(skl, problem.error) for problem in problems]
    assert any(issubclass(error, expected) for error in found)
    with pytest.raises(getattr(reference, body["error"])):
        reference.decode_cache(path)
