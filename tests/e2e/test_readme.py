"""README's walk-through works as it is written, on a small text and a small teacher."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sklformat as skl
from sklformat.distill.models import loading, tokenization

README = Path(__file__).parents[2] / "README.md"
WORDS = ["def", "class", "return", "import", "value", "name", "list", "index", "error", "token", "teacher", "cache"]


def commands():
    """The sklformat commands of the walk-through, in order, at a size for a test."""
    section = README.read_text().split("## Walk-through", 1)[1].split("\n## ", 1)[0]
    block = re.search(r"```console\n(.*?)```", section, re.DOTALL)
    assert block is not None
    text = block[1]
    for large, small in (("--seq-len 512", "--seq-len 32"), ("--steps 2000", "--steps 6"), ("-size 256", "-size 32")):
        assert large in text
        text = text.replace(large, small)
    return [line for line in text.splitlines() if line.startswith("sklformat ")]


@pytest.fixture
def place(tmp_path):
    """A directory with what the walk-through names: a teacher, text and held-out text."""
    text = [" ".join(WORDS[(i * j + j) % len(WORDS)] for j in range(400)) for i in range(12)]
    for name, part in (("my-text", text[:9]), ("my-held-out", text[9:])):
        (tmp_path / name).mkdir()
        for number, document in enumerate(part):
            (tmp_path / name / f"{number}.txt").write_text(document)
    torch.manual_seed(0)
    tokenizer = tokenization.train_tokenizer(text, 300)
    teacher = loading.new_llama(
        vocab_size=tokenization.num_ids(tokenizer), hidden_size=32, num_layers=1, num_heads=2, max_positions=64, seed=0
    )
    loading.save(teacher, tokenizer, tmp_path / "my-teacher")
    return tmp_path


def test_walk_through(place):
    """Each command exits 0 where README says it does, and leaves what README says it leaves."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    seen = []
    for line in commands():
        verb, *arguments = shlex.split(line)[1:]
        done = subprocess.run(
            [sys.executable, "-m", "sklformat", verb, *arguments],
            cwd=place,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert 0 == done.returncode, f"{line}\n{done.stderr}"
        seen.append(verb)
    assert ["cache", "inspect", "verify", "check", "train", "eval", "convert", "convert"] == seen
    assert [] == skl.verify(place / "my-cache")
    shards = sorted(path.name for path in (place / "my-cache").glob("*.skl"))
    assert shards == sorted(path.name for path in (place / "my-copy").glob("*.skl"))
    for name in shards:
        assert skl.open(place / "my-cache" / name)[0].targets == skl.open(place / "my-copy" / name)[0].targets
    assert json.loads((place / "my-student" / "model" / "config.json").read_text())["model_type"] == "llama"


def test_python_example_parses():
    """The Python example of README is Python, and every name it takes from sklformat exists."""
    source = re.search(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert source is not None
    compile(source[1], "README.md", "exec")
    for name in re.findall(r"\bskl\.(\w+)", source[1]):
        assert hasattr(skl, name), name
