import pytest
import torch

from sklformat.distill.student import processes

TORCHRUN = {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}


@pytest.mark.parametrize(
    ("device", "missing", "words"),
    [
        (
            "cpu",
            ["RANK", "MASTER_PORT"],
            "WORLD_SIZE is 4 without RANK, MASTER_PORT; start all processes with",
        ),
        ("cuda:1", [], "device cuda:1 is one GPU for 4 processes; use cuda: each then has its own"),
        ("cuda", [], "process 3 of this machine, counted from 0, has no GPU of its own: there are 2; start torchrun"),
    ],
)
def test_processes_that_do_not_fit_the_machine_are_refused(monkeypatch, device, missing, words):
    """Before anything waits for another process."""
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    for name in missing:
        monkeypatch.delenv(name)
    monkeypatch.setattr(processes, "find_device", torch.device)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match=words), processes.joined(device):
        pass
