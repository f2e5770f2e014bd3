"""What depends on the step alone: the learning rate, and the stage (group size and completion cap).

Pure, so a resumed run needs nothing saved. Steps count from 0.
"""

from __future__ import annotations

import itertools
import math

# The rate above its end, as a share of the peak above its end, by progress after the warm-up: 0 -> 1, 1 -> 0.
DECAYS = {
    "constant": lambda progress: 1.0,
    "linear": lambda progress: 1.0 - progress,
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
}


def lr_at(step: int, *, lr: float, warmup: int, decay: str, steps: int, lr_min: float = 0.0) -> float:
    """The learning rate of a step: a straight line up to lr in `warmup` steps, then the decay to lr * lr_min.

    Neither step 0 (lr / warmup) nor the last step (one before the decay's end) has rate 0. Raises ValueError
    for an unknown decay or a step outside 0 <= step < steps.
    """
    if decay not in DECAYS:
        raise ValueError(f"unknown decay {decay!r}. Known: {', '.join(DECAYS)}.")
    if not 0 <= step < steps:
        raise ValueError(f"lr_at: step {step} is outside the steps of this run, 0 to {steps - 1}.")
    if step < warmup:
        return lr * (step + 1) / warmup
    progress = (step - warmup) / (steps - warmup)
    return lr * (lr_min + (1.0 - lr_min) * DECAYS[decay](progress))


def stage_at(step: int, stages, default):
    """The stage of a step: the first with step < stage.until, or `default` after the last one.

    Stages change group size and cap (Vision-R1's "progressive thinking suppression training", arXiv
    2503.06749). Raises ValueError if their `until` do not increase, because one would never be used.
    """
    ends = [stage.until for stage in stages]
    if any(later <= earlier for earlier, later in itertools.pairwise(ends)):
        raise ValueError(f"stages must end one after the other, but their 'until' are {ends}.")
    return next((stage for stage in stages if step < stage.until), default)
