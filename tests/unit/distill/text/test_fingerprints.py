"""Which tokenizer made data: the map from ids to tokens decides; roles and tokens behind do not."""

import re

import pytest
import xxhash

from sklformat.distill.text.fingerprints import MadeBy, tokenizer_fingerprint, vocabulary_fingerprint

PAIRS = [(1, "é"), (0, "a"), (2, "<eot>")]


class Vocabulary:
    """What the fingerprints ask of a tokenizer."""

    def __init__(self, pairs, special=(2,)):
        self._map = {token: token_id for token_id, token in pairs}
        self.all_special_ids = list(special)

    def get_vocab(self):
        return self._map


def test_vocabulary_fingerprint_is_the_digest_of_the_map_below_a_bound():
    """It is XXH3-128 of a canonical text without roles and without ids above, so that any program can compute it."""
    canonical = b'{"tokens":[[0,"a"],[1,"\\u00e9"]]}'
    assert xxhash.xxh3_128_hexdigest(canonical) == vocabulary_fingerprint(Vocabulary(PAIRS), 2)
    assert vocabulary_fingerprint(Vocabulary(PAIRS), 2) == vocabulary_fingerprint(Vocabulary(PAIRS[:2], ()), 2)
    assert vocabulary_fingerprint(Vocabulary(PAIRS), 2) != vocabulary_fingerprint(Vocabulary(PAIRS), 3)


MAKER = Vocabulary(PAIRS)
SAID = MadeBy(tokenizer_fingerprint(MAKER), 3, vocabulary_fingerprint(MAKER, 3))


@pytest.mark.parametrize(
    "tokenizer",
    [
        MAKER,
        Vocabulary(PAIRS, special=(0, 1)),  # another end of text, a padding token
        Vocabulary([*PAIRS, (3, "<pad>"), (7, "<image>")], special=(2, 3)),  # tokens behind
    ],
)
def test_the_map_decides(tokenizer):
    """Other roles, and tokens beyond the ids of the data, leave their meaning as it is."""
    assert "" == SAID.conflict(tokenizer)


@pytest.mark.parametrize(
    ("tokenizer", "why"),
    [
        (
            Vocabulary([(0, "é"), (1, "a"), (2, "<eot>")]),
            r"^ids below 3 mean other tokens here \(fingerp",
        ),
        (Vocabulary(PAIRS[:2], ()), r"^that one has ids up to 2, here they end at 1 \("),
    ],
)
def test_another_map_is_told(tokenizer, why):
    """A tokenizer that gives ids another meaning, or none, is told with what differs."""
    assert re.search(why, SAID.conflict(tokenizer))
    assert tokenizer_fingerprint(tokenizer) in SAID.conflict(tokenizer)


def test_data_that_does_not_say_its_map_is_held_to_its_fingerprint():
    """Of earlier data only the one fingerprint is known: a difference may be one of roles, and the message says so."""
    earlier = MadeBy(tokenizer_fingerprint(MAKER), 3)
    assert "" == earlier.conflict(MAKER)
    assert "or only roles (end of text, padding) differ" in earlier.conflict(Vocabulary(PAIRS, special=(0,)))
    assert "" == MadeBy("0" * 32, 3).conflict(Vocabulary([(0, "anything")]))
