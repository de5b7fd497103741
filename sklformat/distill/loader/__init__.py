"""
From caches to the batches of a training step.

batches    what training gets: Batch, Targets and collate
conflicts  whether caches go together in one stream
contents   sequences by number: decoded, checked, proven against tokens
dataset    SparseLogitDataset: one stream in an order that resumes
launchers  who divides a stream: torch.distributed and accelerate
packed     records that the device decodes and checks
prefetch   work done ahead by threads
sequences  SparseLogitSequences: a sequence by its number, in anyone's order
sources    one cache or several, numbered one after the other
steps      the batches of a stream by their number, for trainers that skip
teachers   several teachers of the same sequences as one
"""
