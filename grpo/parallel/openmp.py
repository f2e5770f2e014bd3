"""How OpenMP's threads wait for each other. Every program here imports this before torch.

PyTorch splits an operation over OpenMP's threads. A thread that is ready first waits for the others: it runs
an empty loop for milliseconds, and only then sleeps. If other programs run, the thread it waits for may need
that very core. Then two runs on two cores take many times as long as one (docs/ranks.md).
"""

import os
from collections.abc import MutableMapping

# libgomp (PyTorch's wheels for Linux): turns of the loop, a few microseconds; its own default is 300,000.
# libiomp and libomp (macOS, Windows, conda): milliseconds; their own default is 200.
SHORT_WAIT = {"GOMP_SPINCOUNT": "1000", "KMP_BLOCKTIME": "1"}


def wait_briefly(environment: MutableMapping[str, str]) -> None:
    """Set how long threads wait awake. A variable that is set stays. If OMP_WAIT_POLICY is set, which says
    the same for every library, nothing is set."""
    if "OMP_WAIT_POLICY" not in environment:
        for name, value in SHORT_WAIT.items():
            environment.setdefault(name, value)


# OpenMP reads it once, when torch loads it.
wait_briefly(os.environ)
