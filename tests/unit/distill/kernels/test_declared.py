"""Every declared kernel against its reference by torch operations, at small odd shapes; on the CPU interpreted."""

import itertools

import pytest
import torch
from declared import KERNELS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def cases():
    """Of each kernel the first variant, shape and type, and all that differ from these in one of the three."""
    for name, kernel in KERNELS.items():
        for variant, shape, dtype in itertools.product(kernel.variants, kernel.shapes, kernel.dtypes):
            others = variant != next(iter(kernel.variants)), shape != kernel.shapes[0], dtype != kernel.dtypes[0]
            if sum(others) <= 1:
                sizes = "x".join(map(str, shape.values()))
                yield pytest.param(kernel, shape, dtype, variant, id=f"{name}-{variant}-{sizes}-{dtype}")


@pytest.mark.parametrize(("kernel", "shape", "dtype", "variant"), [*cases()])
def test_a_kernel_gives_what_its_reference_gives(kernel, shape, dtype, variant):
    kernel.check(shape, dtype, DEVICE, variant)
