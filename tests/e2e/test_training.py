import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from system import HANGS

import sklformat as skl
from sklformat.distill.models import tokenization
from sklformat.distill.text.corpus import write_token_store
from sklformat.distill.text.documents import Document
from sklformat.distill.text.fingerprints import tokenizer_fingerprint

# Arguments: directory of the run, of tokens and tokenizer, batch size, step at which to be killed (0: never).
SCRIPT = """
import os, signal, sys
from pathlib import Path
from sklformat.settings.train import TrainConfig
from sklformat.distill.student.training import train

out, place, batch_size, kill = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])

def report(step, *_):
    if step == kill:
        os.kill(os.getpid(), signal.SIGKILL)

train(
    TrainConfig(
        out=out, tokens=place / "tokens", tokenizer=str(place / "tokenizer"), seq_len=16, method="ce", hidden_size=16,
        num_layers=1, num_heads=2, steps=12, batch_size=batch_size, save_every=5, log_every=1, device="cpu",
        learning_rate=1e-2,
    ),
    report=report,
)
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("training")
    rng = np.random.default_rng(0)
    words = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta"]
    documents = [Document(f"d{i}.txt", " ".join(rng.choice(words, 80))) for i in range(10)]
    tokenizer = tokenization.train_tokenizer([d.text for d in documents], 290)
    tokenizer.save_pretrained(root / "tokenizer")
    write_token_store(
        root / "tokens",
        documents,
        lambda texts: tokenization.encode(tokenizer, texts),
        vocab_size=tokenization.num_ids(tokenizer),
        tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
    )
    (root / "run.py").write_text(SCRIPT)
    run(root, root / "whole")
    return root


def run(place, out, *, batch_size=4, kill=0, launcher=()):
    environment = {**os.environ, "PYTHONPATH": str(Path(skl.__file__).parents[1])}
    command = [sys.executable, *launcher, str(place / "run.py"), str(out), str(place), str(batch_size), str(kill)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=HANGS, check=False)
    assert result.returncode == (-9 if kill else 0), result.stderr
    return result


def rows_of(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_a_killed_run_goes_on_bit_for_bit(place):
    """Killed with SIGKILL between two checkpoints, a run ends with the losses and the weights of an undisturbed one."""
    run(place, place / "cut", kill=8)
    assert 8 == rows_of(place / "cut")[-1]["step"]
    run(place, place / "cut")
    assert [r["loss"] for r in rows_of(place / "whole")] == [r["loss"] for r in rows_of(place / "cut")]
    whole, cut = ((place / name / "model" / "model.safetensors").read_bytes() for name in ("whole", "cut"))
    assert whole == cut


def test_two_processes_are_one_with_twice_the_batch(place):
    """Under torchrun two processes share each step's sequences; losses are those of one process, up to rounding."""
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    run(place, place / "two", batch_size=2, launcher=launcher)
    for alone, shared in zip(rows_of(place / "whole"), rows_of(place / "two"), strict=True):
        assert alone["loss"] == pytest.approx(shared["loss"], abs=2e-4)
        assert alone["sequences"] == shared["sequences"]
