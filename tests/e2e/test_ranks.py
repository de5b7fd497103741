"""Several ranks capture one cache: killed, gone on with on other numbers of ranks, the bytes are those of one."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import forked
import pytest
import teacher_data
from capture_data import shard_bytes
from system import HANGS, complaint
from teacher_data import SEQ_LEN, write_teacher, write_text

import sklformat as skl
from sklformat.cli import main
from sklformat.distill.teacher.caching import cache_teacher
from sklformat.settings.cache import CacheConfig

TESTS = Path(__file__).parents[1]
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Text, a teacher, and the cache that one undisturbed rank makes of them."""
    folder = tmp_path_factory.mktemp("ranks")
    write_teacher(folder / "teacher", write_text(folder / "text"))
    cache_alone(folder, folder / "whole")
    return folder


def cache_alone(place, out):
    """What one process makes, here."""
    return cache_teacher(
        CacheConfig(
            teacher=str(place / "teacher"),
            text=(place / "text",),
            out=out,
            seq_len=SEQ_LEN,
            num_sequences=22,
            rounds=20,
            batch_size=3,
            sequences_per_shard=4,
        )
    )


def command(place, out):
    flags = {"teacher": place / "teacher", "text": place / "text", "out": out, "seq-len": SEQ_LEN, "num-sequences": 22}
    flags |= {"rounds": 20, "batch-size": 3, "sequences-per-shard": 4}
    return ["cache", *(str(word) for name, value in flags.items() for word in (f"--{name}", value)), "--json"]


def check_sound(place, out):
    assert shard_bytes(place / "whole") == shard_bytes(out)
    assert [] == skl.verify(out)
    assert {"manifest.json", "tokens", *shard_bytes(out)} == {path.name for path in out.iterdir()}


def test_one_killed_rank_ends_all_and_three_go_on(place, tmp_path):
    """Under torchrun, a rank that is killed ends the other with one line; three ranks make the rest, byte for byte."""
    dying = [str(TESTS / "teacher_data.py"), "1", "5"]
    words = command(place, tmp_path / "cache")
    killed = subprocess.run(
        [sys.executable, *TORCHRUN, "2", *dying, *words],
        env=os.environ | {"PYTHONPATH": str(TESTS)}, capture_output=True, text=True, check=False, timeout=HANGS,
    )  # fmt: skip
    assert 0 != killed.returncode
    [line] = [line for line in killed.stderr.splitlines() if line.startswith("sklformat cache: ")]
    assert "sklformat cache: rank 0" in line
    assert "stopped:" in line or "another rank of this run has ended" in line
    assert "same command again to resume" in line
    kept = shard_bytes(tmp_path / "cache")
    assert "shard-00001.skl" in kept  # rank 1 handed over all of it before it died
    with pytest.raises(skl.MissingShardError):
        skl.open(tmp_path / "cache")
    ranks = forked.run_ranks(3, main, words)
    assert [0] * 3 == [done.status for done in ranks], ranks
    [result] = [json.loads(done.stdout) for done in ranks if done.stdout]  # one rank speaks for all
    assert (22, skl.open(place / "whole").fingerprint) == (result["sequences"], result["fingerprint"])
    assert 0 < result["sequences_made"] <= 22 - 4 * len(kept)
    check_sound(place, tmp_path / "cache")


def test_all_killed_ranks_go_on_as_one(place, tmp_path):
    """Ranks of any launcher that are all killed leave nothing but what one process goes on with, byte for byte."""
    words = command(place, tmp_path / "cache")
    ranks = forked.run_ranks(2, teacher_data.main_with_a_signal, signal.SIGKILL, 6, "01", words)
    assert [(-signal.SIGKILL, "")] * 2 == [(done.status, complaint(done.stderr)) for done in ranks]
    assert 22 - 12 == cache_alone(place, tmp_path / "cache").sequences_made
    check_sound(place, tmp_path / "cache")
