"""
What turns a cache into a trained student; torch lives here, and these are its public names.

demo     the whole pipeline on two cores
loader   from a cache to batches
losses   losses and metrics on tensors
models   the door to transformers
student  training and evaluation
teacher  capture of a teacher
text     documents, tokens, packing
"""

from sklformat.distill.loader.batches import Batch, Targets, collate
from sklformat.distill.loader.dataset import SparseLogitDataset
from sklformat.distill.loader.sequences import SparseLogitSequences
from sklformat.distill.losses.kl import DenseTargets, DenseTeacher, OutputHead, linear_sparse_kl, sparse_kl
from sklformat.distill.losses.metrics import acceptance_rate, calibration_error, lm_loss

__all__ = [
    "Batch",
    "DenseTargets",
    "DenseTeacher",
    "OutputHead",
    "SparseLogitDataset",
    "SparseLogitSequences",
    "Targets",
    "acceptance_rate",
    "calibration_error",
    "collate",
    "linear_sparse_kl",
    "lm_loss",
    "sparse_kl",
]
