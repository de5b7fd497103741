"""docs/recipes/ray_cache.py with Ray itself: two ranks on two workers of this machine make the bytes of one process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from capture_data import shard_bytes
from system import HANGS
from teacher_data import SEQ_LEN, write_teacher, write_text

import sklformat as skl
from sklformat.distill.teacher.caching import cache_teacher
from sklformat.settings.cache import CacheConfig

RECIPE = Path(__file__).parents[2] / "docs" / "recipes" / "ray_cache.py"
pytestmark = pytest.mark.integration


def test_two_workers_capture_one_cache(tmp_path):
    """Tasks of two workers; the same command once more finds all there; a rank that fails says why."""
    write_teacher(tmp_path / "teacher", write_text(tmp_path / "text"))
    settings = {"seq_len": SEQ_LEN, "num_sequences": 10, "rounds": 20, "batch_size": 2, "sequences_per_shard": 2}
    cache_teacher(
        CacheConfig(teacher=str(tmp_path / "teacher"), text=(tmp_path / "text",), out=tmp_path / "whole", **settings)
    )
    for rounds, status in ((20, 0), (20, 0), (19, 1)):
        done = run(tmp_path, **settings | {"rounds": rounds})
        assert status == done.returncode, done.stderr
    assert "made with other settings" in done.stdout + done.stderr
    assert shard_bytes(tmp_path / "whole") == shard_bytes(tmp_path / "cache")
    assert [] == skl.verify(tmp_path / "cache")


def run(place, **settings):
    flags = {"teacher": place / "teacher", "text": place / "text", "out": place / "cache"} | settings
    words = [word for name, value in flags.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    return subprocess.run(
        [sys.executable, RECIPE, "--ranks", "2", "--run", "two", "--retries", "0", "--", *words],
        env=os.environ | {"RAY_USAGE_STATS_ENABLED": "0"},
        cwd=place, capture_output=True, text=True, check=False, timeout=HANGS,
    )  # fmt: skip
