"""cache --isolate-documents: records are those of each document alone; none at a border; the same when resumed."""

import re

import numpy as np
import pytest
import teacher_data
import torch
import transformers
from capture_data import shard_bytes
from teacher_data import SEQ_LEN

import sklformat as skl
from sklformat.distill.models import loading, outputs
from sklformat.distill.teacher import drawing, gpu_sampler
from sklformat.distill.teacher.caching import cache_teacher
from sklformat.sampler import draw
from sklformat.settings.cache import CacheConfig

COUNT = 10
SHORT = 40  # texts of a few tokens each, so that every sequence has borders
COLUMNS = ("label_logprob", "entropy", "record_logprob")


@pytest.fixture(scope="module")
def text(place, tmp_path_factory):
    folder = tmp_path_factory.mktemp("short") / "text"
    folder.mkdir()
    rng = np.random.default_rng(3)
    for number in range(SHORT):
        (folder / f"{number}.txt").write_text(" ".join(rng.choice(teacher_data.WORDS, size=int(rng.integers(2, 9)))))
    return folder


@pytest.fixture
def config(place, text, tmp_path):
    def make(out="cache", **changes):
        settings = {
            "teacher": str(place / "teacher"),
            "text": (text,),
            "out": tmp_path / out,
            "seq_len": SEQ_LEN,
            "num_sequences": COUNT,
            "rounds": 20,
            "batch_size": 3,
            "sequences_per_shard": 4,
            "seed": 5,
            "isolate_documents": True,
        }
        return CacheConfig(**settings | changes)

    return make


def alone(model, sequence):
    """[T, V] logits of the teacher that reads each document of a sequence by itself."""
    starts = np.flatnonzero(sequence.columns["document_start"][:-1])
    parts = np.split(sequence.tokens[:-1].astype(np.int64), starts[starts > 0])
    with torch.inference_mode():
        return torch.cat([outputs.logits(model, torch.from_numpy(part)[None])[0, :, :280] for part in parts])


@pytest.mark.parametrize(
    ("by", "flags"),
    [
        ("host", {"sampler": "multinomial"}),
        ("device", {"sampler": "multinomial"}),
        ("host", {"sampler": "topk", "k": 5}),
        ("device", {"sampler": "systematic"}),
    ],
    ids=str,
)
def test_records_are_those_of_each_document_alone(config, place, monkeypatch, by, flags):
    """Drawn by the same keys from logits of the document alone; a border has no record, and zeros in the columns."""
    if by == "device":
        monkeypatch.setattr(gpu_sampler, "DEVICES", ("cpu",))
    summary = cache_teacher(config(columns=COLUMNS, **flags))
    assert [] == skl.verify(config().out)
    model = loading.load_model(place / "teacher")
    cache = skl.open(config().out)
    assert COUNT == len(cache) == summary.sequences
    arguments = {"rounds": 20, "seed": 5} | flags
    same = borders = 0
    for number, sequence in enumerate(cache):
        logits = alone(model, sequence)
        counted = ~sequence.columns["document_start"][1:]
        borders += int((~counted).sum())
        lengths = np.diff(sequence.targets.offsets)
        assert (counted == (lengths > 0)).all()
        whole = draw(logits, sequence=number, **arguments)
        for t in np.flatnonzero(counted):
            begin, end = sequence.targets.offsets[t : t + 2]
            expected = whole.token_ids[slice(*whole.offsets[t : t + 2])]
            same += expected.tolist() == sorted(sequence.targets.token_ids[begin:end].tolist())
        logp = torch.log_softmax(logits.double(), -1).numpy()
        label = np.where(counted, logp[np.arange(SEQ_LEN), sequence.tokens[1:]], 0)
        np.testing.assert_allclose(sequence.columns["label_logprob"], label, rtol=2e-3, atol=1e-4)
        entropy = np.where(counted, -(np.exp(logp) * logp).sum(-1), 0)
        np.testing.assert_allclose(sequence.columns["entropy"], entropy, rtol=2e-3, atol=1e-4)
    assert borders > COUNT
    assert same / (COUNT * SEQ_LEN - borders) > 0.99  # logits differ by 1e-7, which moves a draw now and then


def test_the_header_says_so_and_nothing_else_changes(config):
    """The setting stands in the packing and the column is there; a cache without is as it was before there was one."""
    cache_teacher(config())
    cache_teacher(config("together", isolate_documents=False))
    isolated, together = skl.open(config().out), skl.open(config("together").out)
    assert isolated.header.capture["packing"]["isolated"] is True
    assert ("document_start",) == isolated.header.columns
    assert "isolated" not in together.header.capture["packing"]
    assert () == together.header.columns
    differences = together.header.differences(isolated.header)
    assert ["capture.packing.isolated: None != True", "columns: () != ('document_start',)"] == sorted(differences)
    assert all(a.tokens.tolist() == b.tokens.tolist() for a, b in zip(isolated, together, strict=True))
    with pytest.raises(skl.SettingsError, match=r"capture\.packing\.isolated: None != True"):
        cache_teacher(config("together"))


@pytest.mark.parametrize("by", ["host", "device"])
def test_stopped_run_goes_on_to_the_same_bytes(config, monkeypatch, by):
    """Stopped within a batch and resumed, the cache has the bytes of an undisturbed run."""
    owner, name = (drawing.Drawer, "draw") if by == "host" else (gpu_sampler.Draws, "result")
    if by == "device":
        monkeypatch.setattr(gpu_sampler, "DEVICES", ("cpu",))
    cache_teacher(config("whole", columns=COLUMNS))
    method, left = getattr(owner, name), [6]

    def stopping(*arguments):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return method(*arguments)

    monkeypatch.setattr(owner, name, stopping)
    with pytest.raises(KeyboardInterrupt, match=f"stopped: 6 of {COUNT} sequences"):
        cache_teacher(config("part", columns=COLUMNS))
    monkeypatch.setattr(owner, name, method)
    assert COUNT - 6 == cache_teacher(config("part", columns=COLUMNS)).sequences_made
    assert shard_bytes(config("whole").out) == shard_bytes(config("part").out)


def test_teachers_that_mix_documents_are_refused(config, place, tmp_path):
    """One line names the model and the flag, before anything is written."""
    shape = transformers.BloomConfig(vocab_size=280, hidden_size=16, n_layer=1, n_head=2)
    loading.save(
        transformers.BloomForCausalLM(shape), loading.load_tokenizer(str(place / "teacher")), tmp_path / "bloom"
    )
    with pytest.raises(ValueError, match=re.escape("a BloomForCausalLM does not keep documents apart")) as caught:
        cache_teacher(config(teacher=str(tmp_path / "bloom")))
    assert "--isolate-documents" in str(caught.value)
    assert {} == shard_bytes(config().out)
