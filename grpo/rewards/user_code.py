"""A user's own reward, `rewards: {FILE.py:FUNCTION: 1.0}`: a function `(text, example, length) -> float` that
runs in a process of its own.

Code that we have not seen may raise, hang, print, or leave a list where a number belongs. In another process
none of that can touch the run: a call that takes too long is ended with its process, and each failure becomes
one line that names file, function and question. No paper has this; it is plumbing.

The function gets the whole text as the built-in rules see it, the Example without its pictures, and the
completion's length in tokens. It must depend on nothing else, or a resumed run is another run. It may print;
its file may import what lies beside it; an attribute `my_reward.timeout = 60` allows a call more seconds.
"""

from __future__ import annotations

import importlib.util
import json
import math
import multiprocessing
import multiprocessing.util
import numbers
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

from data.types import Example

# seconds that a file may take to load; what train.py imports is imported there too
LOADING = 180.0
# seconds of one call, unless the function says otherwise
TIMEOUT = 10.0
TOLD = (signal.SIGTERM, signal.SIGINT)
# of a float32, which rewards are
LARGEST = 3.4e38


class RewardError(ValueError):
    """A user's reward cannot be loaded, raised, died, or gave no number. The message names file, function
    and question."""


class RewardTimeout(RewardError):
    """A call took longer than it may; its process has been ended."""


def names_a_file(name: str) -> bool:
    """Whether a reward's name is FILE.py:FUNCTION."""
    return ".py:" in name


@cache
def open_reward(name: str) -> UserReward:
    """The function FILE.py:FUNCTION, FILE relative to the working directory; loaded once a run. Raises
    RewardError."""
    return UserReward(name)


class UserReward:
    """Calls like the function it stands for, `reward(text, example, length)`, with `timeout` seconds for
    each call. Raises RewardError."""

    def __init__(self, name: str):
        file, _, self.function = name.rpartition(":")
        self.name, self.path, self.process = name, Path(file).absolute(), None
        if not self.path.is_file():
            raise RewardError(f"reward {name!r}: there is no file {self.path}")
        self.timeout = LOADING
        self._start()

    def __call__(self, text: str, example: Example, length: int | None) -> float:
        about = f"the question {example.uid!r}"
        # ended by a call before
        if self.process is None:
            self._start()
        try:
            self.pipe.send((text, replace(example, pictures=(), extra=dict(example.extra)), length))
        except OSError:
            raise self._died(about) from None
        return self._answer(self.timeout, about)

    def close(self) -> None:
        """End the process, whatever it is doing."""
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.pipe.close()
            self.process = None

    def _start(self) -> None:
        # a fork would copy this process's threads' locks, and CUDA
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(
            target=serve, args=(theirs, str(self.path), self.function, os.getpid()), daemon=True
        )
        # which it inherits, until it has learned to ignore them
        before = signal.pthread_sigmask(signal.SIG_BLOCK, TOLD)
        try:
            self.process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()
        # At its own exit Python sends such processes SIGTERM and waits for them. This one ignores it, so it
        # is ended before.
        multiprocessing.util.Finalize(self, self.process.kill, exitpriority=0)
        self.timeout = self._answer(LOADING, "loading the file")

    def _answer(self, seconds: float, about: str) -> float:
        """The number that the process sends."""
        if not self.pipe.poll(seconds):
            self.close()
            raise RewardTimeout(f"reward {self.name!r}: no result after {seconds:g} seconds, at {about}")
        try:
            said = json.loads(self.pipe.recv_bytes())
        except (EOFError, OSError):
            raise self._died(about) from None
        if "value" in said:
            return said["value"]
        raise RewardError(f"reward {self.name!r}: {said['wrong']}, at {about}")

    def _died(self, about: str) -> RewardError:
        self.process.join(5)
        code = self.process.exitcode
        self.close()
        return RewardError(f"reward {self.name!r}: its process ended with exit code {code}, at {about}")


# ---- in the other process


def serve(pipe, path: str, name: str, parent: int) -> None:
    """Load the function, send its timeout; then for every question received send {"value": number} or
    {"wrong": why}."""
    # Ctrl-C and schedulers tell all processes; the run still needs this one for its step
    for number in TOLD:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, TOLD)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    try:
        function = load(path, name)
        pipe.send_bytes(json.dumps({"value": checked(getattr(function, "timeout", TIMEOUT))}).encode())
    except BaseException as error:
        pipe.send_bytes(json.dumps({"wrong": described(error, path)}).encode())
        return
    while True:
        try:
            asked = pipe.recv()
        except EOFError:
            return
        pipe.send_bytes(json.dumps(called(function, asked, path)).encode())


def _end_with(parent: int) -> None:
    """A function that hangs must not outlive a run that was killed."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def load(path: str, name: str) -> Callable:
    """The function `name` of the Python file `path`. Raises ValueError, and whatever the file raises."""
    sys.path.insert(0, str(Path(path).parent))
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)
    # as an import would: dataclasses look their module up
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"{Path(path).name} has no function {name!r}")
    return function


def called(function: Callable, asked: tuple, path: str) -> dict:
    """What a call gives: {"value": a finite number} or {"wrong": why it gave none}. Nothing that it raises
    escapes, SystemExit neither."""
    try:
        return {"value": checked(function(*asked))}
    except BaseException as error:
        return {"wrong": described(error, path)}


def checked(value) -> float:
    """A finite number as a float; numpy's scalars are numbers, an array or a tensor is not. Raises
    ValueError."""
    if not isinstance(value, numbers.Real):
        shape = (
            f" of shape {tuple(value.shape)}"
            if hasattr(value, "shape")
            else f" of {len(value)}"
            if isinstance(value, (list, tuple))
            else ""
        )
        raise ValueError(
            f"it returned {'None' if value is None else 'a ' + type(value).__name__}{shape}; return one "
            "number (a float)"
        )
    if not math.isfinite(value) or abs(value) > LARGEST:
        raise ValueError(f"it returned {float(value):g}; return a finite number")
    return float(value)


def described(error: BaseException, path: str) -> str:
    """An exception in one line, with the line of the user's file where it happened."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    words = " ".join(str(error).split())[:300]
    # raised by the checks above, not by the file
    if not lines:
        return words if isinstance(error, ValueError) else f"it raised {type(error).__name__}: {words}"
    return f"it raised {type(error).__name__}: {words} (line {lines[-1]})"
