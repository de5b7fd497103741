"""
From a running teacher to sealed shards: ``session`` is the teacher's side, ``scribe`` the writer process.

``plan`` says which shards there are, ``frames`` what passes between the two.
"""

from sklformat.capture.frames import merge_draws
from sklformat.capture.plan import ShardWork, find_header
from sklformat.capture.session import Capture

__all__ = ["Capture", "ShardWork", "find_header", "merge_draws"]
