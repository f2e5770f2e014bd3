"""Writing while training goes on: one thread, one task at a time.

Every rank's thread writes its part. The threads communicate over a process group of their own, because
collectives of two threads on one group would mix. An error is raised in the training thread, on all ranks
after the same step.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from torch import Tensor

from grpo.parallel.ranks import gather_objects, new_group


class Background:
    """Runs one task at a time in a thread. Every rank makes one and calls its methods at the same points."""

    def __init__(self) -> None:
        # buffers of the copies, kept from one save to the next
        self.memory: dict[str, Tensor] = {}
        self.group = new_group()
        self.executor = ThreadPoolExecutor(1, "checkpoint")
        self.task: Future | None = None

    def start(self, work: Callable[[], object]) -> None:
        """Begin a task. Call `wait` before the next one."""
        self.task = self.executor.submit(work)

    def wait(self) -> None:
        """Wait for the task, if there is one. Raises what it raised."""
        task, self.task = self.task, None
        if task is not None:
            task.result()

    def check(self) -> None:
        """`wait`, if the tasks of all ranks are done."""
        if self.task is not None and all(gather_objects([self.task.done()])):
            self.wait()
