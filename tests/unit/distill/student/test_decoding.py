"""Training where a GPU decodes the records: the same run, and no step with a bad one."""

import pytest
import torch
from packed_runs import decode_on_device, spoil
from student_data import config_of, log_of, losses_of, silent, write_place

from sklformat.distill.student.training import train
from sklformat.errors import CorruptError
from sklformat.settings.train import TrainConfig


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return write_place(tmp_path_factory.mktemp("decoding"))


def test_a_run_is_the_same(place, tmp_path, monkeypatch, capsys):
    """Bit for bit, with micro-batches and a worker process; each batch is asked for once, and the log says it."""
    changes = {"accumulation": 2, "batch_size": 2, "steps": 6, "num_workers": 1}
    train(config_of(place, tmp_path / "host", **changes), report=silent)
    marks = decode_on_device(monkeypatch)
    train(config_of(place, tmp_path / "device", **changes), report=silent)
    assert losses_of(tmp_path / "host") == losses_of(tmp_path / "device")
    assert "note: decoded on the device" in capsys.readouterr().err
    assert [1] * 12 == [mark.waited for mark in marks]


@pytest.mark.parametrize("micro_batch", [0, 1])
def test_nothing_is_learnt_from_a_bad_record(place, tmp_path, monkeypatch, micro_batch):
    """The third step finds one, in its first or its last micro-batch: it is not taken."""
    decode_on_device(monkeypatch)
    spoil(monkeypatch, 2 * 2 + micro_batch)
    steps, step = [], torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: steps.append(1) or step(self))
    with pytest.raises(CorruptError, match="where the host's copy has none"):
        train(config_of(place, tmp_path / "run", accumulation=2, batch_size=2), report=silent)
    assert 2 == len(steps) == log_of(tmp_path / "run")[-1]["step"]


def test_records_that_nobody_reads_are_not_decoded_anywhere(tmp_path):
    with pytest.raises(ValueError, match="decode cuda is about a cache's records, of which method ce reads none"):
        TrainConfig(out=tmp_path, cache=tmp_path, method="ce", decode="cuda")
