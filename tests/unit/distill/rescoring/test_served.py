"""A teacher behind an engine that chunks and pre-empts says of each given id what its logits say."""

import contextlib

import engine_data
import numpy as np
import pytest
from engine_data import FakeEngine, LayerEngine, connected, logits_of, tokens_of

import sklformat as skl
from sklformat.capture.plan import ShardWork
from sklformat.distill.models import loading
from sklformat.distill.rescoring import served
from sklformat.distill.rescoring.passes import rescore
from sklformat.distill.rescoring.questions import Question
from sklformat.distill.rescoring.served import ServedScorer
from sklformat.distill.teacher.caching import cache_teacher
from sklformat.errors import SettingsError
from sklformat.settings.cache import CacheConfig
from sklformat.settings.rescore import RescoreConfig

NAMES = ("label_logprob", "entropy", "record_logprob")
LENGTHS = [40, 100, 25, 64, 1, 7, 130]
ENGINES = {
    "first": lambda: (FakeEngine("first", 24), "runner"),
    "second": lambda: (FakeEngine("second", 64, {2: ("preempt", 1), 4: ("abort", 3), 6: ("repeat", 6)}), "runner"),
    "layer": lambda: (LayerEngine(), "layer"),
}


def question_of(number):
    """A few ids at two of three positions, none at the others."""
    rng = np.random.default_rng(number)
    lengths = rng.integers(0, 4, LENGTHS[number]) * (np.arange(LENGTHS[number]) % 3 > 0)
    ids = rng.integers(0, engine_data.VOCAB, lengths.sum()).astype(np.uint32)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return Question(number, None, tokens_of(number, LENGTHS[number]), None, offsets, ids)


@pytest.mark.parametrize("name", ENGINES)
def test_each_id_has_the_log_prob_of_its_row(name):
    """Of sequences 2 to 6 the columns are those of their logits, 0 where nothing is asked, in order."""
    engine, hook = ENGINES[name]()
    works = [ShardWork(0, 0, 4, 2), ShardWork(1, 4, 3, 4)]
    with connected(hook, columns=NAMES) as desk:
        answers = list(ServedScorer(engine, desk).answers(works, question_of, NAMES))
    assert [2, 3, 4, 5, 6] == [question.number for question, _ in answers]
    for question, columns in answers:
        said = logits_of(question.tokens).double().log_softmax(-1).numpy()
        counted = question.counted
        positions = np.repeat(np.arange(counted.size), np.diff(question.offsets))
        expected = {
            "record_logprob": said[positions, question.token_ids],
            "label_logprob": np.where(counted, said[np.arange(counted.size), question.tokens[1:]], 0),
            "entropy": np.where(counted, -(np.exp(said) * said).sum(-1), 0),
        }
        assert expected.keys() == columns.keys()
        for column, values in expected.items():
            np.testing.assert_allclose(columns[column].astype(float), values, rtol=2**-10, atol=1e-3, err_msg=column)


class FakePlan:
    """As vllm.Plan, with the engine of engine_data."""

    version, hook, device, dtype, described = "0.0", "runner", "cpu", "float32", FakeEngine.described
    width = engine_data.WIDTH

    def __init__(self, model, **given):
        self.config = loading.load_model(model).config

    @contextlib.contextmanager
    def started(self, path):
        with served.messages.announced(self.hook, path):
            engine_data.try_layer_out()
            yield FakeEngine(budget=50)


def test_the_verb_asks_the_engine(tmp_path, monkeypatch):
    """From settings to cache: the engine's log-probs at the records; the header says whose; others are refused."""
    from teacher_data import SEQ_LEN, write_teacher, write_text

    write_teacher(tmp_path / "teacher", write_text(tmp_path / "text"))
    common = {"teacher": str(tmp_path / "teacher"), "text": (tmp_path / "text",), "seq_len": SEQ_LEN, "rounds": 20}
    cache_teacher(CacheConfig(out=tmp_path / "cache", num_sequences=5, sequences_per_shard=3, **common))
    monkeypatch.setattr(served, "Plan", FakePlan)
    given = {"cache": str(tmp_path / "cache"), "teacher": str(tmp_path / "teacher"), "engine": "vllm"}
    done = rescore(RescoreConfig(out=tmp_path / "scored", columns=("entropy",), **given))
    assert (5, 5) == (done.sequences, done.sequences_scored)
    scored = skl.open(done.directory)
    for ours, theirs in zip(scored, skl.open(tmp_path / "cache"), strict=True):
        assert theirs.targets == ours.targets
        said = logits_of(ours.tokens).double().log_softmax(-1).numpy()
        positions = np.repeat(np.arange(SEQ_LEN), np.diff(ours.targets.offsets))
        expected = said[positions, ours.targets.token_ids]
        np.testing.assert_allclose(ours.columns["record_logprob"].astype(float), expected, rtol=2**-10, atol=1e-3)
    said = scored.header.capture["rescored"]
    engine = {"name": "vllm", "hook": "runner", "tensor_parallel": 1}
    assert (engine, False, "0.0") == (said["engine"], said["repeatable"], said["versions"]["vllm"])
    columns = CacheConfig(out=tmp_path / "columns", num_sequences=2, columns=("record_logprob",), **common)
    cache_teacher(columns)
    weigh = given | {"cache": str(columns.out), "weights": "normalised"}
    capture = skl.open(rescore(RescoreConfig(out=tmp_path / "weighted", **weigh)).directory).header.capture
    assert (engine, False) == (capture["engine"], capture["repeatable"])
    back = weigh | {"cache": str(tmp_path / "weighted"), "engine": "transformers"}
    capture = skl.open(rescore(RescoreConfig(out=tmp_path / "back", **back)).directory).header.capture
    assert "engine" not in capture
    assert engine == capture["weighted"]["drawn_by"]["engine"]
    isolated = CacheConfig(out=tmp_path / "isolated", num_sequences=2, isolate_documents=True, **common)
    cache_teacher(isolated)
    with pytest.raises(SettingsError, match="its documents do not see each other, and engine vllm has no mask"):
        rescore(RescoreConfig(out=tmp_path / "out", **given | {"cache": str(tmp_path / "isolated")}))
    with pytest.raises(ValueError, match="batch_size is of a fixed grid of batches, engine vllm makes its own"):
        RescoreConfig(out=tmp_path / "out", batch_size=3, **given)
