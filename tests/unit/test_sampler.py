import contextlib
import ctypes
import functools
import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from reference_sampler import dense, philox, points, probabilities

import sklformat as skl
from sklformat import native
from sklformat.errors import UnsupportedError

torch = pytest.importorskip("torch")
draw = functools.partial(skl.draw, sequence=0)  # of one sequence, where a test names no other


def some_logits(positions=4, vocab_size=1000, spread=3.0, seed=0):
    return (np.random.default_rng(seed).normal(size=(positions, vocab_size)) * spread).astype(np.float32)


def ids_of(targets, t=0):
    return targets.token_ids[targets.offsets[t] : targets.offsets[t + 1]].tolist()


@pytest.fixture
def restore_kernels():
    name = native.kernels_name()
    yield
    native.use_kernels(name)


KERNELS = ("portable", *(("neon",) if platform.machine() in ("aarch64", "arm64") else ("avx2", "avx512")))
CALLS = (
    {"sampler": "multinomial"},
    {"sampler": "multinomial", "rounds": 300},
    {"sampler": "multinomial", "rounds": 20_000},
    {"sampler": "systematic"},
    {"sampler": "systematic", "proposal_temperature": 0.8},
    {"sampler": "multinomial", "proposal_temperature": 1.2, "self_normalise": False},
    {"sampler": "topk", "k": 12},
    {"sampler": "topp", "p": 0.7},
)


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_reference_philox_gives_the_known_answers(counter, key, words):
    """The oracle's generator gives the published known answers; tests/c/test_sampler.c holds C to the same."""
    assert list(words) == philox(counter, key)


@pytest.mark.parametrize("sampler", ["multinomial", "systematic"])
@pytest.mark.parametrize("rounds", [1, 2, 7, 50, 127, 301])
def test_records_are_those_of_the_float64_law(sampler, rounds):
    """Running counts lie where the float64 distribution function puts the same points, but for points within 2e-6."""
    logits = some_logits(positions=6, vocab_size=700)
    key = {"seed": 2**40 + 5, "sequence": 2**33 + 1}
    targets = draw(logits, rounds, sampler, first_position=9, **key)
    drawn = dense(targets, 700)
    cumulative = np.cumsum(drawn * (1 if targets.counts is not None else rounds), axis=1)
    law = np.cumsum(probabilities(logits), axis=1)
    for t in range(6):
        x = points(rounds, sampler, position=9 + t, **key)
        fewest = np.searchsorted(x, law[t] - 2e-6)
        most = np.searchsorted(x, law[t] + 2e-6)
        assert (fewest <= cumulative[t] + 1e-3).all()
        assert (most >= cumulative[t] - 1e-3).all()


def test_golden_records():
    """The arithmetic and the key are pinned: these records and weights never change by a bit."""
    logits = ((np.arange(3 * 500) * 2654435761 % 1009).reshape(3, 500) / 64.0).astype(np.float32)
    targets = draw(logits, 10, seed=1, sequence=2, first_position=3)
    assert [
        17,
        88,
        101,
        174,
        189,
        202,
        346,
        375,
        390,
        405,
        5,
        19,
        34,
        78,
        294,
        295,
        410,
        437,
        466,
        467,
        24,
        110,
        126,
        241,
        285,
        329,
        370,
        456,
        485,
    ] == targets.token_ids.tolist()
    assert [
        1,
        1,
        1,
        1,
        1,
        1,
        1,
        1,
        1,
        1,
        1,
        1,
        1,
        1,
        1,
        1,
        1,
        1,
        1,
        1,
        1,
        1,
        1,
        1,
        1,
        1,
        1,
        2,
        1,
    ] == targets.counts.tolist()
    assert [0, 10, 20, 29] == targets.offsets.tolist()
    weights = draw(logits[:1] * np.float32(1.37), sampler="topk", k=8).weights
    assert [
        1024268281,
        1025312870,
        1026475463,
        1023880762,
        1024881574,
        1025995445,
        1023509483,
        1024468352,
    ] == weights.view(np.uint32).tolist()


@pytest.mark.parametrize("call", CALLS, ids=str)
@pytest.mark.usefixtures("restore_kernels")
def test_all_kernels_give_the_same_records(call):
    """Records do not depend on the instruction set, bit for bit."""
    logits = some_logits(positions=7, vocab_size=2049)
    logits[1, 2000], logits[2, 2040], logits[3, 700] = 150, 60_000, -60_000  # far above and below the first block
    logits[4, ::2] = logits[5, 5:2048] = -np.inf
    inputs = [logits, logits.astype(np.float16), torch.from_numpy(logits).to(torch.bfloat16)]
    native.use_kernels("portable")
    expected = [draw(rows, **call) for rows in inputs]
    tried = 0
    for name in KERNELS:
        with contextlib.suppress(UnsupportedError):
            native.use_kernels(name)
            tried += 1
            assert expected == [draw(rows, **call) for rows in inputs]
    assert tried >= 1


def test_threads_give_the_same_records():
    """Calls on several threads at once give the records of calls one after the other."""
    logits = some_logits(positions=24, vocab_size=30_000)
    parts = [(logits[at : at + 3], at) for at in range(0, 24, 3)]
    expected = [draw(rows, seed=3, first_position=at) for rows, at in parts]
    with ThreadPoolExecutor(4) as pool:
        assert expected == list(pool.map(lambda part: draw(part[0], seed=3, first_position=part[1]), parts))


def test_tensors_and_bits_are_read_as_what_they_are():
    """A torch tensor gives the records of the same values in numpy, for every type and for bfloat16 bits."""
    values = torch.from_numpy(some_logits()).to(torch.bfloat16)
    expected = draw(values.float().numpy())
    assert expected == draw(values)
    assert expected == draw(values.float())
    assert expected == draw(values.view(torch.int16).numpy().view(np.uint16), dtype="bfloat16")
    assert expected == draw(values.view(torch.uint16), dtype="bfloat16")
    assert expected == draw(values.float().requires_grad_(True))
    halves = torch.from_numpy(some_logits()).half()
    assert draw(halves.float()) == draw(halves)


def test_every_float16_value_is_read_exactly():
    """All finite float16 values, the subnormal ones too, stand for the same logits as in float32."""
    every = np.arange(2**16, dtype=np.uint16).view(np.float16)
    finite = every[np.isfinite(every)]
    rows = finite.reshape(248, 256)
    for call in ({"sampler": "topk", "k": 256}, {"sampler": "multinomial", "proposal_temperature": 0.001}):
        assert draw(rows.astype(np.float32), **call) == draw(rows, **call)


def test_rows_may_lie_anywhere():
    """Row strides, slices and reversed or transposed arrays give the records of a plain copy."""
    base = some_logits(positions=8, vocab_size=600)
    for rows in (base[::2], base[:, 5:505], base[::-1], base[:, ::2], base.T, np.broadcast_to(base[0], (5, 600))):
        assert draw(rows.copy()) == draw(rows)


@pytest.mark.parametrize("at", [0, 255, 256, 699])
def test_a_far_maximum_takes_everything(at):
    """A logit that stands far above the rest gets every draw, wherever it is and however far."""
    for height in (60, 200, 1e4, 1e6):
        logits = some_logits(positions=1, vocab_size=700)
        logits[0, at] = height
        assert [at] == ids_of(draw(logits))
        assert [50] == draw(logits).counts.tolist()
        assert pytest.approx([1.0]) == draw(logits, sampler="topk", k=1).weights.tolist()


def test_large_common_shift_changes_nothing_that_matters():
    """Only differences of logits count: exact shifts of the row leave the probabilities as they are."""
    logits = np.round(some_logits(vocab_size=700) * 8) / 8
    expected = draw(logits, sampler="topk", k=20)
    for shift in (-3000, 512, 20000):
        targets = draw(logits + np.float32(shift), sampler="topk", k=20)
        assert expected.token_ids.tolist() == targets.token_ids.tolist()
        np.testing.assert_allclose(expected.weights, targets.weights, rtol=2e-6)


def test_masked_ids_are_never_drawn():
    """-inf and the smallest float32 are probability 0: no sampler returns such an id, even if all others are rare."""
    for mask in (-np.inf, np.finfo(np.float32).min):
        logits = np.full((3, 1000), mask, np.float32)
        logits[:, 300:303] = [0, 1, 2]
        for call in CALLS:
            targets = draw(logits, **call)
            assert set(targets.token_ids.tolist()) <= {300, 301, 302}
            assert (np.diff(targets.offsets) > 0).all()
        assert 3 * [3] == np.diff(draw(logits, sampler="topk", k=12).offsets).tolist()


@pytest.mark.parametrize("k", [1, 2, 12, 500, 600, 1000, 5000])
@pytest.mark.parametrize("vocab_size", [1000, 1024])
def test_topk_is_exact_and_ties_go_to_lower_ids(k, vocab_size):
    """The k most probable ids, by (probability, lower id), each with its probability."""
    logits = np.round(some_logits(vocab_size=vocab_size, spread=2.0) * 2) / 2
    logits[0, 3], logits[0, 4] = 0.0, -0.0
    targets = draw(logits, sampler="topk", k=k)
    law = probabilities(logits)
    for t in range(4):
        order = np.lexsort((np.arange(vocab_size), -logits[t]))
        assert sorted(order[:k].tolist()) == ids_of(targets, t)
    expected = np.concatenate([law[t, ids_of(targets, t)] for t in range(4)])
    np.testing.assert_allclose(expected, targets.weights, rtol=2e-6)


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9, 0.999])
def test_topp_is_the_smallest_nucleus(p):
    """The nucleus reaches p, and would not without its least probable id; k caps it; p = 1 keeps every id."""
    logits = some_logits(spread=2.0)
    targets = draw(logits, sampler="topp", p=p)
    for t, law in enumerate(probabilities(logits)):
        ids = ids_of(targets, t)
        assert sorted(np.argsort(-law)[: len(ids)].tolist()) == ids
        assert law[ids].sum() >= p - 1e-6
        assert law[ids].sum() - law[ids].min() < p + 1e-6
    capped = draw(logits, sampler="topp", p=p, k=3)
    assert draw(logits, sampler="topk", k=3).token_ids.tolist() == capped.token_ids.tolist() or p < 0.5
    assert 4 * [1000] == np.diff(draw(logits, sampler="topp", p=1.0).offsets).tolist()


def test_rounds_beyond_127_give_shares():
    """Counts that 7 bits cannot hold come as weights counts / rounds; up to 127 they are counts."""
    logits = some_logits()
    assert draw(logits, 127).weights is None
    weights = draw(logits, 128).weights
    assert ((weights * 128) == np.round(weights * 128)).all()
    assert 4.0 == pytest.approx(draw(logits, 65535).weights.sum(), abs=1e-4)


def test_systematic_counts_differ_from_their_mean_by_less_than_one():
    """Each id's count is rounds * p rounded down or up."""
    logits = some_logits(vocab_size=300)
    counts = dense(draw(logits, 50, "systematic"), 300)
    assert np.abs(counts - 50 * probabilities(logits)).max() < 1 + 1e-4


@pytest.mark.parametrize("t", [0.8, 1.2])
def test_importance_weights_are_p_over_q(t):
    """Weights are counts / rounds * p / q, as they are or divided by their sum; the draws are those of p**t."""
    logits = np.round(some_logits(positions=6, vocab_size=400) * 8) / 8
    law, proposal = probabilities(logits), probabilities(logits, t)
    plain = draw(logits, 40, proposal_temperature=t, self_normalise=False)
    normal = draw(logits, 40, proposal_temperature=t)
    counts = dense(plain, 400) * 40 / (law / proposal)
    np.testing.assert_allclose(np.round(counts), counts, atol=1e-4)
    assert 6 * [40] == np.round(counts).sum(1).tolist()
    weights = dense(plain, 400)
    np.testing.assert_allclose(weights / weights.sum(1, keepdims=True), dense(normal, 400), rtol=1e-6)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.usefixtures("restore_kernels")
def test_flushing_subnormal_numbers_changes_nothing(kernels):
    """A process that flushes subnormal floats to zero draws the same records: logits that differ in these go apart."""
    try:
        native.use_kernels(kernels)
    except UnsupportedError:
        pytest.skip(f"no {kernels} here")
    some = some_logits(spread=25.0)
    some[:, ::3] = 1e-41
    tiny = np.random.default_rng(0).permutation(1000).astype(np.float32)[None] * np.float32(1e-42)
    calls = [{"sampler": "multinomial"}, {"sampler": "topp", "p": 1.0}, {"proposal_temperature": 0.5}]
    calls += [{"sampler": "topk", "k": 5}, {"sampler": "topp", "p": 0.01}]
    expected = [draw(logits, **call) for call in calls for logits in (some, tiny, tiny.astype(np.float16))]
    assert set(np.argsort(tiny[0])[-5:]) == set(draw(tiny, sampler="topk", k=5).token_ids.tolist())
    supported = torch.set_flush_denormal(True)
    try:
        actual = [draw(logits, **call) for call in calls for logits in (some, tiny, tiny.astype(np.float16))]
        still = torch.tensor([1e-41]) * 1 == 0
    finally:
        torch.set_flush_denormal(False)
    if supported:
        assert expected == actual
        assert still.item(), "the thread's own setting is kept"


@pytest.mark.skipif(not sys.platform.startswith("linux") or platform.machine() != "x86_64", reason="numbers of modes")
@pytest.mark.parametrize("mode", [0x400, 0x800, 0xC00])
def test_how_a_thread_rounds_changes_nothing(mode):
    """Downward, upward or toward zero: the same records, and the thread rounds its way afterwards."""
    library = ctypes.CDLL("libm.so.6")
    logits = some_logits(spread=5.0)
    calls = [{}, {"proposal_temperature": 0.5}, {"sampler": "topp", "p": 0.9}, {"sampler": "systematic", "rounds": 999}]
    expected = [draw(logits, **call) for call in calls]
    assert 0 == library.fesetround(mode)
    try:
        actual = [draw(logits, **call) for call in calls]
        found = library.fegetround()
    finally:
        library.fesetround(0)
    assert expected == actual
    assert mode == found


def test_keys_make_different_records():
    """Seed, sequence and position each change the draws; the same key repeats them."""
    logits = np.zeros((1, 5000), np.float32)
    records = [
        draw(logits, seed=seed, sequence=sequence, first_position=position)
        for seed in (0, 1, 2**63)
        for sequence in (0, 1, 2**63)
        for position in (0, 1, 2**32 - 1)
    ]
    assert 27 == len({r.token_ids.tobytes() for r in records})
    assert records[0] == draw(logits)


def test_no_positions_give_no_records():
    """[0, V] logits are no error."""
    assert [0] == draw(np.zeros((0, 10), np.float32)).offsets.tolist()
    assert [0] == draw(np.zeros((0, 10), np.float32), sampler="topk", k=3).offsets.tolist()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_bad_logits_are_named(bad):
    """NaN or +inf is refused with sequence, position and id."""
    logits = some_logits(positions=3)
    logits[2, 517] = bad
    with pytest.raises(ValueError, match=r"sequence 77, position 12: .*id 517"):
        draw(logits, sequence=77, first_position=10)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rounds": 0}, "rounds must be in 1..65535, got 0"),
        ({"rounds": 65536}, "rounds must be in"),
        ({"sampler": "gumbel"}, "sampler must be one of"),
        ({"k": 3}, "sampler 'multinomial' takes no k, got 3; rounds says how often to draw"),
        ({"p": 0.5}, "sampler 'multinomial' takes no p, got 0.5"),
        ({"sampler": "topk"}, "sampler 'topk' needs k$"),
        ({"sampler": "topk", "k": 0}, r"^k must be in 1\.\.65535, got 0"),
        ({"sampler": "topk", "k": 3, "p": 0.5}, "takes no p"),
        ({"sampler": "topp"}, r"sampler 'topp' needs p in \(0, 1\], got None"),
        ({"sampler": "topp", "p": 1.5}, "needs p in"),
        (
            {"sampler": "topk", "k": 3, "proposal_temperature": 0.8},
            "sampler 'topk' has no proposal: proposal_temperature must be 1",
        ),
        ({"proposal_temperature": 0}, r"proposal_temperature must be in 0\.001\.\.100, got 0"),
        ({"proposal_temperature": float("nan")}, "proposal_temperature must be in"),
        ({"seed": -1}, "seed and sequence"),
        ({"sequence": 2**64}, "seed and sequence"),
        ({"first_position": 2**32 - 1}, "first_position must be >= 0 and first_position"),
        ({"self_normalise": 2}, "self_normalise must be True or False, got 2"),
        ({"self_normalise": None}, "self_normalise must be True or False, got None"),
        ({"self_normalise": "no"}, "self_normalise must be True or False"),
        (
            {"logits": np.ma.masked_less(np.zeros((5, 3), np.float32), 1)},
            r"masked array.*logits\.filled\(-numpy\.inf\)",
        ),
        ({"dtype": "bfloat16"}, "dtype is 'bfloat16', but the logits are float32"),
        ({"logits": np.zeros(5, np.float32)}, r"logits must be \[T, V\] with V in 1\.\.2\*\*24, got shape \(5,\)"),
        ({"logits": np.zeros((5, 0), np.float32)}, r"\[T, V\]"),
        ({"logits": np.zeros((5, 3))}, r"logits must be float32, .* got <f8; convert them, as by logits\.astype"),
        ({"logits": np.zeros((1, 5, 3), np.float32)}, r"shape \(1, 5, 3\); draw takes one sequence at a time, as log"),
        ({"logits": np.zeros((5, 3), np.uint16)}, "uint16 bits with dtype='bfloat16'"),
        ({"logits": np.zeros((5, 3), ">f4")}, "native byte order"),
        ({"logits": torch.zeros((5, 3), device="meta")}, "works on the CPU"),
    ],
    ids=str,
)
def test_wrong_arguments_are_named(arguments, message):
    """Each wrong argument is a ValueError that says which and what is allowed."""
    with pytest.raises(ValueError, match=message):
        draw(**{"logits": np.zeros((2, 3), np.float32), **arguments})


def test_the_sequence_must_be_given():
    """No default gives two sequences the same random numbers."""
    with pytest.raises(TypeError, match="missing 1 required keyword-only argument: 'sequence'"):
        skl.draw(some_logits())


def test_lists_are_not_guessed_at():
    """Something that is no array is a TypeError."""
    with pytest.raises(TypeError, match="numpy array or a torch tensor"):
        draw([[1.0, 2.0]])


def test_draw_does_not_load_torch():
    """Drawing from numpy keeps a process free of torch."""
    code = (
        "import sys, numpy, sklformat.sampler as s; s.draw(numpy.zeros((1, 3), 'f4'), sequence=0); "
        "sys.exit('torch' in sys.modules)"
    )
    assert 0 == subprocess.run([sys.executable, "-c", code], check=False).returncode
