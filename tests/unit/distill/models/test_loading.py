"""Models and tokenizers: the door to transformers."""

import json
import resource
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers

from sklformat.distill.models import heads, loading, outputs, tokenization
from sklformat.distill.models.devices import find_device, own_devices
from sklformat.distill.models.identities import config_fingerprint, model_fingerprint
from sklformat.distill.text.corpus import tokenizer_fingerprint

TEXTS = ["def f(x):\n    return x + 1\n", "naïve café — 東京\t\x00\n", "for i in range(10): print(i)\n"] * 4


@pytest.fixture(scope="module")
def tokenizer():
    return tokenization.train_tokenizer(TEXTS, 300)


def tiny(**changes):
    settings = {"vocab_size": 300, "hidden_size": 32, "num_layers": 2, "num_heads": 2, "max_positions": 16, "seed": 3}
    return loading.new_llama(**settings | changes)


def test_tokenizer_gives_every_text_back(tokenizer):
    """Byte-level BPE loses nothing: texts with bytes never seen in training come back unchanged."""
    texts = [*TEXTS, "🜁 \r\n  x", "".join(map(chr, range(0x250)))]
    assert texts == [tokenizer.decode(ids) for ids in tokenization.TextEncoder(tokenizer, bos="none")(texts)]
    assert 300 == tokenization.num_ids(tokenizer) == len(tokenizer)
    assert 0 == tokenization.separator_id(tokenizer)


def test_tokenizer_training_repeats():
    """The same text gives the same tokenizer, so that caches made on two machines agree."""
    first, second = tokenization.train_tokenizer(TEXTS, 290), tokenization.train_tokenizer(iter(TEXTS), 290)
    assert tokenizer_fingerprint(first) == tokenizer_fingerprint(second)
    assert tokenizer_fingerprint(first) != tokenizer_fingerprint(tokenization.train_tokenizer(TEXTS, 291))
    with pytest.raises(ValueError, match="must be >= 257"):
        tokenization.train_tokenizer(TEXTS, 256)


def test_special_tokens_in_a_text_are_text(tokenizer):
    """A text that spells the separator cannot put a document boundary into the corpus."""
    ids = tokenization.TextEncoder(tokenizer, bos="none")(["a<|endoftext|>b"])[0]
    assert tokenization.separator_id(tokenizer) not in ids
    assert "a<|endoftext|>b" == tokenizer.decode(ids)


def test_saved_model_loads_in_transformers(tokenizer, tmp_path):
    """What save writes, transformers reads by itself: the same weights, the same ids, the same logits."""
    model = tiny(separator_id=0).eval()
    loading.save(model, tokenizer, tmp_path / "m")
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    loaded = loading.load_model(tmp_path / "m")
    ids = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        expected = outputs.logits(model, ids)
        assert torch.equal(expected, plain(ids).logits)
        assert torch.equal(expected, outputs.logits(loaded, ids))
    assert model_fingerprint(model) == model_fingerprint(loaded)
    assert tokenizer_fingerprint(tokenizer) == tokenizer_fingerprint(loading.load_tokenizer(tmp_path / "m"))
    assert not loaded.training
    assert torch.bfloat16 == loading.load_model(tmp_path / "m", dtype="bfloat16").dtype
    with pytest.raises(FileExistsError):
        loading.save(model, tokenizer, tmp_path / "m")
    assert {"m"} == {path.name for path in tmp_path.iterdir()}


def test_loading_prints_nothing(tokenizer, tmp_path, capfd):
    """Loading and saving leave stdout and stderr to the program, and the user's own log level as it was."""
    transformers.utils.logging.set_verbosity_info()
    try:
        loading.save(tiny(), tokenizer, tmp_path / "m")
        loading.load_model(tmp_path / "m")
        loading.load_tokenizer(tmp_path / "m")
        tokenization.TextEncoder(tokenizer, bos="none")(["x " * 5000])
        assert transformers.logging.INFO == transformers.utils.logging.get_verbosity()
    finally:
        transformers.utils.logging.set_verbosity_warning()
    assert ("", "") == tuple(capfd.readouterr())


def test_a_full_disk_is_named(tokenizer, tmp_path):
    """What safetensors says of it has neither number nor name."""
    model = loading.new_llama(
        vocab_size=300, hidden_size=32, num_layers=1, num_heads=2, max_positions=16, seed=0, separator_id=0
    )
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(OSError, match=f"{tmp_path}: the weights cannot be written: .*; make room or fix the disk"):
            loading.write(model, tokenizer, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_missing_weights_are_refused(tokenizer, tmp_path):
    """A model whose files lack weights raises; transformers alone would go on with random ones."""
    loading.save(tiny(), tokenizer, tmp_path / "m")
    config = json.loads((tmp_path / "m/config.json").read_text())
    (tmp_path / "m/config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(
        ValueError, match=r"not all weights of a LlamaForCausalLM are there \(missing_keys: model\.layers\.2"
    ):
        loading.load_model(tmp_path / "m")


@pytest.mark.parametrize("size", [0, 5, 1000])
def test_weights_cut_short_are_named(tokenizer, tmp_path, size):
    """A file of weights that was copied half way raises OSError, in one line with the path."""
    loading.save(tiny(), tokenizer, tmp_path / "m")
    weights = tmp_path / "m" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:size])
    with pytest.raises(OSError, match=rf"^{tmp_path}/m: cannot load a model \(.*\)$"):
        loading.load_model(tmp_path / "m")


def test_a_run_is_named_for_its_model(tokenizer, tmp_path):
    """The directory of a training run is not its model, which the message names."""
    loading.save(tiny(), tokenizer, tmp_path / "run" / "model")
    for load in (loading.load_model, loading.load_tokenizer):
        with pytest.raises(OSError, match=rf"^{tmp_path}/run: cannot load a .*; did you mean {tmp_path}/run/model\?"):
            load(tmp_path / "run")


def test_a_reason_is_not_cut_at_its_colon(tmp_path, monkeypatch):
    """What the first line of a reason announces is said as well; further lines are not."""
    (tmp_path / "tokenizer.json").touch()

    def fail(text):
        def from_pretrained(*_, **__):
            raise ValueError(text)

        monkeypatch.setattr(loading.transformers.AutoTokenizer, "from_pretrained", from_pretrained)

    fail("Couldn't instantiate the tokenizer from one of: \n(1) a file, \n(2) a slow tokenizer.\n")
    with pytest.raises(
        OSError, match=r"\(Couldn't instantiate the tokenizer from one of: \(1\) a file, \(2\) a slow t.*\)$"
    ):
        loading.load_tokenizer(tmp_path)
    fail("No such thing.\nMore about it")
    with pytest.raises(OSError, match=r"cannot load a tokenizer \(No such thing\.\)$"):
        loading.load_tokenizer(tmp_path)


def test_what_is_no_model_is_named(tmp_path):
    """A path without model or tokenizer raises OSError, in one line with the path."""
    for load in (loading.load_model, loading.load_tokenizer):
        for path in (tmp_path, tmp_path / "nowhere"):
            with pytest.raises(OSError, match=str(path)) as raised:
                load(path)
            assert "\n" not in str(raised.value)
        (tmp_path / "text").mkdir(exist_ok=True)
        (tmp_path / "text" / "a.txt").touch()
        with pytest.raises(
            OSError, match=r"text: cannot load a .*; the directory holds neither a model nor a tokenizer "
        ):
            load(tmp_path / "text")


def test_devices_are_checked_before_use(monkeypatch):
    """A device that is not here, or no device at all, is one line with what to use instead; auto is what there is."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert torch.device("cpu") == find_device("auto") == find_device("cpu")
    for name in ("cuda", "cuda:1"):
        with pytest.raises(ValueError, match=f"device {name}: no CUDA device here; use cpu"):
            find_device(name)
    for name in ("foo", "meta", "cuda:x", ""):
        with pytest.raises(ValueError, match=f"device '{name}' is not known; use auto, cpu"):
            find_device(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert torch.device("cuda") == find_device("auto")
    assert torch.device("cuda:1") == find_device("cuda:1")
    with pytest.raises(ValueError, match="the last CUDA device here is cuda:1"):
        find_device("cuda:2")


def test_new_model_is_a_function_of_its_seed():
    """Equal seeds give equal weights and leave the global generator alone; the sizes are Llama's."""
    torch.manual_seed(1)
    before = torch.get_rng_state()
    assert model_fingerprint(tiny()) == model_fingerprint(tiny())
    assert model_fingerprint(tiny()) != model_fingerprint(tiny(seed=4))
    assert torch.equal(before, torch.get_rng_state())
    # 4096·64·2 (embedding, head) + 2·(4·64² + 3·64·192 + 2·64) + 64
    model = loading.new_llama(vocab_size=4096, hidden_size=64, num_layers=2, num_heads=2, max_positions=128, seed=0)
    assert 631104 == sum(parameter.numel() for parameter in model.parameters())
    assert 192 == model.config.intermediate_size
    tied = tiny(tie=True)
    assert tied.get_input_embeddings().weight is heads.plain_weight(tied)
    with pytest.raises(ValueError, match="multiple of twice num_heads"):
        tiny(hidden_size=34)


def test_hidden_states_times_head_are_the_logits():
    """hidden @ weight.T equals the model's logits, and gradients through both reach every parameter."""
    model = tiny()
    ids = torch.arange(12).reshape(2, 6)
    hidden, weight = outputs.hidden_states(model, ids), heads.plain_weight(model)
    assert (2, 6, 32) == tuple(hidden.shape)
    np.testing.assert_allclose(outputs.logits(model, ids).detach(), (hidden @ weight.T).detach(), atol=1e-6)
    assert heads.plain_weight(tiny().bfloat16()) is not None
    (hidden @ weight.T).square().sum().backward()
    assert [] == [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert model.training


def test_heads_that_are_not_one_matrix_are_known():
    """A head with bias, or logits that are scaled, would make the chunked loss wrong: both are told apart."""
    config = transformers.GPTJConfig(vocab_size=64, n_positions=16, n_embd=16, n_layer=1, n_head=2, rotary_dim=4)
    biased = transformers.GPTJForCausalLM(config)
    assert heads.plain_weight(biased) is None
    config = transformers.CohereConfig(
        vocab_size=64,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        logit_scale=0.25,
    )
    assert heads.plain_weight(transformers.CohereForCausalLM(config)) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_caps_and_scales_are_known_where_they_hardly_show(dtype):
    """A cap far above the logits, and a scale of 1.01, are no single matrix in any type; neutral values are one."""
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2}

    def is_linear(kind, **changes):
        config = getattr(transformers, kind + "Config")(**sizes, **changes)
        torch.manual_seed(0)
        return heads.plain_weight(getattr(transformers, kind + "ForCausalLM")(config).to(dtype)) is not None

    capped = {"head_dim": 8, "pad_token_id": 0}
    assert not is_linear("Gemma2", final_logit_softcapping=30.0, **capped)
    assert is_linear("Gemma2", final_logit_softcapping=None, **capped)
    assert not is_linear("Granite", logits_scaling=1.01)
    assert is_linear("Granite", logits_scaling=1.0)


def test_a_scale_that_no_config_tells_is_found_in_float32(monkeypatch):
    """In float32 a tenth of a percent between head and logits is no rounding."""
    model = tiny()
    logits = outputs.logits
    assert heads.plain_weight(model) is not None
    monkeypatch.setattr(outputs, "logits", lambda model, ids: 1.001 * logits(model, ids))
    assert heads.plain_weight(model) is None


def test_fit_of_tokenizer_and_model(tokenizer):
    """A head narrower than the tokenizer is refused, a padded one allowed; positions beyond the model are refused."""
    assert 300 == loading.check_fit(tokenizer, tiny(), seq_len=16)
    assert 300 == loading.check_fit(tokenizer, tiny(vocab_size=320))
    with pytest.raises(ValueError, match="tokenizer has 300 ids, the model only 299; 1 of those"):
        loading.check_fit(tokenizer, tiny(vocab_size=299))
    with pytest.raises(ValueError, match="seq_len 17 is beyond the 16 positions"):
        loading.check_fit(tokenizer, tiny(), seq_len=17)


def test_model_fingerprint_covers_every_weight():
    """One changed weight, or the same numbers in another type, is another model."""
    model = tiny()
    before = model_fingerprint(model)
    with torch.no_grad():
        model.model.norm.weight[5] += 1e-3
    assert before != model_fingerprint(model)
    assert model_fingerprint(tiny()) != model_fingerprint(tiny().bfloat16())


def test_model_fingerprint_covers_the_config():
    """Equal weights with another rope_theta are another model; another path, version or dtype name is not."""
    model, other = tiny(), tiny()
    assert model_fingerprint(model) == model_fingerprint(other)
    other.config.rope_parameters = {**other.config.rope_parameters, "rope_theta": 500_000.0}
    assert model_fingerprint(model) != model_fingerprint(other)
    assert config_fingerprint(model) != config_fingerprint(other)
    moved = tiny()
    moved.config._name_or_path, moved.config.transformers_version = "/elsewhere", "9.9"
    assert config_fingerprint(model) == config_fingerprint(moved) == config_fingerprint(tiny().bfloat16())


def test_config_fingerprint_looks_into_configs_inside():
    """The type in memory is left out of a config's own parts too, what changes logits is not."""

    def digest(**text):
        return config_fingerprint(SimpleNamespace(config=SimpleNamespace(to_diff_dict=lambda: {"text_config": text})))

    assert digest(dtype="float32", head_dim=8) == digest(dtype="bfloat16", head_dim=8) != digest(head_dim=16)


def test_processes_share_a_machines_devices(monkeypatch):
    """Each process gets its own share of the GPUs; a number that does not divide is refused with both numbers."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    assert [[0, 1, 2, 3], [4, 5, 6, 7]] == [own_devices(rank, 2) for rank in range(2)]
    assert [7] == own_devices(7, 8)
    with pytest.raises(ValueError, match="8 CUDA devices for 3 processes"):
        own_devices(0, 3)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ValueError, match="0 CUDA devices for 1 processes"):
        own_devices(0, 1)
