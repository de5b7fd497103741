"""What long verbs say in a log: real processes with pipes or files for stderr, under a clock of the test's own."""

import importlib.util
import re
import subprocess
import sys

import clocked
import forked
import numpy as np
from system import HANGS
from teacher_data import SEQ_LEN

import sklformat as skl

NUMBER = re.compile(r"\d+\.\d{4}|[\d,.]+(?= (positions/s|tokens/s|bytes per))|[\d.]+(?=%)")


def lines_of(stderr):
    """Its lines, measured figures as N; nothing is drawn."""
    assert not set("\r\x1b") & set(stderr)
    assert stderr.endswith("\n")
    return [NUMBER.sub("N", line) for line in stderr.splitlines()]


def in_a_pipe(*words):
    command = [sys.executable, clocked.__file__, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=HANGS)
    assert 0 == done.returncode, done.stderr
    return lines_of(done.stderr)


def in_a_file(*words):
    done = forked.run(clocked.main_with_a_clock, [*map(str, words)])
    assert 0 == done.status, done.stderr
    return lines_of(done.stderr)


def test_verify_and_convert(tmp_path):
    """The verbs without torch say what they count, how far they are and how long it takes."""
    header = skl.Header(vocab_size=500, seq_len=8, kind="counts", rounds=3)
    with skl.CacheWriter(tmp_path / "cache", header=header, sequences_per_shard=2) as writer:
        for _ in range(8):
            writer.append(np.arange(9), skl.SparseTargets(token_ids=np.arange(8), counts=[3] * 8, offsets=np.arange(9)))
    size = sum(path.stat().st_size for path in (tmp_path / "cache").glob("*.skl"))
    said = in_a_pipe("verify", tmp_path / "cache")
    assert [f"verify: 0 of {size:,} bytes", f"verify: {size:,} of {size:,} bytes, in 3 min"] == [said[0], said[-1]]
    for line in said[1:-1]:
        assert re.fullmatch(rf"verify: [\d,]+ of {size:,} bytes, about \d+ s left", line)
    assert [
        "convert: 0 of 8 sequences",
        "convert: 1 of 8 sequences, about 2 min left",
        "convert: 4 of 8 sequences, about 80 s left",
        "convert: 7 of 8 sequences, about 20 s left",
        "convert: 8 of 8 sequences, in 3 min",
    ] == in_a_pipe("convert", tmp_path / "cache", tmp_path / "x", "--to", "jsonl")


def test_cache_train_and_eval(place, tmp_path):
    """The verbs that compute say what they load, where the log is, how far they are, and when they will be done."""
    out, run = tmp_path / "out", tmp_path / "run"
    words = ["--seq-len", SEQ_LEN, "--batch-size", 2]
    speed = "N positions/s, N bytes per position, waited N%"
    assert [
        f"cache out: loading the teacher {place / 'teacher'}, then reading all tokens",
        "cache out: 0 of 8 sequences",
        f"cache out: 1 of 8 sequences, {speed}, about 2 min left",
        f"cache out: 4 of 8 sequences, {speed}, about 80 s left",
        f"cache out: 7 of 8 sequences, {speed}, about 20 s left",
        "cache out: 8 of 8 sequences, in 3 min",
    ] == in_a_file(
        "cache", "--teacher", place / "teacher", "--text", place / "text", "--out", out, "--num-sequences", 8, *words
    )
    curves = f", and in {run}/tensorboard for TensorBoard" if importlib.util.find_spec("tensorboard") else ""
    assert [
        f"train ce: opening {out} and a new student",
        f"train ce: the log is in {run}/metrics.jsonl{curves}; its loss is the cross-entropy, nats per position",
        "train ce: 0 of 6 steps",
        "train ce: 1 of 6 steps, about 2 min left",
        "train ce: 4 of 6 steps, cross-entropy N, N tokens/s, N% waiting for data, about 40 s left",
        "train ce: 6 of 6 steps, in 2 min",
    ] == in_a_file(
        "train", "--cache", out, "--tokenizer", place / "teacher", "--out", run, "--method", "ce", "--steps", 6,
        "--log-every", 2, "--hidden-size", 8, "--num-layers", 1, "--num-heads", 1, "--batch-size", 2,
    )  # fmt: skip
    (unseen := place / "unseen").mkdir()
    for file in (place / "text").iterdir():
        (unseen / file.name).write_text(file.read_text() + " again")
    assert [
        f"eval: loading {run}/model and reading the text",
        "eval: 0 of 6 sequences",
        "eval: 2 of 6 sequences, about 40 s left",
        "eval: 6 of 6 sequences, in 80 s",
    ] == in_a_file("eval", "--student", run / "model", "--text", unseen, "--num-sequences", 6, *words)
