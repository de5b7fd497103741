"""What a capture refuses, each refusal once by its own words; the other tests of this folder say when."""

import numpy as np
import pytest
from capture_data import draws_of, tokens_of

import sklformat as skl
from sklformat.capture import frames, merge_draws
from sklformat.capture.ring import Ring

RATIOS = skl.Header(vocab_size=1000, seq_len=32, kind="ratios", rounds=20)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: frames.draws_array(np.zeros(3, np.uint32)),
            r"draws must be integers \[T, rounds\], got shape \(3,\) of uint32",
        ),
        (
            lambda: frames.draws_array([[-1, 1 << 32]]),
            r"draws must be in \[0, 2\*\*32\), got values from -1 to 4294967296",
        ),
        (
            lambda: frames.pack_draws(RATIOS, tokens_of(0), draws_of(0), None),
            "draws become counts, the header's kind is 'ratios'; push targets with weights",
        ),
        (
            lambda: frames.pack_targets(RATIOS, tokens_of(0), merge_draws(draws_of(0)), None),
            "the targets are of kind 'counts', the header's kind is 'ratios'",
        ),
    ],
)
def test_what_is_handed_over(call, message):
    """Draws and targets that the header has no place for are refused before they are copied."""
    with pytest.raises(ValueError, match=message):
        call()


def test_descriptors_are_handed_over_once():
    """A producer that handed its peer's descriptors over has none left to give."""
    with Ring.create(4096) as ring:
        ring.close_peer()
        with pytest.raises(ValueError, match="only a producer that has not handed over yet has descriptors to give"):
            assert ring.peer_descriptors
