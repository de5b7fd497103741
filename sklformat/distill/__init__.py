"""The learning side of sklformat: what turns a cache into a trained student; needs torch."""

from sklformat.distill.batches import Batch, Targets, collate
from sklformat.distill.dataset import SparseLogitDataset
from sklformat.distill.losses import DenseTargets, DenseTeacher, linear_sparse_kl, sparse_kl
from sklformat.distill.metrics import acceptance_rate, calibration_error, lm_loss

__all__ = [
    "Batch",
    "DenseTargets",
    "DenseTeacher",
    "SparseLogitDataset",
    "Targets",
    "acceptance_rate",
    "calibration_error",
    "collate",
    "linear_sparse_kl",
    "lm_loss",
    "sparse_kl",
]
