import json
import shutil

import numpy as np
import pytest
import tiny
import torch
import transformers
from student_data import SEQ_LEN, config_of, log_of, losses_of, silent, stop_at, write_cache, write_place
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

import sklformat as skl
from sklformat.distill.models import loading, outputs, tokenization
from sklformat.distill.student.training import train
from sklformat.distill.text.fingerprints import tokenizer_fingerprint
from sklformat.files.disk import locked_directory
from sklformat.format.order import permute


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return write_place(tmp_path_factory.mktemp("training"))


METHODS = {
    "ce": {},
    "random_sampling": {},
    "full": {},
    "topk": {"cache": "topk"},
    "topk_normalised": {"cache": "topk"},
    "label_smoothing": {"cache": "topk"},
    "ghost_token": {"cache": "topk"},
    "naive_fix": {"cache": "topk"},
}


@pytest.mark.parametrize("method", METHODS)
def test_each_method_trains_a_model_that_transformers_loads(place, tmp_path, method):
    """Every method lowers its loss and leaves a model with its tokenizer in transformers' layout."""
    changes = {"cache": place / METHODS[method].get("cache", "random")}
    if method == "full":
        changes["teacher"] = str(place / "teacher")
    summary = train(config_of(place, tmp_path / "run", method=method, **changes), report=silent)
    rows = log_of(tmp_path / "run")
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert rows[-1]["loss"] == summary.loss
    assert summary.sequences == 48
    model = AutoModelForCausalLM.from_pretrained(summary.model)
    assert sum(p.numel() for p in model.parameters()) == summary.parameters
    assert AutoTokenizer.from_pretrained(summary.model).eos_token == tokenization.END_OF_TEXT
    assert (tmp_path / "run" / "checkpoint.pt").exists()


def first_batch(place):
    tokenizer = loading.load_tokenizer(place / "tokenizer")
    separator_id = tokenization.separator_id(tokenizer)
    student = tiny.new_model(tokenization.num_ids(tokenizer), max_positions=SEQ_LEN, separator_id=separator_id)
    dataset = skl.open(place / "random")
    places = permute(range(4), 20, seed=0)
    tokens = torch.from_numpy(np.stack([dataset[int(i)].tokens for i in places]).astype(np.int64))
    return student.requires_grad_(False), tokens


def test_first_loss_of_ce_is_cross_entropy(place, tmp_path):
    """Method ce is torch's cross-entropy over the same sequences, in the order of SPEC section 12."""
    train(config_of(place, tmp_path / "run", method="ce", steps=1), report=silent)
    student, tokens = first_batch(place)
    expected = cross_entropy(student(tokens[:, :-1]).logits.flatten(0, 1), tokens[:, 1:].flatten())
    assert float(expected) == pytest.approx(log_of(tmp_path / "run")[0]["loss"], abs=1e-5)


def capped_teacher(directory, tokenizer):
    """A teacher whose head is padded and has a cap, as Gemma 2's."""
    torch.manual_seed(0)
    config = transformers.Gemma2Config(
        vocab_size=tokenization.num_ids(tokenizer) + 7,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        final_logit_softcapping=0.5,
    )
    model = transformers.Gemma2ForCausalLM(config)
    torch.nn.init.normal_(model.lm_head.weight, std=0.5)
    loading.save(model, tokenizer, directory)
    return directory


@pytest.mark.parametrize("head", ["one matrix", "padded and capped"])
def test_first_loss_of_full_is_the_divergence_from_the_teacher(place, tmp_path, head):
    """Method full is KL(teacher || student) with the teacher's own logits; ce_weight mixes cross-entropy in."""
    student, tokens = first_batch(place)
    path = place / "teacher"
    if head != "one matrix":
        path = capped_teacher(tmp_path / "capped", loading.load_tokenizer(place / "tokenizer"))
    teacher = loading.load_model(path).requires_grad_(False)
    log_p = student(tokens[:, :-1]).logits.log_softmax(-1)
    log_t = teacher(tokens[:, :-1]).logits[..., : log_p.shape[-1]].log_softmax(-1)
    divergence = float((log_t.exp() * (log_t - log_p)).sum(-1).mean())
    ce = float(cross_entropy(log_p.flatten(0, 1), tokens[:, 1:].flatten()))
    for weight in (0.0, 0.25):
        out = tmp_path / f"run{weight}"
        train(
            config_of(place, out, method="full", teacher=str(path), steps=1, ce_weight=weight),
            report=silent,
        )
        expected = (1 - weight) * divergence + weight * ce
        assert expected == pytest.approx(log_of(out)[0]["loss"], abs=1e-5)


def test_first_loss_of_another_divergence_at_a_temperature(place, tmp_path):
    """Reverse KL to a teacher at T = 2, times 4, beside cross-entropy at 1; and the name of that loss."""
    student, tokens = first_batch(place)
    teacher = loading.load_model(place / "teacher").requires_grad_(False)
    logits = student(tokens[:, :-1]).logits
    log_p = (logits / 2).log_softmax(-1)
    log_t = (teacher(tokens[:, :-1]).logits[..., : log_p.shape[-1]] / 2).log_softmax(-1)
    reverse = float((log_p.exp() * (log_p - log_t)).sum(-1).mean())
    ce = float(cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()))
    changes = {"divergence": "reverse_kl", "temperature": 2.0, "ce_weight": 0.25}
    config = config_of(place, tmp_path / "run", method="full", teacher=str(place / "teacher"), steps=1, **changes)
    summary = train(config, report=silent)
    assert 0.75 * 4 * reverse + 0.25 * ce == pytest.approx(summary.loss, abs=1e-5)
    assert summary.loss_name == "0.75 2² reverse KL to the teacher at temperature 2 + 0.25 cross-entropy"


def test_hard_tokens_have_a_rate_of_their_own(place, tmp_path, capsys):
    """By the cache's column, by the records where it has none, which a note says, or by a teacher; alike in parts."""
    student, tokens = first_batch(place)
    log_p = student(tokens[:, :-1]).logits.log_softmax(-1).flatten(0, 1)
    labels_P, other_P = tokens[:, 1:].flatten(), (tokens[:, 1:].flatten() + 1) % log_p.shape[1]
    kl_P = 0.75 * (np.log(0.75) - log_p.gather(1, labels_P[:, None])[:, 0])
    kl_P += 0.25 * (np.log(0.25) - log_p.gather(1, other_P[:, None])[:, 0])
    cache = skl.open(place / "sure")
    sure_P = np.concatenate([cache[int(i)].columns["label_logprob"] for i in permute(range(4), 20, seed=0)])
    hard_P = torch.from_numpy(sure_P <= np.sort(sure_P)[16 - 1])  # a quarter of 64
    expected = float((kl_P * torch.where(hard_P, 3.0, 1.0)).sum() / 64 * 64 / (3 * 16 + 48))
    changes = {"lr_ratio": 3.0, "easy_percentile": 25.0, "steps": 3, "cache": place / "sure"}
    summary = train(config_of(place, tmp_path / "column", **changes), report=silent)
    assert expected == pytest.approx(losses_of(tmp_path / "column")[0][1], abs=1e-5)
    assert summary.loss_name == "KL to the records, hard tokens 3 times"
    assert "hard tokens are told by" not in capsys.readouterr().err
    parts = {"batch_size": 2, "accumulation": 2}
    train(config_of(place, tmp_path / "parts", **changes, **parts), report=silent)
    for whole, cut in zip(losses_of(tmp_path / "column"), losses_of(tmp_path / "parts"), strict=True):
        assert whole == pytest.approx(cut, abs=1e-4)
    train(config_of(place, tmp_path / "draws", **changes | {"cache": place / "random"}), report=None)
    assert (
        "hard tokens are told by the records' own draws, so that the gradient is no longer" in capsys.readouterr().err
    )
    train(config_of(place, tmp_path / "none", steps=3), report=silent)
    assert losses_of(tmp_path / "draws") == losses_of(tmp_path / "none")  # all of these records are as sure
    teacher = {"method": "full", "teacher": str(place / "teacher")}
    train(config_of(place, tmp_path / "teacher", **changes, **teacher), report=silent)
    train(config_of(place, tmp_path / "teacher, parts", **changes, **teacher, **parts), report=silent)
    for whole, cut in zip(losses_of(tmp_path / "teacher"), losses_of(tmp_path / "teacher, parts"), strict=True):
        assert whole == pytest.approx(cut, abs=1e-4)


def test_a_top_p_cache_trains_as_top_k(place, tmp_path):
    """Records of another sampler that keeps the best ids; and a divergence that they do not have is refused at once."""
    with skl.open(place / "topk") as cache:
        facts = {"vocab_size": cache.header.vocab_size, "fingerprint": cache.header.tokenizer_fingerprint}
        write_cache(tmp_path / "topp", [sequence.tokens for sequence in cache], sampler="topp", count=20, **facts)
    for divergence in ("forward_kl", "l1"):
        args = {"method": "topk", "divergence": divergence}
        train(config_of(place, tmp_path / divergence, cache=tmp_path / "topp", **args), report=silent)
        train(config_of(place, tmp_path / f"topk {divergence}", cache=place / "topk", **args), report=silent)
        assert losses_of(tmp_path / divergence) == losses_of(tmp_path / f"topk {divergence}")
    with pytest.raises(ValueError, match="divergence 'jsd' with method 'topk': its targets leave 1 - S to no id"):
        train(config_of(place, tmp_path / "run", cache=tmp_path / "topp", method="topk", divergence="jsd"))


@pytest.mark.parametrize(("source", "stop"), [("cache", 3), ("cache", 7), ("tokens", 11)])
def test_a_stopped_run_goes_on_bit_for_bit(place, tmp_path, source, stop):
    """A run stopped anywhere, also between checkpoints and across epochs, ends with the same losses and weights."""
    changes = {"save_every": 4}
    if source == "tokens":
        changes |= {"cache": None, "tokens": place / "tokens", "seq_len": 64, "method": "ce"}
    train(config_of(place, tmp_path / "whole", **changes), report=silent)
    with pytest.raises(KeyboardInterrupt):
        train(config_of(place, tmp_path / "cut", **changes), report=stop_at(stop))
    train(config_of(place, tmp_path / "cut", **changes), report=silent)
    assert losses_of(tmp_path / "whole") == losses_of(tmp_path / "cut")
    whole, cut = ((tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("whole", "cut"))
    assert whole == cut


def test_log_means_survive_a_stop(place, tmp_path):
    """A line of the log is the mean since the line before, also when a stop came between the two."""
    changes = {"log_every": 4, "save_every": 3}
    train(config_of(place, tmp_path / "whole", **changes), report=silent)
    with pytest.raises(KeyboardInterrupt):
        train(config_of(place, tmp_path / "cut", **changes), report=stop_at(8))
    train(config_of(place, tmp_path / "cut", **changes), report=silent)
    assert losses_of(tmp_path / "whole") == losses_of(tmp_path / "cut")
    assert [4, 8, 12] == [row["step"] for row in log_of(tmp_path / "cut")]


def test_workers_do_not_change_the_run(place, tmp_path):
    """Reading ahead in other processes gives the same losses, bit for bit."""
    train(config_of(place, tmp_path / "here"), report=silent)
    train(config_of(place, tmp_path / "workers", num_workers=2), report=silent)
    assert losses_of(tmp_path / "here") == losses_of(tmp_path / "workers")


def test_accumulation_is_a_larger_batch(place, tmp_path):
    """Two micro-batches of 2 make the step of one batch of 4."""
    train(config_of(place, tmp_path / "whole", steps=4), report=silent)
    train(config_of(place, tmp_path / "parts", steps=4, batch_size=2, accumulation=2), report=silent)
    for whole, parts in zip(losses_of(tmp_path / "whole"), losses_of(tmp_path / "parts"), strict=True):
        assert whole == pytest.approx(parts, abs=1e-4)


def test_a_finished_run_is_not_trained_again(place, tmp_path):
    """The same command on a finished run returns its summary and changes no byte."""
    first = train(config_of(place, tmp_path / "run"), report=silent)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert first == train(config_of(place, tmp_path / "run"), report=stop_at(1))
    after = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert before == after


def test_a_finished_run_says_that_there_is_nothing_to_do(place, tmp_path, capfd):
    """The figures of a finished run are not taken for those of new training."""
    train(config_of(place, tmp_path / "run", steps=2))
    done = f"{tmp_path / 'run'} has its 2 steps already; nothing to do"
    assert done not in capfd.readouterr().err
    train(config_of(place, tmp_path / "run", steps=2))
    assert done in capfd.readouterr().err


def test_other_settings_are_refused_with_both_values(place, tmp_path):
    """A directory made with other settings is left alone; what does not change the model may differ."""
    train(config_of(place, tmp_path / "run", steps=2), report=silent)
    with pytest.raises(
        skl.SettingsError,
        match=r"run was made with other settings: learning_rate was 0\.01, asked for is 0\.5; use another",
    ):
        train(config_of(place, tmp_path / "run", steps=2, learning_rate=0.5), report=silent)
    with pytest.raises(skl.SettingsError, match="cache was"):
        train(config_of(place, tmp_path / "run", steps=2, cache=place / "topk", method="ce"), report=silent)
    train(config_of(place, tmp_path / "run", steps=2, save_every=1, log_every=2), report=silent)


def test_a_run_knows_its_models_by_their_weights(place, tmp_path, monkeypatch):
    """Other words for the same paths, or a copy, are the same run; a teacher or student made anew there is another."""
    monkeypatch.chdir(tmp_path)
    for name in ("teacher", "student"):
        shutil.copytree(place / "teacher", tmp_path / name)
    given = {"method": "full", "teacher": "teacher", "student": "student", "tokenizer": "teacher", "steps": 1}
    train(config_of(place, tmp_path / "run", **given), report=silent)
    moved = {"teacher": "./teacher", "student": str(place / "teacher"), "tokenizer": str(place / "tokenizer")}
    train(config_of(place, tmp_path / "run", **given | moved), report=silent)
    model = loading.load_model(place / "teacher")
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    for name in ("teacher", "student"):
        shutil.copytree(place / "teacher", tmp_path / "as-it-was")
        loading.save(model, loading.load_tokenizer(place / "teacher"), tmp_path / name, replace=True)
        with pytest.raises(
            skl.SettingsError, match=rf"settings: {name}_fingerprint was '\w+', asked for is '\w+'; use"
        ):
            train(config_of(place, tmp_path / "run", **given), report=silent)
        shutil.rmtree(tmp_path / name)
        (tmp_path / "as-it-was").rename(tmp_path / name)


def test_later_settings_are_kept_only_where_they_are_said(place, tmp_path):
    """A run begun before a setting existed resumes under its default; another value is refused with both."""
    train(config_of(place, tmp_path / "run", steps=1, betas=(0.9, 0.99)), report=silent)
    kept = json.loads((tmp_path / "run" / "run.json").read_text())
    assert [0.9, 0.99] == kept["betas"]
    assert not {"schedule", "warmup_steps", "min_learning_rate", "decay", "adam_eps", "max_grad_norm"} & kept.keys()
    assert not {"divergence", "temperature", "lr_ratio", "easy_percentile"} & kept.keys()
    with pytest.raises(skl.SettingsError, match=r"betas was \[0.9, 0.99\], asked for is None"):
        train(config_of(place, tmp_path / "run", steps=1), report=silent)


def test_gradients_above_the_norm_alone_are_scaled_down(place, tmp_path):
    """With max_grad_norm 0 a step is that of a norm nobody reaches; with a small one it is another."""
    runs = {"off": 0.0, "high": 1e9, "low": 1e-3}
    for name, norm in runs.items():
        train(config_of(place, tmp_path / name, steps=2, max_grad_norm=norm, adam_eps=1e-3), report=silent)
    assert losses_of(tmp_path / "off") == losses_of(tmp_path / "high")
    assert losses_of(tmp_path / "off") != losses_of(tmp_path / "low")


def test_a_directory_with_other_files_is_refused(place, tmp_path):
    """A run never mixes with files that are not its own."""
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(skl.SettingsError, match=r"not empty and holds no run \(thesis\.tex is there\)"):
        train(config_of(place, tmp_path), report=silent)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_a_directory_in_use_is_refused(place, tmp_path):
    """Two processes never train into one directory."""
    with locked_directory(tmp_path / "run"), pytest.raises(skl.InUseError, match="another process"):
        train(config_of(place, tmp_path / "run"), report=silent)


def test_another_tokenizer_is_refused(place, tmp_path):
    """A student whose ids mean other tokens than the cache's stops before the first step."""
    other = tokenization.train_tokenizer(["quite other words " * 30], 290)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(
        skl.SettingsError, match=r"was made by a different tokenizer, not .*: ids mean other tokens here"
    ) as caught:
        train(config_of(place, tmp_path / "run", tokenizer=str(tmp_path / "other")), report=silent)
    assert tokenizer_fingerprint(other) in str(caught.value)


def test_a_teacher_beside_the_student_has_its_tokenizer(place, tmp_path):
    """Method full refuses a teacher to which ids mean other tokens; one without a tokenizer is taken to share it."""
    other = tokenization.train_tokenizer(["quite other words " * 30], 290)
    teacher = loading.load_model(place / "teacher")
    loading.save(teacher, other, tmp_path / "other")
    teacher.save_pretrained(tmp_path / "bare")
    full = {"method": "full", "steps": 1}
    with pytest.raises(skl.SettingsError, match=r"teacher .*other has a different tokenizer from the student's .*tok"):
        train(config_of(place, tmp_path / "run", teacher=str(tmp_path / "other"), **full), report=silent)
    done = train(config_of(place, tmp_path / "run", teacher=str(tmp_path / "bare"), **full), report=silent)
    assert 1 == done.steps


def test_a_teacher_whose_head_hidden_states_do_not_make(place, tmp_path, monkeypatch):
    """Logits that the config does not explain stop the run, with the way that takes any head."""
    logits = outputs.logits
    monkeypatch.setattr(outputs, "logits", lambda *args: logits(*args).square())
    message = (
        r"the teacher .*teacher cannot run alongside: the logits of LlamaForCausalLM are not its hidden states times "
        r"its head with the bias, scale and cap that its config names; capture it with sklformat cache, which runs a"
    )
    config = config_of(place, tmp_path / "run", method="full", teacher=str(place / "teacher"))
    with pytest.raises(skl.SettingsError, match=message):
        train(config, report=silent)


def test_a_narrow_student_is_refused(place, tmp_path):
    """A student with fewer ids than the cache cannot learn from it; the message has both numbers."""
    tokenizer = loading.load_tokenizer(place / "tokenizer")
    tiny.write_model(tmp_path / "narrow", tokenizer, vocab_size=100, max_positions=SEQ_LEN)
    with pytest.raises(
        skl.SettingsError,
        match=r"the student .* has a vocabulary of 100, .* one of 2\d\d; widen the student's embedding",
    ):
        train(config_of(place, tmp_path / "run", tokenizer=None, student=str(tmp_path / "narrow")), report=silent)


def test_method_full_needs_one_vocabulary(place, tmp_path):
    """Entry by entry the teacher has at least the ids of the cache, and the student just as many."""
    tokenizer = loading.load_tokenizer(place / "tokenizer")
    tiny.write_model(tmp_path / "narrow", tokenizer, vocab_size=100, max_positions=SEQ_LEN)
    message = r"compares teacher and student entry by entry over the 2\d\d ids of .*: the teacher .* has 100 \(needs at"
    with pytest.raises(skl.SettingsError, match=message):
        train(config_of(place, tmp_path / "run", method="full", teacher=str(tmp_path / "narrow")), report=silent)


def test_records_of_the_wrong_kind_are_refused(place, tmp_path):
    """Top-K records are no random samples, and the other way round."""
    with pytest.raises(
        skl.SettingsError, match="holds records of sampler topk, which method random_sampling does not fit; use"
    ):
        train(config_of(place, tmp_path / "a", cache=place / "topk"), report=silent)
    with pytest.raises(skl.SettingsError, match="sampler multinomial, which method topk does not fit"):
        train(config_of(place, tmp_path / "b", method="topk"), report=silent)


def test_a_loss_that_is_not_finite_stops_the_run(place, tmp_path):
    """A diverging run stops with the step and never overwrites its last checkpoint with NaN."""
    with pytest.raises(ValueError, match=r"no longer finite at step \d+"):
        train(config_of(place, tmp_path / "run", learning_rate=1e30, warmup=0.0, steps=40), report=silent)


def test_any_seed_trains(place, tmp_path):
    """Also one that is greater than torch takes."""
    summary = train(config_of(place, tmp_path / "run", steps=1, seed=2**63 - 1), report=silent)
    assert 1 == summary.steps


def test_a_damaged_checkpoint_is_named(place, tmp_path):
    """A checkpoint that cannot be read is an error with its path, not a new start."""
    with pytest.raises(KeyboardInterrupt):
        train(config_of(place, tmp_path / "run"), report=stop_at(7))
    path = tmp_path / "run" / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(skl.CorruptError, match=r"checkpoint\.pt"):
        train(config_of(place, tmp_path / "run"), report=silent)


def test_a_student_can_be_continued(place, tmp_path):
    """--student goes on from the model of a run: its first loss is where that one ended, or below its start."""
    train(config_of(place, tmp_path / "first"), report=silent)
    student = str(tmp_path / "first")
    train(config_of(place, tmp_path / "second", student=student, tokenizer=None, steps=2, seed=1), report=silent)
    assert log_of(tmp_path / "second")[0]["loss"] < log_of(tmp_path / "first")[0]["loss"] - 0.5


@pytest.mark.parametrize("kind", ["Gemma2", "Phi"])
def test_a_student_with_a_cap_or_a_bias_is_trained(place, tmp_path, kind):
    """The first loss of CE is cross-entropy of the student's own logits, cap and bias included; then it falls (U9)."""
    tokenizer = AutoTokenizer.from_pretrained(place / "tokenizer")
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "pad_token_id": 0, "max_position_embeddings": SEQ_LEN}
    more = {"head_dim": 8, "final_logit_softcapping": 0.5} if kind == "Gemma2" else {}
    torch.manual_seed(0)
    student = getattr(transformers, kind + "ForCausalLM")(getattr(transformers, kind + "Config")(**sizes, **more))
    for parameter in student.requires_grad_(False).get_output_embeddings().parameters():
        torch.nn.init.normal_(parameter)
    tokenizer.save_pretrained(tmp_path / "student")
    student.save_pretrained(tmp_path / "student")
    config = config_of(place, tmp_path / "run", tokenizer=None, student=str(tmp_path / "student"), method="ce")
    train(config, report=silent)
    losses = [row["loss"] for row in log_of(tmp_path / "run")]
    _, tokens = first_batch(place)
    expected = cross_entropy(student(tokens[:, :-1]).logits.flatten(0, 1), tokens[:, 1:].flatten())
    assert float(expected) == pytest.approx(losses[0], abs=1e-5)
    assert losses[-1] < losses[0] - 0.05


def test_the_experts_of_a_student_are_balanced(place, tmp_path, capsys):
    """A config that asks for the balancing loss gets it in its gradients, beside the same loss in the log (U13)."""
    tokenizer = AutoTokenizer.from_pretrained(place / "tokenizer")
    first = {}
    for asked in (False, True):
        config = transformers.MixtralConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            num_local_experts=4,
            router_aux_loss_coef=5.0,
            output_router_logits=asked,
        )
        torch.manual_seed(0)
        place_of = tmp_path / f"student-{asked}"
        transformers.MixtralForCausalLM(config).save_pretrained(place_of)
        tokenizer.save_pretrained(place_of)
        run = config_of(place, tmp_path / f"run-{asked}", tokenizer=None, student=str(place_of), steps=1)
        train(run, report=silent)
        first[asked] = losses_of(tmp_path / f"run-{asked}")[0]
        said = "the balancing loss of the student's experts is left out" in capsys.readouterr().err
        assert said is not asked
    (_, loss, norm), (_, balanced_loss, balanced_norm) = first[False], first[True]
    assert loss == balanced_loss
    assert balanced_norm > norm


def test_bfloat16_stays_near_float32(place, tmp_path):
    """Autocast to bfloat16 changes the losses by its rounding only; the weights stay float32."""
    train(config_of(place, tmp_path / "f32", steps=3), report=silent)
    summary = train(config_of(place, tmp_path / "bf16", steps=3, dtype="bfloat16"), report=silent)
    for exact, rounded in zip(losses_of(tmp_path / "f32"), losses_of(tmp_path / "bf16"), strict=True):
        assert exact[1] == pytest.approx(rounded[1], abs=0.05)
    assert torch.float32 == loading.load_model(summary.model).lm_head.weight.dtype


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"cache": None}, "exactly one of cache and tokens"),
        ({"cache": None, "tokens": "t", "seq_len": 8}, "needs a cache"),
        ({"seq_len": 8}, "seq_len belongs to tokens"),
        ({"method": "full"}, "teacher belongs to method full"),
        ({"method": "ce", "ce_weight": 0.5}, "method ce is all of it"),
        ({"cache": None, "tokens": "t", "seq_len": 8, "method": "ce", "window": 2}, "belong to a cache, got 2 and 0"),
        ({"hold_out": -1}, "hold_out must be >= 0, got -1"),
        ({"steps": 0}, "steps must be >= 1, got 0"),
        ({"num_heads": 3}, "does not divide"),
        ({"warmup": 2.0}, r"warmup must be in \[0, 1\]"),
        ({"learning_rate": 0.0}, "learning_rate must be > 0"),
        ({"betas": (0.9, 1.0)}, r"betas must be in \[0, 1\) and adam_eps > 0, got \(0.9, 1.0\) and 1e-08"),
        ({"max_grad_norm": -1.0}, "max_grad_norm must be >= 0, got -1"),
        ({"min_learning_rate": 1.5}, r"min_learning_rate must be in \[0, 1\], got 1.5"),
        ({"method": "ce", "divergence": "jsd"}, "divergence jsd is from a teacher, of which method ce knows nothing"),
        ({"temperature": 0.0}, "temperature must be > 0 and finite, got 0.0"),
        (
            {"temperature": 2.0},
            "temperature 2 with method random_sampling: records of a teacher at temperature 1 cannot",
        ),
        ({"lr_ratio": 0.0}, r"lr_ratio must be > 0 and easy_percentile in \(0, 100\), got 0.0 and 50.0"),
        ({"easy_percentile": 30.0}, "easy_percentile belongs to lr_ratio, got 30.0 without"),
        ({"lr_ratio": 2.0, "decode": "cuda"}, "lr_ratio reads records on the host before a step; give decode cpu"),
        (
            {"lr_ratio": 2.0, "cache": None, "tokens": "t", "seq_len": 8, "method": "ce"},
            "lr_ratio needs a teacher's confidence: give a cache, or method full",
        ),
    ],
)
def test_wrong_arguments_are_refused(place, tmp_path, changes, words):
    """A wrong setting is named before anything is read or written."""
    with pytest.raises(ValueError, match=words):
        config_of(place, tmp_path / "run", **changes)
    assert not (tmp_path / "run").exists()


def test_too_few_sequences_are_refused(place, tmp_path):
    """A batch larger than the cache is an error with both numbers, not an endless wait."""
    words = "random: has 20 sequences to train on, batch_size asks for 64 at once; lower batch_size, or take more text"
    with pytest.raises(ValueError, match=f"{words}$"):
        train(config_of(place, tmp_path / "run", batch_size=64), report=silent)
