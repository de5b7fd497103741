"""The public surface: names that others rely on, and what importing them costs."""

import ast
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

import sklformat as skl
from sklformat import native
from sklformat.cli import main
from sklformat.deprecations import warn_of

ROOT = Path(__file__).parents[1]
PACKAGE = Path(skl.__file__).parent

NAMES = """
    AlignmentError Cache CacheWriter Capture CaptureError CorruptError EngineError FormatError Header InUseError
    LocalCopies MissingShardError Problem Recovered RemoteError ResumeError RingClosedError RingTimeoutError Sequence
    SettingsError Shard ShardWriter SklError SparseTargets TruncatedError UnfinishedError UnreadableError
    UnsupportedError draw open recover stats verify
"""
LEARNING_NAMES = """
    Batch DenseTargets DenseTeacher OutputHead Shard SparseLogitDataset SparseLogitSequences Targets Teachers
    acceptance_rate calibration_error collate easy_hard_weights label_confidence linear_sparse_kl lm_loss output_head
    run_to_head sparse_kl
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
        field gpu-price gpus include json learnt-per-sequence max-unpack-ratio noise noise-rounds noise-seed
        noise-sequences on-bad-file plot positions positions-per-second proposal-temperature rounds seq-len
        sequences-per-shard store-tokens student teacher text trust-remote-code unique-tokens vocab-size
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
        device divergence dtype easy-percentile eval-cache eval-every eval-sequences gradient-checkpointing hidden-size
        hold-out isolate-documents json keep-checkpoint learning-rate log-every lora-alpha lora-rank lora-targets
        lr-ratio max-grad-norm method min-learning-rate num-heads num-layers num-workers out packing packing-seed
        param-dtype report-to save-every schedule seed seq-len shard steps student teacher temperature tokenizer tokens
        truncate trust-remote-code warmup warmup-steps weight-decay window
    """,
    "card": "json license name teacher text",
    "inspect": "json positions sequence tokenizer trust-remote-code",
    "plot": "json sample seed",
    "stats": "json sample seed",
    "view": "device dtype first json port positions serve student tokenizer trust-remote-code",
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


def test_public_names_of_the_learning_side():
    """Those of ``sklformat.distill`` too, as its source lists them: loading torch is not this test's business."""
    tree = ast.parse((PACKAGE / "distill/__init__.py").read_text())
    (listed,) = (node.value for node in tree.body if isinstance(node, ast.Assign) and node.targets[0].id == "__all__")
    assert LEARNING_NAMES.split() == ast.literal_eval(listed)


def test_version(capfd):
    """--version says package, format and kernels; pyproject.toml and CHANGELOG's newest part are of that version."""
    assert 0 == main(["--version"])
    said = rf"sklformat {skl.__version__}, format (\d+\.\d+), kernels (\w+)\n"
    form, kernels = re.fullmatch(said, capfd.readouterr().out).groups()
    assert kernels == native.kernels_name()
    newest = re.search(
        r"^## Appendix C\. Versions\n.*?^(?=\n*## )", (ROOT / "SPEC.md").read_text(), re.DOTALL | re.MULTILINE
    )
    assert form == re.findall(r"^\| (\d+\.\d+) \|", newest[0], re.MULTILINE)[-1]
    assert f'\nversion = "{skl.__version__}"\n' in (ROOT / "pyproject.toml").read_text()
    assert re.search(r"^## (.*)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[1].startswith(skl.__version__)


def outlived(sources, version):
    """Where something is still taken that should have gone with ``version`` or before."""
    of_today = tuple(map(int, version.split(".")))
    for name, source in sources.items():
        for match in re.finditer(r"""\buntil["']?[=:] ?["'](\d+(?:\.\d+)+)["']""", source):
            if tuple(map(int, match[1].split("."))) <= of_today:
                yield f"{name}: {match[0]}"


def test_what_should_have_gone_is_gone():
    """Nothing that warns of its end outlives the version that it names."""
    planted = {"a.py": 'warn_of("f", "g", until="0.3")', "b.py": 'metadata={"was": "f", "until": "0.2"}'}
    assert list(outlived(planted, "0.2.0")) == ['b.py: until": "0.2"']
    assert [] == list(outlived({str(path): path.read_text() for path in PACKAGE.rglob("*.py")}, skl.__version__))


def test_a_name_that_goes_warns_where_it_is_used():
    """The warning names the line of the program, what to use instead, and until when the old name is there."""

    def old():
        warn_of("skl.old", "skl.new", until="9.9")

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        old()
    (warning,) = said
    assert (DeprecationWarning, __file__) == (warning.category, warning.filename)
    assert "skl.old goes with version 9.9; use skl.new" == str(warning.message)


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
