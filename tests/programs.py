"""Programs in a process that ``forked`` made, with words behind their names."""

import runpy
import sys

import torch


def run_program(path, *words):
    """``python path words``; its exit status where it ends by itself."""
    sys.argv = [str(path), *map(str, words)]
    torch.set_num_threads(1)
    runpy.run_path(str(path), run_name="__main__")
    return 0
