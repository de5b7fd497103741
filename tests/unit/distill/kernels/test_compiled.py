"""Every declared kernel is a program for a card, which the interpreter does not say: it takes more than Triton does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from declared import KERNELS

TESTS = Path(__file__).parents[3]
VARIANTS = {(name, variant) for name, kernel in KERNELS.items() for variant in kernel.variants}
SHARED, STACK = 48 << 10, 64
"""Bytes that a program may share, and that may lie in memory of a thread's registers."""


def compiled(*words):
    """What compiled_kernels.py prints."""
    paths = os.pathsep.join([str(TESTS), str(TESTS.parent / "benchmarks")])
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(TESTS / "compiled_kernels.py"), *words]
    environment["PYTHONPATH"] = paths
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_kernels_are_programs_in_tritons_language():
    """Every variant is read to its end as for an H100; draws take their two programs for all seeds and sequences."""
    *lines, (_, _, _, of_seeds) = compiled("90")
    assert VARIANTS == {(kernel, variant) for kernel, variant, *_ in lines}
    assert of_seeds == 2


@pytest.mark.soak
@pytest.mark.parametrize("capability", ["80", "90"])
def test_kernels_are_machine_code_with_room_for_what_they_hold(capability):
    """For an A100 and an H100; next to nothing of what a thread has in hand lies in memory."""
    lines = compiled("--assemble", capability)
    assert VARIANTS == {(kernel, variant) for kernel, variant, *_ in lines}
    for *of, programs in lines:
        assert programs, of
        for shared, stack in programs:
            assert shared <= SHARED, of
            assert stack <= STACK, of
