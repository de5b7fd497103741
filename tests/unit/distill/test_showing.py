"""What a page shows beside a cache: text of tokens, and a student's probabilities."""

import socket
import types

import huggingface_hub
import numpy as np
import pytest
import tiny
import torch
from operation_data import VOCAB, write

from sklformat.distill.models import loading, tokenization
from sklformat.distill.student.measures import showing
from sklformat.distill.text.fingerprints import tokenizer_fingerprint
from sklformat.errors import SettingsError
from sklformat.settings.inspection import InspectConfig, ViewConfig
from sklformat.views.page import read_stretch
from sklformat.views.passage import read_passage


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


def test_where_students_run(tmp_path, monkeypatch):
    """Weights of that type on that device, and the tokens there; a device that is not here or for nobody is refused."""
    path, loaded = write(tmp_path / "a", 1), []
    stand_in(monkeypatch)

    class Asked(Student):
        def __call__(self, input_ids, use_cache):
            loaded.append(input_ids.device.type)
            return super().__call__(input_ids, use_cache)

    monkeypatch.setattr(
        showing.loading, "load_model", lambda *_, **how: loaded.append(how) or Asked(torch.zeros(1, 8, VOCAB))
    )
    config = config_of(path, students=("kid",), device="cpu", dtype="bfloat16")
    (answers,) = showing.say(config, read_stretch(config))["answers"]
    assert "float32" == answers[0].dtype
    how, *tokens_at = loaded
    assert {"dtype": "bfloat16", "device": torch.device("cpu"), "trust_remote_code": False} == how
    assert ["cpu"] == tokens_at
    config = config_of(path, students=("kid",), device="tpu")
    with pytest.raises(ValueError, match="device 'tpu' is not known"):
        showing.say(config, read_stretch(config))
    for settings in ({"device": "cpu"}, {"dtype": "bfloat16"}):
        with pytest.raises(ValueError, match="device and dtype are those of students, and none is given"):
            config_of(path, **settings)


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


def passage_of(path, **settings):
    config = InspectConfig(path=str(path), sequence=0, **settings)
    return config, read_passage(config)


def test_texts_of_a_passage(tmp_path, monkeypatch):
    """The tokenizer that was asked for gives texts, or is refused with both fingerprints."""
    own = tokenizer_fingerprint(Letters())
    monkeypatch.setattr(loading, "load_tokenizer", lambda *_, **__: Letters())
    config, passage = passage_of(write(tmp_path / "a", 1, tokenizer_fingerprint=own), tokenizer="mine")
    texts, name = showing.find_texts(config, passage)
    assert ("mine", passage.ids()) == (name, sorted(texts))
    config, passage = passage_of(write(tmp_path / "b", 1, tokenizer_fingerprint="ab" * 16), tokenizer="mine")
    with pytest.raises(
        SettingsError, match=f"mine: did not make the ids of .*{'ab' * 16}, here {own}.*; give the one that did"
    ):
        showing.find_texts(config, passage)


def test_the_teachers_tokenizer_is_found_by_its_name(tmp_path, monkeypatch):
    """One that an earlier download left here is taken if it made the ids; else it is said why ids are shown."""
    own = tokenizer_fingerprint(Letters())
    capture = {"teacher": {"name": "org/big", "revision": "abc"}}
    config, passage = passage_of(write(tmp_path / "a", 1, tokenizer_fingerprint=own, capture=capture))
    asked = []
    monkeypatch.setattr(tokenization, "load_here", lambda name, revision: asked.append((name, revision)))
    assert (None, "the tokenizer of org/big is not on this machine; --tokenizer org/big fetches it") == (
        showing.find_texts(config, passage)
    )
    assert [("org/big", "abc")] == asked
    monkeypatch.setattr(tokenization, "load_here", lambda *_, **__: Letters())
    texts, name = showing.find_texts(config, passage)
    assert ("org/big", passage.ids()) == (name, sorted(texts))
    config, passage = passage_of(write(tmp_path / "b", 1, tokenizer_fingerprint="ab" * 16, capture=capture))
    texts, why = showing.find_texts(config, passage)
    assert texts is None
    assert why.startswith("the tokenizer of org/big that is on this machine did not make them: ids mean other tokens")


def test_a_tokenizer_is_looked_for_on_this_machine_alone(tmp_path, monkeypatch):
    """What an earlier download left is loaded, and nothing else is; the hub is not asked."""

    def connect(*_, **__):
        raise AssertionError("asked the network")

    monkeypatch.setattr(socket, "create_connection", connect)
    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert tokenization.load_here("org/big", revision="main") is None
    folder = tmp_path / "models--org--big"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0" * 40)
    tiny.train_tokenizer(tiny.make_documents(2)).save_pretrained(folder / "snapshots" / ("0" * 40))
    (folder / "snapshots" / ("0" * 40) / "config.json").write_text('{"model_type": "llama"}')
    found = tokenization.load_here("org/big", revision="main")
    assert "alpha" == found.decode(found("alpha")["input_ids"])
