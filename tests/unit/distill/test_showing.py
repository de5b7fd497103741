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


def config_of(*paths, **settings):
    return ViewConfig(caches=tuple(map(str, paths)), **settings)


class Student:
    """A model that gives these logits, of a head of this width and this length."""

    def __init__(self, logits, limit=64):
        self.config = self
        self.max_position_embeddings = limit
        self.logits = logits

    def get_text_config(self):
        return self

    def get_output_embeddings(self):
        return types.SimpleNamespace(out_features=self.logits.shape[-1])

    def __call__(self, input_ids, use_cache):
        return types.SimpleNamespace(logits=self.logits)


def stand_in(monkeypatch, student=None, tokenizer=None):
    monkeypatch.setattr(showing.loading, "load_own_tokenizer", lambda *_, **__: tokenizer)
    monkeypatch.setattr(showing.loading, "load_tokenizer", lambda *_, **__: Letters())
    monkeypatch.setattr(showing.loading, "load_model", lambda *_, **__: student)


def test_texts(tmp_path, monkeypatch):
    """Each id has its text, a part of a character the tokenizer's own name; another tokenizer is refused."""
    assert {1: "word 1", 2: "⟨t2⟩"} == showing.texts_of(Letters(), [1, 2])
    stand_in(monkeypatch)
    other = config_of(write(tmp_path / "a", 1, tokenizer_fingerprint="ab" * 16), tokenizer="other")
    with pytest.raises(SettingsError, match=f"other: not the tokenizer of {other.caches[0]}: .*{'ab' * 16}"):
        showing.say(other, read_stretch(other))


def test_students(tmp_path, monkeypatch):
    """Probabilities are those of its logits over the cache's ids, at every row; texts are its tokenizer's."""
    caches = [write(tmp_path / "a", 2), write(tmp_path / "b", 2, rounds=7)]
    config = config_of(*caches, students=("kid", "boy"))
    logits = torch.randn(1, 8, VOCAB + 20, generator=torch.manual_seed(0))  # a head that is padded
    stand_in(monkeypatch, Student(logits), Letters())
    stretch = read_stretch(config)
    said = showing.say(config, stretch)
    assert ("kid", "boy") == said["students"]
    assert {f"word {token}" for token in stretch.ids() if token != 2} == set(said["texts"].values()) - {"⟨t2⟩"}
    probs = logits[0, :, :VOCAB].softmax(-1).numpy()
    for number, (tokens, rows) in enumerate(zip(stretch.tokens, stretch.rows, strict=True)):
        of_rows, of_other = (answers[number] for answers in said["answers"])
        np.testing.assert_array_equal(of_rows, of_other)
        np.testing.assert_allclose(probs[rows.positions, rows.ids], of_rows)
        first = np.concatenate([[0], np.cumsum(rows.sizes)[:-1]])
        np.testing.assert_allclose(probs[np.arange(8), tokens[1:]], of_rows[first])


def test_students_that_do_not_fit(tmp_path, monkeypatch):
    """Another tokenizer, too few ids, too few positions and weights that are broken are refused, with both values."""
    config = config_of(write(tmp_path / "a", 1, tokenizer_fingerprint="ab" * 16), students=("kid",))
    stretch = read_stretch(config)
    logits = torch.zeros(1, 8, VOCAB)
    for student, tokenizer, said in (
        (
            None,
            Letters(),
            f"the student kid has another tokenizer, not that of .*fingerprint {'ab' * 16}, here ",
        ),
        (Student(logits[..., :200]), None, f"kid: the student has 200 ids, the cache {VOCAB}"),
        (Student(logits, limit=7), None, "kid: seq_len 8 is beyond the 7 positions that the model takes"),
        (Student(logits / 0), None, "kid: gives logits that are no finite numbers"),
    ):
        stand_in(monkeypatch, student, tokenizer)
        with pytest.raises((SettingsError, ValueError), match=said):
            showing.say(config, stretch)


def test_what_a_student_cannot_read(tmp_path):
    """What the teacher read apart is not shown to a student together; without tokens there is nothing to read."""
    isolated = write(tmp_path / "a", 1, capture={"packing": {"isolated": True}})
    for path, said in (
        (isolated, "was captured with isolated documents, which a page does not show a student"),
        (write(tmp_path / "b", 1, store_tokens=False), "stores no tokens for a student to read; leave out --student"),
    ):
        config = config_of(path, students=("kid",))
        with pytest.raises(SettingsError, match=said):
            showing.say(config, read_stretch(config))


def test_a_damaged_sequence_is_not_asked_about(tmp_path, monkeypatch):
    """The student has nothing to say of a sequence whose tokens are damaged, and answers for the others."""
    config = config_of(write(tmp_path / "a", 2), students=("kid",))
    shard = tmp_path / "a" / "shard-00000.skl"
    content = bytearray(shard.read_bytes())
    content[4096 + 80] ^= 1
    shard.write_bytes(content)
    stand_in(monkeypatch, Student(torch.zeros(1, 8, VOCAB)))
    stretch = read_stretch(config)
    missing, found = showing.say(config, stretch)["answers"][0]
    assert missing is None
    np.testing.assert_allclose(np.full(stretch.rows[1].ids.size, 1 / VOCAB), found, rtol=1e-6)
