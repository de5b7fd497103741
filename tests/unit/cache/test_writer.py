"""Appending, flushing, sealing and recovering one shard."""

import dataclasses
import os
import subprocess
import sys

import numpy as np
import pytest
import reference
import strategies
from strategies import FastDisk, header_of, small_sequence, small_settings, small_shard, targets_of

import sklformat as skl

HEADER = header_of(small_settings())


def append(writer, *numbers):
    for number in numbers:
        sequence = small_sequence(number)
        writer.append(sequence.tokens, targets_of(reference.COUNTS, sequence.positions))


def unfinished(path, numbers=range(2)):
    """Leave a .partial with some sequences and return its path."""
    writer = skl.ShardWriter(path, header=HEADER)
    append(writer, *numbers)
    writer.close()
    return path.with_name(path.name + ".partial")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "shard.skl"


def test_leaving_the_context_seals(path):
    """A sealed shard has its name, its partial is gone, and its bytes are the reference's."""
    with skl.ShardWriter(path, header=HEADER) as writer:
        append(writer, 0, 1)
        assert len(writer) == 2
        assert writer.size == writer.partial.stat().st_size
    assert small_shard(2) == path.read_bytes()
    assert [path] == list(path.parent.iterdir())


def test_append_returns_the_place(path):
    """append returns 0, 1, 2, ..."""
    with skl.ShardWriter(path, header=HEADER, disk=FastDisk()) as writer:
        sequence = small_sequence(0)
        targets = targets_of(reference.COUNTS, sequence.positions)
        assert [0, 1, 2] == [writer.append(sequence.tokens, targets) for _ in range(3)]


def test_an_exception_leaves_the_partial(path):
    """An exception in the context seals nothing and loses nothing."""
    writer = skl.ShardWriter(path, header=HEADER)

    def stop():
        with writer:
            append(writer, 0, 1)
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        stop()
    assert [writer.partial] == list(path.parent.iterdir())
    assert skl.recover(path) == skl.Recovered(writer.partial, 2, 0)


def test_resume_goes_on(path):
    """A resumed shard is byte for byte the one written in one go, torn tail or not."""
    partial = unfinished(path)
    with partial.open("ab") as file:
        file.write(b"torn tail" * 30)
    with skl.ShardWriter(path, header=HEADER, resume=True) as writer:
        assert len(writer) == 2
        assert writer.size == partial.stat().st_size  # the tail is cut before anything is written
        append(writer, 2)
    assert small_shard(3) == path.read_bytes()


def test_resume_begins_where_nothing_is(path):
    """resume=True without a partial begins anew."""
    with skl.ShardWriter(path, header=HEADER, resume=True) as writer:
        append(writer, 0)
    assert small_shard(1) == path.read_bytes()


@pytest.mark.parametrize("content", [b"", bytes(4096), small_shard(0)[:4095], small_shard(0)[:100], bytes(17)])
def test_resume_after_a_crash_before_the_header_was_durable(path, content):
    """A partial without a whole header holds nothing that was acknowledged and is begun anew."""
    path.with_name("shard.skl.partial").write_bytes(content)
    assert skl.recover(path).sequences == 0
    with skl.ShardWriter(path, header=HEADER, resume=True) as writer:
        append(writer, 0)
    assert small_shard(1) == path.read_bytes()


def test_an_unfinished_shard_is_not_overwritten(path):
    """Without resume an existing partial is refused and unchanged, and the message says what to do."""
    partial = unfinished(path)
    before = partial.read_bytes()
    with pytest.raises(
        FileExistsError, match="an unfinished shard is here; continue it with resume=True, or remove it first"
    ):
        skl.ShardWriter(path, header=HEADER)
    assert before == partial.read_bytes()


@pytest.mark.parametrize("resume", [False, True])
def test_a_sealed_shard_is_not_overwritten(path, resume):
    """A sealed shard is never written again."""
    path.write_bytes(small_shard(1))
    with pytest.raises(FileExistsError, match="is sealed already; choose another name, or remove it first"):
        skl.ShardWriter(path, header=HEADER, resume=resume)
    assert small_shard(1) == path.read_bytes()


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"sampling_seed": 5}, "sampling_seed: 0 != 5"), ({"shard_number": 1}, "another place in the cache")],
)
def test_resume_with_other_settings(path, changes, message):
    """A partial is not continued with other settings; both values are shown and the file stays as it is."""
    partial = unfinished(path)
    before = partial.read_bytes()
    with pytest.raises(skl.SettingsError, match=message):
        skl.ShardWriter(path, header=dataclasses.replace(HEADER, **changes), resume=True)
    assert before == partial.read_bytes()


def test_resume_of_another_minor_version(path):
    """A partial with flags that this version does not write is not continued: the shard would contradict its root."""
    settings = small_settings(compatible_flags=1)
    path.with_name("shard.skl.partial").write_bytes(reference.encode_header(settings))
    with pytest.raises(skl.SettingsError, match="version_minor or compatible_flags"):
        skl.ShardWriter(path, header=HEADER, resume=True)


@pytest.mark.parametrize("call", [lambda p: skl.ShardWriter(p, header=HEADER, resume=True), skl.recover])
def test_a_damaged_header_is_not_thrown_away(path, call):
    """A partial longer than its damaged header may hold acknowledged data: an error, and nothing is changed."""
    partial = unfinished(path)
    data = bytearray(partial.read_bytes())
    data[100] ^= 1
    partial.write_bytes(data)
    with pytest.raises(skl.CorruptError, match=f"{partial}: header: byte 4088: checksum"):
        call(path)
    assert data == partial.read_bytes()


def test_an_unknown_codec_is_not_thrown_away(path):
    """A block of a newer kind is not a torn tail."""
    partial = unfinished(path, [0])
    block = bytearray(partial.read_bytes()[4096:])
    block[4] = 1
    key = reference.shard_key_of(HEADER.pack())
    block[56:64] = reference.xxh64(bytes(block[:56]), key).to_bytes(8, "little")
    partial.write_bytes(HEADER.pack() + block)
    with pytest.raises(skl.UnsupportedError, match=r"shard\.skl\.partial: block 0: byte 4096: codec 1"):
        skl.recover(path)
    assert HEADER.pack() + block == partial.read_bytes()


def test_recover_cuts_the_torn_tail(path):
    """recover keeps whole sequences, says how many and how many bytes it cut, and does nothing the second time."""
    partial = unfinished(path, range(3))
    data = partial.read_bytes()
    partial.write_bytes(data[:-1])
    size = (len(data) - 4096) // 3
    cause = f"block 2: byte {len(data) - size}: block of {size} bytes ends past the end of the file"
    assert skl.recover(partial) == skl.Recovered(partial, 2, size - 1, cause)
    assert data[:-size] == partial.read_bytes()
    assert skl.recover(path) == skl.Recovered(partial, 2, 0)


@pytest.mark.parametrize(
    ("at", "message", "later"), [(0, "block magic", 2), (8, "block header checksum", 2), (70, "payload checksum", 2)]
)
def test_recover_says_what_it_cuts(path, at, message, later):
    """Damage before sound blocks is named, and these are counted: a shard has no gap, so they go too."""
    partial = unfinished(path, range(4))
    data = bytearray(partial.read_bytes())
    size = (len(data) - 4096) // 4
    data[4096 + size + at] ^= 1
    partial.write_bytes(data + data[-size : -size // 2])
    recovered = skl.recover(path)
    assert (1, 3 * size + size // 2, later) == (recovered.sequences, recovered.bytes_cut, recovered.sequences_cut)
    assert recovered.cause.startswith(f"block 1: byte {4096 + size}: {message}")


def test_a_resumed_writer_says_what_it_cut(path):
    """A writer that goes on tells what recover would have told; one that begins anew tells nothing."""
    partial = unfinished(path, range(2))
    partial.write_bytes(partial.read_bytes()[:-1])
    with skl.ShardWriter(path, header=HEADER, resume=True) as writer:
        assert (1, True) == (writer.recovered.sequences, "ends past the end of the file" in writer.recovered.cause)
    with skl.ShardWriter(path.with_name("b.skl"), header=HEADER, resume=True) as writer:
        assert writer.recovered is None


def test_recover_needs_a_partial(path):
    """A sealed shard is never cut, and nothing is made where nothing was."""
    with pytest.raises(FileNotFoundError, match="no such file"):
        skl.recover(path)
    path.write_bytes(small_shard(1))
    with pytest.raises(FileNotFoundError, match="a sealed shard is never cut"):
        skl.recover(path)


def test_recover_allocates_for_no_claim(path):
    """A block header that claims 2^30 bytes makes nobody allocate them: the file is shorter."""
    settings = reference.Settings(vocab_size=10, rounds=5, sampler=1)
    header = reference.encode_header(settings)
    key = reference.shard_key_of(header)
    positions, records = 1 << 22, 340_000_000
    claim = reference.BLOCK_MAGIC + bytes(12) + positions.to_bytes(4, "little") + records.to_bytes(4, "little")
    claim += (positions + 3 * records).to_bytes(4, "little") + bytes(28)
    partial = path.with_name("shard.skl.partial")
    partial.write_bytes(header + claim + reference.xxh64(claim, key).to_bytes(8, "little"))
    code = (
        "import resource, sys, sklformat; resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30));"
        "print(sklformat.recover(sys.argv[1]).sequences)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
    )
    assert done.stdout.strip() == "0"


def test_a_second_writer_in_this_process(path):
    """Two writers of one shard: the second is refused while the first is open, also recover."""
    writer = skl.ShardWriter(path, header=HEADER)
    for attempt in (lambda: skl.ShardWriter(path, header=HEADER, resume=True), lambda: skl.recover(path)):
        with pytest.raises(
            skl.InUseError, match="another process is writing here; wait for it, or choose another place"
        ):
            attempt()
    append(writer, 0)
    writer.seal()
    assert small_shard(1) == path.read_bytes()


def test_a_second_writer_in_another_process(path):
    """The lock holds between processes."""
    code = "import sys, sklformat as skl\ntry: skl.recover(sys.argv[1])\nexcept skl.InUseError as error: print(error)"
    writer = skl.ShardWriter(path, header=HEADER)
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    writer.close()
    assert "another process is writing here" in done.stdout


def test_a_shard_sealed_between_opening_and_locking(path):
    """A second writer that opened the partial just before it was renamed does not cut the sealed shard."""
    first = skl.ShardWriter(path, header=HEADER)
    append(first, 0, 1)

    class SlowDisk(FastDisk):
        def reopen(self, partial):
            fd = super().reopen(partial)
            first.seal()
            return fd

    with pytest.raises(skl.InUseError, match="finished it just now"):
        skl.ShardWriter(path, header=HEADER, resume=True, disk=SlowDisk())
    assert small_shard(2) == path.read_bytes()


def test_a_refused_sequence_changes_nothing(path):
    """After a ValueError the writer goes on, and the bytes are as if the sequence had never been given."""
    with skl.ShardWriter(path, header=HEADER, disk=FastDisk()) as writer:
        append(writer, 0)
        with pytest.raises(ValueError, match=r"shard\.skl: sequence 1: 2 tokens and 1 positions|seq_len is 3"):
            writer.append([1, 2], skl.SparseTargets(token_ids=[], counts=[], offsets=[0, 0]))
        append(writer, 1)
    assert small_shard(2) == path.read_bytes()


def test_a_closed_writer_takes_nothing(path):
    """append, flush and seal after closing are refused; closing twice is allowed."""
    writer = skl.ShardWriter(path, header=HEADER)
    writer.close()
    writer.close()
    for call in (lambda: append(writer, 0), writer.flush, writer.seal):
        with pytest.raises(ValueError, match="the writer is closed"):
            call()


def test_sealing_by_hand_inside_the_context(path):
    """seal inside the context is allowed; leaving it does nothing more."""
    with skl.ShardWriter(path, header=HEADER) as writer:
        append(writer, 0)
        writer.seal()
    assert small_shard(1) == path.read_bytes()


def test_a_failed_seal_lets_go(path):
    """When sealing fails the lock goes with it, so that the same process can resume the shard."""

    class FullDisk(FastDisk):
        full = False

        def write(self, fd, data, offset):
            if self.full:
                raise OSError(28, "No space left on device")
            super().write(fd, data, offset)

    disk = FullDisk()
    writer = skl.ShardWriter(path, header=HEADER, disk=disk)
    append(writer, 0)
    disk.full = True
    with pytest.raises(OSError, match="No space"), writer:
        pass
    with skl.ShardWriter(path, header=HEADER, resume=True) as writer:
        append(writer, 1)
    assert small_shard(2) == path.read_bytes()


@pytest.mark.parametrize("kind", [reference.COUNTS, reference.RATIOS])
def test_buffers_that_are_used_again_are_not_followed(path, kind):
    """A caller that fills its buffers anew before appending is refused; nothing beyond them is read or written."""
    settings = small_settings() if kind == reference.COUNTS else small_settings(kind=kind, rounds=0, sampler=3)
    value = 5 if kind == reference.COUNTS else 0.5
    targets = targets_of(kind, [[(1, value)], [(2, value)], [(3, value)]])
    with skl.ShardWriter(path, header=header_of(settings), disk=FastDisk()) as writer:
        for offsets in ([0, 1, 2, 1 << 40], [0, 1, 1 << 40, 3], [0, 1, 2, 4]):
            targets.offsets[:] = offsets
            with pytest.raises(ValueError, match="sizes contradict each other"):
                writer.append([1, 2, 3, 4], targets)
        targets.offsets[:] = range(4)
        assert 0 == writer.append([1, 2, 3, 4], targets)


def test_two_equal_runs_give_equal_bytes(tmp_path):
    """Nothing random and no time goes into a shard."""
    for name in ("a.skl", "b.skl"):
        with skl.ShardWriter(tmp_path / name, header=HEADER, disk=FastDisk()) as writer:
            append(writer, 0, 1)
    assert (tmp_path / "a.skl").read_bytes() == (tmp_path / "b.skl").read_bytes()


def test_tokens_of_any_integer_type(path):
    """Tokens may be a list or any integer array."""
    sequence = small_sequence(0)
    targets = targets_of(reference.COUNTS, sequence.positions)
    with skl.ShardWriter(path, header=HEADER, disk=FastDisk()) as writer:
        for dtype in (np.uint8, np.int16, np.int64, np.uint64):
            writer.append(np.array(sequence.tokens, dtype), targets)
    assert reference.encode_shard(small_settings(), [sequence] * 4) == path.read_bytes()
    assert strategies.pairs_of(targets) == sequence.positions
