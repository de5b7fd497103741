"""What a page shows beside a cache: text of tokens, and a student's probabilities."""

import types

import numpy as np
import pytest
import torch
from operation_data import VOCAB, write

from sklformat.distill.student.measures import showing
from sklformat.errors import SettingsError
from sklformat.settings.inspection import ViewConfig
from sklformat.views.page import read_stretch


class Letters:
    """A tokenizer whose third id is half of a character."""

    all_special_ids = ()

    def get_vocab(self):
        return {f"t{number}": number for number in range(VOCAB)}

    def decode(self, ids):
        return "\ufffd" if ids == [2] else f"word {ids[0]}"

    def convert_ids_to_tokens(self, token_id):
        return f"t{token_id}"


def config_of(path, **settings):
    return ViewConfig(caches=(str(path),), **settings)


def test_texts(tmp_path, monkeypatch):
    """Each id has its text, a part of a character the tokenizer's own name; another tokenizer is refused."""
    assert {1: "word 1", 2: "⟨t2⟩"} == showing.texts_of(Letters(), [1, 2])
    monkeypatch.setattr(showing, "load_tokenizer", lambda *_, **__: Letters())
    other = config_of(write(tmp_path / "a", 1, tokenizer_fingerprint="ab" * 16), tokenizer="other")
    with pytest.raises(SettingsError, match=f"other: not the tokenizer of {other.caches[0]}: .*{'ab' * 16}"):
        showing.say(other, read_stretch(other))


def test_student(tmp_path, monkeypatch):
    """Probabilities are those of its logits, at labels and at records; too few ids are refused."""
    config = config_of(write(tmp_path / "a", 2), student="kid")
    logits = torch.randn(1, 8, VOCAB, generator=torch.manual_seed(0))
    monkeypatch.setattr(showing, "load_own_tokenizer", lambda *_, **__: None)
    monkeypatch.setattr(showing, "load_model", lambda *_, **__: lambda input_ids: types.SimpleNamespace(logits=logits))
    stretch = read_stretch(config)
    said = showing.say(config, stretch)
    probs = logits[0].softmax(-1).numpy()
    for tokens, (one,), (label, (records,)) in zip(stretch.tokens, stretch.said, said["answers"], strict=True):
        np.testing.assert_allclose(probs[np.arange(8), tokens[1:]], label)
        rows = np.repeat(np.arange(8), np.diff(one.targets.offsets))
        np.testing.assert_allclose(probs[rows, one.targets.token_ids], records)
    logits = logits[..., :200]
    with pytest.raises(SettingsError, match=f"kid: the student has 200 ids, the cache {VOCAB}"):
        showing.say(config, stretch)


def test_a_student_does_not_read_isolated_documents_as_one(tmp_path):
    """What the teacher read apart is not shown to a student together."""
    path = write(tmp_path / "a", 1, capture={"packing": {"isolated": True}})
    config = config_of(path, student="kid")
    with pytest.raises(
        SettingsError, match="was captured with isolated documents, which a page does not show a student"
    ):
        showing.say(config, read_stretch(config))
