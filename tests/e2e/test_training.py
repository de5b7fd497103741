import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import forked
import pytest
import student_data
import tiny
from student_data import train_until
from system import HANGS

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("training")
    tiny.write_place(root)
    assert 0 == forked.run(train_until, root / "whole", root, 4, 0).status
    return root


def rows_of(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_a_killed_run_goes_on_bit_for_bit(place):
    """Killed with SIGKILL between two checkpoints, a run ends with the losses and the weights of an undisturbed one."""
    assert -signal.SIGKILL == forked.run(train_until, place / "cut", place, 4, 8).status
    assert 8 == rows_of(place / "cut")[-1]["step"]
    assert 0 == forked.run(train_until, place / "cut", place, 4, 0).status
    assert [r["loss"] for r in rows_of(place / "whole")] == [r["loss"] for r in rows_of(place / "cut")]
    whole, cut = ((place / name / "model" / "model.safetensors").read_bytes() for name in ("whole", "cut"))
    assert whole == cut


def by_torchrun(number, out, place):
    command = [sys.executable, *TORCHRUN, str(number), student_data.__file__, str(out), str(place), "2", "0"]
    environment = os.environ | {"PYTHONPATH": str(Path(student_data.__file__).parent)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=HANGS, check=False)
    return [(done.returncode, "", done.stderr)]


def by_itself(number, out, place):
    return forked.run_ranks(number, train_until, out, place, 2, 0)


@pytest.mark.parametrize("launch", [by_itself, pytest.param(by_torchrun, marks=pytest.mark.soak)])
def test_two_processes_are_one_with_twice_the_batch(place, tmp_path, launch):
    """Two processes share each step's sequences; losses are those of one process, up to rounding."""
    for status, _, err in launch(2, tmp_path / "two", place):
        assert status == 0, err
    for alone, shared in zip(rows_of(place / "whole"), rows_of(tmp_path / "two"), strict=True):
        assert alone["loss"] == pytest.approx(shared["loss"], abs=2e-4)
        assert alone["sequences"] == shared["sequences"]
