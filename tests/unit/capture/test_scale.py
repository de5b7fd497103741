"""benchmarks/scale.py: its arithmetic is what a small cache takes, and docs/scale.md shows its tables."""

from pathlib import Path

import pytest

scale = pytest.importorskip("scale", reason="needs fsspec")
PAGE = Path(__file__).parents[3] / "docs" / "scale.md"


@pytest.mark.parametrize("name", scale.TABLES)
def test_the_page_shows_the_arithmetic(name):
    """Each table of docs/scale.md is the one that is printed."""
    assert "\n\n" + "\n".join(scale.TABLES[name]()) + "\n\n" in PAGE.read_text()


def test_a_small_cache_takes_what_the_arithmetic_says():
    """Bytes, shards and requests of a capture into a store and of an epoch from there, within 1 %."""
    pytest.importorskip("torch")
    found = scale.check(sequences=120, per_shard=60)
    for what, (counted, said) in found.items():
        assert said == pytest.approx(counted, rel=0.01), what
    assert {"PUT, upload", "GET, an epoch in windows", "GET, an epoch in global order"} <= found.keys()
