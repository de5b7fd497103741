"""
The only door to C: arrays in, arrays out, status to exception.

batches  payloads of many sequences to the arrays of a training step: batch.c
codec    payloads of one sequence to arrays and back: codec.c, ratios.c, quantise.c, distinct.c
columns  whether those of many payloads are sound: columns.c
door     hands arrays to C and turns its status into an exception
draws    records from logits, and from sorted draws: sampler.c, merge.c
rings    control words and frames of a shared-memory ring: ring.c
stats    what the records of many payloads add up to: stats.c
"""

from sklformat.native.batches import (
    Arena,
    BatchArrays,
    RowError,
    decode_batch,
)
from sklformat.native.codec import (
    Shape,
    check_distinct,
    decode,
    encode,
    expand,
    payload_size,
    quantise,
    record_size,
)
from sklformat.native.columns import columns_are_sound
from sklformat.native.door import (
    address_of,
    check,
    kernels_name,
    use_kernels,
    view,
)
from sklformat.native.draws import (
    draw,
    merge_draws,
)
from sklformat.native.rings import (
    RING_CONTROL_SIZE,
    RingFrame,
    RingWords,
    ring_close,
    ring_init,
    ring_memory,
    ring_peek,
    ring_push,
    ring_release,
    ring_set_durable,
    ring_unmap,
    ring_words,
)
from sklformat.native.stats import SUMS, StatsTables

__all__ = [
    "RING_CONTROL_SIZE",
    "SUMS",
    "Arena",
    "BatchArrays",
    "RingFrame",
    "RingWords",
    "RowError",
    "Shape",
    "StatsTables",
    "address_of",
    "check",
    "check_distinct",
    "columns_are_sound",
    "decode",
    "decode_batch",
    "draw",
    "encode",
    "expand",
    "kernels_name",
    "merge_draws",
    "payload_size",
    "quantise",
    "record_size",
    "ring_close",
    "ring_init",
    "ring_memory",
    "ring_peek",
    "ring_push",
    "ring_release",
    "ring_set_durable",
    "ring_unmap",
    "ring_words",
    "use_kernels",
    "view",
]
