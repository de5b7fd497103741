"""
Where people train: other projects' trainers over a cache, one module each, and what they share.

arguments     what of a trainer's arguments would spoil a run
axolotl       SparseKDPlugin, asked for in Axolotl's YAML
checkpoints   what a checkpoint says of the stream
inputs        batches as a trainer hands them around
sums          the loss of a trainer's log
transformers  SparseKDTrainer, transformers' own Trainer
"""
