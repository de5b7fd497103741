"""lm-evaluation-harness 0.4.13 itself, with the tasks of docs/recipes, on a saved student and without network."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from system import HANGS

from sklformat.distill.student.measures.evaluation import evaluate
from sklformat.settings.eval import EvalConfig

RECIPES = Path(__file__).parents[2] / "docs" / "recipes"
LENGTH = 16
pytestmark = pytest.mark.integration


def whole_windows(text, tokenizer):
    """The longest beginning of a text whose own tokens fill whole windows."""
    ids = tokenizer(text)["input_ids"]
    for count in range(len(ids) // LENGTH, 0, -1):
        beginning = tokenizer.decode(ids[: count * LENGTH])
        if tokenizer(beginning)["input_ids"] == ids[: count * LENGTH]:
            return beginning, count * LENGTH
    raise AssertionError("no beginning is encoded as in the text")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A student that is far from uniform, a text of whole windows, and what lm-eval says of them."""
    folder = tmp_path_factory.mktemp("lm-eval")
    tokenizer = tiny.train_tokenizer(tiny.make_documents(10, 300))
    student = tiny.write_model(folder / "student", tokenizer, max_positions=LENGTH)
    with torch.no_grad():
        for weight in student.parameters():
            weight.mul_(3)
    student.save_pretrained(folder / "student")
    rng = np.random.default_rng(1)
    lines = [" ".join(rng.choice(tiny.WORDS, 8)) for _ in range(60)]
    text, num_tokens = whole_windows("\n".join(lines), tokenizer)
    (folder / "held-out").mkdir()
    (folder / "held-out" / "one.txt").write_text(text)
    return folder, text, num_tokens


@pytest.fixture(scope="module")
def results(place):
    folder, _, _ = place
    subprocess.run([sys.executable, RECIPES / "lm_eval_data.py", "held-out"], cwd=folder, check=True, timeout=HANGS)
    words = ["run", "--model", "hf", "--model_args", f"pretrained=student,max_length={LENGTH}", "--device", "cpu"]
    words += ["--include_path", RECIPES, "--tasks", "held_out_text,held_out_cloze", "--output_path", "results"]
    done = subprocess.run(
        [sys.executable, "-m", "lm_eval", *map(str, words)],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "home")},
        cwd=folder, capture_output=True, text=True, check=False, timeout=HANGS,
    )  # fmt: skip
    assert 0 == done.returncode, done.stderr
    (path,) = (folder / "results").rglob("results_*.json")
    return json.loads(path.read_text())["results"]


def test_perplexity_is_the_lm_loss(place, results):
    """Bits per byte, byte and word perplexity are the LM loss of ``sklformat eval``, in other units."""
    folder, text, num_tokens = place
    found = evaluate(
        EvalConfig(
            student=str(folder / "student"), text=(folder / "held-out",), seq_len=LENGTH, bos="document", device="cpu"
        ),
        progress=False,
    )
    assert num_tokens == found.num_tokens
    nats = found.lm_loss * num_tokens
    said = results["held_out_text"]
    assert nats / len(text.encode()) / math.log(2) == pytest.approx(said["bits_per_byte,none"], rel=2e-6)
    assert math.exp(nats / len(text.encode())) == pytest.approx(said["byte_perplexity,none"], rel=2e-6)
    assert nats / len(text.split()) == pytest.approx(math.log(said["word_perplexity,none"]), rel=2e-6)


def test_cloze(place, results):
    """The share of right last words is that of the most probable of the four, told by the model's own log-probs."""
    folder, _, _ = place
    from transformers import AutoModelForCausalLM, AutoTokenizer

    student = AutoModelForCausalLM.from_pretrained(folder / "student").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "student")
    rows = [json.loads(line) for line in (folder / "my-lm-eval" / "cloze.jsonl").read_text().splitlines()]
    right = 0
    for row in rows:
        scores = []
        for choice in row["choices"]:
            context, whole = (tokenizer(text)["input_ids"] for text in (row["context"], f"{row['context']} {choice}"))
            ids = torch.tensor(whole[-LENGTH - 1 :])
            with torch.inference_mode():
                log_probs = student(ids[None, :-1]).logits[0].log_softmax(-1)
            scores.append(float(log_probs.gather(1, ids[1:, None])[-(len(whole) - len(context)) :].sum()))
        right += int(np.argmax(scores)) == row["answer"]
    assert 20 < len(rows)
    assert right / len(rows) == pytest.approx(results["held_out_cloze"]["acc,none"])
