"""Axolotl 0.19.0 itself, by its own command line, with the plugin of ``sklformat.integrations.axolotl``."""

import itertools
import json
import os
import subprocess
import sys

import pytest
import tiny
import torch
import yaml
from loader_data import VOCAB, write_cache

import sklformat as skl
from sklformat.distill import SparseLogitDataset, linear_sparse_kl, output_head
from sklformat.errors import SettingsError
from sklformat.interop import convert
from sklformat.settings.convert import ConvertConfig

pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore")]
OFFLINE = {"AXOLOTL_DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled"}
PLUGIN = "sklformat.integrations.axolotl.SparseKDPlugin"
LORA = {"adapter": "lora", "lora_r": 2, "lora_alpha": 4, "lora_target_modules": ["q_proj", "lm_head"]}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A cache and a student in a directory."""
    from transformers import LlamaConfig, LlamaForCausalLM

    directory = tmp_path_factory.mktemp("axolotl")
    write_cache(directory / "cache")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    student = LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, **sizes, num_key_value_heads=2))
    student.save_pretrained(directory / "student")
    tiny.train_tokenizer(tiny.make_documents()).save_pretrained(directory / "student")
    return directory


def trained(place, out, **changes):
    """``axolotl train``; the log of the trainer, and the directory of the run."""
    config = {
        "base_model": str(place / "student"),
        "plugins": [PLUGIN],
        "sparse_kd": {"cache": str(place / "cache"), "hold_out": 5, "ce_weight": 0.2},
        "special_tokens": {"pad_token": "<|endoftext|>"},
        "sequence_len": 16,
        "micro_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 4,
        "eval_steps": 2,
        "save_steps": 2,
        "logging_steps": 1,
        "learning_rate": 0.01,
        "optimizer": "adamw_torch",
        "lr_scheduler": "cosine",
        "bf16": False,
        "fp16": False,
        "tf32": False,
        "use_cpu": True,
        "output_dir": str(place / out),
    } | changes
    path = place / f"{out}.yml"
    path.write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "axolotl.cli.train", str(path)]
    done = subprocess.run(command, env=os.environ | OFFLINE, capture_output=True, text=True, check=False, cwd=place)
    assert done.returncode == 0, done.stderr[-4000:]
    state = json.loads((place / out / "checkpoint-4" / "trainer_state.json").read_text())
    return state["log_history"], place / out


@pytest.fixture(scope="module")
def straight(place):
    return trained(place, "straight")


def losses(log):
    return [line["loss"] for line in log if "loss" in line]


def test_the_loss_is_that_of_the_stream(place, straight):
    """The first step is on the first four sequences of the cache's stream, and its loss is ``linear_sparse_kl``."""
    from transformers import LlamaForCausalLM

    student = LlamaForCausalLM.from_pretrained(place / "student")
    stream = SparseLogitDataset(place / "cache", 2, seed=42, sequences=range(18))  # Axolotl's seed
    total, value = 0, 0.0
    for batch, _ in zip(stream, range(2), strict=False):
        counted = int((batch.labels != -100).sum())
        hidden = student.base_model(batch.input_ids).last_hidden_state.flatten(0, 1)
        loss = linear_sparse_kl(
            hidden, output_head(student), batch.targets, labels_P=batch.labels.flatten(), ce_weight=0.2
        )
        total, value = total + counted, value + loss.item() * counted
    assert losses(straight[0])[0] == pytest.approx(value / total, rel=1e-4)


def test_axolotl_evaluates_on_what_is_held_out(straight):
    """At the beginning and every two steps, on five sequences that are not trained on."""
    figures = [line for line in straight[0] if "eval_lm_loss" in line]
    assert [0, 2, 4] == [line["step"] for line in figures]
    assert all(line["eval_num_sequences"] == 5 for line in figures)


def test_axolotl_resumes_exactly(place, straight):
    """From its own checkpoint after step two: the same losses and figures, the stream included."""
    log, out = trained(place, "resumed", resume_from_checkpoint=str(straight[1] / "checkpoint-2"))
    assert losses(straight[0])[2:] == losses(log)[2:]
    weights = [torch.load(at / "checkpoint-4" / "optimizer.pt", weights_only=True) for at in (straight[1], out)]
    first, second = ([each["exp_avg"] for each in one["state"].values()] for one in weights)
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))


def test_adapters_learn(place):
    """LoRA as Axolotl makes it, the head included."""
    from safetensors.torch import load_file

    log, out = trained(place, "lora", **LORA)
    assert len(losses(log)) == 4
    adapter = load_file(out / "adapter_model.safetensors")
    for name in ("q_proj", "lm_head"):
        moved = [tensor for key, tensor in adapter.items() if name in key and "lora_B" in key]
        assert len(moved) == 1
        assert moved[0].abs().max() > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sparse_kd": None}, "the YAML asks for SparseKDPlugin and names no cache; add sparse_kd"),
        ({"datasets": [{"path": "other"}]}, "take datasets out of the YAML"),
        ({"sample_packing": True, "rl": "dpo"}, "take sample_packing, rl out of the YAML"),
        ({"val_set_size": 0.1}, "take val_set_size out of the YAML"),
    ],
)
def test_what_contradicts_the_cache_is_refused(change, message):
    """Before Axolotl has loaded anything."""
    from axolotl.integrations.base import load_plugin

    config = {"sparse_kd": {"cache": "my-cache", "hold_out": 5}}
    plugin = load_plugin(PLUGIN)
    plugin.register(config)
    plugin.register(config)  # as Axolotl does at times
    with pytest.raises(SettingsError, match=message):
        plugin.register({"sparse_kd": {"cache": "my-cache"}} | change)


def test_axolotl_has_the_hooks_that_the_plugin_uses():
    """Each public method of the plugin is one of BasePlugin's, with the same names of arguments."""
    import inspect

    from axolotl.integrations.base import BasePlugin, load_plugin

    own = {name: value for name, value in vars(type(load_plugin(PLUGIN))).items() if not name.startswith("_")}
    assert len(own) == 6
    for name, method in own.items():
        assert list(inspect.signature(method).parameters) == list(
            inspect.signature(getattr(BasePlugin, name)).parameters
        )


def test_settings_are_checked(place):
    """A name that there is not, a held-out part that leaves nothing, and what does not go together, in time."""
    from types import SimpleNamespace

    from axolotl.integrations.base import load_plugin
    from pydantic import ValidationError

    cfg = SimpleNamespace(
        sparse_kd={"cache": str(place / "cache"), "hold_out": 23}, num_epochs=1, batch_size=4, max_steps=None
    )
    with pytest.raises(SettingsError, match=r"has 23 sequences, sparse_kd\.hold_out is 23"):
        load_plugin(PLUGIN).load_datasets(cfg)
    cfg.sparse_kd |= {"hold_out": 3}
    found = load_plugin(PLUGIN).load_datasets(cfg)
    assert (20, 3, 5) == (len(found.train_dataset), len(found.eval_dataset), found.total_num_steps)
    for own, error, message in (
        ({"method": "topk"}, SettingsError, "holds records of sampler multinomial, which method topk does not fit"),
        ({"method": "full"}, ValidationError, "method is 'full'; one of random_sampling, topk"),
        ({"temperature": 2.0}, ValidationError, "records keep the temperature of their capture"),
    ):
        other = SimpleNamespace(**vars(cfg) | {"sparse_kd": cfg.sparse_kd | own})
        with pytest.raises(error, match=message):
            load_plugin(PLUGIN).load_datasets(other)
    cfg.sparse_kd |= {"holdout": 3}
    with pytest.raises(ValidationError, match="holdout"):
        load_plugin(PLUGIN).load_datasets(cfg)


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_axolotl_takes_an_export_as_it_is(place, tmp_path, suffix):
    """What is exported is a tokenized data set, of which Axolotl's own collator makes the cache's targets."""
    import datasets
    from axolotl.integrations.kd.collator import DataCollatorForKD
    from axolotl.utils.data.wrappers import _is_dataset_already_tokenized
    from transformers import AutoTokenizer

    convert(ConvertConfig(source=place / "cache", destination=tmp_path / f"out{suffix}", to="axolotl"))
    kind, file = {".parquet": "parquet", ".jsonl": "json"}[suffix], str(tmp_path / f"out{suffix}")
    rows = datasets.load_dataset(kind, data_files=file, split="train", cache_dir=str(tmp_path))
    assert _is_dataset_already_tokenized(rows)
    tokenizer = AutoTokenizer.from_pretrained(place / "student", pad_token="<|endoftext|>")
    batch = DataCollatorForKD(tokenizer)([rows[i] for i in range(4)])
    cache = skl.open(place / "cache")
    for i in range(4):
        targets = cache[i].targets
        dense = torch.zeros(targets.num_positions, VOCAB)
        for t, (begin, end) in enumerate(itertools.pairwise(targets.offsets.tolist())):
            ids = torch.tensor(targets.token_ids[begin:end].astype("int64"))
            dense[t, ids] = torch.tensor(targets.counts[begin:end] / cache.header.rounds, dtype=torch.float32)
        probs = batch["target_logprobs"][i].exp() * batch["target_mask"][i]
        found = torch.zeros(len(probs), VOCAB).scatter_add_(1, batch["target_token_ids"][i], probs)
        torch.testing.assert_close(found[: len(dense)], dense)
        assert not found[len(dense) :].any()
        assert batch["input_ids"][i, : len(dense) + 1].tolist() == cache[i].tokens.tolist()
