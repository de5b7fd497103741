import forked
import pytest
import torch
import torch.distributed as dist

from sklformat.distill.student import processes
from sklformat.distill.teacher import ranks

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


def meet_and_part():
    """A run of training and then a capture in one process; each adds something up over all of them."""
    torch.set_num_threads(1)
    for joined in (lambda: processes.joined("cpu"), ranks.joined):
        with joined():
            ones = torch.ones(1)
            dist.all_reduce(ones)
            assert 2 == ones.item()


def test_processes_meet_again_after_they_parted():
    """One run after another in the same processes, which once waited for each other for ever."""
    for status, _, err in forked.run_ranks(2, meet_and_part):
        assert status == 0, err
