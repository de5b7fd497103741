"""merge and slice: the same sequences in new shards, the same bytes from any moment; the input keeps every byte."""

import dataclasses
import itertools
import json
import shutil

import fsspec
import pytest
import reference
from operation_data import COLUMNS, PER_SHARD, content, header, run_until_call, sequence, write

import sklformat as skl
from sklformat.cli import main
from sklformat.files.disk import locked_directory
from sklformat.format import layout
from sklformat.format.header import parse_header
from sklformat.operations import merge_caches, slice_cache
from sklformat.operations.headers import merged_header
from sklformat.settings.operations import MergeConfig, SliceConfig

KINDS = {
    "counts": {},
    "columns": {"columns": COLUMNS},
    "ragged": {"seq_len": 0},
    "without tokens": {"store_tokens": False, "columns": ("record_logprob",)},
    "ratios": {"kind": "ratios", "rounds": 0, "sampler": "topk"},
    "wide": {"vocab_size": 200_000},
}


def captured(path, first, count):
    """A cache of a part of one packed text."""
    capture = {"packing": {"first_sequence": first, "separator_id": 1, "sequences_per_shard": 3}}
    return write(path, count, first, capture=capture, corpus_fingerprint="1" * 32)


def merge(out, *caches, **settings):
    return merge_caches(MergeConfig(caches=tuple(map(str, caches)), out=out, **settings))


def part_of(cache, sequences, out, **settings):
    return slice_cache(SliceConfig(cache=str(cache), sequences=sequences, out=out, **settings))


def assert_holds(cache, expected):
    """A sound cache of these sequences, in shards that the reference reads too."""
    assert [] == skl.verify(cache)
    found = skl.open(cache)
    assert [(e.alignment, e.targets) for e in expected] == [(s.alignment, s.targets) for s in found]
    assert list(expected) == list(found)
    shards = reference.decode_cache(cache)
    assert len(expected) == sum(len(shard.sequences) for shard in shards)


@pytest.mark.parametrize("kind", KINDS)
def test_merge_holds_all_sequences_in_order(tmp_path, kind):
    """Those of the first cache, then those of the second, in full shards; the input keeps every byte."""
    a, b = write(tmp_path / "a", 7, **KINDS[kind]), write(tmp_path / "b", 5, 40, per_shard=2, **KINDS[kind])
    before = content(a), content(b)
    made = merge(tmp_path / "c", a, b)
    assert (12, 12, skl.open(tmp_path / "c").fingerprint) == (made.sequences, made.sequences_made, made.fingerprint)
    assert_holds(tmp_path / "c", [*skl.open(a), *skl.open(b)])
    assert [3, 3, 3, 3] == [len(shard) for shard in skl.open(tmp_path / "c").shards()]
    assert before == (content(a), content(b))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("per_shard", [None, 1, 4])
def test_slice_holds_the_sequences_that_were_asked_for(tmp_path, kind, per_shard):
    """Across shards of the cache and of the slice, numbered from 0."""
    a = write(tmp_path / "a", 8, **KINDS[kind])
    before = content(a)
    made = part_of(a, "2:7", tmp_path / "s", sequences_per_shard=per_shard)
    assert (5, 5) == (made.sequences, made.sequences_made)
    assert_holds(tmp_path / "s", list(skl.open(a))[2:7])
    assert before == content(a)


def test_blocks_have_the_bytes_of_an_undisturbed_writer(tmp_path):
    """What is copied is what a writer with the same header would have encoded."""
    a, b = write(tmp_path / "a", 4, columns=COLUMNS), write(tmp_path / "b", 4, 4, columns=COLUMNS)
    merge(tmp_path / "c", a, b)
    made = skl.open(tmp_path / "c").header
    with skl.CacheWriter(tmp_path / "d", header=made, sequences_per_shard=PER_SHARD) as writer:
        for number in range(8):
            writer.append(*sequence(made, number))
    assert content(tmp_path / "d") == content(tmp_path / "c")


def test_a_slice_of_slices_and_a_shard(tmp_path):
    """A part of a part, of a single shard, and of all: ``:`` puts a cache into shards of another size."""
    a = write(tmp_path / "a", 8)
    part_of(a, "1:", tmp_path / "s")
    part_of(tmp_path / "s", ":3", tmp_path / "t")
    part_of(a / "shard-00001.skl", "1:2", tmp_path / "u")
    part_of(a, ":", tmp_path / "v", sequences_per_shard=8)
    assert list(skl.open(a))[1:4] == list(skl.open(tmp_path / "t"))
    assert list(skl.open(a))[4:5] == list(skl.open(tmp_path / "u"))
    assert_holds(tmp_path / "v", list(skl.open(a)))
    assert ["manifest.json", "shard-00000.skl"] == sorted(content(tmp_path / "v"))


def test_killed_anywhere_it_resumes_to_the_same_bytes(tmp_path):
    """After kill -9 before any write, sync or rename there is no smaller cache, and the same command ends it."""
    a, b = captured(tmp_path / "a", 0, 4), captured(tmp_path / "b", 4, 2)
    (a / "tokens").mkdir()
    (a / "tokens" / "store.json").write_text("{}")
    before = content(a), content(b)

    def run(out):
        return merge(out, a, b, sequences_per_shard=4)

    run(tmp_path / "whole")
    whole = content(tmp_path / "whole")
    assert b"{}" == whole["tokens/store.json"]
    for call in itertools.count(1):
        out = tmp_path / str(call)
        killed = run_until_call(call, lambda out=out: run(out))
        if not killed:
            break
        try:
            assert content(out)
            assert len(skl.open(out)) == len(skl.open(tmp_path / "whole"))
        except (skl.MissingShardError, AssertionError, FileNotFoundError):
            assert not (out / "manifest.json").exists()
        run(out)
        assert whole == content(out), call
        assert 0 == run(out).sequences_made
        assert whole == content(out), call
        shutil.rmtree(out)
    assert call > 15
    assert before == (content(a), content(b))


def test_a_damaged_input_is_named(tmp_path):
    """A flipped bit of a payload is found while it is copied; nothing of the output is taken for a cache."""
    a, b = write(tmp_path / "a", 4), write(tmp_path / "b", 4, 9)
    shard = b / "shard-00000.skl"
    data = bytearray(shard.read_bytes())
    data[4096 + 70] ^= 1
    shard.write_bytes(data)
    with pytest.raises(skl.CorruptError, match=r"b/shard-00000.skl: block 0: byte 4096: payload checksum"):
        merge(tmp_path / "c", a, b)
    with pytest.raises(skl.UnfinishedError):
        skl.open(tmp_path / "c")


@pytest.mark.parametrize(
    ("changes", "both"),
    [
        ({"teacher_fingerprint": "2" * 32}, f"teacher_fingerprint: '{'0' * 32}' != '{'2' * 32}'"),
        ({"tokenizer_fingerprint": "3" * 32}, "tokenizer_fingerprint: "),
        ({"sampler": "systematic"}, "sampler: 'multinomial' != 'systematic'"),
        ({"rounds": 21}, "rounds: 20 != 21"),
        ({"kind": "ratios"}, "kind: 'counts' != 'ratios'"),
        ({"profile": "R32"}, "profile: 'R24' != 'R32'"),
        ({"store_tokens": False}, "store_tokens: True != False"),
        ({"columns": ("entropy",)}, r"columns: \(\) != \('entropy',\)"),
        ({"seq_len": 0}, "seq_len: 8 != 0"),
        ({"vocab_size": 301}, "vocab_size: 300 != 301"),
        ({"capture": {"teacher": {"dtype": "bfloat16"}}}, "capture.teacher.*'float32'.*'bfloat16'"),
        ({"capture": {"packing": {"isolated": True}}}, "capture.packing.isolated: None != True"),
    ],
)
def test_caches_of_other_settings_are_refused(tmp_path, capfd, changes, both):
    """One line names both caches and both values, and nothing is written."""
    capture = {"teacher": {"dtype": "float32", "device": "cpu"}, "packing": {"num_tokens": 3}}
    a, b = write(tmp_path / "a", 2, capture=capture), write(tmp_path / "b", 2, 5, **{"capture": capture} | changes)
    with pytest.raises(skl.SettingsError, match=both):
        merge(tmp_path / "c", a, b)
    assert not (tmp_path / "c").exists()
    assert 1 == main(["merge", str(a), str(b), "--out", str(tmp_path / "c")])
    err = capfd.readouterr().err
    assert f"{a} and {b} cannot be merged (the first's value != the second's)" in err
    assert 1 == err.count("\n")


def test_texts_may_differ(tmp_path):
    """What is of the text may differ, and each part's is in the header; the corpus is that of all, and cut nowhere."""
    captures = [{"packing": {"first_sequence": 0, "separator_id": 1, "num_tokens": n}, "batch_size": n} for n in (5, 6)]
    a = write(tmp_path / "a", 2, corpus_fingerprint="1" * 32, packing_seed=3, sampling_seed=9, capture=captures[0])
    b = write(tmp_path / "b", 1, 7, corpus_fingerprint="2" * 32, packing_seed=4, sampling_seed=9, capture=captures[1])
    (a / "tokens").mkdir()
    made = merge(tmp_path / "c", a, b)
    assert "token stores are of one text each" in str(made)
    found = skl.open(tmp_path / "c").header
    assert (0, 9) == (found.packing_seed, found.sampling_seed)
    assert reference.xxh128(json.dumps({"corpora": ["1" * 32, "2" * 32]}, separators=(",", ":")).encode()) == int(
        found.corpus_fingerprint, 16
    )
    assert {"packing": {"first_sequence": 0}} == {k: v for k, v in found.capture.items() if k != "merged"}
    merged = found.capture["merged"]
    assert (2, 2) == (merged["caches"], merged["sequences_per_shard"])
    assert [skl.open(path).fingerprint for path in (a, b)] == [part["cache"] for part in merged["parts"]]
    assert [(2, "1" * 32, 3), (1, "2" * 32, 4)] == [
        (part["sequences"], part["corpus_fingerprint"], part["packing_seed"]) for part in merged["parts"]
    ]
    assert [5, 6] == [part["capture"]["packing"]["num_tokens"] for part in merged["parts"]]


def test_parts_of_one_text_keep_how_it_is_packed(tmp_path):
    """Caches that follow each other in one packed text stay packed so, with the store; in another order they do not."""
    a, b = captured(tmp_path / "a", 4, 5), captured(tmp_path / "b", 9, 2)
    (b / "tokens" / "tokens").mkdir(parents=True)
    (b / "tokens" / "store.json").write_text("{}")
    made = merge(tmp_path / "c", a, b)
    assert () == made.says
    assert {"tokens/store.json": b"{}"} == {k: v for k, v in content(tmp_path / "c").items() if "tokens" in k}
    found = skl.open(tmp_path / "c").header
    assert "1" * 32 == found.corpus_fingerprint
    assert {"first_sequence": 4, "separator_id": 1, "sequences_per_shard": 3} == found.capture["packing"]
    merge(tmp_path / "d", b, a)
    assert "separator_id" not in skl.open(tmp_path / "d").header.capture["packing"]
    assert not (tmp_path / "d" / "tokens").exists()
    part_of(tmp_path / "c", "3:6", tmp_path / "s")
    sliced = skl.open(tmp_path / "s").header.capture
    assert 7 == sliced["packing"]["first_sequence"]
    assert [3, 6] == sliced["sliced"]["sequences"]
    assert (tmp_path / "s" / "tokens" / "store.json").exists()


def test_many_parts_are_told_by_a_digest(tmp_path):
    """Where a header has no room for what each part says, it has a digest of that, and all else as before."""
    caches = [skl.open(write(tmp_path / str(i), 1, i, capture={"text": "x" * 300 + str(i)})) for i in range(12)]
    made, follow = merged_header(caches, 4)
    assert not follow
    assert {"caches", "digest", "sequences_per_shard"} == set(made.capture["merged"])
    other, _ = merged_header(caches[::-1], 4)
    assert other.capture["merged"]["digest"] != made.capture["merged"]["digest"]
    assert made == parse_header(made.pack())


def test_merges_of_merges(tmp_path):
    """A merged cache merges again."""
    paths = [write(tmp_path / str(i), 2, 2 * i) for i in range(3)]
    merge(tmp_path / "m", *paths[:2])
    merge(tmp_path / "n", tmp_path / "m", paths[2])
    assert_holds(tmp_path / "n", [*itertools.chain(*map(skl.open, paths))])


def run(*words):
    return main([str(word) for word in words])


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (("merge", "a", "--out", "c"), 2, "a merge takes two caches or more, got 1"),
        (("merge", "b", "a", "b", "--out", "c"), 1, ", whose sequences would come twice; give each once"),
        (("merge", "a", "empty", "--out", "c"), 1, "empty: the cache holds no sequence, so nothing can be taken"),
        (("merge", "a", "nowhere", "--out", "c"), 1, "nowhere: no such file or directory"),
        (("merge", "a", "b", "--out", "a"), 1, "a: lies in a, which is read; choose another directory"),
        (("slice", "a", "0:2", "--out", "a/part"), 1, "a/part: lies in a, which is read"),
        (("slice", "a/shard-00000.skl", "0:2", "--out", "a"), 1, "a: lies in a/shard-00000.skl, which is read"),
        (("slice", "a", "2:9", "--out", "c"), 1, "a: sequences 2:9 of 4; give A:B with 0 <= A < B <= 4"),
        (("slice", "a", "2:2", "--out", "c"), 1, "a: sequences 2:2 of 4"),
        (("slice", "a", "two", "--out", "c"), 2, "the sequences to keep must be A:B, such as 900:1000, got 'two'"),
        (("slice", "a", "0:2", "--out", "file"), 1, "file: is no directory, and a cache is one"),
        (("slice", "a", "0:2", "--out", "foreign"), 1, "foreign is not empty and holds no cache (mine.txt is there)"),
        (("slice", "a", "0:2", "--out", "b"), 1, "b: made with other settings"),
    ],
)
def test_what_cannot_be_is_said_in_a_line(tmp_path, monkeypatch, capfd, words, status, message):
    """Nothing is written, and the line says what to do."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a", 4)
    write(tmp_path / "b", 2, 9)
    write(tmp_path / "empty", 0)
    (tmp_path / "file").write_text("")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "mine.txt").write_text("")
    before = content(tmp_path)
    assert status == run(*words)
    out, err = capfd.readouterr()
    assert ("", 1) == (out, err.count("\n"))
    assert message in err
    assert before == content(tmp_path)
    assert not (tmp_path / "c").exists()


def test_a_source_behind_a_url(tmp_path):
    """Blocks come from a store as from a disk, through checked local copies; a token store there stays there."""
    a = write(tmp_path / "a", 5, columns=COLUMNS)
    store = fsspec.filesystem("memory")
    for name, data in content(a).items():
        store.pipe(f"/operations/a/{name}", data)
    part_of("memory://operations/a", "1:5", tmp_path / "s")
    part_of(a, "1:5", tmp_path / "t")
    assert content(tmp_path / "t") == content(tmp_path / "s")
    store.rm("/operations", recursive=True)


def test_more_shards_than_a_manifest_lists_are_refused_at_the_start(tmp_path, monkeypatch):
    """Before anything is written, and with both numbers."""
    a = write(tmp_path / "a", 5)
    monkeypatch.setattr(layout, "MAX_SHARDS", 4)
    with pytest.raises(
        ValueError, match="5 sequences in shards of 1 make more than 4 shards, the most that one manifest"
    ):
        part_of(a, ":", tmp_path / "s", sequences_per_shard=1)
    assert not (tmp_path / "s").exists()


def test_a_finished_output_wants_nothing(tmp_path, capfd):
    """The same command again says that all is there; another part, or another size of shards, is refused."""
    write(tmp_path / "a", 6)
    words = ["slice", tmp_path / "a", "0:4", "--out", tmp_path / "s"]
    assert 0 == run(*words)
    whole = content(tmp_path / "s")
    assert 0 == run(*words)
    assert "all there already" in capfd.readouterr().out
    assert 1 == run("slice", tmp_path / "a", "0:5", "--out", tmp_path / "s")
    assert "capture.sliced.sequences: [0, 4] != [0, 5]" in capfd.readouterr().err
    assert 1 == run(*words, "--sequences-per-shard", 2)
    assert "capture.sliced.sequences_per_shard: 3 != 2" in capfd.readouterr().err
    assert whole == content(tmp_path / "s")


def test_a_second_writer_is_refused(tmp_path):
    """While a process writes a directory no other one does."""
    write(tmp_path / "a", 3)
    with locked_directory(tmp_path / "s"), pytest.raises(skl.InUseError, match="another process is writing here"):
        part_of(tmp_path / "a", "0:2", tmp_path / "s")


def test_blocks_of_another_layout_are_not_copied(tmp_path):
    """A writer copies no block that a reader would take for something else; it stays usable."""
    a = skl.open(write(tmp_path / "a", 2, rounds=21))
    shard, _ = a.find(0)
    with skl.CacheWriter(tmp_path / "b", header=header()) as writer:
        with pytest.raises(ValueError, match=r"are laid out in another way: rounds: 21 != 20; read its sequences"):
            writer.copy(shard, range(2))
        writer.append(*sequence(header(), 1))
    assert 1 == len(skl.open(tmp_path / "b"))
    with pytest.raises(ValueError, match="the writer is closed"):
        writer.copy(shard, range(2))


def test_a_shard_that_was_full_when_its_writer_died_is_sealed(tmp_path):
    """A writer killed between its last sequence and the seal is resumed with the next shard, as an undisturbed one."""
    write(tmp_path / "whole", 5)
    of = dataclasses.replace(header(), shard_number=0)
    (tmp_path / "c").mkdir()
    writer = skl.ShardWriter(tmp_path / "c" / "shard-00000.skl", header=of)
    for number in range(PER_SHARD):
        writer.append(*sequence(of, number))
    writer.close()
    with skl.CacheWriter(tmp_path / "c", header=header(), sequences_per_shard=PER_SHARD) as resumed:
        for number in range(len(resumed), 5):
            resumed.append(*sequence(of, number))
    assert content(tmp_path / "whole") == content(tmp_path / "c")
