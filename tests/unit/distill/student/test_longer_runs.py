"""Runs that are finished: made longer, and with something of theirs missing."""

import json
import math
import re
import shutil

import pytest
import torch
from student_data import config_of, log_of, losses_of, silent, stop_at, write_place

import sklformat as skl
from sklformat.distill.student.learner import Learner
from sklformat.distill.student.training import train

STEADY = {"schedule": "constant", "warmup_steps": 3}
FALLING = {"schedule": "wsd", "warmup_steps": 3, "decay": 0.4}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return write_place(tmp_path_factory.mktemp("longer"))


@pytest.fixture
def finished(place, tmp_path):
    """A finished run of four steps."""
    train(config_of(place, tmp_path / "run", steps=4), report=silent)
    return tmp_path / "run"


def weights_of(out, folder="model"):
    return (out / folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize("schedule", [STEADY, FALLING], ids=lambda schedule: schedule["schedule"])
def test_a_longer_run_is_the_one_that_was_long_from_the_start(place, tmp_path, schedule, capsys):
    """Where the rates of the steps taken do not depend on the length, the grown run is the long one, bit for bit."""
    train(config_of(place, tmp_path / "long", steps=12, **schedule), report=silent)
    for steps in (5, 12):
        summary = train(config_of(place, tmp_path / "grown", steps=steps, **schedule), report=silent)
    assert 12 == summary.steps
    assert losses_of(tmp_path / "long") == losses_of(tmp_path / "grown")
    assert weights_of(tmp_path / "long") == weights_of(tmp_path / "grown")
    said = capsys.readouterr().err
    assert "grown was to take 5 steps, and takes 12" in said
    assert "will not be that of a run" not in said
    assert ("; it resumes after step 3, where the learning rate had not begun to fall" in said) == (schedule is FALLING)


def test_the_mean_of_an_interval_survives_the_end(place, tmp_path):
    """The last line of a short run is of fewer steps; the next one of the longer run is of the whole interval again."""
    train(config_of(place, tmp_path / "long", steps=8, log_every=4, **STEADY), report=silent)
    for steps in (6, 8):
        train(config_of(place, tmp_path / "grown", steps=steps, log_every=4, **STEADY), report=silent)
    long, grown = losses_of(tmp_path / "long"), losses_of(tmp_path / "grown")
    assert [4, 6, 8] == [row[0] for row in grown]
    assert long == [row for row in grown if row[0] != 6]


def test_a_cosine_that_grows_says_what_it_is(place, finished, capsys):
    """The rates fell towards the old end: the run resumes from there, and says that it is no run of that length."""
    assert 8 == train(config_of(place, finished, steps=8), report=silent).steps
    assert [1, 2, 3, 4, 5, 6, 7, 8] == [row["step"] for row in log_of(finished)]
    said = capsys.readouterr().err
    assert "run was to take 4 steps, and takes 8; the 4 steps taken had the learning rates of the shorter run" in said
    assert said.count("note: ") == 1


def test_a_warm_up_longer_than_its_run_is_said(place, tmp_path, capsys):
    """A rate that never reaches its peak is no quiet success; one that reaches it in the last step is all right."""
    train(config_of(place, tmp_path / "run", steps=1, warmup_steps=4, learning_rate=0.01), report=silent)
    said = capsys.readouterr().err
    assert "note: warmup_steps 4 is more than steps 1: the learning rate rises to the end and reaches 0.0025 of" in said
    train(config_of(place, tmp_path / "run", steps=4, warmup_steps=4, learning_rate=0.01), report=silent)
    assert "warmup_steps" not in capsys.readouterr().err


def test_a_grown_run_that_is_stopped_resumes(place, finished):
    """A run in the middle of its further steps is not finished, although its first summary is still there."""
    with pytest.raises(KeyboardInterrupt):
        train(config_of(place, finished, steps=9, save_every=2), report=stop_at(7))
    assert 9 == train(config_of(place, finished, steps=9), report=silent).steps
    assert list(range(1, 10)) == [row["step"] for row in log_of(finished)]


def test_a_run_does_not_become_shorter(place, finished):
    """Fewer steps than before are refused with both values, and so is another setting beside more of them."""
    with pytest.raises(
        skl.SettingsError, match=r"run: steps was 4, asked for is 3; a run may become longer, not short"
    ):
        train(config_of(place, finished, steps=3), report=silent)
    with pytest.raises(
        skl.SettingsError, match="other settings: seed was 0, asked for is 1; steps was 4, asked for is 8"
    ):
        train(config_of(place, finished, steps=8, seed=1), report=silent)
    train(config_of(place, finished, steps=4), report=stop_at(1))


def test_without_its_checkpoint_a_finished_run_does_not_grow(place, tmp_path):
    """What --no-keep-checkpoint leaves is the model; more steps are refused, the same ones are done."""
    config = config_of(place, tmp_path / "run", steps=2, keep_checkpoint=False)
    train(config, report=silent)
    assert not (tmp_path / "run" / "checkpoint.pt").exists()
    train(config, report=stop_at(1))
    with pytest.raises(
        skl.SettingsError, match=r"steps was 2, asked for is 3; the run is finished, and checkpoint\.pt"
    ):
        train(config_of(place, tmp_path / "run", steps=3), report=silent)


@pytest.mark.parametrize("lost", ["model", "model/model.safetensors", "model/config.json"])
def test_a_missing_model_is_written_again(place, finished, lost, capsys):
    """The command of a finished run whose model is not whole writes it again, the same bytes, and says so."""
    before = {path.name: path.read_bytes() for path in (finished / "model").iterdir()}
    path = finished / lost
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    train(config_of(place, finished, steps=4), report=stop_at(1))
    assert before == {path.name: path.read_bytes() for path in (finished / "model").iterdir()}
    assert re.search(r"note: .*run/model/\S+ is missing; .*run/model is written again", capsys.readouterr().err)


def test_a_missing_model_without_a_checkpoint_is_an_error(place, finished):
    """Where there is nothing to write it again from, a finished run that lost its model is no success."""
    (finished / "checkpoint.pt").unlink()
    (finished / "model" / "model.safetensors").unlink()
    with pytest.raises(
        skl.CorruptError, match=r"model\.safetensors: is missing, and no checkpoint is left to write it"
    ):
        train(config_of(place, finished, steps=4), report=silent)


def test_a_changed_file_is_an_error(place, finished):
    """A file of the model that is not as it was written is named, and not written over: it may be someone's work."""
    path = finished / "model" / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(skl.CorruptError, match=r"model\.safetensors: is not as training wrote it; put it back, or del"):
        train(config_of(place, finished, steps=4), report=silent)
    shutil.rmtree(finished / "model")
    train(config_of(place, finished, steps=4), report=silent)
    assert whole == path.read_bytes()


def test_a_run_of_before_is_finished_all_the_same(place, finished):
    """A summary without a list of files, as it was once written, is looked at for its model alone."""
    path = finished / "summary.json"
    runs_json = path.read_text()
    path.write_text(runs_json[: runs_json.index(',\n "files"')] + "\n}\n")
    train(config_of(place, finished, steps=4), report=stop_at(1))
    shutil.rmtree(finished / "model")
    train(config_of(place, finished, steps=4), report=stop_at(1))
    assert (finished / "model" / "config.json").exists()


def test_a_run_of_before_is_not_finished_without_its_weights(place, finished):
    """Of such a summary too, the model is more than its config."""
    path = finished / "summary.json"
    values = json.loads(path.read_text())
    del values["files"]
    path.write_text(json.dumps(values))
    (finished / "checkpoint.pt").unlink()
    (finished / "model" / "model.safetensors").unlink()
    with pytest.raises(skl.CorruptError, match=r"model\.safetensors: is missing, and no checkpoint is left"):
        train(config_of(place, finished, steps=4), report=silent)


def test_a_diverging_run_names_its_step_and_keeps_its_checkpoint(place, tmp_path):
    """The message has the step and the last checkpoint, whose weights are numbers, and says what to do."""
    out = tmp_path / "run"
    message = (
        r"run: loss or gradient is no longer finite at step (\d+) \(loss .*, gradient norm .*\); the checkpoint of "
        r"step (\d+) is sound, and the same command would come here again: train in another directory with a lower "
        "learning_rate"
    )
    with pytest.raises(ValueError, match=message) as caught:
        train(
            config_of(place, out, learning_rate=1e30, warmup=0.0, steps=40, save_every=1, log_every=40), report=silent
        )
    step, saved = map(int, re.search(message, str(caught.value)).groups())
    state = torch.load(out / "checkpoint.pt", weights_only=True)
    assert step - 1 == saved == state["step"]
    assert all(bool(w.isfinite().all()) for w in state["model"].values())


def test_broken_weights_are_never_saved(place, tmp_path, monkeypatch):
    """Weights that become infinite although each loss was a number are noticed before they are kept."""
    update = Learner.update

    def breaking(learner, *arguments, **named):
        taken = update(learner, *arguments, **named)
        with torch.no_grad():
            learner.parameters[0][0] = math.inf
        return taken

    monkeypatch.setattr(Learner, "update", breaking)
    with pytest.raises(
        ValueError, match="weights are no longer finite after step 1; no checkpoint was saved before it"
    ):
        train(config_of(place, tmp_path / "run", save_every=1), report=silent)
    assert not (tmp_path / "run" / "checkpoint.pt").exists()
