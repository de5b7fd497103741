"""
Caches to and from other people's files: ``convert``.

``columns`` and ``columns_writer`` know the files, ``plain`` judges their values, ``sources`` makes one stream of
sequences of them, ``conversion`` puts it all together.  Needs numpy; Parquet needs pyarrow.
"""

from sklformat.interop.conversion import ConvertConfig, Converted, convert

__all__ = ["ConvertConfig", "Converted", "convert"]
