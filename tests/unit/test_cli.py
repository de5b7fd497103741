"""The command line, in process: dispatch, messages, exit statuses."""

import builtins
import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from system import complaint

import sklformat as skl
from sklformat import cli, flags
from sklformat.errors import WriteError
from sklformat.files.disk import locked_directory, shared_directory
from sklformat.flags import UsageError, parse
from sklformat.settings.cache import CacheConfig
from sklformat.views import overview
from sklformat.views.printing import print_result


def write_shard(path, number=0, first=0, sequences=3, *, seal=True):
    """A small shard; returns its path."""
    header = skl.Header(
        vocab_size=50, seq_len=4, kind="counts", rounds=3, shard_number=number, first_sequence=first,
        capture={"teacher": {"name": "t"}},
    )  # fmt: skip
    writer = skl.ShardWriter(path, header=header)
    for sequence in range(first, first + sequences):
        targets = skl.SparseTargets(token_ids=[1, 7, 9], counts=[1, 2, 3], offsets=[0, 2, 2, 3, 3])
        writer.append([sequence, 1, 2, 3, 4], targets)
    writer.seal() if seal else writer.close()
    return path


@pytest.fixture
def cache(tmp_path):
    directory = tmp_path / "cache"
    directory.mkdir()
    write_shard(directory / "shard-00000.skl")
    write_shard(directory / "shard-00001.skl", 1, 3)
    return directory


def run(capfd, *words):
    """Status, stdout, and stderr, which has at most one line."""
    status = cli.main([str(word) for word in words])
    out, err = capfd.readouterr()
    assert "Traceback" not in err
    return status, out, complaint(err)


def test_help_names_every_verb(capfd):
    """--help, --version and a missing or wrong verb answer at once."""
    status, out, _ = run(capfd, "--help")
    assert 0 == status
    for verb in (
        "cache",
        "estimate",
        "train",
        "eval",
        "demo",
        "inspect",
        "card",
        "verify",
        "recover",
        "check",
        "convert",
        "rescore",
    ):
        assert f"\n  {verb} " in out
    assert 0 == run(capfd, "--version")[0]
    for words in ((), ("chache",), ("--nosuch",)):
        status, out, err = run(capfd, *words)
        assert (2, "") == (status, out)
        assert "choose one of cache, estimate, train" in err


@pytest.mark.parametrize("verb", ["inspect", "verify", "recover", "check", "convert"])
def test_help_of_format_verbs(capfd, monkeypatch, verb):
    """Help fits 80 columns and explains every flag."""
    assert_help(capfd, monkeypatch, verb)


@pytest.mark.parametrize("verb", ["cache", "train", "eval", "demo"])
def test_help_of_learning_verbs(capfd, monkeypatch, verb):
    """Help fits 80 columns and explains every flag of the config beside the verb's function."""
    pytest.importorskip("torch")
    flags = assert_help(capfd, monkeypatch, verb)
    assert "--out" in flags


def assert_help(capfd, monkeypatch, verb):
    monkeypatch.setenv("COLUMNS", "80")
    status, out, err = run(capfd, verb, "--help")
    assert (0, "") == (status, err)
    assert all(len(line) <= 80 for line in out.splitlines())
    blocks = re.split(r"\n│ (?=-|[A-Z]+ )", out)[1:]
    for block in blocks:
        words = re.sub(r"\(default:.*?\)|\(required\)", "", " ".join(re.sub("[│─╭╰╮╯]", " ", block).split()))
        assert len(words.split()) >= 4, f"no help: {words}"
    assert len(blocks) >= 3
    return out


def test_a_verbs_own_flags_come_first(capfd):
    """What a verb is about stands above the flags that it shares with others."""
    _, out, _ = run(capfd, "estimate", "--help")
    flags = re.findall(r"│ --([a-z-]+)", out)
    assert ["positions", "rounds"] == flags[:2]
    assert ["on-bad-file", "max-unpack-ratio", "json"] == flags[-3:]


def test_inspect(capfd, cache):
    """Inspect says what is there, for people and, the same, for machines."""
    status, out, _ = run(capfd, "inspect", cache)
    table = dict(line.split("  ", 1) for line in out.splitlines())
    assert 0 == status
    assert "6, from number 0" == table["sequences"].strip()
    assert "no: sampler multinomial, 3 rounds" == table["biased"].strip()
    assert "0.75 per position" == table["unique tokens"].strip()
    status, out, _ = run(capfd, "inspect", cache, "--json")
    facts = json.loads(out)
    assert (0, 6, 24, skl.open(cache).fingerprint) == (
        status, facts["sequences"], facts["positions"], facts["fingerprint"],
    )  # fmt: skip


def test_inspect_of_another_proposal(capfd, tmp_path):
    """Weights of a tempered proposal are divided by their sum, which biases them a little: inspect says so."""
    header = skl.Header(vocab_size=50, seq_len=4, kind="ratios", rounds=3, proposal_temperature=0.5)
    skl.ShardWriter(tmp_path / "a.skl", header=header).seal()
    _, out, _ = run(capfd, "inspect", tmp_path / "a.skl")
    expected = "slightly (importance weights are normalised): sampler multinomial, 3 rounds, proposal p**0.5"
    assert expected == dict(line.split("  ", 1) for line in out.splitlines())["biased"].strip()


def test_inspect_of_thinned_records(capfd, tmp_path):
    """Records thinned from unbiased ones are not biased."""
    header = skl.Header(vocab_size=50, seq_len=4, kind="counts", rounds=3, sampler="thinned")
    skl.ShardWriter(tmp_path / "a.skl", header=header).seal()
    _, out, _ = run(capfd, "inspect", tmp_path / "a.skl")
    assert "no: sampler thinned, 3 rounds" == dict(line.split("  ", 1) for line in out.splitlines())["biased"].strip()


def test_verify(capfd, cache):
    """Verify answers 0 for a sound cache and 3 with one line for each damage."""
    status, out, _ = run(capfd, "verify", cache)
    assert (0, True) == (status, "sound" in out)
    path = cache / "shard-00001.skl"
    data = bytearray(path.read_bytes())
    data[4096 + 70] ^= 1
    path.write_bytes(data)
    status, out, _ = run(capfd, "verify", cache)
    assert (3, 3) == (status, out.count("\n"))
    todo = (
        "replace the file by a sound copy, or remove it and manifest.json, then rerun the command that made the cache"
    )
    assert out.endswith(f"to fix: {todo}\n")
    assert out.startswith(f"{path}: sequence 0: byte 4096: ")
    status, out, _ = run(capfd, "verify", path, "--json")
    found = json.loads(out)
    assert (3, False, ["CorruptError"]) == (status, found["sound"], [p["error"] for p in found["problems"]])
    assert [todo] == [p["action"] for p in found["problems"]]


def test_verify_of_what_is_not_finished(capfd, cache):
    """A cache that is still being captured is not damaged: status 1, and how to finish it."""
    (cache / "shard-00009.skl.partial").touch()
    status, out, _ = run(capfd, "verify", cache)
    assert 1 == status
    assert f"\n{cache}: unfinished, " in out
    assert out.endswith("to fix: rerun the command that started it to finish it\n")


def test_verify_of_a_url(capfd):
    """A URL is verified like a directory; where nothing is, that is said in one line."""
    status, out, err = run(capfd, "verify", "memory://there/cache")
    assert (1, "") == (status, out)
    assert "verify: memory://there/cache: no .skl shards here" in err


def test_recover(capfd, cache):
    """Recover keeps the whole sequences, of a file or of every unfinished shard of a directory."""
    path = write_shard(cache / "shard-00002.skl", 2, 6, seal=False).with_suffix(".skl.partial")
    os.truncate(path, path.stat().st_size - 10)
    status, out, _ = run(capfd, "recover", cache, "--json")
    size = path.stat().st_size
    (found,) = json.loads(out)
    assert (0, str(path), 2, (size - 4096) // 2 - 10) == (status, found["path"], found["sequences"], found["bytes_cut"])
    assert "ends past the end of the file" in found["cause"]
    assert (0, f"{path}: 2 sequences kept, 0 bytes cut; rerun the command that started it to resume\n", "") == run(
        capfd, "recover", path
    )
    path.unlink()
    status, _, err = run(capfd, "recover", cache)
    assert (1, True) == (status, "nothing to recover" in err)
    status, _, err = run(capfd, "recover", cache / "shard-00000.skl")
    assert (1, True) == (status, "a sealed shard is never cut" in err)


def test_convert(capfd, cache, tmp_path):
    """Convert takes --from and --to and says what the values are."""
    status, out, _ = run(capfd, "convert", cache, tmp_path / "x", "--to", "jsonl")
    assert (0, True) == (status, "counts of 3 rounds, sampler multinomial: unbiased" in out)
    status, out, _ = run(capfd, "convert", tmp_path / "x", tmp_path / "back", "--from", "jsonl", "--json")
    assert (0, skl.open(cache).fingerprint) == (status, json.loads(out)["fingerprint"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["convert", "a"], "sklformat convert: DESTINATION is missing; see sklformat convert --help"),
        (["cache"], "sklformat cache: --teacher and --out are missing; see sklformat cache --help"),
        (["convert", "a", "b", "--rounds", "many"], "sklformat convert: --rounds takes INT, got 'many'; see sklformat"),
        (["convert", "a", "b", "--rounds", "0"], "rounds must be >= 1, got 0; see sklformat convert --help"),
        (["convert", "a", "b", "--kind", "other"], "'other'"),
        (["verify", "a", "--nosuch"], "there is no flag --nosuch; see sklformat verify --help"),
        (["train", "--step", "3"], "there is no flag --step (did you mean --steps?); see"),
        (
            ["cache", "--no_store_token"],
            "there is no flag --no-store-token (did you mean --no-store-tokens?); see sklformat ",
        ),
        (["cache", "--dataset-field", "x"], "there is no flag --dataset-field (did you mean --field?); see"),
        (["convert", "a", "b", "--form=skl"], "there is no flag --form (did you mean --from?); see"),
        (["train", "--seed", "1", "--seed=2"], "--seed is given more than once"),
        (["cache", "--store-tokens", "--no_store_tokens"], "--no_store_tokens is given more than once"),
        (["cache", "--dataset", "one", "--dataset", "two"], "--dataset is given more than once"),
        (["cache", "--teacher", "t", "--out", "o", "--tokens", "x", "--field", "y"], "field belongs to text or"),
        (["cache", "--teacher", "t", "--out", "o", "--dataset", "x", "--exclude", "y"], "exclude belongs to text"),
        (["eval", "--student", "s", "--seq-len", "8", "--tokens", "x", "--field", "text"], "field belongs to text"),
        (["estimate", "--positions", "9", "--field", "y"], "field belongs to the text of a calibration run"),
        (["demo", "--field", "y"], "field belongs to text"),
        (["verify"], "sklformat verify: PATH is missing; see sklformat verify --help"),
        (["check", "a"], "sklformat check: --tokens is missing; see sklformat check --help"),
        (["check", "--tokens", "a"], "PATH"),
    ],
)
def test_wrong_usage(capfd, words, message):
    """A command line that cannot be is one line that names the flag, and status 2."""
    status, out, err = run(capfd, *words)
    assert (2, "") == (status, out)
    assert message in err


@pytest.mark.parametrize(
    "words",
    [
        ["--text", "a", "b", "--text", "c", "--seq-len", "8"],
        ["--text=a", "--seq-len", "8", "--text", "b", "c"],
        ["--text", "a", "--seq-len=8", "--text=b", "--text=c"],
        ["--seq-len", "8", "--text", "a", "--text=b", "--text", "c"],
    ],
)
def test_values_of_a_repeated_flag_add_up(words):
    """A flag that takes several values has all of them, in their order, however often it is repeated."""
    config, _ = parse(CacheConfig, "cache", ["--teacher", "t", "--out", "o", *words])
    assert ([Path("a"), Path("b"), Path("c")], 8) == (list(config.text), config.seq_len)


@dataclasses.dataclass(frozen=True)
class Renamed:
    """A verb's settings of which two have had other names."""

    rounds: int = 50
    out: str = dataclasses.field(default="here", metadata={"was": "target-dir", "until": "9.9"})
    store: bool = dataclasses.field(default=True, metadata={"was": "keep", "until": "9.9"})


@pytest.mark.parametrize(
    ("words", "out", "store", "said"),
    [
        (["--target-dir", "a"], "a", True, "--target-dir goes with version 9.9; use --out"),
        (["--target_dir=a"], "a", True, "--target_dir goes with version 9.9; use --out"),
        (["--no-keep"], "here", False, "--no-keep goes with version 9.9; use --no-store"),
        (["--out", "a", "--no-store"], "a", False, None),
    ],
)
def test_a_flag_that_goes_is_taken_and_warned_of(capfd, words, out, store, said):
    """Its old name does what it did, and one line on stderr says what to use and until when it can be used."""
    config, _ = parse(Renamed, "sklformat some", words)
    assert (out, store, 50) == (config.out, config.store, config.rounds)
    assert ("" if said is None else f"sklformat some: {said}\n") == capfd.readouterr().err


def test_a_flag_is_not_given_by_both_its_names():
    """Old and new name are one flag, which is given once."""
    with pytest.raises(UsageError, match="--out is given more than once"):
        parse(Renamed, "sklformat some", ["--target-dir", "a", "--out", "b"])


def test_missing_extra(capfd, cache, tmp_path, monkeypatch):
    """A package that is not installed is one line with the command that installs it."""
    plain = builtins.__import__

    def missing(*names):
        def load(name, *args, **kwargs):
            if name.partition(".")[0] in names:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)
            return plain(name, *args, **kwargs)

        return load

    with monkeypatch.context() as patch:
        patch.setattr(builtins, "__import__", missing("pyarrow"))
        patch.delitem(sys.modules, "sklformat.interop.tables.parquet", raising=False)
        patch.delitem(sys.modules, "sklformat.files.arrow", raising=False)
        patch.delattr("sklformat.files.arrow", raising=False)
        status, _, err = run(capfd, "convert", cache, tmp_path / "c.parquet")
        assert (1, True) == (status, "pip install 'sklformat[interop]'" in err)
    with monkeypatch.context() as patch:
        patch.setattr(builtins, "__import__", missing("tyro"))
        status, _, err = run(capfd, "inspect", cache)
        assert (1, True) == (status, "pip install 'sklformat[cli]'" in err)


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (skl.CorruptError("two\nlines", path="p", offset=7), 1, "p: byte 7: two lines"),
        (
            OSError(28, "No space left on device", "shard"),
            1,
            "shard: No space left on device: make room, then run the same command again",
        ),
        (
            WriteError(28, "No space left on device", "shard"),
            1,
            (
                "shard: No space left on device; what was flushed is kept there: make room or fix the disk, then run "
                "the same command again"
            ),
        ),
        (OSError(13, "Permission denied", "shard"), 1, "shard: Permission denied"),
        (
            ValueError("/data/seq_len/x.npy: seq_len 3 < 4; lower seq_len, num_layers=2."),
            1,
            "/data/seq_len/x.npy: --seq-len 3 < 4; lower --seq-len, --num-layers=2.",
        ),
        (
            skl.SettingsError("c: capture.packing.seq_len: 3 != 4; seq_len: 3 != 4, my_seq_len, steps"),
            1,
            "c: capture.packing.seq_len: 3 != 4; --seq-len: 3 != 4, my_seq_len, steps",
        ),
        (ValueError("wrong"), 1, "wrong"),
        (KeyboardInterrupt(), 130, "stopped; run the same command again to resume"),
        (KeyboardInterrupt("stopped at 3 of 5"), 130, "stopped at 3 of 5"),
    ],
)
def test_errors_are_one_line(capfd, monkeypatch, error, status, message):
    """Whatever goes wrong is one line, with the status that says which kind it was."""

    def fail(name, arguments):
        raise error

    monkeypatch.setitem(cli._VERBS, "train", dataclasses.replace(cli._VERBS["train"], run=fail))
    assert (status, "", f"sklformat train: {message}\n") == run(capfd, "train")


def test_bugs_are_not_hidden(monkeypatch):
    """An exception that no user can cause stays a traceback."""

    def fail(name, arguments):
        raise AssertionError

    monkeypatch.setitem(cli._VERBS, "train", dataclasses.replace(cli._VERBS["train"], run=fail))
    with pytest.raises(AssertionError):
        cli.main(["train"])


@pytest.mark.parametrize(
    ("arguments", "problem"), [([], "a verb is missing"), (["bogus"], "no such verb: bogus"), ([""], "no such verb: ")]
)
def test_without_a_verb(capfd, arguments, problem):
    """One line names the verbs; exit status 2."""
    assert 2 == cli.main(arguments)
    said = f"sklformat: {problem}; choose one of cache, estimate, .*, subsample; see sklformat --help\n"
    assert re.fullmatch(said, capfd.readouterr().err)


def test_results_without_text_are_a_table(capfd):
    """A result that is plain data prints as name and value; lists and what is not known stay for --json."""

    @dataclasses.dataclass
    class Result:
        lm_loss: float
        model: Path
        accuracy: None = None
        bins: tuple = ()

    print_result(Result(1.23456789, Path("m"), bins=[1]), as_json=False)
    assert "lm loss  1.23457\nmodel    m\n" == capfd.readouterr().out
    print_result(Result(1.5, Path("m")), as_json=True)
    assert {"lm_loss": 1.5, "model": "m", "accuracy": None, "bins": []} == json.loads(capfd.readouterr().out)


def test_starting_loads_neither_torch_nor_tyro():
    """--help is quick: it loads no verb's modules."""
    code = "import sys; from sklformat.cli import main; main(['--help']); print(sorted({'torch', 'tyro', 'tqdm'} & set(sys.modules)))"  # noqa: E501
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "[]" == done.stdout.splitlines()[-1]


def test_output_to_nobody(cache):
    """A reader that leaves early, as head does, ends the command without a traceback."""
    code = f"from sklformat.cli import main; import sys; sys.exit(main(['inspect', {str(cache)!r}, '--json']))"
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-c", code], stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert (1, "") == (done.returncode, done.stderr)


def test_numbers_print_short():
    """A ratio of an empty cache has no number."""
    assert ("-", "2.50") == (overview.mean_of(None), overview.mean_of(np.float64(2.5)))


@pytest.mark.parametrize(
    "words",
    [
        ("cache", "--teacher", "t", "--text", "x", "--out"),
        ("train", "--tokens", "t", "--seq-len", "4", "--method", "ce", "--out"),
        ("demo", "--out"),
    ],
    ids=lambda words: words[0],
)
@pytest.mark.parametrize("hold", [locked_directory, lambda path: shared_directory(path, "a run")])
def test_a_directory_in_use_is_answered_without_torch(tmp_path, words, hold):
    """Whoever comes to a directory that another process holds is told before anything heavy is loaded."""
    code = """
import sys
from sklformat.cli import main
status = main(sys.argv[1:])
print(status, sorted({"torch", "transformers", "tqdm"} & set(sys.modules)))
"""
    with hold(tmp_path / "held"):
        command = [sys.executable, "-c", code, *words, str(tmp_path / "held")]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "1 []\n" == done.stdout
    place = f"{tmp_path}/held"
    message = f"{place}: another process is writing here; wait for it, or choose another place"
    assert f"sklformat {words[0]}: {message}\n" == done.stderr
    assert [] == list((tmp_path / "held").iterdir())


@pytest.mark.parametrize(
    ("verb", "words"),
    [
        ("cache", ("--teacher", "t", "--text", "x", "--out", "o")),
        ("train", ("--tokens", "t", "--seq-len", "4", "--method", "ce", "--out", "o")),
        ("eval", ("--student", "s", "--text", "x", "--seq-len", "4")),
    ],
)
def test_unknown_devices_are_one_line(capfd, tmp_path, monkeypatch, verb, words):
    """The three verbs that compute refuse a device in the same words, before they read or write anything."""
    pytest.importorskip("torch")
    monkeypatch.chdir(tmp_path)
    status, _, err = run(capfd, verb, *words, "--device", "foo")
    assert (1, f"sklformat {verb}: device 'foo' is not known; use auto, cpu, cuda or cuda:1, …\n") == (status, err)
    assert [] == list(tmp_path.iterdir())


def test_memory_that_runs_out_is_one_line(capfd, monkeypatch):
    """A GPU or a machine without room for a batch says what to change; other errors of that kind stay tracebacks."""
    torch = pytest.importorskip("torch")

    def failing_with(error):
        def fail(*_):
            raise error

        return cli._Verb("", CacheConfig, fail)

    for error in (
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: 9 bytes"),
        MemoryError(),
    ):
        monkeypatch.setitem(cli._VERBS, "cache", failing_with(error))
        status, _, err = run(capfd, "cache")
        assert 1 == status
        assert re.fullmatch(r"sklformat cache: out of memory \(.+\); use a smaller --batch-size, .*\n", err)
    monkeypatch.setitem(cli._VERBS, "cache", failing_with(RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main(["cache"])


@pytest.mark.parametrize(
    "box",
    [
        "╭─ Value error ─╮\n│ Error parsing C: no {} │\n│ ─── │\n│ see --help │\n╰────╯",
        " Value error  \n ---- \n  Error parsing C: no {}  \n  ----\n  see --help  \n   \n",
    ],
)
def test_what_is_wrong_is_said_on_every_terminal(box):
    """The line has what tyro says, on terminals with and without lines for boxes."""
    assert "no eels of 3" == flags._one_line(box.format("eels of 3"), "C")
