"""Another teacher on the records of a cache: what it says of them, weights to learn from, what is refused."""

import dataclasses
import json
import signal

import forked
import numpy as np
import pytest
import torch
import transformers
from capture_data import shard_bytes
from system import complaint
from teacher_data import SEQ_LEN, make_teacher, write_teacher, write_text

import sklformat as skl
from sklformat.cli import main
from sklformat.distill.models import loading, tokenization
from sklformat.distill.rescoring import scores
from sklformat.distill.rescoring.passes import rescore
from sklformat.distill.student.training import train
from sklformat.distill.student.validation import HeldOut
from sklformat.distill.teacher.caching import cache_teacher
from sklformat.errors import AlignmentError, SettingsError
from sklformat.format.header import is_unbiased
from sklformat.integrations.transformers import SparseKDTrainer
from sklformat.settings.cache import CacheConfig
from sklformat.settings.rescore import RescoreConfig
from sklformat.settings.train import TrainConfig

COLUMNS = ("label_logprob", "entropy", "record_logprob")
SEQUENCES, BATCH, PER_SHARD = 8, 2, 3


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Text, two teachers of one tokenizer, and a cache that the first drew, with columns and without tokens beside."""
    folder = tmp_path_factory.mktemp("rescored")
    texts = write_text(folder / "text")
    write_teacher(folder / "first", texts)
    tokenizer = tokenization.train_tokenizer(texts, 280)
    second = make_teacher()
    with torch.no_grad():
        second.lm_head.weight += torch.randn(second.lm_head.weight.shape, generator=torch.manual_seed(3)) / 4
    loading.save(second, tokenizer, folder / "second")
    capture(folder, folder / "cache", columns=COLUMNS)
    return folder


def capture(place, out, **settings):
    common = {
        "seq_len": SEQ_LEN,
        "num_sequences": SEQUENCES,
        "rounds": 20,
        "sampler": "multinomial",
        "batch_size": BATCH,
    }
    common |= {"sequences_per_shard": PER_SHARD, "text": (place / "text",)}
    cache_teacher(CacheConfig(teacher=str(place / "first"), out=out, **common | settings))


def rescored(place, out, teacher="second", cache="cache", **settings):
    common = {"cache": str(place / cache), "teacher": str(place / teacher), "batch_size": BATCH}
    return rescore(RescoreConfig(out=out, **common | settings))


@pytest.fixture(scope="module")
def scored(place):
    """The cache as the second teacher scores it."""
    done = rescored(place, place / "scored")
    assert (SEQUENCES, SEQUENCES) == (done.sequences, done.sequences_scored)
    return skl.open(place / "scored")


def test_the_teacher_that_drew_says_what_it_said(place, tmp_path):
    """The first teacher's own columns come again, bit for bit, and its records stay."""
    rescored(place, tmp_path / "own", "first")
    assert [] == skl.verify(tmp_path / "own")
    own, first = skl.open(tmp_path / "own"), skl.open(place / "cache")
    assert all(theirs == ours for theirs, ours in zip(own, first, strict=True))
    assert first.header.teacher_fingerprint == own.header.capture["rescored"]["teacher"]["fingerprint"]


def test_another_teacher_says_its_own(place, scored):
    """Log-probs of records and labels, and entropies, are those of the second teacher's own call, in half precision."""
    model = loading.load_model(place / "second")
    for theirs, ours in zip(skl.open(place / "cache"), scored, strict=True):
        assert theirs.targets == ours.targets
        assert theirs.alignment == ours.alignment
        with torch.inference_mode():
            logits = model(torch.from_numpy(ours.tokens[None, :-1].astype(np.int64))).logits[0, :, :280]
        said = logits.double().log_softmax(-1).numpy()
        positions = np.repeat(np.arange(SEQ_LEN), np.diff(ours.targets.offsets))
        assert_close(said[positions, ours.targets.token_ids], ours.columns["record_logprob"])
        assert_close(said[np.arange(SEQ_LEN), ours.tokens[1:]], ours.columns["label_logprob"])
        assert_close(-(np.exp(said) * said).sum(-1), ours.columns["entropy"])
        assert np.abs(theirs.columns["record_logprob"] - ours.columns["record_logprob"]).max() > 0.3


def assert_close(expected, halves):
    np.testing.assert_allclose(halves.astype(np.float64), expected, rtol=2**-10, atol=2e-4)


def test_an_evaluation_takes_the_columns_of_whose_records_they_are(place, scored):
    """KL from records and entropies is of one teacher: where the columns are another's, there is none."""
    found = [next(iter(HeldOut(cache, batch_size=2)))[1] for cache in (place / "cache", scored)]
    assert [{"entropy", "label_logprob"}, set()] == [set(columns) for columns in found]


def test_weights_are_the_ratio_and_a_student_takes_them(place, scored, tmp_path):
    """Weights are counts / rounds times p_B / p_A, up to the ratio code; the header knows both; train takes them."""
    done = rescored(place, tmp_path / "weighted", weights="unbiased")
    assert [] == skl.verify(tmp_path / "weighted")
    assert {"manifest.json", *shard_bytes(done.directory)} == {path.name for path in done.directory.iterdir()}
    weighted, first = skl.open(done.directory), skl.open(place / "cache")
    assert weighted.fingerprint == done.fingerprint
    largest, kept = 0.0, 0
    for ours, theirs, said in zip(weighted, first, scored, strict=True):
        ratio = np.exp(said.columns["record_logprob"].astype(float) - theirs.columns["record_logprob"].astype(float))
        exact = keyed(theirs.targets, theirs.targets.counts / 20 * ratio)
        found = keyed(ours.targets, ours.targets.weights)
        assert all(abs(found[key] / exact[key] - 1) < 0.08 for key in found)
        says, said_there = keyed(ours.targets, ours.columns["record_logprob"]), said.columns["record_logprob"]
        assert says.items() <= keyed(said.targets, said_there).items()
        assert sum(exact[key] for key in exact.keys() - found) < 1e-3
        largest, kept = max(largest, *exact.values()), kept + len(found)
    assert largest == pytest.approx(done.largest_weight)
    assert done.records == kept
    header, capture = weighted.header, weighted.header.capture
    assert 2.0**header.scale_log2 >= largest > 1
    assert scored.header.capture["rescored"]["teacher"]["fingerprint"] == header.teacher_fingerprint
    assert first.header.teacher_fingerprint == capture["weighted"]["drawn_by"]["fingerprint"]
    assert is_unbiased(header.sampler, header.proposal_temperature, capture)
    again = rescored(place, done.directory, weights="unbiased")
    assert (0, done.fingerprint) == (again.sequences_scored, again.fingerprint)
    trained = train(
        TrainConfig(
            cache=(done.directory,), out=tmp_path / "run", tokenizer=str(place / "first"), hidden_size=16,
            num_layers=1, num_heads=2, steps=2, batch_size=4,
        )
    )  # fmt: skip
    assert np.isfinite(trained.loss)
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path / "trainer"), max_steps=2, per_device_train_batch_size=2, report_to=[], use_cpu=True,
        save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = SparseKDTrainer(model=loading.load_model(place / "second"), args=arguments, cache=done.directory)
    assert np.isfinite(trainer.train().training_loss)


def keyed(targets, values):
    positions = np.repeat(np.arange(targets.num_positions), np.diff(targets.offsets))
    return dict(zip(zip(positions.tolist(), targets.token_ids.tolist(), strict=True), values.tolist(), strict=True))


def test_weights_divided_and_cut_are_said_to_be_biased(place, tmp_path, capsys):
    """Normalised weights sum to 1; cut ones stay below; neither is called unbiased; weights of weights keep that."""
    done = rescored(place, tmp_path / "normalised", weights="normalised")
    cache = skl.open(done.directory)
    sums = np.add.reduceat(cache[0].targets.weights, cache[0].targets.offsets[:-1])
    assert np.allclose(sums, 1, atol=0.08)
    assert not is_unbiased("multinomial", 1.0, cache.header.capture)
    assert 0 == main(["inspect", str(done.directory)])
    assert "slightly (importance weights are normalised)" in capsys.readouterr().out
    cut = rescored(place, tmp_path / "cut", weights="unbiased", largest_weight=0.5)
    assert max(sequence.targets.weights.max() for sequence in skl.open(cut.directory)) == 0.5
    assert not is_unbiased("multinomial", 1.0, skl.open(cut.directory).header.capture)
    assert 0 == main(["inspect", str(cut.directory)])
    assert "slightly (importance weights are cut)" in capsys.readouterr().out
    back = rescored(tmp_path, tmp_path / "back", str(place / "first"), "normalised", weights="unbiased")
    assert not is_unbiased("multinomial", 1.0, skl.open(back.directory).header.capture)


def test_isolated_documents_and_chats_are_run_as_they_were(place, tmp_path):
    """Where documents did not see each other, or sequences have lengths of their own, the log-probs come again."""
    capture(place, tmp_path / "isolated", isolate_documents=True, columns=COLUMNS)
    chats = "".join(
        json.dumps({"prompt": "def x ( " * n, "completion": " return y" * (n + 1)}) + "\n" for n in range(1, 5)
    )
    (tmp_path / "chats.jsonl").write_text(chats)
    chat = {"text": (tmp_path / "chats.jsonl",), "num_sequences": None, "packing": "single", "batch_size": 4}
    capture(place, tmp_path / "chat", columns=COLUMNS, sequences_per_shard=4, **chat)
    for name, batch in (("isolated", BATCH), ("chat", 4)):
        rescored(tmp_path, tmp_path / f"{name} again", str(place / "first"), name, batch_size=batch)
        pairs = zip(skl.open(tmp_path / name), skl.open(tmp_path / f"{name} again"), strict=True)
        assert all(theirs == ours for theirs, ours in pairs)


def test_tokens_come_from_beside_the_cache(place, tmp_path):
    """A cache that stores none has them in its directory, or is given them; others are named, and none is refused."""
    capture(place, tmp_path / "bare", columns=COLUMNS, store_tokens=False)
    rescored(tmp_path, tmp_path / "one", str(place / "second"), "bare")
    (tmp_path / "bare" / "tokens").rename(tmp_path / "moved")
    with pytest.raises(SettingsError, match="none lie beside it; give those that it was captured on"):
        rescored(tmp_path, tmp_path / "two", str(place / "second"), "bare")
    (tmp_path / "empty").mkdir()
    with pytest.raises(SettingsError, match=r"empty is neither a \.npy array, nor"):
        rescored(tmp_path, tmp_path / "two", str(place / "second"), "bare", tokens=tmp_path / "empty")
    with pytest.raises(FileNotFoundError):
        rescored(tmp_path, tmp_path / "two", str(place / "second"), "bare", tokens=tmp_path / "nothing")
    rescored(tmp_path, tmp_path / "two", str(place / "second"), "bare", tokens=tmp_path / "moved")
    tokens = np.stack([sequence.tokens for sequence in skl.open(place / "cache")])
    np.save(tmp_path / "tokens.npy", tokens)
    rescored(tmp_path, tmp_path / "three", str(place / "second"), "bare", tokens=tmp_path / "tokens.npy")
    assert shard_bytes(tmp_path / "one") == shard_bytes(tmp_path / "two") == shard_bytes(tmp_path / "three")
    np.save(tmp_path / "tokens.npy", tokens[::-1])
    with pytest.raises(AlignmentError, match="sequence 0"):
        rescored(tmp_path, tmp_path / "four", str(place / "second"), "bare", tokens=tmp_path / "tokens.npy")


def test_what_cannot_be_weighted_is_refused(place, tmp_path):
    """Without the log-probs of whoever drew there are no weights: they are missing, or another's, or none drew."""
    capture(place, tmp_path / "plain", num_sequences=2)
    with pytest.raises(
        SettingsError, match=r"importance weights need the log-probs .* it has no column record_logprob"
    ):
        rescored(tmp_path, tmp_path / "out", str(place / "second"), "plain", weights="unbiased")
    rescored(tmp_path, tmp_path / "of second", str(place / "second"), "plain")
    with pytest.raises(SettingsError, match=r"those in it are of the teacher .*, its records are of"):
        rescored(tmp_path, tmp_path / "out", str(place / "second"), "of second", weights="unbiased")
    rescored(tmp_path, tmp_path / "of first", str(place / "first"), "plain")
    rescored(tmp_path, tmp_path / "out", str(place / "second"), "of first", weights="unbiased")  # by rescoring first
    capture(place, tmp_path / "topk", num_sequences=2, sampler="topk", k=5)
    with pytest.raises(SettingsError, match="its sampler topk did not draw, so no weights"):
        rescored(tmp_path, tmp_path / "out2", str(place / "second"), "topk", weights="unbiased")
    rescored(tmp_path, tmp_path / "out2", str(place / "second"), "topk")
    assert "topk" == skl.open(tmp_path / "out2").header.sampler


def test_a_teacher_of_other_ids_is_refused(place, tmp_path):
    """A teacher must know the cache's ids, all of them and no more; a cache must hold something."""
    texts = [" ".join(["class", "value", "error"] * 40)]
    loading.save(make_teacher(), tokenization.train_tokenizer(texts, 280), tmp_path / "others")
    with pytest.raises(SettingsError, match="a teacher can only be asked about ids that it knows"):
        rescored(place, tmp_path / "out", str(tmp_path / "others"))
    header = dataclasses.replace(
        skl.open(place / "cache").header, vocab_size=270, tokenizer_fingerprint="0" * 32, columns=()
    )
    with skl.CacheWriter(tmp_path / "narrow", header=header) as writer:
        writer.append([1] * (SEQ_LEN + 1), skl.SparseTargets(token_ids=[], counts=[], offsets=[0] * (SEQ_LEN + 1)))
    with pytest.raises(SettingsError, match=r"vocab_size 270, and .* has 2\d\d ids in common with its tokenizer; prob"):
        rescored(tmp_path, tmp_path / "out", str(place / "second"), "narrow")
    with skl.CacheWriter(tmp_path / "nothing", header=header):
        pass
    with pytest.raises(ValueError, match="the cache holds no sequence, so there is nothing to score"):
        rescored(tmp_path, tmp_path / "out", str(place / "second"), "nothing")
    with pytest.raises(ValueError, match="device_map auto needs several CUDA devices, device is cpu"):
        rescored(place, tmp_path / "out", device="cpu", device_map="auto")


def test_settings_that_contradict_each_other_are_refused(tmp_path):
    """Of the flags alone."""
    given = {"cache": "c", "teacher": "t", "out": tmp_path}
    with pytest.raises(ValueError, match="document_start is no teacher's to say"):
        RescoreConfig(**given, columns=("document_start",))
    with pytest.raises(ValueError, match="largest_weight belongs to weights unbiased, weights is none"):
        RescoreConfig(**given, largest_weight=2.0)
    with pytest.raises(ValueError, match="largest_weight must be positive and finite, got -1"):
        RescoreConfig(**given, weights="unbiased", largest_weight=-1)


def test_a_weight_beyond_the_code_is_refused(place, tmp_path, monkeypatch):
    """Where the second teacher gives an id far more than the first, weights need a limit; what was scored is kept."""
    score = scores.TeacherScorer.score

    def certain(scorer, batch, names):
        return [
            said | {"record_logprob": np.zeros_like(said["record_logprob"])} for said in score(scorer, batch, names)
        ]

    capture(place, tmp_path / "flat", columns=COLUMNS, rounds=1)
    monkeypatch.setattr(scores.TeacherScorer, "score", certain)
    with pytest.raises(ValueError, match=r"has an importance weight of .* the ratio code would lose the others"):
        rescored(tmp_path, tmp_path / "out", str(place / "second"), "flat", weights="unbiased")
    cut = rescored(tmp_path, tmp_path / "out", str(place / "second"), "flat", weights="unbiased", largest_weight=8.0)
    assert cut.sequences_scored == 0
    assert cut.largest_weight > 256


def kill_itself(after, words):
    """The command, in a process that is killed before it scores the next batch, or weighs the next sequence."""
    from sklformat.distill.rescoring import passes

    left = [after]

    def struck(function):
        def call(*arguments, **named):
            left[0] -= 1
            if left[0] == -1:
                signal.raise_signal(signal.SIGKILL)
            return function(*arguments, **named)

        return call

    scores.TeacherScorer.score = struck(scores.TeacherScorer.score)
    passes.importance_weights = struck(passes.importance_weights)
    return main(words)


@pytest.mark.parametrize("after", [2, 5 + SEQUENCES + 4], ids=["while it scores", "while it weighs"])
def test_a_killed_run_resumes_to_the_same_bytes(place, tmp_path, after):
    """Killed in either pass, the same command makes the cache of an undisturbed run, and says what is another's."""
    out = tmp_path / "out"
    words = ["rescore", str(place / "cache"), "--teacher", str(place / "second"), "--out", str(out)]
    words += ["--batch-size", str(BATCH), "--weights", "unbiased"]
    killed = forked.run(kill_itself, after, words)
    assert (-signal.SIGKILL, "") == (killed.status, complaint(killed.stderr))
    with pytest.raises((skl.MissingShardError, skl.UnfinishedError)):
        skl.open(out)
    with pytest.raises(SettingsError, match="made with other settings"):
        rescored(place, out, weights="unbiased", batch_size=1)
    done = rescored(place, out, weights="unbiased")
    whole = rescored(place, tmp_path / "whole", weights="unbiased")
    assert shard_bytes(whole.directory) == shard_bytes(out)
    assert SEQUENCES > done.sequences_scored
    with pytest.raises(SettingsError, match="made with other settings"):
        rescored(place, out, weights="normalised")


def test_the_command_says_what_it_did(place, tmp_path, capsys):
    """One line, or JSON; a directory that holds something else is left as it is."""
    words = ["rescore", str(place / "cache"), "--teacher", str(place / "second"), "--out"]
    assert 0 == main([*words, str(tmp_path / "out")])
    said = capsys.readouterr().out
    assert f"out: {SEQUENCES} sequences ({SEQUENCES} scored now), " in said
    assert 0 == main([*words, str(tmp_path / "out"), "--json"])
    assert 0 == json.loads(capsys.readouterr().out)["sequences_scored"]
    assert 1 == main([*words, str(place / "text")])
    assert "holds no rescored cache" in complaint(capsys.readouterr().err)
