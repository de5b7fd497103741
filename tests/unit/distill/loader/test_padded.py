"""Padded targets: the same records in equally many places, and what a limit cuts off."""

import numpy as np
import pytest
import torch
from loader_data import POSITIONS, SEQUENCES, write_cache

from sklformat.distill import Batch, SparseLogitDataset, SparseLogitSequences, Targets, collate

LENGTHS = [1 + 3 * (i % 5) for i in range(SEQUENCES)]


@pytest.fixture(scope="module")
def batch(tmp_path_factory):
    directory = tmp_path_factory.mktemp("padded") / "cache"
    write_cache(directory, seq_len=0, lengths=LENGTHS)
    return next(iter(SparseLogitDataset(directory, batch_size=SEQUENCES)))


def made_of(positions, shape):
    """A batch of the given shape whose positions have these (id, prob) pairs."""
    offsets = torch.tensor(np.cumsum([0, *map(len, positions)]))
    pairs = [pair for position in positions for pair in position]
    ids = torch.tensor([i for i, _ in pairs], dtype=torch.int32)
    probs = torch.tensor([p for _, p in pairs], dtype=torch.float32)
    return Batch(torch.zeros(shape, dtype=torch.int64), torch.zeros(shape), Targets(ids, probs, offsets), {})


def reference(batch, k):
    """The same with loops, in float64: for each position its pairs and the mass cut off."""
    targets = batch.targets
    for begin, end in zip(targets.offsets[:-1].tolist(), targets.offsets[1:].tolist(), strict=True):
        pairs = list(zip(targets.token_ids[begin:end].tolist(), targets.probs[begin:end].tolist(), strict=True))
        heaviest = sorted(pairs, key=lambda pair: (-pair[1], pair[0]))[:k]
        yield sorted(heaviest), sum(p for _, p in pairs) - sum(p for _, p in heaviest)


@pytest.mark.parametrize("k", [None, 1, 2, 3, 9, 10, 11, 64])
def test_padded_holds_the_heaviest(batch, k):
    """Each position has its k heaviest records in their order, then zeros, and the rest is the mass of the others."""
    ids, probs, rest = batch.padded(k)
    width = int(torch.diff(batch.targets.offsets).max()) if k is None else k
    assert (*batch.input_ids.shape, width) == tuple(ids.shape) == tuple(probs.shape)
    assert batch.input_ids.shape == rest.shape
    assert (torch.int32, torch.float32, torch.float32) == (ids.dtype, probs.dtype, rest.dtype)
    for p, (pairs, cut) in enumerate(reference(batch, width)):
        got = list(zip(ids.flatten(0, 1)[p].tolist(), probs.flatten(0, 1)[p].tolist(), strict=True))
        assert pairs + [(0, 0.0)] * (width - len(pairs)) == got
        assert abs(cut - float(rest.flatten()[p])) < 1e-6
    assert (k is not None and k < 10) == bool(rest.any())


def test_equal_weights_keep_the_lower_ids():
    """What is cut does not depend on how a sort treats equals; a position that is full is not touched."""
    batch = made_of([[(3, 0.25), (5, 0.25), (7, 0.25), (9, 0.25)], [], [(1, 0.1), (2, 0.9)]], (1, 3))
    ids, probs, rest = batch.padded(2)
    assert [[[3, 5], [0, 0], [1, 2]]] == ids.tolist()
    assert torch.equal(torch.tensor([[[0.25, 0.25], [0, 0], [0.1, 0.9]]]), probs)
    assert [[0.5, 0.0, 0.0]] == rest.tolist()


def test_no_record_at_all():
    """A batch of empty positions has one place for each, of mass 0."""
    ids, probs, rest = made_of([[], []], (2, 1)).padded()
    assert [[[0]], [[0]]] == ids.tolist() == probs.tolist()
    assert [[0.0], [0.0]] == rest.tolist()


def test_single_sequences_and_wide_ids(tmp_path):
    """A single sequence has no dimension B; int64 ids of other makers become int32."""
    write_cache(tmp_path / "cache")
    one = SparseLogitSequences(tmp_path / "cache")[2]
    ids, probs, rest = one.padded(4)
    assert ((POSITIONS, 4), (POSITIONS, 4), (POSITIONS,)) == (ids.shape, probs.shape, rest.shape)
    targets = Targets(torch.tensor([2**24 - 1]), torch.tensor([1.0], dtype=torch.float64), torch.tensor([0, 1]))
    ids, probs, _ = Batch(torch.zeros(1), torch.zeros(1), targets, {}).padded()
    assert ([[2**24 - 1]], torch.int32, torch.float32) == (ids.tolist(), ids.dtype, probs.dtype)


@pytest.mark.parametrize("k", [None, 4])
def test_collate_makes_dicts(tmp_path, k):
    """form="dict" has the tensors of the batch and its padded targets, and those of documents where there are some."""
    for columns, names in (((), set()), (("document_start",), {"position_ids", "document_starts"})):
        directory = tmp_path / f"cache-{len(columns)}"
        write_cache(directory, seq_len=0, lengths=LENGTHS, columns=columns)
        ones = SparseLogitSequences(directory).__getitems__([0, 4, 2])
        made, batch = collate(ones, form="dict", k=k), collate(ones)
        assert {"input_ids", "labels", "target_ids", "target_probs", "target_rest"} | names == set(made)
        assert all(torch.equal(getattr(batch, name), made[name]) for name in {"input_ids", "labels"} | names)
        padded = (made["target_ids"], made["target_probs"], made["target_rest"])
        assert all(torch.equal(a, b) for a, b in zip(batch.padded(k), padded, strict=True))


@pytest.mark.parametrize("wrong", [{"form": "list"}, {"k": 3}])
def test_forms_that_there_are_not(tmp_path, wrong):
    """A form that collate does not make, and a k without a dict, are refused."""
    write_cache(tmp_path / "cache")
    with pytest.raises(ValueError, match="collate makes form 'batch', or 'dict' with a k or without, got form"):
        collate([SparseLogitSequences(tmp_path / "cache")[0]], **wrong)


@pytest.mark.parametrize("k", [0, -1])
def test_a_k_that_keeps_nothing(batch, k):
    """k below 1 is refused."""
    with pytest.raises(ValueError, match=f"padded targets need k >= 1, got {k}"):
        batch.padded(k)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("k", [None, 3])
def test_padded_on_a_gpu(batch, k):
    """A batch on a GPU is padded there, to the same tensors."""
    for here, there in zip(batch.padded(k), batch.to("cuda").padded(k), strict=True):
        assert "cuda" == there.device.type
        torch.testing.assert_close(here, there.cpu())
