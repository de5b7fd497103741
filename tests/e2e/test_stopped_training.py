"""Signals to sklformat train, in real processes: when it ends, what it says, and that it resumes bit for bit."""

import json
import signal

import forked
import pytest
import tiny
from student_data import main_with_signals

NOBODY = 99


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("stopped")
    tiny.write_place(root)
    return root


def words_of(place, out, *more, batch_size=2):
    return [
        "train", "--out", str(out), "--tokens", str(place / "tokens"), "--tokenizer", str(place / "tokenizer"),
        "--seq-len", "16", "--method", "ce", "--hidden-size", "16", "--num-layers", "1", "--num-heads", "2",
        "--steps", "6", "--batch-size", str(batch_size), "--log-every", "1", "--save-every", "4",
        "--device", "cpu", *more,
    ]  # fmt: skip


def losses_of(out):
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"], row["gradient_norm"]) for row in rows]


@pytest.fixture(scope="module")
def whole(place):
    """The losses and the weights of a run that nobody stops."""
    assert 0 == forked.run(main_with_signals, words_of(place, place / "whole"), NOBODY, 0, 0).status
    return losses_of(place / "whole"), (place / "whole" / "model" / "model.safetensors").read_bytes()


@pytest.mark.parametrize(("number", "more"), [(signal.SIGTERM, ()), (signal.SIGINT, ("--num-workers", "1"))])
def test_a_signal_saves_at_the_end_of_the_step(place, tmp_path, whole, number, more):
    """Ctrl-C and SIGTERM end the step, save it, say how to resume, status 130; reading processes do not mind it."""
    words = words_of(place, tmp_path / "run", *more)
    done = forked.run(main_with_signals, words, 3, number, 1)
    assert 130 == done.status
    assert "stopping at the end of this step, with a checkpoint; a second signal stops at once" in done.stderr
    kept = f"stopped after step 3 of 6, which {tmp_path / 'run'} keeps; run the same command again to resume"
    assert f"sklformat train: {kept}" in done.stderr.splitlines()
    assert "Traceback" not in done.stderr
    done = forked.run(main_with_signals, words, NOBODY, 0, 0)
    assert "train ce: resumed after step 3" in done.stderr
    assert whole == (losses_of(tmp_path / "run"), (tmp_path / "run" / "model" / "model.safetensors").read_bytes())


def test_a_second_signal_stops_at_once(place, tmp_path):
    """Who cannot wait for the step loses it: nothing is saved, and the command ends with status 130."""
    done = forked.run(main_with_signals, words_of(place, tmp_path / "run"), 3, signal.SIGTERM, 2)
    assert 130 == done.status
    assert "sklformat train: stopped; run the same command again to resume" in done.stderr.splitlines()
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


def test_a_signal_to_one_of_two_processes_stops_both(place, tmp_path, whole):
    """Both end after the same step, and resumed they have the losses of one process that nobody stopped."""
    words = words_of(place, tmp_path / "run", batch_size=1)
    for done in forked.run_ranks(2, main_with_signals, words, 3, signal.SIGTERM, 1, 1):
        assert 130 == done.status, done.stderr
        assert "stopped after step 4 of 6" in done.stderr
    for done in forked.run_ranks(2, main_with_signals, words, NOBODY, 0, 0):
        assert 0 == done.status, done.stderr
    for alone, shared in zip(whole[0], losses_of(tmp_path / "run"), strict=True):
        assert alone == pytest.approx(shared, abs=2e-4)
