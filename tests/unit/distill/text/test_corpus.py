"""Documents, token stores and packed sequences."""

import json
import os
import pickle
import struct
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
import xxhash
from mmap_ninja import RaggedMmap

from sklformat.distill.text import corpus, ragged
from sklformat.distill.text.packing import PackedSequences
from sklformat.errors import CorruptError, InUseError, SettingsError, UnsupportedError
from sklformat.files.directories import published
from sklformat.format.order import permute

SEPARATOR = 256


def encode(texts):
    return [list(text.encode()) for text in texts]


def make_store(path, texts, *, vocab_size=257, fingerprint="tok", **encoding):
    documents = [corpus.Document(f"d{i}", text) for i, text in enumerate(texts)]
    facts = {"vocab_size": vocab_size, "tokenizer_fingerprint": fingerprint}
    return corpus.write_token_store(path, documents, encode, **facts, encoding=corpus.Encoding(**encoding))


@pytest.fixture
def texts():
    rng = np.random.default_rng(0)
    return ["".join(chr(c) for c in rng.integers(97, 123, size=n)) for n in rng.integers(1, 60, size=700)]


@pytest.mark.parametrize("per_batch", [1, 3, 7])
def test_arrays_of_several_batches_are_those_of_one(tmp_path, per_batch):
    """However they come, the files are those that mmap_ninja itself writes of all of them, byte for byte."""
    rng = np.random.default_rng(0)
    arrays = [rng.integers(0, 99, n).astype(np.uint16) for n in (3, 1, 4, 1, 5, 9, 2)]
    RaggedMmap.from_lists(tmp_path / "wanted", arrays)
    batches = (arrays[first : first + per_batch] for first in range(0, len(arrays), per_batch))
    ragged.write_ragged(tmp_path / "found", batches)

    def content(directory):
        return {path.relative_to(directory): path.read_bytes() for path in directory.rglob("*") if path.is_file()}

    assert content(tmp_path / "wanted") == content(tmp_path / "found")


def test_the_index_is_not_read_for_each_batch(tmp_path, monkeypatch):
    """Many documents take as long each as few: no batch opens the index of those before it."""
    opened = []
    reload = RaggedMmap._reload_fields
    monkeypatch.setattr(RaggedMmap, "_reload_fields", lambda self: opened.append(self) or reload(self))
    ragged.write_ragged(tmp_path / "found", ([np.arange(3)] for _ in range(20)))
    assert 20 == len(RaggedMmap(tmp_path / "found"))
    assert 2 == len(opened)


def test_documents_come_in_the_order_of_relative_paths(tmp_path):
    """A directory is read recursively in one order, whatever order the file system gives; hidden files are not read."""
    for name in ("b/z.txt", "a.txt", "b/a.txt", ".git/x", "b/.hidden"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"text of {name}")
    (tmp_path / "empty.txt").touch()
    assert ["a.txt", "b/a.txt", "b/z.txt"] == [d.name for d in corpus.read_documents(tmp_path)]
    assert ["z.txt", "a.txt"] == [d.name for d in corpus.read_documents([tmp_path / "b/z.txt", tmp_path / "a.txt"])]


def test_jsonl_gives_one_document_a_line(tmp_path):
    """Each line of a .jsonl file is a document, its field "text"; a bad line is named by file and number."""
    path = tmp_path / "t.jsonl"
    path.write_text('{"text": "one"}\n\n{"text": ""}\n{"text": "two", "id": 3}\n')
    assert [("t.jsonl#0", "one"), ("t.jsonl#3", "two")] == list(corpus.read_documents(path))
    not_json = r"t\.jsonl: line 2 is not JSON: "
    half = r"t\.jsonl: line 2 holds half a surrogate pair, which is no character"
    for line, message in (
        ('{"txt": "x"}', "line 2 has no field 'text'; it has 'txt'"),
        ("[1]", "line 2 is .*, must be an object with fields"),
        ("{", not_json),
        ('{"text": 4}', "line 2 has .* in field 'text', must be text"),
        (r'{"text": "\ud800"}', half),
    ):
        path.write_text('{"text": "one"}\n' + line)
        with pytest.raises(ValueError, match=message):
            list(corpus.read_documents(path))


def test_bad_paths_and_bytes_are_named(tmp_path):
    """No text, a missing path and bytes that are not UTF-8 each raise their own error with the path in it."""
    with pytest.raises(FileNotFoundError, match="nowhere"):
        corpus.read_documents(tmp_path / "nowhere")
    with pytest.raises(
        ValueError, match=r"no text found: no files in .* beside 0 that --include and --exclude leave out and 0"
    ):
        corpus.read_documents(tmp_path)
    (tmp_path / "empty.txt").touch()
    with pytest.raises(ValueError, match=r"no text found: every file in .* is empty"):
        list(corpus.read_documents(tmp_path))
    (tmp_path / "image.png").write_bytes(b"ok\xff\xfe")
    with pytest.raises(ValueError, match=r"image\.png: byte 2 is not UTF-8 text; give its --encoding"):
        list(corpus.read_documents(tmp_path))


def test_standard_library_leaves_out_tests_and_tables():
    """The library's source is there without tests, tables and installed packages, each at least 200 characters long."""
    documents = list(corpus.standard_library_documents())
    names = {document.name for document in documents}
    assert {"argparse.py", "asyncio/tasks.py"} <= names
    assert len(names) == len(documents) > 200
    excluded = ("test", "tests", "site-packages", "idlelib", "encodings", "lib2to3")
    assert [] == [name for name in names if set(excluded) & set(name.split("/")) or "_sysconfigdata" in name]
    assert min(len(document.text) for document in documents) >= 200


def test_held_out_split_depends_on_the_name_alone():
    """A document is held out iff SHA-1 of its name mod 20 is 0, so that no other document can move it."""
    documents = [corpus.Document(f"pkg/m{i}.py", "x") for i in range(400)]
    train, held_out = corpus.split_documents(documents)
    assert 400 == len(train) + len(held_out)
    assert 10 <= len(held_out) <= 32
    assert held_out == [d for d in documents if corpus.is_held_out(d.name)]
    # printf 'pkg/m7.py' | sha1sum, taken mod 20
    assert not corpus.is_held_out("pkg/m7.py")
    with pytest.raises(ValueError, match="1 to train on and 0 held out"):
        corpus.split_documents([corpus.Document("pkg/m7.py", "x")])


def test_pieces_of_a_document_give_it_back():
    """Cutting loses nothing, cuts at line ends only, and leaves short documents as they are."""
    text = "".join(f"line {i}\r\n" for i in range(50)) + "last"
    pieces = list(corpus.cut_documents([corpus.Document("long", text), corpus.Document("short", "s")], max_chars=64))
    assert corpus.Document("short", "s") == pieces[-1]
    assert text == "".join(piece.text for piece in pieces[:-1])
    assert all(len(piece.text) <= 64 and piece.text.endswith("\n") for piece in pieces[:-2])
    assert len(pieces) == len({piece.name for piece in pieces})


class Vocabulary:
    all_special_ids = (2, 2)

    def __init__(self, tokens):
        self.tokens = tokens

    def get_vocab(self):
        return {token: i for i, token in self.tokens}


def digits(data):
    return xxhash.xxh3_128_hexdigest(data)


def test_tokenizer_fingerprint_is_the_digest_of_the_map_written_out():
    """The fingerprint is XXH3-128 of a canonical text, so that any other program can compute it."""
    vocabulary = Vocabulary([(1, "é"), (0, "a"), (2, "<eot>")])
    canonical = b'{"special":[2],"tokens":[[0,"a"],[1,"\\u00e9"],[2,"<eot>"]]}'
    assert digits(canonical) == corpus.tokenizer_fingerprint(vocabulary)
    swapped = Vocabulary([(0, "é"), (1, "a"), (2, "<eot>")])
    assert corpus.tokenizer_fingerprint(swapped) != corpus.tokenizer_fingerprint(vocabulary)


def test_corpus_fingerprint_is_the_digest_of_the_documents_digests():
    """The fingerprint covers tokens and boundaries and does not depend on the integer type that holds them."""
    documents = [np.array([1, 2, 3]), np.array([4])]
    parts = [digits(struct.pack("<3I", 1, 2, 3)), digits(struct.pack("<I", 4))]
    assert digits("".join(parts).encode()) == corpus.corpus_fingerprint(documents)
    assert corpus.corpus_fingerprint(documents) == corpus.corpus_fingerprint([d.astype(np.uint16) for d in documents])
    assert corpus.corpus_fingerprint(documents) != corpus.corpus_fingerprint([np.array([1, 2]), np.array([3, 4])])


@pytest.mark.parametrize(("vocab_size", "dtype"), [(257, "uint16"), (65536, "uint16"), (65537, "uint32")])
def test_store_gives_back_every_document(tmp_path, texts, vocab_size, dtype):
    """What went in comes out, over several batches, in the smallest type; the facts describe it."""
    texts = [*texts[:300], "", *texts[300:]]  # no tokens: left out
    store = make_store(tmp_path / "deep/store", texts, vocab_size=vocab_size)
    kept = [text for text in texts if text]
    assert kept == [bytes(store[i].astype(np.uint8)).decode() for i in range(len(store))]
    assert (dtype, len(kept), sum(map(len, kept))) == (
        store.facts.dtype,
        store.facts.num_documents,
        store.facts.num_tokens,
    )
    assert corpus.corpus_fingerprint(encode(kept)) == store.facts.corpus_fingerprint
    store.verify()
    assert ["store"] == os.listdir(tmp_path / "deep")
    with pytest.raises(ValueError, match="read-only"):
        store[0][0] = 1


def test_store_is_used_again_only_for_the_same_text_and_tokenizer(tmp_path):
    """A second writing with equal settings tokenises nothing; with others it is refused and the store is untouched."""
    first = make_store(tmp_path / "s", ["abc", "de"])

    def never(texts):
        raise AssertionError

    documents = [corpus.Document("d0", "abc"), corpus.Document("d1", "de")]
    again = corpus.write_token_store(tmp_path / "s", documents, never, vocab_size=257, tokenizer_fingerprint="tok")
    assert first.facts == again.facts
    with pytest.raises(SettingsError, match=r"by another tokenizer \(tok, now other\)"):
        make_store(tmp_path / "s", ["abc", "de"], fingerprint="other")
    with pytest.raises(SettingsError, match="made of other text"):
        make_store(tmp_path / "s", ["abc", "dE"])
    assert first.facts == corpus.TokenStore(tmp_path / "s").facts


def test_failed_writing_leaves_nothing(tmp_path):
    """An id outside the vocabulary, or no tokens at all, stops the writing and leaves no directory behind."""
    with pytest.raises(ValueError, match=r"d1: token ids from 97 to 98 .* \[0, 98\)"):
        make_store(tmp_path / "s", ["a", "ab"], vocab_size=98)
    with pytest.raises(ValueError, match="no text found: the documents hold no tokens"):
        make_store(tmp_path / "s", ["", ""])
    assert [] == os.listdir(tmp_path)


def test_damaged_store_is_refused(tmp_path, texts):
    """Lost, cut or changed files never give other tokens silently: opening or verify says that the store is damaged."""
    path = tmp_path / "s"
    make_store(path, texts)
    damaged = 0
    for file in sorted((path / "tokens").rglob("*.ninja")):
        original = file.read_bytes()
        for changed in (None, original[: len(original) // 2], b""):
            if changed is None:
                file.unlink()
            else:
                file.write_bytes(changed)
            try:
                store = corpus.TokenStore(path)
                store.verify()
            except CorruptError:
                damaged += 1
            else:  # the file tells nothing about the tokens: order and type names
                assert texts == [bytes(store[i].astype(np.uint8)).decode() for i in range(len(store))]
            file.write_bytes(original)
    assert damaged > 20
    data = path / "tokens/data.ninja"
    content = bytearray(data.read_bytes())
    content[77] ^= 4
    data.write_bytes(content)
    with pytest.raises(CorruptError, match="stored is"):
        corpus.TokenStore(path).verify()


def test_store_facts_are_checked(tmp_path):
    """A store without facts, with foreign facts, or of a newer version raises the named error."""
    path = tmp_path / "s"
    with pytest.raises(FileNotFoundError, match=r"s is no token store: it has no store\.json"):
        corpus.TokenStore(path)
    assert not path.exists()
    make_store(path, ["abc"])
    facts = json.loads((path / "store.json").read_text())
    (path / "store.json").write_text(json.dumps(facts | {"version": 3}))
    with pytest.raises(UnsupportedError, match="version 3, this package reads 2"):
        corpus.TokenStore(path)
    fields = r"store\.json: must hold exactly the fields "
    wrong = ("[]", json.dumps(facts | {"more": 1}), json.dumps(facts | {"num_tokens": "3"}))
    for content, message in (("{", r"store\.json: not JSON: "), *((text, fields) for text in wrong)):
        (path / "store.json").write_text(content)
        with pytest.raises(CorruptError, match=message):
            corpus.TokenStore(path)


@pytest.mark.parametrize(
    ("encoding", "before", "after", "front"),
    [
        ({}, [], [SEPARATOR], []),
        ({"bos": "document", "bos_id": 257}, [257], [SEPARATOR], []),
        ({"bos": "document", "bos_id": SEPARATOR}, [SEPARATOR], [], []),
        ({"bos": "window", "bos_id": 257}, [], [SEPARATOR], [257]),
    ],
)
def test_packing_is_the_stream_cut_into_windows(tmp_path, texts, encoding, before, after, front):
    """Window i is tokens [i·L, i·L + L] of the shuffled documents, each between its marks; no token is lost."""
    store = make_store(tmp_path / "s", texts, vocab_size=258, **encoding)
    order = permute(np.arange(len(store)), len(store), seed=5)
    marked = [[*before, *store[d].tolist(), *after] for d in order]
    stream = [token for document in marked for token in document]
    begins = [place == 0 for document in marked for place in range(len(document))]
    for seq_len in (1, 2, 7, 64, 1000):
        packed = PackedSequences(tmp_path / "s", seq_len=seq_len, separator_id=SEPARATOR, seed=5)
        length = seq_len + 1 - len(front)
        assert (len(stream) - length) // seq_len + 1 == len(packed)
        for i in range(len(packed)):
            place = slice(i * seq_len, i * seq_len + length)
            assert [*front, *stream[place]] == packed[i].tolist()
            assert [False] * len(front) + begins[place] == packed.document_starts(i).tolist()
    assert np.uint32 == packed[0].dtype
    assert packed[len(packed) - 1].tolist() == packed[-1].tolist()
    assert packed.document_starts(len(packed) - 1).tolist() == packed.document_starts(-1).tolist()
    for refused in (packed.__getitem__, packed.document_starts):
        with pytest.raises(IndexError):
            refused(len(packed))


def test_store_says_how_its_text_was_encoded(tmp_path):
    """BOS and special tokens stand in the facts; a store of before knows none, and another way is refused with both."""
    made = {"bos": "document", "bos_id": 256}
    assert corpus.Encoding(**made) == make_store(tmp_path / "s", ["abc"], **made).facts.encoding
    message = r"made in another way \(--bos document \(id 256\), now --bos none --special-tokens keep\); give what"
    with pytest.raises(SettingsError, match=message):
        make_store(tmp_path / "s", ["abc"], special_tokens="keep")
    path = tmp_path / "s" / "store.json"
    facts = json.loads(path.read_text())
    for wrong in ({"bos": "auto"}, {"bos_id": None}, {"bos": "none"}, {"special_tokens": "x"}, {"chat_template": 0}):
        path.write_text(json.dumps(facts | wrong))
        with pytest.raises(CorruptError, match="must say how text was encoded"):
            corpus.TokenStore(tmp_path / "s")
    old = {name: value for name, value in facts.items() if not hasattr(corpus.Encoding, name)}
    path.write_text(json.dumps(old | {"version": 1}))
    assert corpus.Encoding() == corpus.TokenStore(tmp_path / "s").facts.encoding


def test_packing_depends_on_the_seed(tmp_path, texts):
    """Another seed is another order of documents, hence other sequences; the same seed gives the same."""
    make_store(tmp_path / "s", texts)
    packed = [PackedSequences(tmp_path / "s", seq_len=32, separator_id=0, seed=seed) for seed in (1, 1, 2)]
    assert packed[0][3].tolist() == packed[1][3].tolist()
    assert packed[0][3].tolist() != packed[2][3].tolist()


def test_isolated_documents_do_not_predict_each_other(tmp_path, texts):
    """Tokens stay; the positions that predict a document's first token do not count, separators before them do."""
    make_store(tmp_path / "s", texts)
    together = PackedSequences(tmp_path / "s", seq_len=16, separator_id=0, seed=1)
    isolated = PackedSequences(tmp_path / "s", seq_len=16, separator_id=0, seed=1, isolated=True)
    assert [window.tolist() for window in together] == [window.tolist() for window in isolated]
    borders = 0
    for i in range(len(isolated)):
        counted, starts = isolated.counted(i), isolated.document_starts(i)
        assert together.counted(i) is None
        assert (~starts[1:]).tolist() == counted.tolist()
        assert (isolated[i][:-1][~counted] == 0).all()
        borders += int((~counted).sum())
    assert borders > 5


def test_first_and_count_show_a_part(tmp_path, texts):
    """A part shows the same windows under numbers that start at 0."""
    make_store(tmp_path / "s", texts)
    everything = PackedSequences(tmp_path / "s", seq_len=16, separator_id=0, seed=1)
    part = PackedSequences(tmp_path / "s", seq_len=16, separator_id=0, seed=1, first=10, count=5)
    assert [everything[10 + i].tolist() for i in range(5)] == [window.tolist() for window in part]
    assert [everything.document_starts(10 + i).tolist() for i in range(5)] == [
        part.document_starts(i).tolist() for i in range(5)
    ]
    assert 5 == len(part)


def test_short_text_is_refused_with_both_numbers(tmp_path):
    """Text below one sequence, or below the sequences asked, says how many tokens there are and how many it takes."""
    make_store(tmp_path / "s", ["abc", "de"])  # with separators 7 tokens
    assert 1 == len(PackedSequences(tmp_path / "s", seq_len=6, separator_id=0, seed=0))
    with pytest.raises(ValueError, match="take 8 tokens, it has 7"):
        PackedSequences(tmp_path / "s", seq_len=7, separator_id=0, seed=0)
    with pytest.raises(ValueError, match="4 sequences of 2 positions take 9 tokens, it has 7"):
        PackedSequences(tmp_path / "s", seq_len=2, separator_id=0, seed=0, first=1, count=3)
    seeds, parts = (
        r"separator_id must be in \[0, 2\^32\) and seed in \[0, 2\^64\), got",
        "first must be >= 0 and count >=",
    )
    for wrong, message in (
        ({"seq_len": 0}, "seq_len must be >= 1, got 0"),
        ({"separator_id": -1}, seeds),
        ({"seed": -1}, seeds),
        ({"first": -1}, parts),
        ({"count": 0}, parts),
    ):
        with pytest.raises(ValueError, match=message):
            PackedSequences(tmp_path / "s", **{"seq_len": 2, "separator_id": 0, "seed": 0} | wrong)


def test_packed_sequences_travel_to_other_processes(tmp_path, texts):
    """Pickled they are small, whatever the corpus; another process that opens the store again reads the same tokens."""
    make_store(tmp_path / "s", texts)
    packed = PackedSequences(tmp_path / "s", seq_len=32, separator_id=0, seed=9)
    expected = packed[2].tolist()
    pickled = pickle.dumps(packed)
    assert len(pickled) < 1000
    program = "import pickle, sys; print(pickle.load(sys.stdin.buffer)[2].tolist())"
    result = subprocess.run([sys.executable, "-c", program], input=pickled, capture_output=True, check=True)
    assert expected == json.loads(result.stdout)


def test_directory_is_published_whole_or_not_at_all(tmp_path):
    """A failing body leaves the old directory; a finished one replaces it; leftovers of a killed process vanish."""
    target = tmp_path / "deep/model"
    target.with_name("model.partial").mkdir(parents=True)
    (tmp_path / "deep/model.partial/left.over").touch()
    with published(target) as partial:
        assert [] == os.listdir(partial)
        (partial / "a").write_text("1")
    with pytest.raises(FileExistsError, match="exists already"), published(target):
        raise AssertionError
    with pytest.raises(KeyError), published(target, replace=True) as partial:
        raise KeyError((partial / "a").write_text("2"))
    assert "1" == (target / "a").read_text()
    with published(target, replace=True) as partial:
        (partial / "a").write_text("3")
    assert "3" == (target / "a").read_text()
    assert ["model"] == os.listdir(tmp_path / "deep")
    target.rename(tmp_path / "deep/model.old")  # what a crash between the two renames leaves
    with pytest.raises(FileExistsError), published(target):
        raise AssertionError
    assert "3" == (target / "a").read_text()


def test_directory_has_one_writer(tmp_path):
    """While one process fills a directory a second one is refused and disturbs nothing."""
    with published(tmp_path / "d") as partial:
        (partial / "a").touch()
        with pytest.raises(InUseError, match="another process"), published(tmp_path / "d"):
            raise AssertionError
    assert ["a"] == os.listdir(tmp_path / "d")


def test_large_documents_are_written_in_little_memory(tmp_path):
    """They are neither tokenised nor written 256 at once: what is in memory does not grow with their number."""
    ids = np.zeros(800_000, np.uint8)
    tracemalloc.start()
    try:
        store = corpus.write_token_store(
            tmp_path / "store",
            (corpus.Document(f"d{i}", "x" * ids.size) for i in range(60)),
            lambda texts: [ids] * len(texts),
            vocab_size=257,
            tokenizer_fingerprint="tok",
            encoding=corpus.Encoding(),
        )
        assert tracemalloc.get_traced_memory()[1] < 60 * ids.size
    finally:
        tracemalloc.stop()
    assert [ids.size] * 60 == store.lengths.tolist()


def test_a_full_disk_is_an_error(tmp_path, monkeypatch):
    """Where the tokens do not fit, OSError says how much they need and nothing is left; a mapping would just die."""
    usage = type("Usage", (), {"free": (1 << 20) + 1500})
    monkeypatch.setattr(ragged.shutil, "disk_usage", lambda _: usage)
    make_store(tmp_path / "fits", ["x" * 500])
    make_store(tmp_path / "batches", ["xx"] * 600)  # what a batch wrote is not asked for again
    with pytest.raises(OSError, match="No space left on device; the tokens need 1050576 bytes more") as caught:
        make_store(tmp_path / "full", ["x" * 250, "y" * 250, "z" * 500])
    assert str(tmp_path / "full.partial") == caught.value.filename
    assert {"fits", "batches"} == {path.name for path in tmp_path.iterdir()}
