import gzip
import json
import shutil

import numpy as np
import pytest
import tiny
import torch

from sklformat.distill.models import loading, tokenization
from sklformat.distill.student.evaluation import evaluate
from sklformat.distill.text.documents import Document
from sklformat.distill.text.fingerprints import tokenizer_fingerprint
from sklformat.distill.text.packing import PackedSequences
from sklformat.errors import SettingsError
from sklformat.settings.eval import EvalConfig


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
        ({"seq_len": 0}, "seq_len must be >= 1"),
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
