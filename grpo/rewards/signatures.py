"""How a user's function is called: read from its parameters, in the function's own process.

    def reward(text, example, length): ...             one completion, one number (any names)
    async def reward(text, example, length): ...       the same; all completions of a step wait together
    def reward(texts, examples, lengths): ...          all at once, one number for each; may be async
    def reward(completions, answer, **kwargs): ...     TRL's, all at once; may be async

A parameter called `pictures` gets the question's pictures as PIL images (all at once: a list of lists).
Attributes of the function: `timeout`, the seconds of a call; `metrics = ["name", ...]`, numbers of its own
for the metrics. A function with metrics returns (number, {name: number, ...}) for each completion.

TRL's function gets completions as messages, `[{"role": "assistant", "content": text}]`, and by name:
prompts, question, problem, answer, solution, choices, task, uid, image, images, lengths, and what the
example's `extra` holds. `solution` and `answer` are the right answer's text.
"""

from __future__ import annotations

import asyncio
import inspect
import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from data.images import open_picture
from data.types import Example

# seconds of one call, if the function has no attribute `timeout`
TIMEOUT = 10.0
# seconds that the process gets on top, so that it can name the one of many completions that was late
ON_TOP = 10.0
# of float32, the type of rewards
LARGEST = 3.4e38
# of a column that an example lacks
MISSING = object()


class FailedAt(Exception):
    """One of the completions of a call failed. about: its question, in words. The cause is the error."""

    def __init__(self, about: str) -> None:
        super().__init__(about)
        self.about = about


class Signature:
    """A user's function with one way to call it. Raises ValueError for attributes that cannot be right.

    batched: it takes all completions of a step in one call. together: one question to its process has all
    completions of a step. pictures: it wants them. metrics: names of its own numbers.
    """

    def __init__(self, function: Callable) -> None:
        self.function = function
        try:
            self.parameters = dict(inspect.signature(function).parameters)
        except (ValueError, TypeError):
            # built-in functions have none
            self.parameters = {}
        self.trl = "completions" in self.parameters
        self.batched = self.trl or next(iter(self.parameters), "") == "texts"
        waits = any(map(inspect.iscoroutinefunction, (function, type(function).__call__)))
        self.together = self.batched or waits
        self.pictures = bool({"pictures"} & self.parameters.keys())
        self.pictures |= self.trl and bool({"image", "images"} & self.parameters.keys())
        self.timeout = checked(getattr(function, "timeout", TIMEOUT))
        self.metrics = getattr(function, "metrics", [])
        if not isinstance(self.metrics, (list, tuple)) or not all(
            isinstance(name, str) and name for name in self.metrics
        ):
            raise ValueError(f"its attribute metrics is {self.metrics!r}; give a list of names")
        # one loop for all calls, because a user's connections belong to it
        self.loop: asyncio.AbstractEventLoop | None = None

    def told(self) -> dict[str, Any]:
        """What the run has to know about it. timeout: of one question to its process."""
        return {
            "timeout": self.timeout + (ON_TOP if self.together and not self.batched else 0),
            "together": self.together,
            "pictures": self.pictures,
            "metrics": list(self.metrics),
        }

    def rows(self, texts: list[str], examples: list[Example], lengths: list) -> list[list[float]]:
        """One row for each completion: its reward, then its metrics. Raises FailedAt or what the function
        raises."""
        opened: dict[int, list] = {}
        pictures = [self._pictures(example, opened) for example in examples]
        if self.batched:
            found = self._finished(self._batch(texts, examples, lengths, pictures))
            found = found.tolist() if hasattr(found, "tolist") else found
            if not isinstance(found, (list, tuple)) or len(found) != len(texts):
                what = (
                    f"a {type(found).__name__}" if not isinstance(found, (list, tuple)) else f"{len(found)}"
                )
                raise ValueError(
                    f"it returned {what} for {len(texts)} completions; return a list, one for each"
                )
        else:
            shown = [{"pictures": each} if self.pictures else {} for each in pictures]
            calls = list(zip(texts, examples, lengths, shown))
            if self.together:
                found = self._finished(self._all(calls))
            else:
                found = [self.function(*call, **shown) for *call, shown in calls]
        rows = []
        for result, example in zip(found, examples):
            try:
                rows.append(self._row(result))
            except ValueError as error:
                raise FailedAt(f"the question {example.uid!r}") from error
        return rows

    def _batch(self, texts, examples, lengths, pictures):
        """What the batched function returns; of an async one, a coroutine."""
        shown = {"pictures": pictures} if self.pictures else {}
        if not self.trl:
            return self.function(texts, examples, lengths, **shown)
        columns = trl_columns(texts, examples, lengths, pictures)
        open_ended = any(p.kind is p.VAR_KEYWORD for p in self.parameters.values())
        for name, parameter in self.parameters.items():
            needed = parameter.default is parameter.empty
            needed &= parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
            lacks = name not in columns or any(value is MISSING for value in columns[name])
            if needed and lacks:
                said = f"it asks for TRL's {name!r}, which is not known here"
                raise ValueError(f"{said}; known are {', '.join(sorted(columns))}")
        given = {
            name: [None if value is MISSING else value for value in column]
            for name, column in columns.items()
            if open_ended or name in self.parameters
        }
        return self.function(**given)

    def _pictures(self, example: Example, opened: dict[int, list]) -> list:
        """An example's pictures as images, opened once for its group. opened: by the example's id."""
        if not self.pictures:
            return []
        if id(example) not in opened:
            opened[id(example)] = [open_picture(each, name=example.uid) for each in example.pictures]
        return opened[id(example)]

    def _finished(self, result):
        """A coroutine's result; anything else as it is."""
        if not inspect.isawaitable(result):
            return result
        if self.loop is None:
            self.loop = asyncio.new_event_loop()
        return self.loop.run_until_complete(result)

    async def _all(self, calls: Sequence[tuple]) -> list:
        """The results of all calls, which wait together."""

        async def one(text, example, length, shown):
            try:
                return await asyncio.wait_for(self.function(text, example, length, **shown), self.timeout)
            except TimeoutError:
                late = ValueError(f"no result after {self.timeout:g} seconds")
                raise FailedAt(f"the question {example.uid!r}") from late
            except Exception as error:
                raise FailedAt(f"the question {example.uid!r}") from error

        tasks = [asyncio.ensure_future(one(*call)) for call in calls]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()

    def _row(self, result) -> list[float]:
        """A result as reward and metrics. Raises ValueError."""
        if not self.metrics:
            return [checked(result)]
        if not isinstance(result, tuple) or len(result) != 2 or not isinstance(result[1], Mapping):
            raise ValueError(f"it has metrics and returned {result!r:.60}; return (number, {{name: number}})")
        if set(result[1]) != set(self.metrics):
            raise ValueError(
                f"it returned the metrics {sorted(result[1])}; promised are {list(self.metrics)}"
            )
        return [checked(result[0]), *(checked(result[1][name]) for name in self.metrics)]


def trl_columns(texts, examples, lengths, pictures) -> dict[str, list]:
    """The arguments of a TRL reward function: a list for each name, with one entry for each completion."""
    own = {key for example in examples for key in example.extra}
    columns = {key: [example.extra.get(key, MISSING) for example in examples] for key in own}
    return columns | {
        "completions": [[{"role": "assistant", "content": text}] for text in texts],
        "prompts": [[{"role": "user", "content": example.asked}] for example in examples],
        "question": [example.question for example in examples],
        "problem": [example.question for example in examples],
        "answer": [example.answer for example in examples],
        "solution": [example.answer for example in examples],
        "choices": [list(example.choices) for example in examples],
        "task": [example.task for example in examples],
        "uid": [example.uid for example in examples],
        "image": [each[0] if each else None for each in pictures],
        "images": pictures,
        "pictures": pictures,
        "lengths": lengths,
    }


def checked(value) -> float:
    """A number as a float; numpy's scalars are numbers, arrays are not. Raises ValueError if not finite."""
    if not isinstance(value, numbers.Real):
        what = "None" if value is None else f"a {type(value).__name__}"
        if hasattr(value, "shape"):
            what += f" of shape {tuple(value.shape)}"
        elif isinstance(value, (list, tuple)):
            what += f" of {len(value)}"
        raise ValueError(f"it returned {what}; return one number (a float)")
    number = float(value)
    if not math.isfinite(number) or abs(number) > LARGEST:
        raise ValueError(f"it returned {number:g}; return a finite number")
    return number
