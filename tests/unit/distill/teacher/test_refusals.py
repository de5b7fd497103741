"""What a teacher's run refuses, each refusal once by its own words; the tests of its parts say when."""

import dataclasses
from pathlib import Path

import pytest
import torch

import sklformat as skl
from sklformat.distill.teacher import provenance, ranks
from sklformat.distill.teacher.caching import draws_on_device
from sklformat.settings.cache import CacheConfig


class Company:
    """Two ranks, of which the other says what it is told to say."""

    rank = 0

    def __init__(self, other):
        self.other = other

    def gather(self, mine):
        return [mine, self.other]


def test_ranks_of_other_settings():
    """Ranks that differ are named with what differs."""
    header = skl.Header(vocab_size=9, seq_len=1, kind="counts", rounds=3)
    other = dataclasses.replace(header, sampling_seed=5)
    message = "rank 0 and rank 1 have other settings: sampling_seed: 0 != 5; give every rank the same teacher, text"
    with pytest.raises(skl.SettingsError, match=message):
        ranks._check_same(Company(other), header)


def test_weights_beyond_the_scale():
    """Importance weights that the format cannot hold are refused before the teacher runs."""
    config = CacheConfig(
        teacher="t", text=(Path("x"),), out="out", seq_len=8, proposal_temperature=4.0, unbiased_weights=True
    )
    message = r"unbiased weights at proposal_temperature 4\.0 may reach 2\^\d+, the format holds 2\^30; take a proposal"
    with pytest.raises(ValueError, match=message):
        provenance._scale_log2(config, 1 << 17)


def test_other_versions_of_libraries():
    """A cache that other versions began is resumed by these only where the user says so."""
    header = skl.Header(vocab_size=9, seq_len=1, kind="counts", rounds=3, capture={"versions": {"torch": "2"}})
    found = dataclasses.replace(header, capture={"versions": {"torch": "1"}})
    message = (
        r"out: begun with other versions \(there != now\): capture\.versions\.torch: '1' != '2'; install those, or"
    )
    with pytest.raises(skl.SettingsError, match=message):
        provenance.agree_on_versions(header, found, keep=False, place="out")


def test_more_records_than_processes_with_parts_draw():
    """C, which draws such captures on the host, has whole rows alone."""
    config = CacheConfig(
        teacher="t", text=(Path("x"),), out="out", seq_len=4096, sampler="topp", p=0.9, tensor_parallel=2
    )
    message = "65535 records at each of 4096 positions are more than the 134217728 that tensor_parallel draws; give a"
    with pytest.raises(skl.SettingsError, match=message):
        draws_on_device(config, torch.device("cpu"), 1 << 17)
