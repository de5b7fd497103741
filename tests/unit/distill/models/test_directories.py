"""Whatever a model directory holds gives the logits of transformers' own call, or one line."""

import importlib.util
import json
import os
import pty
import subprocess
import sys

import model_types
import peft
import pytest
import tiny
import torch
import transformers

from sklformat.distill.models import loading, outputs
from sklformat.distill.teacher.forward import Teacher

IDS = torch.arange(24)[None]


def logits_of(model):
    with torch.inference_mode():
        return outputs.logits(model, IDS)


def seen_by_capture(model):
    teacher = Teacher(model, outputs.head_width(model))
    output = teacher.run(IDS.numpy().astype("uint32"))
    return torch.cat([part for _, part in teacher.logits(output[0])])[None]


def assert_exact(path, expected, **how):
    """The directory gives these logits, as a model and as a teacher."""
    model = loading.load_model(path, **how)
    assert torch.equal(expected, logits_of(model))
    assert torch.equal(expected, seen_by_capture(model))
    return model


def one_line(error):
    assert "\n" not in str(error.value)
    return str(error.value)


# --- adapters ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def adapter(tmp_path):
    """A base model with its tokenizer, and a LoRA adapter of it beside; returns peft's own merged logits."""
    documents = tiny.make_documents(2)
    base = tiny.write_model(tmp_path / "base", tiny.train_tokenizer(documents), max_positions=64)
    torch.manual_seed(1)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "gate_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(base, config, adapter_name="default")
    adapted.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    adapted.save_pretrained(tmp_path / "adapter")
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    return logits_of(peft.PeftModel.from_pretrained(plain, tmp_path / "adapter").merge_and_unload())


def test_an_adapter_is_merged_into_its_model(tmp_path, adapter):
    """An adapter's directory gives peft's merged logits, not the base model's, with the base model's tokenizer."""
    model = assert_exact(tmp_path / "adapter", adapter)
    assert type(model) is transformers.LlamaForCausalLM
    assert all(parameter.requires_grad for parameter in model.parameters())  # a student's weights learn
    assert not torch.equal(adapter, logits_of(loading.load_model(tmp_path / "base")))
    text = "alpha beta"
    ids = loading.load_tokenizer(tmp_path / "base")(text).input_ids
    assert ids == loading.load_tokenizer(tmp_path / "adapter")(text).input_ids


def test_the_model_of_an_adapter_is_found_or_named(tmp_path, adapter):
    """Moved together, an adapter's model is found beside it; elsewhere it is named; else one line says how."""
    place = tmp_path / "elsewhere"
    place.mkdir()
    for name in ("base", "adapter"):
        (tmp_path / name).rename(place / name)
    assert_exact(place / "adapter", adapter)
    (place / "base").rename(tmp_path / "renamed")
    for load in (loading.load_model, loading.load_tokenizer):
        with pytest.raises(ValueError, match=rf"^{place}/adapter: .* {tmp_path}/base: .*no such directory") as caught:
            load(place / "adapter")
        assert ": is an adapter of another model: " in one_line(caught)
        assert one_line(caught).endswith("; adapter_base may name it")
    assert_exact(place / "adapter", adapter, adapter_base=str(tmp_path / "renamed"))
    assert loading.load_tokenizer(place / "adapter", adapter_base=str(tmp_path / "renamed"))
    settings = json.loads((place / "adapter/adapter_config.json").read_text())
    (place / "adapter/adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": None}))
    with pytest.raises(ValueError, match="does not say of which model; give adapter_base, its path or name"):
        loading.load_model(place / "adapter")


def test_an_adapter_that_cannot_be_merged_is_refused(tmp_path, adapter, monkeypatch):
    """An adapter beside a whole model, without all its weights, that adds tokens, or without peft: one line each."""
    torch.manual_seed(1)
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    peft.get_peft_model(loading.load_model(tmp_path / "base"), config).save_pretrained(tmp_path / "prompt")
    with pytest.raises(ValueError, match=r"prompt: an adapter of type PROMPT_TUNING cannot be merged into weights"):
        loading.load_model(tmp_path / "prompt", adapter_base=str(tmp_path / "base"))
    settings = tmp_path / "adapter/adapter_config.json"
    values = json.loads(settings.read_text())
    settings.write_text(json.dumps(values | {"target_modules": [*values["target_modules"], "up_proj"]}))
    with pytest.raises(ValueError, match=r"adapter: not all weights of the adapter are there .*up_proj"):
        loading.load_model(tmp_path / "adapter")
    settings.rename(tmp_path / "base/adapter_config.json")
    with pytest.raises(ValueError, match=r"base: holds a whole model \(config.json\) and an adapter"):
        loading.load_model(tmp_path / "base")
    (tmp_path / "base/adapter_config.json").write_text("[]")
    (tmp_path / "base/config.json").unlink()
    with pytest.raises(ValueError, match=r"base: adapter_config\.json holds no JSON object"):
        loading.load_model(tmp_path / "base")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="an adapter needs peft") as caught:
        loading.load_model(tmp_path / "prompt")
    assert "peft" == caught.value.name


# --- models for images and text, bodies without head ------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["llava", "mistral3", "qwen3_vl"])
def test_a_vision_wrapper_gives_its_text_model(model_type, tmp_path):
    """A model for images and text gives the logits of its own call over text alone."""
    auto = transformers.AutoModelForMultimodalLM
    model = model_types.tiny_model(model_type, auto=auto)
    model.save_pretrained(tmp_path / "m")
    assert type(model) is type(assert_exact(tmp_path / "m", logits_of(auto.from_pretrained(tmp_path / "m"))))


def test_a_wrapper_that_has_a_causal_class_gives_the_same(tmp_path):
    """Where transformers takes the text model out of a wrapper's weights, its logits are the wrapper's over text."""
    config = model_types.tiny_config(transformers.Llama4Config)
    torch.manual_seed(0)
    model = transformers.Llama4ForConditionalGeneration(config).eval()
    model.save_pretrained(tmp_path / "m")
    expected = logits_of(model.language_model)
    assert type(assert_exact(tmp_path / "m", expected)) is transformers.Llama4ForCausalLM


@pytest.mark.parametrize("tie", [True, False])
def test_a_body_without_head_gets_no_random_one(tie, tmp_path):
    """A directory of a body alone is exact where its head is its embedding, and refused by name where it is not."""
    whole = model_types.tiny_model("llama", tie_word_embeddings=tie)
    whole.model.save_pretrained(tmp_path / "m")
    if tie:
        assert_exact(tmp_path / "m", logits_of(whole))
    else:
        with pytest.raises(ValueError, match=r"not all weights of a LlamaForCausalLM .*missing_keys: lm_head\.weight"):
            loading.load_model(tmp_path / "m")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (transformers.T5Config(), "a t5 is an encoder with a decoder; use a causal language model"),
        (transformers.BartConfig(), "a bart is an encoder with a decoder; use a causal language model"),
        (transformers.ViTConfig(), "transformers has no causal language model of type vit; use another"),
    ],
)
def test_what_is_no_causal_model_is_refused(config, message, tmp_path):
    """Encoders with a decoder, and models of something else, are named, before their weights are read."""
    config.save_pretrained(tmp_path / "m")
    with pytest.raises(ValueError, match=rf"m: {message}$"):
        loading.load_model(tmp_path / "m")


# --- quantised weights, remote code -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "library"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"quant_method": "gptq", "bits": 4}, "optimum"),
    ],
)
def test_a_missing_library_of_quantised_weights_is_named(method, library, tmp_path):
    """Quantised weights whose library is not installed are one line that names it."""
    if importlib.util.find_spec(library) is not None:
        pytest.skip(f"{library} is installed")
    model_types.tiny_model("llama").save_pretrained(tmp_path / "m")
    config = json.loads((tmp_path / "m/config.json").read_text())
    (tmp_path / "m/config.json").write_text(json.dumps(config | {"quantization_config": method}))
    with pytest.raises(OSError, match=f"m: cannot load a model .*requires {library}") as caught:
        loading.load_model(tmp_path / "m")
    one_line(caught)


def test_quantised_weights_cannot_learn():
    """A student whose weights are packed integers is refused before training."""
    model = model_types.tiny_model("llama")
    model.hf_quantizer = object()
    loading.check_trainable(model)
    model.lm_head.weight = torch.nn.Parameter(torch.zeros(4, 1, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match="the weights of this LlamaForCausalLM are quantised and cannot learn"):
        loading.check_trainable(model)


REMOTE = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own_llama"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig

    def forward(self, *args, **named):
        output = super().forward(*args, **named)
        output.logits = 2 * output.logits
        return output
"""


@pytest.fixture
def remote(tmp_path, monkeypatch):
    """A directory whose model comes with its own code; returns the logits of that code."""
    model = model_types.tiny_model("llama")
    model.save_pretrained(tmp_path / "remote")
    (tmp_path / "remote/own.py").write_text(REMOTE)
    config = json.loads((tmp_path / "remote/config.json").read_text())
    auto_map = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    config |= {"model_type": "own_llama", "auto_map": auto_map}
    (tmp_path / "remote/config.json").write_text(json.dumps(config))
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    return 2 * logits_of(model)


def test_code_that_came_with_a_model_runs_only_when_trusted(tmp_path, remote):
    """Remote code is refused in one line that names the flag, and with it is exact."""
    with pytest.raises(
        ValueError, match=r"remote: cannot load a model; .* give trust_remote_code to run it$"
    ) as caught:
        loading.load_model(tmp_path / "remote")
    one_line(caught)
    assert_exact(tmp_path / "remote", remote, trust_remote_code=True)


def test_a_terminal_is_never_asked(tmp_path, remote):
    """On a terminal, a model with code of its own is refused in one line that names the flag, without a question."""
    (tmp_path / "text.txt").write_text("alpha beta")
    tiny.train_tokenizer(tiny.make_documents(2)).save_pretrained(tmp_path / "tokenizer")
    ours, theirs = pty.openpty()
    done = subprocess.run(
        [sys.executable, "-m", "sklformat", "eval", "--student", tmp_path / "remote", "--text", tmp_path / "text.txt",
         "--tokenizer", tmp_path / "tokenizer", "--seq-len", "2"],
        stdin=theirs, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    for end in (ours, theirs):
        os.close(end)
    assert (1, "") == (done.returncode, done.stdout)
    assert "y/N" not in done.stderr
    assert done.stderr.endswith("give --trust-remote-code to run it\n"), done.stderr
