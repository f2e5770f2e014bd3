"""SIGTERM and SIGINT: finish the step, save, leave. A second one stops at once.

Cluster schedulers send SIGTERM some time before they kill, a person sends SIGINT with Ctrl-C. Either way the
step under way is finished (with its evaluation, if it has one), a checkpoint is saved, and the process ends
with 128 + signal, as shells have it, so that nobody takes the run for a finished one. All ranks leave after
the same step, also where only one of them was told. Python would handle a signal only between two of its own
instructions, and a rank that waits for the others may not come to the next one; so a thread listens, and a
second signal works always. No paper has this; it is plumbing.
"""

import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path

from grpo.parallel.ranks import gather_objects

SIGNALS = (signal.SIGTERM, signal.SIGINT)
# seconds: torchrun and the scheduler may both send what was meant once
SAME = 2.0


class Interrupted(Exception):
    """The run was told to stop, and has stopped where it can go on. status: what the process should end
    with."""

    def __init__(self, number: int, step: int, steps: int, saved: Path | None):
        where = (
            f"saved in {saved}; the same command goes on from there"
            if saved
            else "nothing was learned yet, so nothing is saved; the same command starts anew"
        )
        super().__init__(f"stopped by {signal.Signals(number).name} after step {step} of {steps}: {where}")
        self.status = 128 + number


class Interrupts:
    """A context in which the first SIGTERM or SIGINT is noted, and announced, and a later one ends the
    process."""

    def __init__(self, show: bool = True):
        """show: announce the first one on the terminal."""
        self.show, self.first, self.at = show, 0, 0.0

    def __enter__(self) -> "Interrupts":
        self.ears, self.mouth = socket.socketpair()
        self.mouth.setblocking(False)
        # Python's part; what is done is done in `listen`
        self.before = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
        self.woken = signal.set_wakeup_fd(self.mouth.fileno(), warn_on_full_buffer=False)
        self.thread = threading.Thread(target=self.listen, name="interrupts", daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_) -> None:
        signal.set_wakeup_fd(self.woken)
        for number, handler in self.before.items():
            signal.signal(number, handler)
        # which ends the thread, whoever else has inherited the socket
        self.mouth.shutdown(socket.SHUT_RDWR)
        self.mouth.close()
        self.thread.join()
        self.ears.close()

    def listen(self) -> None:
        """Hear the numbers of signals; any that a library handles in Python arrives here, too."""
        while heard := self.ears.recv(1):
            number = heard[0]
            if number not in SIGNALS:
                continue
            if not self.first:
                self.first, self.at = number, time.monotonic()
                if self.show:
                    print(
                        f"\n{signal.Signals(number).name}: finishing this step, then saving; once more "
                        "to stop at once",
                        file=sys.stderr,
                        flush=True,
                    )
            elif time.monotonic() - self.at > SAME:
                os._exit(128 + number)

    def signal_on_any_rank(self) -> int:
        """The signal that any rank has heard, 0 if none has. Every rank calls it after the same step and
        gets the same."""
        return max(gather_objects([self.first]))
