"""What the demo refuses by its own words."""

from pathlib import Path

import pytest
from strategies import make_listed_cache

import sklformat as skl
from sklformat.distill.demo import stages
from sklformat.settings.cache import CacheConfig


def test_a_damaged_cache(tmp_path):
    """A cache that is damaged between two runs is deleted, not trained on."""
    directory = make_listed_cache(tmp_path / "cache")
    path = min(directory.glob("*.skl"))
    data = bytearray(path.read_bytes())
    data[4096 + 70] ^= 1
    path.write_bytes(data)
    config = CacheConfig(teacher="t", text=(Path("x"),), out=directory, seq_len=3)
    with pytest.raises(skl.CorruptError, match=r"1 problems, the first: .*; delete this cache and run again"):
        stages._verify([config])
