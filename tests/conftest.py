"""Settings that all tests share."""

from hypothesis import settings

settings.register_profile("sklformat", deadline=None, derandomize=True, database=None, max_examples=50)
settings.load_profile("sklformat")
