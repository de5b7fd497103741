"""Random settings and sequences for property tests, small shards for the others, and the way to the package."""

import dataclasses
from pathlib import Path

import numpy as np
import reference
from hypothesis import strategies as st
from reference import COUNTS, R24, R24W, R32, RATIOS

import sklformat as skl
from sklformat.cache.contents import scan_directory
from sklformat.cache.manifest import write_manifest
from sklformat.files.disk import Disk

KINDS = {COUNTS: "counts", RATIOS: "ratios"}
PROFILES = {R24: "R24", R24W: "R24W", R32: "R32"}
SAMPLERS = ("unknown", "multinomial", "systematic", "topk", "topp", "thinned")
COLUMNS = ("label_logprob", "entropy", "document_start", "record_logprob")


class FastDisk(Disk):
    """A disk that does not wait for the medium; for tests that crash nothing."""

    def sync(self, fd):
        pass

    def sync_directory(self, path):
        pass


def header_of(settings: reference.Settings) -> skl.Header:
    """The package's header of the reference's settings."""
    values = dataclasses.asdict(settings)
    for name in ("version_minor", "compatible_flags"):
        del values[name]
    for name in ("tokenizer_fingerprint", "corpus_fingerprint", "teacher_fingerprint"):
        values[name] = f"{values[name]:032x}"
    values |= {
        "kind": KINDS[settings.kind],
        "profile": PROFILES[settings.profile],
        "sampler": SAMPLERS[settings.sampler],
    }
    values["columns"] = tuple(name for bit, name in enumerate(COLUMNS) if settings.columns >> bit & 1)
    return skl.Header(**values, store_tokens=settings.token_size != 0)


def targets_of(kind: int, positions) -> skl.SparseTargets:
    """The package's targets of (id, count) or (id, weight) pairs."""
    pairs = [pair for position in positions for pair in position]
    values = {"counts" if kind == COUNTS else "weights": [value for _, value in pairs]}
    offsets = np.cumsum([0, *(len(position) for position in positions)])
    return skl.SparseTargets(token_ids=[token_id for token_id, _ in pairs], offsets=offsets, **values)


def columns_of(sequence: reference.Sequence) -> dict:
    """The optional columns that a sequence has."""
    return {name: getattr(sequence, name) for name in COLUMNS if getattr(sequence, name) is not None}


def pairs_of(targets: skl.SparseTargets) -> list:
    """Lists of (id, count or weight) of the package's targets."""
    values = targets.counts if targets.counts is not None else targets.weights
    pairs = list(zip(targets.token_ids.tolist(), values.tolist(), strict=True))
    return [pairs[a:b] for a, b in zip(targets.offsets[:-1], targets.offsets[1:], strict=True)]


def write(path: Path, settings: reference.Settings, sequences, positions=None) -> bytes:
    """Write a shard with the package and return its bytes; positions: weights instead of the sequences' own codes."""
    with skl.ShardWriter(path, header=header_of(settings), disk=FastDisk()) as writer:
        for i, sequence in enumerate(sequences):
            pairs = sequence.positions if positions is None else positions[i]
            columns = columns_of(sequence)
            if positions is not None and "record_logprob" in columns:
                columns["record_logprob"] = beside(pairs, sequence)
            writer.append(sequence.tokens, targets_of(settings.kind, pairs), columns)
    return path.read_bytes()


def beside(positions, sequence: reference.Sequence) -> list[float]:
    """record_logprob of a sequence in the order of these pairs; what is not stored has -1."""
    keys = [(t, token_id) for t, records in enumerate(sequence.positions) for token_id, _ in records]
    known = dict(zip(keys, sequence.record_logprob, strict=True))
    return [known.get((t, token_id), -1.0) for t, pairs in enumerate(positions) for token_id, _ in pairs]


def small_settings(**changes) -> reference.Settings:
    """Counts of 5 rounds over 20 ids, 3 positions a sequence, tokens stored."""
    values = {"vocab_size": 20, "seq_len": 3, "rounds": 5, "token_size": 2, "sampler": 1}
    return reference.Settings(**values | changes)


def small_sequence(number: int) -> reference.Sequence:
    """A sequence for small_settings; each number gives another one."""
    tokens = [(number * 7 + i * i) % 20 for i in range(4)]
    a = number % 10
    return reference.Sequence(tokens, [[(a, 2), (a + 3, 3)], [], [(19 - a, 5)]])


def small_shard(num_sequences: int = 3, **changes) -> bytes:
    """The reference's bytes of small sequences first_sequence, first_sequence + 1, ..."""
    settings = small_settings(**changes)
    first = settings.first_sequence
    return reference.encode_shard(settings, [small_sequence(first + i) for i in range(num_sequences)])


def make_cache(directory: Path, lengths=(3, 2, 4), **changes) -> list[Path]:
    """A directory of small shards without a manifest."""
    directory.mkdir(exist_ok=True)
    paths, first = [], 0
    for number, length in enumerate(lengths):
        paths.append(directory / f"shard-{number:05}.skl")
        paths[-1].write_bytes(small_shard(length, shard_number=number, first_sequence=first, **changes))
        first += length
    return paths


def make_listed_cache(directory: Path) -> Path:
    """The same, with its manifest."""
    make_cache(directory)
    write_manifest(directory, scan_directory(directory))
    return directory


def u(bits: int):
    """Integers of some bits, the ends often."""
    return st.sampled_from([0, 1, 2**bits - 1]) | st.integers(0, 2**bits - 1)


@st.composite
def settings(draw, kinds=(COUNTS, RATIOS)) -> reference.Settings:
    """Valid settings with every field free."""
    kind = draw(st.sampled_from(kinds))
    profile = draw(st.sampled_from((R24, R24W, R32) if kind == COUNTS else (R24, R32)))
    top = 2 ** reference.ID_BITS[profile]
    vocab_size = draw(st.sampled_from([1, 2, 300, min(top, 65536), top - 1, top]) | st.integers(1, top))
    limit = 2 ** reference.CODE_BITS[profile] - 1
    words, whole = st.text(max_size=5), st.integers(-(2**63), 2**64 - 1)
    return reference.Settings(
        kind=kind,
        profile=profile,
        record_count_size=draw(st.sampled_from([1, 2])),
        token_size=draw(st.sampled_from([size for size in (0, 2, 3, 4) if size == 0 or vocab_size <= 256**size])),
        scale_log2=0 if kind == COUNTS else draw(st.sampled_from([0, 0, 1, 30])),
        columns=draw(st.integers(0, 15)),
        vocab_size=vocab_size,
        seq_len=draw(st.sampled_from([0, 1, 4])),
        rounds=draw(st.sampled_from([1, 2, limit]) | st.integers(1, limit)) if kind == COUNTS else draw(u(16)),
        shard_number=draw(u(32)),
        first_sequence=min(draw(u(64)), 2**64 - 16),
        sampler=draw(st.sampled_from((0, 1, 2, 5) if kind == COUNTS else range(6))),
        order_algorithm=draw(u(16)),
        order_version=draw(u(16)),
        proposal_temperature=1.0 if kind == COUNTS else draw(st.floats(5e-324, 100.0)),
        sampling_seed=draw(u(64)),
        packing_seed=draw(u(64)),
        tokenizer_fingerprint=draw(u(128)),
        corpus_fingerprint=draw(u(128)),
        teacher_fingerprint=draw(u(128)),
        capture=draw(st.dictionaries(words, words | whole | st.floats(-1e9, 1e9) | st.lists(st.booleans()))),
    )


@st.composite
def count_records(draw, vocab_size: int, rounds: int) -> list:
    """One position of kind counts, or none."""
    most = min(vocab_size, rounds, 8)
    ids = sorted(draw(st.lists(ids_below(vocab_size), unique=True, max_size=most)))
    if not ids:
        return []
    rest = list(range(1, rounds))
    cuts = (
        draw(st.lists(st.sampled_from(rest), unique=True, min_size=len(ids) - 1, max_size=len(ids) - 1)) if rest else []
    )
    edges = [0, *sorted(cuts), rounds]
    return [(token_id, b - a) for token_id, a, b in zip(ids, edges[:-1], edges[1:], strict=True)]


def ids_below(vocab_size: int):
    """Token ids, 0 and the last one often."""
    return st.sampled_from([0, vocab_size - 1]) | st.integers(0, vocab_size - 1)


@st.composite
def weighted_records(draw, vocab_size: int, scale_log2: int) -> list:
    """One position of kind ratios as (id, float32 weight) pairs in any order: tiny, equal, near the top, subnormal."""
    top = float(2**scale_log2)
    near = float(np.nextafter(np.float32(top), np.float32(0)))
    special = st.sampled_from([top, near, top / 2, top * 2.0**-31, top * 2.0**-32, top / 3e9, 2.0**-149, 1e-40, 0.25])
    weights = special | st.floats(2.0**-149, top, width=32)
    spread = st.integers(0, 70).map(lambda n: float(np.float32(top * 0.7**n)))
    ids = draw(st.lists(ids_below(vocab_size), unique=True, max_size=min(vocab_size, 12)))
    return [(token_id, float(np.float32(draw(weights | spread)))) for token_id in ids]


@st.composite
def sequences(draw, of: reference.Settings) -> tuple:
    """A valid sequence of these settings, and its weights where they are of kind ratios."""
    length = of.seq_len or draw(st.integers(1, 5))
    tokens = draw(st.lists(ids_below(of.vocab_size), min_size=length + 1, max_size=length + 1))
    if of.kind == COUNTS:
        weighted = None
        positions = [draw(count_records(of.vocab_size, of.rounds)) for _ in range(length)]
    else:
        weighted = [draw(weighted_records(of.vocab_size, of.scale_log2)) for _ in range(length)]
        positions = [reference.encode_ratios(pairs, of.scale_log2) for pairs in weighted]
    return reference.Sequence(tokens, positions, **draw(columns(of, positions))), weighted


@st.composite
def columns(draw, of: reference.Settings, positions: list) -> dict:
    """The optional columns that the settings name, -0 never."""

    def halves(count: int, top: float | None) -> list:
        values = st.floats(max_value=top, width=16, allow_nan=False, allow_infinity=False).map(lambda x: x + 0.0)
        return draw(st.lists(values, min_size=count, max_size=count))

    def where_records(values: list) -> list:
        return [value if records else 0.0 for value, records in zip(values, positions, strict=True)]

    length = len(positions)
    made = {}
    if of.columns & 1:
        made["label_logprob"] = where_records(halves(length, 0.0))
    if of.columns & 2:
        made["entropy"] = where_records(halves(length, None))
    if of.columns & 4:
        made["document_start"] = draw(st.lists(st.booleans(), min_size=length + 1, max_size=length + 1))
    if of.columns & 8:
        made["record_logprob"] = halves(sum(len(records) for records in positions), 0.0)
    return made


@st.composite
def shards(draw, kinds=(COUNTS, RATIOS)) -> tuple:
    """Settings, sequences, and the weights of each sequence (None for counts)."""
    of = draw(settings(kinds))
    made = [draw(sequences(of)) for _ in range(draw(st.integers(0, 3)))]
    return of, [sequence for sequence, _ in made], None if of.kind == COUNTS else [weights for _, weights in made]
