"""From what the user gives to the sequences that a teacher runs over."""

import tiny

from sklformat.distill.models import tokenization
from sklformat.distill.teacher.token_sources import TokenSource
from sklformat.distill.text.corpus import TokenStore
from sklformat.settings.cache import CacheConfig


def test_new_tokens_are_read_once(tmp_path, monkeypatch):
    """Tokens just made were held against their fingerprint when they were written; those found are held against it."""
    documents = tiny.make_documents()
    tokenizer = tiny.train_tokenizer(documents)
    (tmp_path / "text.txt").write_text("\n".join(document.text for document in documents))
    config = CacheConfig(teacher="t", out=tmp_path / "cache", text=(tmp_path / "text.txt",), seq_len=8)
    read = []
    verify = TokenStore.verify
    monkeypatch.setattr(TokenStore, "verify", lambda store: read.append(store) or verify(store))
    for times in (1, 2):
        sequences = TokenSource(config, tokenizer).pack(tokenization.num_ids(tokenizer), check=True)
        assert times == len(read)
    assert len(sequences) > 10
