"""Megatron's tars: each layout, value for value, and what may be wrong with a directory of them."""

import itertools

import megatron_data as data
import numpy as np
import pytest

import sklformat as skl
from sklformat.interop import convert
from sklformat.settings.convert import ConvertConfig

torch = pytest.importorskip("torch")
pytest.importorskip("zstandard")

WRITERS = {
    "lists": data.write_lists,
    "iterations": lambda *args, **kwargs: data.write_tensors(*args, ranges=False, **kwargs),
    "samples": lambda *args, **kwargs: data.write_tensors(*args, ranges=True, **kwargs),
}


def run(source, tokens, **settings):
    """Converted; the tokens are written beside the source."""
    file = source.with_name(f"{source.name}-tokens.npy")
    np.save(file, tokens)
    settings = {"destination": source.with_name(f"{source.name}-cache"), "vocab_size": data.V, **settings}
    return convert(ConvertConfig(source=source, tokens=file, **settings))


def assert_equal(cache, tokens, ids, logs, rows=None):
    """The cache holds these records in this order; the ratio code keeps a weight within 5 %."""
    cache = skl.open(cache)
    assert len(cache) == len(ids)
    for i, sequence in enumerate(cache):
        assert sequence.tokens.tolist() == tokens[i].tolist()
        offsets = sequence.targets.offsets
        assert offsets.size - 1 == (rows or ids.shape[1])
        for t, (begin, end) in enumerate(itertools.pairwise(offsets.tolist())):
            found = dict(zip(sequence.targets.token_ids[begin:end], sequence.targets.weights[begin:end], strict=True))
            wanted = {n: np.exp(x) for n, x in zip(ids[i, t].tolist(), logs[i, t], strict=True) if x > -500}
            assert found == pytest.approx(wanted, rel=0.05)


@pytest.mark.parametrize("layout", WRITERS)
@pytest.mark.parametrize(("dp", "mbs", "gbs"), [(1, 1, 1), (1, 2, 4), (2, 2, 8), (3, 1, 6)])
def test_global_order(tmp_path, layout, dp, mbs, gbs):
    """Whatever ranks and micro-batches wrote them, the samples come in the order of the global batches."""
    tokens, ids, logs = data.teacher(24)
    source = WRITERS[layout](tmp_path / "a", ids, logs, dp=dp, mbs=mbs, gbs=gbs)
    made = run(source, tokens)
    assert_equal(made.destination, tokens, ids, logs)
    header = skl.open(made.destination).header
    assert header.sampler == "topk"
    converted = header.capture["converted"]
    assert converted["from"] == "megatron"
    assert converted["source"]["saver"]["k"] == data.K
    assert converted["source"]["data_parallel"] == dp
    assert converted["mass"] == pytest.approx(np.exp(logs).sum(2).mean(), abs=0.01)
    assert "row t describes token t + 1" in str(made)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_types(tmp_path, dtype):
    """Log-probs of every type that Megatron saves."""
    tokens, ids, logs = data.teacher(2)
    run(data.write_lists(tmp_path / "a", ids, logs, dtype=dtype), tokens)
    assert_equal(tmp_path / "a-cache", tokens, ids, logs)


@pytest.mark.parametrize("cp", [2, 4])
def test_context_parallel_ranks(tmp_path, cp):
    """Sequences are put together from the chunks of their ranks, which keep different numbers of records."""
    tokens, ids, logs = data.teacher(8)
    cut = lambda c, m: data.K - (c + m) % 2  # noqa: E731
    made = run(data.write_lists(tmp_path / "a", ids, logs, cp=cp, dp=2, mbs=2, gbs=8, cut=cut), tokens)
    wanted = logs.copy()
    for n, c in itertools.product(range(8), range(cp)):
        wanted[n, data.zigzag(data.S, c, cp), cut(c, n // 4) :] = -1e3
    assert_equal(made.destination, tokens, ids, wanted)
    assert "packed ones (--sft) are divided by documents" in str(made)


def test_fillers_are_told_by_their_value(tmp_path):
    """Entries that top-p left out are no records, whatever their id; the id of fillers is kept where it is real."""
    tokens, ids, logs = data.teacher(2, vocab_size=1 << 17)
    ids[:, :, 3:], logs[:, :, 3:] = (1 << 17) - 1, -1e3
    ids[1, 2, 0] = (1 << 17) - 1
    logs[0, 1, 4] = -1e4
    run(data.write_lists(tmp_path / "a", ids, logs), tokens, vocab_size=1 << 17)
    assert_equal(tmp_path / "a-cache", tokens, ids, logs)


def test_documents(tmp_path):
    """Where documents begin is kept."""
    tokens, ids, logs = data.teacher(3)
    bounds = np.array([[0, 4, 8, 8], [0, 8, 8, 8], [0, 2, 6, 8]])
    made = run(WRITERS["samples"](tmp_path / "a", ids, logs, documents=bounds), tokens)
    cache = skl.open(made.destination)
    for i, starts in enumerate([[0, 4], [0], [0, 2, 6]]):
        assert np.flatnonzero(cache[i].columns["document_start"]).tolist() == starts
    (tmp_path / "a" / "dp0__2-3.tar").unlink()
    WRITERS["samples"](tmp_path / "a", ids[2:], logs[2:], first=2)
    with pytest.raises(skl.CorruptError, match="row 2: cu_seqlens_padded is missing, which the first sequences have"):
        run(tmp_path / "a", tokens, destination=tmp_path / "out")
    bounds[1, 2] = 9
    with pytest.raises(skl.CorruptError, match="row 1: cu_seqlens_padded does not rise from 0 to 8"):
        run(WRITERS["samples"](tmp_path / "b", ids, logs, documents=bounds), tokens)


def test_as_many_tokens_as_rows(tmp_path):
    """Without the token behind the last row that row is left out; any other number of tokens is refused."""
    tokens, ids, logs = data.teacher(2)
    source = data.write_lists(tmp_path / "a", ids, logs)
    run(source, tokens[:, :-1])
    assert_equal(tmp_path / "a-cache", tokens[:, :-1], ids[:, :-1], logs[:, :-1])
    with pytest.raises(skl.CorruptError, match="row 0: 7 tokens for 8 rows; give the 9 that Megatron's data set has"):
        run(source, tokens[:, :-2], destination=tmp_path / "out")
    for given, message in (
        (tokens[:1], "--tokens ends before its sequence 1"),
        (np.tile(tokens, (2, 1)), "holds more"),
    ):
        with pytest.raises(ValueError, match=message):
            run(source, given, destination=tmp_path / "out")


def test_names_with_a_rank_that_says_nothing(tmp_path):
    """Tensors of whole sequences may still be named as of the first context-parallel rank."""
    tokens, ids, logs = data.teacher(4)
    source = WRITERS["iterations"](tmp_path / "a", ids, logs, dp=2)
    for file in list(source.iterdir()):
        file.rename(source / f"cp0_{file.name}")
    assert_equal(run(source, tokens).destination, tokens, ids, logs)


def test_what_was_replaced_is_left_out_and_said(tmp_path):
    """Tars that Megatron put aside, or had not finished, are no part of it."""
    tokens, ids, logs = data.teacher(4)
    source = WRITERS["samples"](tmp_path / "a", ids, logs)
    (source / "dp0__0-1.tar.stale").write_bytes(b"old")
    (source / "dp0__4-6.tar.tmp").write_bytes(b"half")
    made = run(source, tokens)
    assert "left out as replaced or unfinished: dp0__0-1.tar.stale, dp0__4-6.tar.tmp" in str(made)
    assert made.sequences == 4


def test_a_run_that_began_later(tmp_path):
    """Where the files begin with another sample, that is said."""
    tokens, ids, logs = data.teacher(4)
    made = run(WRITERS["samples"](tmp_path / "a", ids, logs, first=40), tokens)
    assert "tokens go with samples 40 to 43, in that order" in str(made)


def test_resumed_anywhere(tmp_path):
    """A reader may begin with any sequence, before and after it knows how many each member has."""
    from sklformat.interop.kinds import open_reading
    from sklformat.interop.readings import Asked
    from sklformat.interop.tokens import TokenFile

    tokens, ids, logs = data.teacher(12)
    source = data.write_lists(tmp_path / "a", ids, logs, dp=2, mbs=1, gbs=4)
    np.save(tmp_path / "t.npy", tokens)
    asked = Asked(vocab_size=data.V, tokens=TokenFile(tmp_path / "t.npy"))
    for start in (5, 0, 4, 11, 12):
        reading, _ = open_reading(source, "megatron", asked)
        for _ in range(2):
            assert [row.input_ids.tolist() for row in reading.rows(start)] == tokens[start:].tolist()


def remove(name):
    return lambda path: (path / name).unlink()


def rename(name, other):
    return lambda path: (path / name).rename(path / other)


def rewrite(name, change):
    return lambda path: (path / name).write_bytes(change((path / name).read_bytes()))


@pytest.mark.parametrize(
    ("layout", "harm", "message"),
    [
        ("lists", remove("cp0_dp1__5.tar"), "iterations 4 to 4 are not there for each rank; cp0_dp1__1.tar differs"),
        (
            "lists",
            lambda path: [remove(f"cp0_dp0__{i}.tar")(path) for i in (1, 3, 5)],
            "no tar of data-parallel rank 0",
        ),
        (
            "samples",
            lambda path: [remove(f"dp1__{n}.tar")(path) for n in ("0-8", "8-16", "16-24")],
            "no tar of data-paral",
        ),
        (
            "lists",
            lambda path: [remove(f"cp0_dp{i}__3.tar")(path) for i in (0, 1)],
            "iterations 2 to 3 are in no tar of its rank; copy",
        ),
        (
            "samples",
            lambda path: [remove(f"dp{i}__8-16.tar")(path) for i in (0, 1)],
            "samples 8 to 15 are in no tar of its rank; copy",
        ),
        ("lists", rename("cp0_dp0__1.tar", "cp0_dp0__2.tar"), "ends with 1, must with 2: it is cut short"),
        ("lists", rename("cp0_dp0__1.tar", "cp0_dp0__x.tar"), "is no name of these tars, cpC_dpD__LAST.tar or"),
        ("lists", rename("cp0_dp0__1.tar", "tp0_cp0_dp0__1.tar"), "is no name of these tars"),
        ("lists", rewrite("cp0_dp0__1.tar", lambda b: b[:2000]), "tar: unexpected end of data"),
        ("lists", rewrite("cp0_dp0__1.tar", lambda b: b"x" * 2000), "tar: "),
        (
            "lists",
            rewrite("cp0_dp0__1.tar", lambda b: b.replace(b'"seed":7', b'"seed":8')),
            "identifiers is .*, of another tar .*; convert the tars of one run",
        ),
        ("lists", rewrite("cp0_dp0__1.tar", lambda b: b.replace(b'"saver":{', b'"saver":1 ')), r"_meta\.json: .*JSON"),
        (
            "lists",
            rewrite("cp0_dp0__1.tar", lambda b: b.replace(b'"saver":{"k":5,', b'"saver":1,"x":{')),
            "is no object with an object saver",
        ),
        (
            "lists",
            rewrite("cp0_dp0__1.tar", lambda b: b.replace(b"\x28\xb5\x2f\xfd", b"xxxx")),
            "cannot be unpacked as Zst",
        ),
        (
            "samples",
            lambda path: (path / "cp0_dp0__9.tar").write_bytes((path / "dp0__0-8.tar").read_bytes()),
            "cut short",
        ),
    ],
)
def test_directories_that_are_not_whole(tmp_path, layout, harm, message):
    """Half a directory, gaps, truncated and mixed tars: one line each."""
    tokens, ids, logs = data.teacher(24)
    source = WRITERS[layout](tmp_path / "a", ids, logs, dp=2, mbs=2, gbs=4)
    harm(source)
    with pytest.raises(skl.CorruptError, match=message) as error:
        run(source, tokens)
    assert "\n" not in str(error.value)


def test_tars_of_several_runs(tmp_path):
    """Overlapping tars and both names in one directory are refused."""
    tokens, ids, logs = data.teacher(8)
    source = WRITERS["samples"](tmp_path / "a", ids, logs, per_tar=2)
    WRITERS["samples"](source, ids[:3], logs[:3], per_tar=3)
    with pytest.raises(skl.CorruptError, match=r"samples from \d on are in dp0__0-\d.tar too; remove the older tar"):
        run(source, tokens)
    mixed = WRITERS["samples"](tmp_path / "b", ids, logs)
    WRITERS["iterations"](mixed, ids, logs)
    with pytest.raises(
        skl.CorruptError, match="holds tars by iterations and tars by samples; must hold those of one run"
    ):
        run(mixed, tokens)


def test_a_member_that_is_a_bomb(tmp_path, monkeypatch):
    """What unpacks to a size out of all proportion is refused before it fills the memory."""
    from sklformat.interop.neighbours.megatron import members

    tokens, ids, logs = data.teacher(1)
    source = data.write_lists(tmp_path / "a", ids, logs)
    monkeypatch.setattr(members, "_MOST_BYTES", 100)
    monkeypatch.setattr(members, "_MOST_TIMES", 1)
    with pytest.raises(
        skl.CorruptError, match=r"iterations 0 to 0: not what Megatron writes: its content is out of prop"
    ):
        run(source, tokens)


def member(tmp_path, payload, *, saver=(), name="dp0__0-2.tar"):
    """A directory with one member."""
    source = tmp_path / "a"
    source.mkdir()
    settings = {"mbs_save": 1, "dp_size_save": 1, "gbs_save": 2, **dict(saver)}
    data.tar(source / name, data.meta_of(2, **settings), [("0-2.pt.zst", data.packed(payload))])
    return source


GOOD = {
    "values": torch.full((8, 2, 3), -2.0),
    "indices_low": torch.arange(3).to(torch.uint16).expand(8, 2, 3).clone(),
    "bit_17": torch.zeros(6, dtype=torch.uint8),
    "format_version": 2,
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"values": torch.zeros(8, 2)}, r"values of shape \(8, 2\), indices_low of shape \(8, 2, 3\)"),
        ({"values": torch.zeros(8, 2, 4)}, r"values of shape \(8, 2, 4\), indices_low of shape"),
        ({"bit_17": torch.zeros(7, dtype=torch.uint8)}, r"values of shape \(8, 2, 3\), bit_17 of shape \(7,\)"),
        ({"cu_seqlens_padded": torch.zeros(3, 2)}, r"values of shape \(8, 2, 3\), cu_seqlens_padded of shape \(3, 2\)"),
        ({"values": None}, "not what Megatron writes"),
        ({"values": torch.zeros(8, 3, 3), "indices_low": torch.zeros(8, 3, 3, dtype=torch.int32)}, "bit_17 of shape"),
        ({"values": torch.full((8, 2, 3), float("nan"))}, "row 0: position 0: logprob nan"),
        ({"values": torch.full((8, 2, 3), 3.0)}, "row 0: position 0: logprob 3"),
        ({"indices_low": torch.zeros(8, 2, 3, dtype=torch.int32)}, "row 0: position 0: token_ids has 0 twice"),
    ],
)
def test_members_that_cannot_be(tmp_path, change, message):
    """What a member holds must be what Megatron writes, and values must be log-probs."""
    with pytest.raises(skl.CorruptError, match=message):
        run(member(tmp_path, GOOD | change), np.zeros((2, 9), np.int64))


def test_ranges_and_micro_batches_that_do_not_fit(tmp_path):
    """The number of samples must be what names and settings say."""
    tokens = np.zeros((2, 9), np.int64)
    three = {"values": torch.zeros(8, 3, 1), "indices_low": torch.zeros(8, 3, 1, dtype=torch.int32)}
    payload = three | {"bit_17": torch.zeros(8, 3, 1).bool(), "format_version": 2}
    with pytest.raises(
        skl.CorruptError, match="samples 0 to 1: not what Megatron writes: 3 samples of each of 1 ranks"
    ):
        run(member(tmp_path, payload), tokens)
    (tmp_path / "b").mkdir()
    with pytest.raises(skl.CorruptError, match=r"2 samples do not divide into micro-batches of 3 \(mbs_save\)"):
        run(member(tmp_path / "b", GOOD, saver={"mbs_save": 3}), tokens)
    (tmp_path / "c").mkdir()
    with pytest.raises(skl.UnsupportedError, match="format_version 3; known are 1 and 2"):
        run(member(tmp_path / "c", GOOD, saver={"format_version": 3}), tokens)


def test_ranks_that_differ(tmp_path):
    """Ranks must have the same micro-batches, and context-parallel ranks the same sequences and rows."""
    tokens, ids, logs = data.teacher(4)
    source = data.write_lists(tmp_path / "a", ids, logs, dp=2, mbs=1, gbs=4, per_tar=1)
    data.write_lists(tmp_path / "b", ids[:2], logs[:2], dp=2, mbs=1, gbs=2, per_tar=1)
    (tmp_path / "b" / "cp0_dp1__0.tar").replace(source / "cp0_dp1__0.tar")
    with pytest.raises(skl.CorruptError, match="iterations from 0 on: ranks differ in micro-batches"):
        run(source, tokens)
    for name, rows, mbs, message in (
        ("c", 4, 2, "context-parallel ranks have 4, 2 rows"),
        ("d", 8, 1, "context-parallel ranks differ in sequences"),
    ):
        source = data.write_lists(tmp_path / name, ids, logs, cp=2, mbs=2, gbs=4)
        few = np.s_[: 2 * mbs, :rows]
        data.write_lists(tmp_path / f"{name}2", ids[few], logs[few], cp=2, mbs=mbs, gbs=2 * mbs)
        (tmp_path / f"{name}2" / "cp1_dp0__0.tar").replace(source / "cp1_dp0__0.tar")
        with pytest.raises(skl.CorruptError, match=message):
            run(source, tokens)


def test_what_the_user_must_say(tmp_path):
    """Vocabulary and tokens are nowhere in the files; more than 17 bits of ids cannot be."""
    tokens, ids, logs = data.teacher(2)
    source = data.write_lists(tmp_path / "a", ids, logs)
    with pytest.raises(
        ValueError, match="does not say how many ids the teacher has and holds no token ids; give --vocab"
    ):
        convert(ConvertConfig(source=source, destination=tmp_path / "out"))
    with pytest.raises(ValueError, match="17 bits, so that a vocabulary has at most 131,072; this one has 151,936"):
        run(source, tokens, vocab_size=151_936)
    with pytest.raises(ValueError, match="--rounds: of no use for megatron; leave it out"):
        run(source, tokens, rounds=50)
    with pytest.raises(skl.CorruptError, match=f"row 0: position 0: token id {data.V - 1} is not in"):
        run(source, np.zeros_like(tokens), vocab_size=data.V - 1)


def cache_of(tmp_path, tokens, ids, logs, **columns):
    """A cache of top-k records, through plain columns."""
    kept = logs > -500
    offsets = np.concatenate([[0], np.cumsum(kept.sum(2).reshape(-1))])
    sequences = np.arange(len(tokens) + 1) * tokens.shape[1]
    arrays = {"input_ids": tokens.reshape(-1), "token_ids": ids[kept], "logprobs": logs[kept], **columns}
    np.savez(tmp_path / "a.npz", sequence_offsets=sequences, position_offsets=offsets, **arrays)
    settings = {"vocab_size": data.V, "sampler": "topk"}
    return convert(ConvertConfig(source=tmp_path / "a.npz", destination=tmp_path / "cache", **settings)).destination


def test_there_and_back(tmp_path, monkeypatch):
    """A cache that is written for Megatron comes back with the same records and document starts."""
    from sklformat.interop.neighbours.megatron import writing

    monkeypatch.setattr(writing, "_SAMPLES_PER_TAR", 2)
    tokens, ids, logs = data.teacher(5)
    logs[1, 2, 3:], logs[4, 0] = -1e3, -1e3
    starts = np.zeros((5, 9), bool)
    starts[:, 0] = starts[3, 5] = True
    cache = cache_of(tmp_path, tokens, ids, logs, document_start=starts.reshape(-1))
    made = convert(ConvertConfig(source=cache, destination=tmp_path / "m", to="megatron"))
    assert sorted(path.name for path in made.destination.iterdir()) == [
        "dp0__0-2.tar", "dp0__2-4.tar", "dp0__4-5.tar", "tokens.npy",
    ]  # fmt: skip
    assert "each position has 5 entries: 7 were put in, with log-prob -1000, probability 0; 1 positions" in str(made)
    assert "load them with --logits-load-ignore-hash" in str(made)
    tar = tmp_path / "m" / "dp0__2-4.tar"
    damaged = bytearray(tar.read_bytes())
    damaged[damaged.index(b"\x28\xb5\x2f\xfd") + 200] ^= 1
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "dp0__0-2.tar").write_bytes((tmp_path / "m" / "dp0__0-2.tar").read_bytes())
    (tmp_path / "damaged" / tar.name).write_bytes(damaged)
    with pytest.raises(skl.CorruptError, match=r"dp0__2-4\.tar: samples 2 to 2: .* cannot be unpacked as Zstandard"):
        run(tmp_path / "damaged", tokens)
    back = convert(
        ConvertConfig(
            source=tmp_path / "m",
            destination=tmp_path / "back",
            tokens=tmp_path / "m" / "tokens.npy",
            vocab_size=data.V,
        )
    )
    for one, other in zip(skl.open(cache), skl.open(back.destination), strict=True):
        assert one.tokens.tolist() == other.tokens.tolist()
        assert one.targets == other.targets
        assert one.columns["document_start"].tolist() == other.columns["document_start"].tolist()
    convert(ConvertConfig(source=cache, destination=tmp_path / "n", to="megatron"))
    for path in (tmp_path / "m").iterdir():
        if path.name == "tokens.npy":
            assert path.read_bytes() == (tmp_path / "n" / path.name).read_bytes()


def test_an_export_reads_as_megatron_reads_it(tmp_path):
    """The newest layout: names, meta, shapes and types; the most probable record first, fillers behind."""
    import io
    import json
    import tarfile

    import zstandard

    tokens, ids, logs = data.teacher(3)
    logs[0, 0, 2:] = -1e3
    cache = cache_of(tmp_path, tokens, ids, logs)
    convert(ConvertConfig(source=cache, destination=tmp_path / "m", to="megatron"))
    with tarfile.open(tmp_path / "m" / "dp0__0-3.tar") as archive:
        names = archive.getnames()
        meta = json.loads(archive.extractfile("_meta.json").read())
        content = zstandard.ZstdDecompressor().decompress(archive.extractfile("0-1.pt.zst").read())
    assert names == ["_meta.json", "0-1.pt.zst", "1-2.pt.zst", "2-3.pt.zst"]
    saver = {"k": 5, "format_version": 2, "mbs_save": 1, "dp_size_save": 1, "gbs_save": 1, "p": None, "min_k": 1}
    assert meta["saver"] == saver | {"save_dtype": "fp32"}
    payload = torch.load(io.BytesIO(content), weights_only=True)
    values, low, high = payload["values"], payload["indices_low"], payload["bit_17"]
    assert values.shape == low.shape == (8, 1, 5)
    assert values.dtype == torch.float32
    assert low.dtype == torch.uint16
    assert (values.diff(dim=2) <= 0).all()
    found = (np.unpackbits(high.numpy(), count=40).reshape(8, 1, 5).astype(int) << 16) | low.numpy()
    assert found[0, 0].tolist()[2:] == [131_071] * 3
    assert values[0, 0, 2:].tolist() == [-1e3] * 3
    assert np.sort(found[1:, 0]).tolist() == np.sort(ids[0, 1:]).tolist()
    np.testing.assert_allclose(values[1:, 0].exp().numpy(), np.exp(logs[0, 1:]), rtol=0.05)


def test_what_megatron_cannot_hold(tmp_path):
    """Sequences of several lengths, and vocabularies of more than 17 bits."""
    tokens, ids, logs = data.teacher(2)
    cache = cache_of(tmp_path, tokens, ids, logs)
    rows = [{"input_ids": [1, 2, 3][:n], "token_ids": [[5]] * (n - 1), "logprobs": [[-1.0]] * (n - 1)} for n in (2, 3)]
    import json

    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"source": tmp_path / "a.jsonl", "sampler": "topk", "to": "megatron"}
    with pytest.raises(ValueError, match="sequences are all of one length, these are not"):
        convert(ConvertConfig(destination=tmp_path / "out", vocab_size=9, **settings))
    with pytest.raises(ValueError, match="out: ids of Megatron's files have 17 bits"):
        convert(ConvertConfig(destination=tmp_path / "out", vocab_size=200_000, **settings))
    assert not (tmp_path / "out").exists()
    assert cache.exists()
