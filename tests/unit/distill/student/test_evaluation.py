import dataclasses
import gzip
import json
import shutil

import numpy as np
import pytest
import tiny
import torch
from record_data import distribution, write_cache

import sklformat as skl
from sklformat.distill.models import loading, tokenization
from sklformat.distill.models.identities import config_fingerprint, model_fingerprint
from sklformat.distill.student.measures.evaluation import Evaluation, evaluate
from sklformat.distill.student.training import train
from sklformat.distill.student.validation import HeldOut, validate
from sklformat.distill.text.documents import Document
from sklformat.distill.text.fingerprints import tokenizer_fingerprint
from sklformat.distill.text.packing import PackedSequences
from sklformat.errors import SettingsError
from sklformat.settings.eval import EvalConfig
from sklformat.settings.train import TrainConfig


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("evaluation")
    documents = tiny.make_documents(12, 120)
    tokenizer = tiny.train_tokenizer(documents, 300)
    tiny.write_store(root / "tokens", tokenizer, documents)
    tiny.write_model(root / "student", tokenizer)
    tiny.write_model(root / "teacher", tokenizer, seed=1)
    return root


def run(place, **changes):
    values = {"student": str(place / "student"), "tokens": place / "tokens", "seq_len": 16} | changes
    return evaluate(EvalConfig(**values), progress=False)


@pytest.fixture(scope="module")
def records(place):
    """A cache of the teacher over the text, and a training run on all but five of its sequences."""
    teacher, tokenizer = loading.load_model(place / "teacher"), loading.load_tokenizer(place / "student")
    packed = PackedSequences(place / "tokens", seq_len=16, separator_id=tokenization.separator_id(tokenizer), seed=0)
    settings = {
        "tokenizer_fingerprint": packed.facts.tokenizer_fingerprint,
        "corpus_fingerprint": packed.facts.corpus_fingerprint,
        "teacher_fingerprint": model_fingerprint(teacher),
        "capture": {"teacher": {"dtype": "float32", "config": config_fingerprint(teacher)}},
    }
    path = write_cache(place / "records.skl", teacher, [packed[i] for i in range(17)], settings=settings)
    train(
        TrainConfig(
            out=place / "run", cache=path, hold_out=5, tokenizer=str(place / "student"), steps=2, batch_size=2,
            hidden_size=16, num_layers=1, num_heads=2, device="cpu",
        ),
        report=lambda *_: None,
    )  # fmt: skip
    return path


def of_cache(place, records, **changes):
    return run(place, tokens=None, seq_len=0, cache=records, **changes)


def test_figures_are_those_of_the_logits(place):
    """LM loss, agreement and overlap equal a float64 computation over all positions of all sequences."""
    found = run(place, teacher=str(place / "teacher"), batch_size=3)
    tokenizer = loading.load_tokenizer(place / "student")
    packed = PackedSequences(place / "tokens", seq_len=16, separator_id=tokenization.separator_id(tokenizer), seed=0)
    tokens = torch.from_numpy(np.stack([packed[i] for i in range(len(packed))]).astype(np.int64))
    with torch.no_grad():
        log_p, log_q = (
            loading.load_model(place / name)(tokens[:, :-1]).logits.double().log_softmax(-1)
            for name in ("student", "teacher")
        )
    assert len(packed) == found.num_sequences
    assert len(packed) * 16 == found.num_tokens
    loss = -log_p.gather(2, tokens[:, 1:, None]).mean()
    assert float(loss) == pytest.approx(found.lm_loss, abs=1e-6)
    overlap = torch.minimum(log_p.exp(), log_q.exp()).sum(-1).mean()
    assert float(overlap) == pytest.approx(found.acceptance_rate, abs=1e-6)
    agreement = (log_p.argmax(-1) == log_q.argmax(-1)).double().mean()
    assert float(agreement) == pytest.approx(found.top1_agreement, abs=1e-9)
    gap = (log_p.max(-1).values.exp() - (log_p.argmax(-1) == tokens[:, 1:]).double()).mean()
    assert float(gap) == pytest.approx(found.confidence_gap, abs=1e-6)


@pytest.mark.parametrize(("gap", "said"), [(0.125, "12.50 points above it"), (-0.125, "12.50 points below it")])
def test_whether_a_student_is_too_sure_is_said(place, gap, said):
    """How far confidence is from accuracy is a distance and a direction."""
    found = dataclasses.replace(run(place, num_sequences=4), accuracy=0.25, confidence_gap=gap)
    assert f"; accuracy 25.00%, mean confidence {said}" in str(found)


def test_a_model_agrees_with_itself(place):
    """Against itself as the teacher a model has top-1 agreement 1 and overlap 1."""
    found = run(place, teacher=str(place / "student"), num_sequences=4)
    assert found.top1_agreement == 1
    assert found.acceptance_rate == pytest.approx(1, abs=1e-6)


def test_result_is_the_json_file_and_any_batch_size_gives_it(place, tmp_path):
    """The JSON file holds the returned figures; batching changes them by rounding alone."""
    path = tmp_path / "deep" / "result.json"
    found = run(place, num_sequences=5, out=path, ce_loss=6.0, full_loss=5.0)
    stored = json.loads(path.read_text())
    assert found.lm_loss == stored["lm_loss"]
    assert found.reliability == stored["reliability"]
    assert stored["top1_agreement"] is None
    assert 100 * (6.0 - found.lm_loss) == pytest.approx(stored["percent_ce_to_full"])
    assert found.lm_loss == pytest.approx(run(place, num_sequences=5, batch_size=2).lm_loss, abs=1e-6)
    assert sum(entry["share"] for entry in found.reliability) == pytest.approx(1)


def test_text_of_other_files_is_the_same_text(place, tmp_path):
    """Rows of a field, in another encoding and packed, give the figures of the token store of the same documents."""
    rows = [{"body": document.text} for document in tiny.make_documents(12, 120)]
    (tmp_path / "rows.json.gz").write_bytes(gzip.compress(json.dumps(rows).encode("utf-16")))
    (tmp_path / "image.png").write_bytes(b"\x89PNG")
    how = {"field": "body", "encoding": "utf-16", "exclude": ("*.png",)}
    assert run(place) == run(place, tokens=None, text=(tmp_path,), **how)


def test_ids_beyond_the_vocabulary_do_not_count(place, tmp_path):
    """A head padded to a round number is cut to the ids of the text before the softmax."""
    tokenizer = loading.load_tokenizer(place / "student")
    vocab_size = tokenization.num_ids(tokenizer)
    padded = tiny.write_model(tmp_path / "padded", tokenizer, vocab_size=vocab_size + 20)
    with torch.no_grad():
        padded.lm_head.weight[vocab_size:] = 100.0
    loading.save(padded, tokenizer, tmp_path / "padded", replace=True)
    assert run(place, student=str(tmp_path / "padded")).lm_loss < 10


def test_another_tokenizer_is_refused(place, tmp_path):
    """Text tokenised by another tokenizer than the model's stops before any figure; the message has both."""
    other = tokenization.train_tokenizer(["completely different words " * 20], 290)
    tiny.write_model(tmp_path / "other", other)
    for changes in ({"student": str(tmp_path / "other")}, {"teacher": str(tmp_path / "other")}):
        with pytest.raises(
            SettingsError, match=r"was made by a different tokenizer from .*; make the token store with the model's tok"
        ) as caught:
            run(place, **changes)
        assert tokenizer_fingerprint(other) in str(caught.value)
        assert "make the token store with the model's tokenizer, or give that of the store as" in str(caught.value)


def test_a_teacher_of_another_tokenizer_is_named_beside_the_student(place, tmp_path):
    """With a text instead of tokens the message speaks of the two models that differ, of no temporary directory."""
    other = tokenization.train_tokenizer(["completely different words " * 20], 290)
    tiny.write_model(tmp_path / "other", other)
    (tmp_path / "held-out.txt").write_text("alpha beta gamma " * 40)
    with pytest.raises(SettingsError, match="a different tokenizer") as caught:
        run(place, tokens=None, text=(tmp_path / "held-out.txt",), teacher=str(tmp_path / "other"))
    message = str(caught.value)
    assert f"the teacher {tmp_path / 'other'} has a different tokenizer from the student {place / 'student'}" in message
    assert "sklformat-eval-" not in message


def test_a_tokenizer_may_be_given(place, tmp_path):
    """A student without tokenizer is measured with the one given, which a teacher without one is taken to share."""
    tokenizer = loading.load_tokenizer(place / "student")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "text.txt").write_text("alpha beta gamma " * 40)
    for name in ("student", "teacher"):
        loading.load_model(place / name).save_pretrained(tmp_path / name)
    bare = {"student": str(tmp_path / "student"), "teacher": str(tmp_path / "teacher")}
    given = {"tokenizer": str(tmp_path / "tokenizer")}
    with pytest.raises(OSError, match="student: cannot load a tokenizer"):
        run(place, **bare)
    for source in ({}, {"tokens": None, "text": (tmp_path / "text.txt",)}):
        expected = run(place, teacher=str(place / "teacher"), **source)
        assert expected == run(place, **bare, **given, **source)
    with pytest.raises(OSError, match="teacher: cannot load a tokenizer"):
        run(place, teacher=bare["teacher"])


def test_roles_and_added_tokens_part_no_student_from_its_teacher(place, tmp_path):
    """A teacher whose tokenizer has another padding token, or one more than its head, gives the same figures."""
    tokenizer = loading.load_tokenizer(place / "teacher")
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    loading.save(loading.load_model(place / "teacher"), tokenizer, tmp_path / "other")
    expected = run(place, teacher=str(place / "teacher"))
    assert expected == run(place, teacher=str(tmp_path / "other"))
    assert expected == run(place, teacher=str(place / "teacher"), tokenizer=str(tmp_path / "other"))
    tokenizer.add_tokens(["<img>"])
    tiny.write_store(tmp_path / "tokens", tokenizer, [*tiny.make_documents(3), Document("last", "alpha <img> beta")])
    tokenizer.save_pretrained(tmp_path / "wider")
    with pytest.raises(SettingsError, match=r"student: .*tokens: document 3 holds '<img>' \(id \d+\), which the tok"):
        run(place, tokens=tmp_path / "tokens", tokenizer=str(tmp_path / "wider"))


def test_sequences_beyond_the_positions_of_a_model_are_refused(place, tmp_path):
    """A length that student or teacher was not made for is refused by name, not measured."""
    tokenizer = loading.load_tokenizer(place / "student")
    tiny.write_model(tmp_path / "short", tokenizer, max_positions=8)
    for role in ("student", "teacher"):
        with pytest.raises(ValueError, match="short: seq_len 16 is beyond the 8 positions"):
            run(place, **{role: str(tmp_path / "short")})


def test_a_narrow_model_is_refused(place, tmp_path):
    """A model with fewer ids than the text's tokenizer is named with both numbers."""
    tokenizer = loading.load_tokenizer(place / "student")
    tiny.write_model(tmp_path / "narrow", tokenizer, vocab_size=100)
    with pytest.raises(ValueError, match=r"narrow: the tokenizer has \d+ ids, the model only 100; \d+ of those beyond"):
        run(place, student=str(tmp_path / "narrow"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"num_sequences": 10_000},
            "the held-out text gives .* sequences of 16 positions, asked for are 10000; give fewer",
        ),
        ({"seq_len": 0}, "text and tokens need seq_len, such as that which the student was trained with"),
        ({"batch_size": 0}, "batch_size must be >= 1"),
        ({"ce_loss": 1.0}, "belong together"),
    ],
)
def test_wrong_arguments_are_refused(place, changes, words):
    """A wrong argument is named with its value."""
    with pytest.raises(ValueError, match=words):
        run(place, **changes)


@pytest.mark.parametrize("name", ["student", "teacher"])
def test_broken_weights_are_named(place, tmp_path, name):
    """A model whose logits are NaN is named; no figure is made of them."""
    model = loading.load_model(place / name)
    with torch.no_grad():
        model.lm_head.weight[5, 0] = float("nan")
    loading.save(model, loading.load_tokenizer(place / name), tmp_path / "broken")
    with pytest.raises(ValueError, match="broken: gives logits that are no finite numbers; its weights are broken"):
        run(place, **{"teacher": str(place / "teacher"), name: str(tmp_path / "broken")})


def test_a_damaged_tokenizer_is_no_missing_one(place, tmp_path):
    """Only a directory that holds none is taken to share the student's; one that cannot be loaded is an error."""
    shutil.copytree(place / "teacher", tmp_path / "teacher")
    (tmp_path / "teacher" / "tokenizer.json").write_text("{")
    with pytest.raises(OSError, match="teacher: cannot load a tokenizer"):
        run(place, teacher=str(tmp_path / "teacher"), tokenizer=str(place / "student"))


def test_a_part_of_a_cache_is_measured_by_records_and_teacher(place, records, tmp_path, capfd):
    """What is said of records is what validate says; of the teacher it is exact, and both are in text and JSON."""
    found = of_cache(
        place, records, sequences="3:10", teacher=str(place / "teacher"), batch_size=3, out=tmp_path / "found.json"
    )
    student, teacher = (loading.load_model(place / name) for name in ("student", "teacher"))
    of_records = validate(student, HeldOut(records, range(3, 10)))
    for name in ("lm_loss", "accuracy", "calibration_error", "cross_entropy", "kl_to_records"):
        assert getattr(of_records, name) == pytest.approx(getattr(found, name), rel=1e-6)
    assert of_records.kl == pytest.approx(found.kl_by_records, rel=1e-6)
    assert of_records.num_positions == found.num_tokens == 7 * 14
    losses, divergences = [], []
    for i in range(3, 10):
        tokens = skl.open(records)[i].tokens
        log_p, log_q = (
            distribution(model, tokens)[kept := np.delete(np.arange(16), (4, 5))] for model in (student, teacher)
        )
        divergences += (np.exp(log_q) * (log_q - log_p)).sum(-1).tolist()
        losses += (-log_q[np.arange(14), tokens[1:][kept]]).tolist()
    assert np.mean(divergences) == pytest.approx(found.kl, rel=1e-5)
    assert np.mean(losses) == pytest.approx(found.teacher_loss, rel=1e-6)
    assert found == Evaluation(**json.loads((tmp_path / "found.json").read_text()))
    for line in (
        f"LM loss: {found.lm_loss:.4f} nats per token, sequences 3:10 of {records} (98 positions with records)",
        f"LM loss of the teacher itself: {found.teacher_loss:.4f} nats per token",
        f"KL to the teacher: {found.kl:.4f} nats per position, over its whole distribution",
        f"KL to the teacher of the cache: {found.kl_by_records:.4f} nats per position, estimated from records",
        f"KL to the records: {found.kl_to_records:.4f} nats per position, as training prints it",
    ):
        assert line in str(found)
    assert "note" not in capfd.readouterr().err
    alone = of_cache(place, records, sequences="3:10")
    assert alone.kl is None
    assert alone.teacher_loss == pytest.approx(found.teacher_loss, rel=1e-3)  # of the column, in float16
    of_cache(place, records, sequences="3:4", teacher=str(place / "student"))
    assert f"note: the records of {records} were made by a model that is not {place}/student" in capfd.readouterr().err


def test_records_of_an_engine_are_known_by_their_config(place, tmp_path, capfd):
    """An engine's cache has the fingerprint of the teacher's files, which no loaded model has."""
    teacher = loading.load_model(place / "teacher")
    tokenizer = loading.load_tokenizer(place / "student")
    packed = PackedSequences(place / "tokens", seq_len=16, separator_id=tokenization.separator_id(tokenizer), seed=0)
    capture = {"teacher": {"dtype": "float32", "config": config_fingerprint(teacher)}, "engine": {"name": "vllm"}}
    settings = {
        "tokenizer_fingerprint": packed.facts.tokenizer_fingerprint,
        "teacher_fingerprint": "1" * 32,
        "capture": capture,
    }
    path = write_cache(tmp_path / "records.skl", teacher, [packed[i] for i in range(3)], settings=settings)
    of_cache(place, path, sequences="0:3", teacher=str(place / "teacher"))
    assert "note" not in capfd.readouterr().err


def test_text_is_measured_by_the_teacher_too(place):
    """With a teacher, text has its exact divergence and its own LM loss; of records nothing is said."""
    found = run(place, teacher=str(place / "teacher"), num_sequences=3)
    assert run(place, student=str(place / "teacher"), num_sequences=3).lm_loss == pytest.approx(found.teacher_loss)
    assert found.kl > 0
    assert run(place, teacher=str(place / "student"), num_sequences=3).kl == pytest.approx(0, abs=1e-6)
    assert (found.cache, found.cross_entropy, found.kl_to_records, found.kl_by_records) == (None,) * 4
    assert "records" not in str(found)


def test_what_a_run_held_out_is_measured_and_nothing_else(place, records, tmp_path):
    """A student in a run is measured on what the run held out; what it learnt from is refused, with both ranges."""
    found = of_cache(place, records, student=str(place / "run"))
    assert found.sequences == "12:17"
    expected = of_cache(place, records, student=str(place / "run" / "model"), hold_out=5)
    assert expected == found
    (tmp_path / "link").symlink_to(place / "run" / "model")
    for student in (place / "run", tmp_path / "link"):
        for part, asked in (({"hold_out": 6}, "11:17"), ({"sequences": "0:12"}, "0:12"), ({"sequences": ":"}, "0:17")):
            with pytest.raises(
                SettingsError,
                match=rf"learnt from sequences 0:12 of .*records.skl \(.*run.json\), and {asked} are to be measured; "
                "give hold_out 5, or sequences 12:17",
            ):
                of_cache(place, records, student=str(student), **part)
    settings = json.loads((place / "run" / "run.json").read_text())
    shutil.copytree(place / "run", tmp_path / "all")
    (tmp_path / "all" / "run.json").write_text(json.dumps(settings | {"hold_out": 0}))
    with pytest.raises(SettingsError, match="that is all of it: give another cache, or train with hold_out"):
        of_cache(place, records, student=str(tmp_path / "all"))
    (tmp_path / "all" / "run.json").write_text(json.dumps(settings | {"cache": "0" * 32}))
    assert of_cache(place, records, student=str(tmp_path / "all")).sequences == "0:17"
    corpus = skl.open(records).header.corpus_fingerprint
    (tmp_path / "all" / "run.json").write_text(json.dumps({"corpus": corpus}))
    with pytest.raises(
        SettingsError, match=rf"learnt from the text that .* was made of \(corpus {corpus} in .*other text"
    ):
        of_cache(place, records, student=str(tmp_path / "all"))
    shutil.rmtree(tmp_path / "all" / "model")
    with pytest.raises(SettingsError, match="is a training run without a model yet; run its command again to finish"):
        of_cache(place, records, student=str(tmp_path / "all"))


def test_another_cache_of_the_text_learnt_from_is_said(place, records, tmp_path, capsys):
    """A run knows the texts of its caches: measured on one of them through another cache, or as text, it says so."""
    corpus, student = skl.open(records).header.corpus_fingerprint, str(place / "run")
    of_cache(place, records, student=student)
    assert "note: " not in capsys.readouterr().err
    part = tmp_path / "part.skl"
    with skl.ShardWriter(part, header=skl.open(records).header) as writer:
        for number in (1, 2, 3):
            sequence = skl.open(records)[number]
            writer.append(sequence.tokens, sequence.targets, dict(sequence.columns))
    run(place, tokens=None, seq_len=0, cache=part, student=student)
    said = capsys.readouterr().err
    assert f"learnt from the text that {part} was made of (corpus {corpus} in {place}/run/run.json); where" in said
    assert "give other text, or the run's own cache, whose held-out part is known" in said
    run(place, student=student)
    assert f"run/model learnt from the text that {place}/tokens was made of" in capsys.readouterr().err
    shutil.copytree(place / "run", tmp_path / "run")
    settings = json.loads((tmp_path / "run" / "run.json").read_text())
    (tmp_path / "run" / "run.json").write_text(json.dumps(settings | {"corpora": ["1" * 32]}))
    run(place, student=str(tmp_path / "run"))
    (tmp_path / "run" / "run.json").write_text(json.dumps({"corpus": corpus}))
    assert "note: " not in capsys.readouterr().err
    run(place, student=str(tmp_path / "run"))
    assert capsys.readouterr().err.rstrip().endswith("what is measured is too good: give other text")


def test_a_cache_that_does_not_fit_is_refused(place, records, tmp_path):
    """Sequences that are not there, another length, a narrow model and another tokenizer are named with both values."""
    for part, asked in (
        ({"hold_out": 18}, "hold_out 18"),
        ({"sequences": "4:4"}, "sequences 4:4"),
        ({"sequences": "9:18"}, ""),
    ):
        with pytest.raises(
            ValueError, match=rf"records.skl has sequences 0:17; {asked}.* asks for others, or for none"
        ):
            of_cache(place, records, **part)
    with pytest.raises(
        ValueError, match=r"seq_len 8 is given, and the sequences of .*records.skl have 16 positions each"
    ):
        run(place, tokens=None, seq_len=8, cache=records)
    tokenizer = loading.load_tokenizer(place / "student")
    tiny.write_model(tmp_path / "narrow", tokenizer, vocab_size=100)
    with pytest.raises(ValueError, match=r"narrow: the tokenizer has .* ids, the model only 100"):
        of_cache(place, records, student=str(tmp_path / "narrow"))
    other = tokenization.train_tokenizer(["completely different words " * 20], 290)
    tiny.write_model(tmp_path / "other", other)
    with pytest.raises(
        SettingsError,
        match=r"records.skl was made by a different tokenizer from .*other: .*; take a cache of the model's",
    ):
        of_cache(place, records, student=str(tmp_path / "other"))
