"""
What turns a cache into a trained student; torch lives here, and these are its public names.

demo       the whole pipeline on two cores
engines    other engines as teachers
kernels    Triton: what runs on a GPU
loader     from a cache to batches
losses     losses and metrics on tensors
models     the door to transformers
rescoring  another teacher on the records of a cache
student    training and evaluation
teacher    capture of a teacher
text       documents, tokens, packing
"""

from typing import TYPE_CHECKING, Any

from sklformat.distill.loader.batches import Batch, Targets, collate
from sklformat.distill.loader.dataset import SparseLogitDataset
from sklformat.distill.loader.sequences import SparseLogitSequences
from sklformat.distill.loader.teachers import Teachers
from sklformat.distill.losses.confidence import easy_hard_weights, label_confidence
from sklformat.distill.losses.kl import DenseTargets, DenseTeacher, OutputHead, Shard, linear_sparse_kl, sparse_kl
from sklformat.distill.losses.metrics import acceptance_rate, calibration_error, lm_loss

if TYPE_CHECKING:
    from sklformat.distill.models.heads import output_head, run_to_head

__all__ = [
    "Batch",
    "DenseTargets",
    "DenseTeacher",
    "OutputHead",
    "Shard",
    "SparseLogitDataset",
    "SparseLogitSequences",
    "Targets",
    "Teachers",
    "acceptance_rate",
    "calibration_error",
    "collate",
    "easy_hard_weights",
    "label_confidence",
    "linear_sparse_kl",
    "lm_loss",
    "output_head",
    "run_to_head",
    "sparse_kl",
]


def __getattr__(name: str) -> Any:
    if name not in ("output_head", "run_to_head"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from sklformat.distill.models import heads  # noqa: PLC0415  it loads transformers, the rest does not

    return getattr(heads, name)
