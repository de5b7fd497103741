"""
sklformat: sparse teacher distributions on disk, for distilling language models from a cached teacher.

The names here need numpy, cffi and xxhash only; ``sklformat.distill`` holds what needs torch.
"""

from sklformat.cache.reader import Cache
from sklformat.cache.reader import open_cache as open  # noqa: A004  the frozen public name; read as skl.open
from sklformat.cache.recovery import Recovered, recover
from sklformat.cache.report import Problem, verify
from sklformat.cache.shard import Shard
from sklformat.cache.sharding import CacheWriter
from sklformat.cache.writer import ShardWriter
from sklformat.capture import Capture
from sklformat.errors import (
    AlignmentError,
    CaptureError,
    CorruptError,
    EngineError,
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
    UnfinishedError,
    UnreadableError,
    UnsupportedError,
)
from sklformat.files.copies import LocalCopies
from sklformat.format.header import Header
from sklformat.format.records import Sequence, SparseTargets
from sklformat.sampler import draw
from sklformat.views.stats import stats

__version__ = "0.1.0"

__all__ = [
    "AlignmentError",
    "Cache",
    "CacheWriter",
    "Capture",
    "CaptureError",
    "CorruptError",
    "EngineError",
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
    "UnfinishedError",
    "UnreadableError",
    "UnsupportedError",
    "draw",
    "open",
    "recover",
    "stats",
    "verify",
]
