"""
Caches to and from other people's files: ``convert``.

columns     plain columns: what they mean
conversion  from a cache or a file to another of them
files       files of plain columns of any kind
jsonl       plain columns as JSONL
npz         plain columns as npz
parquet     plain columns as Parquet, the only door to pyarrow
plain       the rules that values of plain columns must keep
sources     what is read, as one stream of checked sequences
transforms  one kind of records to another
"""

from sklformat.interop.conversion import Converted, convert

__all__ = ["Converted", "convert"]
