"""Whatever a path names, a reader opens a regular file or says at once, by a typed error, what is there instead."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import reference
from strategies import make_cache, small_shard
from system import HANGS

import sklformat as skl
from sklformat.cache.contents import scan_directory
from sklformat.cache.manifest import write_manifest
from sklformat.cli import main


def pipe(path):
    os.mkfifo(path)


def bound_socket(path):
    here = Path.cwd()
    os.chdir(path.parent)  # the name of a socket is short
    with socket.socket(socket.AF_UNIX) as end:
        end.bind(path.name)
    os.chdir(here)


def zeros(path):
    path.symlink_to("/dev/zero")


def loop(path):
    path.symlink_to(path.name)


def dangling(path):
    path.symlink_to("nowhere.skl")


def directory_there(path):
    path.mkdir()


KINDS = {
    pipe: "is a named pipe, must be a regular file",
    bound_socket: "is a socket, must be a regular file",
    zeros: "is a device, must be a regular file",
    directory_there: "is a directory, must be a regular file",
    loop: "Too many levels of symbolic links; remove the link",
    dangling: "a link to nowhere.skl, where nothing is; put the file there",
}
every_kind = pytest.mark.parametrize(("make", "message"), KINDS.items(), ids=[make.__name__ for make in KINDS])


@pytest.fixture(autouse=True)
def _no_hanging():
    """A blocking open ends as an error instead of holding up the suite."""
    signal.alarm(int(HANGS))
    yield
    signal.alarm(0)


@pytest.fixture
def directory(tmp_path):
    make_cache(tmp_path / "cache")
    return tmp_path / "cache"


def with_manifest(directory):
    write_manifest(directory, scan_directory(directory))


@every_kind
def test_in_the_place_of_a_listed_shard(directory, make, message):
    """The manifest lists it: open passes, its sequences raise, verify names it and goes through the rest."""
    with_manifest(directory)
    shard = directory / "shard-00001.skl"
    shard.unlink()
    make(shard)
    with skl.open(directory) as cache, pytest.raises(skl.UnreadableError, match=message) as caught:
        cache[3]
    assert shard == caught.value.path
    with skl.open(directory) as cache:
        assert cache[0].tokens is not None
    problems = skl.verify(directory)
    assert ("UnreadableError", shard) in [(problem.error, problem.path) for problem in problems]
    assert {"shard-00001.skl", "cache"} == {problem.path.name for problem in problems}  # which lacks its sequences


@every_kind
def test_in_the_place_of_an_unlisted_shard(directory, make, message):
    """Without a manifest the directory's names say what a cache has, so open itself refuses."""
    (directory / "shard-00001.skl").unlink()
    make(directory / "shard-00001.skl")
    with pytest.raises(skl.UnreadableError, match=message):
        skl.open(directory)
    assert "UnreadableError" in {problem.error for problem in skl.verify(directory)}


@every_kind
def test_in_the_place_of_the_manifest(directory, make, message):
    """A manifest that cannot be read is not the same as none."""
    make(directory / "manifest.json")
    with pytest.raises(skl.UnreadableError, match=message):
        skl.open(directory)
    (problem,) = skl.verify(directory)
    assert ("UnreadableError", "manifest.json") == (problem.error, problem.path.name)


@pytest.mark.parametrize("make", [kind for kind in KINDS if kind is not directory_there])  # which may be a cache
def test_given_by_itself(tmp_path, make, capsys):
    """The path itself is refused by open, verify and the commands, each in one line."""
    message = KINDS[make]
    path = tmp_path / "c.skl"
    make(path)
    with pytest.raises(skl.UnreadableError, match=message):
        skl.open(path)
    if make in (loop, dangling):  # nothing is there to be verified
        with pytest.raises(skl.UnreadableError, match=message):
            skl.verify(path)
    else:
        (problem,) = skl.verify(path)
        assert ("UnreadableError", path) == (problem.error, problem.path)
    assert 1 == main(["inspect", str(path)])
    out, err = capsys.readouterr()
    assert "" == out
    assert 1 == err.count("\n")
    assert message.partition("(")[0] in err


@every_kind
def test_in_the_place_of_a_partial(tmp_path, make, message):
    """Neither recover nor a writer that resumes opens anything but a file."""
    partial = tmp_path / "c.skl.partial"
    make(partial)
    header = skl.Header(vocab_size=10, seq_len=2, kind="counts", rounds=3)
    for act in (
        lambda: skl.recover(partial),
        lambda: skl.ShardWriter(tmp_path / "c.skl", header=header, resume=True),
    ):
        with pytest.raises((skl.UnreadableError, FileNotFoundError), match=rf"{message}|there is no c\.skl\.partial"):
            act()


def test_a_cache_in_a_loop_of_links(tmp_path, capsys):
    """A directory's path is looked at no less carefully."""
    loop(tmp_path / "cache")
    with pytest.raises(skl.UnreadableError, match="Too many levels"):
        skl.open(tmp_path / "cache")
    with pytest.raises(skl.UnreadableError, match="File name too long; use a shorter name"):
        skl.open(tmp_path / ("x" * 5000))
    with pytest.raises(skl.UnreadableError, match="Not a directory; correct the path"):
        skl.open(tmp_path.joinpath(small_file(tmp_path), "cache"))
    assert 1 == main(["verify", str(tmp_path / "cache")])
    assert 1 == capsys.readouterr().err.count("\n")


def small_file(tmp_path):
    (tmp_path / "a.skl").write_bytes(small_shard(1))
    return "a.skl"


@pytest.mark.skipif(os.geteuid() != 0, reason="another user is needed to be refused")
def test_no_permission(directory):
    """A file of another user is named as such; root reads everything, so a process of nobody's tries."""
    with_manifest(directory)
    (directory / "shard-00001.skl").chmod(0)
    code = f"import os, sklformat as skl\nos.setuid(65534)\ncache = skl.open({str(directory)!r})\ncache[3]"
    for parent in [directory, *directory.parents][:-1]:
        parent.chmod(parent.stat().st_mode | 0o755)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "UnreadableError" in done.stderr.splitlines()[-1]
    assert "shard-00001.skl: Permission denied; make it readable for this process" in done.stderr


@pytest.mark.parametrize("size", range(8))
def test_garbage_of_a_few_bytes(tmp_path, size):
    """A file that begins otherwise than a shard is none, however short; an empty one was cut short."""
    path = tmp_path / "c.skl"
    path.write_bytes(b"garbage!"[:size])
    with pytest.raises(skl.UnsupportedError if size else skl.TruncatedError):
        skl.open(path)
    path.write_bytes(small_shard(1)[: size + 1])
    with pytest.raises(skl.TruncatedError):
        skl.open(path)


def test_a_name_that_is_only_the_ending(directory):
    """``.skl`` is no shard's name, for a directory with a manifest and without."""
    (directory / ".skl").write_bytes(b"anything")
    assert 9 == len(skl.open(directory))
    with_manifest(directory)
    assert 9 == len(skl.open(directory))
    assert [] == skl.verify(directory)
    assert 3 == len(reference.decode_cache(directory))


def test_an_unlisted_shard(directory, tmp_path):
    """A shard that lies beside a manifest without being listed is not silently left out."""
    with_manifest(directory)
    (directory / "copy.skl").write_bytes((directory / "shard-00002.skl").read_bytes())
    with pytest.raises(skl.CorruptError, match=r"the manifest does not list copy\.skl, which lies beside it; move"):
        skl.open(directory)
    with pytest.raises(reference.CorruptError):
        reference.decode_cache(directory)
