"""
What the bytes of a shard mean, as SPEC.md says; opens no file.

block     one sequence as one block, with its checksums
captures  what the header says of a capture beyond its fields, as JSON in one form
columns   optional columns: their sizes, what their values must be, their bytes
header    every setting that the records of a shard were made with
index     the end of a sealed shard: where its blocks lie, and a trailer that proves it
layout    where each byte lies: SPEC.md's tables as data
listing   what a manifest says: the shards of a cache in order
mixture   which cache each place of a mixed stream takes its sequence from
order     orders of sequences and documents, pure functions of (seed, epoch, index)
records   records in memory: the sparse teacher distributions of one sequence
words     random words that orders are made of
"""
