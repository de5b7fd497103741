"""What texts and token stores refuse that test_corpus.py leaves out, each refusal once by its own words."""

import json
import shutil

import numpy as np
import pyarrow as pa
import pytest
import tiny
from mmap_ninja import RaggedMmap

import sklformat as skl
from sklformat.distill.text import chats
from sklformat.distill.text.chats import read_chat, read_dataset_texts
from sklformat.distill.text.corpus import TokenStore, open_ragged
from sklformat.distill.text.documents import cut_documents
from sklformat.distill.text.singles import SingleSequences
from sklformat.distill.text.sources import hub
from sklformat.distill.text.sources.json_rows import read_array
from sklformat.distill.text.sources.rows import Row
from sklformat.distill.text.sources.tables import read_arrow
from sklformat.settings.files import TextFiles


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("\ud800", "dataset d: row 0 of split 'train' holds half a surrogate pair, which is no character"),
        ("", "no text found: dataset d has none in column 'text' of split 'train'"),
    ],
)
def test_texts(monkeypatch, text, message):
    """A text that is none is named by its place."""
    monkeypatch.setattr(hub, "read_dataset_rows", lambda words, split: hub._named([{"text": text}], words[0], split))
    with pytest.raises(ValueError, match=message):
        list(read_dataset_texts(["d"]))


def test_pieces_of_no_size():
    """A piece has a character."""
    with pytest.raises(ValueError, match="max_chars must be >= 1, got 0"):
        list(cut_documents([], max_chars=0))


SAY = {"role": "user", "content": "a"}


@pytest.mark.parametrize(
    ("row", "field", "message"),
    [
        (
            {"prompt": "a", "completion": ""},
            "prompt",
            "row 0: field 'completion' is empty; there is no answer to learn from",
        ),
        (
            {"prompt": "a", "completion": [SAY]},
            "prompt",
            "row 0: prompt is .* and completion .*; both must be text, or both lists of messages",
        ),
        ({"messages": "a"}, "messages", "row 0: field 'messages' is .*, must be a list of messages"),
        ({"messages": []}, "messages", "row 0: field 'messages' is an empty chat"),
        ({"messages": [3]}, "messages", "message 0 is .*, must have role and content"),
        ({"messages": [{"from": "nobody"}]}, "messages", "message 0 is from 'nobody'; known are assistant|bard"),
        ({"messages": [{"content": "a"}]}, "messages", "field 'messages', message 0 has no role; it has content"),
        ({"messages": [SAY | {"content": 3}]}, "messages", "message 0: content is .*, must be text"),
        ({"messages": [{"role": "user"}]}, "messages", r"message 0 \(user\) has neither content nor tool_calls"),
        ({"messages": [SAY], "tools": "{"}, "messages", "field 'tools' is not JSON: "),
        ({"messages": [SAY], "tools": 3}, "messages", "row 0: field 'tools' is .*, must be a list$"),
    ],
)
def test_chats(row, field, message):
    """A row that holds no chat names field and message."""
    with pytest.raises(ValueError, match=message):
        read_chat("x", row, field, "a.jsonl: row 0")


def test_rows_of_two_kinds():
    """Text and chats do not lie in one store; the first row of each is named."""
    reader = chats._Reader("text")
    reader(Row("x", "a.jsonl: line 1", {"text": "a"}))
    message = "a.jsonl: line 2 holds a chat in 'messages', a.jsonl: line 1 holds text; give files of one kind"
    with pytest.raises(ValueError, match=message):
        reader(Row("y", "a.jsonl: line 2", {"messages": [SAY]}))


@pytest.mark.parametrize("names", [("README.md", "a.jsonl"), ("a.jsonl", "z.txt")])
def test_files_of_two_kinds_are_no_bad_files(tmp_path, names):
    """A file of prose beside chats is not skipped, nor are the chats beside a file of prose: the user chooses."""
    for name in names:
        is_chat = name == "a.jsonl"
        (tmp_path / name).write_text(json.dumps({"messages": [SAY]}) + "\n" if is_chat else "prose")
    files = TextFiles(text=(tmp_path,), on_bad_file="skip")
    message = f"{names[1]}.* holds .*{names[0]}.* holds .*; give files of one kind, and leave the others out"
    with pytest.raises(ValueError, match=message):
        list(chats.read_texts(files))
    (tmp_path / names[1]).write_bytes(b"\0")
    assert 1 == len(list(chats.read_texts(files)))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda path: list(read_array(["[3]"])), ValueError, " begins with '3', must be an object with fields"),
        (lambda path: list(read_arrow(arrow_file(path, ["a", "a"]), None)), ValueError, "has several columns 'a'"),
        (lambda path: list(read_arrow(arrow_file(path, None), None)), skl.CorruptError, "arrow: the file is empty"),
    ],
)
def test_rows(tmp_path, call, error, message):
    """A file whose rows cannot be told apart, or that has none, says so."""
    with pytest.raises(error, match=message):
        call(tmp_path / "a.arrow")


def arrow_file(path, names):
    """A file of these columns; None: no byte."""
    path.touch()
    if names is not None:
        table = pa.Table.from_arrays([pa.array(["x"])] * len(names), names=names)
        with path.open("wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(table)
    return path


def test_fewer_documents_than_asked_for(store):
    """Sequences of one document each are as many as documents that give one."""
    message = "the text is too short: 4 sequences of one document each are asked for, it gives 3 of 3 documents; give"
    with pytest.raises(ValueError, match=message):
        SingleSequences(store, seq_len=8, separator_id=0, seed=0, count=4)


@pytest.fixture
def store(tmp_path):
    documents = tiny.make_documents(3, 20)
    tiny.write_store(tmp_path / "store", tiny.train_tokenizer(documents), documents)
    return tmp_path / "store"


def test_a_store_without_tokens(store):
    """A store that lost its tokens is made again."""
    shutil.rmtree(store / "tokens")
    with pytest.raises(skl.CorruptError, match="the tokens are missing; delete the store and make it again"):
        TokenStore(store)


def fact(name, change):
    """Change a number that a store says of itself."""

    def apply(store):
        facts = json.loads((store / "store.json").read_text())
        (store / "store.json").write_text(json.dumps(facts | {name: change(facts[name])}))

    return apply


def numbers(file, dtype, change):
    """Change the numbers in a file of a store's tokens."""

    def apply(store):
        data = store / "tokens" / file / "data.ninja"
        change(np.fromfile(data, dtype)).tofile(data)

    return apply


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda store: shutil.rmtree(store / "tokens" / "starts"), "cannot be opened: "),
        (fact("num_documents", lambda n: n + 1), "the index is not one of 4 documents"),
        (fact("num_tokens", lambda n: n + 1), r"holds \(\d+,\) of uint16 tokens, should be \(\d+,\) of uint16"),
        (
            numbers("starts", np.int64, lambda a: a + 1),
            "the index does not cover the tokens one document after the other",
        ),
        (numbers(".", np.uint16, lambda a: a[::-1]), r"its tokens give \w{32}, stored is \w{32}"),
    ],
)
def test_a_store_that_contradicts_itself(store, spoil, message):
    """A store whose tokens do not fit what it says is named as damaged, with what to do."""
    spoil(store)
    with pytest.raises(skl.CorruptError, match=rf"token store is damaged: {message}.*; delete it and make it again"):
        TokenStore(store).verify()


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("ends", lambda array: array + 1000, "its index points outside of its tokens; make it again"),
        ("starts", None, "cannot be opened as a RaggedMmap: .*; make it again"),
    ],
)
def test_ragged_arrays(tmp_path, file, change, message):
    """Arrays that an index misses, or whose index is gone, are not read."""
    RaggedMmap.from_generator(tmp_path / "r", iter([np.arange(4), np.arange(3)]), batch_size=2, verbose=False)
    if change is None:
        shutil.rmtree(tmp_path / "r" / file)
    else:
        data = tmp_path / "r" / file / "data.ninja"
        array = np.fromfile(data, np.int64)
        change(array).tofile(data)
    with pytest.raises(skl.CorruptError, match=message):
        list(open_ragged(tmp_path / "r"))
