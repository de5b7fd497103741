"""Runs that evaluate their student while they train, and keep the best."""

import json
import math
import shutil

import pytest
import student_data
from student_data import config_of, log_of, losses_of, silent, stop_at, write_place
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import sklformat as skl
from sklformat.distill.models import loading, tokenization
from sklformat.distill.student.training import train
from sklformat.distill.student.validation import HeldOut, validate

EVALUATED = {"hold_out": 4, "eval_every": 3}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return write_place(tmp_path_factory.mktemp("evaluated"))


@pytest.fixture(scope="module")
def run(place, tmp_path_factory):
    """An undisturbed run of seven steps that evaluates after 3, 6 and 7, with its summary."""
    out = tmp_path_factory.mktemp("evaluated") / "run"
    return out, train(config_of(place, out, steps=7, **EVALUATED), report=silent)


def training_rows(out):
    return [row for row in log_of(out) if "loss" in row]


def evaluations(out):
    return [row for row in log_of(out) if "eval_lm_loss" in row]


def figures(out):
    """All of the log that is no time."""
    timed = ("seconds", "tokens_per_second", "data_wait", "peak_memory_bytes")
    return [{name: value for name, value in row.items() if name not in timed} for row in log_of(out)]


def test_the_figures_are_those_of_the_held_out_sequences(place, run):
    """Each evaluation has the figures of ``validate`` on the sequences that training never sees, at its step."""
    out, summary = run
    assert [3, 6, 7] == [row["step"] for row in evaluations(out)]
    model = AutoModelForCausalLM.from_pretrained(summary.model)
    expected = validate(model, HeldOut(place / "random", range(16, 20)))
    last = evaluations(out)[-1]
    for name in ("lm_loss", "kl_to_records", "calibration_error", "accuracy", "cross_entropy"):
        assert getattr(expected, name) == pytest.approx(last[f"eval_{name}"], abs=1e-6)
        assert summary.evaluation[name] == last[f"eval_{name}"]
    assert f"held-out LM loss {last['eval_lm_loss']:.4f} nats per token" in str(summary)
    assert "KL to the records" in str(summary)


def test_evaluating_disturbs_nothing(place, run, tmp_path):
    """The losses, gradients and weights are those of the run that evaluates nothing, bit for bit."""
    out, summary = run
    silently = train(config_of(place, tmp_path / "run", steps=7, hold_out=4), report=silent)
    assert losses_of(tmp_path / "run") == [(r["step"], r["loss"], r["gradient_norm"]) for r in training_rows(out)]
    weights = [path / "model.safetensors" for path in (summary.model, silently.model)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert not (tmp_path / "run" / "best").exists()


def test_the_best_model_is_that_of_its_step(place, tmp_path):
    """best/ is the student of the evaluation with the lowest figure, not the last, and says which that was."""
    # A rate that is far too high at the end makes an early step the best.
    rising = {"schedule": "constant", "warmup_steps": 6, "learning_rate": 3.0}
    out = tmp_path / "run"
    summary = train(config_of(place, out, steps=6, hold_out=4, eval_every=1, **rising), report=silent)
    losses = [row["eval_lm_loss"] for row in evaluations(out)]
    best = losses.index(min(losses)) + 1
    assert 1 <= best < 6
    assert {"step": best, "by": "lm_loss", "value": min(losses)} == summary.best
    assert best == json.loads((out / "best" / "evaluation.json").read_text())["step"]
    train(config_of(place, tmp_path / "early", steps=best, hold_out=4, **rising), report=silent)
    early = tmp_path / "early" / "model" / "model.safetensors"
    assert early.read_bytes() == (out / "best" / "model.safetensors").read_bytes()
    (out / "best" / "config.json").unlink()
    with pytest.raises(
        skl.CorruptError, match=r"best/config\.json: is missing, and no checkpoint holds it; take model/"
    ):
        train(config_of(place, out, steps=6, hold_out=4, eval_every=1, **rising), report=silent)
    train(config_of(place, out, steps=6, hold_out=4, best_by="none", **rising), report=stop_at(1))


@pytest.mark.parametrize("stop", [4, 6])
def test_a_stopped_run_evaluates_as_an_undisturbed_one(place, run, tmp_path, stop):
    """Stopped between evaluations or right before one is due, all figures, the best and the last are the same."""
    out, whole = run
    cut = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        train(config_of(place, cut, steps=7, save_every=2, **EVALUATED), report=stop_at(stop))
    summary = train(config_of(place, cut, steps=7, save_every=2, **EVALUATED), report=silent)
    assert figures(out) == figures(cut)
    assert (whole.evaluation, whole.best) == (summary.evaluation, summary.best)
    for name in ("model", "best"):
        assert (out / name / "model.safetensors").read_bytes() == (cut / name / "model.safetensors").read_bytes()


def test_the_best_by_kl_is_by_the_records_where_the_teacher_is_not_known(place, tmp_path):
    """Without entropies in the cache KL to the teacher cannot be had; the summary says what was taken."""
    summary = train(config_of(place, tmp_path / "run", steps=2, eval_every=2, hold_out=4, best_by="kl"), report=silent)
    assert "kl_to_records" == summary.best["by"]
    assert summary.best["value"] == summary.evaluation["kl_to_records"]


@pytest.mark.parametrize("change", ["deleted", "of another step"])
def test_a_best_that_is_not_there_is_said_and_made_again(place, run, tmp_path, capsys, change):
    """A longer run whose best/ was deleted, or is of steps that come again, claims no best that it does not hold."""
    cut = tmp_path / "run"
    shutil.copytree(run[0], cut)
    if change == "deleted":
        shutil.rmtree(cut / "best")
    else:
        path = cut / "best" / "evaluation.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"step": 6}))
    summary = train(config_of(place, cut, steps=8, hold_out=4), report=silent)
    assert summary.best is None
    said = capsys.readouterr().err
    assert "run/best does not hold the model of step 7, the best up to the checkpoint; the next evaluation beg" in said
    summary = train(config_of(place, cut, steps=9, **EVALUATED), report=silent)
    assert 9 == summary.best["step"] == json.loads((cut / "best" / "evaluation.json").read_text())["step"]
    assert summary.best["value"] == summary.evaluation["lm_loss"]


def test_a_student_too_short_for_the_held_out_sequences_is_refused(place, tmp_path):
    """Its positions are counted against another cache's sequences before the first step, not found out after some."""
    tokenizer = loading.load_tokenizer(place / "tokenizer")
    config = GPT2Config(vocab_size=tokenization.num_ids(tokenizer), n_positions=8, n_embd=16, n_layer=1, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "student")
    tokens = {"cache": (), "tokens": place / "tokens", "seq_len": 8, "method": "ce", "eval_cache": place / "random"}
    with pytest.raises(skl.SettingsError, match=r"fewer positions than the 16 of a sequence of .*random; ev"):
        train(config_of(place, tmp_path / "run", student=str(tmp_path / "student"), eval_every=1, **tokens))
    assert not (tmp_path / "run").exists()


def test_another_measure_begins_the_best_again(place, tmp_path):
    """What was the best by one figure, or on other sequences, is not compared with another."""
    config = {"steps": 4, "eval_every": 2, "hold_out": 4, "schedule": "constant"}
    with pytest.raises(KeyboardInterrupt):
        train(config_of(place, tmp_path / "run", **config, save_every=3), report=stop_at(4))
    summary = train(config_of(place, tmp_path / "run", **config, best_by="kl", eval_sequences=2), report=silent)
    assert "kl_to_records" == summary.best["by"]
    assert 4 == summary.best["step"]


def test_another_cache_to_evaluate_on(place, tmp_path, capsys):
    """eval_cache is measured whole, or its first sequences; one that training sees is refused, with where."""
    shutil.copytree(place / "random", tmp_path / "copy")
    with pytest.raises(
        skl.SettingsError,
        match=r"copy: training sees 20 of its 20 sequences, the first is number 0; evaluate on others, or keep some of",
    ):
        train(config_of(place, tmp_path / "run", eval_every=1, eval_cache=tmp_path / "copy"), report=silent)
    assert not (tmp_path / "run").exists()
    capsys.readouterr()
    # The same text again is no training text where it was held out; the one sequence that was not is said.
    summary = train(
        config_of(place, tmp_path / "run", steps=1, eval_every=1, hold_out=19, batch_size=1, eval_cache=place / "topk"),
        report=silent,
    )
    assert "topk: training sees 1 of its 20 sequences, so that what is measured there is too" in capsys.readouterr().err
    assert math.isfinite(summary.evaluation["lm_loss"])


def test_text_that_training_reads_is_no_test(place, tmp_path):
    """A run on a token store refuses a cache of the same text."""
    from sklformat.distill.text.corpus import TokenStore
    from sklformat.distill.text.packing import PackedSequences

    facts = TokenStore(place / "tokens").facts
    tokenizer = loading.load_tokenizer(place / "tokenizer")
    packed = PackedSequences(
        place / "tokens", seq_len=16, separator_id=tokenization.separator_id(tokenizer), seed=0, count=4
    )
    student_data.write_cache(
        tmp_path / "same", packed, facts.vocab_size, facts.tokenizer_fingerprint, "multinomial", 4,
        corpus_fingerprint=facts.corpus_fingerprint,
    )  # fmt: skip
    text = {"cache": None, "tokens": place / "tokens", "seq_len": 16, "method": "ce", "eval_every": 1}
    with pytest.raises(skl.SettingsError, match=r"same was captured from the text of .*tokens, all of which training"):
        train(config_of(place, tmp_path / "run", eval_cache=tmp_path / "same", **text), report=silent)


def test_a_cache_of_another_tokenizer_is_no_test(place, tmp_path):
    """Ids that mean other tokens are refused before the first step."""
    student_data.write_cache(tmp_path / "other", [tuple(range(17))] * 2, 290, "ab" * 16, "multinomial", 0)
    with pytest.raises(
        skl.SettingsError,
        match=r"other was made by a different tokenizer from that of .*random: .*; evaluate on a cache",
    ):
        train(config_of(place, tmp_path / "run", eval_every=1, eval_cache=tmp_path / "other"), report=silent)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"eval_every": 5}, "eval_every needs sequences that training never sees: give hold_out, or an eval_cache"),
        ({"eval_sequences": 5}, "eval_cache and eval_sequences belong to eval_every, got None and 5"),
        ({"eval_every": -1}, "eval_every must be >= 0, got -1"),
    ],
)
def test_wrong_settings_are_refused(place, tmp_path, changes, words):
    """Evaluation is asked for with what it is on."""
    with pytest.raises(ValueError, match=words):
        config_of(place, tmp_path / "run", **changes)
