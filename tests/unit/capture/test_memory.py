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
    limits = [(tmp_path / version / "limit", tmp_path / version / "used") for version in ("v2", "v1")]
    monkeypatch.setattr(memory, "_LIMITS", limits)
    return tmp_path


# What a container may have and has, MiB, and its memory.stat, in which {} are the further figures.
CONTAINERS = {
    "none": (None, "3.0 GiB"),
    "no limit": (("v2", "max", 100, ""), "3.0 GiB"),
    "more than the system": (("v2", 9000, 100, ""), "3.0 GiB"),
    "some taken": (("v2", 600, 100, "anon 7\n"), "500.0 MiB"),
    "all taken": (("v2", 600, 601, ""), "0.0 MiB"),
    "by copies of files": (("v2", 600, 400, "file 9\ninactive_file {}\nactive_file {}\n", 100, 200), "500.0 MiB"),
    "v1": (("v1", 1024, 24, "inactive_file 9\ntotal_inactive_file {}\ntotal_active_file {}\n", 20, 4), "1.0 GiB"),
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_more_than_is_free_is_refused(system, name):
    """Both figures are in the message, and the argument; what fits is taken."""
    container, free = CONTAINERS[name]
    if container is not None:
        version, most, used, stat, *copies = container
        (system / version).mkdir()
        (system / version / "limit").write_text(f"{most if most == 'max' else most << 20}\n")
        (system / version / "used").write_text(f"{used << 20}\n")
        (system / version / "memory.stat").write_text(stat.format(*(size << 20 for size in copies)))
    words = f"^ring_mib is too large: a ring of 131,072.0 GiB takes as much memory at once, and {free} are free here$"
    with pytest.raises(ValueError, match=words):
        memory.check_room(MANY, "ring_mib")
    if free != "0.0 MiB":
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
