"""Looking a name up in a table of named variants."""

from collections.abc import Mapping
from difflib import get_close_matches
from typing import TypeVar

T = TypeVar("T")


def choose(what: str, name: str, table: Mapping[str, T]) -> T:
    """The entry `name` of a table of `what`. Raises ValueError for an unknown name, with the known names and
    the nearest one."""
    if name not in table:
        near = get_close_matches(name, list(table), n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown {what} {name!r}.{hint} Known: {', '.join(table)}.")
    return table[name]
