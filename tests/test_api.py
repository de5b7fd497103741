"""The public surface: names that others rely on, and what importing them costs."""

import subprocess
import sys

import sklformat as skl

NAMES = """
    AlignmentError Cache Capture CaptureError CorruptError FormatError Header InUseError LocalCopies MissingShardError
    Problem Recovered RemoteError ResumeError RingClosedError RingTimeoutError Sequence SettingsError Shard ShardWriter
    SklError SparseTargets TruncatedError UnsupportedError draw open recover verify
"""


def test_public_names():
    """The public names of the format are exactly these."""
    assert NAMES.split() == sorted(skl.__all__)
    assert all(hasattr(skl, name) for name in skl.__all__)


def test_import_is_light():
    """Importing the format loads no torch and nothing of another floor."""
    heavy = ["fsspec", "torch", "mmap_ninja", "pyarrow", "matplotlib", "transformers", "tokenizers", "tyro", "tqdm"]
    heavy += ["sklformat.distill", "sklformat.interop"]
    code = f"import sys, sklformat; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
