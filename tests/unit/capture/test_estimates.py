"""estimate: the bytes it tells are the bytes that a cache has."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import sklformat as skl
from sklformat.capture.estimates import block_size, estimate
from sklformat.settings.estimate import EstimateConfig


def test_size_is_that_of_a_real_cache(tmp_path):
    """A cache written with just so many records has just so many bytes."""
    header = skl.Header(vocab_size=1000, seq_len=32, kind="counts", rounds=20)
    ids = np.tile(np.arange(5, dtype=np.uint32), 32)
    targets = skl.SparseTargets(token_ids=ids, counts=[4] * 160, offsets=np.arange(33) * 5)
    with skl.ShardWriter(tmp_path / "shard-00000.skl", header=header) as writer:
        begin = writer.size
        for _ in range(7):
            writer.append(np.arange(33), targets)
        assert 7 * block_size(header, 32, 160) == writer.size - begin
    told = estimate(
        EstimateConfig(positions=7 * 32, rounds=20, seq_len=32, vocab_size=1000, unique_tokens=5, sequences_per_shard=7)
    )
    assert (tmp_path / "shard-00000.skl").stat().st_size == pytest.approx(told.bytes, abs=63)  # the index's zero bytes
    assert (7, 1, "R24", 224) == (told.sequences, told.shards, told.profile, told.positions)


def test_the_papers_cache():
    """10^12 positions of a vocabulary of 128 256 at 50 rounds: about 40 TB, as README says; hours and money follow."""
    told = estimate(
        EstimateConfig(
            positions=1e12, vocab_size=128_256, unique_tokens=12, positions_per_second=40_000, gpus=64, gpu_price=2.0
        )
    )
    assert 39 < told.bytes_per_position < 41
    assert told.bytes_per_position == pytest.approx(told.bytes / told.positions)
    assert told.disks == -(-told.bytes // (20 * 10**12))
    assert told.shards == -(-told.sequences // 1024)
    assert told.gpu_hours == pytest.approx(1e12 / 40_000 / 3600, rel=1e-6)
    assert told.days == pytest.approx(told.gpu_hours / 64 / 24)
    assert told.price == pytest.approx(2 * told.gpu_hours)
    assert told.bytes_per_second == pytest.approx(64 * 40_000 * told.bytes_per_position)
    for words in ("40.2", "TB", "GPU hours", "disks            3 of 20 TB"):
        assert words in str(told)
    unknown = estimate(EstimateConfig(positions=1e6, vocab_size=128_256, unique_tokens=12))
    assert (None, None, None, None) == (unknown.gpu_hours, unknown.days, unknown.price, unknown.bytes_per_second)
    assert "GPU" not in str(unknown)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"positions": 0}, "positions must be positive and finite, got 0"),
        ({"positions": float("inf")}, "positions must be positive and finite, got inf"),
        ({"rounds": -1}, "rounds must be in 0..65535, got -1"),
        ({"unique_tokens": 60}, "unique_tokens 60 is more than the 50 rounds"),
        ({"unique_tokens": None}, "unique_tokens is not known: give it, or --teacher and --text"),
        ({"vocab_size": None}, "vocab_size is not known"),
        ({"vocab_size": 1 << 25}, "vocab_size must be in"),
        ({"teacher": "t", "rounds": 0}, "rounds must be >= 1 with a teacher, got 0"),
        ({"teacher": "t"}, "needs both a teacher and something to read"),
        ({"gpus": 0}, "gpus must be >= 1, got 0"),
        ({"disk_tb": -1}, "disk_tb must be positive"),
    ],
)
def test_impossible_numbers_are_refused(changes, message):
    """Numbers that mean nothing, contradict each other or are missing are named."""
    with pytest.raises(ValueError, match=message):
        estimate(EstimateConfig(**{"positions": 1e6, "vocab_size": 1000, "unique_tokens": 12} | changes))


def test_the_command_needs_no_torch():
    """From given numbers the verb answers without loading torch, as a table and as JSON."""
    code = "import sys; from sklformat.cli import main; status = main(sys.argv[1:]); assert 'torch' not in sys.modules"
    words = ["estimate", "--positions", "1e12", "--vocab-size", "128256", "--unique-tokens", "12"]
    command = [sys.executable, "-c", code, *words]
    table = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "976,562,500 sequences" in table
    data = json.loads(subprocess.run([*command, "--json"], capture_output=True, text=True, check=True).stdout)
    assert (953_675, "R24") == (data["shards"], data["profile"])


def test_a_capture_of_no_known_size():
    """Positions may be left out where a student is measured, and not where a capture is to be estimated."""
    config = EstimateConfig(teacher="t", student=("s",), text=(Path("x"),), vocab_size=9, unique_tokens=2)
    with pytest.raises(ValueError, match="how many positions to capture is not known; say it"):
        estimate(config)
