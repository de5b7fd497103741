"""Tokens of the training program: every kind of source gives the same stream, and travels to worker processes small."""

import pickle
import threading

import numpy as np
import pytest
from loader_data import POSITIONS, SEQUENCES, rows, write_cache
from mmap_ninja import RaggedMmap
from torch import tensor
from torch.utils.data import DataLoader

import sklformat as skl
from sklformat.cache.tokens import Tokens
from sklformat.distill import SparseLogitDataset


class Table:
    """What a ``datasets.Dataset`` of packed tokens does: rows are dicts, a name gives a column."""

    def __init__(self, lists):
        self.lists = lists

    def __len__(self):
        return len(self.lists)

    def __getitem__(self, key):
        return self.lists if key == "input_ids" else {"input_ids": self.lists[int(key)], "attention_mask": [1]}


def cut(stream, i):
    return stream[i * (POSITIONS + 1) : (i + 1) * (POSITIONS + 1)]


class Cut:
    """A function of the number, with its data."""

    def __init__(self, stream):
        self.stream = stream

    def __call__(self, i):
        return cut(self.stream, i)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokens") / "cache"
    return directory, np.stack([tokens for tokens, _ in write_cache(directory)])


KINDS = "int64 int32 uint16 memmap part ninja list tensors column table function"


def sources(tokens, folder):
    """The same tokens in everything that holds some."""
    np.save(folder / "tokens.npy", tokens.astype(np.uint16))
    np.concatenate([np.zeros_like(tokens[:5]), tokens]).astype("<i4").tofile(folder / "raw")
    whole = np.memmap(folder / "raw", "<i4", "r", shape=(SEQUENCES + 5, POSITIONS + 1))
    ninja = RaggedMmap.from_lists(folder / "ninja", [row.astype(np.int32) for row in tokens])
    return {
        "int64": tokens,
        "int32": tokens.astype(np.int32),
        "uint16": tokens.astype(np.uint16),
        "memmap": np.load(folder / "tokens.npy", mmap_mode="r"),
        "part": whole[2:][3:],
        "ninja": ninja,
        "list": [row.tolist() for row in tokens],
        "tensors": [tensor(row) for row in tokens],
        "column": Table([row.tolist() for row in tokens])["input_ids"],
        "table": Table([row.tolist() for row in tokens]),
        "function": Cut(tokens.reshape(-1)),
    }


@pytest.mark.parametrize("kind", KINDS.split())
def test_every_source_gives_the_same_stream(cache, tmp_path, kind):
    """Whatever holds the tokens, the batches are those of the stored tokens, in this process and in others."""
    directory, tokens = cache
    source = sources(tokens, tmp_path)[kind]
    expected = rows(SparseLogitDataset(directory, batch_size=4))
    ds = SparseLogitDataset(directory, batch_size=4, tokens=source)
    assert expected == rows(ds)
    if kind == "ninja":
        assert expected == rows(DataLoader(ds, batch_size=None, num_workers=1, multiprocessing_context="spawn"))


@pytest.mark.parametrize("kind", KINDS.split())
def test_sources_travel(cache, tmp_path, kind):
    """A pickled source gives the same tokens; maps of files travel as their paths, not as their bytes."""
    tokens = cache[1]
    before = Tokens(sources(tokens, tmp_path)[kind])
    data = pickle.dumps(before)
    after = pickle.loads(data)
    assert before.num_sequences == after.num_sequences == (None if kind == "function" else SEQUENCES)
    for i in range(SEQUENCES):
        assert tokens[i].tolist() == after[i].tolist()
    if kind in ("memmap", "part", "ninja"):
        assert len(data) < 400 < tokens.astype(np.uint16).nbytes


def test_maps_with_changes_of_their_own_travel_whole(tmp_path):
    """A copy-on-write map, and one that is strided, are more than their file: they travel as they are."""
    np.save(tmp_path / "a.npy", np.arange(40, dtype=np.uint16).reshape(8, 5))
    changed = np.load(tmp_path / "a.npy", mmap_mode="c")
    changed[2] = 7
    for source in (changed, changed[::2], np.load(tmp_path / "a.npy", mmap_mode="r")[::2]):
        again = pickle.loads(pickle.dumps(Tokens(source)))
        assert [row.tolist() for row in source] == [again[i].tolist() for i in range(len(source))]


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        (7, TypeError, "indexed by the sequence number or be a function of it, got int"),
        (np.arange(10), ValueError, r"\[sequences, seq_len \+ 1\], got \(10,\); of a flat stream give a function"),
        (np.zeros((2, 3)), ValueError, "must be integers, got an array of float64"),
    ],
)
def test_what_holds_no_sequences(source, error, message):
    """A source that can have no sequences is refused when it is given, with what to give instead."""
    with pytest.raises(error, match=message):
        Tokens(source)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a", "id": 3}, r"sequence 3: tokens with the fields \['id', 'text'\], none is 'input_ids'"),
        ([[1, 2], [3, 4]], r"sequence 3: tokens must be a 1-D array of integers, got shape \(2, 2\)"),
        ([0.5, 1.0], r"sequence 3: .* got shape \(2,\) of float64"),
    ],
)
def test_rows_that_are_no_tokens(row, message):
    """What a source gives is looked at, and the sequence named."""
    with pytest.raises(ValueError, match=message):
        Tokens(lambda _: row)[3]


def test_values_never_wrap_into_the_right_ones(cache):
    """Negative ids, and ids beyond 2^32 whose low bits differ, are misaligned or refused, never taken."""
    directory, tokens = cache
    for wrong in (-1, 1 << 32, (1 << 40) + 1):
        changed = tokens.copy()
        changed[3, 4] = wrong
        with pytest.raises((skl.AlignmentError, ValueError), match=r"sequence 3|must be in"):
            list(SparseLogitDataset(directory, batch_size=4, shuffle=False, tokens=changed))


def test_a_source_is_asked_by_one_thread_at_a_time(cache):
    """Prefetch threads never meet inside of the user's source."""
    directory, tokens = cache
    inside, met = threading.Lock(), []

    def source(i):
        if not inside.acquire(blocking=False):
            met.append(i)
            return tokens[i]
        try:
            return tokens[i]
        finally:
            inside.release()

    ds = SparseLogitDataset(directory, batch_size=1, tokens=source, prefetch=8)
    for _ in range(20):
        assert len(ds) == len(list(ds))
    assert [] == met
