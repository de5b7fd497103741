"""
``cache_teacher``: run a teacher over packed text once and leave its sparse distributions on disk.

Puts together what the others know: tokens, teacher, draws, capture, ranks. Holds no bytes of the format.
Source: Anshumann et al. 2025 (arXiv 2503.16870), section 3.2 and Appendix D.
Shape letters: B sequences, T positions, V vocabulary, D hidden size.
"""

from __future__ import annotations

import re
import secrets
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sklformat.cache.contents import UNFINISHED_NAME
from sklformat.cache.manifest import MANIFEST_NAME
from sklformat.capture import Capture, ShardWork
from sklformat.capture.estimates import block_size
from sklformat.capture.memory import check_room
from sklformat.capture.outcome import Cached, Contributed, sum_up
from sklformat.capture.runs import AGREEMENT_NAME, Run
from sklformat.distill import kernels
from sklformat.distill.models import attention, loading
from sklformat.distill.models.devices import available_cores, find_device, own_devices
from sklformat.distill.teacher import gpu_sampler
from sklformat.distill.teacher.arrivals import Arrival, Draws
from sklformat.distill.teacher.drawing import Drawer, on_host
from sklformat.distill.teacher.forward import Output, Teacher, outputs_of
from sklformat.distill.teacher.gpu_sampler import DeviceSampler
from sklformat.distill.teacher.logit_columns import LogitColumns
from sklformat.distill.teacher.provenance import make_header
from sklformat.distill.teacher.ranks import Ranks, agree, joined, stoppable
from sklformat.distill.teacher.token_sources import TOKENS_NAME, TokenSource
from sklformat.distill.text.fingerprints import vocabulary_fingerprint
from sklformat.distill.text.packing import Sequences
from sklformat.errors import SettingsError
from sklformat.files import remote
from sklformat.files.directories import refuse_foreign
from sklformat.files.places import url_of
from sklformat.format.columns import RECORD_LOGPROB, STARTS
from sklformat.format.header import Header
from sklformat.format.records import SparseTargets
from sklformat.progress import say, show
from sklformat.sampler import MAX_K
from sklformat.settings.cache import CacheConfig

_SHARD = re.compile(r"shard-\d{5,}\.skl(\.partial)?")
# What a run leaves that stopped early; or whoever removed damaged shards, be it with their manifest or without.
_BEFORE_SHARDS = re.compile(
    rf"\.((writer|turn|(rank|writer)-\d+)\.)?lock|\.?{re.escape(AGREEMENT_NAME)}(\.tmp)?|{re.escape(UNFINISHED_NAME)}|{TOKENS_NAME}(\.partial)?|\.?{re.escape(MANIFEST_NAME)}(\.tmp)?"
)
_PUBLISHED = re.compile(rf"{_SHARD.pattern}|{re.escape(MANIFEST_NAME)}|{re.escape(UNFINISHED_NAME)}")
_DRAW_THREADS = 8  # at most; beside a GPU one core cannot keep up


def cache_teacher(config: CacheConfig) -> Cached | Contributed:
    """
    Capture a teacher's sparse distributions over packed text into a cache directory.

    Whatever stops it, run it again with the same settings: sealed shards are kept, an unfinished one is resumed,
    and the finished cache has the bytes of an undisturbed run, on any number of ranks. Under torchrun each process has
    a teacher of its own and every world_size-th shard, or a part of one teacher; then rank 0 writes.

    Args:
        config: The settings.

    Returns:
        What was done, the same on all ranks, for the user and for tests.

    Raises:
        OSError: Text, teacher or disk; as the operating system reports it.
        ValueError: No such device, no text, text too short, a teacher that does not fit its tokenizer or ``seq_len``,
            logits that are not finite.
        SettingsError: ``out`` holds a cache made with other settings, or files that are no cache; ``tokens`` were made
            by another tokenizer; the ranks have different teachers.
        InUseError: Another run writes into ``out``.
        CaptureError: The writer process failed, or another rank has ended.
        RemoteError: The store behind the URL failed.
        KeyboardInterrupt: Ctrl-C or SIGTERM; the message says what is kept.
    """
    with joined(run_of(config), tensors=config.tensor_parallel > 1) as ranks, stoppable():
        return _cache(config, ranks)


def _cache(config: CacheConfig, ranks: Ranks) -> Cached | Contributed:
    divided = ranks.are_divided(config.tensor_parallel)
    check_room(config.ring_mib << 20, "ring_mib")
    device, over = _devices(config, ranks)
    named: loading.Named = {"revision": config.revision, **loading.named_of(config)}
    tokenizer = loading.load_tokenizer(config.teacher_name, **named)
    source = TokenSource(config, tokenizer)
    run = ranks.first(lambda: name_run(config))
    # Held from here on, so that a second run is refused before it works.
    with ranks.held(config.directory, run):
        dtype = _dtype(config, device)
        if ranks.rank == 0 or ranks.apart is not None:
            say(f"cache {config.directory.name}: loading the teacher {config.teacher}, then reading all tokens")
        placed: dict[str, Any] = {"device": device, "over": over, "tensor_parallel": config.tensor_parallel}
        model = loading.load_model(config.teacher_name, dtype=dtype, **placed, **named)
        if config.isolate_documents:
            attention.check_isolates(model)
        vocab_size = loading.check_fit(tokenizer, model, seq_len=config.seq_len)
        packed = ranks.in_turn(lambda check: source.pack(vocab_size, check=check))
        on_device = draws_on_device(config, device, vocab_size)
        vocabulary = vocabulary_fingerprint(tokenizer, vocab_size)
        header = make_header(
            config,
            packed,
            vocab_size,
            vocabulary,
            model,
            dtype,
            device.type,
            on_device=on_device,
            kernel_versions=kernels.versions(device) if on_device and not divided else {},
        )
        with ranks.partners():
            teacher = Teacher(model, vocab_size, divided=divided)

        def hand_over(part: Part, works: Sequence[ShardWork]) -> Iterator[tuple[Output, int]]:
            push = part.push_draws if on_device else part.push_records
            return push(teacher, outputs_of(config, teacher, packed, works))

        with ranks.partners():
            return write(config, ranks, run, packed, header, hand_over, divided=divided)


def write(
    config: CacheConfig,
    ranks: Ranks,
    run: str,
    packed: Sequences,
    header: Header,
    hand_over: Callable[[Part, Sequence[ShardWork]], Iterable[tuple[Output, int]]],
    *,
    divided: bool = False,
) -> Cached | Contributed:
    """
    Write what earlier runs have not left, whatever runs the teacher; the directory is held.

    Args:
        config: The settings.
        ranks: Of this run.
        run: Its name.
        packed: The sequences.
        header: Of all shards.
        hand_over: Runs the teacher over what shards still need, in order, and pushes each sequence; gives it with the
            number of its records.
        divided: Whether ranks have a part each of one teacher: all of them run it, and the first writes.

    Raises:
        SettingsError, InUseError, CaptureError, RemoteError, ValueError, OSError, KeyboardInterrupt: As
            ``cache_teacher``.
    """
    header = agree(config, ranks, header, len(packed))
    capture = Capture(
        config.directory,
        header=header,
        num_sequences=len(packed),
        sequences_per_shard=config.sequences_per_shard,
        ring_bytes=config.ring_mib << 20,
        url=config.url,
        rank=0 if divided else ranks.rank,
        world_size=1 if divided else ranks.world_size,
        run=run,
        apart=ranks.apart is not None,
    )
    part = Part(config, ranks, capture, packed, divided=divided)
    part.run(hand_over)
    if ranks.apart is not None:
        with ranks.apart.turn():
            return _contributed(config, ranks.apart, packed, capture, part)
    ranks.wait()
    entries = ranks.first(lambda: capture.entries or capture.finish())
    if ranks.local_rank == 0:
        capture.unmark()  # with a URL, each machine may have a directory of its own
    positions = ranks.first(packed.num_positions)
    return sum_up(config.out, entries, positions, ranks.gather((part.made, part.positions, part.seconds, part.waited)))


class Part:
    """
    What one rank does: it runs its teacher over the sequences that its shards still need.

    Attributes:
        made: Sequences that it handed over.
        positions: Positions of these that are learnt from.
        seconds: Time that it took.
        waited: Seconds of these in which it waited for its writer.
    """

    def __init__(
        self, config: CacheConfig, ranks: Ranks, capture: Capture, packed: Sequences, *, divided: bool = False
    ) -> None:
        self._config, self._ranks, self._capture, self._packed = config, ranks, capture, packed
        self._divided, self._writes = divided, not divided or ranks.rank == 0
        self.made, self.positions, self.seconds, self.waited = 0, 0, 0.0, 0.0
        self._total = len(packed)
        self._there: int | None = None  # sequences that an earlier run left; unknown until it has looked
        self._bytes = 0

    def run(self, hand_over: Callable[[Part, Sequence[ShardWork]], Iterable[tuple[Output, int]]]) -> None:
        """
        Do all of it, as ``write`` says.

        Raises:
            KeyboardInterrupt: It was stopped; says what is kept.
        """
        begin = time.perf_counter()
        try:
            with ExitStack() as stack:
                # The first looks at what is there before another writes.
                self._ranks.in_turn(lambda _: self._writes and stack.enter_context(self._capture))
                works = list(self._capture.shards()) if self._writes else []
                if self._divided:  # all run the teacher over what the first needs
                    works = self._ranks.gather(works)[0]
                self._total = self._capture.num_own_sequences
                cuts = [work.cut for work in works if work.cut is not None]
                for cut in cuts if self._writes else ():
                    say(f"{cut}; captured again from there")
                self._there = self._total - sum(work.end - work.next_sequence for work in works)
                pushed = hand_over(self, works)
                if not self._writes:
                    deque(pushed, maxlen=0)
                    return
                self._follow(pushed, begin)
        except KeyboardInterrupt:
            who = f"rank {self._ranks.rank} " if self._ranks.world_size > 1 else ""
            kept = ""
            if self._there is not None:
                kept = f": {self._there + self.made} of {self._total} sequences of {self._config.out} are kept"
            raise KeyboardInterrupt(f"{who}stopped{kept}; run the same command again to resume") from None
        self.waited, self.seconds = self._capture.wait_seconds, time.perf_counter() - begin

    def push_records(self, teacher: Teacher, outputs: Iterable[Output]) -> Iterator[tuple[Output, int]]:
        """Draw on the host and hand over sequence after sequence; each with the number of its records."""
        config, threads = self._config, 1
        if teacher.device.type != "cpu":
            threads = max(1, min(_DRAW_THREADS, available_cores() // self._ranks.local_world_size))
        rounds = config.rounds if config.draws else 0
        with Drawer(kind=config.kind, rounds=rounds, sampling=config.sampling, threads=threads) as drawer:
            for output in outputs:
                slices = on_host(teacher.logits(output.made, output.counted))
                taken = LogitColumns(config.columns, output.tokens)
                targets = drawer.draw(output.sequence, slices, taken if config.columns else None, output.counted)
                yield self.push(output, targets, taken.values())

    def push_draws(self, teacher: Teacher, outputs: Iterable[Output]) -> Iterator[tuple[Output, int]]:
        """The same with draws on the device, which moves to the next sequence before the host asks for the last."""
        config = self._config
        sampler = DeviceSampler(rounds=config.rounds, part=teacher.part, **config.sampling)
        queued: tuple[Output, Arrival, LogitColumns] | None = None
        for output in outputs:
            before = queued
            taken = LogitColumns(config.columns, output.tokens)
            slices, columns = teacher.logits(output.made, output.counted), taken if config.columns else None
            arrival = sampler.draw(output.sequence, len(output.made), slices, columns, output.counted)
            queued = output, arrival, taken
            if before is not None:
                yield self._push_queued(*before)
        if queued is not None:
            yield self._push_queued(*queued)

    def _push_queued(self, output: Output, queued: Arrival, taken: LogitColumns) -> tuple[Output, int]:
        if isinstance(queued, Draws):
            draws, columns = queued.result(), self._columns(output.sequence, taken.values())
            if self._writes:
                self._capture.push_draws(output.sequence, output.tokens, draws, columns, output.counted)
            return output, len(draws) + int(np.count_nonzero(draws[:, 1:] != draws[:, :-1]))
        targets, columns = queued.result(), taken.values()
        if RECORD_LOGPROB in columns:
            columns[RECORD_LOGPROB] = queued.record_logprob(columns[RECORD_LOGPROB])
        return self.push(output, targets, columns)

    def push(self, output: Output, targets: SparseTargets, columns: Mapping[str, NDArray[Any]]) -> tuple[Output, int]:
        """Hand over one sequence with its records, and the columns that its logits gave."""
        if self._writes:
            self._capture.push(output.sequence, output.tokens, targets, self._columns(output.sequence, columns))
        return output, targets.num_records

    def _columns(self, sequence: int, taken: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """The optional columns that were asked for, those of the logits and others."""
        starts = {STARTS: self._packed.document_starts(sequence)} if STARTS in self._config.columns else {}
        return {**starts, **taken}

    def _follow(self, pushed: Iterable[tuple[Output, int]], begin: float) -> None:
        """Count sequences while they are handed over, and the bytes of their records; show the progress."""
        ranks, there = self._ranks, self._there or 0
        # On a terminal the bars of several ranks would fall over each other.
        shown = not sys.stderr.isatty() or ranks.local_rank == 0
        name = f"cache {self._config.directory.name}" + (f", rank {ranks.rank}" if ranks.world_size > 1 else "")
        with show(name, self._total, unit="sequence", first=there, shown=shown) as reach:
            for output, num_records in pushed:
                self.made += 1
                self.positions += output.num_counted
                self._bytes += block_size(self._capture.header, output.tokens.size - 1, num_records)
                seconds, positions = time.perf_counter() - begin, self.positions
                size = self._bytes / max(1, positions)  # the first sequences of chats may hold no answer
                reach(
                    there + self.made,
                    f"{positions / seconds:,.0f} positions/s, {size:.1f} bytes per position, "
                    f"waited {self._capture.wait_seconds / seconds:.1%}",
                )


def _devices(config: CacheConfig, ranks: Ranks) -> tuple[torch.device, list[int]]:
    """This rank's device, and the devices that its teacher is spread over, if it is."""
    device = find_device(config.device)
    if config.device_map == "auto":
        if device.type != "cuda" or device.index is not None:
            raise ValueError(
                f"device_map auto spreads the teacher over several CUDA devices, device is {config.device} "
                f"({device.type} here); leave both out"
            )
        over = own_devices(ranks.local_rank, ranks.local_world_size)
        return torch.device("cuda", over[0]), over
    if device.type == "cuda" and device.index is not None and ranks.local_world_size > 1:
        raise ValueError(
            f"device {config.device} is one GPU, this machine runs {ranks.local_world_size} processes; "
            "give device cuda, so that each takes one of its own"
        )
    if device.type == "cuda" and device.index is None and ranks.world_size > 1:
        device = find_device(f"cuda:{ranks.local_rank}")
    return device, []


def draws_on_device(config: CacheConfig, device: torch.device, vocab_size: int) -> bool:
    """Whether the teacher's device draws; the same in every run with these settings, since bytes depend on it."""
    places = config.rounds if config.draws else min(config.k or MAX_K, vocab_size)
    return gpu_sampler.draws_there(device, config.seq_len, places, divided=config.tensor_parallel > 1)


def _dtype(config: CacheConfig, device: torch.device) -> loading.Dtype:
    if config.dtype == "auto":
        return "float32" if device.type == "cpu" else "bfloat16"
    return config.dtype


def name_run(config: CacheConfig) -> str:
    """A cache is begun where nothing is; where shards are, finished or not, the capture compares their settings."""
    directory = config.directory
    if directory.exists() and not directory.is_dir():
        raise SettingsError(f"{directory}: is a file; a cache is a directory, choose another place")
    names = [path.name for path in directory.iterdir()] if directory.is_dir() else []
    if not any(_SHARD.fullmatch(name) for name in names):
        refuse_foreign(directory, names, "cache", _BEFORE_SHARDS)
    if config.url is not None:
        names = remote.list_names(config.url)
        refuse_foreign(config.url, names, "cache", _PUBLISHED)
        if not names:  # else the first shard would be the one to find out, when the teacher has worked for hours
            remote.check_writable(url_of(config.url, UNFINISHED_NAME))
    return config.run or secrets.token_hex(8)


def run_of(config: CacheConfig) -> Run | None:
    """The run that this process is a rank of, where its launcher is not torchrun."""
    if config.run is None:
        return None
    assert config.rank is not None
    assert config.world_size is not None
    return Run(config.directory, config.run, config.rank, config.world_size)


def _contributed(
    config: CacheConfig, run: Run, packed: Sequences, capture: Capture, part: Part
) -> Cached | Contributed:
    """What one of the ranks did that never meet; the last of them writes the manifest."""
    agreed = run.begun()
    did = part.made, part.positions, part.seconds, part.waited
    # A run that has ended is forgotten: what was agreed on then, nobody waits for.
    number, ranks = (0, ()) if agreed is None else run.waits_for(agreed, config.url)
    if not number:
        entries = capture.entries or capture.finish()
        capture.unmark()
        run.end()
        return sum_up(config.out, entries, packed.num_positions(), [did])
    return Contributed(
        directory=config.out,
        run=run.name,
        rank=run.rank,
        world_size=run.world_size,
        sequences=capture.num_own_sequences,
        sequences_made=part.made,
        positions_per_second=part.positions / part.seconds,
        unsealed_shards=number,
        waits_for=ranks,
    )
