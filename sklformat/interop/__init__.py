"""
Caches to and from other people's files: ``convert``.

``columns`` says how plain columns look, ``npz``, ``parquet`` and ``jsonl`` know one kind of file each and ``files`` all
of them; ``plain`` judges values, ``sources`` makes one stream of sequences of a cache or a file, ``transforms`` turns
one kind of records into another, ``conversion`` puts it together.  Needs numpy; Parquet needs pyarrow.
"""

from sklformat.interop.conversion import ConvertConfig, Converted, convert

__all__ = ["ConvertConfig", "Converted", "convert"]
