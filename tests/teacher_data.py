"""A tiny teacher with its tokenizer and some text, and what a process runs that gets a signal while it captures."""

import os
import signal
import sys

import numpy as np
import tiny
import torch

from sklformat.cli import main
from sklformat.distill.models import loading, tokenization
from sklformat.distill.teacher import drawing
from sklformat.distill.teacher.caching import cache_teacher

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
    model = tiny.new_model(vocab_size, hidden_size=32, max_positions=SEQ_LEN, seed=1)
    with torch.no_grad():
        model.lm_head.weight *= 20  # a distribution with a shape
    return model


def write_teacher(directory, texts):
    loading.save(make_teacher(), tokenization.train_tokenizer(texts, 280), directory)


def signal_itself(number, draws, victims="0"):
    """Have this process send itself a signal after so many draws, if its rank is among the victims."""
    draw, left = drawing.Drawer.draw, [draws]

    def struck(drawer, sequence, *rest):
        left[0] -= 1
        if left[0] == -1 and os.environ.get("RANK", "0") in victims:
            os.kill(os.getpid(), number)
        return draw(drawer, sequence, *rest)

    drawing.Drawer.draw = struck


def main_with_a_signal(number, draws, victims, words):
    """A command that ``signal_itself`` befalls."""
    signal_itself(number, draws, victims)
    return main(words)


def cache_with_a_signal(number, draws, config):
    """``cache_teacher``, which ``signal_itself`` befalls."""
    signal_itself(number, draws)
    cache_teacher(config)


if __name__ == "__main__":
    sys.exit(main_with_a_signal(signal.SIGKILL, int(sys.argv[2]), sys.argv[1], sys.argv[3:]))
