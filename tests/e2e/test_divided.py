"""Two processes with a part each of one teacher capture what a process with the whole teacher does."""

import json

import divided_runs
import forked
import numpy as np
import pytest
from capture_data import shard_bytes
from teacher_data import SEQ_LEN, make_teacher, write_text

import sklformat as skl
from sklformat.cli import main
from sklformat.distill.models import loading, tokenization
from sklformat.distill.teacher.caching import cache_teacher
from sklformat.errors import SettingsError
from sklformat.settings.cache import CacheConfig

HEAD, SEQUENCES = 291, 14  # rows of the head, 11 of which are padding
COLUMNS = "label_logprob,entropy,record_logprob"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Text, a teacher with a padded head, and what one process makes of them."""
    folder = tmp_path_factory.mktemp("divided")
    tokenizer = tokenization.train_tokenizer(write_text(folder / "text"), 280)
    loading.save(make_teacher(HEAD), tokenizer, folder / "teacher")
    assert divided_runs.capture(words(folder, folder / "whole"), (280, HEAD), folder) == 0
    divided_runs.write_teachers(folder)
    return folder


def words(place, out, **more):
    flags = {"teacher": place / "teacher", "text": place / "text", "out": out, "seq-len": SEQ_LEN, "batch-size": 3}
    flags |= {"num-sequences": SEQUENCES, "sequences-per-shard": 5, "rounds": 20, "columns": COLUMNS, **more}
    return ["cache", *(str(word) for name, value in flags.items() for word in (f"--{name}", value)), "--json"]


@pytest.fixture(scope="module")
def divided(place):
    """What two make of them, in parts: the most rows of whole logits on either, and heads of other kinds."""
    given = words(place, place / "divided", **{"tensor-parallel": 2})
    for done in forked.run_ranks(2, divided_runs.capture, given, (280, HEAD), place):
        assert done.status == 0, done.stderr
    for done in forked.run_ranks(2, divided_runs.heads, place):
        assert done.status == 0, done.stderr
    return {
        name: [json.loads((place / f"{name}-{rank}.json").read_text()) for rank in range(2)]
        for name in ("rows", "heads")
    }


def test_the_cache_is_that_of_one_process(place, divided):
    """Draws but for rounding, columns but for their last bits, and the header but for who drew."""
    assert [] == skl.verify(place / "divided")
    whole, parts = skl.open(place / "whole"), skl.open(place / "divided")
    assert len(whole) == len(parts) == SEQUENCES
    same = total = 0
    for one, other in zip(whole, parts, strict=True):
        np.testing.assert_array_equal(one.tokens, other.tokens)
        drawn = [np.repeat(s.targets.token_ids, s.targets.counts) for s in (one, other)]
        same, total = same + int((drawn[0] == drawn[1]).sum()), total + drawn[0].size
        for name in ("label_logprob", "entropy"):
            np.testing.assert_allclose(one.columns[name], other.columns[name], rtol=2e-3, atol=2e-3)
    assert same >= 0.999 * total
    mine, theirs = whole.header.capture, parts.header.capture
    assert theirs["teacher"] == mine["teacher"] | {"tensor_parallel": 2}
    assert theirs["sampler"] == mine["sampler"] | {"draws": "device"}
    assert whole.header.teacher_fingerprint == parts.header.teacher_fingerprint


def test_no_process_has_whole_logits(place, divided):
    """One that has the whole teacher has them."""
    assert json.loads((place / "rows-None.json").read_text()) >= SEQ_LEN
    assert [0, 0] == divided["rows"]


@pytest.mark.parametrize("kind", divided_runs.TEACHERS)
def test_heads_that_are_more_than_a_matrix(kind, divided):
    """Their parts give the logits of the whole, and the weights are known by the same fingerprint."""
    for each in divided["heads"]:
        apart, is_known = each[kind]
        assert apart < 1e-5
        assert is_known


def test_a_rank_that_dies_ends_the_other_and_the_rest_is_as_it_was(place, divided):
    """Byte for byte, on as many processes; on another number the cache is refused."""
    given = words(place, place / "resumed", **{"tensor-parallel": 2})
    left, died = forked.run_ranks(2, divided_runs.capture_dying, given, 8)
    assert (1, 9) == (left.status, died.status)
    [line] = [line for line in left.stderr.splitlines() if line.startswith("sklformat cache: ")]
    assert "rank 0: another rank of this run has ended" in line
    assert "same command again to resume" in line
    with pytest.raises(SettingsError, match="tensor_parallel"):
        cache_teacher(
            CacheConfig(
                teacher=str(place / "teacher"), text=(place / "text",), out=place / "resumed", seq_len=SEQ_LEN,
                batch_size=3, num_sequences=SEQUENCES, sequences_per_shard=5, rounds=20, columns=(COLUMNS,),
            )
        )  # fmt: skip
    for done in forked.run_ranks(2, main, given):
        assert done.status == 0, done.stderr
    assert shard_bytes(place / "divided") == shard_bytes(place / "resumed")


def test_so_many_processes_as_parts(place):
    with pytest.raises(SettingsError, match=r"tensor_parallel 2 with 1 processes: all of a run have a part of the one"):
        cache_teacher(
            CacheConfig(teacher=str(place / "teacher"), text=(place / "text",), out=place / "x", tensor_parallel=2)
        )
