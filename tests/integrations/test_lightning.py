"""docs/recipes/lightning_module.py with Lightning itself: the steps of any number of processes, and exact resuming."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from loader_data import SEQUENCES, write_cache
from parallel_runs import SIZES
from system import HANGS

RECIPES = Path(__file__).parents[2] / "docs" / "recipes"
STEPS, STOP = 20, 7  # an epoch has five
pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A cache of sequences of unlike lengths, a student, and one with dropout."""
    folder = tmp_path_factory.mktemp("lightning")
    write_cache(folder / "cache", seq_len=0, lengths=[4 + 5 * i % 13 for i in range(SEQUENCES)])
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).save_pretrained(folder / "student")
    dropping = transformers.PhiConfig(**SIZES, embd_pdrop=0.1, resid_pdrop=0.1)
    transformers.PhiForCausalLM(dropping).save_pretrained(folder / "dropping")
    return folder


def run(place, out, steps, *, devices, student="student"):
    """A start of the recipe; the loss of each step of all starts."""
    words = [RECIPES / "lightning_module.py", place / "cache", place / student, out, "--steps", steps]
    words += ["--devices", devices, "--batch-size", 4, "--learning-rate", 1e-2, "--log-every", 1, "--save-every", 4]
    done = subprocess.run(
        [sys.executable, *map(str, words)],
        env=os.environ, cwd=out.parent, capture_output=True, text=True, check=False, timeout=HANGS,
    )  # fmt: skip
    assert 0 == done.returncode, done.stderr
    losses = {}
    for path in sorted(out.glob("lightning_logs/*/metrics.csv")):
        with path.open() as file:
            losses |= {int(row["step"]): float(row["loss"]) for row in csv.DictReader(file)}
    return losses


def weights(out):
    """Of the one last checkpoint; the student beside it has the same."""
    (last,) = out.glob("last*.ckpt")
    found = torch.load(last, weights_only=True)["state_dict"]
    student = transformers.AutoModelForCausalLM.from_pretrained(out / "model")
    for name, tensor in student.state_dict().items():
        torch.testing.assert_close(tensor, found[f"student.{name}"], rtol=0, atol=0)
    return found


def test_two_processes_train_as_one_does(place, tmp_path):
    """The stream is divided once, and every loss and weight is that of one process; a stop anywhere changes nothing."""
    alone = run(place, tmp_path / "alone", STEPS, devices=1)
    assert list(range(STEPS)) == list(alone)
    run(place, tmp_path / "pair", STOP, devices=2)
    assert STOP == torch.load(tmp_path / "pair" / "last.ckpt", weights_only=True)["global_step"]
    pair = run(place, tmp_path / "pair", STEPS, devices=2)
    assert alone == pytest.approx(pair, rel=1e-5)
    torch.testing.assert_close(weights(tmp_path / "pair"), weights(tmp_path / "alone"), rtol=1e-4, atol=1e-5)


def test_resuming_in_the_middle_of_an_epoch(place, tmp_path):
    """Bit for bit, dropout included, as if it had never stopped."""
    straight = run(place, tmp_path / "straight", STEPS, devices=1, student="dropping")
    run(place, tmp_path / "resumed", STOP, devices=1, student="dropping")
    assert straight == run(place, tmp_path / "resumed", STEPS, devices=1, student="dropping")
    torch.testing.assert_close(weights(tmp_path / "resumed"), weights(tmp_path / "straight"), rtol=0, atol=0)
