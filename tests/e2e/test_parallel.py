import json
import os
import subprocess
import sys
from pathlib import Path

import forked
import parallel_data
import pytest
from parallel_data import STOP, WAYS, difference, rows_of
from system import HANGS, complaint
from transformers import AutoConfig

from sklformat.distill.models import loading

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", parallel_data.__file__)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Every run that the tests look at, those of two processes in one pair of these."""
    root = tmp_path_factory.mktemp("parallel")
    parallel_data.write_place(root)
    parallel_data.run(root, "one")
    parallel_data.run(root, "one", out="one-then-two", stop=STOP)
    for status, _, err in forked.run_ranks(2, parallel_data.run_two, root):
        assert status == 0, err
    parallel_data.run(root, "one", out="two-then-one")
    return root


@pytest.mark.parametrize("way", ["ddp", "shard", "one-then-two", "two-then-one"])
def test_two_processes_come_to_what_one_does(place, way):
    """
    Replicated, divided, and divided for a part of the way: the losses and the weights of one process.

    Also where one of the processes has a micro-batch without any record.
    """
    losses, weights = difference(place, way, "one")
    assert losses <= 1e-5
    assert weights <= 1e-5


def test_each_process_holds_its_part_of_a_divided_student(place):
    """Of weights and optimizer half, up to what does not divide; replicated, all of it."""
    held = {name: json.loads((place / f"held {name} 1.json").read_text()) for name in ("ddp", "shard")}
    held["one"] = json.loads((place / "held one 0.json").read_text())
    assert held["one"] == held["ddp"]
    assert 0.5 <= held["shard"] / held["one"] < 0.53


def test_experts_that_a_process_leaves_out_are_averaged_too(place):
    """Where experts are modules of their own, each process may use others; gradients are the mean all the same."""
    for rank in (0, 1):
        assert [[0.5, 1.0]] * 2 == json.loads((place / f"experts {rank}.json").read_text())


def test_a_divided_student_is_saved_as_any_other(place):
    """Whole, under the name of its own type."""
    assert ["LlamaForCausalLM"] == AutoConfig.from_pretrained(place / "shard" / "model").architectures
    assert loading.load_model(place / "shard" / "model").num_parameters() > 0


def test_what_one_process_is_refused_ends_all_in_one_line(place):
    """The first says why; the other, that another one has."""
    done = forked.run_ranks(2, parallel_data.refused, place)
    assert [1, 1] == [each.status for each in done]
    first, second = (complaint(each.stderr) for each in done)
    assert "thesis.tex" in first
    assert "sklformat train: another process of this run has ended; what it said tells why\n" == second


@pytest.fixture(scope="module")
def all_ways(place):
    """All that the shorter tests leave out, by torchrun."""
    ones = [way for way in WAYS if "-" not in way or way == "half-parameters"]
    twos = [way for way in WAYS if way not in ones]
    environment = os.environ | {"PYTHONPATH": str(Path(parallel_data.__file__).parent)}
    for command in ([sys.executable, parallel_data.__file__], [sys.executable, *TORCHRUN]):
        ways = [way for way in (twos if "--standalone" in command else ones) if not (place / way).exists()]
        done = subprocess.run(
            [*command, place, *ways], capture_output=True, text=True, env=environment, timeout=HANGS, check=False
        )
        assert done.returncode == 0, done.stderr
    return place


@pytest.mark.integration
@pytest.mark.parametrize("way", [way for way in WAYS if way.endswith(("-ddp", "-shard"))])
def test_every_way_on_two_processes_comes_to_what_it_does_on_one(all_ways, way):
    """Tied heads, adapters (on the head too), recomputed activations, compiled layers; in half precision nearly."""
    alone = {"recomputed": "one"}.get(way.rpartition("-")[0], way.rpartition("-")[0])
    losses, weights = difference(all_ways, way, alone)
    half = way.startswith("half")
    assert losses <= (5e-3 if half else 1e-5)
    assert weights <= (0.2 if half else 1e-5)


@pytest.mark.integration
def test_compiled_layers_learn_as_others_do(all_ways):
    """The same losses, up to the order of sums."""
    losses, _ = difference(all_ways, "compiled", "one")
    assert losses <= 1e-5
    assert rows_of(all_ways, "compiled") != rows_of(all_ways, "one")
