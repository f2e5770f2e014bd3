"""Writing while training goes on: one thread, one piece of work at a time.

The thread of every rank writes its part, and they agree with each other over a process group of their own:
collectives of two threads on one group would mix. What goes wrong is raised in the training thread, on all
ranks after the same step.
"""

import threading
from collections.abc import Callable

from torch import Tensor

from grpo.parallel.ranks import gather_objects, new_group


class Background:
    """Does one piece of work at a time beside the caller's own. Every rank makes one, and calls its
    methods at the same points."""

    def __init__(self) -> None:
        # where the work's copies are, from one save to the next
        self.memory: dict[str, Tensor] = {}
        self.group = new_group()
        self.thread: threading.Thread | None = None
        self.error: BaseException | None = None

    def start(self, work: Callable[[], object]) -> None:
        """Begin; `wait` comes first if there is work under way."""

        def run() -> None:
            try:
                work()
            except BaseException as error:
                self.error = error

        self.thread = threading.Thread(target=run, name="checkpoint")
        self.thread.start()

    def wait(self) -> None:
        """Until the work is done, if there is any. Raises what it raised."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        error, self.error = self.error, None
        if error is not None:
            raise error

    def check(self) -> None:
        """`wait`, if the work of all ranks is done."""
        if self.thread is not None and all(gather_objects([not self.thread.is_alive()])):
            self.wait()
