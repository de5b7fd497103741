import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import forked
import pytest
import torch
from system import HANGS

import sklformat as skl
from sklformat.distill.demo import processes
from sklformat.distill.demo.processes import Job, run_jobs

KILLED = """
import time
from sklformat.distill.demo.processes import Job, run_jobs

if __name__ == "__main__":
    work = "import time; print('started', flush=True); time.sleep(300); print('done', flush=True)"
    run_jobs([Job(exec, (work,))], processes=2, threads=1)
"""


INTERRUPTED = """
import sys, time

if __name__ == "__mp_main__":  # the new process, on its way to the job
    sys.stdout.write("importing\\n")
    sys.stdout.flush()
    time.sleep(0.5)

from sklformat.distill.demo.processes import Job, run_jobs

if __name__ == "__main__":
    try:
        run_jobs([Job(time.sleep, (300,))], processes=2, threads=1)
    except KeyboardInterrupt:
        sys.exit(130)
"""


def test_an_interrupt_waits_for_a_start():
    """Ctrl-C that another thread takes while a process is started does not leave the process half of its work."""
    done = []

    def take():
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        signal.pthread_kill(threading.get_ident(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt), processes._interrupts_later():
        thread = threading.Thread(target=take)
        thread.start()
        thread.join()
        done.append(True)
    assert [True] == done
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.fixture
def quickly(monkeypatch):
    """New processes need not import torch again; how they start by themselves is seen at the end."""
    monkeypatch.setattr(multiprocessing, "get_context", lambda _: forked.CONTEXT)


@pytest.mark.usefixtures("quickly")
def test_results_come_in_the_order_of_the_jobs():
    """Each result stands where its job stood, on one process and on several."""
    jobs = [Job(divmod, (number, 3)) for number in (7, 8)]
    assert [(2, 1), (2, 2)] == run_jobs(jobs, processes=1, threads=1)
    assert [(2, 1), (2, 2)] == run_jobs(jobs, processes=2, threads=1)


def test_threads_are_given_and_taken_back():
    """A job has the threads it was given; afterwards this process has its own number again."""
    before = torch.get_num_threads()
    assert run_jobs([Job(torch.get_num_threads, ())], processes=1, threads=3) == [3]
    assert before == torch.get_num_threads()


@pytest.mark.usefixtures("quickly")
def test_an_error_keeps_its_kind_and_words_and_stops_the_others():
    """The first error of a job arrives as itself; by then the others have ended, however long they would take."""
    with pytest.raises(ValueError, match="invalid literal for int"):
        run_jobs([Job(int, ("no number",)), Job(time.sleep, (HANGS,))], processes=2, threads=1)
    assert [] == multiprocessing.active_children()


@pytest.mark.usefixtures("quickly")
def test_a_process_that_dies_is_an_error():
    """A job whose process was killed is reported with its exit code."""
    with pytest.raises(skl.SklError, match=r"the process of .* ended with exit code 3 and no result \(killed"):
        run_jobs([Job(os._exit, (3,))], processes=2, threads=1)


def test_a_result_that_nobody_asks_for(monkeypatch):
    """A job that ends just after its parent was stopped ends without a traceback."""
    ours, theirs = multiprocessing.Pipe()
    ours.close()
    monkeypatch.setattr(processes, "_end_with_parent", lambda: None)
    processes._work(theirs, Job(int, ()))
    theirs.close()


def test_jobs_end_with_a_killed_parent(tmp_path):
    """When the parent is killed, its jobs end too, long before they would be done."""
    script = tmp_path / "parent.py"
    script.write_text(KILLED)
    environment = {**os.environ, "PYTHONPATH": str(Path(skl.__file__).parents[1])}
    process = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, env=environment)
    assert process.stdout.readline() == b"started\n"
    process.send_signal(signal.SIGKILL)
    assert process.stdout.read() == b""  # returns when nobody holds the pipe any more
    assert process.wait() == -signal.SIGKILL
    process.stdout.close()


def test_ctrl_c_during_the_start_of_a_process_is_clean(tmp_path):
    """Ctrl-C while a new process still imports ends it without a traceback, like everything else."""
    script = tmp_path / "parent.py"
    script.write_text(INTERRUPTED)
    environment = {**os.environ, "PYTHONPATH": str(Path(skl.__file__).parents[1])}
    process = subprocess.Popen(
        [sys.executable, str(script)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
        start_new_session=True,
    )
    assert process.stdout.readline() == b"importing\n"
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=HANGS)
    assert errors == b""
    assert process.returncode == 130
