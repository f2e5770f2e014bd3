"""How long the phases of a step take. A function names its phase in a decorator."""

from collections.abc import Callable
from functools import wraps
from time import perf_counter
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

_seconds: dict[str, float] = {}


def timed(phase: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A decorator: add the seconds of every call to `phase`. Do not nest functions of one phase."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @wraps(function)
        def measured(*args: P.args, **kwargs: P.kwargs) -> R:
            start = perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                _seconds[phase] = _seconds.get(phase, 0.0) + perf_counter() - start

        return measured

    return decorate


def take_times() -> dict[str, float]:
    """{phase: seconds since the last call}, and begin again."""
    taken = dict(_seconds)
    _seconds.clear()
    return taken
