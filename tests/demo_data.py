"""The demo as a process, for tests that stop it."""

import multiprocessing
import os

from sklformat.distill.demo.stages import run_demo
from sklformat.settings.demo import DemoConfig


def run(out, text, start_method):
    """
    The demo on two processes, in a process group of its own, to its end or to a Ctrl-C.

    Its jobs are started by any method; "spawn" is the demo's own, and imports torch again for each.
    """
    os.setsid()
    context = multiprocessing.get_context(start_method)
    multiprocessing.get_context = lambda _: context
    try:
        print(run_demo(DemoConfig(out=out, text=text, size="tiny", processes=2)))
    except KeyboardInterrupt:
        return 130
    return 0
