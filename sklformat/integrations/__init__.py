"""
Where people train: other projects' trainers over a cache, one module each, and what they share.

arguments     what of a trainer's arguments would spoil a run
transformers  SparseKDTrainer, transformers' own Trainer
"""
