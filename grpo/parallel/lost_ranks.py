"""Names the rank that died or hangs, when a collective of the other ranks fails. No paper has this.

PyTorch notices a loss. gloo raises as soon as a process has closed its connections, and after `timeout`
seconds of waiting. NCCL ends the process after `timeout` seconds. torchrun ends the other ranks of its
machine and reports the first that failed. But the error of a collective does not name the rank. So each rank
notes two things in the store of the process group: how many meeting points (sums, gathers, barriers) it has
reached, and with which error it ends. After a failed collective, a rank is lost if it is behind or silent.

Not `torch.distributed.monitored_barrier`: it names a rank on rank 0 only, and not when rank 0 is lost.
"""

import os
import re
import time

import torch.distributed as dist

# exit status: temporary failure, try again (sysexits.h)
LOST = 75
# how long a rank that saw a collective fail waits for the other ranks' words
SECONDS_FOR_WORDS = 3.0


class RollCall:
    """What the ranks of one start of a run note in `store`. timeout: seconds, for the message only."""

    def __init__(self, store: dist.Store, rank: int, size: int, timeout: float):
        self.store = store
        self.rank = rank
        self.size = size
        self.timeout = timeout
        self.meetings = 0
        self.place = "the start"
        self.prints = True

    def arrive(self, place: str) -> None:
        """Note that this rank has reached its next meeting point. place: its name, for people."""
        self.meetings += 1
        self.place = place
        self.store.set(f"reached {self.rank}", str(self.meetings))

    def _first(self, words: str) -> bool:
        """Whether this rank is the first of its machine that asks for these words."""
        return self.store.add(f"printed on {os.environ.get('GROUP_RANK', '0')}: {words}", 1) == 1

    def lost(self, error: BaseException, expected: bool) -> str | None:
        """Note the error with which this rank ends. -> a sentence that names the lost rank, or None if the
        error is not a failed collective. expected: the rank prints a line for its error, not a traceback.
        Afterwards `prints` is False if another rank of this machine prints the same error."""
        words = " ".join(f"{type(error).__name__}: {error}".split())[:400]
        failed = isinstance(error, dist.DistError) or re.search(r"gloo/|NCCL", words)
        if not failed:
            # before the note: a rank that reads the note then finds that the line is printed
            self.prints = not expected or self._first(words)
            self.store.set(f"ended {self.rank}", words)
            return None
        self.store.set(f"ended {self.rank}", "")
        others = [rank for rank in range(self.size) if rank != self.rank]
        until = time.monotonic() + SECONDS_FOR_WORDS
        missing = lambda: [r for r in others if not self.store.check([f"ended {r}"])]
        while (silent := missing()) and time.monotonic() < until:
            time.sleep(0.05)
        ended = {r: self.store.get(f"ended {r}").decode() for r in others if r not in silent}
        for rank, why in ended.items():
            if why:
                self.prints = self._first(why)
                return f"rank {rank} ended with an error: {why}"
        if not silent:
            return "the other ranks have ended, too; look at the line of the rank that ended first"
        behind = [r for r in silent if int(self.store.get(f"reached {r}")) < self.meetings]
        named = " or ".join(f"rank {r}" for r in behind or silent)
        if "Timed out" in words:
            return f"{named} hangs: it has not come to {self.place!r} within {self.timeout:g} seconds"
        return f"{named} has died: its process ended without a word, before the end of {self.place!r}"
