"""Whether a ring finds room in memory: asked before it is made, and answered with both figures."""

import pytest
from capture_data import open_capture

from sklformat.capture import memory
from sklformat.capture.ring import Ring

MANY = 10**8 << 20


@pytest.fixture
def system(tmp_path, monkeypatch):
    """A system with 3 GiB of free memory, and no container."""
    (tmp_path / "meminfo").write_text("MemTotal:       8388608 kB\nMemAvailable:   3145728 kB\n")
    monkeypatch.setattr(memory, "_MEMORY", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "_LIMITS", (tmp_path / "v2", tmp_path / "v1"))
    return tmp_path


@pytest.mark.parametrize(
    ("limit", "free"),
    [
        (None, "3.0 GiB"),
        (("v2", "max\n"), "3.0 GiB"),
        (("v2", "524288000\n"), "500.0 MiB"),
        (("v1", "1073741824"), "1.0 GiB"),
    ],
)
def test_more_than_is_free_is_refused(system, limit, free):
    """Both figures are in the message, and the argument; what fits is taken."""
    if limit is not None:
        (system / limit[0]).write_text(limit[1])
    words = f"^ring_mib is too large: a ring of 131,072.0 GiB takes as much memory at once, and {free} are free here$"
    with pytest.raises(ValueError, match=words):
        memory.check_room(MANY, "ring_mib")
    memory.check_room(200 << 20, "ring_mib")  # which makes a ring of 256 MiB


def test_a_system_that_does_not_say_refuses_nothing(system):
    """Where nothing is known of memory, the system itself has to say no."""
    (system / "meminfo").unlink()
    memory.check_room(MANY, "ring_mib")


def test_rings_ask(tmp_path):
    """A ring and a capture are refused by this machine before anything is made."""
    with pytest.raises(ValueError, match=r"^size_bytes is too large: a ring of 131,072.0 GiB takes .* are free here$"):
        Ring.create(MANY)
    message = r"^ring_bytes is too large: a ring of 131,072.0 GiB takes"
    with pytest.raises(ValueError, match=message), open_capture(tmp_path / "cache", ring_bytes=MANY):
        pass
    assert [] == list((tmp_path / "cache").iterdir())
