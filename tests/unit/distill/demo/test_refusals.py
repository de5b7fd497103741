"""What the demo refuses by its own words, and what it does again."""

import json
from pathlib import Path

import pytest
from strategies import make_listed_cache

import sklformat as skl
from sklformat.distill.demo import stages
from sklformat.settings.cache import CacheConfig
from sklformat.settings.eval import EvalConfig


def test_a_damaged_cache(tmp_path):
    """A cache that is damaged between two runs is deleted, not trained on."""
    directory = make_listed_cache(tmp_path / "cache")
    path = min(directory.glob("*.skl"))
    data = bytearray(path.read_bytes())
    data[4096 + 70] ^= 1
    path.write_bytes(data)
    config = CacheConfig(teacher="t", text=(Path("x"),), out=directory, seq_len=3)
    with pytest.raises(skl.CorruptError, match=r"1 problems, the first: .*; delete this cache and run again"):
        stages._verify([config])


@pytest.mark.parametrize("there", ["{", '"text"', '{"lm_loss": 2.5, "num_sequences": 4}'])
def test_a_result_of_another_version_is_measured_again(tmp_path, monkeypatch, capfd, there):
    """What an earlier version wrote lacks fields; it is said and measured, and what this one wrote is kept."""
    config = EvalConfig(student="s", text=(Path("x"),), seq_len=8, out=tmp_path / "evaluation.json")
    monkeypatch.setattr(stages, "evaluate", lambda config: f"measured, {config.seq_len}")
    config.out.write_text(there)
    assert "measured, 8" == stages._evaluated(config)
    assert "evaluation.json: is not what this version writes; measuring again" in capfd.readouterr().err
    names = "num_sequences num_tokens bos lm_loss accuracy calibration_error confidence_gap reliability top1_agreement"
    config.out.write_text(json.dumps(dict.fromkeys([*names.split(), "acceptance_rate", "percent_ce_to_full"], 1)))
    assert 1 == stages._evaluated(config).bos
