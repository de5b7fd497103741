import dataclasses

import parallel_data
import peft
import pytest
import torch
import transformers
from parallel_data import STOP, config_of, rows_of

import sklformat as skl
from sklformat.distill.models import loading
from sklformat.distill.student.training import train


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    parallel_data.write_place(root)
    parallel_data.run(root, "adapter")
    return root


def refused(place, words, **changes):
    """A run with other settings, in a directory that is then made for nothing."""
    config = dataclasses.replace(config_of(place, "refused", "adapter"), **changes)
    with pytest.raises((ValueError, skl.SettingsError), match=words):
        train(config, report=lambda *_: None)


def test_an_adapter_learns_and_its_model_stays(place):
    """The loss falls; what is saved is the adapter alone, which peft and every verb load beside its model."""
    rows = rows_of(place, "adapter")
    assert rows[-1]["loss"] < rows[0]["loss"] - 1
    out = place / "adapter" / "model"
    assert not (out / "config.json").exists()
    base = transformers.AutoModelForCausalLM.from_pretrained(place / "student")
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    adapted = peft.PeftModel.from_pretrained(base, out).eval()
    config = adapted.peft_config["default"]
    assert (4, 8) == (config.r, config.lora_alpha)
    linear = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"}
    assert linear == {name.rpartition(".")[2] for name in config.target_modules}
    merged = loading.load_model(out)
    ids_BT = torch.arange(8)[None]
    assert torch.allclose(adapted(ids_BT).logits, merged(ids_BT).logits, atol=1e-5)
    changed = {name for name, tensor in merged.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name in before if name.rpartition(".")[0].rpartition(".")[2] in linear}


def test_a_stopped_adapter_resumes_bit_for_bit(place):
    """Its checkpoint holds the adapter alone."""
    parallel_data.run(place, "adapter", out="cut", stop=STOP)
    state = torch.load(place / "cut" / "checkpoint.pt", weights_only=True)
    assert state["model"]
    assert all("lora_" in name for name in state["model"])
    parallel_data.run(place, "adapter", out="cut")
    assert (0, 0) == parallel_data.difference(place, "cut", "adapter")


def test_an_adapter_is_trained_further(place):
    """One that is the student learns on from where it was; merged, without a rank, every weight does."""
    how = {"student": str(place / "adapter" / "model"), "lora_targets": (), "seed": 1, "steps": 3}
    further = dataclasses.replace(config_of(place, "further", "adapter"), **how)
    train(further, report=lambda *_: None)
    assert rows_of(place, "further")[0]["loss"] < rows_of(place, "adapter")[0]["loss"] - 1
    weights = parallel_data.weights_of(place, "further")
    assert weights.keys() == parallel_data.weights_of(place, "adapter").keys()
    assert str(place / "student") == peft.PeftConfig.from_pretrained(further.out / "model").base_model_name_or_path
    merged = dataclasses.replace(further, out=place / "merged", lora_rank=0)
    train(merged, report=lambda *_: None)
    assert (place / "merged" / "model" / "config.json").exists()


def test_an_adapter_of_another_kind_is_refused(place):
    """Both ranks are named, and both alphas; so is what is asked for beside."""
    student = {"student": str(place / "adapter" / "model")}
    words = r"the adapter is LORA of rank 4 and alpha 8(\.0)?, asked for is LORA of rank 2 and alpha 8"
    refused(place, words, lora_rank=2, lora_targets=(), **student)
    refused(place, "asked for is LORA of rank 4 and alpha 5", lora_alpha=5.0, lora_targets=(), **student)
    refused(place, "on all-linear, lm_head; leave out --lora-alpha", **student)


def test_layers_that_are_not_there_are_refused(place):
    """By the name that fits none, with those that are there."""
    words = r"no linear layer of LlamaForCausalLM has a name that ends in 'query'; --lora-targets may name all-linear"
    refused(place, words, lora_targets=("q_proj", "query"))


def test_an_adapter_on_a_tied_head_is_refused(place):
    """The two cannot be told apart once merged."""
    refused(place, "the head of LlamaForCausalLM is tied to the embedding", student=str(place / "tied-student"))


def test_half_precision_weights_under_an_adapter(place):
    """The model in bfloat16, the adapter in float32: its small steps are not lost."""
    how = {"dtype": "bfloat16", "param_dtype": "bfloat16", "steps": 2}
    train(dataclasses.replace(config_of(place, "half", "adapter"), **how), report=lambda *_: None)
    assert {torch.float32} == {tensor.dtype for tensor in parallel_data.weights_of(place, "half").values()}
    assert rows_of(place, "half")[0]["loss"] == pytest.approx(rows_of(place, "adapter")[0]["loss"], abs=0.05)


def test_half_precision_weights_learn(place):
    """Weights and what is saved are bfloat16, and the first loss is that of float32 to its rounding."""
    for name in ("one", "half-parameters"):
        train(dataclasses.replace(config_of(place, name, name), steps=2), report=lambda *_: None)
    assert {torch.bfloat16} == {tensor.dtype for tensor in parallel_data.weights_of(place, "half-parameters").values()}
    assert rows_of(place, "half-parameters")[0]["loss"] == pytest.approx(rows_of(place, "one")[0]["loss"], abs=0.05)


def test_recomputed_activations_are_the_same_run(place):
    """Bit for bit, and a run may be resumed with them or without; divided, one process is refused."""
    how = {"gradient_checkpointing": True}
    config = dataclasses.replace(config_of(place, "recomputed", "one"), steps=2)
    with pytest.raises(ValueError, match="shard divides a student between processes, and there is one; start several"):
        train(dataclasses.replace(config, shard=True), report=lambda *_: None)
    train(dataclasses.replace(config, **how), report=lambda *_: None)
    losses = [row["loss"] for row in rows_of(place, "recomputed")]
    train(dataclasses.replace(config, out=place / "kept"), report=lambda *_: None)
    assert losses == [row["loss"] for row in rows_of(place, "kept")]


def test_a_checkpoint_of_other_weights_is_refused(place):
    """Such as one that another version of a library wrote under other names."""
    parallel_data.run(place, "one", out="renamed", stop=7)
    path = place / "renamed" / "checkpoint.pt"
    state = torch.load(path, weights_only=True)
    state["model"] = {f"old.{name}": tensor for name, tensor in state["model"].items()}
    torch.save(state, path)
    with pytest.raises(ValueError, match=r"the checkpoint is of another student: the weight lm_head.weight is in one"):
        parallel_data.run(place, "one", out="renamed")


def test_experts_apart_are_not_divided(place):
    """Processes would wait for each other's gradients of experts that only one of them used."""
    from sklformat.distill.student import parallelism
    from sklformat.distill.student.processes import Process

    model = loading.load_model(place / "student")
    model.model.layers[0].experts = torch.nn.ModuleList([torch.nn.Linear(2, 2)])
    process = Process(0, 2, torch.device("cpu"))
    with pytest.raises(ValueError, match="the experts of LlamaForCausalLM are modules of their own"):
        parallelism.divide(model, [*model.model.layers], process, half=False)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"student": None}, "lora_rank needs a student; a new Llama has nothing"),
        ({"lora_rank": 0}, r"lora_alpha and lora_targets belong to lora_rank, got 0.0 and \('all-linear', 'lm_head'\)"),
        ({"lora_rank": -1}, "lora_rank must be >= 0, got -1"),
        ({"param_dtype": "bfloat16"}, "param_dtype bfloat16 needs dtype bfloat16, got float32"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(place, changes, words):
    """Before anything is read."""
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(config_of(place, "refused", "adapter"), **changes)


def test_a_run_notes_these_settings_only_where_they_are_set(place):
    """So that runs that began before them resume."""
    recorded = (place / "kept" / "run.json").read_text()
    assert not any(word in recorded for word in ("lora", "param_dtype", "shard", "compile", "checkpointing"))
    assert '"lora_rank": 4' in (place / "adapter" / "run.json").read_text()
