"""
Figure 2b: calibration of students of a three-layer MLP that tells Gaussian classes apart.

The paper (2.2.1, 4.1, Appendix K): Top-K makes the student over-confident; CE, FullKD and random sampling leave it
almost perfectly calibrated.  1024 classes in 128 dimensions, centres in the unit cube, sigma up to 1.5; teacher 128 and
student 96 units wide; K = 7, 50 rounds; 20 000 steps of 4096 points.

Here ``--device cuda`` is as there.  A CPU has 256 classes, K = 3, 14 rounds (about 3 unique classes) and 1500 steps of
256 points, with a larger learning rate that falls to 0; ``--thorough`` 1024 classes, K = 7 and 6000 steps.  Points are
centred and scaled, which shortens training.  So few steps leave teacher and student far from the best that there is: a
student knows things that its teacher does not, so that FullKD comes out under-confident, and random sampling with it.
Beside ECE, which cannot tell too sure from too careful, stands confidence less accuracy.
"""

from __future__ import annotations

import classifiers
import torch
from bench import Claim, options
from classifiers import Batch, Toy
from torch import nn

DIMENSIONS = 128


def main() -> None:
    given = options(__doc__)
    claim = Claim(
        "figure2b", "Top-K leads to over-confident models; CE, FullKD and random sampling are calibrated", given
    )
    large = given.scale == "thorough" or given.device == "cuda"
    classes = 1024 if large else 256
    g = torch.Generator().manual_seed(1234)
    centres = torch.rand(classes, DIMENSIONS, generator=g).to(given.device)
    sigma = 1.5 * torch.rand(classes, 1, generator=g).to(given.device)

    def batch(size: int, g: torch.Generator) -> Batch:
        labels_B = torch.randint(classes, (size,), generator=g, device=given.device)
        noise = torch.randn(size, DIMENSIONS, generator=g, device=given.device)
        return 2 * (centres[labels_B] + sigma[labels_B] * noise - 0.5), labels_B

    def model(role: str) -> nn.Module:
        width = 128 if role == "teacher" else 96
        return nn.Sequential(
            nn.Linear(DIMENSIONS, width), nn.GELU(), nn.Linear(width, width), nn.GELU(), nn.Linear(width, classes)
        )  # fmt: skip

    steps = 20_000 if given.device == "cuda" else {"quick": 15, "standard": 1500, "thorough": 6000}[given.scale]
    toy = Toy(
        batch=batch, held_out=batch, model=model, steps=steps, batch_size=4096 if given.device == "cuda" else 256,
        learning_rate=2e-3 if given.device == "cuda" else 8e-3, k=7 if large else 3, rounds=50 if large else 14,
        measured=2 if given.is_quick else 100,
    )  # fmt: skip
    classifiers.end(claim, classifiers.results("figure2b", toy, given))


if __name__ == "__main__":
    main()
