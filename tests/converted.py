"""Conversions of other systems' files, and the probabilities that must come out of them."""

import numpy as np

import sklformat as skl
from sklformat.interop import convert
from sklformat.settings.convert import ConvertConfig


def run(source, destination, **settings):
    """``convert`` with these settings."""
    return convert(ConvertConfig(source=source, destination=destination, **settings))


def records(cache, i):
    """Ids and weights, or counts, of each position of a sequence, in order of ids."""
    targets = skl.open(cache)[i].targets
    values = targets.weights if targets.counts is None else targets.counts
    found = []
    for begin, end in zip(targets.offsets[:-1], targets.offsets[1:], strict=True):
        order = np.argsort(targets.token_ids[begin:end])
        found.append((targets.token_ids[begin:end][order].tolist(), values[begin:end][order]))
    return found


def patch_zip(path, field, number):
    """Set 16 bits, "flags" or "method", in the head of each member of a zip file, and in its list of them."""
    place = {"flags": 6, "method": 8}[field]
    data = bytearray(path.read_bytes())
    for mark, shift in ((b"PK\x03\x04", 0), (b"PK\x01\x02", 2)):
        at = data.find(mark)
        while at >= 0:
            data[at + place + shift : at + place + shift + 2] = number.to_bytes(2, "little")
            at = data.find(mark, at + 1)
    path.write_bytes(data)


def assert_probs(cache, i, ids, probs, rtol=0.05):
    """Sequence i has these ids [T][k] with these probabilities, as nearly as the ratio code keeps them."""
    found = records(cache, i)
    assert len(found) == len(ids)
    for (got_ids, got), want_ids, want in zip(found, ids, probs, strict=True):
        order = np.argsort(want_ids)
        assert got_ids == np.asarray(want_ids)[order].tolist()
        np.testing.assert_allclose(got, np.asarray(want)[order], rtol=rtol, atol=2e-4)
