"""
From a running teacher to sealed shards; the teacher hands sequences over, a second process writes them.

advance       how far a capture is, by the files of its directory
descriptors   of a ring's two sides, in this process and in its forked copies
destinations  where sealed shards go: a directory, or a URL they are uploaded to
estimates     what a capture will cost, before it runs
frames        what the two processes say to each other
memory        whether a ring finds room there
outcome       what a capture did, for its user
plan          which shards are not sealed yet, and how far each one is
ring          frames in shared memory, from one process to another
runs          ranks of any launcher, which never meet
scribe        the writer process
session       the teacher's side
"""

from sklformat.capture.frames import merge_draws
from sklformat.capture.plan import ShardWork, find_header
from sklformat.capture.session import Capture

__all__ = ["Capture", "ShardWork", "find_header", "merge_draws"]
