"""Commands on a disk that takes no more: real processes, which may make files of a few thousand bytes only."""

import subprocess
import sys

import numpy as np
import pytest
from system import HANGS, complaint

import sklformat as skl
from sklformat.cli import main

LIMITED = """
import resource, sys
from sklformat import cli
cli._NO_ROOM = (*cli._NO_ROOM, 27)  # what the limit on a file's size gives
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), int(sys.argv[1])))
sys.exit(cli.main(sys.argv[2:]))
"""


@pytest.fixture
def cache(tmp_path):
    header = skl.Header(vocab_size=500, seq_len=8, kind="counts", rounds=3)
    with skl.CacheWriter(tmp_path / "cache", header=header) as writer:
        for _ in range(40):
            targets = skl.SparseTargets(token_ids=np.arange(8), counts=[3] * 8, offsets=np.arange(9))
            writer.append(np.arange(9), targets)
    return tmp_path / "cache"


def limited(size, *words):
    command = [sys.executable, "-c", LIMITED, str(size), *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=HANGS)
    assert (1, "") == (done.returncode, done.stdout)
    return complaint(done.stderr)


@pytest.mark.parametrize("end", ["jsonl", "npz"])
def test_plain_columns_name_their_file(cache, tmp_path, end):
    """The file is named, what to do is said once, and nothing half written stays."""
    path = tmp_path / f"x.{end}"
    words = f"{path}: File too large: make room, then run the same command again"
    assert f"sklformat convert: {words}\n" == limited(3000, "convert", cache, path)
    assert [cache] == list(tmp_path.iterdir())


def test_a_cache_is_resumed(cache, tmp_path):
    """What was flushed is kept, the message says so once in a command's own words, and the same command ends."""
    assert 0 == main(["convert", str(cache), str(tmp_path / "x.npz")])
    place = tmp_path / "back" / "shard-00000.skl.partial"
    words = f"{place}: File too large; what was flushed is kept there: make room or fix the disk, then run the same"
    back = ["convert", str(tmp_path / "x.npz"), str(tmp_path / "back")]
    assert f"sklformat convert: {words} command again\n" == limited(6000, *back)
    assert 0 == main(back)
    assert skl.open(cache).fingerprint == skl.open(tmp_path / "back").fingerprint
