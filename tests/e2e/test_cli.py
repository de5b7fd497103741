"""The command line in real processes, on sound caches and on rubbish."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import forked
import numpy as np
import pytest
from system import HANGS, complaint

import sklformat as skl
from sklformat.cache.contents import scan_directory
from sklformat.cache.manifest import write_manifest
from sklformat.cli import main

WITHOUT_TORCH = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
from sklformat.cli import main
sys.exit(main(sys.argv[1:]))
"""


def sklformat(*words, start=("-m", "sklformat")):
    """Status, stdout and stderr of one command; stderr has at most one line and no traceback."""
    command = [sys.executable, *start, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=HANGS)
    return done.returncode, done.stdout, complaint(done.stderr)


def quickly(*words):
    """The same, without a new interpreter."""
    done = forked.run(main, [*map(str, words)])
    return done._replace(stderr=complaint(done.stderr))


def write_cache(directory, shards=3, per_shard=4):
    """A cache with its manifest."""
    rng = np.random.default_rng(5)
    directory.mkdir()
    for number in range(shards):
        header = skl.Header(
            vocab_size=500, seq_len=8, kind="counts", rounds=6, shard_number=number, first_sequence=number * per_shard
        )
        with skl.ShardWriter(directory / f"shard-{number:05d}.skl", header=header) as writer:
            for _ in range(per_shard):
                ids = np.sort(rng.integers(0, 498, (8, 3)), axis=1).ravel() + np.tile([0, 1, 2], 8)
                targets = skl.SparseTargets(token_ids=ids, counts=[3, 2, 1] * 8, offsets=np.arange(9) * 3)
                writer.append(rng.integers(0, 500, 9), targets)
    write_manifest(directory, scan_directory(directory))
    return directory


@pytest.fixture
def cache(tmp_path):
    return write_cache(tmp_path / "cache")


def test_verbs_on_a_sound_cache(cache, tmp_path):
    """Inspect, verify and convert there and back work as commands, and agree with the Python interface."""
    fingerprint = skl.open(cache).fingerprint
    status, out, _ = sklformat("inspect", cache, "--json")
    facts = json.loads(out)
    assert (0, fingerprint, 12, 96) == (status, facts["fingerprint"], facts["sequences"], facts["positions"])
    status, out, _ = sklformat("verify", cache)
    assert (0, True) == (status, out.startswith(f"{cache}: sound"))
    for name in ("c.parquet", "c.npz"):
        assert 0 == sklformat("convert", cache, tmp_path / name)[0]
    assert 0 == sklformat("convert", tmp_path / "c.parquet", tmp_path / "back")[0]
    assert fingerprint == skl.open(tmp_path / "back").fingerprint


def test_damage_is_named(cache):
    """A flipped bit, a cut file and a shard that is gone are each found, named, and answered with status 3."""
    shards = sorted(cache.glob("*.skl"))
    data = bytearray(shards[0].read_bytes())
    data[4200] ^= 16
    shards[0].write_bytes(data)
    os.truncate(shards[1], shards[1].stat().st_size - 65)
    gone = shards[2].rename(cache.parent / "gone")
    status, out, err = quickly("verify", cache, "--json")
    found = {(Path(p["path"]).name, p["error"]) for p in json.loads(out)["problems"]}
    assert (3, "") == (status, err)
    assert {
        ("shard-00000.skl", "CorruptError"),
        ("shard-00001.skl", "TruncatedError"),
        ("shard-00002.skl", "MissingShardError"),
    } <= found
    status, _, err = quickly("convert", cache, cache.parent / "copy.jsonl")
    assert (1, True) == (status, "shard-00002.skl: sequences " in err)
    gone.rename(shards[2])
    status, _, err = quickly("convert", cache, cache.parent / "copy.jsonl")
    assert (1, True) == (status, "shard-00000.skl: block 0: byte 4096" in err)
    assert not (cache.parent / "copy.jsonl").exists()


def test_rubbish_is_one_line(cache, tmp_path):
    """What is no cache ends in one clear line on stderr and status 1, whatever it is."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "none.skl").touch()
    (tmp_path / "text.skl").write_text("not a cache at all\n" * 500)
    (cache / "shard-00001.skl").unlink()
    for words, message in (
        (("inspect", tmp_path / "empty"), "no .skl shards here: not a cache, or an empty one"),
        (("verify", tmp_path / "empty"), "no .skl shards here: not a cache, or an empty one"),
        (("inspect", tmp_path / "none.skl"), "the file is empty"),
        (("inspect", tmp_path / "text.skl"), "not a sklformat shard"),
        (("verify", tmp_path / "text.skl"), "not a sklformat shard"),
        (("inspect", tmp_path / "nothing"), "no such file or directory"),
        (("inspect", cache), "sequences 4..7 are missing"),
        (("recover", tmp_path / "text.skl"), "a sealed shard is never cut"),
        (("convert", tmp_path / "text.skl", tmp_path / "x.npz"), "not a sklformat shard"),
        (("convert", tmp_path / "empty", tmp_path / "empty"), "no .skl shards here"),
    ):
        status, out, err = quickly(*words)
        assert (1, "") == (status, out)
        assert err.startswith(f"sklformat {words[0]}: {words[1]}")
        assert message in err


def test_a_torn_shard_is_recovered(cache, tmp_path):
    """Recover keeps whole sequences of a shard whose writer died, and inspect counts them."""
    directory = tmp_path / "torn"
    directory.mkdir()
    header = skl.open(cache).header
    writer = skl.ShardWriter(directory / "shard-00000.skl", header=header)
    for sequence in skl.open(cache):
        writer.append(sequence.tokens, sequence.targets)
    writer.close()
    partial = directory / "shard-00000.skl.partial"
    os.truncate(partial, partial.stat().st_size - 1)
    status, out, _ = quickly("inspect", directory, "--json")
    assert (0, {partial.name: 11}) == (status, json.loads(out)["unsealed"])
    status, _, err = quickly("inspect", directory, "--sequence", 0)
    assert (1, True) == (status, "shard-00000.skl.partial: the shard is unfinished" in err)
    status, out, _ = quickly("recover", directory, "--json")
    [kept] = json.loads(out)
    assert (0, 11, True) == (status, kept["sequences"], kept["bytes_cut"] > 0)


def test_without_torch(cache):
    """The format's verbs and all help work where torch is missing; a verb that needs it says how to install it."""
    assert 0 == sklformat("verify", cache, start=("-c", WITHOUT_TORCH))[0]
    assert 0 == sklformat("train", "--help", start=("-c", WITHOUT_TORCH))[0]
    status, out, err = sklformat("train", "--cache", cache, "--out", cache, start=("-c", WITHOUT_TORCH))
    assert (1, "") == (status, out)
    assert "sklformat train: this needs torch; install it: pip install 'sklformat[train]'\n" == err


def test_interrupt(tmp_path):
    """Ctrl-C ends in one line that says how to resume, and status 130."""
    source = tmp_path / "slow.jsonl"
    os.mkfifo(source)
    command = [sys.executable, "-m", "sklformat", "convert", source, tmp_path / "cache"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process, source.open("w"):
        process.send_signal(signal.SIGINT)  # the command has the pipe open and waits for its first line
        err = process.communicate(timeout=HANGS)[1]
    assert (130, "sklformat convert: stopped; run the same command again to resume\n") == (process.returncode, err)
