"""The learning rate of each step."""

from __future__ import annotations

import math

from sklformat.settings.train import TrainConfig


def learning_rate_at(step: int, config: TrainConfig) -> float:
    """Learning rate of step ``step`` (0 is the first): a linear rise, then a fall as the schedule has it."""
    warmup_steps = _warmup_steps(config)
    if step < warmup_steps:
        return config.learning_rate * (step + 1) / warmup_steps
    first = decay_start(config) if config.schedule == "wsd" else warmup_steps
    progress = max(0.0, (step - first) / max(1, config.steps - first))
    least = config.min_learning_rate
    match config.schedule:
        case "cosine":
            share = least + (1 - least) * 0.5 * (1 + math.cos(math.pi * progress))
        case "linear" | "wsd":
            share = least + (1 - least) * (1 - progress)
        case "constant":
            share = 1.0
    return config.learning_rate * share


def decay_start(config: TrainConfig) -> int:
    """With schedule wsd: the first step of the fall at the end."""
    return max(_warmup_steps(config), config.steps - math.ceil(config.decay * config.steps))


def warmup_note(config: TrainConfig) -> str:
    """What to say of a warm-up that is longer than the run; "" where it is not."""
    if config.warmup_steps <= config.steps:
        return ""
    return (
        f"warmup_steps {config.warmup_steps} is more than steps {config.steps}: the learning rate rises to the end and "
        f"reaches {learning_rate_at(config.steps - 1, config):.3g} of {config.learning_rate:.3g}; give fewer, unless "
        "the run is to grow"
    )


def _warmup_steps(config: TrainConfig) -> int:
    return config.warmup_steps or math.ceil(config.warmup * config.steps)
