"""
From a cache to the batches of a training step.

batches   what training gets: Batch, Targets and collate
dataset   SparseLogitDataset: decoded, checked, in an order that resumes
prefetch  work done ahead by threads
"""
