"""A user's own reward, `rewards: {FILE.py:FUNCTION: 1.0}`: a function `(text, example, length) -> float`, or
one of the other forms in `grpo/rewards/signatures.py`, that runs in a process of its own.

Code of a user may raise, hang, print, fork, or return a list. In its own process it cannot harm the run: a
call that is too slow ends with its process and the processes that it started, and each failure is one line
that names file, function and question. The run never unpickles what this process writes: an answer is JSON
with the number of its question and the id of its process, and any other message is refused.

The function gets the whole text as the built-in rules see it, the Example (its pictures only if it asks for
them), and the length in tokens. It must depend on nothing else, or a resumed run differs. It may print (to
stderr) and its file may import its neighbours; an attribute `my_reward.timeout = 60` sets the seconds of a
call.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import importlib.util
import json
import multiprocessing
import multiprocessing.util
import os
import signal
import sys
import threading
import traceback
import uuid
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

from data.images import open_picture
from data.types import Example
from grpo.rewards.signatures import FailedAt, Signature
from grpo.serving.messages import png

# seconds in which the process has to start and load the file; it imports what train.py imports
LOADING = 180.0
# the signals that stop a run
SIGNALS = (signal.SIGTERM, signal.SIGINT)
# bytes; a longer message is no answer; and for each further number in it
LONGEST_ANSWER, LONGEST_NUMBER = 10_000, 40
# an environment variable that a reward's process hands down to those it starts; its value is of this reward
MARK = "GLIMPSE_REWARD"


class RewardError(ValueError):
    """A user's reward did not load, raised, ended its process, or returned no number. The message names
    file, function and question."""


class RewardTimeout(RewardError):
    """A call was too slow. Its process has been ended."""


def names_a_file(name: str) -> bool:
    """Whether a reward's name is FILE.py:FUNCTION."""
    return ".py:" in name


@cache
def open_reward(name: str) -> UserReward:
    """The reward of that name (see UserReward), loaded once per run. Raises RewardError."""
    return UserReward(name)


class UserReward:
    """`reward(text, example, length)`, or `rows(...)` for all completions of a step. Raises RewardError.

    name: FILE.py:FUNCTION, relative to the working directory, or MODULE:FUNCTION of this repository.
    metrics: names of the function's own numbers.
    """

    def __init__(self, name: str):
        self.name = name
        self.source, _, self.function = name.rpartition(":")
        self.source = str(Path(self.source).absolute()) if names_a_file(name) else self.source
        if names_a_file(name) and not Path(self.source).is_file():
            raise RewardError(f"reward {name!r}: there is no file {self.source}")
        # of the last question
        self.number = 0
        self._start()

    def __call__(self, text: str, example: Example, length: int | None) -> float:
        return self.rows([text], [example], [length])[0][0]

    def rows(self, texts: list[str], examples: list[Example], lengths: list) -> list[list[float]]:
        """One row for each completion: its reward, then its metrics. A function that takes one completion is
        called for one after the other, any other form once."""
        if self.process is None:
            self._start()
        # an example is sent once for its group
        sent = {id(example): self._sent(example) for example in examples}
        bare = [sent[id(example)] for example in examples]
        if self.together:
            about = f"the {len(texts)} completions of {len(sent)} questions"
            return self._ask((texts, bare, lengths), self.timeout, about) if texts else []
        return [
            self._ask(([text], [example], [length]), self.timeout, f"the question {example.uid!r}")[0]
            for text, example, length in zip(texts, bare, lengths)
        ]

    def _sent(self, example: Example) -> Example:
        """An example as it travels: without pictures, or with files and bytes in place of functions."""
        pictures = example.pictures if self.pictures else ()
        drawn = [png(open_picture(each, name=example.uid)) if callable(each) else each for each in pictures]
        whole = tuple(each.absolute() if isinstance(each, Path) else each for each in drawn)
        return replace(example, pictures=whole, extra=dict(example.extra))

    def close(self) -> None:
        """End the process and its children."""
        if self.process is not None:
            self.end()
            self.process.join()
            self.process = None

    def _start(self) -> None:
        # not a fork, which would copy locks of other threads, and CUDA
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        process = context.Process(target=serve, args=(theirs, self.source, self.function))
        self.process: SpawnProcess | None = process
        mark = f"{os.getpid()} {uuid.uuid4().hex}"
        # Python's own process, which belongs to the run, is not to have the mark
        resource_tracker.ensure_running()
        # the process inherits the signal mask, until it has its own handlers
        before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        os.environ[MARK] = mark
        try:
            process.start()
        finally:
            del os.environ[MARK]
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()
        self.pid = process.pid
        # at exit Python waits for the process, so it is ended before
        self.end = multiprocessing.util.Finalize(self, _end_process, (process, mark), exitpriority=0)
        # a thread that reads from the pipe, so that this one can stop waiting
        self.reader = concurrent.futures.ThreadPoolExecutor(1)
        try:
            told = self._ask(None, LOADING, "loading the file")
            self.timeout: float = told["timeout"]
            self.together: bool = told["together"]
            self.pictures: bool = told["pictures"]
            self.metrics: list[str] = told["metrics"]
        except RewardError:
            self.close()
            raise

    def _ask(self, question: tuple | None, seconds: float, about: str) -> Any:
        """Send a question (None: load the function) and return its answer. about: the question, in words."""
        process = self.process
        assert process is not None
        try:
            answer = self.reader.submit(self._exchange, question).result(seconds)
        except concurrent.futures.TimeoutError:
            self.close()
            late = f"no result after {seconds:g} seconds"
            raise RewardTimeout(f"reward {self.name!r}: {late}, at {about}") from None
        except (EOFError, ConnectionError):
            process.join(5)
            code = process.exitcode
            wrong = "it closed the pipe" if code is None else f"its process ended with exit code {code}"
        except (OSError, ValueError) as error:
            wrong = f"its process wrote what is no answer ({str(error)[:200]})"
        except BaseException:
            # Ctrl-C during a call
            self.close()
            raise
        else:
            if "value" in answer:
                return answer["value"]
            raise RewardError(f"reward {self.name!r}: {answer['wrong']}, at {answer.get('about', about)}")
        self.close()
        raise RewardError(f"reward {self.name!r}: {wrong}, at {about}")

    def _exchange(self, question: tuple | None) -> dict:
        """Send a question and return its answer. Raises ValueError if it is the answer to another one."""
        self.number += 1
        expected = [self.number, self.pid]
        self.pipe.send((self.number, question))
        count = len(question[0]) * (1 + len(self.metrics)) if question else 0
        answer = json.loads(self.pipe.recv_bytes(LONGEST_ANSWER + LONGEST_NUMBER * count))
        if not isinstance(answer, dict) or [answer.get("number"), answer.get("pid")] != expected:
            raise ValueError(f"{answer!r:.60} in place of an answer with number and pid {expected}")
        return answer


def _end_process(process: SpawnProcess, mark: str) -> None:
    """End a process that runs `serve`, and the processes that it has started."""
    end_marked(mark)
    try:
        os.killpg(process.pid or 0, signal.SIGKILL)
    except ProcessLookupError:
        # it has no group yet, or has ended
        process.kill()


def end_marked(mark: str) -> None:
    """Kill each other process with this mark in its environment, of any session and parent. Linux lists them
    in /proc; on other systems only the process group ends."""
    marked = f"{MARK}={mark}".encode()
    for path in Path("/proc").glob("[0-9]*/environ"):
        pid = int(path.parent.name)
        # OSError: of another user, or it has ended
        with contextlib.suppress(OSError):
            if pid != os.getpid() and marked in path.read_bytes().split(b"\0"):
                os.kill(pid, signal.SIGKILL)


# ---- in the other process


def serve(pipe: Connection, source: str, name: str) -> None:
    """Load the function, then answer each question: {"value": rows of numbers} or {"wrong": why}, with the
    number of the question and the id of this process."""
    pid = os.getpid()
    _set_up(pipe)
    signature: Signature | None = None
    while True:
        try:
            number, question = pipe.recv()
        except EOFError:
            # the run has ended
            return _end_all()
        try:
            if signature is None:
                signature = Signature(load(source, name))
                result = {"value": signature.told()}
            else:
                result = {"value": signature.rows(*question)}
        except FailedAt as failed:
            result = {"wrong": described(failed.__cause__ or failed, source), "about": failed.about}
        except BaseException as error:
            # SystemExit too
            result = {"wrong": described(error, source)}
        if os.getpid() != pid:
            # the function has forked, and its child has returned too
            os._exit(0)
        pipe.send_bytes(json.dumps({"number": number, "pid": pid} | result).encode())


def _set_up(pipe: Connection) -> None:
    """A process group of its own, which ends with the run. SIGTERM and SIGINT do nothing, because the run
    finishes its step when they come. Prints go to stderr. A fork gets neither the pipe nor the handlers."""

    def in_fork() -> None:
        pipe.close()
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)

    os.setsid()
    # a .pyc is stale after an edit within a second, and nothing is to be written beside a user's files
    sys.dont_write_bytecode = True
    for number in SIGNALS:
        # not SIG_IGN, which programs started by the function would inherit
        signal.signal(number, lambda *_: None)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    os.dup2(2, 1)
    os.register_at_fork(after_in_child=in_fork)
    threading.Thread(target=_end_with_run, daemon=True).start()


def _end_with_run() -> None:
    """A function that hangs must not outlive a run that was killed."""
    run = multiprocessing.parent_process()
    assert run is not None
    run.join()
    _end_all()


def _end_all() -> None:
    """End this process and those that it has started."""
    end_marked(os.environ.get(MARK, ""))
    os.killpg(0, signal.SIGKILL)


def load(source: str, name: str) -> Callable:
    """The function of a file or a module of this repository. Raises ValueError, and what the file raises."""
    if source.endswith(".py"):
        sys.path.insert(0, str(Path(source).parent))
        spec = importlib.util.spec_from_file_location(Path(source).stem, source)
    else:
        spec = importlib.util.find_spec(source)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # as an import does: a dataclass looks up its module
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"{Path(source).name} has no function {name!r}")
    return function


def described(error: BaseException, source: str) -> str:
    """An exception in one line, with the line of the user's file in which it was raised."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == source]
    words = " ".join(str(error).split())[:300]
    # a ValueError from elsewhere is one of the checks above
    if not lines and isinstance(error, ValueError):
        return words
    return f"it raised {type(error).__name__}: {words}" + (f" (line {lines[-1]})" if lines else "")
