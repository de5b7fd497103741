"""The demo as a process, for tests that stop it."""

import multiprocessing
import os
import signal

from sklformat.distill.demo import processes
from sklformat.distill.demo.stages import run_demo
from sklformat.settings.demo import DemoConfig


def run(out, text, start_method):
    """
    The demo on two processes, in a process group of its own, to its end or to a Ctrl-C.

    Its jobs are started by any method; "spawn" is the demo's own, and imports torch again for each.
    """
    os.setsid()
    context, work = multiprocessing.get_context(start_method), processes._work

    def work_with_handlers_of_a_new_process(*arguments):
        signal.signal(signal.SIGINT, signal.default_int_handler)
        work(*arguments)

    multiprocessing.get_context = lambda _: context
    if start_method == "fork":
        processes._work = work_with_handlers_of_a_new_process
    try:
        print(run_demo(DemoConfig(out=out, text=text, size="tiny", processes=2)))
    except KeyboardInterrupt:
        return 130
    return 0
