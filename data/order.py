"""Which examples a step uses: a pure function of (seed, step), so a resumed run needs no sampler state."""

from __future__ import annotations

from functools import lru_cache

import numpy as np


def indices_at(step: int, count: int, prompts: int, seed: int, round: int = 0) -> list[int]:
    """The `prompts` distinct indices below `count` of step `step` (from 0, over all ranks), round `round`.

    Each epoch is a new permutation of all examples, cut into whole steps. The remainder of count / prompts is
    left out, other examples each epoch (as TRL's sampler does), so a step never holds one question twice.
    A later round (dynamic sampling) takes the same place in another permutation, so the first rounds of a run
    do not depend on the number of later ones. Raises ValueError.
    """
    if step < 0 or prompts < 1:
        raise ValueError(f"step {step}, prompts {prompts}: need step >= 0 and prompts >= 1")
    if count < prompts:
        said = f"there are only {count}; lower `prompts` or give more"
        raise ValueError(f"a step uses {prompts} different examples, {said}")
    epoch, position = divmod(step, count // prompts)
    return _permutation(count, seed, epoch, round)[position * prompts : (position + 1) * prompts].tolist()


@lru_cache(maxsize=8)
def _permutation(count: int, seed: int, epoch: int, round: int = 0) -> np.ndarray:
    """(count,) int64. Examples sorted by a hash: numpy does not promise a generator's stream for ever."""
    start = _mixed(np.array([seed & (2**64 - 1)], np.uint64)) ^ np.uint64(epoch) ^ np.uint64(round << 48)
    steps = np.arange(count, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    order = np.argsort(_mixed(_mixed(start) + steps), kind="stable")
    # every caller gets this array from the cache
    order.flags.writeable = False
    return order


def _mixed(x: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser (Steele, Lea & Flood 2014), a bijection of uint64; each bit depends on all."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
