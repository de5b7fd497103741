"""Numbers of a ``tf.train.Example``, read from its protocol buffer without TensorFlow."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

_VARINT, _EIGHT, _BYTES, _FOUR = 0, 1, 2, 5  # wire types
_SIZES = {_EIGHT: 8, _FOUR: 4}
_FLOATS, _INTEGERS = 2, 3  # fields of a Feature; its 1 is texts
_LONGEST_VARINT = 10


def read_example(record: bytes) -> dict[str, NDArray[Any]]:
    """
    The lists of numbers of an Example by name: int64 or float32 [n]; lists of texts are left out.

    Raises:
        ValueError: The bytes are no Example.
    """
    features = dict[str, NDArray[Any]]()
    for number, wire, message in _fields(memoryview(record)):
        if (number, wire) != (1, _BYTES):
            raise ValueError(f"not a tf.train.Example: has field {number} of wire type {wire}")
        for entry_number, entry_wire, entry in _fields(message):
            if (entry_number, entry_wire) == (1, _BYTES):
                name, values = _entry(entry)
                if values is not None:
                    features[name] = values
    return features


def _entry(entry: memoryview) -> tuple[str, NDArray[Any] | None]:
    """Name and numbers of an entry of the map of features."""
    name, values = "", None
    for number, wire, part in _fields(entry):
        if (number, wire) == (1, _BYTES):
            name = bytes(part).decode("utf-8", "replace")
        elif (number, wire) == (2, _BYTES):
            for kind, kind_wire, numbers in _fields(part):
                if kind in (_FLOATS, _INTEGERS) and kind_wire == _BYTES:
                    values = _floats(numbers) if kind == _FLOATS else _integers(numbers)
    return name, values


def _floats(numbers: memoryview) -> NDArray[Any]:
    parts = [np.zeros(0, np.float32)]
    for number, wire, part in _fields(numbers):
        if (number == 1 and wire == _BYTES and len(part) % 4 == 0) or (number, wire) == (1, _FOUR):
            parts.append(np.frombuffer(part, "<f4"))
        else:
            raise ValueError(f"not a list of floats: field {number} of wire type {wire}")
    return np.concatenate(parts)


def _integers(numbers: memoryview) -> NDArray[Any]:
    parts = [np.zeros(0, np.int64)]
    for number, wire, part in _fields(numbers):
        if (number, wire) == (1, _BYTES):
            parts.append(read_varints(part))
        elif (number, wire) == (1, _VARINT):
            parts.append(np.array([part], np.uint64).view(np.int64))
        else:
            raise ValueError(f"not a list of integers: field {number} of wire type {wire}")
    return np.concatenate(parts)


def read_varints(data: memoryview | bytes) -> NDArray[np.int64]:
    """
    The integers of a packed list of varints, each 7 bits per byte, the lowest first.

    Raises:
        ValueError: The last has no end, or one is longer than 64 bits.
    """
    octets = np.frombuffer(data, np.uint8)
    if not octets.size:
        return np.zeros(0, np.int64)
    ends = np.flatnonzero(octets < 0x80)
    if not ends.size or ends[-1] != octets.size - 1:
        raise ValueError("a list of integers ends inside one")
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    if lengths.max() > _LONGEST_VARINT:
        raise ValueError("an integer is longer than 64 bits")
    places = np.arange(octets.size) - np.repeat(starts, lengths)
    parts = (octets & 0x7F).astype(np.uint64) << (7 * places).astype(np.uint64)
    return np.bitwise_or.reduceat(parts, starts).view(np.int64)


def _fields(data: memoryview) -> Iterator[tuple[int, int, Any]]:
    """Number, wire type and value of each field: an integer of a varint, else bytes."""
    place = 0
    while place < len(data):
        key, place = _varint(data, place)
        number, wire = key >> 3, key & 7
        if wire == _VARINT:
            value, place = _varint(data, place)
            yield number, wire, value
            continue
        if wire == _BYTES:
            size, place = _varint(data, place)
        elif wire in _SIZES:
            size = _SIZES[wire]
        else:
            raise ValueError(f"a protocol buffer has no wire type {wire}")
        if place + size > len(data):
            raise ValueError("a protocol buffer ends inside a field")
        yield number, wire, data[place : place + size]
        place += size


def _varint(data: memoryview, place: int) -> tuple[int, int]:
    value = 0
    for shift, octet in enumerate(data[place : place + _LONGEST_VARINT]):
        value |= (octet & 0x7F) << 7 * shift
        if octet < 0x80:
            return value & (1 << 64) - 1, place + shift + 1
    raise ValueError("a protocol buffer ends inside a number")
