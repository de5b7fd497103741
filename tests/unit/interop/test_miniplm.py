"""The cache of MiniPLM's fork: draws come over count by count, from arrays of objects and from HDF5."""

import json
import pickle

import numpy as np
import pytest
from converted import assert_probs, patch_zip, records, run

import sklformat as skl

V, N, K = 40, 20, 5
FORMS = ("npz", "h5")


def teach(seed, rows):
    """Of a sequence: tokens [rows + 1], and of each row its draws (ids, counts), and its largest probabilities."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 2, (rows, V))
    probs = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    draws = [np.unique(rng.choice(V, N, p=p), return_counts=True) for p in probs]
    top = np.argsort(-probs, axis=1)[:, :K]
    return rng.integers(0, V, rows + 1), draws, top, np.take_along_axis(probs, top, 1).astype(np.float16)


def padded(draws):
    """Draws as arrays [T, N], -1 behind the ids and 0 behind the counts, and their lengths."""
    ids, counts = np.full((len(draws), N), -1, np.int32), np.zeros((len(draws), N), np.uint8)
    for t, (row_ids, row_counts) in enumerate(draws):
        ids[t, : row_ids.size], counts[t, : row_ids.size] = row_ids, row_counts
    return ids, counts, np.array([row_ids.size for row_ids, _ in draws], np.int32)


def write_npz(path, sequences, way="both", local=None, **changes):
    """A shard of objects: numpy makes one array of objects of lists of equal shape, and one of arrays of the others."""
    ids, counts, lengths = zip(*(padded(draws) for _, draws, *_ in sequences), strict=True)
    sparse = dict(zip(("token_ids", "counts", "lengths"), (ids, counts, lengths), strict=True))
    top = {"token_ids": [one[2].astype(np.int32) for one in sequences], "probs": [one[3] for one in sequences]}
    number = len(sequences)
    arrays = {
        "both": {f"sparse_{name}": value for name, value in sparse.items()}
        | {f"topk_{name}": value for name, value in top.items()},
        "random": {"token_ids": sparse["token_ids"], "values": sparse["counts"], "lengths": sparse["lengths"]},
        "topk": {"token_ids": top["token_ids"], "values": top["probs"]},
    }[way]
    arrays = {name: np.array(list(value), dtype=object) for name, value in arrays.items()}
    arrays |= {"method": np.array(way), "seq_lens": np.array([len(one[1]) for one in sequences], np.int32)}
    arrays |= {"local_indices": np.arange(number, dtype=np.int32) if local is None else np.array(local, np.int32)}
    arrays |= {"both": {"topk_k": np.int16(K), "sparse_num_samples": np.int16(N)}, "random": {"num_samples": N}}.get(
        way, {"k": K}
    )
    arrays |= changes
    np.savez(path, **{name: value for name, value in arrays.items() if value is not None})


def write_h5(path, sequences, parts=("sparse", "topk"), prefix=True, **changes):
    """A shard of flat arrays; changes are arrays in place of those that are right, by name."""
    h5py = pytest.importorskip("h5py")
    rows = [len(draws) for _, draws, *_ in sequences]
    records = [row for _, draws, *_ in sequences for row in draws]
    arrays = {}
    if "sparse" in parts:
        arrays["sparse/token_ids_flat"] = np.concatenate([ids for ids, _ in records]).astype(np.int32)
        arrays["sparse/counts_flat"] = np.concatenate([counts for _, counts in records]).astype(np.uint8)
        arrays["sparse/seq_offsets"] = np.cumsum([0, *rows])
        arrays["sparse/token_offsets"] = np.cumsum([0, *(ids.size for ids, _ in records)])
    if "topk" in parts:
        arrays["topk/token_ids_flat"] = np.concatenate([one[2].reshape(-1) for one in sequences]).astype(np.int32)
        arrays["topk/probs_flat"] = np.concatenate([one[3].reshape(-1) for one in sequences])
        arrays["topk/seq_offsets"] = np.cumsum([0, *rows]) * K
        arrays["topk/seq_lens"] = np.array(rows, np.int32)
    if prefix:
        arrays["signature/input_prefix"] = np.full((len(sequences), 32), -1)
        for i, (tokens, *_) in enumerate(sequences):
            start = tokens[:-1][:32]
            arrays["signature/input_prefix"][i, : start.size] = start
    with h5py.File(path, "w") as file:
        for name, array in (arrays | changes).items():
            if array is not None:
                file[name] = array
        for part, name, number in (("sparse", "num_samples", N), ("topk", "k", K)):
            if part in file:
                file[part].attrs[name] = number


WRITERS = {"npz": write_npz, "h5": write_h5}


def write_cache(directory, form, shards, **changes):
    """A directory of shards of sequences, with its metadata."""
    directory.mkdir()
    for number, sequences in enumerate(shards):
        WRITERS[form](directory / f"{'data' if form == 'npz' else 'shard'}_{number}.{form}", sequences)
    sizes = [len(sequences) for sequences in shards]
    metadata = {
        "method": "both", "topk": K, "num_samples": N, "teacher_model": "teacher", "vocab_size": V, "max_length": 64,
        "total_shards": len(shards), "total_sequences": sum(sizes), "shard_sizes": sizes,
        "shard_offsets": np.cumsum([0, *sizes[:-1]]).tolist(),
    }  # fmt: skip
    metadata |= changes
    metadata = {name: value for name, value in metadata.items() if value is not None}
    (directory / "metadata.json").write_text(json.dumps(metadata))
    return directory


def write_tokens(path, sequences):
    path.write_text("".join(json.dumps({"input_ids": tokens.tolist()}) + "\n" for tokens, *_ in sequences))
    return path


def assert_draws(cache, i, draws):
    found = records(cache, i)
    assert [(ids, counts.tolist()) for ids, counts in found] == [(a.tolist(), b.tolist()) for a, b in draws]


@pytest.fixture(params=[False, True], ids=["ragged", "equal"])
def shards(request):
    """Twelve shards, so that the order of their names is not that of their numbers; of equal or different lengths."""
    return [[teach(2 * n + i, 6 if request.param else 5 + i) for i in range(2)] for n in range(12)]


@pytest.mark.parametrize("form", FORMS)
def test_draws_come_over_count_by_count(tmp_path, form, shards):
    """Every count is what it was, unbiased, and id 0 and the last keep their counts beside the padding."""
    shards[0][0][1][0] = (np.array([0, V - 1]), np.array([N - 1, 1]))
    sequences = [one for shard in shards for one in shard]
    source = write_cache(tmp_path / "cache", form, shards)
    tokens = write_tokens(tmp_path / "t.jsonl", sequences)
    run(source, tmp_path / "out", tokens=tokens, kind="counts")
    cache = skl.open(tmp_path / "out")
    for i, (ids, draws, *_) in enumerate(sequences):
        assert cache[i].tokens.tolist() == ids.tolist()
        assert_draws(tmp_path / "out", i, draws)
    header = cache.header
    assert (header.kind, header.rounds, header.sampler, header.biased) == ("counts", N, "multinomial", False)
    source = {"temperature": 1, "tail": "sampled", "teacher_model": "teacher", "max_length": 64}
    assert header.capture["converted"]["source"] == source


@pytest.mark.parametrize("form", FORMS)
def test_largest_probabilities(tmp_path, form, shards):
    """Probabilities of 16 bits come over as they are; 0, which is less than 16 bits hold, is left out."""
    shards[0][0][3][0, 1] = 0
    sequences = [one for shard in shards for one in shard]
    source = write_cache(tmp_path / "cache", form, shards, vocab_size=None)
    tokens = write_tokens(tmp_path / "t.jsonl", sequences)
    made = run(source, tmp_path / "out", tokens=tokens, kind="ratios", vocab_size=V)
    for i, (_, _, ids, probs) in enumerate(sequences):
        kept = [row > 0 for row in probs]
        assert_probs(
            tmp_path / "out",
            i,
            [row[mask] for row, mask in zip(ids, kept, strict=True)],
            [row[mask] for row, mask in zip(probs, kept, strict=True)],
        )
    header = skl.open(tmp_path / "out").header
    assert header.biased
    assert header.capture["converted"]["source"]["k"] == K
    assert any("probabilities over the whole vocabulary in 16 bits" in sentence for sentence in made.says)


@pytest.mark.parametrize("method", ["random", "topk"])
def test_one_method(tmp_path, method):
    """A run of one method has other names; a single shard is converted alone."""
    sequences = [teach(seed, 4 + seed) for seed in range(3)]
    write_npz(tmp_path / "data_0.npz", sequences, method)
    tokens = write_tokens(tmp_path / "t.jsonl", sequences)
    run(tmp_path / "data_0.npz", tmp_path / "out", tokens=tokens, vocab_size=V)
    for i, (_, draws, ids, probs) in enumerate(sequences):
        if method == "random":
            assert_draws(tmp_path / "out", i, draws)
        else:
            assert_probs(tmp_path / "out", i, ids, probs)
    if method == "topk":
        with pytest.raises(ValueError, match="ratios cannot become counts"):
            run(tmp_path / "data_0.npz", tmp_path / "no", tokens=tokens, vocab_size=V, kind="counts")


def test_sequences_of_failed_batches(tmp_path):
    """A hole in the indices is refused, or dropped with its tokens; the others keep their own."""
    sequences = [teach(seed, 5) for seed in range(5)]
    source = write_cache(tmp_path / "cache", "npz", [sequences])
    write_npz(source / "data_0.npz", [sequences[0], sequences[2], sequences[3]], local=[0, 2, 3])
    tokens = write_tokens(tmp_path / "t.jsonl", sequences)
    asked = {"tokens": tokens, "kind": "counts"}
    with pytest.raises(
        skl.CorruptError, match=r"row 1: data_0\.npz has no records of sequence 1: its batch had failed"
    ):
        run(source, tmp_path / "none", **asked)
    run(source, tmp_path / "out", **asked, on_bad_row="drop")
    cache = skl.open(tmp_path / "out")
    assert [cache[i].tokens.tolist() for i in range(3)] == [sequences[i][0].tolist() for i in (0, 2, 3)]
    for i, place in enumerate((0, 2, 3)):
        assert_draws(tmp_path / "out", i, sequences[place][1])
    assert cache.header.capture["converted"]["dropped"] == {"positions": 0, "sequences": 2}


@pytest.mark.parametrize("form", FORMS)
def test_from_any_sequence(tmp_path, form):
    """A stopped conversion is resumed at any sequence, in any shard."""
    from sklformat.interop.kinds import find_kind, open_reading
    from sklformat.interop.readings import Asked
    from sklformat.interop.tokens import TokenFile

    shards = [[teach(3 * n + i, 4) for i in range(3)] for n in range(2)]
    source = write_cache(tmp_path / "cache", form, shards)
    tokens = write_tokens(tmp_path / "t.jsonl", [one for shard in shards for one in shard])
    assert find_kind(source) == "miniplm"
    reading, _ = open_reading(source, "miniplm", Asked(tokens=TokenFile(tokens), kind="counts"))
    rows = list(reading.rows(0))
    assert len(rows) == 6
    for start in range(7):
        rest = list(reading.rows(start))
        assert [row.values.tolist() for row in rest] == [row.values.tolist() for row in rows[start:]]
        assert [row.input_ids.tolist() for row in rest] == [row.input_ids.tolist() for row in rows[start:]]


def test_hdf5_in_batches(tmp_path, monkeypatch):
    """How many sequences are read at once changes nothing."""
    pytest.importorskip("h5py")
    from sklformat.interop.neighbours import miniplm

    sequences = [teach(seed, 3 + seed % 4) for seed in range(7)]
    write_h5(tmp_path / "shard_0.h5", sequences)
    asked = {"tokens": write_tokens(tmp_path / "t.jsonl", sequences), "vocab_size": V, "from_": "miniplm"}
    for kind in ("counts", "ratios"):
        whole = run(tmp_path / "shard_0.h5", tmp_path / f"whole-{kind}", kind=kind, **asked)
        with monkeypatch.context() as patch:
            patch.setattr(miniplm, "_BATCH_POSITIONS", 8)
            parts = run(tmp_path / "shard_0.h5", tmp_path / f"parts-{kind}", kind=kind, **asked)
        assert whole.fingerprint == parts.fingerprint


def test_tokens_of_other_data(tmp_path):
    """Where a shard holds the first ids of its sequences, others are refused."""
    sequences = [teach(seed, 5) for seed in range(2)]
    write_h5(tmp_path / "shard_0.h5", sequences)
    asked = {"vocab_size": V, "kind": "counts", "from_": "miniplm"}
    tokens = write_tokens(tmp_path / "t.jsonl", sequences[::-1])
    with pytest.raises(skl.CorruptError, match="row 0: begins with other tokens in the cache than in --tokens; give"):
        run(tmp_path / "shard_0.h5", tmp_path / "out", tokens=tokens, **asked)


def test_more_draws_than_a_count_holds(tmp_path):
    """Counts of 200 draws become ratios, once they sum to 200; a count that wrapped at 256 does not."""
    sequences = [teach(0, 3)]
    sequences[0][1][:] = [(np.array([3, 5]), np.array([150, 50]))] * 3
    changes = {"num_samples": np.array(200)}
    write_npz(tmp_path / "data_0.npz", sequences, "random", **changes)
    asked = {"tokens": write_tokens(tmp_path / "t.jsonl", sequences), "vocab_size": V}
    run(tmp_path / "data_0.npz", tmp_path / "out", **asked)
    header = skl.open(tmp_path / "out").header
    assert (header.kind, header.rounds, header.biased) == ("ratios", 200, False)
    assert_probs(tmp_path / "out", 0, [[3, 5]] * 3, [[0.75, 0.25]] * 3)
    write_npz(tmp_path / "data_1.npz", sequences, "random", num_samples=np.array(200 + 256))
    with pytest.raises(skl.CorruptError, match="row 0: position 0: 200 draws are left of 456"):
        run(tmp_path / "data_1.npz", tmp_path / "no", **asked)


class Harmful:
    """Would write a file where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": np.array("other")}, "method is 'other'; topk, random and both are known here"),
        ({"method": None}, "lacks the array method"),
        ({"sparse_counts": None}, "lacks the array sparse_counts"),
        ({"sparse_num_samples": np.array([1, 2])}, "num_samples is no integer"),
        ({"sparse_num_samples": np.int32(0)}, "cannot have 0 draws"),
        ({"local_indices": np.array([1, 0])}, "local_indices does not rise within 2 sequences"),
        ({"local_indices": np.array([0, 2])}, "local_indices does not rise within 2 sequences"),
        ({"local_indices": np.array([0.5, 1])}, "local_indices is no list of numbers of sequences"),
        ({"sparse_lengths": np.array([[1, 2, 3, 4]], object)}, "sparse_lengths is not of 2 sequences"),
        ({"seq_lens": np.array([4, 3])}, "row 1: has 4 rows of ids, 4 lengths, and 3 rows by its own account"),
        ({"sparse_lengths": np.full((2, 4), N + 1, object)}, "row 0: lengths are not in 0..20, the ids that a row has"),
        ({"sparse_lengths": np.full((2, 4), N, object)}, "row 0: position 0: token id -1 is not in"),
        ({"sparse_lengths": np.full((2, 4), "a", object)}, "row 0: needs numbers, has an array of <U1"),
        ({"sparse_counts": np.full((2, 4, 3), 1, object)}, r"ids of shape \(4, 20\) stand beside values of \(4, 3\)"),
        ({"sparse_counts": np.full((2, 4, N), 1, object)}, "row 0: position 0: counts sum to"),
        ({"sparse_token_ids": np.full((2, 4, N), V, object)}, f"row 0: position 0: token id {V} is not in"),
    ],
)
def test_objects_that_cannot_be(tmp_path, changes, message):
    """A shard whose arrays are missing, misshapen or impossible is refused."""
    sequences = [teach(seed, 4) for seed in range(2)]
    source = write_cache(tmp_path / "cache", "npz", [sequences])
    write_npz(source / "data_0.npz", sequences, **changes)
    tokens = write_tokens(tmp_path / "t.jsonl", sequences)
    with pytest.raises(skl.CorruptError, match=message):
        run(source, tmp_path / "out", tokens=tokens, kind="counts")


def test_objects_are_never_run(tmp_path):
    """An array that would call a function is refused before it does."""
    sequences = [teach(0, 4)]
    source = write_cache(tmp_path / "cache", "npz", [sequences])
    harmful = np.array([None], object)
    harmful[0] = Harmful(str(tmp_path / "harm"))
    write_npz(source / "data_0.npz", sequences, sparse_counts=harmful)
    tokens = write_tokens(tmp_path / "t.jsonl", sequences)
    with pytest.raises(skl.CorruptError, match="which is never loaded"):
        run(source, tmp_path / "out", tokens=tokens, kind="counts")
    assert not (tmp_path / "harm").exists()
    pickle.loads(pickle.dumps(harmful[0])).close()  # it would have
    assert (tmp_path / "harm").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sparse/counts_flat": None}, "has no array named sparse/counts_flat"),
        ({"sparse/counts_flat": np.ones(3, np.uint8)}, "sparse/counts_flat is not as long as sparse/token_ids_flat"),
        ({"sparse/counts_flat": np.ones(3)}, "sparse/counts_flat is float64 with 1 axes"),
        (
            {"sparse/seq_offsets": np.array([0, 4, 9])},
            "shard_0.h5: offsets of sequences: sparse/seq_offsets does not rise from 0 to 8",
        ),
        (
            {"sparse/seq_offsets": np.array([0, 8])},
            "holds 1 sequences, metadata.json says 2; nothing in it tells which",
        ),
        ({"sparse/token_offsets": np.arange(9) * 21}, "token_offsets from 0 on give a position more ids than draws"),
        ({"sparse/token_offsets": -np.arange(9)}, "token_offsets from 0 on give a position more ids than draws"),
    ],
)
def test_hdf5_that_cannot_be(tmp_path, changes, message):
    """A shard whose arrays are missing, misshapen or impossible is refused."""
    pytest.importorskip("h5py")
    sequences = [teach(seed, 4) for seed in range(2)]
    source = write_cache(tmp_path / "cache", "h5", [sequences])
    write_h5(source / "shard_0.h5", sequences, **changes)
    tokens = write_tokens(tmp_path / "t.jsonl", sequences)
    with pytest.raises(skl.CorruptError, match=message):
        run(source, tmp_path / "out", tokens=tokens, kind="counts")


def test_hdf5_of_another_kind(tmp_path):
    """Files that are none, are cut short, have neither part, or lead into other files."""
    h5py = pytest.importorskip("h5py")
    sequences = [teach(seed, 4) for seed in range(2)]
    asked = {"tokens": write_tokens(tmp_path / "t.jsonl", sequences), "vocab_size": V, "from_": "miniplm"}
    asked["kind"] = "counts"
    path = tmp_path / "shard_0.h5"
    write_h5(path, sequences)
    path.write_bytes(path.read_bytes()[:900])
    with pytest.raises(skl.CorruptError, match=r"shard_0\.h5: hdf5: .*truncated"):
        run(path, tmp_path / "out", **asked)
    with h5py.File(path, "w") as file:
        file["other"] = [1]
    with pytest.raises(skl.CorruptError, match="has neither sparse nor topk"):
        run(path, tmp_path / "out", **asked)
    write_h5(tmp_path / "else.h5", sequences)
    write_h5(path, sequences, **{"sparse/counts_flat": None})
    with h5py.File(path, "a") as file:
        file["sparse/counts_flat"] = h5py.ExternalLink("else.h5", "sparse/counts_flat")
    with pytest.raises(skl.CorruptError, match="sparse/counts_flat lies in another file; only what is here is read"):
        run(path, tmp_path / "out", **asked)
    write_h5(path, sequences)
    with h5py.File(path, "a") as file:
        file["sparse"].attrs["num_samples"] = "many"
    with pytest.raises(skl.CorruptError, match="sparse has num_samples 'many', must be an integer"):
        run(path, tmp_path / "out", **asked)
    write_h5(path, sequences, **{"topk/seq_offsets": np.array([0, 21, 40])})
    with pytest.raises(skl.CorruptError, match="topk/seq_offsets does not count 5 records for each position"):
        run(path, tmp_path / "out", **(asked | {"kind": "ratios"}))


def test_damage_anywhere(tmp_path):
    """A changed byte of an HDF5 file's own structures is refused by the file's name, or changes nothing of them."""
    pytest.importorskip("h5py")
    sequences = [teach(seed, 4) for seed in range(2)]
    asked = {"tokens": write_tokens(tmp_path / "t.jsonl", sequences), "vocab_size": V, "from_": "miniplm"}
    path = tmp_path / "shard_0.h5"
    write_h5(path, sequences)
    data, refused = path.read_bytes(), []
    for place in range(0, 2400, 48):
        path.write_bytes(data[:place] + bytes(byte ^ 0xFF for byte in data[place : place + 8]) + data[place + 8 :])
        try:
            run(path, tmp_path / f"out-{place}", kind="counts", **asked)
        except skl.CorruptError as error:
            refused.append(str(error))
    assert len(refused) > 10
    assert all("shard_0.h5" in message for message in refused)


@pytest.mark.parametrize(("field", "number"), [("method", 99), ("flags", 1)])
def test_zip_files_of_another_kind(tmp_path, field, number):
    """A member that is packed in an unknown way, or encrypted, can't be read."""
    sequences = [teach(seed, 4) for seed in range(2)]
    write_npz(tmp_path / "data_0.npz", sequences)
    patch_zip(tmp_path / "data_0.npz", field, number)
    asked = {"tokens": write_tokens(tmp_path / "t.jsonl", sequences), "vocab_size": V, "kind": "counts"}
    with pytest.raises(skl.CorruptError, match=r"data_0\.npz: npz of objects: .*(not supported|encrypted)"):
        run(tmp_path / "data_0.npz", tmp_path / "out", **asked)


def test_half_a_directory(tmp_path):
    """Shards or metadata that are missing, and shards of different runs."""
    shards = [[teach(2 * n + i, 4) for i in range(2)] for n in range(2)]
    source = write_cache(tmp_path / "cache", "npz", shards)
    tokens = write_tokens(tmp_path / "t.jsonl", [one for shard in shards for one in shard])
    asked = {"tokens": tokens, "kind": "counts", "from_": "miniplm"}
    write_npz(source / "data_1.npz", shards[1], "topk")
    with pytest.raises(
        skl.CorruptError, match="was made with another method, k or number of draws than the first shard"
    ):
        run(source, tmp_path / "out", **asked)
    data = (source / "data_0.npz").read_bytes()
    (source / "data_1.npz").write_bytes(data[: len(data) // 2])
    with pytest.raises(skl.CorruptError, match=r"data_1\.npz: npz of objects: File is not a zip file"):
        run(source, tmp_path / "out", **asked)
    (source / "data_1.npz").unlink()
    with pytest.raises(
        skl.CorruptError, match=r"holds 1 shards, metadata\.json tells of 2; copy all of them, or convert"
    ):
        run(source, tmp_path / "out", **asked)
    (source / "metadata.json").write_text('{"method": "both", "shard_sizes": 3, "shard_offsets": []}')
    with pytest.raises(skl.CorruptError, match="shard_sizes is no list of sizes"):
        run(source, tmp_path / "out", **asked)
    (source / "metadata.json").unlink()
    with pytest.raises(
        skl.CorruptError, match=r"has no metadata\.json: it is not all of a cache; give one of its files"
    ):
        run(source, tmp_path / "out", **asked)


def test_what_flags_cannot_be(tmp_path):
    """Tokens must be given, a part chosen, and nothing contradicted."""
    sequences = [teach(seed, 4) for seed in range(2)]
    source = write_cache(tmp_path / "cache", "npz", [sequences], vocab_size=None)
    tokens = write_tokens(tmp_path / "t.jsonl", sequences)
    with pytest.raises(ValueError, match="give --vocab-size"):
        run(source, tmp_path / "out", tokens=tokens)
    asked = {"vocab_size": V, "tokens": tokens}
    with pytest.raises(ValueError, match="has no token ids; give those that the teacher saw, and one more, of each"):
        run(source, tmp_path / "out", vocab_size=V)
    with pytest.raises(ValueError, match="has both draws and the largest probabilities; choose with --kind counts or"):
        run(source, tmp_path / "out", **asked)
    for number in (1, 3):
        short = write_tokens(tmp_path / f"{number}.jsonl", (sequences * 2)[:number])
        message = "--tokens ends before its sequence 1" if number == 1 else "--tokens holds more sequences"
        for form in FORMS:
            WRITERS[form](tmp_path / f"one_0.{form}", sequences)
            with pytest.raises(ValueError, match=f"^[^:]*: {message}"):
                run(
                    tmp_path / f"one_0.{form}",
                    tmp_path / "out",
                    vocab_size=V,
                    tokens=short,
                    kind="counts",
                    from_="miniplm",
                )
    with pytest.raises(ValueError, match=r"^[^:]*one_0\.h5: has both draws and the largest"):
        run(tmp_path / "one_0.h5", tmp_path / "out", **asked, from_="miniplm")
    with pytest.raises(ValueError, match="says rounds 20, --rounds says 50; leave --rounds out"):
        run(source, tmp_path / "out", **asked, kind="counts", rounds=50)
    with pytest.raises(ValueError, match="says sampler topk, --sampler says multinomial"):
        run(source, tmp_path / "out", **asked, kind="ratios", sampler="multinomial")
    np.save(tmp_path / "t.npy", np.zeros((3, 5), int))
    with pytest.raises(ValueError, match="has 3 rows for 2 sequences"):
        run(source, tmp_path / "out", vocab_size=V, tokens=tmp_path / "t.npy", kind="counts")
    (source / "metadata.json").write_text(
        '{"method": "both", "shard_sizes": [2], "shard_offsets": [0], "vocab_size": 0}'
    )
    with pytest.raises(skl.CorruptError, match="cannot have the vocab_size 0"):
        run(source, tmp_path / "out", tokens=tokens)
