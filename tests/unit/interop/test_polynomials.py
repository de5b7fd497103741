"""DistillKit's codecs against torch, bit by bit against numbers of Python, and what settings they refuse."""

import numpy as np
import pytest
from distillkit_data import PACKED, bit_stream, legacy_words, unpacked

from sklformat.interop.neighbours.polynomials import Codec, LegacyCodec, linspace, rounded, unpack

TYPES = ("float16", "bfloat16", "float32", "float64")
HALVES = ("float16", "bfloat16")


def settings(**changed):
    return {"d": 301, "k": 8, "exact_k": 8, "residual_bins": []} | changed


@pytest.mark.parametrize("bits", [1, 2, 3, 5, 8, 9, 13, 17, 18, 25, 26, 32, 33, 57, 58, 64])
def test_bits(bits):
    """Integers of any width come out of a stream of bits as they went in."""
    rng = np.random.default_rng(bits)
    for count in (1, 3, 8, 31):
        rows = [[int.from_bytes(rng.bytes(8), "big") >> (64 - bits) for _ in range(count)] for _ in range(3)]
        rows[0] = [2**bits - 1] * count
        packed = np.array([list(bit_stream(row, bits)) for row in rows], np.uint8)
        assert unpack(packed, bits, count).tolist() == rows


@pytest.mark.parametrize("dtype", TYPES)
def test_points(dtype):
    """linspace is torch's, to the last bit in the types of 16 bits, where its own rounding moves points far."""
    torch = pytest.importorskip("torch")
    for count in [*range(1, 20), *range(20, 300, 7), 257, 512, 601]:
        points = torch.linspace(0, 1, steps=count, dtype=getattr(torch, dtype)).double().numpy()
        if dtype in HALVES:
            assert (linspace(count, dtype) == points).all()
        np.testing.assert_allclose(linspace(count, dtype), points, rtol=0, atol=1e-7)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("normalised", [False, True])
def test_terms(dtype, normalised):
    """Each term at each rank is torch's."""
    torch = pytest.importorskip("torch")
    kind, terms = getattr(torch, dtype), [-3, -2, -1, 0, 1, 2, 3, 4, 5, 6, "sqrt", "exp"]
    for count in (1, 2, 34, 112, 300):
        codec = Codec(settings(k=count, exact_k=0, polynomial_terms=terms, term_dtype=dtype, normalize_t=normalised))
        ranks = torch.linspace(0, 1, count, dtype=kind) if normalised else torch.arange(count, dtype=kind)
        for term, curve in zip(terms, codec._curves, strict=True):
            wanted = (ranks**term if isinstance(term, int) else getattr(torch, term)(ranks)).double().numpy()
            if dtype in HALVES and (dtype, term) != ("float16", -2):
                np.testing.assert_array_equal(curve, wanted)
            elif dtype not in HALVES:
                np.testing.assert_allclose(curve, wanted, rtol=1e-6)


def by_torch(packed, codec):
    """Values [T, k] of bytes [T, n], as the description of the bytes says, in torch."""
    import torch

    def take(count, dtype):
        nonlocal place
        kind = getattr(torch, dtype)
        end = place + count * kind.itemsize
        part, place = torch.tensor(packed[:, place:end].copy()), end
        return part.view(kind) if count else torch.zeros((len(packed), 0), dtype=kind)

    place, rest = 0, codec["k"] - codec["exact_k"]
    exact = take(codec["exact_k"], codec["exact_dtype"])
    fit = torch.zeros((len(packed), rest))
    if codec["polynomial_terms"]:
        kind = getattr(torch, codec["term_dtype"])
        ranks = torch.linspace(0, 1, rest, dtype=kind) if codec["normalize_t"] else torch.arange(rest, dtype=kind)
        curves = [ranks**t if isinstance(t, int) else getattr(torch, t)(ranks) for t in codec["polynomial_terms"]]
        fit = (torch.stack(curves, -1) * take(len(curves), codec["term_dtype"])[:, None]).sum(-1)
    residual, done = torch.zeros((len(packed), rest), dtype=torch.float64), 0
    for part in codec["residual_bins"]:
        bits, count = part["element_bits"], part["num_elements"]
        scale = take(1, part["scale_dtype"]).double()
        size = -(-bits * count // 8)
        for t in range(len(packed)):
            text = "".join(f"{byte:08b}" for byte in packed[t, place : place + size])
            codes = [int(text[i * bits : (i + 1) * bits], 2) for i in range(count)]
            centred = [2 * c - 1 if bits == 1 else c - 2 ** (bits - 1) for c in codes]
            residual[t, done : done + count] = torch.tensor(centred, dtype=torch.float64) * scale[t]
        place, done = place + size, done + count
    values = torch.cat([exact.double(), fit.double() + residual], 1)
    return (values.cumsum(1) if codec["delta_encoding"] else values).numpy()


@pytest.mark.parametrize("seed", range(24))
def test_codecs_against_torch(seed):
    """Any codec decodes random bytes of plausible numbers as torch does."""
    pytest.importorskip("torch")
    rng = np.random.default_rng(seed)
    k = int(rng.integers(2, 40))
    exact_k = int(rng.integers(0, k))
    rest, bins = k - exact_k, []
    while rest and len(bins) < 3 and rng.random() < 0.7:
        size = int(rng.integers(1, rest + 1))
        bins.append(
            {
                "scale_dtype": str(rng.choice(TYPES)),
                "element_bits": int(rng.choice([1, 2, 4, 5, 8, 11, 16])),
                "num_elements": size,
            }
        )
        rest -= size
    terms = [[0], [0, 1, 2], [0, 1, 2, 3, 4, "sqrt"], [1, "exp"]][seed % 4] if rng.random() < 0.8 or not bins else None
    codec = settings(
        k=k,
        exact_k=exact_k,
        exact_dtype=str(rng.choice(TYPES)),
        polynomial_terms=terms,
        term_dtype=str(rng.choice(TYPES)),
        residual_bins=bins,
        delta_encoding=bool(rng.random() < 0.5),
        normalize_t=bool(rng.random() < 0.7) or terms == [1, "exp"],
    )
    rows = []
    for _ in range(5):
        raw = b"".join(PACKED[codec["exact_dtype"]](x) for x in rng.normal(size=exact_k))
        raw += b"".join(PACKED[codec["term_dtype"]](x) for x in rng.normal(size=len(terms or ())) * 1e-3)
        for part in bins:
            raw += PACKED[part["scale_dtype"]](rng.random() * 0.01)
            raw += rng.bytes(-(-part["element_bits"] * part["num_elements"] // 8))
        rows.append(list(raw))
    packed, made = np.array(rows, np.uint8), Codec(codec)
    assert packed.shape[1] == made.value_bytes
    wanted = by_torch(packed, codec)
    size = max(1.0, np.abs(wanted).max())
    step = {"float16": 2e-3, "bfloat16": 1.6e-2}.get(codec["term_dtype"], 3e-6)  # one rounding of another order of sums
    np.testing.assert_allclose(made.decode_values(packed), wanted, rtol=0, atol=size * step)


def test_lost_values_stay_lost():
    """NaN and infinity come out as they are, for a check to refuse."""
    raw = b"".join(PACKED["bfloat16"](x) for x in (-1.0, float("-inf"), float("nan")))
    codec = Codec(settings(k=3, exact_k=3, exact_dtype="bfloat16", delta_encoding=False))
    values = codec.decode_values(np.array([list(raw)], np.uint8))[0]
    assert values[0] == -1
    assert values[1] == -np.inf
    assert np.isnan(values[2])


@pytest.mark.parametrize("dtype", TYPES)
def test_roundings(dtype):
    """Rounding to a stored type is what its bytes give back."""
    for x in [0.0, 1.0, -1.00390625, 1.01171875, 3.14159, 65504.0, -1e-7]:
        assert rounded(np.array([x]), dtype)[0] == unpacked(PACKED[dtype](x), dtype)
    assert np.isinf(rounded(np.array([1e30]), dtype))[0] == (dtype == "float16")
    assert np.isnan(rounded(np.array([np.nan]), dtype))[0]


@pytest.mark.parametrize("inverted", [True, False])
@pytest.mark.parametrize("root", [True, False])
def test_legacy(inverted, root):
    """Words of ids and a polynomial in the number of the value."""
    rng = np.random.default_rng(0)
    ids = rng.permutation(151_936)[:10].tolist()
    codec = LegacyCodec(
        {
            "vocab_size": 151_936,
            "k": 10,
            "exact_k": 3,
            "polynomial_degree": 2,
            "invert_polynomial": inverted,
            "with_sqrt_term": root,
        }
    )
    words = legacy_words(ids, 151_936)
    assert len(words) == codec.words == 4
    for kind in (np.uint64, np.int64):
        assert codec.decode_ids(np.array([words], np.uint64).view(kind)).tolist() == [ids]
    exact, terms = rng.normal(size=(1, 3)), rng.normal(size=(1, codec.terms))
    sign, roots = -1 if inverted else 1, terms[0][3] if root else 0
    wanted = [sum(c * n ** (sign * j) for j, c in enumerate(terms[0][:3])) + roots * n**0.5 for n in range(1, 8)]
    np.testing.assert_allclose(codec.decode_values(exact, terms)[0], [*exact[0], *wanted])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"k": None}, "k must be a whole number of at least 1, it is None"),
        ({"exact_k": -1}, "exact_k must be a whole number of at least 0"),
        ({"exact_k": 9}, "exact_k 9 and residual_bins hold more than k 8 values"),
        ({"exact_k": 5}, "neither polynomial_terms nor residual_bins hold the last 3 of k 8 values"),
        ({"exact_dtype": "int8"}, "exact_dtype must be float16, bfloat16, float32, float64, it is 'int8'"),
        ({"exact_k": 0, "polynomial_terms": ["log"]}, "polynomial_terms must be powers, sqrt or exp, one is 'log'"),
        (
            {"exact_k": 0, "residual_bins": [{"scale_dtype": "float16", "element_bits": 65, "num_elements": 8}]},
            "element_bits of residual_bins must be at most 64",
        ),
        ({"exact_k": 0, "residual_bins": [7]}, "scale_dtype must be float16"),
    ],
)
def test_settings_that_can_not_be(changed, message):
    """A codec without what decoding needs is refused, by the name of the setting."""
    with pytest.raises(ValueError, match=message):
        Codec(settings(**changed))


def test_legacy_settings_that_can_not_be():
    """So is one of the first release."""
    with pytest.raises(ValueError, match="exact_k 4 is more than k 2"):
        LegacyCodec({"vocab_size": 9, "k": 2, "exact_k": 4, "polynomial_degree": 1})
