"""Records of other tokens stop training at the first affected sequence, with a cause that is the right one."""

import numpy as np
import pytest
from loader_data import POSITIONS, ROUNDS, VOCAB, make_targets, write_cache
from torch.utils.data import DataLoader

import sklformat as skl
from sklformat.check import check_tokens
from sklformat.checksums import alignment
from sklformat.distill import SparseLogitDataset

NUMBER, FIRST = 40, 9  # sequences; the first one that a fault touches
LENGTH = POSITIONS + 1


def packed(stream, stride):
    """Sequences of LENGTH tokens of a stream."""
    return np.stack([stream[i * stride : i * stride + LENGTH] for i in range(NUMBER)])


def documents(seed, order_seed=0):
    """A stream of documents with ids that come again and again, in the order of a packing seed."""
    rng = np.random.default_rng(seed)
    texts = [rng.zipf(1.6, rng.integers(5, 40)) % VOCAB for _ in range(80)]
    return np.concatenate([texts[i] for i in np.random.default_rng(order_seed).permutation(len(texts))])


@pytest.fixture(scope="module", params=[(True, POSITIONS), (True, LENGTH), (False, POSITIONS), (False, LENGTH)])
def captured(request, tmp_path_factory):
    """Caches with and without stored tokens, whose sequences share a token or do not."""
    store_tokens, stride = request.param
    directory = tmp_path_factory.mktemp("aligned") / "cache"
    directory.mkdir()
    tokens, rng = packed(documents(1), stride), np.random.default_rng(2)
    for number, first in enumerate(range(0, NUMBER, 10)):
        header = skl.Header(
            vocab_size=VOCAB,
            seq_len=POSITIONS,
            kind="counts",
            rounds=ROUNDS,
            shard_number=number,
            first_sequence=first,
            store_tokens=store_tokens,
        )
        with skl.ShardWriter(directory / f"{number}.skl", header=header) as writer:
            for row in tokens[first : first + 10]:
                writer.append(row, make_targets(rng, POSITIONS))
    return directory, tokens, store_tokens, stride


def faults(tokens, stride):
    """Name, the wrong tokens, the first sequence they touch, and the cause with and without stored tokens."""
    stream = documents(1)
    swapped, dropped, doubled, changed = tokens.copy(), np.delete(tokens, FIRST, axis=0), tokens.copy(), tokens.copy()
    swapped[[FIRST, FIRST + 5]] = tokens[[FIRST + 5, FIRST]]
    doubled[FIRST:] = tokens[FIRST - 1 : -1]
    changed[FIRST, 3] = (changed[FIRST, 3] + 1) % VOCAB
    ahead, behind = packed(stream[1:], stride), packed(np.concatenate([[5], stream]), stride)
    other = np.random.default_rng(3).permutation(VOCAB)[tokens]
    unknown = "another packing seed, tokenizer or corpus"
    return {
        "ahead": (ahead, 0, "shifted by one token", "shifted by one token"),
        "behind": (behind, 0, "shifted by one token", "shifted by one token"),
        "swapped": (swapped, FIRST, *[f"sequences {FIRST} and {FIRST + 5} are swapped"] * 2),
        "dropped": (dropped, FIRST, *[f"they are sequence {FIRST + 1} of the cache: 1 sequence dropped before it"] * 2),
        "doubled": (
            doubled,
            FIRST,
            *[f"they are sequence {FIRST - 1} of the cache: 1 sequence too many before it"] * 2,
        ),
        "changed": (changed, FIRST, "1 of 17 tokens differ, the first at 3", unknown),
        "tokenizer": (other, 0, "the ids correspond one to one: another tokenizer for the same text", unknown),
        "seed": (packed(documents(1, order_seed=7), stride), 0, unknown, unknown),
        "corpus": (packed(documents(8), stride), 0, unknown, unknown),
    }


NAMES = "ahead behind swapped dropped doubled changed tokenizer seed corpus"


@pytest.mark.parametrize("name", NAMES.split())
def test_every_misalignment_is_caught_at_the_first_affected_sequence(captured, name):
    """The batches before the first affected sequence are handed out, then the error comes, whose words are right."""
    directory, tokens, store_tokens, stride = captured
    wrong, first, *causes = faults(tokens, stride)[name]
    source = wrong if len(wrong) == NUMBER else [*wrong, wrong[0]]
    ds = SparseLogitDataset(directory, batch_size=1, shuffle=False, tokens=source)
    stream = iter(ds)
    for i in range(first):
        assert tokens[i, :-1].tolist() == next(stream).input_ids[0].tolist()
    with pytest.raises(skl.AlignmentError) as caught:
        next(stream)
    text = str(caught.value)
    assert first == caught.value.sequence_index
    assert f"sequence {first}: alignment checksum {alignment(tokens[first]):#018x} stored, " in text
    assert f"{alignment(wrong[first]):#018x} computed from the tokens given" in text
    assert causes[not store_tokens] in text
    assert "pack the tokens with the cache's tokenizer, corpus, seed and seq_len" in text


@pytest.mark.parametrize("name", NAMES.split())
@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.soak)])
def test_no_affected_sequence_is_ever_trained_on(captured, name, num_workers):
    """Shuffled and in batches, a fault stops the stream before the first batch that holds an affected sequence."""
    directory, tokens, _, stride = captured
    wrong = faults(tokens, stride)[name][0]
    source = wrong if len(wrong) == NUMBER else [*wrong, wrong[0]]
    affected = {tuple(tokens[i, :-1].tolist()) for i in range(NUMBER) if tokens[i].tolist() != list(source[i])}
    expected = list(SparseLogitDataset(directory, batch_size=4, tokens=tokens))
    clean = [not affected & {tuple(row) for row in batch.input_ids.tolist()} for batch in expected]
    stream = iter(
        DataLoader(SparseLogitDataset(directory, batch_size=4, tokens=source), batch_size=None, num_workers=num_workers)
    )
    for batch in expected[: clean.index(False)]:
        assert batch.input_ids.tolist() == next(stream).input_ids.tolist()
    with pytest.raises(Exception, match=r"alignment checksum .* stored, .* computed"):
        next(stream)


def test_no_false_alarm(captured):
    """The right tokens pass in every order and batch, epoch after epoch."""
    directory, tokens, *_ = captured
    for settings in ({}, {"window": 5}, {"shuffle": False}, {"batch_size": None}):
        ds = SparseLogitDataset(directory, **{"batch_size": 3} | settings, tail="pad", tokens=tokens)
        for epoch in range(3):
            ds.set_epoch(epoch)
            assert len(ds) == len(list(ds))


def test_sequences_of_another_length_are_named(captured):
    """seq_len tokens instead of seq_len + 1 say what is missing."""
    directory, tokens, *_ = captured
    with pytest.raises(skl.AlignmentError, match=r"16 tokens given, 17 captured; a sequence of seq_len positions has"):
        next(iter(SparseLogitDataset(directory, batch_size=2, tokens=tokens[:, :-1])))


def test_a_shard_by_itself_asks_for_its_own_sequences(captured):
    """Tokens are indexed by the global number also where one shard of the cache is opened by itself."""
    directory, tokens, *_ = captured
    ds = SparseLogitDataset(directory / "2.skl", batch_size=1, shuffle=False, tokens=tokens)
    assert tokens[20:30, :-1].tolist() == [batch.input_ids[0].tolist() for batch in ds]
    with pytest.raises(skl.AlignmentError, match="25 sequences of tokens given, the cache reaches to sequence 29"):
        SparseLogitDataset(directory / "2.skl", batch_size=1, tokens=tokens[:25])


def test_nothing_hides_that_tokens_are_wrong(tmp_path):
    """Neighbours that are no tokens, or lie in a shard that is gone, leave the cause open and the error as it is."""
    data = write_cache(tmp_path / "cache", store_tokens=False)
    wrong = np.array([tokens for tokens, _ in data])
    wrong[5, 3], wrong[6] = (wrong[5, 3] + 1) % VOCAB, -1
    with skl.open(tmp_path / "cache") as cache:
        with pytest.raises(skl.AlignmentError, match="sequence 5: "):
            cache.check_alignment(5, wrong[5], lambda i: wrong[i])
        with pytest.raises(ValueError, match=r"cache: sequence 6: tokens must be in .*, got values from -1"):
            cache.check_alignment(6, wrong[6])
        with pytest.raises(ValueError, match=r"sequence 6 of the tokens: tokens must be in"):
            check_tokens(cache, [*(tokens for tokens, _ in data[:6]), *wrong[6:]])
    with skl.open(tmp_path / "cache") as cache:
        (tmp_path / "cache" / "shard-00001.skl").unlink()
        with pytest.raises(skl.AlignmentError, match=r"sequence 14: .*could not be looked for: .*shard-00001"):
            cache.check_alignment(14, wrong[5])
