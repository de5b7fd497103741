"""``sklformat cache --engine vllm`` from text to cache, by an engine that schedules as vLLM does."""

import contextlib
import importlib.metadata
import os
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import engine_data
import numpy as np
import pytest
from capture_data import shard_bytes
from engine_data import FakeEngine
from teacher_data import SEQ_LEN

import sklformat as skl
from sklformat.cli import main
from sklformat.distill.engines import hooks, messages, plugin, serving, vllm
from sklformat.distill.models import hub, loading
from sklformat.distill.models.identities import checkpoint_fingerprint, config_fingerprint
from sklformat.errors import EngineError, SettingsError
from sklformat.sampler import draw
from sklformat.settings.cache import CacheConfig


class FakePlan:
    """As vllm.Plan, with the engine of engine_data."""

    version, hook, device, dtype, described = "0.0", "runner", "cpu", "float32", FakeEngine.described
    width = engine_data.WIDTH
    happens = ()

    def __init__(self, model, **given):
        assert given["seq_len"] == SEQ_LEN
        self.config = loading.load_model(model).config

    @contextlib.contextmanager
    def started(self, path):
        with messages.announced(self.hook, path):
            engine_data.try_layer_out()
            yield FakeEngine(budget=50, happens=dict(self.happens))


@pytest.fixture
def config(place, tmp_path, monkeypatch):
    monkeypatch.setattr(serving, "Plan", FakePlan)

    def make(out="cache", **changes):
        given = {"teacher": str(place / "teacher"), "text": (place / "text",), "out": tmp_path / out, "engine": "vllm"}
        given |= {"seq_len": SEQ_LEN, "num_sequences": 13, "rounds": 20, "sequences_per_shard": 5, "seed": 5}
        return CacheConfig(**given | changes)

    return make


def test_a_cache_from_an_engine(config, place):
    """Every row's draws are those of its logits; the header says who made it, and that nobody makes it again."""
    done = serving.cache(config())
    assert (13, 13, 13 * SEQ_LEN) == (done.sequences, done.sequences_made, done.positions)
    assert [] == skl.verify(done.directory)
    with skl.open(done.directory) as cache:
        capture = cache.header.capture
        assert {"name": "vllm", "hook": "runner", "tensor_parallel": 1} == capture["engine"]
        assert capture["repeatable"] is False
        assert capture["versions"]["vllm"] == "0.0"
        assert "batch_size" not in capture
        teacher = SimpleNamespace(config=loading.load_model(place / "teacher").config)
        assert config_fingerprint(teacher) == capture["teacher"]["config"]
        assert checkpoint_fingerprint(place / "teacher", teacher) == cache.header.teacher_fingerprint
        for number, sequence in enumerate(cache):
            logits = engine_data.logits_of(sequence.tokens)
            assert draw(logits, rounds=20, sampler="systematic", seed=5, sequence=number) == sequence.targets


def test_a_run_that_ends_early_is_resumed(config, monkeypatch):
    """The engine dies in the middle; the same command keeps what is there, and the cache is that of one run."""
    whole = serving.cache(config("whole"))
    monkeypatch.setattr(FakePlan, "happens", {5: "die"}.items())
    with pytest.raises(EngineError, match="the engine has ended"):
        serving.cache(config())
    monkeypatch.setattr(FakePlan, "happens", ())
    done = serving.cache(config())
    assert 0 < done.sequences_made < 13
    assert shard_bytes(whole.directory) == shard_bytes(done.directory)
    assert 0 == serving.cache(config()).sequences_made


def test_another_engine_is_another_cache(config, monkeypatch):
    """A cache that an engine began is not resumed by transformers, nor by the engine's other version unless asked."""
    serving.cache(config(num_sequences=10))
    other = config(engine="transformers", num_sequences=15)
    with pytest.raises(SettingsError, match="engine"):
        serving.cache(other)
    monkeypatch.setattr(FakePlan, "version", "0.1")
    with pytest.raises(SettingsError, match=r"begun with other versions.*0\.0"):
        serving.cache(config(num_sequences=15))
    assert 5 == serving.cache(config(num_sequences=15, keep_versions=True)).sequences_made


def test_the_command(config, place, tmp_path, capfd):
    """The same by flags; inspect shows what the header says."""
    flags = ("--engine", "vllm", "--teacher", place / "teacher", "--text", place / "text", "--out", tmp_path / "cache")
    assert 0 == main(["cache", *map(str, (*flags, "--seq-len", SEQ_LEN, "--num-sequences", 3))])
    assert 0 == main(["inspect", str(tmp_path / "cache")])
    assert 0 == main(["verify", str(tmp_path / "cache")])
    assert 0 == main(["check", str(tmp_path / "cache"), "--tokens", str(tmp_path / "cache" / "tokens")])
    out, err = capfd.readouterr()
    assert "3 made now" in out
    assert "capture.repeatable" in out
    assert "starting vllm 0.0 (hook: runner)" in err


def test_torchrun_is_not_for_engines(config, monkeypatch):
    """Its processes would all start an engine on the same devices."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(EngineError, match="starts its own processes, one per device of tensor_parallel"):
        serving.cache(config())


def test_an_adapter_is_not_for_engines(config, place, tmp_path):
    """It is named before the engine is started."""
    adapter = tmp_path / "adapter"
    loading.load_tokenizer(place / "teacher").save_pretrained(adapter)
    (adapter / "adapter_config.json").write_text('{"base_model_name_or_path": "x"}')
    with pytest.raises(SettingsError, match="is an adapter, engine vllm runs whole models"):
        serving.cache(config(teacher=str(adapter)))


def test_a_checkpoint_is_known_by_its_files(place, tmp_path):
    """Other bytes, another name or another config: another fingerprint; no weights: refused."""
    model = loading.load_model(place / "teacher")
    (tmp_path / "a.safetensors").write_bytes(b"weights")
    first = checkpoint_fingerprint(tmp_path, model)
    (tmp_path / "README.md").write_text("no weights")
    assert first == checkpoint_fingerprint(tmp_path, model)
    (tmp_path / "a.safetensors").write_bytes(b"weighty")
    second = checkpoint_fingerprint(tmp_path, model)
    (tmp_path / "a.safetensors").rename(tmp_path / "b.safetensors")
    third = checkpoint_fingerprint(tmp_path, model)
    assert 4 == len({first, second, third, checkpoint_fingerprint(tmp_path, SimpleNamespace(config=None))})
    with pytest.raises(FileNotFoundError, match=r"holds no weights \(\.safetensors"):
        checkpoint_fingerprint(place / "text", model)


def test_a_name_on_the_hub_is_its_snapshot(monkeypatch, tmp_path):
    """A directory is taken as it is; what the hub has is asked for by name and revision."""
    asked = []
    monkeypatch.setattr(
        hub.huggingface_hub, "snapshot_download", lambda *names, **how: asked.append((names, how)) or "/snapshot"
    )
    assert tmp_path == hub.find_directory(str(tmp_path), revision=None, local=True)
    assert Path("/snapshot") == hub.find_directory("some/model", revision="r1", local=True)
    assert [(("some/model",), {"revision": "r1", "local_files_only": True})] == asked


# --- the door, without vLLM ------------------------------------------------------------------------------------------


@pytest.fixture
def installed(monkeypatch):
    """Have vLLM seem to be installed, and its plug-ins be what is given."""
    points = [SimpleNamespace(name="sklformat")]
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "9.9")
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: points)
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    for name in vllm._SURROUNDINGS:  # so that they are as before afterwards
        monkeypatch.setenv(name, "")
    return points


def plan():
    return vllm.Plan(Path("model"), dtype="auto", seq_len=8)


def test_an_engine_that_is_not_installed():
    """The sentence says why sklformat does not install it."""
    with pytest.raises(EngineError, match="engine vllm needs vLLM, which sklformat does not install"):
        plan()


def test_a_plugin_that_vllm_does_not_load(installed, monkeypatch):
    """An old installation, or a list of plug-ins without ours."""
    monkeypatch.setenv("VLLM_PLUGINS", "other,more")
    with pytest.raises(EngineError, match="VLLM_PLUGINS=other,more keeps vLLM from loading the plug-in sklformat"):
        plan()
    installed.clear()
    with pytest.raises(EngineError, match="vLLM cannot find the plug-in of sklformat"):
        plan()


def test_a_model_that_vllm_does_not_serve(installed, monkeypatch):
    """In one line, with its reason."""

    def refuse(**given):
        assert given["enable_prefix_caching"] is False
        assert given["max_model_len"] == 9
        raise ValueError("no such\narchitecture")

    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(EngineArgs=refuse))
    platforms = SimpleNamespace(current_platform=SimpleNamespace(device_type="cpu"))
    monkeypatch.setitem(sys.modules, "vllm.platforms", platforms)
    with pytest.raises(EngineError, match="model: vLLM does not serve it: no such architecture"):
        plan()


def test_a_device_whose_memory_is_not_known(installed, monkeypatch):
    """Before anything is started, since the worker would fail at its first row."""
    model = SimpleNamespace(hf_config=None, get_vocab_size=lambda: 300)
    engine = SimpleNamespace(create_engine_config=lambda: SimpleNamespace(model_config=model))
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(EngineArgs=lambda **_: engine))
    platforms = SimpleNamespace(current_platform=SimpleNamespace(device_type="tpu"))
    monkeypatch.setitem(sys.modules, "vllm.platforms", platforms)
    with pytest.raises(EngineError, match="vLLM runs on tpu here, draws are known on cpu and cuda"):
        plan()


def test_a_path_that_no_socket_has(monkeypatch, tmp_path):
    """The system's own words would name neither the path nor what decides it."""
    place = tmp_path / ("x" * 100)
    place.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    with pytest.raises(EngineError, match="a socket takes 107; set TMPDIR to a directory with a shorter path"):
        messages.listening().__enter__()
    assert [] == list(place.iterdir())


def test_an_engine_that_has_died(monkeypatch):
    """vLLM's own error becomes one of ours, also where a request is the first to find out."""
    error = type("EngineDeadError", (Exception,), {})
    monkeypatch.setitem(sys.modules, "vllm.v1.engine.exceptions", SimpleNamespace(EngineDeadError=error))
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(SamplingParams=dict))

    def find_out(*_):
        raise error

    scheduler = SimpleNamespace(max_num_batched_tokens=2048, max_num_seqs=64)
    of_model = SimpleNamespace(max_model_len=129)
    config = SimpleNamespace(scheduler_config=scheduler, model_config=of_model)
    served = vllm.Served(
        SimpleNamespace(vllm_config=config, step=find_out, add_request=find_out),
        SimpleNamespace(hook="runner", described="vllm 9.9"),
    )
    assert 48 == served.window
    with pytest.raises(EngineError, match=r"vllm 9\.9: the engine has ended, its own messages are above"):
        served.submit(0, np.arange(4, dtype=np.uint32))
    with pytest.raises(EngineError, match=r"vllm 9\.9: the engine has ended, its own messages are above"):
        served.step()


def test_the_plugin_is_quiet_elsewhere(monkeypatch):
    """In a vLLM that is nobody's capture it changes nothing; in a capture it wraps what is known, once or twice."""
    hooked = []
    monkeypatch.setattr(vllm, "hook_in", hooked.append)
    plugin.register()
    assert [] == hooked
    assert messages.ADDRESS not in os.environ
    for hook in ("runner", "layer"):
        with messages.announced(hook, "/a/path"):
            plugin.register()
            plugin.register()
    assert ["runner", "runner", "layer", "layer"] == hooked
    assert messages.find_address() is None


def test_the_plugin_is_registered():
    """Under the name that VLLM_PLUGINS may have to list."""
    [point] = [p for p in importlib.metadata.entry_points(group="vllm.general_plugins") if p.name == vllm.PLUGIN]
    assert plugin.register is point.load()


@pytest.mark.parametrize("kind", engine_data.RUNNERS)
def test_a_runner_is_wrapped_where_it_is_known(kind, monkeypatch):
    """Found by module and class; of a version that has another method, or none, nothing is touched."""
    _, method = engine_data.RUNNERS[kind]
    owner = type(method.owner, (engine_data.RUNNERS[kind][0],), {})
    original = getattr(owner, method.name)
    other = next(m for _, m in engine_data.RUNNERS.values() if m is not method)
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace())
    monkeypatch.setitem(sys.modules, method.module, SimpleNamespace(**{method.owner: owner}))
    monkeypatch.setitem(sys.modules, other.module, None)
    whole = SimpleNamespace(use_v2_model_runner=method is hooks.SECOND_RUNNER)
    assert vllm._is_runner_known(whole)
    vllm.hook_in("runner")
    assert getattr(owner, method.name).__wrapped__ is original
    monkeypatch.setattr(owner, method.name, lambda self, more: None)
    assert not vllm._is_runner_known(whole)
    assert not vllm._is_runner_known(SimpleNamespace(use_v2_model_runner=method is hooks.FIRST_RUNNER))


def test_masks_come_from_the_sequences(config, monkeypatch):
    """Positions that predict no answer get no record, whatever shows their rows."""
    counted = np.arange(SEQ_LEN) % 3 == 0
    monkeypatch.setattr("sklformat.distill.text.packing.PackedSequences.counted", lambda packed, sequence: counted)
    with skl.open(serving.cache(config()).directory) as cache:
        for sequence in cache:
            assert counted.tolist() == (np.diff(sequence.targets.offsets) > 0).tolist()
