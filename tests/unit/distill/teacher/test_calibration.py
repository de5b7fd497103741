"""What a calibration run reads of a dataset."""

import sys
import types

import pytest

from sklformat.distill.text.chats import read_dataset_texts, read_texts, write_first_rows
from sklformat.settings.files import TextFiles

SAY = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
KINDS = {
    "documents": {"text": "alpha beta " * 20, "image": b"x"},
    "chats": {"messages": SAY, "tools": [{"name": "t"}], "made": 3.5},
    "completions": {"prompt": "a", "completion": "b" * 30},
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_rows_of_a_dataset(tmp_path, monkeypatch, kind):
    """They say what the dataset's own say, are enough for the sequences that are run, and no more."""
    read = []

    def load_dataset(*words, split, streaming):
        for number in range(1000):
            read.append(number)
            yield KINDS[kind]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    rows = tmp_path / "rows.jsonl"
    texts = read_dataset_texts(("a/b",), split="train", field="text")
    write_first_rows(rows, texts, num_sequences=2, seq_len=8)
    found = list(read_texts(TextFiles(text=(rows,))))
    assert 8 <= len(found) == len(read) < 1000
    assert sum(len(text.text) for text in found) >= 2 * 8 * 64
    for name, value in KINDS[kind].items():
        if name not in ("image", "made"):
            assert [value] * len(found) == [list(v) if isinstance(v := getattr(f, name), tuple) else v for f in found]
