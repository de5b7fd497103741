"""
The recipes for several processes: one process's losses and weights, exact resuming; and what goes wrong without them.

Their programs run as they are, in processes that find each other as torchrun's do; ``make integrations`` has torchrun
itself, too.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import forked
import pytest
import torch
import transformers
from loader_data import SEQUENCES, write_cache
from parallel_runs import SIZES, STUDENTS, run, train_and_look
from programs import run_program
from safetensors.torch import load_file
from system import HANGS
from tiny import write_place

RECIPES = Path(__file__).parents[2] / "docs" / "recipes"
STEPS, STOP = 20, 7  # an epoch has five
FLAGS = ("--batch-size", "4", "--learning-rate", "1e-2", "--log-every", "1", "--save-every", "3")
FSDP2 = """\
distributed_type: FSDP
fsdp_config: {fsdp_version: 2, fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP, fsdp_state_dict_type: SHARDED_STATE_DICT}
num_machines: 1
num_processes: 2
use_cpu: true
"""
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A cache of sequences of unlike lengths, and a student whose head is tied, with a cap."""
    folder = tmp_path_factory.mktemp("recipes")
    write_cache(folder / "cache", seq_len=0, lengths=[4 + 5 * i % 13 for i in range(SEQUENCES)])
    torch.manual_seed(0)
    config = transformers.Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=2.0)
    student = transformers.Gemma2ForCausalLM(config)
    torch.nn.init.normal_(student.lm_head.weight, std=0.3)
    student.save_pretrained(folder / "student")
    return folder


@pytest.fixture(scope="module")
def alone(place):
    """What one process makes of ddp.py: the loss of each step, and the weights."""
    losses = launched("ddp.py", 1, place, place / "alone.pt", STEPS)
    return losses, torch.load(place / "alone.pt", weights_only=True)["student"]


def launched(recipe, processes, place, out, steps, flags=FLAGS):
    """The losses that a recipe prints, by step."""
    words = [place / "cache", place / "student", out, "--steps", steps, *flags]
    ranks = forked.run_ranks(processes, run_program, RECIPES / recipe, *words)
    assert [0] * processes == [done.status for done in ranks], ranks
    assert all(done.stdout == "" for done in ranks[1:])
    return losses_of(ranks[0].stdout)


def losses_of(stdout):
    found = re.findall(r"^step (\d+): (\S+) nats per position$", stdout, re.MULTILINE)
    return {int(step): float(loss) for step, loss in found}


def assert_equal_weights(found, wanted, **tolerances):
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, **tolerances)


@pytest.fixture(scope="module")
def differences(place):
    """Loss and gradients of every kind of student on two processes, as one process says them."""
    ranks = forked.run_ranks(2, run, place / "cache")
    assert [0, 0] == [done.status for done in ranks], ranks
    return json.loads(ranks[0].stdout.splitlines()[-1])


@pytest.mark.parametrize("wrapper", ["DDP", "FSDP2"])
@pytest.mark.parametrize("name", STUDENTS)
def test_gradients_are_those_of_a_dense_step(differences, name, wrapper):
    """Loss and every gradient are float64's own of the whole step; heads tied, biased, capped, scaled or under LoRA."""
    found = differences[name][wrapper]
    assert found["names"]
    assert 0 == found["between processes"]
    assert 1e-6 > found["loss"]
    assert 1e-5 > found["gradient"]


def test_what_the_recipes_spare_their_users(differences):
    """Past the wrapper, processes differ (U6); with a head made whole by hand (U7) or means of means, all are wrong."""
    found = differences["bias"]
    assert 0.1 < found["DDP, passed by"]["between processes"]
    assert 0.01 < found["FSDP2, head made whole"]["gradient"]
    assert 0.001 < found["DDP, means of means"]["gradient"]
    assert 1e-6 > max(wrong["loss"] for name, wrong in found.items() if "means" not in name)  # which shows nothing


def test_ddp(place, alone, tmp_path):
    """Two processes train as one does; stopped and started again, bit for bit as if undisturbed."""
    losses = launched("ddp.py", 2, place, tmp_path / "straight.pt", STEPS)
    assert alone[0] == pytest.approx(losses, rel=1e-5)
    straight = torch.load(tmp_path / "straight.pt", weights_only=True)
    assert_equal_weights(straight["student"], alone[1], rtol=1e-4, atol=1e-5)
    first = launched("ddp.py", 2, place, tmp_path / "resumed.pt", STOP)
    assert losses == first | launched("ddp.py", 2, place, tmp_path / "resumed.pt", STEPS)
    resumed = torch.load(tmp_path / "resumed.pt", weights_only=True)
    assert straight["loader"] == resumed["loader"]
    assert_equal_weights(resumed["student"], straight["student"], rtol=0, atol=0)


def test_fsdp2(place, alone, tmp_path):
    """A divided student trains as a whole one does, and resumes on another number of processes; it ends up whole."""
    first = launched("fsdp2.py", 2, place, tmp_path / "run", STOP)
    assert [f"step-{STOP:08}"] == [path.name for path in tmp_path.glob("run/step-*")]
    losses = first | launched("fsdp2.py", 1, place, tmp_path / "run", STEPS)
    assert alone[0] == pytest.approx(losses, rel=1e-5)
    weights = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert_equal_weights(weights, {name: alone[1][name] for name in weights}, rtol=1e-4, atol=1e-5)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert_equal_weights(loaded.state_dict(), alone[1], rtol=1e-4, atol=1e-5)


def test_no_wrapper_outlives_its_group(tmp_path):
    """``sklformat train`` has let go of DDP's wrapper when it leaves the others: gloo's threads may hang otherwise."""
    write_place(tmp_path)
    ranks = forked.run_ranks(2, train_and_look, tmp_path)
    assert [(0, "0\n")] * 2 == [(done.status, done.stdout) for done in ranks], ranks


@pytest.mark.integration
def test_accelerate(place, alone, tmp_path):
    """Accumulated on one process or divided between two, a step is one step; it resumes bit for bit."""
    micro = ("--batch-size", "2", "--accumulation", "2", *FLAGS[2:])
    whole = launched("accelerate_loop.py", 1, place, tmp_path / "whole", STEPS, ("--batch-size", "4", *FLAGS[2:]))
    assert alone[0] == pytest.approx(whole, rel=1e-5)
    parts = launched("accelerate_loop.py", 1, place, tmp_path / "parts", STEPS, micro)
    halves = ("--batch-size", "1", *micro[2:])
    first = launched("accelerate_loop.py", 2, place, tmp_path / "resumed", STOP, halves)
    straight = launched("accelerate_loop.py", 2, place, tmp_path / "straight", STEPS, halves)
    assert straight == first | launched("accelerate_loop.py", 2, place, tmp_path / "resumed", STEPS, halves)
    resumed, wanted = (tmp_path / name / f"step-{STEPS:08}" / "model.safetensors" for name in ("resumed", "straight"))
    assert_equal_weights(load_file(resumed), load_file(wanted), rtol=0, atol=0)
    student = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "straight" / "model").state_dict()
    assert_equal_weights(load_file(wanted), {name: student[name] for name in load_file(wanted)}, rtol=0, atol=0)
    # The first epoch's steps are the same sequences, whatever the micro-batches are.
    for step in range(1, 6):
        assert whole[step] == pytest.approx(parts[step], rel=1e-5)
        assert whole[step] == pytest.approx(straight[step], rel=1e-5)


@pytest.mark.integration
@pytest.mark.parametrize("recipe", ["ddp.py", "fsdp2.py", "accelerate_loop.py"])
def test_under_torchrun(place, alone, tmp_path, recipe):
    """Started by torchrun on two processes, each recipe trains as one process does."""
    flags = FLAGS if recipe != "accelerate_loop.py" else ("--batch-size", "2", *FLAGS[2:])
    words = [RECIPES / recipe, place / "cache", place / "student", tmp_path / "out", "--steps", STEPS, *flags]
    done = subprocess.run(
        [sys.executable, *TORCHRUN, "2", *map(str, words)],
        env=os.environ, capture_output=True, text=True, check=False, timeout=HANGS,
    )  # fmt: skip
    assert 0 == done.returncode, done.stderr
    assert alone[0] == pytest.approx(losses_of(done.stdout), rel=1e-5)


@pytest.mark.integration
def test_accelerate_divides_the_student(place, alone, tmp_path):
    """Under accelerate's own FSDP2 the recipe needs no other line, and resumes."""
    settings = tmp_path / "fsdp.yaml"
    settings.write_text(FSDP2)
    for steps in (STOP, STEPS):
        words = [RECIPES / "accelerate_loop.py", place / "cache", place / "student", tmp_path / "run", "--steps", steps]
        words += ["--batch-size", 2, *FLAGS[2:]]
        done = subprocess.run(
            [sys.executable, "-m", "accelerate.commands.launch", "--config_file", settings, *map(str, words)],
            env=os.environ, capture_output=True, text=True, check=False, timeout=HANGS,
        )  # fmt: skip
        assert 0 == done.returncode, done.stderr
    last = {step: loss for step, loss in alone[0].items() if step > STOP}
    assert last == pytest.approx(losses_of(done.stdout), rel=1e-5)
    weights = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert_equal_weights(weights, {name: alone[1][name] for name in weights}, rtol=1e-4, atol=1e-5)


@pytest.mark.integration
@pytest.mark.parametrize("recipe", ["ddp.py", "fsdp2.py"])
def test_steps_that_cannot_be_divided(place, tmp_path, recipe):
    """Sequences that processes cannot share evenly are refused with both numbers, before anything is trained."""
    words = [RECIPES / recipe, place / "cache", place / "student", tmp_path / "out", "--batch-size", "3"]
    ranks = forked.run_ranks(2, run_program, *words)
    assert [2, 2] == [done.status for done in ranks]
    assert "--batch-size 3 cannot be divided among 2 processes" in ranks[0].stderr
    assert [] == list(tmp_path.iterdir())
