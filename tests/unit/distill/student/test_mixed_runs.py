"""Runs that learn from several caches at once."""

import json

import numpy as np
import pytest
import student_data
import torch
from student_data import config_of, losses_of, silent, stop_at, write_place
from transformers import AutoModelForCausalLM

import sklformat as skl
from sklformat.distill import SparseLogitDataset
from sklformat.distill.models import loading, tokenization
from sklformat.distill.student.measures.origins import Origin
from sklformat.distill.student.training import train
from sklformat.distill.student.validation import HeldOut, validate
from sklformat.distill.text.fingerprints import tokenizer_fingerprint
from sklformat.flags import parse
from sklformat.settings.train import TrainConfig


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = write_place(tmp_path_factory.mktemp("mixed"))
    tokenizer = loading.load_tokenizer(root / "tokenizer")
    rng = np.random.default_rng(0)
    others = rng.integers(0, tokenization.num_ids(tokenizer), (12, student_data.SEQ_LEN + 1))
    student_data.write_cache(
        root / "other", others, tokenization.num_ids(tokenizer), tokenizer_fingerprint(tokenizer), "multinomial", 12
    )
    return root


def mixed(place, out, **changes):
    caches = (place / "random", str(place / "other"))
    return config_of(place, out, cache=caches, cache_weights=(0.25, 0.75), hold_out=4, **changes)


def test_the_method_fits_the_records_of_each_cache(place, tmp_path):
    """Also where nothing is known of the first one's, which fit all methods."""
    with skl.open(place / "other") as cache:
        facts = {"vocab_size": cache.header.vocab_size, "fingerprint": cache.header.tokenizer_fingerprint}
        student_data.write_cache(tmp_path / "x", [one.tokens for one in cache], sampler="unknown", count=12, **facts)
    caches = (tmp_path / "x", place / "random")
    with pytest.raises(skl.SettingsError, match="random holds records of sampler multinomial, which method topk does"):
        train(config_of(place, tmp_path / "run", cache=caches, method="topk"), report=silent)


def test_a_mixture_is_the_streams_own(place, tmp_path):
    """The run learns from the stream of SparseLogitDataset over both, without what each holds out, and says so."""
    train(mixed(place, tmp_path / "run", steps=1), report=silent)
    stream = SparseLogitDataset(
        [place / "random", place / "other"], weights=[0.25, 0.75], batch_size=4, sequences=[range(16), range(8)]
    )
    batch = next(iter(stream))
    student = loading.new_llama(
        vocab_size=stream.cache.header.vocab_size, hidden_size=16, num_layers=1, num_heads=2, max_positions=16, seed=0
    )
    with torch.no_grad():
        log_p = student(batch.input_ids).logits.flatten(0, 1).log_softmax(-1)
    ids, probs, _ = batch.padded()
    ids, probs = ids.flatten(0, 1).long(), probs.flatten(0, 1)
    log_t = torch.where(probs > 0, probs, 1.0).log()
    expected = (probs * (log_t - log_p.gather(1, ids))).sum(-1).mean()
    assert float(expected) == pytest.approx(losses_of(tmp_path / "run")[0][1], abs=1e-5)
    settings = json.loads((tmp_path / "run" / "run.json").read_text())
    assert [skl.open(place / name).fingerprint for name in ("random", "other")] == settings["cache"]
    assert [0.25, 0.75] == settings["cache_weights"]


def test_a_mixed_run_resumes_bit_for_bit(place, tmp_path):
    """Stopped and resumed, also across the ends of a cache, it ends with the same losses; other weights are refused."""
    train(mixed(place, tmp_path / "whole"), report=silent)
    with pytest.raises(KeyboardInterrupt):
        train(mixed(place, tmp_path / "cut"), report=stop_at(7))
    train(mixed(place, tmp_path / "cut"), report=silent)
    assert losses_of(tmp_path / "whole") == losses_of(tmp_path / "cut")
    with pytest.raises(skl.SettingsError, match=r"cache_weights was \[0.25, 0.75\], asked for is None"):
        train(config_of(place, tmp_path / "cut", cache=(place / "random", place / "other"), hold_out=4), report=silent)


def test_evaluation_is_on_what_each_holds_out(place, tmp_path):
    """Without an eval_cache, the held-out part of every cache; one of which training sees the most is refused."""
    summary = train(mixed(place, tmp_path / "run", steps=1, eval_every=1), report=silent)
    model = AutoModelForCausalLM.from_pretrained(summary.model)
    held_out = [HeldOut(place / "random", range(16, 20)), HeldOut(place / "other", range(8, 12))]
    alone = [validate(model, part).lm_loss for part in held_out]
    assert alone[0] != pytest.approx(alone[1], abs=1e-3)
    assert summary.evaluation["lm_loss"] == pytest.approx(sum(alone) / 2, abs=1e-6)
    reached = []
    assert 8 == validate(model, held_out, reach=reached.append).num_sequences
    assert [4, 8] == reached
    few = train(mixed(place, tmp_path / "few", steps=1, eval_every=1, eval_sequences=3), report=silent)
    expected = validate(model, [HeldOut(place / "random", range(16, 18)), HeldOut(place / "other", range(8, 9))])
    assert few.evaluation["lm_loss"] == pytest.approx(expected.lm_loss, abs=1e-6)
    one = train(mixed(place, tmp_path / "one", steps=1, eval_every=1, eval_sequences=1), report=silent)
    assert one.evaluation["lm_loss"] == pytest.approx(validate(model, HeldOut(place / "random", range(16, 17))).lm_loss)
    with pytest.raises(skl.SettingsError, match="other: training sees 8 of its 12 sequences, the first is number 0"):
        train(mixed(place, tmp_path / "no", eval_every=1, eval_cache=place / "other"), report=silent)


def test_what_one_holds_out_the_others_must_not_teach(place, tmp_path):
    """Held out of a short cache, and among the first sequences of a longer one of the same text: training sees it."""
    tokenizer = loading.load_tokenizer(place / "tokenizer")
    packed = np.stack([sequence.tokens for sequence in skl.open(place / "random")])
    vocab_size, fingerprint = tokenization.num_ids(tokenizer), tokenizer_fingerprint(tokenizer)
    student_data.write_cache(place / "short", packed, vocab_size, fingerprint, "multinomial", 12)
    caches = (place / "short", place / "random")
    with pytest.raises(skl.SettingsError, match="short: training sees 4 of its 4 sequences, the first is number 8; ev"):
        train(config_of(place, tmp_path / "run", cache=caches, hold_out=4, eval_every=1), report=silent)
    assert not (tmp_path / "run").exists()


def test_eval_knows_all_that_a_mixed_run_learnt_from(place, tmp_path):
    """What eval --cache refuses of one cache it refuses of each of several."""
    train(mixed(place, tmp_path / "run", steps=1), report=silent)
    origin = Origin.of(str(tmp_path / "run" / "model"))
    learnt = [origin.num_learnt(skl.open(place / name).fingerprint, 12) for name in ("random", "other", "topk")]
    assert [8, 8, 0] == learnt


def test_weights_are_one_for_each_cache(place, tmp_path):
    """Others are refused before anything is read."""
    with pytest.raises(ValueError, match="cache_weights needs one for each cache, got 3 for 2"):
        config_of(place, tmp_path / "run", cache=("a", "b"), cache_weights=(1, 2, 3))


def test_caches_add_up_on_the_command_line():
    """--cache may be repeated, or take several; each with a weight."""
    for words in (["--cache", "a", "--cache", "s3://b/c"], ["--cache", "a", "s3://b/c"]):
        config, _ = parse(TrainConfig, "train", [*words, "--cache-weights", ".7", ".3", "--out", "o"])
        assert ["a", "s3://b/c"] == [str(cache) for cache in config.cache]
        assert (0.7, 0.3) == config.cache_weights
