import itertools

import pytest

from sklformat.distill.student.schedule import decay_start, learning_rate_at
from sklformat.settings.train import TrainConfig


def config_of(**changes):
    values = {"out": "run", "cache": "cache", "steps": 100, "warmup": 0.1, "learning_rate": 1.0}
    return TrainConfig(**(values | changes))


def rates_of(**changes):
    config = config_of(**changes)
    return [learning_rate_at(step, config) for step in range(config.steps)]


def test_learning_rate_rises_then_falls_to_a_tenth():
    """A linear rise over the warm-up, the peak once, then a cosine down to a tenth."""
    rates = rates_of()
    assert [0.1, 0.2, 1.0, 1.0] == pytest.approx([rates[0], rates[1], rates[9], rates[10]])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[55] == pytest.approx(0.55, abs=1e-6)
    assert rates[99] == pytest.approx(0.1, abs=1e-3)


def test_a_line_falls_evenly_to_its_end():
    """linear: the same loss of rate in each step, down to the share that is asked for."""
    rates = rates_of(schedule="linear", min_learning_rate=0.0)
    assert [1.0, 0.5] == pytest.approx([rates[10], rates[55]])
    assert {round(a - b, 9) for a, b in itertools.pairwise(rates[10:])} == {round(1 / 90, 9)}


def test_a_constant_rate_does_not_know_the_length():
    """constant: the peak for ever; with warm-up counted in steps, a longer run has the same rates."""
    rates = rates_of(schedule="constant", warmup_steps=7)
    assert {1.0} == set(rates[6:])
    assert rates == rates_of(schedule="constant", warmup_steps=7, steps=300)[:100]


def test_wsd_falls_at_the_end_alone():
    """wsd: the peak until the last share of the steps, then a line; a longer run has the same rates until there."""
    config = config_of(schedule="wsd", decay=0.25, warmup_steps=4, min_learning_rate=0.2)
    assert 75 == decay_start(config)
    rates = rates_of(schedule="wsd", decay=0.25, warmup_steps=4, min_learning_rate=0.2)
    assert {1.0} == set(rates[3:76])
    assert [1 - 0.8 * 12 / 25, 1 - 0.8 * 24 / 25] == pytest.approx([rates[87], rates[99]])
    longer = rates_of(schedule="wsd", decay=0.25, warmup_steps=4, min_learning_rate=0.2, steps=200)
    assert rates[:76] == longer[:76]


def test_a_fall_waits_for_the_end_of_the_rise():
    """Where warm-up and decay would overlap, the fall begins where the rise ends."""
    rates = rates_of(schedule="wsd", warmup=0.5, decay=0.9)
    assert [1.0, 1.0] == pytest.approx(rates[49:51])
    assert rates[50:] == sorted(rates[50:], reverse=True)
