"""The command line under a clock on which every look takes twenty seconds."""

import itertools
import sys

from sklformat import progress
from sklformat.cli import main


def main_with_a_clock(words):
    """As ``main``; lines of progress come at the first look, and at each third after it."""
    ticks = itertools.count(0, 20)
    progress.clock = lambda: float(next(ticks))
    return main(words)


if __name__ == "__main__":
    sys.exit(main_with_a_clock(sys.argv[1:]))
