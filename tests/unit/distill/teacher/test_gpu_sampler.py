"""The sampler in torch operations: its draws are C's but for rounding, and what C refuses is refused in C's words."""

import math

import numpy as np
import pytest
import torch
from chance import (
    assert_drawn_by,
    assert_head_is_unbiased,
    assert_tail_is_unbiased,
    largest_z,
    law_with_a_tail,
    power_law,
    repeat,
    z_of_false_alarm,
)
from reference_sampler import dense, probabilities, uniforms
from torch.utils._python_dispatch import TorchDispatchMode

from sklformat.capture import merge_draws
from sklformat.distill import kernels
from sklformat.distill.teacher import gpu_sampler, row_draws
from sklformat.distill.teacher.drawing import Drawer, on_host
from sklformat.distill.teacher.gpu_sampler import DeviceSampler
from sklformat.distill.teacher.logit_columns import LogitColumns
from sklformat.distill.teacher.row_draws import RowDraws
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
    sampler = RowDraws(systematic=False, rounds=rounds, seed=BIG["seed"])
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
    monkeypatch.setattr(row_draws, "_SECOND_LEVEL", 3 * 20 * 256)
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


def test_large_slices_are_cut_for_the_threads_of_the_host():
    """A slice that one product made is drawn from by several threads, and stays where it begins."""
    logits = random_logits(300, 3)
    cut = list(on_host([(40, logits), (340, logits[:5])]))
    assert [(40, 128), (168, 128), (296, 44), (340, 5)] == [(first, len(part)) for first, part in cut]
    assert torch.equal(logits, torch.cat([part for _, part in cut[:3]]))


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
    running = row_draws._running(values)
    assert [[0.0, 1.0, 1.0, 2.0, 2.0, 2.0]] == running.tolist()
    last = row_draws._below(torch.tensor([[0.0, 2.0, 2.5]], dtype=torch.float64), running[:, -1:])
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
@pytest.mark.parametrize("temperature", [1.0, 0.8])
def test_nothing_waits_for_values_and_memory_is_bounded(sampler, temperature, monkeypatch):
    """On tensors without values all is queued, so that no shape or branch needs one; no row is widened to 64 bits."""
    queued = []
    for name in ("Draws", "DrawnRatios"):
        monkeypatch.setattr(gpu_sampler, name, lambda *arguments: queued.append(arguments[0].numel()))
    positions, vocab_size, rounds = 130, 128_256, 50
    logits = torch.empty(positions, vocab_size, dtype=torch.bfloat16, device="meta")
    with Recorded() as recorded:
        device_sampler = DeviceSampler(sampler=sampler, rounds=rounds, seed=1, proposal_temperature=temperature)
        device_sampler.draw(3, 2 * positions, ((first, logits) for first in (0, positions)))
        device_sampler.draw(4, positions, [(0, logits)])
    each = rounds if temperature == 1 else 2 * rounds
    assert [2 * positions * each + 1, positions * each + 1] == queued
    assert positions * 501 * 256 == recorded.largest[torch.float32]
    assert recorded.largest[torch.float64] <= row_draws._SECOND_LEVEL
    assert recorded.largest[torch.int64] <= row_draws._SECOND_LEVEL


@pytest.mark.parametrize("law", [{"sampler": "topk", "k": 20}, {"sampler": "topp", "p": 0.9}], ids=str)
def test_nothing_waits_for_the_most_probable_either(law, monkeypatch):
    """Rows are looked at so many at once; room for records is what a sequence can have at most."""
    queued = []
    monkeypatch.setattr(gpu_sampler, "Tops", lambda *arguments: queued.append(arguments))
    logits = torch.empty(300, 128_256, dtype=torch.bfloat16, device="meta")
    with Recorded() as recorded:
        DeviceSampler(seed=1, **law).draw(3, 300, [(0, logits)])
    lengths, _, _, records, *_ = queued[0]
    assert (301, (2, 300 * law.get("k", 65535) + 1)) == (lengths.numel(), records.shape)
    assert recorded.largest[torch.int64] <= row_draws.KEYS_AT_ONCE


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


RATIOS = {
    "a flatter proposal": {"rounds": 40, "proposal_temperature": 0.7},
    "a sharper one, unbiased": {"rounds": 40, "proposal_temperature": 1.5, "self_normalise": False},
    "even draws, unbiased": {
        "rounds": 12, "sampler": "systematic", "proposal_temperature": 0.6, "self_normalise": False,
    },
    "many rounds": {"rounds": 300},
    "many even ones": {"rounds": 1000, "sampler": "systematic"},
    "topk": {"sampler": "topk", "k": 12},
    "topp": {"sampler": "topp", "p": 0.9},
    "a few of topp": {"sampler": "topp", "p": 0.99, "k": 7},
    "all of topp": {"sampler": "topp", "p": 1.0},
}  # fmt: skip


def test_a_sampler_that_there_is_not():
    with pytest.raises(ValueError, match="a device draws by multinomial, systematic, topk or topp, got sampler 'best'"):
        DeviceSampler(sampler="best", seed=0, rounds=3)


def ratios(logits, law, at_once=1 << 10, columns=None, counted=None, sequence=5):
    """Records by the device's sampler, and the column record_logprob beside them."""
    slices = ((first, logits[first : first + at_once]) for first in range(0, len(logits), at_once))
    sampler = DeviceSampler(**{"sampler": "multinomial", "seed": 3} | law)
    arrival = sampler.draw(sequence, len(logits), slices, columns, counted)
    targets = arrival.result()
    if columns is None:
        return targets, None
    return targets, arrival.record_logprob(columns.values()["record_logprob"])


def assert_as_c(found, logits, law, at_least=0.999):
    """The records of C: 99.9 % of the ids, and their weights to 1e-5."""
    expected = draw(logits, **{"seed": 3} | law, sequence=5)
    assert expected.offsets.size == found.offsets.size
    pairs = [
        {(t, i): w for t in range(len(logits)) for i, w in of_position(targets, t)} for targets in (expected, found)
    ]
    same = pairs[0].keys() & pairs[1].keys()
    assert len(same) >= at_least * max(map(len, pairs))
    # A draw that fell to the neighbour changes the other weights of its position where these sum to 1.
    touched = {t for t, _ in pairs[0].keys() ^ pairs[1].keys()}
    for key in same:
        assert key[0] in touched or pairs[1][key] == pytest.approx(pairs[0][key], rel=1e-5)


def of_position(targets, t):
    span = slice(*targets.offsets[t : t + 2])
    ids = targets.token_ids[span].tolist()
    assert ids == sorted(set(ids))
    return zip(ids, targets.weights[span].tolist(), strict=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("vocab_size", [1, 257, 1003])
@pytest.mark.parametrize("law", RATIOS.values(), ids=RATIOS)
def test_weights_are_those_of_c(law, vocab_size, dtype, monkeypatch):
    """Ids ascending, equal logits by lower id, weights too small left out; over slices of any size."""
    logits = random_logits(30, vocab_size, dtype)
    logits[3, vocab_size // 2 :] = logits[3, 0]
    logits[4, 1::2] = -math.inf
    logits[5, : vocab_size // 2] -= 95  # beside the largest their probability is 0
    logits[6] *= 0
    logits[6, ::2] *= -1
    whole, _ = ratios(logits, law)
    assert_as_c(whole, logits, law)
    monkeypatch.setattr(row_draws, "_POINTS", 3 * law.get("rounds", 1))
    monkeypatch.setattr(row_draws, "KEYS_AT_ONCE", 4 * vocab_size)
    parts, _ = ratios(logits, law, at_once=7)
    assert whole == parts


@pytest.mark.parametrize("law", RATIOS.values(), ids=RATIOS)
def test_a_wide_row_has_them_too(law):
    """Of so many ids that are alike the edges lie nearer to each other, so that rounding moves a few more draws."""
    logits = random_logits(2, 131_075, torch.bfloat16)
    assert_as_c(ratios(logits, law)[0], logits, law, 0.997)


@pytest.mark.parametrize("counted", COUNTED)
@pytest.mark.parametrize("name", ["a flatter proposal", "many rounds", "topk", "topp"])
def test_records_with_weights_pass_over_positions(name, counted):
    """Those that count have the records and columns that they have among all, beside each other."""
    law, logits, tokens = RATIOS[name], random_logits(50, 1000), np.arange(51, dtype=np.uint32)
    every, taken = LogitColumns(NAMES, tokens), LogitColumns(NAMES, tokens)
    whole, logprobs = ratios(logits, law, 7, every)
    spoilt = torch.where(torch.from_numpy(counted)[:, None], logits, math.nan)
    some, some_logprobs = ratios(spoilt, law, 7, taken, counted)
    lengths = np.diff(whole.offsets)
    assert np.where(counted, lengths, 0).tolist() == np.diff(some.offsets).tolist()
    kept = np.repeat(counted, lengths)
    assert whole.token_ids[kept].tolist() == some.token_ids.tolist()
    assert whole.weights[kept].tolist() == some.weights.tolist()
    assert logprobs[kept].tolist() == some_logprobs.tolist()
    logp = torch.log_softmax(logits.double(), -1).numpy()
    exact = logp[np.repeat(np.arange(50), lengths), whole.token_ids]
    np.testing.assert_allclose(logprobs, exact, rtol=1e-3, atol=1e-6)
    for column in ("entropy", "label_logprob"):
        assert np.array_equal(np.where(counted, every.values()[column], 0), taken.values()[column])


@pytest.mark.parametrize("by", ["torch", "kernels"])
@pytest.mark.parametrize("self_normalise", [True, False])
def test_ids_that_only_the_proposal_has_get_no_record(by, self_normalise, monkeypatch):
    """Drawn by a flat proposal, an id whose own probability is below 2^-126 weighs nothing, as for C."""
    logits = torch.full((1, 300), -88.0)
    logits[0, 7] = 0.0
    law = {"rounds": 20, "proposal_temperature": 0.05, "self_normalise": self_normalise}
    if by == "kernels":
        monkeypatch.setattr(kernels, "run_on", lambda device: True)
    found, _ = ratios(logits, law)
    assert [7] == found.token_ids.tolist()
    assert_as_c(found, logits, law)


@pytest.fixture
def interpreted(monkeypatch):
    """Kernels run on the CPU, and torch operations nowhere."""
    monkeypatch.setattr(kernels, "run_on", lambda device: True)
    monkeypatch.setattr(RowDraws, "draw", None)
    monkeypatch.setattr(row_draws, "sum_rows", None)


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # the interpreter computes with what is bad
@pytest.mark.parametrize("law", [{"rounds": 5}, RATIOS["even draws, unbiased"], RATIOS["topk"]], ids=str)
def test_kernels_give_records_and_columns_in_one_pass(law, interpreted):
    """Over slices, and positions that do not count: C's records, the columns of torch, and what C refuses."""
    logits, tokens = random_logits(3, 301), np.arange(4, dtype=np.uint32)
    counted = np.array([True, False, True])
    taken, plain = LogitColumns(NAMES, tokens), LogitColumns(NAMES, tokens)
    if law == {"rounds": 5}:
        slices = ((first, logits[first : first + 2]) for first in (0, 2))
        sampler = DeviceSampler(sampler="multinomial", seed=3, **law)
        found = sampler.draw(5, 3, slices, taken, counted).result()
        assert by_c(logits, 5, "multinomial", seed=3, sequence=5)[counted].tolist() == found.tolist()
        ids, rows, logprobs = found.ravel(), np.repeat([0, 2], 5), taken.values()["record_logprob"].ravel()
    else:
        found, logprobs = ratios(logits, law, 2, taken, counted)
        expected = draw(logits, **{"seed": 3} | law, sequence=5)
        rows = np.repeat(np.arange(3), np.diff(expected.offsets))
        kept = counted[rows]
        assert expected.token_ids[kept].tolist() == found.token_ids.tolist()
        np.testing.assert_allclose(expected.weights[kept], found.weights, rtol=1e-5)
        ids, rows = found.token_ids, rows[kept]
    plain.add(np.array([0, 2]), logits[[0, 2]], torch.from_numpy(rows // 2), torch.from_numpy(ids.astype(np.int64)))
    for name, values in plain.values().items():
        found_values = logprobs if name == "record_logprob" else taken.values()[name]
        np.testing.assert_allclose(values, found_values, rtol=1e-3, atol=1e-5)
    logits[2, 300] = math.nan
    with pytest.raises(ValueError, match=r"sequence 5, position 2: the logits hold NaN.*id 300"):
        DeviceSampler(**{"sampler": "multinomial", "seed": 3} | law).draw(5, 3, [(0, logits)]).result()


@pytest.mark.parametrize("limit", ["MAX_VOCAB", "MAX_ROUNDS"])
def test_what_kernels_have_no_room_for_goes_by_torch(limit, monkeypatch):
    """The draws are those that they would be, and no kernel runs."""
    from sklformat.distill.kernels import draw_rows

    monkeypatch.setattr(kernels, "run_on", lambda device: True)
    monkeypatch.setattr(draw_rows, limit, 9)
    monkeypatch.setattr(draw_rows, "draw_rows", None)
    logits = random_logits(3, 301)
    assert by_c(logits, 10, "multinomial").tolist() == sample(logits, 10).tolist()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("law", RATIOS.values(), ids=RATIOS)
def test_a_gpu_gives_the_records_of_c_and_waits_for_nothing(law, monkeypatch):
    """Every sampler, by kernels and by torch operations, with columns: as C, and no operation synchronises."""
    host, tokens = random_logits(200, 32_003, torch.bfloat16), np.arange(201, dtype=np.uint32)
    logits, sampler = host.cuda(), DeviceSampler(**{"sampler": "multinomial", "seed": 3} | law)
    for run_on in (kernels.run_on, lambda device: False):
        monkeypatch.setattr(kernels, "run_on", run_on)
        first = sampler.draw(5, 200, [(0, logits)]).result()
        taken = LogitColumns(NAMES, tokens)
        torch.cuda.set_sync_debug_mode("error")
        try:
            queued = sampler.draw(5, 200, [(0, logits[:90]), (90, logits[90:])], taken)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert first == queued.result()
        assert_as_c(first, host, law)
        assert taken.values()["entropy"].all()


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


@pytest.mark.parametrize("law", RATIOS.values(), ids=RATIOS)
def test_bad_rows_are_named_whatever_the_sampler(law):
    """As where draws are counted."""
    with pytest.raises(ValueError, match=r"sequence 5, position 5: the logits hold NaN.*id 300"):
        ratios(bad(math.inf), law, at_once=4)


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


@pytest.mark.parametrize("wrong", [{"rounds": 0}, {"rounds": 65536}, {"rounds": 5, "proposal_temperature": 0.0}])
def test_what_cannot_be_drawn_is_refused(wrong):
    """As by skl.draw."""
    with pytest.raises(ValueError, match=r"must be in (1\.\.65535|0\.001\.\.100), got"):
        DeviceSampler(sampler="systematic", seed=0, **wrong)


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
    found = row_draws._find(e_PCW, torch.zeros(1, shares.size, dtype=torch.int64), torch.from_numpy(shares)[None])
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


@pytest.mark.parametrize("sampler", ["multinomial", "systematic"])
def test_importance_weights_are_unbiased(sampler):
    """With weights p / q / rounds each of the 100 most probable ids, and all others together, have their mass."""
    row = power_law(500)
    law = {"rounds": 20, "sampler": sampler, "proposal_temperature": 0.7, "self_normalise": False, "seed": 21}
    targets, _ = ratios(torch.from_numpy(repeat(row, 4000).copy()), law)
    probability = probabilities(row)
    head = np.argsort(-probability)[:100]
    estimates = dense(targets, row.size)
    samples = np.column_stack([estimates[:, head], estimates.sum(1) - estimates[:, head].sum(1)])
    expected = np.append(probability[head], 1 - probability[head].sum())
    assert largest_z(samples, expected) < z_of_false_alarm(101)
