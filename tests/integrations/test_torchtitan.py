"""torchtitan 0.3.0 itself, with docs/recipes/torchtitan_kd.py: its chunks, its trainer, its checkpoints."""

import json
import shutil

import forked
import pytest
import torch
from loader_data import VOCAB, write_cache
from torchtitan_runs import CHUNKS, POSITIONS, recipe, train

from sklformat.distill import SparseLogitDataset, linear_sparse_kl

pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore")]
WIDTH = 24


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A cache, and files that torchtitan takes for a tokenizer."""
    from tokenizers import Tokenizer, models

    directory = tmp_path_factory.mktemp("torchtitan")
    write_cache(directory / "cache")
    (directory / "tokenizer").mkdir()
    Tokenizer(models.WordLevel({"a": 0})).save(str(directory / "tokenizer" / "tokenizer.json"))
    return directory


def found(ranks):
    assert [0] * len(ranks) == [one.status for one in ranks], ranks
    return [json.loads(one.stdout.splitlines()[-1]) for one in ranks]


@pytest.fixture(scope="module")
def straight(place):
    """Four steps of one process."""
    return found(forked.run_ranks(1, train, place, place / "straight", 4))[0]


def resumed(place, straight, ranks):
    """The last two of the four steps, from the checkpoint after the second, on so many ranks."""
    assert len(straight["losses"]) == 4
    out = place / f"resumed-{ranks}"
    shutil.copytree(place / "straight", out, ignore=shutil.ignore_patterns("step-4"))
    return found(forked.run_ranks(ranks, train, place, out, 4 // ranks))


@pytest.mark.parametrize("ce_weight", [0.0, 0.3])
def test_chunks_give_the_fused_loss(place, ce_weight):
    """ChunkedLossWrapper over SparseKL is ``linear_sparse_kl``, in value and in both gradients."""
    kd = recipe()
    batch = next(iter(SparseLogitDataset(place / "cache", 3)))
    valid = (batch.labels != -100).sum()
    torch.manual_seed(0)
    head = torch.nn.Linear(WIDTH, VOCAB, bias=False)
    hidden = torch.randn(3, POSITIONS, WIDTH, requires_grad=True)
    config = kd.ChunkedLossWrapper.Config(num_chunks=CHUNKS, loss_fn=kd.SparseKL.Config(ce_weight=ce_weight))
    chunked = config.build()
    chunked.set_lm_head(head)
    ids, probs, _ = batch.padded()
    loss, _ = chunked(hidden, batch.labels, valid, target_ids=ids, target_probs=probs)
    loss.backward()
    theirs = loss.detach(), hidden.grad, head.weight.grad

    states, weight = hidden.detach().requires_grad_(), head.weight.detach().requires_grad_()
    ours = linear_sparse_kl(
        states.flatten(0, 1), weight, batch.targets, labels_P=batch.labels.flatten(), ce_weight=ce_weight
    )
    ours.backward()
    for expected, got in zip((ours.detach(), states.grad, weight.grad), theirs, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def test_the_trainer_trains_on_the_stream(place, straight):
    """Its steps are the batches of the cache's stream, in order."""
    stream = SparseLogitDataset(place / "cache", 4)
    assert straight["seen"] == [batch.input_ids[:, 0].tolist() for batch, _ in zip(stream, range(4), strict=False)]


def test_resuming_is_exact(place, straight):
    """Model, optimizer and stream come back from torchtitan's checkpoint: the same sequences, losses and weights."""
    (one,) = resumed(place, straight, 1)
    assert straight["seen"][2:] == one["seen"]
    assert straight["losses"][2:] == one["losses"]
    assert straight["weights"] == one["weights"]


def test_two_processes_resume_what_one_began(place, straight):
    """Under FSDP2, from a checkpoint of one process: the rest of the stream, and its losses within 1e-5."""
    pair = resumed(place, straight, 2)
    assert straight["seen"][2:] == [a + b for a, b in zip(pair[0]["seen"], pair[1]["seen"], strict=True)]
    for one in pair:
        assert one["losses"] == pytest.approx(straight["losses"][2:], rel=1e-5)
        for weight, expected in zip(one["weights"], straight["weights"], strict=True):
            assert weight == pytest.approx(expected, rel=1e-3, abs=1e-5)


def test_what_parts_the_targets_is_refused(place, monkeypatch):
    """A cache of another length, and a trainer that splits more than the batch."""
    kd = recipe()
    config = kd.CacheLoader.Config(dataset_path=str(place / "cache"))
    parts = {"dp_world_size": 1, "dp_rank": 0, "local_batch_size": 2, "tokenizer": None}
    with pytest.raises(ValueError, match=r"sequences of 16 positions; give --training\.seq-len 16"):
        config.build(**parts, seq_len=32)
    dims = type("Dims", (), {"cp_enabled": False, "pp_enabled": False, "tp_enabled": True})
    monkeypatch.setattr(kd.Trainer, "__init__", lambda self, config: setattr(self, "parallel_dims", dims))
    with pytest.raises(ValueError, match="use data parallelism alone"):
        kd.KDTrainer(None)
