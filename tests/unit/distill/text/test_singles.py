"""Sequences of one document each."""

import pytest

from sklformat.distill.text import corpus
from sklformat.distill.text.singles import SingleSequences

END, BOS = 256, 257


def make(path, texts, **encoding):
    documents = [corpus.Document(f"d{i}", text) for i, text in enumerate(texts)]
    corpus.write_token_store(
        path,
        documents,
        lambda texts: [list(text.encode()) for text in texts],
        vocab_size=258,
        tokenizer_fingerprint="tok",
        encoding=corpus.Encoding(**encoding),
    )
    return SingleSequences(path, seq_len=8, separator_id=END, seed=0)


@pytest.mark.parametrize(
    ("encoding", "before"),
    [({}, []), ({"bos": "document", "bos_id": BOS}, [BOS]), ({"bos": "document", "bos_id": END}, [END])],
)
def test_each_ends_with_the_separator(tmp_path, encoding, before):
    """A document stands between its marks, also where BOS is the separator: nothing follows that could end it."""
    sequences = make(tmp_path / "s", ["ab", "c"], **encoding)
    found = sorted(sequences[i].tolist() for i in range(2))
    assert sorted([[*before, *b"ab", END], [*before, *b"c", END]]) == found


def test_bos_of_windows_is_refused(tmp_path):
    """There are no windows, and a document that brings a BOS would have two."""
    with pytest.raises(ValueError, match="bos window begins packed sequences; where each document is one, make"):
        make(tmp_path / "s", ["ab"], bos="window", bos_id=BOS)
