"""A tiny teacher with its tokenizer and some text, and what a process runs that is killed while it captures."""

import os
import signal
import sys

import numpy as np
import torch

from sklformat.cli import main
from sklformat.distill.models import loading, tokenization
from sklformat.distill.teacher import drawing

SEQ_LEN = 24
WORDS = ["def", "return", "for", "x", "y", "(", ")", ":\n", "= 1\n", "import os\n", "naïve "]


def write_text(folder):
    """Twelve small documents, and their texts."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, size=int(rng.integers(40, 120)))) for _ in range(12)]
    for number, text in enumerate(texts):
        (folder / f"{number}.txt").write_text(text)
    return texts


def make_teacher(vocab_size=280):
    model = loading.new_llama(
        vocab_size=vocab_size, hidden_size=32, num_layers=1, num_heads=2, max_positions=SEQ_LEN, seed=1
    )
    with torch.no_grad():
        model.lm_head.weight *= 20  # a distribution with a shape
    return model


def write_teacher(directory, texts):
    loading.save(make_teacher(), tokenization.train_tokenizer(texts, 280), directory)


def die_at_sequence(victims, number):
    """Kill this process by SIGKILL when it draws its sequence of that number, if its rank is among the victims."""
    draw, left = drawing.Drawer.draw, [number]

    def dying(drawer, sequence, slices):
        left[0] -= 1
        if left[0] < 0 and os.environ["RANK"] in victims:
            os.kill(os.getpid(), signal.SIGKILL)
        return draw(drawer, sequence, slices)

    drawing.Drawer.draw = dying


if __name__ == "__main__":
    die_at_sequence(sys.argv[1], int(sys.argv[2]))
    sys.exit(main(sys.argv[3:]))
