"""
From a running teacher to sealed shards: ``session`` is the teacher's side, ``scribe`` the writer process.

``plan`` says which shards there are, ``frames`` what passes between the two.
"""

from sklformat.capture.frames import merge_draws
from sklformat.capture.plan import ShardWork
from sklformat.capture.session import Capture

__all__ = ["Capture", "ShardWork", "merge_draws"]
