"""
The header of a shard: every setting that its records were made with.

Turns settings into the 4096 bytes of SPEC.md section 7 and back; reads and writes no file.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sklformat.checksums import checksum, describe_mismatch, fingerprint
from sklformat.errors import CorruptError, TruncatedError, UnsupportedError
from sklformat.format import layout
from sklformat.format.captures import canonical_json, parse_capture, plain_capture
from sklformat.format.columns import bits_of, check_names

_NO_FINGERPRINT = "0" * 32
_ENUMS: dict[str, dict[str, int]] = {
    "kind": layout.KINDS,
    "profile": layout.PROFILES,
    "row_convention": layout.ROW_CONVENTIONS,
    "sampler": layout.SAMPLERS,
}


def is_unbiased(sampler: str | None, proposal_temperature: float, capture: Mapping[str, Any]) -> bool:
    """
    Whether the mean of records over their draws is known to be the teacher's distribution.

    Importance weights divided by their sum are not; that they were left as they are, a capture says.
    """
    weighted = capture.get("weighted")
    if isinstance(weighted, Mapping) and weighted.get("unbiased") is not True:
        return False
    how = capture.get("sampler")
    undivided = isinstance(how, Mapping) and how.get("unbiased") is True
    return sampler in layout.UNBIASED_SAMPLERS and (proposal_temperature == 1 or undivided)


def other_teacher(header: Header) -> str | None:
    """
    Fingerprint of the teacher that log-probs and entropies in the columns are of, where it is not the one that the
    records are of, but was asked about them later; None: they are of the same.
    """
    rescored = header.capture.get("rescored")
    teacher = rescored.get("teacher") if isinstance(rescored, Mapping) else None
    if not isinstance(teacher, Mapping) or teacher.get("fingerprint") == header.teacher_fingerprint:
        return None
    return str(teacher.get("fingerprint"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """
    Settings of one shard; all shards of a cache share them, except shard_number and first_sequence.

    Args:
        vocab_size: Ids and tokens are below it, 1..2**24.
        seq_len: Positions of every sequence, 1..2**22; 0: ragged, each sequence says its own.
        kind: "counts" (records hold counts that sum to ``rounds``) or "ratios" (positive weights in 7-bit ratios).
        rounds: Draws per position, 1..127 for counts (63 for profile R24W); for ratios 0 (not drawn) to 65535.
        sampler: "multinomial", "systematic", "topk", "topp", "thinned" (from other records, the capture says which) or
            "unknown"; None: multinomial where rounds > 0.
        proposal_temperature: Exponent t of the proposal q ∝ p**t, > 0; counts need 1.
        shard_number: Place of the shard in its cache, 0..2**32 - 1.
        first_sequence: Global number of the shard's first sequence.
        profile: "R24" (17-bit ids), "R24W" (18-bit ids, counts of at most 63 rounds), "R32" (24-bit ids);
            None: the smallest that fits.
        store_tokens: Whether blocks hold their tokens.
        token_size: Bytes per stored token, 2, 3 or 4; None: the smallest that fits.
        record_count_size: Bytes of a position's number of records, 1 (up to 255) or 2 (up to 65535); None: 1, or 2
            where ratios have more than 255 rounds.
        scale_log2: Ratios only: weights lie in (0, 2**scale_log2], 0..30.
        columns: Optional columns: "label_logprob" and "entropy" (a float16 per position, in nats), "document_start" (a
            bit per token), "record_logprob" (a float16 per record, in nats).
        capture: What else is worth knowing about the capture; JSON, at most 3832 bytes in canonical form.
        row_convention: "next-token": the record at position t describes token t + 1.
        sampling_seed, packing_seed: 0..2**64 - 1.
        order_algorithm, order_version: Of the packing order; 0: not packed by an order of SPEC section 12.
        tokenizer_fingerprint, corpus_fingerprint, teacher_fingerprint: 32 hexadecimal digits; zeros: unknown.

    Raises:
        ValueError: A value out of range, or settings that contradict each other; the message says which and what to do.
        TypeError: A value of the wrong type.

    Source: SPEC section 7.
    """

    vocab_size: int
    seq_len: int
    kind: str
    rounds: int
    sampler: str | None = None
    proposal_temperature: float = 1.0
    shard_number: int = 0
    first_sequence: int = 0
    profile: str | None = None
    store_tokens: bool = True
    token_size: int | None = None
    record_count_size: int | None = None
    scale_log2: int = 0
    columns: tuple[str, ...] = ()
    capture: Mapping[str, Any] = field(default_factory=dict, hash=False)  # compared, but a dict has no hash
    row_convention: str = "next-token"
    sampling_seed: int = 0
    packing_seed: int = 0
    order_algorithm: int = 0
    order_version: int = 0
    tokenizer_fingerprint: str = _NO_FINGERPRINT
    corpus_fingerprint: str = _NO_FINGERPRINT
    teacher_fingerprint: str = _NO_FINGERPRINT

    def __post_init__(self) -> None:
        self._check_ranges()
        if self.sampler is None:
            self._set("sampler", "multinomial" if self.rounds > 0 else "unknown")
        if self.profile is None:
            self._set("profile", self._smallest_profile())
        if self.record_count_size is None:
            self._set("record_count_size", 2 if self.kind == "ratios" and self.rounds > 255 else 1)
        if self.token_size is None:
            self._set("token_size", self._smallest_token_size() if self.store_tokens else 0)
        self._set("columns", tuple(name for name in layout.COLUMNS if name in self.columns))
        self._set("capture", plain_capture(self.capture))
        self._check_together()

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def _check_ranges(self) -> None:
        u32, u64 = (1 << 32) - 1, (1 << 64) - 1
        for name, low, high in (
            ("vocab_size", 1, layout.MAX_VOCAB_SIZE),
            ("seq_len", 0, layout.MAX_POSITIONS),
            ("rounds", 0, layout.MAX_ROUNDS),
            ("shard_number", 0, u32),
            ("first_sequence", 0, u64),
            ("scale_log2", 0, layout.MAX_SCALE_LOG2),
            ("sampling_seed", 0, u64),
            ("packing_seed", 0, u64),
            ("order_algorithm", 0, 65535),
            ("order_version", 0, 65535),
        ):
            value = operator.index(getattr(self, name))
            self._set(name, value)
            if not low <= value <= high:
                raise ValueError(f"{name} must be in {low}..{high}, got {value}")
        for name, choices in _ENUMS.items():
            value = getattr(self, name)
            if value not in choices and not (value is None and name in ("sampler", "profile")):
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
        if isinstance(self.columns, str):
            raise TypeError(
                f"columns must be a tuple of names, got the string {self.columns!r}; write ({self.columns!r},)"
            )
        check_names(self.columns)
        if not (math.isfinite(self.proposal_temperature) and self.proposal_temperature > 0):
            raise ValueError(f"proposal_temperature must be positive and finite, got {self.proposal_temperature}")
        for name in ("tokenizer_fingerprint", "corpus_fingerprint", "teacher_fingerprint"):
            value = getattr(self, name)
            if len(value) != 32 or set(value) - set("0123456789abcdef"):
                raise ValueError(f"{name} must be 32 lower-case hexadecimal digits, got {value!r}")

    def _smallest_profile(self) -> str:
        names = ("R24", "R24W", "R32") if self.kind == "counts" and self.rounds <= 63 else ("R24", "R32")
        return next(name for name in names if self.vocab_size <= 1 << layout.ID_BITS[name])

    def _smallest_token_size(self) -> int:
        return 2 if self.vocab_size <= 1 << 16 else 3

    def _check_together(self) -> None:
        assert self.profile is not None
        if self.vocab_size > 1 << layout.ID_BITS[self.profile]:
            raise ValueError(
                f"profile {self.profile} holds ids below {1 << layout.ID_BITS[self.profile]}, but vocab_size is "
                f"{self.vocab_size}; use profile {self._smallest_profile()}, or leave profile out"
            )
        if self.kind == "counts":
            most = (1 << layout.CODE_BITS[self.profile]) - 1
            if not 1 <= self.rounds <= most:
                raise ValueError(
                    f"counts of profile {self.profile} need rounds in 1..{most}, got {self.rounds}; "
                    "more rounds go through kind 'ratios'"
                )
            if self.proposal_temperature != 1.0:
                raise ValueError("counts need proposal_temperature 1; other proposals go through kind 'ratios'")
            if self.biased:
                raise ValueError(f"counts are of drawn ids, but sampler {self.sampler} draws none; use kind 'ratios'")
            if self.scale_log2 != 0:
                raise ValueError("scale_log2 belongs to kind 'ratios'; counts have none")
        elif self.profile == "R24W":
            raise ValueError("profile R24W holds counts only; ratios need R24 or R32")
        if self.record_count_size not in (1, 2):
            raise ValueError(f"record_count_size must be 1 or 2, got {self.record_count_size}")
        sizes = (2, 3, 4) if self.store_tokens else (0,)
        if self.token_size not in sizes or (self.token_size and self.vocab_size > 1 << (8 * self.token_size)):
            raise ValueError(
                f"token_size {self.token_size} does not hold {'ids below ' + str(self.vocab_size)}"
                if self.store_tokens
                else f"token_size must be 0 where tokens are not stored, got {self.token_size}"
            )
        if (size := len(canonical_json(self.capture))) > layout.MAX_CAPTURE_SIZE:
            raise ValueError(
                f"capture takes {size} bytes as JSON, the header has room for {layout.MAX_CAPTURE_SIZE}; shorten it"
            )

    @property
    def scale(self) -> float:
        """Largest weight that kind "ratios" holds, a power of two."""
        return float(1 << self.scale_log2)

    @property
    def biased(self) -> bool:
        """Whether the records leave out part of the teacher's distribution by design (Top-K, Top-p)."""
        return self.sampler in ("topk", "topp")

    def pack(self) -> bytes:
        """The 4096 bytes of SPEC section 7."""
        capture = canonical_json(self.capture)
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        values |= {name: choices[values[name]] for name, choices in _ENUMS.items()}
        values |= {
            "magic": layout.HEADER_MAGIC,
            "version_major": layout.VERSION_MAJOR,
            "version_minor": layout.VERSION_MINOR,
            "header_size": layout.HEADER_SIZE,
            "incompatible_flags": 0,
            "compatible_flags": 0,
            "columns": bits_of(self.columns),
            "capture_size": len(capture),
            "capture": capture,
            "header_checksum": 0,
        }
        data = layout.pack(layout.HEADER_FIELDS, values)
        data[-8:] = checksum(data[:-8]).to_bytes(8, "little")
        return bytes(data)

    @property
    def cache_key(self) -> str:
        """Identity of the settings that all shards of a cache share, 32 hexadecimal digits.  SPEC section 6.2."""
        # Version and flags before byte 32 stay out: they say how to read, not what was captured.
        shared = dataclasses.replace(self, shard_number=0, first_sequence=0)
        return fingerprint(shared.pack()[32:-8])

    @property
    def shard_key(self) -> int:
        """Seed of every checksum in the shard: the low 64 bits of its key.  SPEC section 6.2."""
        cache_key = int(self.cache_key, 16).to_bytes(16, "little")
        return int(fingerprint(cache_key + self.shard_number.to_bytes(4, "little")), 16) & ((1 << 64) - 1)

    def differences(self, other: Header) -> list[str]:
        """One "name: ours != theirs" for each setting, or part of capture, that differs; place in the cache aside."""
        return [
            line
            for f in dataclasses.fields(self)
            if f.name not in ("shard_number", "first_sequence")
            for line in _differences(f.name, getattr(self, f.name), getattr(other, f.name))
        ]


def _differences(name: str, ours: Any, theirs: Any) -> list[str]:
    if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
        keys = sorted({*ours, *theirs})
        return [line for key in keys for line in _differences(f"{name}.{key}", ours.get(key), theirs.get(key))]
    return [f"{name}: {ours!r} != {theirs!r}"] if ours != theirs else []


def parse_header(data: bytes | memoryview) -> Header:
    """
    Read and check the 4096 bytes at the start of a shard.

    Raises:
        TruncatedError: Fewer than 4096 bytes.
        UnsupportedError: Another format, a newer major version, or an unknown flag or value; says which.
        CorruptError: Anything else that contradicts SPEC section 7.
    """
    if not layout.HEADER_MAGIC.startswith(bytes(data[:8])):
        raise UnsupportedError(
            f"not a sklformat shard: it begins with {bytes(data[:8]).hex(' ')}", section="header", offset=0
        )
    if len(data) < layout.HEADER_SIZE:
        raise TruncatedError(f"{len(data)} bytes, a header has {layout.HEADER_SIZE}", section="header", offset=0)
    data = data[: layout.HEADER_SIZE]
    values = layout.unpack(layout.HEADER_FIELDS, data)
    computed = checksum(data[:-8])
    major = values["version_major"]
    if major != layout.VERSION_MAJOR:  # before the checksum, which may lie elsewhere in another version
        raise UnsupportedError(
            f"format version {major}.{values['version_minor']}, this library reads {layout.VERSION_MAJOR}.x; "
            "install the sklformat that wrote it",
            section="header",
            offset=8,
        )
    if computed != values["header_checksum"]:
        raise CorruptError(
            describe_mismatch("checksum", values["header_checksum"], computed),
            section="header",
            offset=4088,
        )
    return _checked(values)


def _checked(values: dict[str, Any]) -> Header:
    offsets = {f.name: f.offset for f in layout.HEADER_FIELDS}

    def unsupported(name: str) -> UnsupportedError:
        text = f"{name} {values[name]:#x} is not known to version {layout.VERSION_MAJOR}.{layout.VERSION_MINOR}"
        return UnsupportedError(text + "; install a newer sklformat", section="header", offset=offsets[name])

    if values["incompatible_flags"]:
        raise unsupported("incompatible_flags")
    if values["header_size"] != layout.HEADER_SIZE:
        raise unsupported("header_size")
    names = {name: {number: text for text, number in choices.items()} for name, choices in _ENUMS.items()}
    for name, choices in names.items():
        if values[name] not in choices:
            raise unsupported(name)
    if values["columns"] >= 1 << len(layout.COLUMNS):
        raise unsupported("columns")
    if reserved := layout.first_nonzero_reserved(layout.HEADER_FIELDS, values):
        raise CorruptError(f"{reserved.name} is not zero", section="header", offset=reserved.offset)
    size = values["capture_size"]
    if size > layout.MAX_CAPTURE_SIZE or any(values["capture"][size:]):
        raise CorruptError(f"capture_size {size} does not fit the capture", section="header", offset=144)
    try:
        capture = parse_capture(values["capture"][:size])
    except ValueError as error:
        raise CorruptError(str(error), section="header", offset=256) from error
    settings = {f.name: values[f.name] for f in dataclasses.fields(Header) if f.name in values}
    settings |= {name: choices[values[name]] for name, choices in names.items()}
    settings["columns"] = tuple(name for name, bit in layout.COLUMNS.items() if values["columns"] & bit)
    settings["capture"] = capture
    settings["store_tokens"] = values["token_size"] != 0
    try:
        return Header(**settings)
    except ValueError as error:
        raise CorruptError(str(error), section="header") from error
