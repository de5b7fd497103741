"""
Figure 2c: the same calibration for a small convolutional network on images.

The paper (2.2.1, Appendix B): a small ResNet on CIFAR-100; Top-K is over-confident, random sampling is not.

Here scikit-learn's 1797 handwritten digits of 8 x 8 pixels, which need no download: two side by side make a number from
00 to 99, so that there are 100 classes, too.  Noise, new at every step, leaves the teacher in doubt, as pictures of 100
things would.  A fifth of the digits is held out.  ``--thorough`` and ``--device cuda`` train longer.
"""

from __future__ import annotations

import classifiers
import torch
from bench import Claim, options
from classifiers import Batch, Toy
from sklearn.datasets import load_digits
from torch import nn

NOISE = 0.5  # of pixels in 0..1
CLASSES = 100


def main() -> None:
    given = options(__doc__)
    claim = Claim("figure2c", "Top-K leads to over-confident models on images, too; random sampling does not", given)
    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
    pixels = torch.from_numpy(digits.images).float()[order].to(given.device) / 16
    values = torch.from_numpy(digits.target)[order].to(given.device)
    held_out = len(values) // 5

    def numbers(first: int, end: int, size: int, g: torch.Generator) -> Batch:
        picked = torch.randint(first, end, (2, size), generator=g, device=given.device)
        image = torch.cat([pixels[picked[0]], pixels[picked[1]]], 2)
        noise = torch.randn(image.shape, generator=g, device=given.device)
        return (image + NOISE * noise - 0.3)[:, None], 10 * values[picked[0]] + values[picked[1]]

    def model(role: str) -> nn.Module:
        width = 24 if role == "teacher" else 12
        return nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(width, 2 * width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(16 * width, CLASSES),
        )  # fmt: skip

    steps = {"quick": 8, "standard": 1500, "thorough": 6000}[given.scale] * (4 if given.device == "cuda" else 1)
    toy = Toy(
        batch=lambda size, g: numbers(held_out, len(values), size, g),
        held_out=lambda size, g: numbers(0, held_out, size, g),
        model=model, steps=steps, batch_size=32 if given.is_quick else 128, learning_rate=4e-3, k=3, rounds=9,
        measured=2 if given.is_quick else 100,
    )  # fmt: skip
    classifiers.end(claim, classifiers.results("figure2c", toy, given))


if __name__ == "__main__":
    main()
