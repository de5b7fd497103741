"""SparseKDTrainer in one process: its stream, its loss, its checkpoints, its figures and what it refuses."""

import dataclasses
import itertools
import json
import math
import runpy
import types
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from loader_data import SEQUENCES, VOCAB, write_cache
from packed_runs import decode_on_device, spoil
from safetensors.torch import load_file
from torch.nn import functional
from trainer_runs import arguments, gpt2, llama, losses, trained
from transformers import EarlyStoppingCallback, MixtralConfig, MixtralForCausalLM, Trainer, TrainerCallback

import sklformat as skl
from sklformat.distill import (
    SparseLogitDataset,
    easy_hard_weights,
    label_confidence,
    linear_sparse_kl,
    output_head,
    sparse_kl,
)
from sklformat.distill.loader.teachers import Teachers
from sklformat.distill.models import outputs
from sklformat.distill.student.validation import HeldOut, validate
from sklformat.errors import CorruptError, ResumeError, SettingsError
from sklformat.integrations.arguments import check_launched
from sklformat.integrations.checkpoints import LOADER_STATE
from sklformat.integrations.transformers import SparseKDTrainer

LENGTHS = [5 + i % 12 for i in range(SEQUENCES)]
RECIPES = Path(__file__).parents[3] / "docs" / "recipes"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Caches: of one length, and ragged."""
    directory = tmp_path_factory.mktemp("trainer")
    write_cache(directory / "even")
    write_cache(directory / "ragged", seq_len=0, lengths=LENGTHS)
    return directory


def batches_of(trainer, epochs=1):
    """The batches that the Trainer takes, epoch after epoch."""
    loader = trainer.get_train_dataloader()
    found = []
    for epoch in range(epochs):
        loader.batch_sampler.epoch = epoch
        found.append(list(loader))
    return found


def parameters(model):
    return {name: tensor.detach().clone() for name, tensor in model.named_parameters()}


# --- the stream ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "own"),
    [
        ({}, {"shuffle": True, "tail": "pad"}),
        ({"dataloader_drop_last": True, "data_seed": 5}, {"shuffle": True, "tail": "drop", "seed": 5}),
        ({"train_sampling_strategy": "sequential", "seed": 9}, {"shuffle": False, "tail": "pad", "seed": 9}),
    ],
    ids=["shuffled", "drop last", "sequential"],
)
def test_the_stream_is_the_datasets(place, changes, own):
    """Batches, their order and what becomes of the last ones are SparseLogitDataset's, the held-out part left out."""
    trainer = SparseKDTrainer(llama(), arguments(place / "out", **changes), cache=place / "even", hold_out=3)
    dataset = SparseLogitDataset(place / "even", batch_size=4, sequences=range(SEQUENCES - 3), **{"seed": 42} | own)
    for epoch, found in enumerate(batches_of(trainer, epochs=2)):
        dataset.set_epoch(epoch)
        wanted = [batch.input_ids.tolist() for batch in dataset]
        assert wanted == [batch["input_ids"].tolist() for batch in found]
        assert len(wanted) == len(trainer.get_train_dataloader())


def test_workers_give_the_same_losses(place):
    """Batches that worker processes made are the same, and they live on over epochs."""
    alone = trained(place / "out", place / "ragged", max_steps=8)
    changes = {"dataloader_num_workers": 2, "dataloader_persistent_workers": True, "dataloader_prefetch_factor": 2}
    assert losses(alone) == losses(trained(place / "out", place / "ragged", max_steps=8, **changes))


def test_several_caches_and_teachers(place, tmp_path):
    """A list of caches is one stream by their weights, which resumes; so are several teachers of the same sequences."""
    write_cache(tmp_path / "other", seed=8)
    header = skl.Header(vocab_size=VOCAB, seq_len=16, kind="counts", rounds=10)
    with skl.ShardWriter(tmp_path / "again.skl", header=header) as writer:
        for sequence in skl.open(place / "even"):
            writer.append(sequence.tokens, sequence.targets)
    several = {"path": [place / "even", tmp_path / "other"], "weights": [0.7, 0.3]}
    taught = {"path": Teachers([place / "even", tmp_path / "again.skl"])}
    for way in (several, taught):
        own = {"cache": way["path"], "weights": way.get("weights")}
        args = arguments(tmp_path / "out", save_strategy="steps", save_steps=4)
        trainer = SparseKDTrainer(llama(), args, **own)
        dataset = SparseLogitDataset(**way, batch_size=4, seed=42, tail="pad")
        wanted = [(batch.input_ids.tolist(), batch.targets.probs.tolist()) for batch in dataset]
        (found,) = batches_of(trainer)
        assert wanted == [(batch["input_ids"].tolist(), batch["probs"].tolist()) for batch in found]
        trainer.train()
        resumed = SparseKDTrainer(llama(), args, **own)
        resumed.train(resume_from_checkpoint=tmp_path / "out" / "checkpoint-4")
        assert losses(trainer) == losses(resumed)
        with pytest.raises(ValueError, match="hold_out is 3, and is of one cache; with several, or Teachers"):
            SparseKDTrainer(llama(), args, hold_out=3, **own)
        with pytest.raises(SettingsError, match="training sees 23 of its 23 sequences"):
            SparseKDTrainer(llama(), args, eval_cache=place / "even", **own)


# --- records that a GPU decodes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", ["even", "ragged"])
def test_records_that_a_gpu_decodes_give_the_same_losses(place, monkeypatch, capsys, cache):
    """Bit for bit; and the log says who decodes."""
    changes = {"max_steps": 3, "gradient_accumulation_steps": 2}
    host = trained(place / "out", place / cache, **changes)
    marks = decode_on_device(monkeypatch)
    device = trained(place / "out", place / cache, **changes)
    assert losses(host) == losses(device)
    assert [1] * 6 == [mark.waited for mark in marks]
    assert "note: decoded on the device" in capsys.readouterr().err


@pytest.mark.parametrize("micro_batch", [0, 1])
def test_no_step_is_taken_with_a_bad_record(place, monkeypatch, micro_batch):
    """The second step finds one, in its first or its last micro-batch; the student stays as the first step left it."""
    decode_on_device(monkeypatch)
    spoil(monkeypatch, 2 + micro_batch)
    args = arguments(place / "out", gradient_accumulation_steps=2, max_steps=3)
    after = []

    class Look(TrainerCallback):
        def on_step_end(self, *_, model, **__):
            after.append(parameters(model))

    trainer = SparseKDTrainer(llama(), args, cache=place / "even", callbacks=[Look()])
    with pytest.raises(CorruptError, match="where the host's copy has none"):
        trainer.train()
    assert len(after) == trainer.state.global_step == 1
    for name, tensor in after[0].items():
        assert torch.equal(tensor, trainer.model.get_parameter(name))


def test_ways_to_decode_that_there_are_not(place):
    for method, decode in (("random_sampling", "gpu"), ("ce", "cuda")):
        with pytest.raises(ValueError, match=f"decode is '{decode}', method {method}; one of auto, cpu, cuda, which"):
            SparseKDTrainer(llama(), arguments(place / "out"), cache=place / "even", method=method, decode=decode)
    with pytest.raises(ValueError, match='decode="cuda" needs a student that trains on a GPU, it is on cpu'):
        SparseKDTrainer(llama(), arguments(place / "out"), cache=place / "even", decode="cuda")


# --- the loss --------------------------------------------------------------------------------------------------------


def dense_loss(model, batches, ce_weight):
    """The mean over all positions of some batches, each as a batch of the cache, from whole logits in float64."""
    loss, counted = 0.0, 0
    for batch in batches:
        logp_PV = torch.log_softmax(model(input_ids=batch.input_ids).logits.flatten(0, 1).double(), 1)
        offsets = batch.targets.offsets.tolist()
        for position, label in enumerate(batch.labels.flatten().tolist()):
            span = slice(offsets[position], offsets[position + 1])
            t_K = batch.targets.probs[span].double()
            if label == -100 or len(t_K) == 0:
                continue
            counted += 1
            kl = (t_K * (t_K.log() - logp_PV[position, batch.targets.token_ids[span].long()])).sum()
            loss = loss + (1 - ce_weight) * kl - ce_weight * logp_PV[position, label]
    return loss / counted


@pytest.mark.parametrize("ce_weight", [0.0, 0.3])
def test_a_step_is_that_of_one_large_batch(place, ce_weight):
    """However a step is cut into micro-batches of ragged sequences, loss and gradient are the dense float64 mean."""
    dataset = SparseLogitDataset(place / "ragged", batch_size=6, seed=42, window=6, tail="pad")
    model = llama()
    wanted = dense_loss(model, [next(iter(dataset))], ce_weight)
    wanted.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    seen = {}

    class Look(TrainerCallback):
        def on_pre_optimizer_step(self, *_, model, **__):
            seen.update({name: parameter.grad.clone() for name, parameter in model.named_parameters()})

    for size in (6, 3, 1):
        changes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 6 // size, "max_steps": 1}
        trainer = SparseKDTrainer(
            llama(),
            arguments(place / "out", max_grad_norm=0, average_tokens_across_devices=False, **changes),
            cache=place / "ragged",
            ce_weight=ce_weight,
            callbacks=[Look()],
        )
        trainer.train()
        assert pytest.approx([wanted.item()], rel=1e-6) == losses(trainer)
        torch.testing.assert_close(seen, gradients, rtol=1e-4, atol=1e-7)


def test_losses_and_rates_are_those_of_the_functions(place, capsys):
    """Another divergence with rates by the records, which a note says; in micro-batches as in one."""
    dataset = SparseLogitDataset(place / "ragged", batch_size=6, seed=42, window=6, tail="pad")
    batch = next(iter(dataset))
    labels_P = batch.labels.flatten()
    sure_P = label_confidence(batch.targets, labels_P)
    weights_P = easy_hard_weights(sure_P, labels_P, lr_ratio=3.0, easy_percentile=70.0)
    assert 2 == len(set(weights_P[labels_P != -100].tolist()))
    logits_PV = llama()(input_ids=batch.input_ids).logits.flatten(0, 1).detach()
    wanted = sparse_kl(logits_PV, batch.targets, divergence="jsd", position_weights_P=weights_P)
    own = {"divergence": "jsd", "lr_ratio": 3.0, "easy_percentile": 70.0}
    for size in (6, 2):
        changes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 6 // size, "max_steps": 1}
        trainer = SparseKDTrainer(llama(), arguments(place / "out", **changes), cache=place / "ragged", **own)
        trainer.train()
        assert pytest.approx([wanted.item()], rel=1e-5) == losses(trainer)
        assert "kl_to_records" not in trainer.state.log_history[0]
    assert "note: hard tokens are told by the records' own draws" in capsys.readouterr().err


def test_cross_entropy_is_the_trainers_own(place):
    """Method "ce" gives the losses that the Trainer itself has for the same batches."""

    class Plain(Trainer):
        def get_train_dataloader(self):
            return [{"input_ids": batch.input_ids, "labels": batch.labels} for batch in dataset]

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            logits = model(input_ids=inputs["input_ids"]).logits.flatten(0, 1)
            return functional.cross_entropy(logits, inputs["labels"].flatten())

    dataset = SparseLogitDataset(place / "even", batch_size=4, seed=42, tail="pad")
    plain = Plain(llama(), arguments(place / "out", max_steps=5), train_dataset=dataset)
    plain.train()
    ours = trained(place / "out", place / "even", max_steps=5, method="ce")
    assert pytest.approx(losses(plain), rel=1e-5) == losses(ours, "cross_entropy")


def experts(*, asked):
    """A small mixture of two experts, which asks for its balancing loss or not."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 2, "num_local_experts": 2, "num_experts_per_tok": 1, "vocab_size": VOCAB}
    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(**sizes, router_aux_loss_coef=0.5, output_router_logits=asked))


def test_the_balancing_loss_is_in_the_loss_alone(place, capsys):
    """A mixture of experts that asks for it gets it, weighted as its config says; without, a note says so."""
    for asked in (True, False):
        student = experts(asked=asked)
        first = next(iter(SparseLogitDataset(place / "even", batch_size=4, seed=42)))
        balance = 0.5 * student(input_ids=first.input_ids, output_router_logits=True).aux_loss.item()
        trainer = trained(place / "out", place / "even", student, max_steps=1)
        extra = losses(trainer)[0] - losses(trainer, "kl_to_records")[0]
        assert pytest.approx(balance if asked else 0, rel=1e-4, abs=1e-6) == extra
        assert asked != ("note: the balancing loss of the student's experts is left out" in capsys.readouterr().err)


def test_accumulation_leaves_the_balancing_loss_its_weight(place):
    """Of a step's micro-batches it is the mean, by the positions that count."""
    student = experts(asked=True)
    stream, parts = iter(SparseLogitDataset(place / "ragged", batch_size=2, seed=42, window=6)), []
    for batch in itertools.islice(stream, 3):
        balance = 0.5 * student(input_ids=batch.input_ids, output_router_logits=True).aux_loss.item()
        parts.append((int((batch.labels != -100).sum()), balance))
    changes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3, "max_steps": 1}
    trainer = trained(place / "out", place / "ragged", student, **changes)
    extra = losses(trainer)[0] - losses(trainer, "kl_to_records")[0]
    wanted = sum(count * balance for count, balance in parts) / sum(count for count, _ in parts)
    assert pytest.approx(wanted, rel=1e-4) == extra


def test_half_precision_and_checkpointed_activations(place):
    """bf16 moves the losses by its rounding, gradient checkpointing by nothing."""
    plain = trained(place / "out", place / "even")
    half = trained(place / "out", place / "even", bf16=True)
    assert losses(half) != losses(plain)
    assert pytest.approx(losses(plain), rel=2e-3) == losses(half)
    assert pytest.approx(losses(plain), rel=1e-6) == losses(
        trained(place / "out", place / "even", gradient_checkpointing=True)
    )


def test_a_micro_batch_where_nothing_counts(place, tmp_path):
    """Sequences without any record give no gradient, and no NaN."""
    header = skl.Header(vocab_size=VOCAB, seq_len=4, kind="counts", rounds=5)
    empty = skl.SparseTargets(token_ids=np.zeros(0, int), counts=np.zeros(0, int), offsets=np.zeros(5, int))
    with skl.ShardWriter(tmp_path / "empty.skl", header=header) as writer:
        for _ in range(4):
            writer.append(np.arange(5), empty)
    before = parameters(llama())
    trainer = trained(tmp_path / "out", tmp_path / "empty.skl", max_steps=1, weight_decay=0.0)
    assert [0.0] == losses(trainer)
    torch.testing.assert_close(parameters(trainer.model), before)


def test_documents_stay_apart(tmp_path):
    """A cache of isolated documents gives the student positions that begin again; without borders it is refused."""
    capture = {"packing": {"isolated": True}}
    write_cache(tmp_path / "apart", columns=("document_start",), capture=capture)
    trainer = SparseKDTrainer(llama(), arguments(tmp_path / "out"), cache=tmp_path / "apart", hold_out=3)
    (batches,) = batches_of(trainer)
    batch = next(iter(SparseLogitDataset(tmp_path / "apart", batch_size=4, seed=42, sequences=range(SEQUENCES - 3))))
    assert torch.equal(batch.position_ids, batches[0]["position_ids"])
    hidden = outputs.hidden_states(trainer.model, batch.input_ids, batch.position_ids).flatten(0, 1)
    wanted = linear_sparse_kl(hidden, output_head(trainer.model), batch.targets)
    torch.testing.assert_close(trainer.compute_loss(trainer.model, batches[0]), wanted)
    assert not torch.isclose(trainer.compute_loss(trainer.model, batches[0] | {"position_ids": None}), wanted)
    write_cache(tmp_path / "borderless", capture=capture)
    with pytest.raises(SettingsError, match="isolated documents, but without the column document_start"):
        SparseKDTrainer(llama(), arguments(tmp_path / "out"), cache=tmp_path / "borderless").train()


# --- checkpoints -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def undisturbed(place):
    """A run of 14 steps over epochs of 4, with dropout, checkpoints and evaluations between."""
    changes = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 3, "max_steps": 14}
    changes |= {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2, "logging_steps": 1}
    trainer = trained(place / "run", place / "ragged", gpt2(), hold_out=2, **changes)
    return trainer, changes


@pytest.mark.parametrize("step", [2, 8, 10], ids=["first epoch", "between epochs", "third epoch"])
def test_resumed_runs_are_the_undisturbed_one(place, undisturbed, step):
    """Bit for bit: each later line of the log, and the parameters."""
    whole, changes = undisturbed
    resumed = SparseKDTrainer(
        gpt2(), arguments(place / "other", **changes | {"eval_strategy": "no"}), cache=place / "ragged", hold_out=2
    )
    resumed.train(resume_from_checkpoint=str(place / "run" / f"checkpoint-{step}"))
    wanted, found = ([line for line in t.state.log_history if "loss" in line] for t in (whole, resumed))
    assert 14 == len(wanted)
    assert wanted == found  # the first ones come from the checkpoint
    torch.testing.assert_close(parameters(resumed.model), parameters(whole.model), rtol=0, atol=0)


def test_the_checkpoint_says_where_the_stream_stood(place, undisturbed):
    """The state of the last batch that was trained on, as the dataset itself has it."""
    dataset = SparseLogitDataset(place / "ragged", 3, seed=42, window=6, tail="pad", sequences=range(SEQUENCES - 2))
    states = []
    for epoch in range(3):
        dataset.set_epoch(epoch)
        states += [batch.state for batch in dataset]
    for step, batches in ((2, 4), (4, 7), (6, 11), (8, 14)):  # an epoch's fourth step has one batch alone
        saved = json.loads((place / "run" / f"checkpoint-{step}" / LOADER_STATE).read_text())
        assert states[batches - 1] == saved["stream"]


def test_other_splits_of_a_step_resume(place, undisturbed):
    """As many sequences in a step by other micro-batches: the same run but for rounding (and dropout)."""
    whole, changes = undisturbed
    changes = changes | {"per_device_train_batch_size": 6, "gradient_accumulation_steps": 1, "eval_strategy": "no"}
    trainer = SparseKDTrainer(gpt2(), arguments(place / "other", **changes), cache=place / "ragged", hold_out=2)
    trainer.train(resume_from_checkpoint=str(place / "run" / "checkpoint-6"))
    assert pytest.approx(losses(whole), rel=0.02) == losses(trainer)


@pytest.mark.parametrize(
    ("changes", "own", "message"),
    [
        (
            {"per_device_train_batch_size": 4},
            {},
            r"settings of the run that was saved differ \(sequences_per_step: 6 in the checkpoint, 8 here",
        ),
        ({"dataloader_drop_last": True}, {}, "steps_per_epoch: 4 in the checkpoint, 3 here|tail: 'pad' in the state"),
        ({"seed": 3}, {}, "seed: 42 in the state, 3 here"),
        ({}, {"hold_out": 3}, r"sequences: \[0, 21\] in the state, \[0, 20\] here"),
        ({}, {"method": "ce"}, "method: 'random_sampling' in the checkpoint, 'ce' here"),
        ({}, {"ce_weight": 0.5}, "ce_weight: 0.0 in the checkpoint, 0.5 here"),
        ({}, {"divergence": "mse"}, "divergence: 'forward_kl' in the checkpoint, 'mse' here"),
        ({}, {"cache": "even", "window": 6}, "fingerprint: '"),
    ],
    ids=["batch", "drop last", "seed", "hold_out", "method", "ce_weight", "divergence", "cache"],
)
def test_resuming_with_other_settings_is_refused(place, undisturbed, changes, own, message):
    """The message has both values."""
    args = arguments(place / "other", **undisturbed[1] | {"eval_strategy": "no"} | changes)
    own = {"hold_out": 2} | own
    trainer = SparseKDTrainer(gpt2(), args, cache=place / own.pop("cache", "ragged"), **own)
    with pytest.raises(ResumeError, match=message):
        trainer.train(resume_from_checkpoint=str(place / "run" / "checkpoint-6"))


def test_checkpoints_of_other_trainers(place, undisturbed, tmp_path):
    """Without the stream's state one is refused; ignore_data_skip begins its epoch again, as the Trainer has it."""
    checkpoint = place / "run" / "checkpoint-6"
    saved = (checkpoint / LOADER_STATE).read_bytes()
    args = {**undisturbed[1], "eval_strategy": "no", "save_strategy": "no"}
    try:
        (checkpoint / LOADER_STATE).unlink()
        trainer = SparseKDTrainer(gpt2(), arguments(tmp_path, **args), cache=place / "ragged", hold_out=2)
        with pytest.raises(ResumeError, match=r"has no sklformat_loader\.json, so that nothing says which sequences"):
            trainer.train(resume_from_checkpoint=str(checkpoint))
        args |= {"ignore_data_skip": True, "max_steps": 8}
        trainer = SparseKDTrainer(gpt2(), arguments(tmp_path, **args), cache=place / "ragged", hold_out=2)
        trainer.train(resume_from_checkpoint=str(checkpoint))
        assert (1, 4) == (trainer.sampler.epoch, trainer.sampler.taken)
    finally:
        (checkpoint / LOADER_STATE).write_bytes(saved)


@pytest.mark.parametrize("length", [{"max_steps": 5}, {"max_steps": -1, "num_train_epochs": 0.8}])
def test_a_finished_run_takes_no_further_step(place, tmp_path, length):
    """Resumed in the middle of an epoch, where the Trainer itself would take one more."""
    args = arguments(tmp_path, save_strategy="steps", save_steps=2, **length)
    finished = SparseKDTrainer(llama(), args, cache=place / "even")
    finished.train()
    again = SparseKDTrainer(llama(), args, cache=place / "even")
    again.train(resume_from_checkpoint=True)
    assert 5 == again.state.global_step == finished.state.global_step
    torch.testing.assert_close(parameters(again.model), parameters(finished.model), rtol=0, atol=0)
    longer = SparseKDTrainer(llama(), arguments(tmp_path, max_steps=7), cache=place / "even")
    longer.train(resume_from_checkpoint=True)
    assert 7 == longer.state.global_step


def test_checkpoints_of_weights_alone(place, tmp_path):
    """The optimizer would begin again, which the Trainer takes without a word."""
    args = arguments(tmp_path, save_strategy="steps", save_steps=2, save_only_model=True, max_steps=2)
    SparseKDTrainer(llama(), args, cache=place / "even").train()
    trainer = SparseKDTrainer(llama(), arguments(tmp_path), cache=place / "even")
    with pytest.raises(ResumeError, match=r"checkpoint-2: has weights alone \(save_only_model\), so that optimi"):
        trainer.train(resume_from_checkpoint=True)


def test_an_epoch_that_was_ended_early(place, tmp_path):
    """A callback ends epochs; the stream counts epochs all the same, and the checkpoint is refused with both places."""

    class Short(TrainerCallback):
        def on_step_end(self, _args, state, control, **_):
            control.should_epoch_stop = state.global_step == 2
            control.should_training_stop = state.global_step == 4

    seen = []

    class Look(SparseKDTrainer):
        def compute_loss(self, model, inputs, *rest, **named):
            seen.append(inputs["input_ids"][0].tolist())
            return super().compute_loss(model, inputs, *rest, **named)

    args = arguments(tmp_path, save_strategy="steps", save_steps=3, max_steps=-1, num_train_epochs=2)
    trainer = Look(llama(), args, cache=place / "even", callbacks=[Short()])
    trainer.train()
    (first, second) = batches_of(trainer, epochs=2)
    assert [batch["input_ids"][0].tolist() for batch in (*first[:2], *second[:2])] == seen
    with pytest.raises(ResumeError, match="stands in epoch 1 after 4 sequences, and the trainer, which counts steps"):
        trainer.train(resume_from_checkpoint=True)


def test_the_recipe(place, tmp_path, monkeypatch, capsys):
    """docs/recipes/trainer.py learns in float32 what was saved in bfloat16, and resumes where it is told."""
    tokenizer = tiny.train_tokenizer(tiny.make_documents())
    llama().to(torch.bfloat16).save_pretrained(tmp_path / "student")
    tokenizer.save_pretrained(tmp_path / "student")
    words = ["--cache", place / "even", "--student", tmp_path / "student", "--output_dir", tmp_path / "run"]
    words += ["--save_steps", 2, "--report_to", "none", "--use_cpu", "--disable_tqdm", "true", "--logging_steps", 1]

    def run(*more):
        monkeypatch.setattr("sys.argv", ["trainer.py", *map(str, (*words, *more))])
        runpy.run_path(str(RECIPES / "trainer.py"), run_name="__main__")
        state = json.loads((tmp_path / "run" / "checkpoint-4" / "trainer_state.json").read_text())
        return [line["loss"] for line in state["log_history"] if "loss" in line], capsys.readouterr()

    straight, printed = run("--max_steps", 4, "--hold_out", 3)
    assert "eval_lm_loss" in printed.out
    assert "note:" not in printed.err
    assert torch.float32 == load_file(tmp_path / "run" / "model.safetensors")["lm_head.weight"].dtype
    first = tmp_path / "run" / "checkpoint-2"
    resumed, printed = run("--max_steps", 4, "--hold_out", 3, "--resume_from_checkpoint", first)
    assert straight == resumed
    assert printed.out.count("'loss': ") == 2
    assert "eval_lm_loss" not in run("--max_steps", 4, "--hold_out", 0, "--output_dir", tmp_path / "whole")[1].out


# --- evaluation ------------------------------------------------------------------------------------------------------


def test_figures_are_those_of_validate(place):
    """evaluate() gives what ``validate`` does on the held-out part, before training and after."""
    trainer = SparseKDTrainer(llama(), arguments(place / "out", max_steps=2), cache=place / "ragged", hold_out=5)
    for _ in range(2):
        found = trainer.evaluate()
        wanted = validate(trainer.model, HeldOut(place / "ragged", range(SEQUENCES - 5, SEQUENCES), batch_size=8))
        assert {"eval_kl": None, "eval_teacher_loss": None}.items() & found.items() == set()
        for name in ("lm_loss", "kl_to_records", "cross_entropy", "calibration_error", "accuracy", "num_positions"):
            assert pytest.approx(getattr(wanted, name)) == found[f"eval_{name}"]
        assert pytest.approx(wanted.kl_to_records) == found["eval_loss"]
        assert found["eval_num_sequences"] == 5
        assert found["eval_samples_per_second"] > 0
        trainer.train()


def test_the_best_student_is_kept(place, tmp_path):
    """load_best_model_at_end by a figure of ours; early stopping sees it too; several caches have figures by name."""
    write_cache(tmp_path / "other", seed=8)
    often = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "here_lm_loss", "greater_is_better": False}
    trainer = SparseKDTrainer(
        llama(),
        arguments(tmp_path / "out", max_steps=40, learning_rate=0.1, **often, **best),
        cache=place / "even",
        eval_cache={"here": tmp_path / "other", "there": skl.open(tmp_path / "other")},
        ce_weight=0.25,
        callbacks=[EarlyStoppingCallback(early_stopping_patience=2)],
    )
    trainer.train()
    found = losses(trainer, "eval_here_lm_loss")
    assert trainer.state.global_step < 40
    assert min(found) == trainer.state.best_metric < found[-1]
    last = trainer.evaluate()
    assert pytest.approx(min(found)) == last["eval_here_lm_loss"] == last["eval_there_lm_loss"]
    mixture = 0.25 * last["eval_here_lm_loss"] + 0.75 * last["eval_here_kl_to_records"]
    assert pytest.approx(mixture) == last["eval_here_loss"]
    assert pytest.approx(trainer.evaluate(tmp_path / "other")["eval_lm_loss"]) == last["eval_here_lm_loss"]


def test_what_is_trained_on_is_not_measured(place):
    """The training part is refused as a cache to evaluate on, whenever it is named."""
    with pytest.raises(SettingsError, match="training sees 23 of its 23 sequences, the first is number 0; evaluate on"):
        SparseKDTrainer(llama(), arguments(place / "out"), cache=place / "even", eval_cache=place / "even")
    trainer = SparseKDTrainer(llama(), arguments(place / "out"), cache=place / "even", hold_out=3)
    with pytest.raises(SettingsError, match="training sees 20 of its 23 sequences"):
        trainer.evaluate(place / "even")
    with pytest.raises(TypeError, match=r"Prediction over a DataLoader\w*; it is over held-out sequences alone"):
        trainer.predict([{"input_ids": torch.arange(8)}])
    with pytest.raises(ValueError, match="nothing to evaluate on: make the trainer with hold_out or eval_cache"):
        SparseKDTrainer(llama(), arguments(place / "out"), cache=place / "even").evaluate()


# --- adapters --------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj"]},
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ],
    ids=["body", "head", "whole head"],
)
def test_adapters_learn_and_are_saved_alone(place, tmp_path, settings):
    """LoRA without the head, on it, or with a head of its own: all that learns gets its gradient, no more moves."""
    from peft import LoraConfig, PeftModel, get_peft_model

    torch.manual_seed(0)
    student = get_peft_model(llama(), LoraConfig(r=2, **settings))
    before = parameters(student)
    trainer = trained(tmp_path, place / "even", student, max_steps=3, save_strategy="steps", save_steps=3)
    for name, tensor in trainer.model.named_parameters():
        assert tensor.requires_grad != torch.equal(before[name], tensor), name
    checkpoint = tmp_path / "checkpoint-3"
    assert (checkpoint / "adapter_model.safetensors").exists()
    assert not (checkpoint / "model.safetensors").exists()
    loaded = PeftModel.from_pretrained(llama(), checkpoint)
    ids = torch.arange(8)[None]
    torch.testing.assert_close(loaded(input_ids=ids).logits, trainer.model.eval()(input_ids=ids).logits)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:Model has `tie_word_embeddings=True`")
def test_adapters_on_tied_heads_are_refused(place):
    """Merged they would change the embedding too."""
    from peft import LoraConfig, get_peft_model

    student = get_peft_model(llama(tie_word_embeddings=True), LoraConfig(r=2, target_modules=["lm_head"]))
    with pytest.raises(ValueError, match="is tied to the embedding, and LoRA changes it alone"):
        SparseKDTrainer(student, arguments(place / "out"), cache=place / "even")


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"label_smoothing_factor": 0.1},
            'label_smoothing_factor would spoil training from a cache: method="label_smoothing" is',
        ),
        ({"accelerator_config": {"split_batches": True}}, "split_batches would spoil training from a cache: each"),
        (
            {"accelerator_config": {"dispatch_batches": True}},
            "dispatch_batches would spoil training from a cache: each",
        ),
        (
            {"train_sampling_strategy": "group_by_length"},
            "group_by_length sampling would spoil training .*: window= keeps",
        ),
        ({"dataloader_in_order": False}, "dataloader_in_order=False would spoil .* it could not resume"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_arguments_that_would_spoil_the_run(place, changes, message):
    """Each is named, with what to use instead."""
    with pytest.raises(ValueError, match=message):
        SparseKDTrainer(llama(), arguments(place / "out", **changes), cache=place / "even")


def test_processes_that_would_spoil_the_run(place):
    """What shows only after the launch: the first FSDP, and a student whose processes share sequences."""
    args, state = arguments(place / "out"), types.SimpleNamespace(fsdp_plugin=types.SimpleNamespace(fsdp_version=1))
    with pytest.raises(ValueError, match="fsdp of version 1 hides the head from the loss; give fsdp_config="):
        check_launched(args, types.SimpleNamespace(state=state), llama())
    state.fsdp_plugin.fsdp_version = 2
    check_launched(args, types.SimpleNamespace(state=state), llama())
    with pytest.raises(
        ValueError, match="the student is loaded with tensor parallelism, where processes share sequenc"
    ):
        check_launched(args, types.SimpleNamespace(state=state), types.SimpleNamespace(_tp_size=2))


@pytest.mark.parametrize(
    ("own", "error", "message"),
    [
        ({"train_dataset": [1]}, ValueError, "takes no train_dataset: its sequences come from cache, hold_out and"),
        (
            {"compute_metrics": print, "data_collator": print},
            ValueError,
            "takes no data_collator, compute_metrics",
        ),
        ({"method": "full"}, ValueError, "method is 'full'; one of random_sampling, topk"),
        ({"method": "topk"}, SettingsError, "holds records of sampler multinomial, which method topk does not fit"),
        ({"ce_weight": 2}, ValueError, "ce_weight is 2, method random_sampling; need 0..1"),
        ({"ce_weight": 0.5, "method": "ce"}, ValueError, "ce_weight is 0.5, method ce; need 0..1, and 0 where ce is"),
        (
            {"divergence": "jsd", "method": "ce"},
            ValueError,
            "divergence is 'jsd', method 'ce', which is cross-entropy and",
        ),
        (
            {"temperature": 2.0},
            ValueError,
            "temperature is 2.0, method 'random_sampling': records keep the temperature of",
        ),
        (
            {"temperature": -2.0, "method": "topk_normalised"},
            ValueError,
            "temperature is -2.0; logits are divided by it: above 0, and finite",
        ),
        ({"easy_percentile": 30.0}, ValueError, "easy_percentile is 30.0, and belongs to an lr_ratio, which is 1"),
        ({"lr_ratio": -1.0}, ValueError, "lr_ratio is -1.0; need a finite number above 0, 1 for one rate of all"),
        ({"lr_ratio": 2.0, "decode": "cuda"}, ValueError, "decode is 'cuda', lr_ratio 2.0, for which the host reads"),
        ({"hold_out": 23}, ValueError, "hold_out is 23 of 23 sequences; it must leave some"),
        (
            {"hold_out": 3, "eval_cache": "x"},
            ValueError,
            "hold_out is 3, and eval_cache is given; evaluation is on",
        ),
        (
            {"vocab_size": 999},
            SettingsError,
            r"the student has a vocabulary of 999, \S+ one of 1000; widen the stu",
        ),
        ({"max_position_embeddings": 8}, ValueError, "seq_len 16 is beyond the 8 positions that the model takes; use"),
        ({"model": torch.nn.Linear(1, 1)}, ValueError, "a Linear is no causal language model of transformers or peft"),
    ],
    ids=lambda value: ", ".join(value) if isinstance(value, dict) else "",
)
def test_what_does_not_belong_together(place, own, error, message):
    """Datasets beside a cache, methods that do not fit, too small students: one line each, before the first step."""
    sizes = {name: own[name] for name in ("vocab_size", "max_position_embeddings") if name in own}
    own = {"model": llama(**sizes)} | {name: value for name, value in own.items() if name not in sizes}
    with pytest.raises(error, match=message):
        SparseKDTrainer(**own, args=arguments(place / "out"), cache=place / "even")


def test_other_tokenizers_are_refused(tmp_path):
    """A tokenizer that is given must be the cache's."""
    tokenizer = tiny.train_tokenizer(tiny.make_documents())
    header = skl.Header(
        vocab_size=VOCAB, seq_len=4, kind="counts", rounds=5, tokenizer_fingerprint="1" * 32,
        capture={"tokenizer": {"vocabulary": "3" * 32}},
    )  # fmt: skip
    records = skl.SparseTargets(token_ids=np.arange(4), counts=np.full(4, 5), offsets=np.arange(5))
    with skl.ShardWriter(tmp_path / "cache", header=header) as writer:
        writer.append(np.arange(5), records)
    with pytest.raises(SettingsError, match=r"cache was made by a different tokenizer: .*; give the student the one"):
        SparseKDTrainer(llama(), arguments(tmp_path), cache=tmp_path / "cache", processing_class=tokenizer)
    header = dataclasses.replace(header, tokenizer_fingerprint="2" * 32, capture={})
    with skl.ShardWriter(tmp_path / "other", header=header) as writer:
        writer.append(np.arange(1, 6), records)
    with pytest.raises(SettingsError, match=r"other and \S+cache do not go together: tokenizer fingerprints 2"):
        SparseKDTrainer(llama(), arguments(tmp_path), cache=tmp_path / "cache", eval_cache=tmp_path / "other")


def test_a_loss_that_is_not_finite_stops(place, tmp_path):
    """Before it is averaged away in the log, and before a broken student is saved or measured."""

    class Break(TrainerCallback):
        def on_step_end(self, _args, state, _control, model, **_):
            if state.global_step == 3:
                model.lm_head.weight.data[0] = math.nan

    args = {"save_strategy": "steps", "save_steps": 2, "logging_steps": 500, "max_steps": 8}
    trainer = SparseKDTrainer(llama(), arguments(tmp_path, **args), cache=place / "even", callbacks=[Break()])
    message = "by step 4 a loss was no finite number; the last checkpoint is .*checkpoint-2; train from there, or again"
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert not (tmp_path / "checkpoint-4").exists()


@pytest.mark.parametrize("changes", [{"logging_steps": 500}, {"logging_strategy": "no"}], ids=["rare", "none"])
def test_a_run_without_a_line_ends_with_a_finite_loss(place, tmp_path, changes):
    """Neither logged nor saved before its end, a broken student is found there."""

    class Break(TrainerCallback):
        def on_step_end(self, _args, state, _control, model, **_):
            if state.global_step == 3:
                model.lm_head.weight.data[0] = math.nan

    trainer = SparseKDTrainer(llama(), arguments(tmp_path, **changes), cache=place / "even", callbacks=[Break()])
    with pytest.raises(ValueError, match="by step 6 a loss was no finite number; there is no checkpoint; train"):
        trainer.train()


def test_weights_of_few_bits_are_said(place, capsys):
    """A student that was saved in bfloat16 loads as such, and learns less than it seems to."""
    for dtype, said in ((torch.float32, False), (torch.bfloat16, True)):
        SparseKDTrainer(llama().to(dtype), arguments(place / "out"), cache=place / "even")
        assert said == ("note: the student learns in bfloat16, where small updates" in capsys.readouterr().err)


def test_logits_are_not_made(place):
    """Who asks compute_loss for outputs is told that there are none."""
    trainer = SparseKDTrainer(llama(), arguments(place / "out"), cache=place / "even")
    with pytest.raises(ValueError, match="the chunked loss makes no logits that could be returned; call the model"):
        trainer.compute_loss(trainer.model, batches_of(trainer)[0][0], return_outputs=True)


@pytest.mark.integration
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # dynamo looks at it
def test_a_compiled_student_has_the_same_losses(place):
    """torch.compile takes the body; head and loss stay as they are."""
    plain = trained(place / "out", place / "even")
    compiled = trained(place / "out", place / "even", torch_compile=True, torch_compile_backend="aot_eager")
    assert "OptimizedModule" == type(compiled.model_wrapped).__name__
    assert pytest.approx(losses(plain), rel=1e-5) == losses(compiled)
