"""SIGTERM and SIGINT: finish the step, save, leave. A second one stops at once.

Cluster schedulers send SIGTERM some time before they kill. A person sends SIGINT with Ctrl-C. After either,
the current step is finished (with its evaluation, if it has one) and a checkpoint is saved. The exit status
is 128 + signal, as in shells, so neither a script nor torchrun takes the run for a finished one. All ranks
leave after the same step, also if only one of them has received a signal. No paper has this; it is plumbing.

The handlers only set a flag. Python calls them between two of its instructions. A rank that waits in a
collective is between none, so a second signal ends it when the collective returns, at the latest after
`timeout` seconds; torchrun kills it after 30 seconds.
"""

import os
import signal
import time
from pathlib import Path

from grpo.parallel.ranks import gather_objects

SIGNALS = (signal.SIGTERM, signal.SIGINT)
# torchrun and the scheduler may both send what was meant once
REPEAT_SECONDS = 2.0


class Interrupted(Exception):
    """The run received a signal, and stopped after a step. status: the exit status of the process."""

    def __init__(self, number: int, step: int, steps: int, saved: Path | None):
        where = f"saved in {saved}; the same command goes on from there"
        if not saved:
            where = "nothing was learned yet, so nothing is saved; the same command starts anew"
        super().__init__(f"stopped by {signal.Signals(number).name} after step {step} of {steps}: {where}")
        self.status = 128 + number


class Interrupts:
    """A context in which the first SIGTERM or SIGINT sets `first`, and a later one ends the process."""

    def __init__(self, show: bool = True, saying: str = "finishing this step, then saving"):
        """show: print a line at the first signal. saying: what happens next."""
        self.show = show
        self.saying = saying
        self.first = 0
        self.received = 0.0

    def __enter__(self) -> "Interrupts":
        self.before = {number: signal.signal(number, self.handle) for number in SIGNALS}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def handle(self, number: int, _) -> None:
        """The handler of both signals."""
        if not self.first:
            self.first = number
            self.received = time.monotonic()
            if self.show:
                # print() may not be called while the main thread prints
                what = f"{self.saying}; once more to stop at once"
                os.write(2, f"\n{signal.Signals(number).name}: {what}\n".encode())
        elif time.monotonic() - self.received > REPEAT_SECONDS:
            os._exit(128 + number)

    def is_set(self) -> bool:
        """Whether a signal came."""
        return bool(self.first)

    def signal_on_any_rank(self) -> int:
        """The signal that any rank has received, or 0, the same on every rank. All call it after a step."""
        return max(gather_objects([self.first]))
