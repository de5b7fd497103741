"""Draws from rows of which two real processes have a part each, against those of one that has whole rows."""

import pickle

import numpy as np
import part_runs
import pytest
import torch
from forked import run_ranks
from part_runs import BORDERS, LAWS, POSITIONS, drawn, problem

DTYPES = (torch.float32, torch.bfloat16)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    for done in run_ranks(2, part_runs.run, folder):
        assert done.status == 0, done.stderr
    return [pickle.loads((folder / f"{rank}.pickle").read_bytes()) for rank in range(2)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", LAWS)
def test_parts_that_begin_with_a_block_give_what_the_whole_gives(name, dtype, found):
    """Ids bit for bit, on both processes."""
    whole = drawn(LAWS[name], *problem(dtype))
    first, second = (each["at a block", name, dtype] for each in found)
    for key, values in whole.items():
        np.testing.assert_array_equal(first[key], second[key])
        if key == "weights":
            np.testing.assert_allclose(first[key], values, rtol=2e-6)
        elif key in ("ids", "offsets"):
            np.testing.assert_array_equal(first[key], values)
        else:
            np.testing.assert_allclose(first[key].astype(float), values.astype(float), rtol=1.5e-3, atol=2e-3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", LAWS)
def test_parts_that_begin_within_a_block_give_nearly_that(name, dtype, found):
    """Rounding may move a draw of a thousand to the neighbour, on rows of this width; the most probable ids never."""
    whole, parts = drawn(LAWS[name], *problem(dtype)), found[0]["within a block", name, dtype]
    if "offsets" not in whole:
        assert (whole["ids"] == parts["ids"]).mean() >= 0.999
        return
    records = [
        set(zip(np.repeat(range(POSITIONS), np.diff(r["offsets"])), r["ids"], strict=True)) for r in (whole, parts)
    ]
    assert len(records[0] ^ records[1]) <= (0.002 * len(records[0]) if "rounds" in LAWS[name] else 0)


def test_processes_meet_once_a_slice_and_for_the_ids(found):
    """The most probable ids are in what they exchange."""
    for each in found:
        for name, law in LAWS.items():
            slices = 3 if law["sampler"] in ("topk", "topp") else 6
            met = each["at a block", name, DTYPES[0], "met"]
            assert (slices, 3) == (len(met), met.count("all_gather"))


def test_positions_that_count_alone(found):
    counted = np.arange(POSITIONS) % 3 == 1
    whole = drawn(LAWS["multinomial"], *problem(torch.bfloat16), counted=counted)
    for key, values in whole.items():
        np.testing.assert_allclose(found[0]["at a block", "some"][key].astype(float), values, atol=2e-3)


def test_what_cannot_be_drawn_from_is_named_as_c_does(found):
    """With the id of the whole row, on all processes."""
    for each in found:
        for place in BORDERS:
            assert "position 33" in each[place, "fault"]
            assert "1400" in each[place, "fault"]
            assert "position 20" in each[place, "none"]


def test_parts_that_are_no_vocabulary(found):
    for each in found:
        assert each["apart"] == (
            "processes have the ids 0 to 19, 40 to 59; need parts that follow each other, none of them empty, up to 59"
        )
