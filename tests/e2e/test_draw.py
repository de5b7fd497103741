"""From logits through a shard and back: what a student reads is what the sampler drew."""

import numpy as np
import pytest
from chance import DEVIATE, power_law, repeat
from reference_sampler import dense, probabilities

import sklformat as skl

POSITIONS, VOCAB_SIZE = 400, 3000
# A code is the nearest of 128 to a weight's ratio to the one before: off by at most half the widest step between two.
CODE_ERROR = 2.0 ** (253 / 2048) - 1


def teacher_row():
    return power_law(VOCAB_SIZE, 1.2)


def through_a_shard(directory, targets, **settings):
    """Targets as a reader gets them, and the header they came with."""
    header = skl.Header(vocab_size=VOCAB_SIZE, seq_len=POSITIONS, **settings)
    path = directory / "shard-00000.skl"
    with skl.ShardWriter(path, header=header) as writer:
        writer.append(np.zeros(POSITIONS + 1, int), targets)
    assert [] == skl.verify(path)
    with skl.open(path) as cache:
        return cache[0].targets, cache.header


def by_id(targets):
    return np.argsort(np.repeat(np.arange(targets.num_positions), np.diff(targets.offsets)) * 2**32 + targets.token_ids)


@pytest.mark.parametrize("sampler", ["multinomial", "systematic"])
def test_counts_come_back_as_drawn(tmp_path, sampler):
    """Up to 127 rounds the shard holds the counts themselves."""
    drawn = skl.draw(repeat(teacher_row(), POSITIONS), 127, sampler, seed=5, sequence=0)
    found, header = through_a_shard(tmp_path, drawn, kind="counts", rounds=127, sampler=sampler)
    assert drawn == found
    assert (127, sampler) == (header.rounds, header.sampler)


@pytest.mark.parametrize("sampler", ["multinomial", "systematic"])
def test_many_rounds_go_through_ratios(tmp_path, sampler):
    """1000 rounds: every drawn id comes back, its share within half a step of the code, and the mean is p."""
    row = teacher_row()
    drawn = skl.draw(repeat(row, POSITIONS), 1000, sampler, seed=6, sequence=0)
    settings = {"kind": "ratios", "rounds": 1000, "sampler": sampler, "record_count_size": 2}
    found, header = through_a_shard(tmp_path, drawn, **settings)
    order = by_id(found)
    assert drawn.offsets.tolist() == found.offsets.tolist()
    assert drawn.token_ids.tolist() == found.token_ids[order].tolist()
    np.testing.assert_allclose(found.weights[order], drawn.weights, rtol=CODE_ERROR)
    assert 1000 == header.rounds
    law = probabilities(row)
    head = law > 0.01
    np.testing.assert_allclose(dense(found, VOCAB_SIZE).mean(0)[head], law[head], rtol=0.03)


@pytest.mark.parametrize("t", [0.8, 1.2])
def test_unbiased_weights_need_a_scale_and_keep_their_sum(tmp_path, t):
    """Weights p / q / rounds may pass 1: the header's scale takes them, and they still sum to 1 on average only."""
    row = teacher_row()
    rows = repeat(row, POSITIONS)
    drawn = skl.draw(rows, 2, proposal_temperature=t, self_normalise=False, seed=7, sequence=0)
    assert drawn.weights.max() > 1
    settings = {"kind": "ratios", "rounds": 2, "proposal_temperature": t}
    with pytest.raises(ValueError, match=r"not in \(0, scale\]"):
        through_a_shard(tmp_path, drawn, **settings)
    (tmp_path / "shard-00000.skl.partial").unlink()
    found, header = through_a_shard(tmp_path, drawn, scale_log2=4, **settings)
    order = by_id(found)
    assert 4 == header.scale_log2
    assert drawn.token_ids.tolist() == found.token_ids[order].tolist()
    np.testing.assert_allclose(found.weights[order], drawn.weights, rtol=CODE_ERROR)
    sums = np.add.reduceat(found.weights, found.offsets[:-1])
    assert np.abs(sums - 1).max() > 0.1
    law, proposal = probabilities(row), probabilities(row, t)
    deviation = np.sqrt(((law**2 / proposal).sum() - 1) / 2 / POSITIONS)
    assert abs(sums.mean() - 1) < DEVIATE * deviation + CODE_ERROR / 4
