"""Capture: what the teacher hands over is what the shards hold, and every failure is told to the teacher."""

import dataclasses
import itertools
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from capture_data import (
    HEADER,
    NUM_SEQUENCES,
    PER_SHARD,
    draws_of,
    open_capture,
    push_all,
    shard_bytes,
    tokens_of,
    wait_for_durable,
    write_undisturbed,
)
from operation_data import run_until_call
from system import open_descriptors, wait_for

import sklformat as skl
from sklformat.cache.contents import mark_unfinished
from sklformat.cache.manifest import remove_manifest
from sklformat.cache.recovery import unseal
from sklformat.capture import Capture, ShardWork, merge_draws
from sklformat.capture.advance import find_advance
from sklformat.format import layout


def names(directory):
    return {path.name for path in directory.iterdir()}


def children():
    """Process ids of the processes that this one has started, zombies included."""
    return {pid for task in Path("/proc/self/task").iterdir() for pid in (task / "children").read_text().split()}


@pytest.fixture(autouse=True)
def nothing_leaks():
    """No test leaves a descriptor or a child process behind."""
    descriptors, processes = open_descriptors(), children()
    yield
    assert open_descriptors() <= descriptors
    assert children() <= processes


def test_draws_become_the_shards_a_plain_writer_makes(tmp_path):
    """The way through ring and writer process changes no byte; the manifest is written; all is durable at the end."""
    expected = write_undisturbed(tmp_path / "plain")
    with open_capture(tmp_path / "cache") as capture:
        works = list(capture.shards())
        push_all(capture)
    assert [ShardWork(0, 0, 4, 0), ShardWork(1, 4, 4, 4), ShardWork(2, 8, 3, 8)] == works
    assert expected == shard_bytes(tmp_path / "cache")
    assert (NUM_SEQUENCES, []) == (capture.durable, skl.verify(tmp_path / "cache"))
    assert {"manifest.json", *expected} == names(tmp_path / "cache")
    assert NUM_SEQUENCES == len(skl.open(tmp_path / "cache"))


def test_counts_and_draws_are_the_same(tmp_path):
    """Pushing (id, count) pairs gives the bytes that pushing their draws gives, for sequences of any length."""
    header = dataclasses.replace(HEADER, seq_len=0)
    for name in ("draws", "pairs"):
        with open_capture(tmp_path / name, header=header, num_sequences=3) as capture:
            for i in range(3):
                tokens, draws = tokens_of(i)[: 10 + i], draws_of(i)[: 9 + i]
                if name == "draws":
                    capture.push_draws(i, tokens, draws.astype(np.int32))
                else:
                    capture.push(i, tokens, merge_draws(draws))
    assert shard_bytes(tmp_path / "draws") == shard_bytes(tmp_path / "pairs")


def test_weights_and_columns_arrive(tmp_path):
    """Weights go through the ring as they are, and so do columns; positions without a record stay without."""
    names = tuple(layout.COLUMNS)
    header = skl.Header(vocab_size=1000, seq_len=3, kind="ratios", rounds=0, sampler="topk", columns=names)
    targets = skl.SparseTargets(token_ids=[5, 7, 1], weights=[0.5, 0.25, 1.0], offsets=[0, 2, 2, 3])
    columns = {
        "entropy": [0.5, 0.0, 2.5],
        "label_logprob": np.array([-1.0, 0.0, -3.0], np.float32),
        "document_start": [True, False, False, True],
        "record_logprob": [-0.5, -1.5, -0.25],
    }
    with Capture(tmp_path / "c", header=header, num_sequences=1, sequences_per_shard=1) as capture:
        capture.push(0, [1, 2, 3, 4], targets, columns)
    sequence = skl.open(tmp_path / "c")[0]
    np.testing.assert_array_equal([1, 2, 3, 4], sequence.tokens)
    np.testing.assert_array_equal([0, 2, 2, 3], sequence.targets.offsets)
    np.testing.assert_allclose([0.5, 0.25, 1.0], sequence.targets.weights, rtol=0.01)
    for name, values in columns.items():
        np.testing.assert_array_equal(values, sequence.columns[name])


def test_columns_of_draws_arrive(tmp_path):
    """Draws have a log-prob each; the records made of them keep that of their id, in counts pushed as pairs too."""
    header = dataclasses.replace(HEADER, columns=tuple(layout.COLUMNS))
    rng = np.random.default_rng(0)
    known = -np.arange(1000) / 8  # of each id
    tokens, draws = tokens_of(0), draws_of(0)
    columns = {
        "entropy": rng.random(32),
        "label_logprob": -rng.random(32),
        "document_start": np.arange(33) % 5 == 0,
        "record_logprob": np.asfortranarray(known[draws]),
    }
    targets = merge_draws(draws)
    for name in ("draws", "pairs"):
        with open_capture(tmp_path / name, header=header, num_sequences=1) as capture:
            if name == "draws":
                capture.push_draws(0, tokens, draws, columns)
            else:
                capture.push(0, tokens, targets, columns | {"record_logprob": known[targets.token_ids]})
    assert shard_bytes(tmp_path / "draws") == shard_bytes(tmp_path / "pairs")
    sequence = skl.open(tmp_path / "draws")[0]
    np.testing.assert_array_equal(known[targets.token_ids], sequence.columns["record_logprob"])
    np.testing.assert_array_equal(columns["document_start"], sequence.columns["document_start"])


@pytest.mark.parametrize("kept", [0, 1, 20, 32])
def test_positions_that_do_not_count_get_no_records(tmp_path, kept):
    """Draws of some positions alone stand at their places; the others have no record, no log-prob and no entropy."""
    header = dataclasses.replace(HEADER, columns=("entropy", "record_logprob"))
    counted = np.isin(np.arange(32), np.random.default_rng(kept).choice(32, kept, replace=False))
    known = -np.arange(1000) / 8
    tokens, draws = tokens_of(0), draws_of(0)
    entropy = np.where(counted, np.arange(32) / 8, 0)
    columns = {"entropy": entropy, "record_logprob": known[draws[counted]]}
    with open_capture(tmp_path / "cache", header=header, num_sequences=1) as capture:
        for wrong in (counted[1:], counted.astype(int), ~counted, counted[None]):
            if wrong.ndim != 1 or wrong.dtype != np.bool_ or wrong.sum() != kept:
                with pytest.raises(ValueError, match=f"counted must be booleans .T., True at {kept} positions"):
                    capture.push_draws(0, tokens, draws[counted], columns, wrong)
        capture.push_draws(0, tokens, draws[counted], columns, counted)
    assert [] == skl.verify(tmp_path / "cache")
    found = skl.open(tmp_path / "cache")[0]
    every, rows = merge_draws(draws), np.flatnonzero(counted)
    assert np.where(counted, np.diff(every.offsets), 0).tolist() == np.diff(found.targets.offsets).tolist()
    for row in rows:
        begin, end = found.targets.offsets[row : row + 2]
        part = slice(*every.offsets[row : row + 2])
        assert every.token_ids[part].tolist() == found.targets.token_ids[begin:end].tolist()
        assert every.counts[part].tolist() == found.targets.counts[begin:end].tolist()
    assert entropy.tolist() == found.columns["entropy"].tolist()
    assert known[found.targets.token_ids].tolist() == found.columns["record_logprob"].tolist()


def test_order_and_shapes_are_checked_before_the_ring(tmp_path):
    """Sequences come in order within a shard, and what cannot fit the header is refused at once; nothing is lost."""
    expected = write_undisturbed(tmp_path / "plain")
    targets = merge_draws(draws_of(0))
    with open_capture(tmp_path / "cache", ring_bytes=8192) as capture:
        with pytest.raises(ValueError, match="sequence 1 pushed, 0 is due; a shard's sequences come in order"):
            capture.push(1, tokens_of(1), targets)
        capture.push(0, tokens_of(0), targets)
        for wrong in (0, 2, 4, NUM_SEQUENCES, -1):
            with pytest.raises(ValueError, match=f"sequence {wrong} pushed, 1 is due"):
                capture.push(wrong, tokens_of(1), targets)
        for message, tokens, draws, columns in (
            ("10 draws per position, the header's rounds is 20", tokens_of(1), draws_of(1)[:, :10], None),
            ("32 tokens and 32 positions", tokens_of(1)[1:], draws_of(1), None),
            ("5 positions, the header's seq_len is 32", tokens_of(1)[:6], draws_of(1)[:5], None),
            ("columns .'entropy'. given", tokens_of(1), draws_of(1), {"entropy": np.zeros(32)}),
            (r"tokens must be in \[0", -1 - tokens_of(1), draws_of(1), None),
            ("draws must be integers", tokens_of(1), draws_of(1).astype(float), None),
        ):
            with pytest.raises(ValueError, match=message):
                capture.push_draws(1, tokens, draws, columns)
        weights = skl.SparseTargets(token_ids=[1], weights=[1.0], offsets=[0, 1])
        with pytest.raises(ValueError, match="the targets are of kind 'ratios', the header's kind is 'counts'"):
            capture.push(1, tokens_of(1), weights)
        for sequence in range(1, NUM_SEQUENCES):
            capture.push_draws(sequence, tokens_of(sequence), draws_of(sequence))
        with pytest.raises(ValueError, match="no shard needs more sequences"):
            capture.push_draws(NUM_SEQUENCES, tokens_of(0), draws_of(0))
    assert expected == shard_bytes(tmp_path / "cache")


def test_whole_shards_may_come_in_any_order(tmp_path):
    """Shards are separate work: only within a shard does the order count; durable is what is whole from the start."""
    expected = write_undisturbed(tmp_path / "plain")
    with open_capture(tmp_path / "cache") as capture:
        for work in reversed(list(capture.shards())):
            assert 0 == capture.durable
            for sequence in range(work.first_sequence, work.end):
                capture.push_draws(sequence, tokens_of(sequence), draws_of(sequence))
            wait_for(lambda number=work.number: (tmp_path / "cache" / f"shard-{number:05d}.skl").exists())
    assert (NUM_SEQUENCES, expected) == (capture.durable, shard_bytes(tmp_path / "cache"))


def test_a_sequence_larger_than_the_ring(tmp_path):
    """A ring that cannot hold one sequence is a wrong argument, said in bytes."""
    header = dataclasses.replace(HEADER, seq_len=0)
    with open_capture(tmp_path / "cache", ring_bytes=4096, header=header) as capture:
        capture.push_draws(0, tokens_of(0), draws_of(0))
        with pytest.raises(ValueError, match="frame of 8384 bytes, the ring takes up to 4032; make the ring larger"):
            capture.push_draws(1, np.zeros(100, int), np.zeros((99, 20), int))


@pytest.mark.parametrize("name", ["num_sequences", "sequences_per_shard", "ring_bytes", "checkpoint_seconds"])
def test_numbers_must_be_positive(tmp_path, name):
    """A number that means nothing is refused before anything is made."""
    with pytest.raises(ValueError, match=f"{name} must be positive, got 0"):
        open_capture(tmp_path / "cache", **{name: 0})
    assert [] == list(tmp_path.iterdir())


def test_two_captures_on_one_directory(tmp_path):
    """The second is refused, the first goes on."""
    with open_capture(tmp_path / "cache") as capture:
        with pytest.raises(skl.InUseError, match="another process is writing"), open_capture(tmp_path / "cache"):
            pass
        push_all(capture)
    assert [] == skl.verify(tmp_path / "cache")


def test_an_exception_keeps_what_was_pushed(tmp_path):
    """The shard begun stays as .partial with every pushed sequence; the next run asks for the rest only."""
    expected = write_undisturbed(tmp_path / "plain")
    with pytest.raises(KeyboardInterrupt), open_capture(tmp_path / "cache") as capture:
        for sequence in range(6):
            capture.push_draws(sequence, tokens_of(sequence), draws_of(sequence))
        raise KeyboardInterrupt
    assert 6 == capture.durable
    left = {"shard-00000.skl", "shard-00001.skl.partial", "capture.skl.partial"}
    assert left == names(tmp_path / "cache")
    advance = find_advance(tmp_path / "cache")  # the mark says how far it is to go
    assert (NUM_SEQUENCES, 0, 6) == (advance.goal, advance.before, advance.sequences)
    with open_capture(tmp_path / "cache") as capture:
        advance = find_advance(tmp_path / "cache")
        assert (NUM_SEQUENCES, 6, 6) == (advance.goal, advance.before, advance.sequences)
        assert [ShardWork(1, 4, 4, 6), ShardWork(2, 8, 3, 8)] == list(capture.shards())
        push_all(capture)
    assert expected == shard_bytes(tmp_path / "cache")


def test_what_cannot_be_kept_is_told(tmp_path):
    """Damage in what was saved is named when a capture goes on, and costs only what lies behind it."""
    expected = write_undisturbed(tmp_path / "plain")
    with pytest.raises(KeyboardInterrupt), open_capture(tmp_path / "cache") as capture:
        for sequence in range(7):
            capture.push_draws(sequence, tokens_of(sequence), draws_of(sequence))
        raise KeyboardInterrupt
    partial = tmp_path / "cache" / "shard-00001.skl.partial"
    data = bytearray(partial.read_bytes())
    second = skl.Shard(tmp_path / "plain" / "shard-00001.skl").index.offset.item(1)
    data[second + 80] ^= 1
    partial.write_bytes(data)
    with open_capture(tmp_path / "cache") as capture:
        work, _ = capture.shards()
        assert 5 == work.next_sequence
        assert work.cut.startswith(
            f"{partial}: 1 sequences kept, {len(data) - second} bytes cut (block 1: byte {second}:"
        )
        assert work.cut.endswith("), 1 whole sequences after the fault among them")
        push_all(capture)
    assert expected == shard_bytes(tmp_path / "cache")


def test_a_stop_does_not_hide_what_the_writer_says(tmp_path):
    """What the writer process could not do is told, though the capture is stopped at the same time."""
    with (
        pytest.raises(skl.CaptureError, match=r"sequence 1: .*safe") as caught,
        open_capture(tmp_path / "c") as capture,
    ):
        for sequence in range(3):
            draws = draws_of(sequence)
            capture.push_draws(sequence, tokens_of(sequence), draws if sequence != 1 else draws[:, ::-1])
        raise KeyboardInterrupt
    assert isinstance(caught.value.__context__, KeyboardInterrupt)
    assert 1 == skl.recover(tmp_path / "c" / "shard-00000.skl").sequences


def test_more_shards_than_a_manifest_lists(tmp_path):
    """A capture whose manifest could not be read again is refused before it begins."""
    with pytest.raises(ValueError, match="2097152 sequences in shards of 1 make more than 1048576 shards"):
        open_capture(tmp_path / "c", num_sequences=1 << 21, sequences_per_shard=1)


def test_leaving_early_writes_no_manifest(tmp_path):
    """A capture that is not complete ends without an error and without a manifest."""
    with open_capture(tmp_path / "cache") as capture:
        capture.push_draws(0, tokens_of(0), draws_of(0))
    assert 1 == capture.durable
    assert not (tmp_path / "cache" / "manifest.json").exists()


def test_a_capture_stopped_between_two_shards_is_no_cache(tmp_path):
    """Sealed shards without the ones after them look like a smaller cache; the mark says that they are not one."""
    with pytest.raises(KeyboardInterrupt), open_capture(tmp_path / "cache") as capture:
        for sequence in range(PER_SHARD):
            capture.push_draws(sequence, tokens_of(sequence), draws_of(sequence))
        raise KeyboardInterrupt
    assert {"shard-00000.skl", "capture.skl.partial"} == names(tmp_path / "cache")
    with pytest.raises(skl.MissingShardError, match=r"capture\.skl\.partial: the shard is unfinished"):
        skl.open(tmp_path / "cache")
    assert ["UnfinishedError"] == [problem.error for problem in skl.verify(tmp_path / "cache")]
    with open_capture(tmp_path / "cache") as capture:
        push_all(capture)
    assert [] == skl.verify(tmp_path / "cache")
    assert "capture.skl.partial" not in names(tmp_path / "cache")


def test_ranks_share_a_cache(tmp_path):
    """Each rank writes its shards, side by side; one writes the manifest; the bytes are those of one process."""
    expected = write_undisturbed(tmp_path / "plain")
    ranks = [open_capture(tmp_path / "cache", rank=rank, world_size=2, run="a") for rank in range(2)]
    with ranks[0], ranks[1]:
        assert [[0, 2], [1]] == [[work.number for work in rank.shards()] for rank in ranks]
        for capture in (open_capture(tmp_path / "cache"), open_capture(tmp_path / "cache", world_size=2, run="b")):
            with pytest.raises(skl.InUseError, match="another process is writing here"), capture:
                pass
        push_all(ranks[0])
        assert not (tmp_path / "cache" / "manifest.json").exists()
        with pytest.raises(skl.MissingShardError, match=r"sequences 4\.\.7 are missing"):
            wait_for((tmp_path / "cache" / "shard-00002.skl").exists)
            ranks[0].finish()
        push_all(ranks[1])
    assert not (tmp_path / "cache" / "manifest.json").exists()
    entries = ranks[0].finish()
    assert [(0, 4), (4, 4), (8, 3)] == [(entry.first_sequence, entry.num_sequences) for entry in entries]
    assert {"manifest.json", *expected} == names(tmp_path / "cache")
    assert (expected, []) == (shard_bytes(tmp_path / "cache"), skl.verify(tmp_path / "cache"))


def test_ranks_of_another_number_go_on(tmp_path):
    """What two ranks began, three end, and one after them finds all there; each shard has its one owner."""
    expected = write_undisturbed(tmp_path / "plain")
    for rank in range(2):
        with open_capture(tmp_path / "cache", rank=rank, world_size=2, run="a") as capture:
            first = next(capture.shards()).next_sequence
            for sequence in range(first, first + 2 + rank):
                capture.push_draws(sequence, tokens_of(sequence), draws_of(sequence))
    for rank, begun in enumerate([2, 7, 8]):
        with open_capture(tmp_path / "cache", rank=rank, world_size=3, run="b") as capture:
            assert begun == next(capture.shards()).next_sequence
            push_all(capture)
    with open_capture(tmp_path / "cache") as capture:
        assert [] == list(capture.shards())
    assert expected == shard_bytes(tmp_path / "cache")
    assert [] == skl.verify(tmp_path / "cache")


def test_two_writers_of_one_shard(tmp_path):
    """A shard that another process writes is refused, however that came to be."""
    (tmp_path / "cache").mkdir()
    placed = dataclasses.replace(HEADER, shard_number=1, first_sequence=PER_SHARD)
    with skl.ShardWriter(tmp_path / "cache" / "shard-00001.skl", header=placed):
        with open_capture(tmp_path / "cache", rank=0, world_size=2, run="a"):
            pass
        with (
            pytest.raises(skl.InUseError, match=r"shard-00001\.skl\.partial: another process"),
            open_capture(tmp_path / "cache", rank=1, world_size=2, run="a"),
        ):
            pass


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 2, "world_size": 2}, "rank must be in 0..world_size - 1, got 2 of 2"),
        ({"rank": -1}, "got -1 of 1"),
        ({"world_size": 2}, "world_size 2 needs the name of the run"),
    ],
)
def test_ranks_must_be_possible(tmp_path, changes, message):
    """A rank that is none, or several without a common run, is refused before anything is made."""
    with pytest.raises(ValueError, match=message):
        open_capture(tmp_path / "cache", **changes)


def test_a_finished_cache_wants_nothing(tmp_path):
    """Capturing into a finished cache starts nothing, and writes a manifest that was lost again."""
    expected = write_undisturbed(tmp_path / "cache")
    with open_capture(tmp_path / "cache") as capture:
        assert 0 == capture.wait_seconds
        assert ([], None, NUM_SEQUENCES) == (list(capture.shards()), capture._process, capture.durable)
        with pytest.raises(ValueError, match="no shard needs"):
            capture.push_draws(0, tokens_of(0), draws_of(0))
    assert expected == shard_bytes(tmp_path / "cache")
    assert (tmp_path / "cache" / "manifest.json").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"header": dataclasses.replace(HEADER, rounds=21)}, "rounds: 20 != 21"),
        ({"header": dataclasses.replace(HEADER, capture={"teacher": "b"})}, r"capture\.teacher: 'made up' != 'b'"),
        ({"sequences_per_shard": 5}, "place: shard 2 from sequence 8 != shard 2 from sequence 10"),
        (
            {"header": dataclasses.replace(HEADER, corpus_fingerprint="1" * 32)},
            "other text is another cache: sklformat merge joins both",
        ),
        ({"sequences_per_shard": 2, "num_sequences": 20}, "holds 4 sequences, this capture asks for 2"),
        ({"num_sequences": 8}, "make 2 shards, this is number 2"),
    ],
)
def test_other_settings_are_refused(tmp_path, changes, message):
    """A directory with shards of other settings is left alone, and the message shows both values."""
    write_undisturbed(tmp_path / "cache")
    (tmp_path / "cache" / "shard-00001.skl").unlink()
    before = shard_bytes(tmp_path / "cache")
    with pytest.raises(skl.SettingsError, match=message), open_capture(tmp_path / "cache", **changes):
        pass
    assert before == shard_bytes(tmp_path / "cache")
    assert not {name for name in names(tmp_path / "cache") if "lock" in name}


@pytest.mark.parametrize("count", [1, 4, 6, 8, 9])
def test_a_finished_cache_grows(tmp_path, count):
    """More sequences extend it to the bytes of one run; who has it open keeps it; meanwhile it is unfinished."""
    expected = write_undisturbed(tmp_path / "whole")
    directory = tmp_path / "cache"
    with open_capture(directory, num_sequences=count) as capture:
        push_all(capture)
    old = skl.open(directory)
    before = list(old)
    assert count == len(before)
    with open_capture(directory) as capture:
        with pytest.raises(skl.UnfinishedError):
            skl.open(directory)
        work = next(capture.shards())
        assert count == work.next_sequence
        capture.push_draws(count, tokens_of(count), draws_of(count))
    with pytest.raises(skl.UnfinishedError):
        skl.open(directory)
    with open_capture(directory) as capture:
        push_all(capture)
    assert expected == shard_bytes(directory)
    assert NUM_SEQUENCES == len(skl.open(directory))
    assert {*expected, "manifest.json"} == names(directory)
    with old:
        assert before == list(old)


def test_a_finished_cache_grows_on_other_ranks(tmp_path):
    """The rank whose work the last shard is opens it, and no other."""
    expected = write_undisturbed(tmp_path / "whole")
    with open_capture(tmp_path / "cache", num_sequences=6) as capture:
        push_all(capture)
    for rank in (0, 1):
        capture = open_capture(tmp_path / "cache", rank=rank, world_size=2, run="grows")
        with capture:
            push_all(capture)
    capture.finish()
    assert expected == shard_bytes(tmp_path / "cache")


def test_a_shard_is_opened_again_from_any_moment(tmp_path):
    """Killed before any write, sync or removal, there is the sealed shard, or all of it unsealed; a run resumes it."""
    expected = write_undisturbed(tmp_path / "whole")
    with open_capture(tmp_path / "cache", num_sequences=6) as capture:
        push_all(capture)
    for call in itertools.count(1):
        directory = tmp_path / str(call)
        shutil.copytree(tmp_path / "cache", directory)
        mark_unfinished(directory)
        remove_manifest(directory)
        shard = directory / "shard-00001.skl"
        if not (killed := run_until_call(call, lambda shard=shard: unseal(shard))):
            assert not shard.exists()
        else:
            assert shard.exists() or 2 == skl.recover(shard).sequences
        if call % 3 == 0 or not killed:
            with open_capture(directory) as capture:
                push_all(capture)
            assert expected == shard_bytes(directory)
        if not killed:
            break
    assert call > 6


def test_a_damaged_shard_does_not_grow(tmp_path):
    """Nothing is appended to what cannot be believed, and the damaged shard stays where it is."""
    with open_capture(tmp_path / "cache", num_sequences=6) as capture:
        push_all(capture)
    shard = tmp_path / "cache" / "shard-00001.skl"
    data = bytearray(shard.read_bytes())
    data[4096 + 70] ^= 1
    shard.write_bytes(data)
    with pytest.raises(skl.CorruptError, match="block 0: byte 4096: payload checksum"):
        open_capture(tmp_path / "cache").__enter__()
    assert data == shard.read_bytes()


def test_an_unfinished_shard_of_other_settings_is_refused(tmp_path):
    """The same holds for a .partial, which is not cut or replaced; one that holds too much is refused too."""
    with open_capture(tmp_path / "cache") as capture:
        for sequence in range(3):
            capture.push_draws(sequence, tokens_of(sequence), draws_of(sequence))
    partial = tmp_path / "cache" / "shard-00000.skl.partial"
    before = partial.read_bytes()
    other = dataclasses.replace(HEADER, sampling_seed=7)
    with pytest.raises(skl.SettingsError, match="sampling_seed: 0 != 7"), open_capture(partial.parent, header=other):
        pass
    assert before == partial.read_bytes()
    with pytest.raises(skl.SettingsError, match="holds 3 sequences already, this capture asks for 2"):
        open_capture(partial.parent, sequences_per_shard=2).__enter__()


def test_a_bad_record_is_told_by_sequence(tmp_path):
    """A record that breaks the format stops the capture with the writer's own words; what came before is kept."""
    draws = draws_of(2)
    draws[3, -1] = HEADER.vocab_size
    with (
        pytest.raises(skl.CaptureError, match=r"sequence 2: .*position 3: token id 1000"),
        open_capture(tmp_path / "cache") as capture,
    ):
        for sequence in range(2):
            capture.push_draws(sequence, tokens_of(sequence), draws_of(sequence))
        capture.push_draws(2, tokens_of(2), draws)
    assert 2 == skl.recover(tmp_path / "cache" / "shard-00000.skl").sequences


def test_unsorted_draws_are_told_on_the_next_push(tmp_path):
    """The writer's error reaches a teacher that goes on pushing, again and again."""
    with (
        pytest.raises(skl.CaptureError, match="sequence 0: position 5: draws are not sorted"),
        open_capture(tmp_path / "cache") as capture,
    ):
        draws = draws_of(0)
        draws[5] = draws[5, ::-1]
        capture.push_draws(0, tokens_of(0), draws)
        capture._process.wait()
        for _ in range(2):
            with pytest.raises(skl.CaptureError, match="position 5"):
                capture.push_draws(1, tokens_of(1), draws_of(1))
        capture.push_draws(1, tokens_of(1), draws_of(1))


def test_a_full_disk_is_told_and_loses_nothing(tmp_path):
    """When the system takes no more bytes, the message is the system's, and a later run goes on."""
    expected = write_undisturbed(tmp_path / "plain")
    with (
        pytest.raises(
            skl.CaptureError,
            match=f"^{tmp_path}/cache/shard-00000.skl.partial: File too large; sequences below 0 are safe, run the "
            "capture again to resume it$",
        ),
        open_capture(tmp_path / "cache") as capture,
    ):
        resource.prlimit(capture._process.pid, resource.RLIMIT_FSIZE, (9000, 9000))
        push_all(capture)
    with open_capture(tmp_path / "cache") as capture:
        push_all(capture)
    assert expected == shard_bytes(tmp_path / "cache")


def test_a_killed_writer_is_noticed(tmp_path):
    """A teacher with a full ring waits for a writer process that is stopped, and learns that it was killed."""

    def kill():
        wait_for(lambda: capture.wait_seconds > 0)
        os.kill(writer, signal.SIGKILL)

    with (
        pytest.raises(skl.CaptureError, match="killed by signal 9; sequences below 2 are safe"),
        open_capture(tmp_path / "cache", ring_bytes=8192, checkpoint_bytes=1) as capture,
    ):
        for sequence in range(2):
            capture.push_draws(sequence, tokens_of(sequence), draws_of(sequence))
        wait_for_durable(capture, 2)
        writer = capture._process.pid
        os.kill(writer, signal.SIGSTOP)
        killer = threading.Thread(target=kill)
        killer.start()
        try:
            for sequence in range(2, NUM_SEQUENCES):
                capture.push_draws(sequence, tokens_of(sequence), draws_of(sequence))
        finally:
            killer.join()
    assert capture.wait_seconds > 0


@pytest.mark.parametrize("changes", [{"checkpoint_bytes": 1}, {"checkpoint_seconds": 0.05}])
def test_checkpoints_move_the_watermark(tmp_path, changes):
    """With a checkpoint after every byte, or after a moment, sequences become durable while the shard is unfinished."""
    with open_capture(tmp_path, sequences_per_shard=100, **changes) as capture:
        for sequence in range(5):
            capture.push_draws(sequence, tokens_of(sequence), draws_of(sequence))
            wait_for_durable(capture, sequence + 1)


def test_a_writer_that_cannot_start_is_told(tmp_path, monkeypatch):
    """An interpreter that fails at once is an error of the capture, not a hang."""
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(skl.CaptureError, match="ended with status 1"), open_capture(tmp_path / "cache"):
        pass


@pytest.mark.parametrize("program", ["", None])
def test_a_python_without_a_program_is_told(tmp_path, monkeypatch, program):
    """An interpreter inside another program may not know how to start one: said, with what to do."""
    monkeypatch.setattr(sys, "executable", program)
    with pytest.raises(skl.CaptureError, match=r"sys\.executable is empty"), open_capture(tmp_path / "cache"):
        pass


def test_the_module_path_may_hold_anything(tmp_path, monkeypatch):
    """What no import looks at, and names that are no UTF-8, do not keep the writer process from starting."""
    odd = ['quote " and { brace }', os.fsdecode(b"\xff"), tmp_path, b"bytes", None]
    monkeypatch.setattr(sys, "path", [*odd, *sys.path])
    with open_capture(tmp_path / "cache") as capture:
        capture.push_draws(0, tokens_of(0), draws_of(0))


def test_neither_side_imports_torch():
    """Teacher's handle and writer process stay light: neither imports torch."""
    code = "import sys, sklformat.capture, sklformat.capture.scribe; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "False\n" == done.stdout
