"""The sampler in torch operations: its draws are C's but for rounding, and what C refuses is refused in C's words."""

import math

import numpy as np
import pytest
import torch
from chance import (
    assert_drawn_by,
    assert_head_is_unbiased,
    assert_tail_is_unbiased,
    law_with_a_tail,
    power_law,
    repeat,
)
from reference_sampler import dense, probabilities, uniforms
from torch.utils._python_dispatch import TorchDispatchMode

from sklformat.capture import merge_draws
from sklformat.distill.teacher import gpu_sampler
from sklformat.distill.teacher.drawing import Drawer
from sklformat.distill.teacher.gpu_sampler import DeviceSampler
from sklformat.distill.teacher.logit_columns import LogitColumns
from sklformat.sampler import draw

NAMES = ("label_logprob", "entropy", "record_logprob")
BIG = {"seed": 2**64 - 3, "sequence": 2**40 + 7}


def sample(logits, rounds=50, sampler="multinomial", seed=0, sequence=0, at_once=1 << 10):
    """[T, rounds] int32 of a [T, V] array or tensor, drawn in slices of ``at_once`` positions."""
    if not isinstance(logits, torch.Tensor):
        logits = torch.from_numpy(np.ascontiguousarray(logits))
    slices = ((first, logits[first : first + at_once]) for first in range(0, len(logits), at_once))
    return DeviceSampler(sampler=sampler, rounds=rounds, seed=seed).draw(sequence, len(logits), slices).result()


def random_logits(positions, vocab_size, dtype=torch.float32, scale=3.0):
    generator = torch.Generator().manual_seed(vocab_size)
    return (torch.randn(positions, vocab_size, generator=generator) * scale).to(dtype)


def by_c(logits, rounds, sampler, seed=0, sequence=0):
    """C's records as sorted draws."""
    targets = draw(logits, rounds, sampler, seed=seed, sequence=sequence)
    return np.repeat(targets.token_ids, targets.counts).reshape(len(logits), rounds)


@pytest.mark.parametrize("rounds", [1, 2, 7, 127])
def test_uniforms_are_the_keyed_ones(rounds):
    """Philox in int64, with a seed and a sequence beyond 32 bits: all 53 bits of every position and round."""
    sampler = DeviceSampler(sampler="multinomial", rounds=rounds, seed=BIG["seed"])
    words = sampler._uniforms(BIG["sequence"], torch.arange(5), rounds)
    for position in range(5):
        expected = uniforms(rounds, seed=BIG["seed"], sequence=BIG["sequence"], position=position)
        assert (expected * 2.0**53).astype(np.int64).tolist() == words[position].tolist()


@pytest.mark.parametrize("sampler", ["multinomial", "systematic"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("vocab_size", "rounds"), [(1, 3), (2, 1), (255, 127), (257, 50), (5003, 50), (32_000, 12)])
def test_draws_are_those_of_c(sampler, dtype, vocab_size, rounds):
    """At least 99.9 % are the same id; a draw may differ only where rounding moved the edge between two ids."""
    logits = random_logits(60 if vocab_size < 10_000 else 25, vocab_size, dtype)
    expected = by_c(logits, rounds, sampler, **BIG)
    found = sample(logits, rounds, sampler, at_once=40, **BIG)
    assert (np.int32, expected.shape) == (found.dtype, found.shape)
    assert (np.diff(found, axis=1) >= 0).all()
    assert (expected == found).mean() >= 0.999
    merge_draws(found)


@pytest.mark.parametrize("sampler", ["multinomial", "systematic"])
def test_slices_of_positions_change_nothing(sampler, monkeypatch):
    """On a CPU sums do not depend on how many rows are there at once, on either level."""
    logits = random_logits(50, 1000)
    whole = sample(logits, 20, sampler)
    monkeypatch.setattr(gpu_sampler, "_SECOND_LEVEL", 3 * 20 * 256)
    assert np.array_equal(whole, sample(logits, 20, sampler, at_once=7))
    assert np.array_equal(whole, sample(logits, 20, sampler, at_once=1))


COUNTED = [np.arange(50) % 3 > 0, np.arange(50) == 49, np.arange(50) < 0, np.arange(50) >= 0]


@pytest.mark.parametrize("counted", COUNTED)
@pytest.mark.parametrize("at_once", [50, 7])
def test_positions_that_do_not_count_are_passed_over(counted, at_once):
    """The others have the draws and columns that they have among all; a slice where none counts may be left out."""
    logits, tokens = random_logits(50, 1000), np.arange(51, dtype=np.uint32)
    every = LogitColumns(NAMES, tokens)
    whole = sampled(logits, at_once, every, None)
    spoilt = torch.where(torch.from_numpy(counted)[:, None], logits, math.nan)  # so nothing looks at them
    taken = LogitColumns(NAMES, tokens)
    found = sampled(spoilt, at_once, taken, counted)
    assert np.array_equal(whole[counted], found)
    expected, columns = every.values(), taken.values()
    assert np.array_equal(expected["record_logprob"][counted], columns["record_logprob"])
    for name in ("entropy", "label_logprob"):
        assert np.array_equal(np.where(counted, expected[name], 0), columns[name])


def sampled(logits, at_once, columns, counted):
    starts = [at for at in range(0, 50, at_once) if counted is None or counted[at : at + at_once].any()]
    slices = ((at, logits[at : at + at_once]) for at in starts)
    return DeviceSampler(sampler="multinomial", rounds=20, seed=1).draw(7, 50, slices, columns, counted).result()


@pytest.mark.parametrize("counted", COUNTED)
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(
    ("kind", "sampling"),
    [("counts", {"sampler": "multinomial"}), ("ratios", {"sampler": "topk", "k": 5})],
    ids=["draws", "topk"],
)
def test_the_host_passes_over_the_same(counted, threads, kind, sampling):
    """Drawer gives a position that counts the records it has among all, the others none, on any number of threads."""
    logits, tokens = random_logits(50, 1000), np.arange(51, dtype=np.uint32)
    spoilt = torch.where(torch.from_numpy(counted)[:, None], logits, math.nan)
    found, columns = [], []
    with Drawer(kind=kind, rounds=20 if kind == "counts" else 0, sampling=sampling, threads=threads) as drawer:
        for rows, mask in ((logits, None), (spoilt, counted)):
            taken = LogitColumns(NAMES, tokens)
            starts = [at for at in range(0, 50, 7) if mask is None or mask[at : at + 7].any()]
            found.append(drawer.draw(7, ((at, rows[at : at + 7]) for at in starts), taken, mask))
            columns.append(taken.values())
    whole, some = found
    lengths = np.diff(whole.offsets)
    kept = np.repeat(counted, lengths)
    assert np.where(counted, lengths, 0).tolist() == np.diff(some.offsets).tolist()
    assert whole.token_ids[kept].tolist() == some.token_ids.tolist()
    values = "counts" if kind == "counts" else "weights"
    assert getattr(whole, values)[kept].tolist() == getattr(some, values).tolist()
    assert columns[0]["record_logprob"][kept].tolist() == columns[1]["record_logprob"].tolist()
    assert np.where(counted, columns[0]["entropy"], 0).tolist() == columns[1]["entropy"].tolist()


@pytest.mark.parametrize("sampler", ["multinomial", "systematic"])
def test_ids_without_probability_are_never_drawn(sampler):
    """-inf at the ends, in whole blocks and between; and what is too small for float32 beside the largest."""
    logits = torch.full((60, 2000), -math.inf)
    ids = torch.tensor([1, 700, 701, 1500])
    logits[:, ids] = torch.tensor([0.0, 1.0, -2.0, 0.5])
    logits[:, 1999] = -90.0
    found = sample(logits, 127, sampler)
    assert ids.tolist() == np.unique(found).tolist()


def test_sums_rise_at_positive_values_only(monkeypatch):
    """A scan that rounds upwards at a zero, or falls, as a parallel one may, draws no id of probability 0."""
    values = torch.tensor([[0.0, 1.0, 0.0, 1.0, 0.0, 0.0]], dtype=torch.float64)
    scanned = torch.tensor([[1e-17, 1.0, 1.0 + 1e-15, 2.0, 2.0 - 1e-15, 2.0 + 1e-15]], dtype=torch.float64)
    monkeypatch.setattr(torch.Tensor, "cumsum", lambda *_: scanned)
    running = gpu_sampler._running(values)
    assert [[0.0, 1.0, 1.0, 2.0, 2.0, 2.0]] == running.tolist()
    last = gpu_sampler._below(torch.tensor([[0.0, 2.0, 2.5]], dtype=torch.float64), running[:, -1:])
    assert [[1, 3, 3]] == torch.searchsorted(running, last, right=True).tolist()


class Recorded(TorchDispatchMode):
    """Sizes of all results, by type."""

    def __init__(self):
        super().__init__()
        self.largest = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.largest[tensor.dtype] = max(self.largest.get(tensor.dtype, 0), tensor.numel())
        return result


@pytest.mark.parametrize("sampler", ["multinomial", "systematic"])
def test_nothing_waits_for_values_and_memory_is_bounded(sampler, monkeypatch):
    """On tensors without values all is queued, so that no shape or branch needs one; no row is widened to 64 bits."""
    queued = []
    monkeypatch.setattr(gpu_sampler, "Draws", lambda *arguments: queued.append(arguments))
    positions, vocab_size, rounds = 130, 128_256, 50
    logits = torch.empty(positions, vocab_size, dtype=torch.bfloat16, device="meta")
    with Recorded() as recorded:
        device_sampler = DeviceSampler(sampler=sampler, rounds=rounds, seed=1)
        device_sampler.draw(3, 2 * positions, ((first, logits) for first in (0, positions)))
        device_sampler.draw(4, positions, [(0, logits)])
    assert [2 * positions * rounds + 1, positions * rounds + 1] == [arguments[0].numel() for arguments in queued]
    assert positions * 501 * 256 == recorded.largest[torch.float32]
    assert recorded.largest[torch.float64] <= gpu_sampler._SECOND_LEVEL
    assert recorded.largest[torch.int64] <= gpu_sampler._SECOND_LEVEL


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("sampler", ["multinomial", "systematic"])
def test_a_gpu_draws_what_c_draws_and_waits_for_nothing(sampler):
    """On CUDA: at least 99.9 % as C, the same each time, every row ascending, and no operation that synchronises."""
    host = random_logits(300, 32_000, torch.bfloat16)
    logits, device_sampler = host.cuda(), DeviceSampler(sampler=sampler, rounds=50, seed=2)
    first = device_sampler.draw(9, 300, [(0, logits)]).result()
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = device_sampler.draw(9, 300, [(0, logits)])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert np.array_equal(first, again.result())
    assert (np.diff(first, axis=1) >= 0).all()
    assert (by_c(host, 50, sampler, seed=2, sequence=9) == first).mean() >= 0.999


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_a_gpu_passes_over_positions_and_waits_for_nothing():
    """On CUDA too the positions that count keep their draws and columns, and which ones do is no reason to wait."""
    host, tokens, counted = random_logits(300, 32_000), np.arange(301, dtype=np.uint32), np.arange(300) % 7 > 1
    logits, device_sampler = host.cuda(), DeviceSampler(sampler="multinomial", rounds=50, seed=2)
    device_sampler.draw(9, 300, [(0, logits)]).result()
    taken = LogitColumns(NAMES, tokens)
    torch.cuda.set_sync_debug_mode("error")
    try:
        queued = device_sampler.draw(9, 300, [(0, logits[:150]), (150, logits[150:])], taken, counted)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected = by_c(host, 50, "multinomial", seed=2, sequence=9)[counted]
    assert (expected == queued.result()).mean() >= 0.999
    assert not taken.values()["entropy"][~counted].any()
    assert taken.values()["entropy"][counted].all()


def bad(value, at=5, positions=9):
    logits = random_logits(positions, 700)
    logits[at, 300] = value
    logits[at + 1, 2] = math.nan  # not the first
    return logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("at_once", [1, 4, 9])
@pytest.mark.parametrize("value", [math.nan, math.inf, 2.0**21])
def test_rows_that_c_refuses_are_refused_in_its_words(value, at_once, dtype):
    """The first bad position of all slices, with sequence and id, in the very message of ``skl.draw``."""
    logits = bad(value).to(dtype)
    with pytest.raises(ValueError, match=r"sequence 4, position 5: the logits hold NaN.*id 300") as expected:
        draw(logits, 10, sequence=4)
    with pytest.raises(ValueError) as found:
        sample(logits, 10, sequence=4, at_once=at_once)
    assert str(expected.value) == str(found.value)


def test_more_rows_that_are_refused():
    """Nothing above -2^20; and a value above 2^20 beside others as large, first in the row or far behind."""
    with pytest.raises(ValueError, match="position 1: the logits hold NaN"):
        sample(torch.tensor([[0.0, 1.0], [-math.inf, -(2.0**20)]]), 3)
    with pytest.raises(ValueError, match=r"position 0: .* \(first at id 1\)"):
        sample(torch.tensor([[2.0**20, 2.0**20 + 1]]), 3)
    late = torch.full((1, 400), 2.0**20)
    late[0, 300] += 60
    with pytest.raises(ValueError, match=r"position 0: .* \(first at id 300\)") as found:
        sample(late, 3)
    with pytest.raises(ValueError) as expected:
        draw(late, 3, sequence=0)
    assert str(expected.value) == str(found.value)
    assert [[1, 1, 1]] == sample(torch.tensor([[2.0**20 - 200, 2.0**20]]), 3).tolist()


@pytest.mark.parametrize(("sampler", "rounds"), [("topk", 5), ("multinomial", 128), ("systematic", 0)])
def test_what_only_c_draws_is_refused(sampler, rounds):
    """Other samplers, and rounds that a count cannot hold."""
    with pytest.raises(ValueError, match=r"a device draws counts of 1\.\.127 rounds"):
        DeviceSampler(sampler=sampler, rounds=rounds, seed=0)


def counts_of(row, positions, rounds=50, sampler="multinomial", **more):
    """[V] how often each id of a row was drawn at so many positions."""
    return np.bincount(sample(repeat(row, positions), rounds, sampler, **more).ravel(), minlength=row.size)


def test_multinomial_counts_follow_the_probabilities():
    """Chi-square of a row's 50 000 draws over bins of about 40 expected ones, on both sides."""
    row = power_law()
    assert_drawn_by(probabilities(row), counts_of(row, 1000, seed=1))


@pytest.mark.parametrize("sampler", ["multinomial", "systematic"])
def test_head_is_unbiased(sampler):
    """Each of the 200 most probable ids has its probability on average."""
    row = power_law()
    mean = counts_of(row, 400, 50, sampler, seed=3) / 50 / 400
    assert_head_is_unbiased(probabilities(row), mean, 400, sampler)


@pytest.mark.parametrize("layout", ["blocks of their own", "beside the head"])
def test_tail_below_1e_7_is_unbiased(layout):
    """40 000 ids or more of probability 5e-8 each are drawn as often as their mass of 2e-3 says, and evenly."""
    row, tail = law_with_a_tail(layout)
    drawn = counts_of(row, 200, 127, seed=11, at_once=300)[tail]
    assert_tail_is_unbiased(probabilities(row)[tail].sum(), drawn, 200 * 127, 8)


def test_what_a_float32_running_sum_would_lose_is_drawn():
    """Behind an id of probability almost 1, 255 ids below float32's resolution at 1 are drawn by their float64 mass."""
    row = np.full(256, -np.inf, np.float32)
    row[0], row[8:24] = 0.0, np.log(np.arange(1, 17) * 3e-8)
    e_PCW = torch.from_numpy(np.exp(row))[None, None]
    law = probabilities(row)
    shares = (np.arange(1 << 16) + 0.5) / (1 << 16) * law[8:24].sum() + law[0]
    found = gpu_sampler._find(e_PCW, torch.zeros(1, shares.size, dtype=torch.int64), torch.from_numpy(shares)[None])
    counts = np.bincount(found[0].numpy(), minlength=256)
    np.testing.assert_allclose(law[8:24] / law[8:24].sum() * shares.size, counts[8:24], atol=2)


def test_variance_of_systematic_is_far_below_multinomials():
    """E |t - p|^2 is (1 - sum p^2) / N for multinomial within 8 percent, and at most a third of it for systematic."""
    row, errors = power_law(exponent=1.5), {}
    law = probabilities(row)
    for sampler in ("multinomial", "systematic"):
        estimates = dense(merge_draws(sample(repeat(row, 500), 50, sampler, seed=9)), row.size) / 50
        errors[sampler] = ((estimates - law) ** 2).sum(1).mean()
    assert errors["multinomial"] == pytest.approx((1 - (law**2).sum()) / 50, rel=0.08)
    assert errors["systematic"] < errors["multinomial"] / 3
