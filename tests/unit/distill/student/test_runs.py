import json
import resource

import pytest
import torch

import sklformat as skl
from sklformat.distill.student import runs


def test_a_checkpoint_comes_back_as_it_was(tmp_path):
    """What was saved last is what is loaded: tensors, numbers and the loader's dict."""
    with runs.opened(tmp_path / "run", {"seed": 1}) as run:
        assert run.load_checkpoint() is None
        run.save_checkpoint({"step": 1, "model": {"w": torch.zeros(2)}})
        state = {"step": 2, "model": {"w": torch.tensor([0.1, 0.2])}, "loader": {"epoch": 0, "fingerprint": "ab"}}
        run.save_checkpoint(state)
        loaded = run.load_checkpoint()
        assert torch.equal(state["model"].pop("w"), loaded["model"].pop("w"))
        assert state == loaded


def test_a_failed_save_keeps_the_old_checkpoint(tmp_path):
    """A checkpoint that cannot be written whole leaves the one before it, and nothing else."""
    with runs.opened(tmp_path / "run", {}) as run:
        run.save_checkpoint({"step": 1})
        with pytest.raises((AttributeError, TypeError)):
            run.save_checkpoint({"step": lambda: None})
        assert run.load_checkpoint() == {"step": 1}
        assert {".lock", "run.json", "checkpoint.pt"} == {path.name for path in run.directory.iterdir()}


def test_a_full_disk_is_named(tmp_path):
    """Where a checkpoint or a line of the log does not fit, its file and the disk's reason are said."""
    with runs.opened(tmp_path / "run", {}) as run:
        run.save_checkpoint({"step": 1})
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
        try:
            with pytest.raises(OSError, match="File too large") as of_checkpoint:
                run.save_checkpoint({"step": 2, "model": torch.zeros(1 << 16)})
            with pytest.raises(OSError, match="File too large") as of_log:
                run.log({"step": 2, "loss": "x" * (1 << 17)})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert [str(run.directory / "checkpoint.pt"), str(run.log_path)] == [
            error.value.filename for error in (of_checkpoint, of_log)
        ]
        assert {"step": 1} == run.load_checkpoint()


def test_a_checkpoint_never_runs_code(tmp_path):
    """A pickle that would call something on loading is refused, not run."""

    class Evil:
        def __reduce__(self):
            return (exec, ("raise SystemExit('ran')",))

    with runs.opened(tmp_path / "run", {}) as run:
        torch.save({"step": Evil()}, run.directory / "checkpoint.pt")
        with pytest.raises(
            skl.CorruptError, match=r"no readable checkpoint \(not as torch\.save writes plain data\); d"
        ):
            run.load_checkpoint()


def test_the_log_is_cut_to_the_checkpoint(tmp_path):
    """Lines after the step to go on from, and a line that a crash cut off, are dropped before they come again."""
    with runs.opened(tmp_path / "run", {}) as run:
        for step in (10, 20, 30):
            run.log({"step": step, "loss": 1.0})
        path = run.directory / "metrics.jsonl"
        path.write_text(path.read_text() + '{"step": 40, "lo')
        run.start_log(20)
        assert [10, 20] == [json.loads(line)["step"] for line in path.read_text().splitlines()]


@pytest.mark.parametrize("bad", ["{", "[1]", '{"loss": 1}', '{"step": null}', "\0\0"])
def test_a_damaged_log_is_named(tmp_path, bad):
    """A whole line that is not the log's is an error with path and line, before the log is touched."""
    with runs.opened(tmp_path / "run", {}) as run:
        run.log({"step": 1, "loss": 1.0})
        path = run.directory / "metrics.jsonl"
        before = path.read_text() + bad + "\n"
        path.write_text(before)
        with pytest.raises(skl.CorruptError, match=r"metrics\.jsonl.*line 2"):
            run.start_log(5)
        assert before == path.read_text()


def test_finishing_publishes_model_and_summary(tmp_path):
    """After the end there are the model, the summary, the settings and the log, and nothing half done."""
    with runs.opened(tmp_path / "run", {}) as run:
        run.save_checkpoint({"step": 1})
        assert run.summary() is None
        for keep, names in ((True, {"checkpoint.pt"}), (False, set())):
            run.finish(lambda path: (path / "weights").write_text("w"), {"loss": 0.5}, keep=keep)
            assert run.summary() == {"loss": 0.5}
            assert run.missing(best=True) is None
            assert (run.model_directory / "weights").read_text() == "w"
            there = {path.name for path in run.directory.iterdir()}
            assert {".lock", "run.json", "summary.json", "model", *names} == there


def test_settings_that_differ_are_all_named(tmp_path):
    """Every differing setting is shown with both values, those that only one side has as well."""
    with runs.opened(tmp_path / "run", {"seed": 1, "method": "ce", "old": 5}):
        pass
    with pytest.raises(skl.SettingsError) as caught, runs.opened(tmp_path / "run", {"seed": 2, "method": "ce"}):
        pass
    assert "seed was 1, asked for is 2" in str(caught.value)
    assert "old was 5, asked for is None" in str(caught.value)
    assert "method" not in str(caught.value)


def test_facts_are_kept_and_not_compared(tmp_path):
    """A run that began before they were kept resumes, and has them from then on."""
    with runs.opened(tmp_path / "run", {"seed": 1}):
        pass
    with runs.opened(tmp_path / "run", {"seed": 1}, facts={"corpora": ["0a"]}):
        pass
    assert {"seed": 1, "corpora": ["0a"]} == runs.read_settings(tmp_path / "run")
    with runs.opened(tmp_path / "run", {"seed": 1}, facts={"corpora": ["0b"]}):
        pass
    assert ["0b"] == runs.read_settings(tmp_path / "run")["corpora"]


def test_damaged_settings_are_named(tmp_path):
    """Settings that are no JSON object are an error with their path."""
    for text, message in (("{", "not JSON: "), ("[]", "must hold one JSON object")):
        (tmp_path / "run.json").write_text(text)
        with pytest.raises(skl.CorruptError, match=rf"run\.json: {message}"), runs.opened(tmp_path, {}):
            pass
