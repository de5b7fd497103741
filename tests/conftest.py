"""Settings that all tests share."""

import gc
import os
import signal
from pathlib import Path

from hypothesis import settings

# A suite that a shell started in the background has SIGINT ignored, and would hand that on to what it tests.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Models this small only lose by a second thread; and sums have one order.  Torch and numpy read it when they are
# imported, here and in the processes that tests start.
os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}

# Without a GPU kernels are interpreted.  Triton reads it when it is imported, which other libraries do too.
if not Path("/dev/nvidiactl").exists():
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_finish():
    """Spare every collection of garbage to come what is imported: searching it takes longer than most tests."""
    gc.collect()
    gc.freeze()


settings.register_profile("sklformat", deadline=None, derandomize=True, database=None, max_examples=50)
settings.load_profile("sklformat")
