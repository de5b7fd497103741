"""
Caches to caches: ``merge``, ``slice``, ``subsample``.

headers      what the header of a cache says that was made of others
merging      several caches as one
outputs      the cache that is written: begun, resumed, finished, with the token store beside it
slicing      some sequences of a cache
subsampling  a cache with fewer rounds
thinning     which draws of a position are kept
"""

from sklformat.operations.merging import merge_caches
from sklformat.operations.outputs import Made
from sklformat.operations.slicing import slice_cache
from sklformat.operations.subsampling import subsample_cache

__all__ = ["Made", "merge_caches", "slice_cache", "subsample_cache"]
