"""Repeating a piece of work: as it is, or recorded once as a CUDA graph and replayed, which spares the GPU
from waiting for Python between kernels.

Decoding a token is a few hundred small kernels, each launched from Python; a graph launches them all at once.
It replays the same kernels on the same addresses, so the work must be done in place
(`grpo/rollout.py:Slots.draw`), and it is recorded anew when slots are closed or a place is read that the
recording does not reach.
"""

from collections.abc import Callable

import torch

# places: decoding reads a multiple of so many, so that one recording serves as many tokens
READS = 128


class Repeat:
    """Does `work` again and again. recorded: by CUDA graphs, which needs a GPU."""

    def __init__(self, work: Callable[[], None], recorded: bool):
        self.work, self.multiple = work, READS if recorded else 1
        self.graphs: dict[int, torch.cuda.CUDAGraph | None] = {}

    def __call__(self, times: int, key: int) -> None:
        """Do it `times` times. key: what the shapes depend on, since `forget`."""
        for left in reversed(range(times)):
            graph = self.graphs.get(key) if self.multiple > 1 else None
            if graph:
                graph.replay()
                continue
            # the first time with these shapes prepares what a recording may not
            self.work()
            if self.multiple > 1 and left:
                self.graphs[key] = self._record()

    def _record(self) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        # nothing is done here, only written down
        with torch.cuda.graph(graph):
            self.work()
        return graph

    def forget(self) -> None:
        """The tensors that the work is about are others now."""
        self.graphs.clear()
