"""
Caches to and from other people's files: ``convert``.

checks      the rules that values of a row must keep
columns     plain columns: what they mean
conversion  from a cache or a file to another of them
kinds       what a source is, and its reader
named       plain columns under any names
neighbours  other systems' files
notes       what a file of plain columns says of the cache that it came from
readings    what a reader is asked for and gives
sources     what is read, as one stream of checked sequences
tables      tables of any kind as rows of numbers
tokens      ids of sources that have none
transforms  one kind of records to another
"""

from sklformat.interop.conversion import Converted, convert

__all__ = ["Converted", "convert"]
