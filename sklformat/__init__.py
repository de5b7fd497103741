"""
sklformat: sparse teacher distributions on disk, for distilling language models from a cached teacher.

The names here need numpy, cffi and xxhash only; ``sklformat.distill`` holds what needs torch.
"""

from sklformat.capture import Capture
from sklformat.copies import LocalCopies
from sklformat.errors import (
    AlignmentError,
    CaptureError,
    CorruptError,
    FormatError,
    InUseError,
    MissingShardError,
    RemoteError,
    ResumeError,
    RingClosedError,
    RingTimeoutError,
    SettingsError,
    SklError,
    TruncatedError,
    UnsupportedError,
)
from sklformat.header import Header
from sklformat.reader import Cache
from sklformat.reader import open_cache as open  # noqa: A004  the frozen public name; read as skl.open
from sklformat.records import Sequence, SparseTargets
from sklformat.recovery import Recovered, recover
from sklformat.report import Problem, verify
from sklformat.sampler import draw
from sklformat.shard import Shard
from sklformat.writer import ShardWriter

__version__ = "0.1.0"

__all__ = [
    "AlignmentError",
    "Cache",
    "Capture",
    "CaptureError",
    "CorruptError",
    "FormatError",
    "Header",
    "InUseError",
    "LocalCopies",
    "MissingShardError",
    "Problem",
    "Recovered",
    "RemoteError",
    "ResumeError",
    "RingClosedError",
    "RingTimeoutError",
    "Sequence",
    "SettingsError",
    "Shard",
    "ShardWriter",
    "SklError",
    "SparseTargets",
    "TruncatedError",
    "UnsupportedError",
    "draw",
    "open",
    "recover",
    "verify",
]
