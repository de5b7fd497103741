"""What verbs print on streams of every kind: poor in characters, full, closed."""

import errno
import io
import json
import math
import os
import sys

import pytest
from operation_data import write

from sklformat import cli
from sklformat.views.printing import print_json, print_table


@pytest.fixture
def cache(tmp_path):
    return write(tmp_path / "größe", 7, capture={"teacher": {"name": "org/größe", "revision": "main"}})


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_a_terminal_that_lacks_characters(cache, monkeypatch, encoding):
    """What an encoding lacks is escaped: in tables as Python does, in JSON as JSON does."""
    monkeypatch.setattr(cli, "_is_there", lambda *_: False)  # no tokenizer is looked for
    for verb in (
        ["stats", "--sample", "3"],
        ["inspect"],
        ["inspect", "--sequence", "0"],
        ["card"],
        ["verify"],
        ["stats", "--json"],
    ):
        stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        monkeypatch.setattr(sys, "stdout", stream)
        assert 0 == cli.main([*verb, str(cache)]), verb
        stream.flush()
        said = stream.buffer.getvalue().decode(encoding)
        if "--json" in verb:
            assert str(cache) == json.loads(said)["path"]
        else:
            assert ("größe" in said) == (encoding != "ascii"), verb


class Full(io.StringIO):
    """A file on a disk without room, which says so once its buffer is to be emptied."""

    encoding = "utf-8"

    def flush(self):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["inspect"], ["stats", "--json"]])
def test_a_full_disk_and_a_closed_stream(cache, monkeypatch, capsys, arguments):
    """What cannot be written is one line; where whoever started the command closed its streams, it does its work."""
    arguments = arguments if "-" in arguments[0] else [*arguments, str(cache)]
    monkeypatch.setattr(sys, "stdout", Full())
    assert 1 == cli.main(arguments)
    assert "No space left on device: make room" in capsys.readouterr().err
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    assert 0 == cli.main(arguments)
    sys.stdout.close()
    sys.stderr.close()


def test_json_without_numbers_that_it_lacks(capsys):
    """null stands for what is not finite, at any depth."""
    print_json({"a": math.nan, "b": [1.5, (math.inf, {"c": -math.inf})], "d": 0, "e": "\x1b"})
    said = capsys.readouterr().out
    assert {"a": None, "b": [1.5, [None, {"c": None}]], "d": 0, "e": "\x1b"} == json.loads(said)
    assert "\x1b" not in said


def test_a_long_name_stands_out_of_its_column(capsys):
    """The others keep their width."""
    print_table({"path": "a", "x" * 99: "b", "bytes": 1.23456789})
    assert f"path   a\n{'x' * 99}  b\nbytes  1.23457\n" == capsys.readouterr().out


def test_no_name_commands_the_terminal(tmp_path, monkeypatch, capsys):
    """Whatever files are called: in results, in problems, in errors and in progress."""
    path = write(tmp_path / "\x1b]0;title\x07\u202e", 4, per_shard=2)
    (path / "shard-00001.skl").write_bytes(b"no shard")
    os.truncate(path / "shard-00000.skl", 5000)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "\x9b2J.skl.partial").touch()
    for status, verb in (
        (3, ["verify", str(path)]),
        (1, ["stats", str(path)]),
        (0, ["recover", str(tmp_path)]),
        (1, ["inspect", f"{path}x"]),
        (2, ["\x1b[2J"]),
    ):
        assert status == cli.main(verb), verb
        said = "".join(capsys.readouterr())
        assert "\\x" in said
        assert all(line.isprintable() for line in said.splitlines())
