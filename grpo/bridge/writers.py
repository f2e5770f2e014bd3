"""What writes replies: a server, a model on this machine, or a function.

A writer takes jobs one by one, as it has room for them, and yields each with its reply, in any order. After
`stop` is set it takes no further job.
"""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Protocol

from data.shapes.reasoner import reason
from grpo.bridge.settings import Writer as WriterSettings
from grpo.bridge.stages import Job, reply_of
from grpo.config.typed import ConfigError
from grpo.names import choose
from grpo.serving.client import Client, Server, Stop
from grpo.serving.messages import Reply

# name -> (the text of a request, a generator of its own) -> what is written, with `<think> … </think>` if it
# thinks
FUNCTIONS: dict[str, Callable[[str, random.Random], str]] = {"shapes": reason}


class Writer(Protocol):
    """See the top of the file."""

    def write(self, jobs: Iterable[Job], stop: Stop) -> Iterator[tuple[Job, Reply]]:
        """Write the reply of each job."""
        ...

    def close(self) -> None:
        """Give up what it holds."""
        ...


@contextlib.contextmanager
def opened(settings: WriterSettings, name: str) -> Generator[Writer]:
    """The writer that the settings ask for, until the block ends. name: of the settings, for errors. Raises
    ValueError."""
    if settings.kind == "server":
        writer: Writer = ServerWriter(settings)
    elif settings.kind == "local":
        # torch is not needed for the others
        from grpo.bridge.local import LocalWriter

        writer = LocalWriter(settings)
    else:
        try:
            writer = FunctionWriter(choose("function", settings.model, FUNCTIONS))
        except ValueError as error:
            raise ConfigError(f"{name}.model: {error}") from None
    try:
        yield writer
    finally:
        writer.close()


class ServerWriter:
    """An OpenAI-compatible server. Raises ServerError for what no request survives."""

    def __init__(self, settings: WriterSettings) -> None:
        names = ("url", "model", "key_env", "timeout", "retries", "at_once")
        self.client = Client(Server(*(getattr(settings, name) for name in names)))

    def write(self, jobs: Iterable[Job], stop: Stop) -> Iterator[tuple[Job, Reply]]:
        """As many at once as the settings allow."""
        return self.client.replies(jobs, stop)

    def close(self) -> None:
        """Close the connections."""
        self.client.close()


class FunctionWriter:
    """A function that sees the text of a request and nothing else. Its randomness is the job's seed."""

    def __init__(self, function: Callable[[str, random.Random], str]) -> None:
        self.function = function

    def write(self, jobs: Iterable[Job], stop: Stop) -> Iterator[tuple[Job, Reply]]:
        """One after the other. Tokens are counted as words."""
        for job in jobs:
            start = time.monotonic()
            written = self.function(job.text, random.Random(job.seed))
            counts = (len(job.text.split()), len(written.split()))
            yield job, reply_of(job, written, "stop", *counts, time.monotonic() - start)
            if stop.is_set():
                return

    def close(self) -> None:
        """Nothing is held."""
