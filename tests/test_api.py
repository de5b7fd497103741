"""The public surface: names that others rely on, and what importing them costs."""

import re
import subprocess
import sys

import pytest

import sklformat as skl
from sklformat.cli import main

NAMES = """
    AlignmentError Cache CacheWriter Capture CaptureError CorruptError EngineError FormatError Header InUseError
    LocalCopies MissingShardError Problem Recovered RemoteError ResumeError RingClosedError RingTimeoutError Sequence
    SettingsError Shard ShardWriter SklError SparseTargets TruncatedError UnfinishedError UnreadableError
    UnsupportedError draw open recover verify
"""


FLAGS = {
    "cache": """
        adapter-base author batch-size bos columns dataset dataset-split device device-map dtype encoding
        engine exclude field finish first-sequence gpu-memory include isolate-documents json k keep-versions
        max-unpack-ratio num-sequences on-bad-file out p packing packing-seed proposal-temperature rank
        ring-mib rounds run sampler seed seq-len sequences-per-shard special-tokens store-tokens teacher
        tensor-parallel text tokens truncate trust-remote-code unbiased-weights work-dir world-size
    """,
    "estimate": """
        adapter-base batch-size calibration-sequences dataset dataset-split device disk-tb dtype encoding exclude
        field gpu-price gpus include json learnt-per-sequence max-unpack-ratio on-bad-file positions
        positions-per-second proposal-temperature rounds seq-len sequences-per-shard store-tokens teacher text
        trust-remote-code unique-tokens vocab-size
    """,
    "merge": "json out sequences-per-shard",
    "slice": "json out sequences-per-shard",
    "subsample": "json out rounds seed sequences-per-shard",
    "rescore": """
        adapter-base batch-size columns device device-map dtype engine gpu-memory json largest-weight out teacher
        tensor-parallel tokens trust-remote-code weights
    """,
    "train": """
        accumulation adam-eps adapter-base batch-size best-by betas cache cache-weights ce-weight compile decay decode
        device dtype eval-cache eval-every eval-sequences gradient-checkpointing hidden-size hold-out isolate-documents
        json keep-checkpoint learning-rate log-every lora-alpha lora-rank lora-targets max-grad-norm method
        min-learning-rate num-heads num-layers num-workers out packing packing-seed param-dtype report-to save-every
        schedule seed seq-len shard steps student teacher tokenizer tokens truncate trust-remote-code warmup
        warmup-steps weight-decay window
    """,
    "plot": "json",
    "view": "first json positions student tokenizer trust-remote-code",
}


@pytest.mark.parametrize("verb", FLAGS)
def test_flags(verb, capfd):
    """The flags of a verb are exactly these."""
    assert 0 == main([verb, "--help"])
    lines = capfd.readouterr().out.splitlines()
    found = {re.match(r"\W*--([a-z-]+)", line)[1] for line in lines if re.match(r"\W*--[a-z]", line)}
    assert set(FLAGS[verb].split()) == found


def test_public_names():
    """The public names of the format are exactly these."""
    assert NAMES.split() == sorted(skl.__all__)
    assert all(hasattr(skl, name) for name in skl.__all__)


def test_help_and_wrong_flags_are_light():
    """Help and a wrong flag are answered by every verb without loading torch."""
    code = """
import contextlib, io, sys
from sklformat import cli
for verb in cli._VERBS:
    for flag, status in (("--help", 0), ("--bogus", 2)):
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            assert status == cli.main([verb, flag]), (verb, flag)
print([name for name in ("torch", "transformers", "tokenizers", "pyarrow", "matplotlib") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "[]\n" == done.stdout


def test_import_is_light():
    """Importing the format loads no torch and nothing of another floor."""
    heavy = ["fsspec", "torch", "mmap_ninja", "pyarrow", "matplotlib", "transformers", "tokenizers", "tyro", "tqdm"]
    heavy += ["sklformat.distill", "sklformat.interop"]
    code = f"import sys, sklformat; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
