"""What the tests of an S3 store run as processes of their own."""

import os
import signal
from pathlib import Path

import fsspec
import teacher_data
from student_data import main_with_signals

from sklformat.cli import main
from sklformat.files import remote


def find_store():
    """Read the store's settings in the environment, before which fsspec may have been imported; and wait for less."""
    import s3fs

    fsspec.config.set_conf_env(fsspec.config.conf)
    s3fs.S3FileSystem.retries = 2
    remote._WAITS = (0.1, 0.2, 0.4)


def command(words):
    """A command on the store."""
    find_store()
    return main([str(word) for word in words])


def killed_capture(draws, words):
    """A capture whose process is killed after so many draws."""
    teacher_data.signal_itself(signal.SIGKILL, draws)
    return command(words)


def killed_training(step, words):
    """A training whose process is killed after so many steps."""
    find_store()
    return main_with_signals([str(word) for word in words], step, signal.SIGKILL, 1)


def bytes_under(directory):
    """Bytes of all files of a directory, whatever comes and goes meanwhile."""
    return sum(size_of(Path(folder) / name) for folder, _, names in os.walk(directory) for name in names)


def size_of(path):
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
