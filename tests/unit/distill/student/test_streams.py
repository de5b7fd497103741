import dataclasses
import itertools

import numpy as np
import pytest
import tiny
import torch
from strategies import make_listed_cache

import sklformat as skl
from sklformat.distill.models import loading, tokenization
from sklformat.distill.student import streams
from sklformat.distill.text.documents import Document
from sklformat.distill.text.fingerprints import tokenizer_fingerprint, vocabulary_fingerprint
from sklformat.distill.text.packing import PackedSequences
from sklformat.errors import SettingsError
from sklformat.files import remote
from sklformat.files.places import url_of
from sklformat.format.order import permute


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("streams")
    tiny.write_place(root)
    return root


def stream_of(place, **changes):
    values = {"seq_len": 16, "packing_seed": 0, "batch_size": 4, "seed": 5, "rank": 0, "world_size": 1}
    return streams.open_tokens(place / "tokens", **({"tokenizer": str(place / "tokenizer")} | values | changes))


def take(stream, count, *, num_workers=0, state=None):
    return list(itertools.islice(stream.batches(num_workers, state), count))


def test_batches_follow_the_specified_order(place):
    """Batch b of an epoch holds the sequences that SPEC section 12 puts there; the next epoch has its own order."""
    stream = stream_of(place)
    packed = PackedSequences(place / "tokens", seq_len=16, separator_id=0, seed=0)
    per_epoch = len(stream.dataset)
    assert len(packed) // 4 == per_epoch
    batches = take(stream, per_epoch + 1)
    for epoch, number, batch in ((0, 0, batches[0]), (0, 1, batches[1]), (1, 0, batches[-1])):
        wanted = permute(range(4 * number, 4 * number + 4), len(packed), seed=5, epoch=epoch)
        tokens = np.stack([packed[int(i)] for i in wanted])
        assert np.array_equal(tokens[:, :-1], batch.input_ids)
        assert np.array_equal(tokens[:, 1:], batch.labels)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_any_state_goes_on_right_after_its_batch(place, num_workers):
    """From the state of any batch, also an epoch's last, the stream goes on as if it had not stopped."""
    count = 2 * len(stream_of(place).dataset) + 1
    whole = take(stream_of(place), count)
    for stop in (0, len(whole) // 2 - 1, len(whole) // 2):
        rest = take(stream_of(place), count - stop - 1, state=whole[stop].state, num_workers=num_workers)
        for left, right in zip(whole[stop + 1 :], rest, strict=True):
            assert torch.equal(left.input_ids, right.input_ids)
            assert left.state == right.state


def test_ranks_share_the_global_batch(place):
    """Two processes with half the batch see together what one sees, in the same steps."""
    alone = take(stream_of(place), 3)
    shared = [take(stream_of(place, batch_size=2, rank=rank, world_size=2), 3) for rank in (0, 1)]
    for step in range(3):
        assert torch.equal(alone[step].input_ids, torch.cat([shared[0][step].input_ids, shared[1][step].input_ids]))
        assert alone[step].state == shared[1][step].state


def test_labels_are_targets():
    """One record a label, of probability 1; a label of -100 has none."""
    targets = streams.one_hot(torch.tensor([[7, -100, 3], [-100, 0, 1]]))
    assert [7, 3, 0, 1] == targets.token_ids.tolist()
    assert [0, 1, 1, 2, 2, 3, 4] == targets.offsets.tolist()
    assert [1.0] * 4 == targets.probs.tolist()


def test_a_tokenizer_is_needed_and_must_be_the_right_one(place, tmp_path):
    """Without a tokenizer, or with another one, nothing is streamed."""
    with pytest.raises(ValueError, match=r"needs a tokenizer: give the path or name of one \(--tokenizer\)$"):
        stream_of(place, tokenizer=None)
    tokenization.train_tokenizer(["other text entirely " * 20], 280).save_pretrained(tmp_path / "other")
    with pytest.raises(SettingsError, match="a different tokenizer"):
        stream_of(place, tokenizer=str(tmp_path / "other"))


@pytest.fixture
def cache(tmp_path):
    """Nine sequences in three shards, with their manifest."""
    return make_listed_cache(tmp_path / "cache")


def open_cache(place, source, **changes):
    values = {"batch_size": 2, "seed": 5, "rank": 0, "world_size": 1, "tokenizer": str(place / "tokenizer")}
    return streams.open_caches([source], **(values | changes))


@pytest.mark.parametrize("window", [None, 2])
def test_training_never_sees_what_is_held_out(place, cache, window):
    """Epoch after epoch, the stream has the sequences before those held out, and no other."""
    with skl.open(cache) as opened:
        tokens = [sequence.tokens.tolist() for sequence in opened]
    stream = open_cache(place, cache, hold_out=3, window=window)
    batches = take(stream, 9)
    for epoch in (batches[:3], batches[3:6], batches[6:]):
        rows = torch.cat([torch.cat([b.input_ids, b.labels[:, -1:]], dim=1) for b in epoch])
        assert sorted(tokens[:6]) == sorted(rows.tolist())


def test_sequences_of_like_length_stay_together(place, tmp_path):
    """Batches of sequences that have lengths of their own are little padded, epoch after epoch; all come."""
    documents = tiny.make_documents(64)
    documents = [Document(d.name, " ".join(d.text.split()[: 1 + i])) for i, d in enumerate(documents)]
    tiny.write_store(tmp_path / "store", loading.load_tokenizer(place / "tokenizer"), documents)
    values = {"tokenizer": str(place / "tokenizer"), "seq_len": 100, "packing_seed": 0, "batch_size": 4, "seed": 5}
    values |= {"rank": 0, "world_size": 1, "packing": "single"}
    stream = streams.open_tokens(tmp_path / "store", **values, ragged_window=8)
    batches = take(stream, 2 * 16)
    real = sum(int((batch.labels != -100).sum()) for batch in batches)
    assert real == 2 * sum(stream.dataset.sequences.width(i, i + 1) for i in range(64))
    assert real > 0.85 * sum(batch.labels.numel() for batch in batches)


def test_a_batch_of_one_keeps_its_tokens(place):
    """Labels that are left out leave the inputs beside them as they are, also where a batch is one sequence."""
    one, two = (take(stream_of(place, batch_size=size, isolated=True), 32 // size) for size in (1, 2))
    for part in ("input_ids", "labels", "position_ids", "document_starts"):
        rows = [torch.cat([getattr(batch, part) for batch in batches]) for batches in (one, two)]
        assert torch.equal(*rows)
    assert any((batch.labels == -100).any() for batch in one)


def test_documents_are_looked_for_once(place, monkeypatch):
    """Borders, places and labels of isolated text come of one walk over the documents of each sequence."""
    walked = []
    walk = PackedSequences.document_starts
    monkeypatch.setattr(PackedSequences, "document_starts", lambda *args: walked.append(args) or walk(*args))
    take(stream_of(place, isolated=True), 3)
    assert 3 * 4 == len(walked)


def test_a_tokenizer_whose_ids_mean_the_same_is_taken(place, tmp_path):
    """Another end of text, and tokens added behind, leave the stream as it is; swapped tokens are refused."""
    tokenizer = loading.load_tokenizer(place / "tokenizer")
    vocab_size = tokenization.num_ids(tokenizer)
    header = skl.Header(
        vocab_size=vocab_size,
        seq_len=4,
        kind="counts",
        rounds=1,
        tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
        capture={"tokenizer": {"vocabulary": vocabulary_fingerprint(tokenizer, vocab_size)}},
    )
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.save_pretrained(tmp_path / "wider")
    assert tokenizer_fingerprint(tokenizer) != header.tokenizer_fingerprint
    assert "" == streams.made_by(header).conflict(loading.load_tokenizer(tmp_path / "wider"))
    assert streams.made_by(header).conflict(tiny.train_tokenizer(tiny.make_documents(1)))
    for strange in ({"tokenizer": 5}, {"tokenizer": {"vocabulary": 5}}, {}):
        assert "" == streams.made_by(dataclasses.replace(header, capture=strange)).vocabulary
    here, there = (take(stream_of(place, tokenizer=str(path)), 3) for path in (place / "tokenizer", tmp_path / "wider"))
    assert all(torch.equal(left.input_ids, right.input_ids) for left, right in zip(here, there, strict=True))


def test_a_store_may_count_ids_that_it_does_not_hold(place, tmp_path):
    """A token store of a tokenizer with an added token serves a student without it, unless a document holds that."""
    tokenizer = loading.load_tokenizer(place / "tokenizer")
    vocab_size = tokenization.num_ids(tokenizer)
    tokenizer.add_tokens(["<img>"])
    tokenizer.save_pretrained(tmp_path / "wider")
    documents = tiny.make_documents(2)
    for name, last in (("without", "alpha"), ("with", "alpha <img>")):
        tiny.write_store(tmp_path / name, tokenizer, [*documents, Document("last", last)])
        values = {"seq_len": 16, "packing_seed": 0, "batch_size": 1, "seed": 5, "rank": 0, "world_size": 1}
        stream = streams.open_tokens(tmp_path / name, tokenizer=str(tmp_path / "wider"), **values)
        assert vocab_size + 1 == stream.vocab_size
        assert (name == "without") == stream.holds_only(vocab_size)
    assert not open_cache(place, make_listed_cache(tmp_path / "cache")).holds_only(vocab_size)


def test_no_sequence_is_left_to_train_on(place, cache):
    """Holding out everything is an error that says how much there is."""
    with pytest.raises(ValueError, match="has 9 sequences, hold_out 9 leaves none to train on"):
        open_cache(place, cache, hold_out=9)


def test_a_cache_behind_a_url(place, cache):
    """A stream from a URL is the stream from the directory."""
    url = "memory://streams-test/cache"
    for file in cache.iterdir():
        remote.upload(file, url_of(url, file.name))
    here, there = (take(open_cache(place, source), 5) for source in (cache, url))
    for left, right in zip(here, there, strict=True):
        assert torch.equal(left.input_ids, right.input_ids)
        assert torch.equal(left.targets.token_ids, right.targets.token_ids)
        assert left.state == right.state
