"""The door to C: shapes, room, and errors of the codec."""

import contextlib
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import reference

from sklformat import native
from sklformat.errors import CorruptError, TruncatedError, UnsupportedError
from sklformat.native import Shape

CSRC = Path(__file__).resolve().parents[3] / "csrc"
BIN = Path(sys.executable).parent
SHAPE = Shape(
    kind=1,
    profile=1,
    record_count_size=1,
    token_size=2,
    columns=1,
    vocab_size=10,
    rounds=5,
    num_positions=2,
    num_records=3,
)
OFFSETS = np.array([0, 2, 3])
IDS = np.array([1, 5, 9], np.uint32)
COUNTS = np.array([2, 3, 5], np.uint8)
TOKENS = np.array([1, 2, 3], np.uint32)
COLUMN = np.array([7, 8, 9, 10], np.uint8)


def encoded() -> np.ndarray:
    out = np.zeros(native.payload_size(SHAPE) + 64, np.uint8)
    assert native.payload_size(SHAPE) == native.encode(SHAPE, OFFSETS, IDS, COUNTS, TOKENS, COLUMN, out)
    return out


def test_sizes_follow_from_the_shape():
    """2 positions, 3 records of 3 bytes, 3 tokens of 2 and a column of 2 make 21 bytes."""
    assert native.payload_size(SHAPE) == 2 + 9 + 6 + 4


def test_round_trip():
    """decode gives the arrays that encode took; tokens and columns only where they are wanted."""
    for got, want in zip(native.decode(SHAPE, encoded()), (OFFSETS, IDS, COUNTS, TOKENS, COLUMN), strict=True):
        assert want.tolist() == got.tolist()
        assert want.dtype == got.dtype
    *_, tokens, columns = native.decode(SHAPE, encoded(), tokens=False, columns=False)
    assert tokens is None
    assert columns is None


def test_outputs_own_their_memory():
    """Nothing that decode returns looks into the payload."""
    payload = encoded()
    decoded = native.decode(SHAPE, payload)
    assert not any(np.shares_memory(payload, array) for array in decoded)


def test_no_room():
    """Too little room is our own bug, not the user's."""
    with pytest.raises(AssertionError, match="SKL_ERR_DST_SMALL"):
        native.encode(SHAPE, OFFSETS, IDS, COUNTS, TOKENS, COLUMN, np.zeros(20, np.uint8))


def test_wrong_arrays_never_reach_c():
    """An array of another length or type than the shape says is caught before C sees it."""
    out = np.zeros(200, np.uint8)
    for wrong in (IDS[:2], IDS.astype(np.int64), np.repeat(IDS, 2)[::2]):
        with pytest.raises(ValueError, match="C needs 3 uint32 in one piece, got"):
            native.encode(SHAPE, OFFSETS, wrong, COUNTS, TOKENS, COLUMN, out)
    with pytest.raises(ValueError, match="sizes contradict"):
        native.encode(SHAPE, OFFSETS, IDS, COUNTS, None, COLUMN, out)


@pytest.mark.parametrize("offsets", [[0, 2, 1 << 40], [0, 1 << 40, 2], [0, 2, 4], [0, 3, 2], [0, 1, 1], [1, 1, 2]])
def test_offsets_of_other_arrays_never_reach_past_these(offsets):
    """Offsets that a caller rewrote after they were checked are refused, never followed; kind ratios as kind counts."""
    offsets, ids, codes = np.array(offsets), np.array([1, 2], np.uint32), np.array([0, 1], np.uint8)
    for call in (
        lambda: native.quantise(offsets, ids, np.array([0.5, 0.5], np.float32), 0),
        lambda: native.check_distinct(offsets, ids),
        lambda: native.expand(offsets, codes, 0),
        lambda: native.encode(Shape(2, 1, 1, 0, 0, 10, 0, 2, 2), offsets, ids, codes, None, None, np.zeros(99, "u1")),
    ):
        with pytest.raises(ValueError, match=r"sizes contradict|SKL_ERR_ARG"):
            call()


@pytest.mark.parametrize("name", ["offsets", "token_ids", "weights"])
def test_wrong_arrays_of_ratios_never_reach_c(name):
    """Arrays of other lengths than each other, of other types or with gaps are refused, not read beyond their end."""
    arrays = {
        "offsets": np.array([0, 4]),
        "token_ids": np.arange(4, dtype=np.uint32),
        "weights": np.full(4, 0.25, np.float32),
    }
    native.quantise(**arrays, scale_log2=0)
    for wrong in (arrays[name][:1], arrays[name].astype(np.float64), np.repeat(arrays[name], 2)[::2]):
        with pytest.raises(ValueError, match=r"C needs|sizes contradict"):
            native.quantise(**arrays | {name: wrong}, scale_log2=0)


def test_short_payload():
    """A payload without its 64 bytes of padding is truncated; nothing is allocated for a claim it cannot hold."""
    with pytest.raises(TruncatedError):
        native.decode(SHAPE, encoded()[:-1])
    claim = Shape(1, 1, 1, 0, 0, 10, 5, 1 << 22, (1 << 22) * 65535)
    with pytest.raises(TruncatedError):
        native.decode(claim, bytes(1000))


def test_corrupt_payload():
    """A fault names position and value."""
    payload = encoded()
    payload[5] = 10  # the second record's id
    with pytest.raises(CorruptError, match="position 0: token id 10 is not below vocab_size"):
        native.decode(SHAPE, payload)


def test_unknown_shape():
    """A shape without meaning is refused."""
    with pytest.raises(ValueError, match="SKL_ERR_ARG"):
        native.payload_size(Shape(3, 1, 1, 0, 0, 10, 5, 1, 1))


def test_quantise_orders_and_leaves_out():
    """Weights come back sorted, equal ones by id; those too small for the code are left out, position by position."""
    offsets, ids, codes = native.quantise(
        np.array([0, 4, 4, 5]),
        np.array([9, 4, 8, 1, 3], np.uint32),
        np.array([0.25, 0.5, 0.25, 1e-30, 1.0], np.float32),
        0,
    )
    assert offsets.tolist() == [0, 3, 3, 4]
    assert ids.tolist() == [4, 8, 9, 3]
    assert codes.tolist() == [32, 32, 0, 0]
    assert native.expand(offsets, codes, 0).tolist() == [0.5, 0.25, 0.25, 1.0]
    assert native.expand(offsets, codes, 3).tolist() == [4.0, 2.0, 2.0, 8.0]


@pytest.mark.parametrize(
    ("ids", "weights", "message"),
    [
        ([1, 2], [0.5, 0.0], r"position 0: weight number 1 is not in \(0, scale\]"),
        ([1, 2], [0.5, float("nan")], "weight number 1"),
        ([1, 2], [1.5, 0.5], "weight number 0"),
        ([2, 2], [0.5, 0.5], "token id 2 comes twice"),
    ],
)
def test_quantise_refuses(ids, weights, message):
    """A weight out of range or an id that comes twice is refused, with its place."""
    with pytest.raises(ValueError, match=message):
        native.quantise(np.array([0, 2]), np.array(ids, np.uint32), np.array(weights, np.float32), 0)


def test_quantise_while_subnormal_numbers_are_flushed():
    """Weights that are subnormal are above 0 and differ from each other, also where a process flushes them to zero."""
    torch = pytest.importorskip("torch")
    offsets, ids = np.array([0, 3, 53]), np.arange(53, dtype=np.uint32)[::-1].copy()
    weights = np.concatenate([[1.0, 3e-41, 1e-41], np.exp2(-np.arange(50.0) * 3)]).astype(np.float32)
    expected = native.quantise(offsets, ids, weights, 0)
    supported = torch.set_flush_denormal(True)
    try:
        actual = native.quantise(offsets, ids, weights, 0)
    finally:
        torch.set_flush_denormal(False)
    if supported:
        for one, other in zip(expected, actual, strict=True):
            np.testing.assert_array_equal(one, other)


def test_an_id_may_come_again_elsewhere():
    """The same id in two positions is no fault; nor is a position without ids."""
    native.check_distinct(np.array([0, 2, 2, 3]), np.array([1, 2, 1], np.uint32))
    native.check_distinct(np.array([0, 0]), np.array([], np.uint32))


@pytest.mark.parametrize("longest", [2, 5, 17, 300])
def test_ids_are_compared_within_every_position(longest):
    """Wherever an id comes twice, it is found and its position named: in short and in long positions."""
    rng = np.random.default_rng(longest)
    lengths = rng.integers(0, longest + 1, 400)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    ids = np.concatenate([rng.choice(1 << 17, n, replace=False) for n in lengths]).astype(np.uint32)
    native.check_distinct(offsets, ids)
    for position in rng.choice(np.flatnonzero(lengths >= 2), 100):
        first, second = offsets[position] + rng.choice(lengths[position], 2, replace=False)
        changed = ids.copy()
        changed[first] = changed[second]
        with pytest.raises(CorruptError, match=f"position {position}: token id {changed[second]} comes twice"):
            native.check_distinct(offsets, changed)


@pytest.mark.parametrize("spread", [1e-6, 0.3, 3.0, 12.0])
def test_quantise_is_the_reference(spread):
    """Codes are those of SPEC 4.3, for flat and steep positions, of few records and of many, ids in order or not."""
    rng = np.random.default_rng(0)
    lengths = [*range(1, 60), 300]
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    weights = np.exp2(-spread * rng.exponential(size=offsets[-1])).astype(np.float32)
    weights[rng.random(weights.size) < 0.1] = 0.5  # some are equal
    ids = np.concatenate([rng.permutation(1000)[:n] for n in lengths]).astype(np.uint32)
    for t in range(0, len(lengths), 2):
        ids[offsets[t] : offsets[t + 1]].sort()
    kept, kept_ids, codes = native.quantise(offsets, ids, weights, 0)
    for t in range(len(lengths)):
        part, found = slice(offsets[t], offsets[t + 1]), slice(kept[t], kept[t + 1])
        expected = reference.encode_ratios(list(zip(ids[part].tolist(), weights[part].tolist(), strict=True)), 0)
        assert expected == list(zip(kept_ids[found].tolist(), codes[found].tolist(), strict=True))


IS_ARM = platform.machine() in ("aarch64", "arm64")


@pytest.fixture(params=["portable", "neon"] if IS_ARM else ["portable", "avx2", "avx512"])
def kernels(request):
    name = native.kernels_name()
    with contextlib.suppress(UnsupportedError):
        native.use_kernels(request.param)
        yield request.param
        native.use_kernels(name)
        return
    pytest.skip(f"no {request.param} here")


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the flags are those of x86")
@pytest.mark.skipif(not (compiler := shutil.which("cc")), reason="no C compiler")
def test_compiler_flags_do_not_choose_the_kernels():
    """What the portable kernels hold does not depend on what the compiler's flags, such as -march=native, allow."""
    source = CSRC / "kernels_portable.c"
    plain, wide = (
        subprocess.run([compiler, "-E", "-P", *flags, source], capture_output=True, check=True).stdout
        for flags in ([], ["-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"])
    )
    assert plain == wide


@pytest.mark.skipif(not (BIN / "cmake").exists() or not (BIN / "ninja").exists(), reason="no CMake")
@pytest.mark.skipif(not compiler, reason="no C compiler")
def test_the_compiler_says_whether_it_is_one_for_x86(tmp_path):
    """A compiler for something else, on a machine that calls itself x86_64, gets the portable kernels."""
    configure = [BIN / "cmake", "-S", CSRC, "-B", tmp_path, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={BIN / 'ninja'}"]
    # Without this the C library's headers are not found: a configuration that goes no further than the question.
    subprocess.run([*configure, "-DSKL_TESTS=ON", "-DCMAKE_C_FLAGS=-U__x86_64__"], capture_output=True, check=False)
    assert "SKL_HAS_X86_KERNELS:INTERNAL=\n" in (tmp_path / "CMakeCache.txt").read_text()


def test_c_needs_no_headers_of_the_kernel():
    """A C library that comes without them, such as musl, compiles the ring too."""
    assert [] == [path.name for path in CSRC.iterdir() if "#include <linux/" in path.read_text()]


PROFILES = {"R24": (1, 1 << 17, 127), "R24W": (2, 1 << 18, 63), "R32": (3, 1 << 24, 127)}


@pytest.mark.parametrize("profile", PROFILES)
def test_records_are_packed_low_bits_first(profile, kernels):
    """A record is id + code * 2^id_bits in 3 or 4 little-endian bytes, for any number of records; nothing behind."""
    number, vocab_size, most = PROFILES[profile]
    rng = np.random.default_rng(number)
    for records in [*range(1, 40), 1000]:
        ids = np.sort(rng.choice(vocab_size, records, replace=False)).astype(np.uint32)
        codes = np.concatenate([rng.integers(0, 2, records - 1), [most]]).astype(np.uint8)  # v stays above 0
        shape = Shape(2 if most == 127 else 1, number, 2, 0, 0, vocab_size, 63, 1, records)
        if most == 63:  # no ratios: one position a record instead
            shape = Shape(1, number, 2, 0, 0, vocab_size, 63, records, records)
            codes[:] = 63
        size = native.payload_size(shape)
        out = np.full(size + 64, 0xAA, np.uint8)
        offsets = np.linspace(0, records, shape.num_positions + 1).astype(np.int64)
        native.encode(shape, offsets, ids, codes, None, None, out)
        width = 4 if profile == "R32" else 3
        words = ids.astype(np.uint64) | codes.astype(np.uint64) << np.uint64(vocab_size.bit_length() - 1)
        expected = words.astype("<u4").view(np.uint8).reshape(-1, 4)[:, :width]
        assert expected.tobytes() == out[size - records * width : size].tobytes()
        assert (out[size:] == 0xAA).all()


@pytest.mark.parametrize("at", [0, 7, 8, 15, 16, 37])
def test_bad_records_are_refused_wherever_they_stand(at, kernels):
    """An id or count that breaks a rule is named with its position and value, on vectors and behind them."""
    shape = Shape(1, 1, 1, 0, 0, 100_000, 3, 38, 38 * 3)
    offsets = np.arange(39) * 3
    ids = np.tile(np.array([5, 70_000, 99_999], np.uint32), 38)
    counts = np.ones(38 * 3, np.uint8)
    out = np.zeros(native.payload_size(shape), np.uint8)
    native.encode(shape, offsets, ids, counts, None, None, out)
    for place, array, value, message in (
        (3 * at, ids, 70_000, f"position {at}: token id 70000 comes twice or out of order"),
        (3 * at + 2, ids, 100_000, f"position {at}: token id 100000 is not below vocab_size"),
        (3 * at + 2, ids, 2**32 - 1, f"position {at}: token id 4294967295 is not below vocab_size"),
        (3 * at + 1, counts, 0, f"position {at}: count 0 is not in 1..rounds"),
        (3 * at + 1, counts, 255, f"position {at}: count 255 is not in 1..rounds"),
        (3 * at + 1, counts, 2, f"position {at}: counts sum to 4, not to rounds"),
    ):
        before, array[place] = int(array[place]), value
        with pytest.raises(ValueError, match=message):
            native.encode(shape, offsets, ids, counts, None, None, out)
        array[place] = before


def test_bad_ratios_are_refused():
    """Equal weights out of order of ids, a code beyond 7 bits and one that takes the weight to 0 are named."""
    shape = Shape(2, 1, 1, 0, 0, 100, 0, 2, 6)
    offsets, ids = np.array([0, 3, 6]), np.array([7, 8, 9, 4, 3, 2], np.uint32)
    out = np.zeros(native.payload_size(shape), np.uint8)
    native.encode(shape, offsets, ids, np.array([0, 0, 1, 0, 1, 2], np.uint8), None, None, out)
    for codes, message in (
        ([0, 0, 0, 0, 0, 1], "position 1: token id 3 comes twice or out of order"),
        ([0, 0, 128, 0, 1, 1], "position 0: ratio code 128"),
        ([0, 1, 1, 127, 127, 127], "position 1: ratio code 127 takes the weight to zero"),
    ):
        with pytest.raises(ValueError, match=message):
            native.encode(shape, offsets, ids, np.array(codes, np.uint8), None, None, out)
