"""Files of every kind as rows and documents: the same text whatever holds it, and one line for what cannot be read."""

import gzip
import json
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from sklformat.distill.text.documents import read_documents
from sklformat.distill.text.sources import json_rows, prose, streams
from sklformat.distill.text.sources.rows import read_made
from sklformat.errors import CorruptError
from sklformat.settings.files import TextFiles

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
zstandard = pytest.importorskip("zstandard")

KINDS = [
    "a.jsonl",
    "A.JSONL",
    "a.ndjson",
    "a.jsonl.gz",
    "a.jsonl.zst",
    "a.json",
    "lines.json",
    "a.json.gz",
    "a.parquet",
]
KINDS += ["file.arrow", "stream.arrow"]


def packed(path, data):
    """Bytes as the name of their file says; in members and frames of 20 bytes, as appending leaves them."""
    parts = [data[i : i + 20] for i in range(0, len(data), 20)] or [b""]
    pack = {".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}.get(path.suffix)
    return b"".join(map(pack, parts)) if pack else data


def write_rows(path, rows, encoding="utf-8"):
    """A file of rows; returns its path."""
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)
    elif path.suffix == ".arrow":
        table = pa.Table.from_pylist(rows)
        opened = (pa.ipc.new_stream if path.name == "stream.arrow" else pa.ipc.new_file)(path, table.schema)
        with opened as file:
            file.write_table(table, max_chunksize=2)
    else:
        is_array = ".json" in path.suffixes and path.name != "lines.json"
        lines = json.dumps(rows, indent=1) if is_array else "\n".join(map(json.dumps, rows)) + "\n"
        path.write_bytes(packed(path, lines.encode(encoding)))
    return path


def read(path, **how):
    return [tuple(document) for document in read_documents(TextFiles(text=(path,), **how))]


def refusal(path, error=ValueError, **how):
    """The one line that a file is refused with."""
    with pytest.raises(error) as caught:
        read(path, **how)
    assert str(path) in str(caught.value)
    return str(caught.value)


# --- kinds ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(st.text(max_size=40), min_size=1, max_size=6), piece=st.integers(1, 40))
def test_rows_of_every_kind_come_back(tmp_path, kind, texts, piece):
    """What was written as rows is read as the same texts under the same numbers, in pieces of whatever size."""
    path = write_rows(tmp_path / kind, [{"id": i, "body": text} for i, text in enumerate(["x", *texts])])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streams, "PIECE_BYTES", piece)
        patch.setattr(streams, "_ZSTD_BYTES", piece)
        found = read(path, field="body")
    assert [(f"{kind}#{i}", text) for i, text in enumerate(["x", *texts]) if text] == found


def test_rows_keep_their_other_fields(tmp_path):
    """A row has its name, its place for messages, and all fields, of which tables read those that are wanted."""
    rows = [{"text": "a", "messages": [{"role": "user", "content": "hi"}]}, {"text": "b", "messages": []}]
    for kind, place in (("a.jsonl", "line 2"), ("a.json", "row 1"), ("a.parquet", "row 1"), ("stream.arrow", "row 1")):
        path = write_rows(tmp_path / kind, rows)
        found = list(read_made(TextFiles(text=(path,)), lambda row: row))
        assert (f"{kind}#1", f"{path}: {place}") == found[1][:2]
        assert rows == [dict(row.values) for row in found]
    path = tmp_path / "a.txt"
    path.write_text("prose")
    assert [("a.txt", str(path), {"text": "prose"})] == list(read_made(TextFiles(text=(path,)), lambda row: row))
    files = TextFiles(text=(write_rows(tmp_path / "b.parquet", rows[:1]),))
    [row] = read_made(files, lambda row: row, wanted={"text", "chat"})
    assert {"text": "a"} == row.values


@pytest.mark.parametrize("name", ["a.txt", "a.md", "noending", "a.txt.gz", "a.txt.zst", "a.py.gz"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "utf-16-le", "latin-1", "cp1252", "utf-8-sig"])
def test_plain_text_in_every_encoding(tmp_path, name, encoding, monkeypatch):
    """A text file is one document, byte for byte what it decodes to, whatever packs it and in whatever pieces."""
    text = "Grüße,\r\nÆon\rü\n\n"
    path = tmp_path / name
    path.write_bytes(packed(path, text.encode(encoding)))
    monkeypatch.setattr(streams, "PIECE_BYTES", 3)
    assert [(name, text)] == read(path, encoding=encoding)
    rows = write_rows(tmp_path / "rows.jsonl", [{"text": text}], encoding)
    assert [("rows.jsonl#0", text)] == read(rows, encoding=encoding)


def test_a_byte_order_mark_is_no_json(tmp_path):
    """UTF-8 with the mark that some programs begin it with is read where JSON is; plain text keeps the mark."""
    for name, data in (("a.jsonl", '{"text": "x"}\n'), ("a.json", '[{"text": "x"}]')):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + data.encode())
        assert [(f"{name}#0", "x")] == read(tmp_path / name)
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfx")
    assert [("a.txt", "\ufeffx")] == read(tmp_path / "a.txt")


def test_a_large_text_is_cut_at_line_ends(tmp_path, monkeypatch):
    """A text beyond the limit comes in numbered parts that give it back; one within it keeps its name."""
    monkeypatch.setattr(prose, "MAX_CHARS", 20)
    monkeypatch.setattr(streams, "PIECE_BYTES", 7)
    path = tmp_path / "a.txt"
    for text, sizes in (("x" * 19 + "\n", [20]), ("one line\n" * 5, [18, 18, 9]), ("y" * 45, [20, 20, 5])):
        path.write_text(text)
        found = read(path)
        assert text == "".join(part for _, part in found)
        assert sizes == [len(part) for _, part in found]
        assert (["a.txt"] if len(sizes) == 1 else [f"a.txt#{i}" for i in range(3)]) == [name for name, _ in found]


# --- choice -----------------------------------------------------------------------------------------------------------


def test_globs_choose_files(tmp_path):
    """--include and --exclude are of names, or of paths where they have a slash, for files given and found alike."""
    for name in ("a.txt", "b.md", "code/a.py", "code/data/b.txt", ".hidden.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("text")

    def chosen(**how):
        return [name for name, _ in read(tmp_path, **how)]

    assert ["a.txt", "b.md", "code/a.py", "code/data/b.txt"] == chosen()
    assert ["a.txt", "code/data/b.txt"] == chosen(include=("*.txt",))
    assert ["a.txt", "b.md"] == chosen(exclude=("code/*",))
    assert ["b.md"] == chosen(include=("*.txt", "*.md"), exclude=("a.*", "code/data/*"))
    with pytest.raises(
        ValueError, match=r"no text found: .* beside 4 that --include and --exclude leave out and 1 hid"
    ):
        chosen(include=("*.rst",))
    with pytest.raises(ValueError, match="beside 1 that --include"):
        read(tmp_path / "a.txt", exclude=("*.txt",))


def test_bad_files_are_skipped_whole_and_counted(tmp_path, capfd):
    """With "skip" a bad file gives nothing at all, also where its fault comes late, and stderr names it at the end."""
    write_rows(tmp_path / "good.jsonl", [{"text": "good"}])
    write_rows(tmp_path / "late.jsonl", [{"text": "early"}, {"txt": "late"}])
    write_rows(tmp_path / "other.parquet", [{"content": "x"}])
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and no more")
    (tmp_path / "image.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0")
    assert [("good.jsonl#0", "good")] == read(tmp_path, on_bad_file="skip")
    err = capfd.readouterr().err
    assert err.startswith("skipped 4 of 5 files, which cannot be read: ")
    assert 1 == err.count("\n")
    for part in (
        "late.jsonl: line 2 has no",
        "other.parquet: has no column 'text'",
        "broken.parquet: ",
        "image.png: byte 0",
    ):
        assert part in err
    (tmp_path / "good.jsonl").unlink()
    with pytest.raises(ValueError, match=r"no text found: every file in .* is empty, or cannot be read"):
        read(tmp_path, on_bad_file="skip")
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "nowhere", on_bad_file="skip")
    for i in range(20):
        (tmp_path / f"{i}.png").write_bytes(b"\x89PNG")
    capfd.readouterr()
    with pytest.raises(ValueError, match="no text found"):
        read(tmp_path, on_bad_file="skip")
    assert capfd.readouterr().err.endswith("; and 14 more\n")


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.txt", b"ok\xff", "byte 2 is not UTF-8 text; give its --encoding"),
        ("a.txt", b"x" * 500 + "ü".encode()[:1], "byte 500 is not UTF-8"),
        ("a.txt", "Grüße".encode("utf-16"), "byte 0 is not UTF-8 text (it may be UTF-16: --encoding utf-16)"),
        ("a.txt", "wide".encode("utf-16-le"), "character 1 is NUL, so it is no text"),
        ("a.png", b"\x89PNG\r\n\x1a\n", "byte 0 is not UTF-8 text (a PNG image)"),
        ("a.jsonl", b'{"text": "x"}\n\n{"text": "\xe9"}\n', "byte 25 is not UTF-8"),
        ("a.jsonl", b'{"text": "x"}\n[1]\n', "line 2 is a list, must be an object with fields"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "y"', "line 2 is not JSON"),
        ("a.jsonl", b'{"body": "x", "id": 3}\n', "line 1 has no field 'text'; it has 'body', 'id'"),
        ("a.jsonl", b'{"text": null}\n', "line 1 has null in field 'text', must be text"),
        ("a.jsonl", b'{"text": ["x"]}\n', "line 1 has a list in field 'text', must be text"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', "line 1 holds half a surrogate pair"),
        ("a.jsonl", b"[" * 100_000, "line 1 is not JSON"),
        ("a.json", b'{\n "text": "x"\n}', "is one object, must be an array of rows, or have a row per line"),
        ("a.json", b'"prose"', "is no array of rows"),
        ("a.json", b"[1, 2]", "row 0 begins with '1', must be an object"),
        ("a.json", b'[{"text": "x"}, "y"]', "row 1 begins with '\"', must be an object"),
        ("a.json", b'[{"text": "x"} {"text": "y"}]', "row 0 is followed by '{', must be ',' or ']'"),
        ("a.json", b'[{"text": "x"},', "ends before its array of rows does"),
        ("a.json", b'[{"text": "x"}', "ends before its array of rows does"),
        ("a.json", b'[{"text": "x"', "row 0 is not JSON"),
        ("a.json", b'[{"text": "x"}] []', "has more behind its array of rows"),
        ("a.json", b'[{"text": "x"}, {"txt": "y"}]', "row 1 has no field 'text'; it has 'txt'"),
        ("a.json", b'[{"a": ' + b"[" * 100_000, "row 0 is not JSON"),
        ("a.txt.gz", b"no gzip", "cannot be unpacked as gzip: "),
        ("a.txt.gz", gzip.compress(b"x" * 99, mtime=0)[:-9], "cannot be unpacked as gzip: "),
        ("a.txt.gz", gzip.compress(b"text \xff", mtime=0), "byte 5 is not UTF-8"),
        ("a.txt.zst", b"no zstd", "cannot be unpacked as Zstandard: "),
        ("a.txt.zst", b"PACKED", "cannot be unpacked as Zstandard: it ends too early"),
        ("a.parquet.gz", b"", "cannot be read before it is unpacked"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_named(tmp_path, name, data, message):
    """Every fault of a file is one line: the file, the byte, line or row, and what is wrong there."""
    if data == b"PACKED":
        data = zstandard.ZstdCompressor().compress(b"words " * 99)[:-3]
    (tmp_path / name).write_bytes(data)
    assert message in refusal(tmp_path / name)


@pytest.mark.parametrize(
    ("encoding", "data", "message"),
    [
        ("utf-16", b"no mark!", "is not UTF-16 text: UTF-16 stream does not start with BOM"),
        ("utf-16-le", "wide".encode("utf-16-le") + b"\x00\xd8", "byte 8 is not UTF-16-LE"),
        ("cp1252", b"seven b\x81", "byte 7 is not CP1252"),
        ("gb18030", "文".encode("gb18030") * 5 + b"\xff", "byte 10 is not GB18030"),
        ("shift_jis", "カ".encode("shift_jis") * 5 + b"\x83", "byte 10 is not SHIFT_JIS"),
        ("latin-1", b"\x89PNG\r\n\x1a\n\0\0", "character 8 is NUL"),
    ],
)
def test_a_wrong_encoding_is_named_with_its_byte(tmp_path, encoding, data, message, monkeypatch):
    """The offset is that of the file, whatever pieces it is read in."""
    for piece in (1, 3, 1000):
        monkeypatch.setattr(streams, "PIECE_BYTES", piece)
        (tmp_path / "a.txt").write_bytes(data)
        assert message in refusal(tmp_path / "a.txt", encoding=encoding)


@pytest.mark.parametrize("encoding", ["klingon", "rot13", "hex"])
def test_an_unknown_encoding_is_refused(encoding):
    """A codec that makes no text of bytes is refused with some that do."""
    with pytest.raises(ValueError, match=r"is not one of text; such are utf-8, .*latin-1"):
        TextFiles(text=(Path(),), encoding=encoding)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"text": (Path(),), "max_unpack_ratio": 0}, "max_unpack_ratio must be >= 1, got 0"),
        ({"text": (Path(),), "field": ""}, "field is empty; give the name of the field that holds"),
        ({"text": (), "exclude": ("*.md",)}, "exclude belongs to text, which is not given"),
        ({"text": (), "on_bad_file": "skip"}, "on_bad_file belongs to text"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, message):
    """A value out of range, or one that nothing would use, is named."""
    with pytest.raises(ValueError, match=message):
        TextFiles(**settings)


def test_a_directory_that_cannot_be_read_is_an_error(tmp_path, monkeypatch):
    """Its files are not left out silently; of what is hidden nothing is looked at."""
    for name in ("a", "secret", ".hidden"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_text(name)
    scan = os.scandir

    def scandir(path):
        if Path(path).name in closed:
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", scandir)
    closed = {".hidden"}
    assert ["a", "secret"] == [text for _, text in read(tmp_path)]
    closed = {"secret"}
    with pytest.raises(PermissionError, match="secret"):
        read(tmp_path, on_bad_file="skip")


@pytest.mark.parametrize("kind", ["a.parquet", "file.arrow", "stream.arrow"])
def test_tables_in_a_wrong_shape_are_named(tmp_path, kind):
    """A column of another type, or none of that name, or an empty cell, or damage: each is said with the file."""
    path = tmp_path / kind
    for rows, message in (
        ([{"text": 3}], "row 0 has a number in field 'text', must be text"),
        ([{"text": b"x"}], "row 0 has of type bytes in field 'text'"),
        ([{"text": "x"}, {"text": None}], "row 1 has null in field 'text', must be text"),
        ([{"content": "x", "id": 1}], "has no column 'text'; it has 'content', 'id'"),
    ):
        assert message in refusal(write_rows(path, rows))
    column = pa.array([b"fine", b"\xff"]).view(pa.string())
    if kind == "a.parquet":
        pq.write_table(pa.table({"text": column}), path)
        assert "rows 0 to 1 hold text that is no UTF-8" in refusal(path)
    whole = write_rows(path, [{"text": "x" * 400}] * 9).read_bytes()
    for data in (b"", b"ARROW1", b"PAR1", b"no table at all", whole[: len(whole) // 2]):
        path.write_bytes(data)
        assert refusal(path, CorruptError).startswith(f"{path}: {'parquet' if kind == 'a.parquet' else 'arrow'}: ")


def test_a_saved_dataset_is_no_directory_of_texts(tmp_path):
    """What save_to_disk wrote is refused as text, with the flag that reads it."""
    (tmp_path / "state.json").write_text("{}")
    assert "give it as --dataset" in refusal(tmp_path)


def test_a_missing_library_is_named_and_asked_for_only_where_it_is_needed(tmp_path):
    """Without pyarrow and zstandard rows and texts are read; a file that needs one is refused, also under "skip"."""
    write_rows(tmp_path / "a.jsonl.gz", [{"text": "x"}])
    code = """
import sys
sys.modules |= {"pyarrow": None, "zstandard": None}
from sklformat.distill.text.documents import read_documents
from sklformat.settings.files import TextFiles
from pathlib import Path
place = Path(sys.argv[1])
assert ["x"] == [document.text for document in read_documents(place)]
for name in ("b.parquet", "b.arrow", "b.txt.zst"):
    (place / name).write_bytes(b"anything")
    try:
        list(read_documents(TextFiles(text=(place / name,), on_bad_file="skip")))
    except ModuleNotFoundError as error:
        print(error.name)
"""
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True)
    assert ["pyarrow", "pyarrow", "zstandard"] == done.stdout.split()


# --- sizes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.txt.gz", "a.jsonl.gz", "a.txt.zst", "a.jsonl.zst", "a.json.zst"])
def test_a_bomb_takes_no_memory(tmp_path, name):
    """A small file that unpacks to a gigabyte is refused at the limit of its kind, while little is in memory."""
    path = tmp_path / name
    spaces = b" " * (1 << 20) if name != "a.txt.zst" else b"x" * (1 << 20)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(spaces) * 1024)
    else:
        packer = zstandard.ZstdCompressor().compressobj()  # one frame
        path.write_bytes(b"".join(packer.compress(spaces) for _ in range(1024)) + packer.flush())
    tracemalloc.start()
    try:
        said = refusal(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert ("unpacks to more than" in said) or ("more than 33,554,432 characters" in said)
    assert peak < 192 << 20


def test_the_bound_of_a_compressed_file_can_be_raised(tmp_path, monkeypatch):
    """A sound file beyond the ratio is read with a larger one; so is a Parquet file, by what it says of itself."""
    monkeypatch.setattr(streams, "_FREE_BYTES", 1000)
    text = "abc\n" * 100_000
    paths = [tmp_path / "a.txt.gz", tmp_path / "a.txt.zst", tmp_path / "a.parquet"]
    paths[0].write_bytes(gzip.compress(text.encode()))
    paths[1].write_bytes(zstandard.ZstdCompressor().compress(text.encode()))
    pq.write_table(pa.table({"text": [text]}), paths[2], compression="zstd")
    for path in paths:
        assert "times its size); if it is no bomb, give a larger --max-unpack-ratio" in refusal(path)
        assert [text] == [found for _, found in read(path, max_unpack_ratio=1_000_000)]


def test_a_row_has_a_limit(tmp_path, monkeypatch):
    """A line, or a row of an array, beyond the limit is refused by its place before all of it is read."""
    monkeypatch.setattr(json_rows, "MAX_ROW_CHARS", 100)
    monkeypatch.setattr(streams, "PIECE_BYTES", 30)
    rows = [{"text": "short"}, {"text": "long" * 50}]
    assert "line 2 has more than 100 characters, which is the limit" in refusal(write_rows(tmp_path / "a.jsonl", rows))
    assert "row 1 has more than 100 characters, which is the limit" in refusal(write_rows(tmp_path / "a.json", rows))


_READ = """
import re, sys
from pathlib import Path
from sklformat.distill.text.documents import read_documents
def memory(name):
    return int(re.search(name + r":\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1])
for path in sys.argv[1:]:
    next(read_documents(path))
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins again at what is in memory now
    before, size = memory("VmRSS"), 0
    for document in read_documents(path):
        size += len(document.text)
    print(size >> 20, (memory("VmHWM") - before) >> 10)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc")
def test_memory_does_not_grow_with_the_file(tmp_path):
    """Sixty MiB in one file, of each kind that is read in pieces, take a few MiB more than its first row."""
    letters = np.random.default_rng(0).integers(97, 123, 1 << 20, dtype=np.uint8)
    letters[::70] = ord("\n")
    rows = [{"text": part.tobytes().decode()} for part in np.split(letters, 16)]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    paths = [tmp_path / name for name in ("a.jsonl.gz", "a.jsonl.zst", "a.json.gz", "a.parquet", "a.txt.gz", "a.arrow")]
    paths[0].write_bytes(gzip.compress(lines, 1) * 60)
    paths[1].write_bytes(zstandard.ZstdCompressor().compress(lines) * 60)
    array = gzip.compress(lines.replace(b"}\n", b"},"), 1) * 60
    paths[2].write_bytes(gzip.compress(b"[") + array + gzip.compress(b'{"text": ""}]'))
    table = pa.table({"text": [row["text"] for row in rows] * 60})
    pq.write_table(table, paths[3], use_dictionary=False, compression="none", write_batch_size=16)  # one row group
    with pa.ipc.new_file(paths[5], table.schema) as file:
        file.write_table(table)  # one batch
    paths[4].write_bytes(gzip.compress(letters.tobytes(), 1) * 60)
    done = subprocess.run([sys.executable, "-c", _READ, *paths], capture_output=True, text=True, check=True)
    found = [tuple(map(int, line.split())) for line in done.stdout.splitlines()]
    assert [60] * len(paths) == [size for size, _ in found]
    assert max(grown for _, grown in found) < 32, found
