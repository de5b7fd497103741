"""Settings that all tests share."""

import signal

from hypothesis import settings

# A suite that a shell started in the background has SIGINT ignored, and would hand that on to what it tests.
signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile("sklformat", deadline=None, derandomize=True, database=None, max_examples=50)
settings.load_profile("sklformat")
