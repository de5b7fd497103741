"""Teachers: the logits of slices are the model's own, whatever its head does, and never all there at once."""

import importlib.util

import pytest
import torch
import transformers

from sklformat.distill.models import heads, loading, outputs
from sklformat.distill.teacher import forward
from sklformat.distill.teacher.forward import Teacher

VOCAB, POSITIONS = 96, 40
SIZES = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
    "num_attention_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip


def made(kind, **more):
    torch.manual_seed(0)
    return getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**SIZES | more)).eval()


MODELS = {
    "one matrix": lambda: made("Llama", num_key_value_heads=2),
    "scaled": lambda: made("Cohere", logit_scale=0.25),
    "capped": lambda: made("Gemma2", num_key_value_heads=2, head_dim=16, final_logit_softcapping=0.5),
    "experts": lambda: made("GraniteMoe", num_key_value_heads=2, logits_scaling=4.0, num_local_experts=2),
    "with bias": lambda: made("Phi", partial_rotary_factor=0.5),
}


@pytest.mark.parametrize("name", MODELS)
def test_slices_are_the_models_logits(name, monkeypatch):
    """Slices put together are what the model says by itself, without padding, and none is larger than allowed."""
    model = MODELS[name]()
    if name == "with bias":
        torch.nn.init.normal_(model.lm_head.bias)
    ids = torch.arange(2 * POSITIONS).reshape(2, POSITIONS) % VOCAB
    with torch.inference_mode():
        expected = outputs.logits(model, ids)[..., : VOCAB - 3]
    teacher = Teacher(model, VOCAB - 3)
    assert (name == "one matrix") == (heads.plain_weight(model) is not None)
    monkeypatch.setitem(forward.LOGITS_AT_ONCE, "cpu", 17 * (VOCAB - 3))
    teacher = Teacher(model, VOCAB - 3)
    hidden = teacher.run(ids.numpy().astype("uint32"))
    assert (2, POSITIONS, SIZES["hidden_size"]) == hidden.shape  # hidden states: [B, T, V] is never made
    for sequence in range(2):
        slices = list(teacher.logits(hidden[sequence]))
        assert [0, 16, 32] == [first for first, _ in slices]
        assert [16, 16, 8] == [len(part) for _, part in slices]
        found = torch.cat([part for _, part in slices])
        torch.testing.assert_close(expected[sequence], found, rtol=1e-5, atol=1e-5)


def test_slices_have_so_many_positions_at_least(monkeypatch):
    """However large the vocabulary; on a GPU 1024."""
    assert forward.LEAST_ROWS["cuda"] >= 1024
    monkeypatch.setitem(forward.LOGITS_AT_ONCE, "cpu", 1)
    monkeypatch.setitem(forward.LEAST_ROWS, "cpu", 32)
    teacher = Teacher(MODELS["one matrix"](), VOCAB)
    slices = teacher.logits(teacher.run(torch.arange(POSITIONS)[None].numpy().astype("uint32"))[0])
    assert [(0, 32), (32, 8)] == [(first, len(part)) for first, part in slices]


def test_a_head_that_needs_more_is_run_with_its_model(monkeypatch):
    """Where the head alone gives other logits, or fails, the model is run whole, and the records stay right."""
    model = made("Cohere", logit_scale=0.25)
    ids = torch.arange(POSITIONS)[None]
    with torch.inference_mode():
        expected = outputs.logits(model, ids)
    for broken in (lambda model, hidden: hidden, lambda model, hidden: hidden.no_such_thing):
        monkeypatch.setattr(outputs, "head_logits", broken)
        teacher = Teacher(model, VOCAB)
        hidden = teacher.run(ids.numpy().astype("uint32"))
        assert torch.equal(expected, hidden)
        assert torch.equal(expected[0], torch.cat([part for _, part in teacher.logits(hidden[0])]))


def test_the_body_is_put_back():
    """Calling the head alone leaves the model as it was, also when it fails."""
    model = made("Cohere")
    body = model.model
    with torch.inference_mode():
        outputs.head_logits(model, torch.zeros(1, 2, 32))
        with pytest.raises((RuntimeError, TypeError)):
            outputs.head_logits(model, torch.zeros(1, 2, 5))
    assert model.model is body


def test_bfloat16_stays_bfloat16():
    """A bfloat16 teacher's slices are bfloat16, as the sampler takes them."""
    teacher = Teacher(MODELS["one matrix"]().bfloat16(), VOCAB)
    [(first, part)] = teacher.logits(teacher.run(torch.arange(4)[None].numpy().astype("uint32"))[0])
    assert (0, torch.bfloat16, (4, VOCAB)) == (first, part.dtype, part.shape)


def test_a_teacher_that_does_not_fit_its_devices_is_refused(tmp_path, monkeypatch):
    """Laid over GPUs, a model gets nine tenths of what is free there; a part that would lie elsewhere is named."""
    asked = {}
    model = MODELS["one matrix"]()
    model.save_pretrained(tmp_path / "big")
    model.hf_device_map = {"model": 2, "lm_head": "disk"}

    def from_pretrained(path, **named):
        asked.update(named)
        return model, {"missing_keys": [], "mismatched_keys": []}

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda number: (1000 * number, 0))
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", from_pretrained)
    with pytest.raises(ValueError, match="big: does not fit the CUDA devices 2, 3, a part would lie on disk"):
        loading.load_model(tmp_path / "big", over=[2, 3])
    assert ("auto", {2: 1800, 3: 2700}) == (asked["device_map"], asked["max_memory"])
    with (
        monkeypatch.context() as patch,
        pytest.raises(ModuleNotFoundError, match="spreading a model over several GPUs needs accelerate") as raised,
    ):
        patch.setattr(importlib.util, "find_spec", lambda name: None)
        loading.load_model(tmp_path / "big", over=[2, 3])
    assert "accelerate" == raised.value.name  # the command line turns it into how to install it
    model.hf_device_map["lm_head"] = 3
    assert model is loading.load_model(tmp_path / "big", over=[2, 3])
