"""Students of isolated documents: a packed step is the step of the documents one by one; other contexts are refused."""

import itertools
import json

import numpy as np
import pytest
import tiny
import torch
import transformers
from torch.nn.functional import cross_entropy

import sklformat as skl
from sklformat.distill import SparseLogitDataset
from sklformat.distill.models import loading, tokenization
from sklformat.distill.student.measures.evaluation import evaluate
from sklformat.distill.student.streams import TextBatches
from sklformat.distill.student.training import train
from sklformat.distill.text.fingerprints import tokenizer_fingerprint
from sklformat.distill.text.packing import PackedSequences
from sklformat.settings.eval import EvalConfig
from sklformat.settings.train import TrainConfig

SEQ_LEN, COUNT = 16, 8
ISOLATED = {"packing": {"isolated": True}}


def write_cache(directory, packed, vocab_size, fingerprint, *, capture, columns=("document_start",)):
    """Two records a position, 3/4 on the label; none where a position does not count."""
    header = skl.Header(
        vocab_size=vocab_size,
        seq_len=SEQ_LEN,
        kind="counts",
        rounds=8,
        tokenizer_fingerprint=fingerprint,
        capture=capture,
        columns=columns,
    )
    directory.mkdir()
    with skl.ShardWriter(directory / "shard-00000.skl", header=header) as writer:
        for i in range(len(packed)):
            tokens, counted = packed[i], packed.counted(i)
            counted = np.ones(SEQ_LEN, np.bool_) if counted is None else counted
            ids = np.sort(np.stack([tokens[1:], (tokens[1:] + 1) % vocab_size], 1), axis=1)
            counts = np.where(ids == tokens[1:, None], 6, 2)
            targets = skl.SparseTargets(
                token_ids=ids[counted].ravel(),
                counts=counts[counted].ravel(),
                offsets=np.concatenate([[0], np.cumsum(counted * 2)]),
            )
            writer.append(tokens, targets, {name: packed.document_starts(i) for name in columns})


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("documents")
    documents = tiny.make_documents(60, 4)
    tokenizer = tiny.train_tokenizer(documents)
    tokenizer.save_pretrained(root / "tokenizer")
    tiny.write_store(root / "tokens", tokenizer, documents)
    settings = {"seq_len": SEQ_LEN, "separator_id": tokenization.separator_id(tokenizer), "seed": 0, "count": COUNT}
    facts = tokenization.num_ids(tokenizer), tokenizer_fingerprint(tokenizer)
    isolated, together = (PackedSequences(root / "tokens", **settings, isolated=way) for way in (True, False))
    write_cache(root / "isolated", isolated, *facts, capture=ISOLATED)
    write_cache(root / "together", together, *facts, capture={})
    write_cache(root / "bare", isolated, *facts, capture=ISOLATED, columns=())
    for name, seed in (("student", 1), ("teacher", 2)):
        tiny.write_model(root / name, tokenizer, max_positions=SEQ_LEN, seed=seed)
    shape = transformers.BloomConfig(vocab_size=facts[0], hidden_size=16, n_layer=1, n_head=2)
    loading.save(transformers.BloomForCausalLM(shape), tokenizer, root / "bloom")
    return root


def config_of(place, out, **changes):
    values = {
        "out": out,
        "cache": place / "isolated",
        "tokenizer": str(place / "tokenizer"),
        "student": str(place / "student"),
        "batch_size": COUNT,
        "steps": 1,
        "log_every": 1,
        "device": "cpu",
    }
    return TrainConfig(**(values | changes))


def lines(out):
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: row[name] for name in ("loss", "gradient_norm")} for row in rows]


def documents_of(batch):
    """Each document of a batch by itself: its inputs, labels and the row and places that it has."""
    for row, positions in enumerate(batch.position_ids):
        begins = [*np.flatnonzero(positions.numpy() == 0), SEQ_LEN]
        for begin, end in itertools.pairwise(begins):
            yield batch.input_ids[row : row + 1, begin:end], batch.labels[row, begin:end], row * SEQ_LEN + begin


def divergence(batch, first, log_p):
    """The sum of the records' divergences of one document."""
    total = torch.zeros(())
    for t, log_p_V in enumerate(log_p):
        begin, end = batch.targets.offsets[first + t : first + t + 2].tolist()
        probs = batch.targets.probs[begin:end]
        total = total + (probs * (probs.log() - log_p_V[batch.targets.token_ids[begin:end].long()])).sum()
    return total


@pytest.mark.parametrize("method", ["random_sampling", "ce", "full"])
def test_a_packed_step_is_that_of_the_documents_one_by_one(place, tmp_path, method):
    """Loss and norm of the gradient, of records, labels and a teacher beside it; those of joined documents differ."""
    own = {"method": method} | ({"teacher": str(place / "teacher")} if method == "full" else {})
    train(config_of(place, tmp_path / "run", **own), report=lambda *_: None)
    student, teacher = (loading.load_model(place / name) for name in ("student", "teacher"))
    (batch,) = SparseLogitDataset(place / "isolated", batch_size=COUNT, shuffle=False)
    total, documents = torch.zeros(()), 0
    for ids, labels, first in documents_of(batch):
        documents += 1
        log_p = student(ids).logits[0].log_softmax(-1)
        if method == "ce":
            total = total + cross_entropy(log_p, labels, reduction="sum")
        elif method == "full":
            with torch.no_grad():
                log_t = teacher(ids).logits[0].log_softmax(-1)
            total = total + ((log_t.exp() * (log_t - log_p)).sum(-1) * (labels != -100)).sum()
        else:
            total = total + divergence(batch, first, log_p)
    assert documents > 3 * COUNT / 2
    loss = total / (batch.labels != -100).sum()
    loss.backward()
    norm = torch.stack([p.grad.norm() for p in student.parameters() if p.grad is not None]).norm()
    found = lines(tmp_path / "run")[0]
    assert float(loss.detach()) == pytest.approx(found["loss"], abs=1e-5)
    assert float(norm) == pytest.approx(found["gradient_norm"], rel=1e-4)
    train(config_of(place, tmp_path / "together", cache=place / "together", **own), report=lambda *_: None)
    assert abs(found["gradient_norm"] / lines(tmp_path / "together")[0]["gradient_norm"] - 1) > 1e-3


def test_tokens_train_as_an_isolated_cache_of_them_does(place, tmp_path):
    """With the flag, a token store gives the batches, and method ce the steps, that a cache of it gives."""
    packed = PackedSequences(place / "tokens", seq_len=SEQ_LEN, separator_id=0, seed=0, isolated=True)
    header = skl.open(place / "isolated").header
    facts = header.vocab_size, header.tokenizer_fingerprint
    write_cache(tmp_path / "whole", packed, *facts, capture=ISOLATED)
    (stored,) = SparseLogitDataset(tmp_path / "whole", batch_size=len(packed))
    (made,) = TextBatches(packed, batch_size=len(packed), seed=0, rank=0, world_size=1)
    for name in ("input_ids", "labels", "position_ids", "document_starts"):
        assert torch.equal(getattr(made, name), getattr(stored, name))
    settings = {"method": "ce", "steps": 3, "batch_size": 2}
    tokens = {"cache": None, "tokens": place / "tokens", "seq_len": SEQ_LEN, "isolate_documents": True}
    train(config_of(place, tmp_path / "a", cache=tmp_path / "whole", **settings), report=lambda *_: None)
    train(config_of(place, tmp_path / "b", **settings | tokens), report=lambda *_: None)
    assert lines(tmp_path / "a") == lines(tmp_path / "b")


def test_a_cache_made_one_way_and_trained_the_other_is_refused(place, tmp_path):
    """The flag beside a cache that was made without it, and borders that nobody stored: both are named."""
    with pytest.raises(skl.SettingsError, match=r"--isolate-documents is given, and .*together was made without"):
        train(config_of(place, tmp_path / "a", cache=place / "together", isolate_documents=True))
    with pytest.raises(skl.SettingsError, match="isolated documents, but without the column document_start"):
        train(config_of(place, tmp_path / "b", cache=place / "bare"))
    train(config_of(place, tmp_path / "c", isolate_documents=True), report=lambda *_: None)


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_models_that_mix_documents_are_refused(place, tmp_path, role):
    """By their kind, with the flag that the cache was made with."""
    method = {"method": "full", "teacher": str(place / "teacher")} if role == "teacher" else {}
    changes = method | {role: str(place / "bloom")}
    with pytest.raises(ValueError, match=r"a BloomForCausalLM does not keep documents apart.*--isolate-documents"):
        train(config_of(place, tmp_path / "run", **changes))


def test_evaluation_reads_each_document_alone(place):
    """Loss over all that documents predict of themselves; border positions count for nothing; the result says so."""
    settings = {"student": str(place / "student"), "tokens": place / "tokens", "seq_len": SEQ_LEN, "batch_size": 3}
    found = evaluate(EvalConfig(**settings, isolate_documents=True, teacher=str(place / "student")), progress=False)
    together = evaluate(EvalConfig(**settings), progress=False)
    packed = PackedSequences(place / "tokens", seq_len=SEQ_LEN, separator_id=0, seed=0, isolated=True)
    student = loading.load_model(place / "student")
    loss, count = 0.0, 0
    with torch.no_grad():
        for index in range(len(packed)):
            tokens = torch.from_numpy(packed[index].astype(np.int64))
            begins = [*np.flatnonzero(packed.position_ids(index) == 0), SEQ_LEN]
            counted = torch.from_numpy(packed.counted(index))
            for begin, end in itertools.pairwise(begins):
                logits = student(tokens[None, begin:end]).logits[0][counted[begin:end]]
                labels = tokens[begin + 1 : end + 1][counted[begin:end]]
                loss += float(cross_entropy(logits, labels, reduction="sum"))
                count += labels.numel()
    assert (count, True) == (found.num_tokens, found.isolated)
    assert loss / count == pytest.approx(found.lm_loss, abs=1e-6)
    assert found.top1_agreement == 1
    assert "--isolate-documents" in str(found)
    assert (False, len(packed) * SEQ_LEN) == (together.isolated, together.num_tokens)
    assert "--isolate-documents" not in str(together)
    with pytest.raises(ValueError, match="bloom: a BloomForCausalLM does not keep documents apart"):
        evaluate(EvalConfig(**settings | {"student": str(place / "bloom")}, isolate_documents=True), progress=False)
