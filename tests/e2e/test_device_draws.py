"""cache_teacher where the teacher's device draws, here a CPU that is taken for one that does."""

import importlib.metadata
import re

import numpy as np
import pytest
import torch
from capture_data import shard_bytes
from teacher_data import SEQ_LEN, make_teacher

import sklformat as skl
from sklformat.distill import kernels
from sklformat.distill.models import loading
from sklformat.distill.teacher import caching, gpu_sampler, row_draws
from sklformat.distill.teacher.caching import cache_teacher
from sklformat.settings.cache import CacheConfig

COUNT, ROUNDS = 14, 20


@pytest.fixture
def on_device(monkeypatch):
    """Draw on the CPU by the device's sampler, and never by C."""
    monkeypatch.setattr(gpu_sampler, "DEVICES", ("cpu",))


@pytest.fixture
def config(place, tmp_path):
    def make(out="cache", **changes):
        settings = {
            "teacher": str(place / "teacher"),
            "text": (place / "text",),
            "out": tmp_path / out,
            "seq_len": SEQ_LEN,
            "num_sequences": COUNT,
            "rounds": ROUNDS,
            "batch_size": 3,
            "sequences_per_shard": 5,
            "seed": 2**63 + 5,
        }
        return CacheConfig(**settings | changes)

    return make


def draws(cache):
    """[positions, rounds] all draws of a cache, ascending."""
    return np.concatenate([np.repeat(s.targets.token_ids, s.targets.counts).reshape(-1, ROUNDS) for s in cache])


@pytest.mark.parametrize("sampler", ["multinomial", "systematic"])
def test_cache_has_the_draws_of_c_and_says_who_made_them(config, monkeypatch, sampler):
    """A sound cache with the tokens, and all but 0.1 % of the draws, of one that C drew; the header tells which."""
    cache_teacher(config("host", sampler=sampler))
    monkeypatch.setattr(gpu_sampler, "DEVICES", ("cpu",))
    monkeypatch.setattr(caching, "Drawer", None)
    summary = cache_teacher(config("device", sampler=sampler))
    assert [] == skl.verify(config("device").out)
    host, device = skl.open(config("host").out), skl.open(config("device").out)
    assert COUNT == len(device) == summary.sequences_made
    assert all(host[i].tokens.tolist() == device[i].tokens.tolist() for i in range(COUNT))
    assert (draws(host) == draws(device)).mean() >= 0.999
    records = sum(device[i].targets.num_records for i in range(COUNT))
    assert records / (COUNT * SEQ_LEN) == summary.unique_tokens
    assert ["capture.sampler.draws: None != 'device'"] == host.header.differences(device.header)


def test_the_next_sequence_is_queued_before_the_last_is_asked_for(config, on_device, monkeypatch):
    """One sequence is in flight, over batches and shards; results come in order."""
    log, draw, result = [], gpu_sampler.DeviceSampler.draw, gpu_sampler.Draws.result
    monkeypatch.setattr(
        gpu_sampler.DeviceSampler, "draw", lambda self, number, *rest: log.append(number) or draw(self, number, *rest)
    )
    monkeypatch.setattr(gpu_sampler.Draws, "result", lambda self: log.append(-self._sequence - 1) or result(self))
    cache_teacher(config())
    expected = [0]
    for number in range(1, COUNT):
        expected += [number, -number]
    assert [*expected, -COUNT] == log


def test_stopped_run_goes_on_to_the_same_bytes(config, on_device, monkeypatch):
    """Stopped while a sequence is in flight, at the beginning, within a batch and between shards, nothing is lost."""
    cache_teacher(config("whole"))
    result = gpu_sampler.Draws.result
    for stop_at in (0, 4, 10):

        def stopping(queued, stop_at=stop_at):
            if queued._sequence == stop_at:
                raise KeyboardInterrupt
            return result(queued)

        monkeypatch.setattr(gpu_sampler.Draws, "result", stopping)
        with pytest.raises(KeyboardInterrupt, match=rf"stopped: {stop_at} of {COUNT} sequences"):
            cache_teacher(config(f"stopped {stop_at}"))
        monkeypatch.setattr(gpu_sampler.Draws, "result", result)
        assert COUNT - stop_at == cache_teacher(config(f"stopped {stop_at}")).sequences_made
        assert shard_bytes(config("whole").out) == shard_bytes(config(f"stopped {stop_at}").out)


def test_draws_of_device_and_host_never_mix(config, monkeypatch):
    """Either goes on with its own caches only; the refusal shows both, and no byte changes."""
    cache_teacher(config("host"))
    monkeypatch.setattr(gpu_sampler, "DEVICES", ("cpu",))
    cache_teacher(config("device"))
    for out, devices, both in (("host", ("cpu",), "None != 'device'"), ("device", ("cuda",), "'device' != None")):
        before = shard_bytes(config(out).out)
        monkeypatch.setattr(gpu_sampler, "DEVICES", devices)
        for keep_versions in (False, True):
            with pytest.raises(skl.SettingsError, match=rf"capture\.sampler\.draws: {both}"):
                cache_teacher(config(out, keep_versions=keep_versions))
        assert before == shard_bytes(config(out).out)


WEIGHED = [
    {"sampler": "topk", "k": 5},
    {"sampler": "topp", "p": 0.8},
    {"rounds": 128},
    {"proposal_temperature": 0.8},
    {"proposal_temperature": 1.2, "sampler": "systematic", "unbiased_weights": True},
]


@pytest.mark.parametrize("change", WEIGHED, ids=str)
def test_records_with_weights_are_those_of_c(config, monkeypatch, change):
    """All but 0.1 % of the ids, in a sound cache, and no row is drawn from on the host."""
    cache_teacher(config("host", num_sequences=3, **change))
    monkeypatch.setattr(gpu_sampler, "DEVICES", ("cpu",))
    monkeypatch.setattr(caching, "Drawer", None)
    cache_teacher(config("device", num_sequences=3, **change))
    assert_alike(config)


def assert_alike(config):
    """The caches "host" and "device" have the same records but for 0.1 % of them."""
    assert [] == skl.verify(config("device").out)
    host, device = skl.open(config("host").out), skl.open(config("device").out)
    there, here = (
        [
            {(number, t, i) for t in range(s.targets.num_positions) for i in s.targets.token_ids[span(s, t)].tolist()}
            for number, s in enumerate(cache)
        ]
        for cache in (host, device)
    )
    same = sum(len(a & b) for a, b in zip(there, here, strict=True))
    assert same >= 0.999 * sum(len(a | b) for a, b in zip(there, here, strict=True))


def span(sequence, t):
    return slice(*sequence.targets.offsets[t : t + 2])


def test_kernels_sum_rows_and_the_header_has_their_version(config, monkeypatch):
    """Triton's version decides about rounding: it is one of those that a cache is begun with."""
    change = {"sampler": "topk", "k": 3, "num_sequences": 1}
    cache_teacher(config("host", **change))
    monkeypatch.setattr(gpu_sampler, "DEVICES", ("cpu",))
    monkeypatch.setattr(kernels, "run_on", lambda device: True)
    monkeypatch.setattr(row_draws, "sum_rows", None)
    cache_teacher(config("device", **change))
    assert_alike(config)
    versions = skl.open(config("device").out).header.capture["versions"]
    assert importlib.metadata.version("triton") == versions["triton"]
    monkeypatch.setattr(kernels, "run_on", lambda device: False)
    with pytest.raises(skl.SettingsError, match=r"begun with other versions .*triton: '.*' != None"):
        cache_teacher(config("device", **change))


def test_records_that_have_no_room_on_the_device_stay_with_c(config, monkeypatch):
    """Whether they have depends on the settings alone; then the bytes are those of the host."""
    change = {"sampler": "topp", "p": 0.9, "num_sequences": 2}
    cache_teacher(config("host", **change))
    monkeypatch.setattr(gpu_sampler, "DEVICES", ("cpu",))
    monkeypatch.setattr(gpu_sampler, "MAX_PLACES", SEQ_LEN * 280 - 1)
    cache_teacher(config("device", **change))
    assert shard_bytes(config("host").out) == shard_bytes(config("device").out)


def test_logits_that_are_not_finite_are_refused(config, on_device, place, tmp_path):
    """NaN stops the capture with sequence and position, as it does where C draws; nothing false is kept."""
    model = make_teacher()
    with torch.no_grad():
        model.lm_head.weight[7, 0] = float("nan")
    loading.save(model, loading.load_tokenizer(str(place / "teacher")), tmp_path / "bad")
    with pytest.raises(ValueError, match=re.escape("sequence 0, position 0: the logits hold NaN")):
        cache_teacher(config(teacher=str(tmp_path / "bad")))
    assert {} == shard_bytes(config().out)
