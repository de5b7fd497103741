"""The learning rate of each step."""

from __future__ import annotations

import math

from sklformat.settings.train import TrainConfig

FINAL_LEARNING_RATE = 0.1


def learning_rate_at(step: int, config: TrainConfig) -> float:
    """Learning rate of step ``step`` (0 is the first): a linear rise, then a cosine to a tenth of the peak."""
    warmup_steps = math.ceil(config.warmup * config.steps)
    if step < warmup_steps:
        return config.learning_rate * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, config.steps - warmup_steps)
    share = FINAL_LEARNING_RATE + (1 - FINAL_LEARNING_RATE) * 0.5 * (1 + math.cos(math.pi * progress))
    return config.learning_rate * share
