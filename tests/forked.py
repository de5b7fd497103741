"""
New processes that need not import torch and transformers again: each is forked from a server that did only that.

What is to be run is named and pickled, as for any new process of ``multiprocessing``, so it lies in a module that the
process can import.
"""

import functools
import multiprocessing
import os
import socket
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from system import HANGS

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "pytest",
        "sklformat.cli",
        "sklformat.distill.demo.stages",
        "sklformat.distill.teacher.calibration",
        "sklformat.interop.conversion",
        "transformers.models.auto.modeling_auto",
        "transformers.models.auto.tokenization_auto",
        "transformers.models.llama.modeling_llama",
    ]
)


class Done(NamedTuple):
    """How a process ended, and what it wrote; killed by a signal, its status is the signal's number, negative."""

    status: int
    stdout: str
    stderr: str


class Child:
    """A process that runs a function, whose result is its exit status, under variables of the environment."""

    def __init__(self, function, *arguments, **environment):
        self._folder = tempfile.TemporaryDirectory()
        self._paths = [Path(self._folder.name) / name for name in ("stdout", "stderr")]
        for path in self._paths:
            path.touch()
        work = functools.partial(function, *arguments)
        self._process = CONTEXT.Process(target=_run, args=(self._paths, environment, work))
        self._process.start()
        self.pid = self._process.pid

    @property
    def stderr(self):
        """What it has written there until now."""
        return self._paths[1].read_text()

    def done(self):
        """Wait for its end."""
        self._process.join(HANGS)
        hangs = self._process.exitcode is None
        if hangs:
            self._process.kill()
            self._process.join()
        found = Done(self._process.exitcode, *(path.read_text() for path in self._paths))
        self._process.close()
        self._folder.cleanup()
        assert not hangs, f"the process hangs: {found}"
        return found


def run(function, *arguments, **environment):
    """A child from its start to its end."""
    return Child(function, *arguments, **environment).done()


def run_ranks(number, function, *arguments):
    """So many children from start to end, which find each other as those of torchrun do."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    place |= {"WORLD_SIZE": str(number), "LOCAL_WORLD_SIZE": str(number)}
    ranks = [Child(function, *arguments, **place, RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(number)]
    return [rank.done() for rank in ranks]


def _run(paths, environment, work):
    for descriptor, path in zip((1, 2), paths, strict=True):
        file = os.open(path, os.O_WRONLY)
        os.dup2(file, descriptor)
        os.close(file)
    os.environ |= environment
    sys.exit(work())
