"""
Fuzz opening, reading, verifying and recovering: python tests/fuzz/fuzz_shards.py --seconds 60 --seed 1

Small sound shards and caches of the reference are changed, most of them signed again so that the checks behind the
checksums are reached.  Laws, for every input:

* the package raises a FormatError and nothing else, within a second, and allocates by the input's size, not its claims;
* ``verify`` finds nothing exactly where the reference reader finds nothing, and then every value is the reference's;
* what is read of an input that the reference refuses is refused too, but for ids that come twice, which verify finds;
* ``recover`` cuts to a prefix that the reference accepts once it is sealed.
"""

import argparse
import collections
import functools
import json
import random
import re
import shutil
import struct
import sys
import tempfile
import time
import tracemalloc
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

import reference
from reference import COUNTS, R24, R24W, R32, RATIOS

import sklformat as skl
from sklformat.cache.report import inspect
from sklformat.format import layout

MEMORY_FACTOR, MEMORY_CONSTANT = 16, 1 << 19
"""A decoded record takes 9 bytes for 3, a position 8 for 1, and verify sorts; no claim of a field goes beyond that."""
MAX_SECONDS = 1.0
SHARD_NAME = "shard-00000.skl"
SHARDS = 200


class BrokenLawError(Exception):
    """A law does not hold."""


# Sound inputs


def some_settings(rng: random.Random, **changes) -> reference.Settings:
    kind, profile, bits, rounds = rng.choice(
        [
            (COUNTS, R24, 17, 127),
            (COUNTS, R24W, 18, 63),
            (COUNTS, R32, 24, 127),
            (RATIOS, R24, 17, 65535),
            (RATIOS, R32, 24, 65535),
        ]
    )
    vocab_size = rng.choice([20, 2**bits])
    values = {
        "kind": kind,
        "profile": profile,
        "vocab_size": vocab_size,
        "rounds": rng.choice([3, rounds]),
        "record_count_size": rng.choice([1, 2]),
        "token_size": rng.choice([size for size in (0, 2, 3, 4) if size == 0 or vocab_size <= 256**size]),
        "columns": rng.randrange(16),
        "seq_len": rng.choice([0, 3]),
        "sampler": rng.choice((0, 1, 2, 5) if kind == COUNTS else range(6)),
        "scale_log2": rng.choice([0, 2]) if kind == RATIOS else 0,
        "capture": rng.choice([{}, {"teacher": "t", "text": "\u00e9\n"}]),
    }
    return reference.Settings(**values | changes)


def some_sequence(rng: random.Random, of: reference.Settings) -> reference.Sequence:
    length = of.seq_len or rng.randrange(1, 6)
    positions = []
    for _ in range(length):
        ids = sorted(rng.sample(range(20), rng.randrange(4))) + [of.vocab_size - 1] * rng.randrange(2)
        ids = sorted(set(ids))[: of.rounds or 4]
        if of.kind == COUNTS:
            rest = of.rounds - len(ids)
            positions.append([(i, 1 + (rest if place == 0 else 0)) for place, i in enumerate(ids)])
        else:
            positions.append(reference.encode_ratios([(i, rng.choice([0.5, 0.25, 0.01])) for i in ids], of.scale_log2))
    tokens = [rng.choice([rng.randrange(20), of.vocab_size - 1]) for _ in range(length + 1)]
    column = [-0.5 if records else 0.0 for records in positions]
    values = (column, column, [i % 3 == 0 for i in tokens], [-0.25 * len(p) for p in positions for _ in p])
    there = [value if of.columns >> bit & 1 else None for bit, value in enumerate(values)]
    return reference.Sequence(tokens, positions, *there)


@functools.lru_cache(maxsize=256)
def sound_parts(number: int, shard_number: int = 0, first_sequence: int = 0) -> tuple[bytes, tuple[bytes, ...]]:
    """Header and blocks of one of many sound shards."""
    rng = random.Random(number)
    settings = some_settings(rng, shard_number=shard_number, first_sequence=first_sequence)
    header = reference.encode_header(settings)
    seed = reference.shard_key_of(header)
    sequences = [some_sequence(rng, settings) for _ in range(rng.randrange(4))]
    return header, tuple(reference.encode_block(settings, one, n, seed) for n, one in enumerate(sequences))


class Parts:
    """A shard in pieces that can be changed and joined again."""

    def __init__(self, *which: int):
        header, blocks = sound_parts(*which)
        self.header, self.blocks = bytearray(header), [bytearray(block) for block in blocks]

    def sign(self):
        """Make every checksum of header and blocks right again."""
        self.header[4088:] = struct.pack("<Q", reference.xxh64(bytes(self.header[:4088]), 0))
        seed = reference.shard_key_of(bytes(self.header))
        for block in self.blocks:
            if len(block) >= 64:
                block[40:48] = struct.pack("<Q", reference.xxh64(bytes(block[64:]), seed))
                block[56:64] = struct.pack("<Q", reference.xxh64(bytes(block[:56]), seed))

    def join(self) -> bytearray:
        return bytearray(reference.join_shard(bytes(self.header), [bytes(b) for b in self.blocks if len(b) >= 64]))


def number_near(rng: random.Random, size: int, old: int) -> int:
    """A value for an unsigned field: its ends, near the old one, or any."""
    top = 256**size - 1
    near = [0, 1, 2, top, top - 1, top // 2, old + 1, old - 1, old * 2, old ^ (1 << rng.randrange(8 * size))]
    far = [rng.getrandbits(8 * size), 1 << rng.randrange(8 * size), 2**22, 2**24, 2**30, 255, 65535]
    new = rng.choice(near + far)
    return new & top


def set_field(rng: random.Random, data: bytearray, start: int, fields) -> None:
    """Change one field of a table; long ones at one byte."""
    field = rng.choice(fields)
    at, size = start + field.offset, field.size
    if size > 8:
        at, size = at + rng.randrange(size), 1
    old = int.from_bytes(data[at : at + size], "little")
    data[at : at + size] = number_near(rng, size, old).to_bytes(size, "little")


CAPTURES = [
    b"",
    b"{",
    b"[]",
    b"1",
    b"null",
    b'{"a":NaN}',
    b'{"a":1e999}',
    b'{"a":-1E-999}',
    b'{"b":1,"a":2}',
    b'{"a":1,"a":2}',
    b'{"a": 1}',
    b'{"a":1.0}',
    b'{"a":1.00}',
    b'{"a":"\xc3\xa9"}',
    b'{"a":"\\u00e9"}',
    b'{"a":"\\ud800"}',
    b'{"a":"\\ud83d\\ude00"}',
    b'{"a":"\xff"}',
    b"\xef\xbb\xbf{}",
    b'{"a":' + b"9" * 3000 + b"}",
    b'{"a":' + b"[" * 1500 + b"]" * 1500 + b"}",
    b'{"a":' * 600 + b"1" + b"}" * 600,
    b'{"a":"\\/"}',
    b'{"a":"' + b"x" * 3823 + b'"}',
    b'{"":{}}',
    b'{"a":-0}',
    b'{"a":-0.0}',
    b'{"a":true}',
    b"{}\n",
]


def change_parts(rng: random.Random, parts: Parts, other: Parts) -> None:
    """One change of a header or of blocks, before they are signed and joined."""
    what = rng.randrange(12)
    blocks = parts.blocks
    block = rng.choice(blocks) if blocks else None
    if what <= 1 or block is None:
        set_field(rng, parts.header, 0, layout.HEADER_FIELDS)
    elif what == 2:
        text = rng.choice(CAPTURES)[:3832]
        parts.header[144:148] = struct.pack("<I", len(text))
        parts.header[256:4088] = text + bytes(3832 - len(text))
    elif what == 3:
        set_field(rng, block, 0, layout.BLOCK_FIELDS)
    elif what <= 7:  # the payload: one byte, mostly before the padding
        size = struct.unpack_from("<I", block, 24)[0] if rng.randrange(8) else len(block) - 64
        at = 64 + rng.randrange(max(1, min(size, len(block) - 64)))
        block[at] = rng.choice([0, 1, 127, 128, 255, block[at] ^ (1 << rng.randrange(8)), block[at] + 1 & 255])
    elif what == 8:  # two records, or two tokens, change places
        size = len(block) - 64
        a, b, n = 64 + rng.randrange(size), 64 + rng.randrange(size), rng.choice([2, 3, 4])
        block[a : a + n], block[b : b + n] = block[b : b + n], block[a : a + n]
        del block[64 + size :]
    elif what == 9:  # blocks: twice, gone, in another order, of another shard
        how = rng.randrange(4)
        if how == 0:
            blocks.append(bytearray(block))
        elif how == 1:
            blocks.remove(block)
        elif how == 2:
            rng.shuffle(blocks)
        elif other.blocks:
            blocks[rng.randrange(len(blocks))] = bytearray(rng.choice(other.blocks))
    elif what == 10:  # a block longer or shorter
        if rng.randrange(2):
            block += bytes(64)
        else:
            del block[-64:]
    else:
        parts.header[40:56] = other.header[40:56]


def change_end(rng: random.Random, data: bytearray) -> None:
    """One change of index or trailer, signed again where the trailer still says where the index is."""
    trailer = len(data) - 64
    start, count = struct.unpack_from("<QQ", data, trailer + 8)
    if rng.randrange(3) and trailer > start:
        if count and rng.randrange(4):
            field = rng.choice(layout.INDEX_COLUMNS)
            row = rng.randrange(count)
            at = start + field.offset * count + row * field.size
            old = int.from_bytes(data[at : at + field.size], "little")
            data[at : at + field.size] = number_near(rng, field.size, old).to_bytes(field.size, "little")
        else:
            data[start + rng.randrange(trailer - start)] ^= 1 << rng.randrange(8)
    else:
        set_field(rng, data, trailer, layout.TRAILER_FIELDS)
    if rng.randrange(8) == 0:
        return
    header, seed = bytes(data[:4096]), reference.shard_key_of(bytes(data[:4096]))
    checksums = struct.unpack_from(f"<{count}Q", data, start + 16 * count)
    if rng.randrange(8):
        data[trailer + 32 : trailer + 48] = reference.root_of(header, checksums).to_bytes(16, "little")
    if rng.randrange(8):
        data[trailer + 48 : trailer + 56] = struct.pack("<Q", reference.xxh64(bytes(data[start:trailer]), seed))
    data[trailer + 56 :] = struct.pack("<Q", reference.xxh64(bytes(data[trailer : trailer + 56]), seed))


def change_raw(rng: random.Random, data: bytearray, other: bytes) -> None:
    """One change that no checksum knows of: a bit, zeros, a cut, a piece from elsewhere."""
    if not data:
        return
    what, at, n = rng.randrange(6), rng.randrange(len(data)), rng.choice([1, 8, 64, 512])
    if rng.randrange(2):
        at = min(len(data) - 1, max(0, rng.choice([0, 4096, len(data) - 64]) + rng.randrange(-70, 200)))
    if what <= 1:
        data[at] ^= 1 << rng.randrange(8)
    elif what == 2:
        data[at : at + n] = bytes(len(data[at : at + n]))
    elif what == 3:
        del data[at:]
    elif what == 4:
        data[at:] = other[at:]
    else:
        data += rng.choice([b"\0", bytes(64), bytes(data[-64:]), other])


def some_shard(rng: random.Random) -> bytes:
    """A shard that is sound, or changed once to a few times."""
    parts, other = Parts(rng.randrange(SHARDS)), Parts(rng.randrange(SHARDS))
    for _ in range(rng.choice([0, 1, 1, 1, 2])):
        change_parts(rng, parts, other)
    if rng.randrange(16):
        parts.sign()
    data = parts.join()
    if rng.randrange(3) == 0:
        change_end(rng, data)
    if rng.randrange(4) == 0:
        for _ in range(rng.randrange(1, 3)):
            change_raw(rng, data, bytes(other.join()))
    return bytes(data)


# Laws


def measured(input_size: int, call):
    """
    A call's result, or its FormatError; within the processor's time and the memory that the input's size allows.

    A call that takes more is tried once again: the interpreter now and then doubles a table of its own, such as that of
    interned strings.
    """
    result, seconds, peak = measured_once(call)
    if seconds > MAX_SECONDS or peak > MEMORY_FACTOR * input_size + MEMORY_CONSTANT:
        _, seconds, peak = measured_once(call)
    if seconds > MAX_SECONDS:
        raise BrokenLawError(f"{seconds:.1f} s")
    if peak > MEMORY_FACTOR * input_size + MEMORY_CONSTANT:
        raise BrokenLawError(f"{peak} bytes allocated for an input of {input_size}")
    return result


def measured_once(call):
    """A call's result, or its FormatError; the processor's seconds, and the most bytes it held at a time."""
    tracemalloc.reset_peak()
    before, begin = tracemalloc.get_traced_memory()[0], time.process_time()
    try:
        result = call()
    except skl.FormatError as error:
        str(error)
        result = error
    return result, time.process_time() - begin, tracemalloc.get_traced_memory()[1] - before


def values_of(path: Path) -> list:
    """Everything that the package reads of a shard or cache."""
    with skl.open(path) as cache:
        return [
            (
                None if sequence.tokens is None else sequence.tokens.tolist(),
                np.diff(sequence.targets.offsets).tolist(),
                sequence.targets.token_ids.tolist(),
                (sequence.targets.counts if sequence.targets.weights is None else sequence.targets.weights).tolist(),
                {name: column.tolist() for name, column in sequence.columns.items()},
                sequence.alignment,
            )
            for sequence in cache
        ]


def values_of_reference(shard: reference.Shard) -> list:
    unit = np.float32(2.0 ** (shard.settings.scale_log2 - 31))
    made = []
    for sequence in shard.sequences:
        pairs = [pair for position in sequence.positions for pair in position]
        values = [code for _, code in pairs]
        if shard.settings.kind == RATIOS:
            values = [float(np.float32(v) * unit) for position in sequence.values() for v in position]
        made.append(
            (
                sequence.tokens,
                [len(position) for position in sequence.positions],
                [token_id for token_id, _ in pairs],
                values,
                {name: getattr(sequence, name) for name in layout.COLUMNS if getattr(sequence, name) is not None},
                sequence.alignment,
            )
        )
    return made


REFUSALS = (
    reference.UnsupportedError,
    reference.TruncatedError,
    reference.CorruptError,
    reference.MissingShardError,
)


def refusal(call):
    """The reference's result, or its refusal."""
    try:
        return call()
    except REFUSALS as error:
        return error


def judge_both(path: Path, size: int, expected, values) -> None:
    """Reading and verifying agree with the reference's verdict."""
    problems = measured(size, lambda: skl.verify(path))
    read = measured(size, lambda: values_of(path))
    measured(size, lambda: inspect(path))
    found = [str(problems)] if isinstance(problems, skl.FormatError) else [str(problem) for problem in problems]
    if isinstance(expected, REFUSALS):
        if not found:
            raise BrokenLawError(f"verify finds nothing, the reference: {expected!r}")
        # Of several faults another may come first: in a file too short for its trailer, in a block and the index.
        alike = isinstance(read, skl.FormatError) and (
            type(read).__name__ == type(expected).__name__ or size < 4160 or read.section in ("block", "index")
        )
        if path.is_file() and not alike and str(expected) != "id twice":
            raise BrokenLawError(f"read {read!r}, the reference {expected!r}")
    else:
        if found:
            raise BrokenLawError(f"the reference finds nothing, verify {found}")
        if read != values(expected):
            raise BrokenLawError(f"read {read}, the reference {values(expected)}")


def judge_shard(directory: Path, data: bytes) -> str:
    """The laws on one shard; returns the reference's verdict."""
    path = directory / SHARD_NAME
    path.write_bytes(data)
    expected = refusal(lambda: reference.decode_shard(data))
    judge_both(path, len(data), expected, values_of_reference)
    path.unlink()
    return verdict_of(expected)


def verdict_of(expected) -> str:
    """What the reference says, without the values."""
    return re.sub(r"[-.\w]*\d[-.\w]*", "..", str(expected)) if isinstance(expected, Exception) else "sound"


def judge_recovery(directory: Path, data: bytes) -> str:
    """recover keeps a prefix that is sound once sealed; returns what it did."""
    path, partial = directory / SHARD_NAME, directory / (SHARD_NAME + ".partial")
    partial.write_bytes(data)
    result = measured(len(data), lambda: skl.recover(path))
    left = partial.read_bytes()
    partial.unlink()
    if isinstance(result, skl.FormatError):
        if left != data:
            raise BrokenLawError(f"{result!r}, but the file was changed")
        return "recover: " + type(result).__name__
    if left != data[: len(left)] or result.bytes_cut != len(data) - len(left):
        raise BrokenLawError(f"{result} of {len(data)} bytes leaves {len(left)}")
    if not left:
        return "recover: nothing"
    blocks, at = [], 4096
    while at < len(left):
        size = 64 + reference.round_up(struct.unpack_from("<I", left, at + 24)[0] + 64)
        blocks.append(left[at : at + size])
        at += size
    sealed = refusal(lambda: reference.decode_shard(reference.join_shard(left[:4096], blocks)))
    if len(blocks) != result.sequences or (isinstance(sealed, Exception) and str(sealed) != "id twice"):
        raise BrokenLawError(f"recover keeps {result.sequences} of {len(blocks)} blocks: {sealed!r}")
    return f"recover: {min(len(blocks), 2)} or more"


def change_manifest(rng: random.Random, directory: Path) -> None:
    """One lie, mostly with the right digest, or another text."""
    path = directory / "manifest.json"
    if rng.randrange(4) == 0:
        text = bytearray(path.read_bytes())
        for _ in range(rng.randrange(1, 4)):
            change_raw(rng, text, rng.choice([b"{}", b"[" * 3000, b'{"a":' * 3000, bytes(text[::-1]), b"\xff\xfe"]))
        path.write_bytes(text)
        return
    body = json.loads(path.read_text())
    del body["digest"]
    shard = rng.choice(body["shards"])
    strange = [None, True, 0, 1, 1.0, -1, 2**63, 2**64, 2**200, 1e308, "", "x", "a\0b", "..", "/", "\ud800", [], {}]
    what = rng.randrange(9)
    if what <= 2:
        key = rng.choice(list(shard))
        old = shard[key]
        shard[key] = rng.choice([*strange, old + 1, old - 1] if isinstance(old, int) else strange)
    elif what == 3:
        body[rng.choice([*body, "more"])] = rng.choice(strange)
    elif what == 4:
        del body[rng.choice(list(body))]
    elif what == 5:
        body["shards"].append(dict(shard))
    elif what == 6:
        body["shards"].remove(shard)
    elif what == 7:
        rng.shuffle(body["shards"])
    else:
        shard[rng.choice([*shard, "more"])] = rng.choice(strange)
    if rng.randrange(4) and "shards" in body and "fingerprint" in body:
        try:
            roots = [int(shard["fingerprint"], 16) for shard in body["shards"]]
            body["fingerprint"] = f"{reference.cache_fingerprint(roots):032x}"
        except (KeyError, TypeError, ValueError, OverflowError):
            pass  # what was put there is no fingerprint; the lie stands by itself
    body["digest"] = f"{reference.xxh128(json.dumps(body, sort_keys=True, separators=(',', ':')).encode()):032x}"
    path.write_text(json.dumps(body))


def judge_cache(directory: Path, rng: random.Random) -> str:
    """The laws on a directory of shards, with a manifest or without; returns the reference's verdict."""
    first, which = 0, rng.randrange(SHARDS)
    for place in range(rng.randrange(1, 4)):
        skew = rng.choice([0] * 12 + [1, -1])
        parts = Parts(which, place, max(0, first + skew))
        parts.blocks = parts.blocks[: rng.randrange(4)]
        if rng.randrange(24) == 0:
            change_parts(rng, parts, Parts(rng.randrange(SHARDS)))
        parts.sign()
        (directory / f"shard-{place:05}.skl").write_bytes(parts.join())
        first += len(parts.blocks)
    if rng.randrange(4):
        named = [(refusal(lambda p=p: reference.decode_shard(p.read_bytes())), p.name) for p in directory.iterdir()]
        if not any(isinstance(shard, Exception) for shard, _ in named):
            named.sort(key=lambda pair: pair[1])
            (directory / "manifest.json").write_bytes(reference.manifest_bytes(reference.expected_manifest(named)))
            if rng.randrange(4):
                change_manifest(rng, directory)
    if rng.randrange(12) == 0:
        files = sorted(directory.iterdir())
        chosen = rng.choice(files)
        chosen.rename(directory / rng.choice(["shard-9.skl", "x.skl", "x.skl.partial", "manifest.json", "y"]))
    size = sum(path.stat().st_size for path in directory.iterdir())
    expected = refusal(lambda: reference.decode_cache(directory))
    judge_both(
        directory, size, expected, lambda shards: [values for shard in shards for values in values_of_reference(shard)]
    )
    return "cache: " + verdict_of(expected)


def run(seed: int, cases: int | None = None, seconds: float | None = None) -> collections.Counter:
    """So many cases, or for so long; each case has its own seed, so that one can be run again alone."""
    verdicts: collections.Counter = collections.Counter()
    place = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(dir=place) as name:  # before memory is measured: what is imported on first use
        for number in range(20):
            judge_shard(Path(name), bytes(Parts(number).join()))
    begin, case = time.perf_counter(), 0
    tracemalloc.start()
    try:
        while (cases is None or case < cases) and (seconds is None or time.perf_counter() - begin < seconds):
            with tempfile.TemporaryDirectory(dir=place) as name:
                try:
                    verdicts[one(Path(name), seed, case)] += 1
                except Exception as error:
                    kept = Path(tempfile.gettempdir()) / f"fuzz-shards-{seed}-{case}"
                    shutil.rmtree(kept, ignore_errors=True)
                    shutil.copytree(name, kept)
                    raise BrokenLawError(f"seed {seed}, case {case} (kept in {kept}): {error!r}") from error
            case += 1
    finally:
        tracemalloc.stop()
    return verdicts


def one(directory: Path, seed: int, case: int) -> str:
    """Case number ``case`` of a seed."""
    rng = random.Random(f"{seed} {case}")
    what = rng.randrange(8)
    if what <= 4:
        return judge_shard(directory, some_shard(rng))
    if what == 5:
        data = some_shard(rng)
        return judge_recovery(directory, data[: rng.choice([len(data), rng.randrange(len(data) + 1)])])
    return judge_cache(directory, rng)


def main() -> None:
    """Run for a while and print what was seen."""
    parser = argparse.ArgumentParser(description="Fuzz the reading of shards and caches.")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int, help="run only this case")
    parser.add_argument("-v", "--verbose", action="store_true", help="count every verdict of the reference")
    arguments = parser.parse_args()
    if arguments.case is not None:
        tracemalloc.start()
        with tempfile.TemporaryDirectory() as name:
            print(one(Path(name), arguments.seed, arguments.case))
        return
    verdicts = run(arguments.seed, seconds=arguments.seconds)
    sound = sum(n for verdict, n in verdicts.items() if verdict.endswith("sound"))
    print(f"{verdicts.total()} cases, {sound} sound, {len(verdicts)} verdicts, no law broken, seed {arguments.seed}")
    if arguments.verbose:
        for verdict, n in verdicts.most_common():
            print(f"{n:7} {verdict}")


if __name__ == "__main__":
    main()
