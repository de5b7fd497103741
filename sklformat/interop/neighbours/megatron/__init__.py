"""
Megatron: tars of top-k log-probs, one for each rank and range of training; three layouts are read, the newest written.

batches  micro-batches of one rank, and sequences put together from several ranks
members  tar files, member by member
reading  the sequences with the tokens that the user gives
tars     where everything is: ranks, iterations, samples
writing  a directory of tars in the newest layout
"""

from sklformat.interop.neighbours.megatron.reading import read, recognise
from sklformat.interop.neighbours.megatron.writing import open_export

__all__ = ["open_export", "read", "recognise"]
