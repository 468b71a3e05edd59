"""The learning rate of each step."""

from __future__ import annotations

import math

from msq.config import OptimConfig


def learning_rate(config: OptimConfig, step: int, steps: int, steps_per_epoch: int) -> float:
    """Linear warm-up to `lr`, then a cosine to zero at `steps`, constant, or warm restarts.

    Warm restarts move once an epoch, as the authors' code does: epoch e (0 for the first) has
    lr / 2 (1 + cos(pi (e mod R) / R)) with R = `restart_epochs`, and never reaches zero.

    Args:
        config: the optimiser's section.
        step: 0 for the first step.
        steps: of the whole run.
        steps_per_epoch: the warm-up is given in epochs.
    """
    warm = min(round(config.warmup * steps_per_epoch), steps)
    if step < warm:
        return config.lr * (step + 1) / warm
    if config.schedule == "constant":
        return config.lr
    if config.schedule == "warm-restarts":
        place = (step - warm) // steps_per_epoch % config.restart_epochs
        return config.lr * 0.5 * (1 + math.cos(math.pi * place / config.restart_epochs))
    return config.lr * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(steps - warm, 1)))
