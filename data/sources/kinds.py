"""Messages by kind: of one kind the first rows are shown, and the others counted."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator

# messages of one kind that are shown
SHOWN = 5
# what differs between two messages of one kind: quoted values, names of files, numbers
_VALUES = re.compile(r"\[[^\[\]]*\]|'[^']*'|\"[^\"]*\"|\S*/\S*(?=[,:; ])|[0-9]+")


class Kinds:
    """Counts messages. Two are of one kind if they differ in quoted values, names and numbers only."""

    def __init__(self) -> None:
        self._counts = Counter[str]()

    def is_shown(self, message: str) -> bool:
        """Count a message. -> whether it is one of the first of its kind."""
        kind = _VALUES.sub("…", message)
        self._counts[kind] += 1
        return self._counts[kind] <= SHOWN

    def others(self) -> Iterator[str]:
        """One line for each kind with messages that were not shown."""
        for kind, count in self._counts.items():
            if count > SHOWN:
                yield f"and {count - SHOWN} more rows like the {SHOWN} above: {kind}"
