"""
Capture a transformers teacher on your own packed tokens: a cache of several shards, with your own forward pass.

    python write_cache.py TEACHER TOKENS.npy CACHE

TOKENS.npy holds integers [sequences, seq_len + 1].  If it is stopped, the same command resumes it: sealed shards are
skipped, and an unfinished one continues after its last whole sequence.  Batches are a fixed grid within a shard, since
the last bits of logits depend on the batch; so a resumed cache has the bytes of an undisturbed one.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

import sklformat as skl


def main() -> None:
    parser = argparse.ArgumentParser(description="Capture a teacher on packed tokens.")
    parser.add_argument("teacher")
    parser.add_argument("tokens", type=Path)
    parser.add_argument("cache", type=Path)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--sequences-per-shard", type=int, default=1024)
    options = parser.parse_args()

    teacher = AutoModelForCausalLM.from_pretrained(options.teacher).eval()
    tokens = np.load(options.tokens, mmap_mode="r")
    header = skl.Header(
        vocab_size=teacher.config.vocab_size,  # where the head is padded: the number of real ids, and cut the logits
        seq_len=tokens.shape[1] - 1,
        kind="counts",
        rounds=options.rounds,
        capture={"teacher": {"name": options.teacher}},  # any JSON that is worth knowing later
    )
    capture = skl.Capture(
        options.cache,
        header=header,
        num_sequences=len(tokens),
        sequences_per_shard=options.sequences_per_shard,
    )
    with capture:  # shards are written by a process of their own, so that the teacher does not wait for the disk
        for shard in capture.shards():
            for start in range(shard.first_sequence, shard.end, options.batch_size):
                numbers = range(start, min(start + options.batch_size, shard.end))
                if numbers.stop <= shard.next_sequence:
                    continue  # captured by an earlier run
                batch = torch.from_numpy(tokens[numbers.start : numbers.stop].astype(np.int64))
                with torch.inference_mode():
                    logits = teacher(batch[:, :-1]).logits
                for number, row in zip(numbers, logits, strict=True):
                    if number >= shard.next_sequence:
                        records = skl.draw(row, rounds=options.rounds, sequence=number)
                        capture.push(number, tokens[number], records)
    print(f"{options.cache}: {len(skl.open(options.cache))} sequences")


if __name__ == "__main__":
    main()
