"""
What does capture cost beside the teacher, and does the teacher wait?

A small Llama with a real vocabulary (128 256 ids) runs over random text on one thread: its forward pass and head alone,
then with draws, then the whole of ``sklformat cache`` (ring, writer process, files), in turns within one run. Run:

    python benchmarks/capture.py [--sequences 16]
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from timing import processor

from sklformat.capture import Capture
from sklformat.distill.models import loading
from sklformat.distill.teacher.drawing import Drawer
from sklformat.distill.teacher.forward import Teacher
from sklformat.format.header import Header

VOCAB_SIZE, SEQ_LEN, ROUNDS, BATCH = 128_256, 1024, 50, 4
SAMPLING = {"sampler": "multinomial", "seed": 0}


def make_teacher():
    model = loading.new_llama(
        vocab_size=VOCAB_SIZE, hidden_size=64, num_layers=2, num_heads=2, max_positions=SEQ_LEN, seed=0
    ).eval()
    with torch.no_grad():
        model.lm_head.weight *= 40  # few ids are probable, as in a trained teacher
    return Teacher(model, VOCAB_SIZE)


def run(teacher, tokens, drawer=None, capture=None):
    for first in range(0, len(tokens), BATCH):
        outputs = teacher.run(tokens[first : first + BATCH, :-1])
        for place, output in enumerate(outputs):
            slices = teacher.logits(output)
            if drawer is None:
                for _ in slices:
                    pass
                continue
            targets = drawer.draw(first + place, slices)
            if capture is not None:
                capture.push(first + place, tokens[first + place], targets)


def run_capture(teacher, tokens, drawer, directory):
    header = Header(vocab_size=VOCAB_SIZE, seq_len=SEQ_LEN, kind="counts", rounds=ROUNDS)
    start = time.perf_counter()
    with Capture(directory, header=header, num_sequences=len(tokens), sequences_per_shard=8) as capture:
        run(teacher, tokens, drawer, capture)
        pushed = time.perf_counter() - start
    return pushed, time.perf_counter() - start, capture


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--turns", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(1)
    teacher = make_teacher()
    tokens = np.random.default_rng(0).integers(0, VOCAB_SIZE, (given.sequences, SEQ_LEN + 1)).astype(np.uint32)
    drawer = Drawer(kind="counts", rounds=ROUNDS, sampling=SAMPLING)
    run(teacher, tokens[:BATCH], drawer)
    times = {"teacher alone": [], "with draws": [], "captured": []}
    waited, left, records = [], [], 0.0
    with tempfile.TemporaryDirectory() as place:
        for turn in range(given.turns):
            for name, way in (
                ("teacher alone", lambda: run(teacher, tokens)),
                ("with draws", lambda: run(teacher, tokens, drawer)),
            ):
                start = time.perf_counter()
                way()
                times[name].append(time.perf_counter() - start)
            pushed, whole, capture = run_capture(teacher, tokens, drawer, Path(place) / str(turn))
            times["captured"].append(pushed)
            waited.append(capture.wait_seconds / pushed)
            left.append(whole - pushed)
            size = sum(entry.size_bytes for entry in capture.entries) / tokens[:, 1:].size
            records = sum(entry.num_records for entry in capture.entries) / tokens[:, 1:].size
    print(f"{processor()}, {tokens[:, 1:].size} positions, {records:.1f} records and {size:.1f} bytes per position")
    for name, seconds in times.items():
        print(f"{name:<14} {tokens[:, 1:].size / statistics.median(seconds):8,.0f} positions/s")
    print(f"waited for the writer: {max(waited):.2%} at most; the writer ends {max(left):.2f} s after the teacher")


if __name__ == "__main__":
    main()
