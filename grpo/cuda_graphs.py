"""Repeat a piece of work, directly or as a CUDA graph that is recorded once and replayed.

Decoding a token launches hundreds of small kernels, and the GPU waits for each. A graph launches all at once,
on the same addresses, so the work must be done in place. A new graph is recorded when slots are closed or
given away, and when decoding reaches a place that the recording does not read. All graphs share the memory of
their intermediate results, because only one runs at a time and none leaves a result there.
"""

from collections.abc import Callable

import torch

# Recorded decoding reads a multiple of this many places, so that one recording serves as many tokens.
SPAN_MULTIPLE = 128


class Repeat:
    """Call it to run `work` again and again. recorded: with CUDA graphs, which need a GPU."""

    def __init__(self, work: Callable[[], None], recorded: bool):
        self.work = work
        self.multiple = SPAN_MULTIPLE if recorded else 1
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}

    def __call__(self, times: int, key: int) -> None:
        """Run it `times` times. key: what the shapes depend on, since the last `forget`."""
        for left in reversed(range(times)):
            if key in self.graphs:
                self.graphs[key].replay()
                continue
            # The first run with new shapes prepares what may not happen inside a recording.
            self.work()
            if self.multiple > 1 and left:
                graph = torch.cuda.CUDAGraph()
                pool = next(iter(self.graphs.values())).pool() if self.graphs else None
                # This only records; nothing runs. A call of another thread (NCCL's watchdog) does no harm.
                with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                    self.work()
                self.graphs[key] = graph

    def forget(self) -> None:
        """Drop the recordings: the work now uses other tensors."""
        self.graphs.clear()
