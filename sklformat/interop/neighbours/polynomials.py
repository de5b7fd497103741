"""
DistillKit's codecs of log-probs: some exact values, a curve through the others by their rank, and what is left of it.

A position of k values and ids, the most probable first.  The first ``exact_k`` values are stored as they are; the
others are a sum of terms of their rank, with one coefficient for each term, plus residuals in integers of some bits
with one scale for each bin of them.  With ``delta_encoding`` all of this is about the difference to the value before.
Ids are a stream of bits, the first id in the first bits.

Arithmetic is that of torch on a CPU, rounded to the stored types where torch rounds, so that the curve is the one
that the residuals were taken from.  Reads no file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
_SPECIAL = {"sqrt": np.sqrt, "exp": np.exp}
_MOST = 1 << 20  # of ids, values and bits, beyond which a setting is a mistake


def id_bits(size: int) -> int:
    """Bits of an id below ``size``, as DistillKit reckons in float32."""
    return int(np.ceil(np.log2(np.float32(size))))


@dataclass(frozen=True, slots=True)
class Bin:
    """Residuals of the next ``num_elements`` values: a scale, then integers of ``element_bits`` each."""

    scale_dtype: str
    element_bits: int
    num_elements: int

    @property
    def num_bytes(self) -> int:
        return _BYTES[self.scale_dtype] + -(-self.element_bits * self.num_elements // 8)


class Codec:
    """
    The codec that a ``compression_config`` says.

    Args:
        settings: Its settings, as JSON has them.

    Attributes:
        size: Ids are below it, the codec's d.
        k: Values of a position.
        exact_k: Of these, stored as they are.
        value_bytes, id_bytes: Of a position.

    Raises:
        ValueError: A setting is missing or can't be; names it.
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.size, self.k = _integer(settings, "d", 1), _integer(settings, "k", 1)
        self.exact_k = _integer(settings, "exact_k", 0)
        self._exact_dtype = _dtype(settings, "exact_dtype")
        self._term_dtype = _dtype(settings, "term_dtype")
        self._terms = tuple(_term(term) for term in settings.get("polynomial_terms") or ())
        self._bins = tuple(
            Bin(_dtype(part, "scale_dtype"), _integer(part, "element_bits", 1), _integer(part, "num_elements", 1))
            for part in settings.get("residual_bins") or ()
        )
        self._delta = bool(settings.get("delta_encoding", True))
        self._normalised = bool(settings.get("normalize_t", False))
        rest = self.k - self.exact_k
        if rest < 0 or sum(part.num_elements for part in self._bins) > rest:
            raise ValueError(f"exact_k {self.exact_k} and residual_bins hold more than k {self.k} values")
        if rest and not self._terms and not self._bins:
            raise ValueError(f"neither polynomial_terms nor residual_bins hold the last {rest} of k {self.k} values")
        if any(part.element_bits > 64 for part in self._bins):
            raise ValueError("element_bits of residual_bins must be at most 64")
        self.value_bytes = (
            self.exact_k * _BYTES[self._exact_dtype]
            + len(self._terms) * _BYTES[self._term_dtype]
            + sum(part.num_bytes for part in self._bins)
        )
        self.id_bytes = -(-self.k * self.bits // 8)
        with np.errstate(all="ignore"):  # of terms that no rank 0 has, such as 1 / t
            self._curves = [self._curve(term, rest) for term in self._terms]

    @property
    def bits(self) -> int:
        """Of an id."""
        return id_bits(self.size)

    def decode_ids(self, packed: NDArray[np.uint8]) -> NDArray[np.unsignedinteger[Any]]:
        """Ids [T, k] of bytes [T, id_bytes]."""
        return unpack(packed, self.bits, self.k)

    def decode_values(self, packed: NDArray[np.uint8]) -> NDArray[np.float64]:
        """Natural log-probs [T, k] of bytes [T, value_bytes]; NaN where a value was lost."""
        exact, begin = self._floats(packed, 0, self._exact_dtype, self.exact_k)
        rest = np.zeros((len(packed), self.k - self.exact_k), exact.dtype)
        with np.errstate(all="ignore"):  # NaN and infinities stay, for a check to see
            if self._terms:
                coefficients, begin = self._floats(packed, begin, self._term_dtype, len(self._terms))
                rest = self._fit(coefficients)
            place = 0
            for part in self._bins:
                scale, begin = self._floats(packed, begin, part.scale_dtype, 1)
                size = part.num_bytes - _BYTES[part.scale_dtype]
                codes = unpack(packed[:, begin : begin + size], part.element_bits, part.num_elements)
                rest[:, place : place + part.num_elements] += _centred(codes, part.element_bits) * scale
                begin, place = begin + size, place + part.num_elements
            values = np.concatenate([exact, rest], axis=1)
            if self._delta:
                values = np.cumsum(values, axis=1, dtype=np.result_type(values, np.float32))
        return values.astype(np.float64)

    def _floats(
        self, packed: NDArray[np.uint8], begin: int, dtype: str, count: int
    ) -> tuple[NDArray[np.floating[Any]], int]:
        """Numbers [T, count] that begin at a byte, and where they end."""
        end = begin + count * _BYTES[dtype]
        raw = np.ascontiguousarray(packed[:, begin:end])
        if dtype == "bfloat16":
            return (raw.view("<u2").astype(np.uint32) << 16).view(np.float32), end
        floats: NDArray[np.floating[Any]] = raw.view(np.dtype(dtype).newbyteorder("<"))
        return floats.astype(np.float32) if dtype == "float16" else floats.astype(dtype), end

    def _fit(self, coefficients: NDArray[np.floating[Any]]) -> NDArray[np.floating[Any]]:
        """The curve [T, n] through the values that are not exact."""
        dtype = self._term_dtype
        total = np.zeros((len(coefficients), self.k - self.exact_k), coefficients.dtype)
        for number, curve in enumerate(self._curves):
            total += rounded(coefficients[:, number : number + 1] * curve, dtype)
        return rounded(total, dtype)

    def _curve(self, term: int | str, count: int) -> NDArray[np.floating[Any]]:
        """A term at each of ``count`` ranks, with torch's roundings on the way."""
        dtype = self._term_dtype
        ranks = linspace(count, dtype) if self._normalised else rounded(np.arange(count, dtype=np.float64), dtype)
        if isinstance(term, str):
            return rounded(_SPECIAL[term](ranks.astype(np.float64)), dtype)
        if dtype == "bfloat16" and term in (3, -2):  # torch makes these of the rounded square
            square = rounded(ranks * ranks, dtype)
            return rounded(square * ranks if term == 3 else 1 / square, dtype)
        return rounded(ranks.astype(np.float64) ** term, dtype)


class LegacyCodec:
    """
    The codec of DistillKit's first release: exact values, and a polynomial in 1 / n for the n-th of the others.

    Args:
        settings: As ``Codec``.

    Attributes:
        size: Ids are below it, its vocab_size.
        k, exact_k: As ``Codec``.
        terms: Coefficients of a position.
        words: 64-bit words of ids of a position.

    Raises:
        ValueError: As ``Codec``.
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.size, self.k = _integer(settings, "vocab_size", 1), _integer(settings, "k", 1)
        self.exact_k, degree = _integer(settings, "exact_k", 0), _integer(settings, "polynomial_degree", 0)
        if self.exact_k > self.k:
            raise ValueError(f"exact_k {self.exact_k} is more than k {self.k}")
        sign = -1 if settings.get("invert_polynomial", True) else 1
        ranks = np.arange(1, self.k - self.exact_k + 1, dtype=np.float64)
        curves = [ranks ** (sign * power) for power in range(degree + 1)]
        curves += [np.sqrt(ranks)] if settings.get("with_sqrt_term", False) else []
        self._curves, self.terms = np.stack(curves), len(curves)
        self._bits = id_bits(self.size)
        self._in_word = 64 // max(self._bits, 1)
        self.words = -(-self.k // self._in_word)

    def decode_ids(self, packed: NDArray[Any]) -> NDArray[np.uint64]:
        """Ids [T, k] of words [T, words]; the first id of a word is in its lowest bits."""
        shifts = np.arange(self._in_word, dtype=np.uint64) * np.uint64(self._bits)
        ids = (packed.astype(np.uint64)[:, :, None] >> shifts) & np.uint64((1 << self._bits) - 1)
        flat: NDArray[np.uint64] = ids.reshape(len(packed), -1)[:, : self.k]
        return flat

    def decode_values(self, exact: NDArray[Any], coefficients: NDArray[Any]) -> NDArray[np.float64]:
        """Values [T, k] of exact ones [T, exact_k] and coefficients [T, terms]."""
        rest = np.zeros((len(exact), self.k - self.exact_k))
        with np.errstate(all="ignore"):
            for number, curve in enumerate(self._curves):  # in one order on every machine, which a product has not
                rest += coefficients[:, number : number + 1].astype(np.float64) * curve
        return np.concatenate([exact.astype(np.float64), rest], axis=1)


def unpack(packed: NDArray[np.uint8], bits: int, count: int) -> NDArray[np.unsignedinteger[Any]]:
    """
    Integers [T, count] of some bits each, 0 to 64, in bytes [T, n]: one behind the other, highest bit first.

    As uint32 where they fit, else as uint64.
    """
    dtype: Any = np.uint32 if bits <= 32 else np.uint64
    period = 8 // math.gcd(bits, 8)  # integers, after which one begins with a byte again
    groups, size = -(-count // period), bits * period // 8
    padded = np.zeros((len(packed), groups * size), np.uint8)
    padded[:, : packed.shape[1]] = packed
    planes: list[NDArray[Any]] = [padded[:, place::size].astype(dtype) for place in range(size)]
    values: NDArray[np.unsignedinteger[Any]] = np.zeros((len(packed), groups, period), dtype)
    for number in range(period if bits else 0):
        end = (number + 1) * bits
        last, behind = (end - 1) // 8, -end % 8
        value: NDArray[Any] = np.zeros_like(planes[0])
        for plane in planes[number * bits // 8 : last]:
            value = (value << 8) | plane  # what does not belong to it leaves on the left
        values[:, :, number] = (value << (8 - behind)) | (planes[last] >> behind)
    values &= dtype((1 << bits) - 1)
    return values.reshape(len(packed), -1)[:, :count]


def rounded(values: NDArray[np.floating[Any]], dtype: str) -> NDArray[np.floating[Any]]:
    """Values rounded to a type, halves to even; in float64 for float64, else in float32."""
    if dtype == "float64":
        return values.astype(np.float64)
    single = values.astype(np.float32)
    if dtype == "float16":
        with np.errstate(over="ignore"):
            return single.astype(np.float16).astype(np.float32)
    if dtype == "bfloat16":
        raw = single.view(np.uint32)
        near = (raw + (0x7FFF + ((raw >> 16) & 1)).astype(np.uint32)) & np.uint32(0xFFFF0000)
        return np.where(np.isnan(single), single, near.view(np.float32))
    return single


def linspace(count: int, dtype: str) -> NDArray[np.floating[Any]]:
    """Points from 0 to 1 as ``torch.linspace`` has them: it steps from both ends, and rounds number, step and point."""
    if count < 2:
        return rounded(np.zeros(count), dtype)
    up = rounded(np.arange(count, dtype=np.float64), dtype)
    step = rounded(1 / up[-1:], dtype)
    points = rounded(step * up, dtype)
    return np.where(np.arange(count) < count // 2, points, rounded(1 - points[::-1], dtype))


def _centred(codes: NDArray[np.unsignedinteger[Any]], bits: int) -> NDArray[np.float32]:
    """Residuals in units of the scale; one bit says -1 or 1, as DistillKit reads it."""
    if bits == 1:
        return codes.astype(np.float32) * 2 - 1
    return (codes.astype(np.uint64) - np.uint64(1 << (bits - 1))).view(np.int64).astype(np.float32)


def _integer(settings: Mapping[str, Any], name: str, least: int) -> int:
    value = settings.get(name) if isinstance(settings, Mapping) else None
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= _MOST * 2:
        raise ValueError(f"{name} must be a whole number of at least {least}, it is {value!r}")
    return value


def _dtype(settings: Mapping[str, Any], name: str) -> str:
    value = settings.get(name, "float32") if isinstance(settings, Mapping) else None
    if value not in _BYTES:
        raise ValueError(f"{name} must be {', '.join(_BYTES)}, it is {value!r}")
    return str(value)


def _term(term: Any) -> int | str:
    if (isinstance(term, int) and not isinstance(term, bool) and abs(term) < 64) or term in _SPECIAL:
        return int(term) if isinstance(term, int) else str(term)
    raise ValueError(f"polynomial_terms must be powers, sqrt or exp, one is {term!r}")
