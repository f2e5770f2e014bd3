"""How long OpenMP's threads wait awake for each other. Every program here imports this before torch.

PyTorch splits an operation over OpenMP's threads. A thread that is ready first waits for the others: with
libgomp (PyTorch's wheels for Linux) it runs an empty loop for milliseconds, and only then sleeps. If other
programs run, the thread it waits for may need that very core. Then two runs on two cores take many times as
long as one (docs/ranks.md). The threads of libiomp and libomp (elsewhere) offer their core while they wait.
"""

import os
from collections.abc import MutableMapping

# Turns of the loop: the default of libgomp. With 1000 two runs at once are fast, but on a quiet machine one
# run alone was three times slower (docs/ranks.md).
SPIN_COUNT = "300000"


def wait_briefly(environment: MutableMapping[str, str]) -> None:
    """Set how long threads wait awake, unless GOMP_SPINCOUNT is set, or OMP_WAIT_POLICY, which says the same
    for every library."""
    if "OMP_WAIT_POLICY" not in environment:
        environment.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)


# OpenMP reads it once, when torch loads it.
wait_briefly(os.environ)
