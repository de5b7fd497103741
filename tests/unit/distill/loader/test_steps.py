"""Batches of a stream by their number, and where a trainer stands that counts steps."""

import pytest
from loader_data import SEQUENCES, write_cache
from torch.utils.data import DataLoader

from sklformat.distill import SparseLogitDataset
from sklformat.distill.loader.steps import Steps, StepSampler
from sklformat.errors import ResumeError


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    directory = tmp_path_factory.mktemp("steps") / "cache"
    write_cache(directory)
    return directory


def first(batches):
    return batches[0]


def values(batch):
    return batch.input_ids.tolist(), batch.labels.tolist(), batch.targets.token_ids.tolist(), batch.state


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("tail", ["drop", "pad", "wrap"])
def test_batches_by_number_are_those_of_the_stream(cache, tail, num_workers, monkeypatch):
    """Tensors and states, in every epoch, also where an epoch's places are made in several goes."""
    monkeypatch.setattr("sklformat.distill.loader.steps._PLACES_AT_ONCE", 8)
    dataset = SparseLogitDataset(cache, 4, seed=3, tail=tail)
    sampler = StepSampler(dataset)
    loader = DataLoader(Steps(dataset), batch_sampler=sampler, collate_fn=first, num_workers=num_workers)
    assert SEQUENCES == len(loader.dataset)
    for epoch in range(2):
        dataset.set_epoch(epoch)
        wanted = [values(batch) for batch in dataset]
        assert wanted == [values(batch) for batch in loader]
        assert len(wanted) == len(loader) == len(sampler)
        sampler.next_epoch()


def test_ranks_have_their_own(cache):
    """Each rank's batch of a step is its dataset's."""
    for rank in range(2):
        dataset = SparseLogitDataset(cache, 2, seed=3, rank=rank, world_size=2)
        assert [values(batch) for batch in dataset] == [values(Steps(dataset)[0, step]) for step in range(5)]


def test_steps_that_there_are_not(cache):
    """A number beyond the epoch is no batch."""
    steps = Steps(SparseLogitDataset(cache, 4))
    with pytest.raises(IndexError, match="epoch 1 has 5 batches, got number 5"):
        steps[1, 5]


def test_where_a_trainer_stands(cache):
    """After a number of steps the state is that of the last batch taken; an epoch's last step may be short."""
    dataset = SparseLogitDataset(cache, 4, seed=3, tail="pad")
    states = []
    for epoch in range(2):
        dataset.set_epoch(epoch)
        states += [batch.state for batch in dataset]
    sampler = StepSampler(dataset, accumulation=4)
    assert 2 == sampler.steps_per_epoch
    for steps, batches in ((1, 4), (2, 6), (3, 10)):
        sampler.stand_after(steps)
        assert states[batches - 1] == sampler.state_dict()
        sampler.check_stands(states[batches - 1])
    sampler.epoch, sampler.taken = 0, 6  # as a trainer counts that has not begun the next epoch yet
    assert states[5] == sampler.state_dict()
    sampler.stand_after(3)
    with pytest.raises(ResumeError, match="stands in epoch 1 after 4 sequences, and the trainer, which counts steps"):
        sampler.check_stands(states[6])
    with pytest.raises(ResumeError, match="seed: 4 in the state, 3 here"):
        sampler.check_stands(states[9] | {"seed": 4})
