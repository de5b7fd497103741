"""Any history of appending, flushing, crashing and resuming ends in the same bytes, and loses nothing acknowledged."""

import shutil
import tempfile
from pathlib import Path

import reference
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from strategies import FastDisk, header_of, small_sequence, small_settings, small_shard, targets_of

import sklformat as skl

HEADER = header_of(small_settings())


class WriterMachine(RuleBasedStateMachine):
    """
    A writer against a list.

    The model is the number of sequences appended and the number acknowledged by a flush.
    Sequence i is always small_sequence(i), as a capture repeats what a crash lost.
    """

    def __init__(self):
        super().__init__()
        self.directory = Path(tempfile.mkdtemp())
        self.path = self.directory / "shard.skl"
        self.partial = self.directory / "shard.skl.partial"
        self.writer = None
        self.acknowledged = 0
        self.durable_bytes = 0

    def teardown(self):
        if self.writer is not None:
            self.writer.close()
        shutil.rmtree(self.directory)

    @initialize(resume=st.booleans())
    def begin(self, resume):
        self.open(resume=resume)

    def open(self, *, resume):
        self.writer = skl.ShardWriter(self.path, header=HEADER, resume=resume, disk=FastDisk())
        assert self.acknowledged <= len(self.writer)

    @rule(count=st.integers(1, 3))
    def append(self, count):
        for _ in range(count):
            sequence = small_sequence(len(self.writer))
            targets = targets_of(reference.COUNTS, sequence.positions)
            assert len(self.writer) == self.writer.append(sequence.tokens, targets)

    @rule()
    def refused_append(self):
        before = len(self.writer)
        try:
            self.writer.append([1], skl.SparseTargets(token_ids=[], counts=[], offsets=[0]))
        except ValueError:
            assert before == len(self.writer)
        else:
            raise AssertionError("a sequence without positions was taken")

    @rule()
    def flush(self):
        self.writer.flush()
        self.acknowledged = len(self.writer)
        self.durable_bytes = self.writer.size

    @rule()
    def close_and_resume(self):
        self.writer.close()
        appended = len(self.writer)
        self.open(resume=True)
        assert appended == len(self.writer)

    @rule(data=st.data())
    def crash(self, data):
        """What was not synced may be there, torn at any byte, or changed; a new process goes on."""
        content = bytearray(self.partial.read_bytes())
        appended = len(self.writer)
        self.writer.close()
        durable = self.durable_bytes
        if len(content) >= reference.HEADER_SIZE:
            durable = max(durable, reference.HEADER_SIZE)  # the header is durable before a writer is there
        end = data.draw(st.integers(durable, len(content)), "bytes left")
        content = content[:end]
        for at in data.draw(
            st.lists(st.integers(durable, end - 1), max_size=2) if end > durable else st.just([]), "changed"
        ):
            content[at] ^= data.draw(st.integers(1, 255))
        content += data.draw(st.binary(max_size=100), "garbage")
        self.partial.write_bytes(content)
        if data.draw(st.booleans(), "recover first"):
            kept = skl.recover(self.path)
            assert self.acknowledged <= kept.sequences <= appended
            assert len(content) - kept.bytes_cut == self.partial.stat().st_size
        self.open(resume=True)
        assert self.acknowledged <= len(self.writer) <= appended

    @rule(data=st.data())
    def crash_while_sealing(self, data):
        """Index and trailer may be there in part, or whole without the rename."""
        self.writer.flush()
        self.acknowledged = len(self.writer)
        self.durable_bytes = self.writer.size
        self.writer.close()
        sealed = small_shard(self.acknowledged)
        self.partial.write_bytes(sealed[: data.draw(st.integers(self.durable_bytes, len(sealed)))])
        self.open(resume=True)
        assert self.acknowledged == len(self.writer)

    @precondition(lambda self: len(self.writer) > 0)
    @rule()
    def seal(self):
        """Whatever came before, the sealed shard is the undisturbed one; then another one is begun."""
        count = len(self.writer)
        self.writer.seal()
        assert small_shard(count) == self.path.read_bytes()
        assert not self.partial.exists()
        self.path.unlink()
        self.acknowledged, self.durable_bytes = 0, 0
        self.open(resume=False)

    @invariant()
    def file_is_whole_blocks(self):
        if self.writer is not None:
            assert small_shard(len(self.writer))[: self.writer.size] == self.partial.read_bytes()[: self.writer.size]


TestWriter = WriterMachine.TestCase
TestWriter.settings = hypothesis_settings(max_examples=40, stateful_step_count=15, deadline=None)
