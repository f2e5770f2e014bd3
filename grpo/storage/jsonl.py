"""metrics.jsonl: one JSON object a step; and what a kill, a full disk or a resumed run may leave of it.

Step n is the n-th optimizer step; step 0 is before training. A run that was killed and goes on from a
checkpoint at step n has lines of steps that never happened as far as the weights know, and maybe half a line;
`resume(n)` removes both, so that the file of an interrupted run equals the file of an uninterrupted one, byte
for byte (times aside). samples.jsonl is written the same way.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from grpo.storage.atomic import append_line, write_whole


class Metrics:
    """Append-only JSON lines. `path` None writes nowhere: what every rank but the first is given."""

    def __init__(self, path: str | Path | None) -> None:
        self.path = None if path is None else Path(path)

    def resume(self, step: int) -> Metrics:
        """Keep the lines up to and including `step`, as they are; drop later ones and a torn last one. -1
        keeps nothing.

        Raises ValueError if a line in the middle is not a JSON object with a "step": then the file is not one
        of ours, and is left alone.
        """
        if self.path is None or not self.path.exists():
            return self
        kept = [line for line, row in _lines(self.path) if row["step"] <= step]
        write_whole(self.path, b"".join(kept))
        return self

    def write(self, row: Mapping[str, Any]) -> None:
        """Append one line. `row` has an int "step"; tensors become numbers and lists; inf and nan become
        null, as JSON has neither.

        Raises OSError (a full disk, say) with the file as it was before.
        """
        if self.path is None:
            return
        if not isinstance(row.get("step"), int):
            raise ValueError(f"{self.path.name}: a line needs an int 'step', got {row.get('step')!r}")
        line = (json.dumps(_plain(row), ensure_ascii=False, allow_nan=False) + "\n").encode(
            "utf-8", "backslashreplace"
        )
        append_line(self.path, line)


def read(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a file of `Metrics`, without a torn last one; [] if there is no file. Raises ValueError
    naming a broken line."""
    return [row for _, row in _lines(Path(path))] if Path(path).exists() else []


def _lines(path: Path) -> list[tuple[bytes, dict[str, Any]]]:
    raw = path.read_bytes().split(b"\n")
    # only a line with its newline is whole
    whole, torn = raw[:-1], raw[-1]
    found = []
    for number, line in enumerate(whole, start=1):
        try:
            row = json.loads(line)
        except ValueError:
            # of JSON and of UTF-8
            row = None
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            found.append((line + b"\n", row))
        elif torn or number < len(whole):
            raise ValueError(
                f"{path}, line {number}: expected a JSON object with a 'step', got {line[:60]!r}; "
                "only a last line can be half written, so this file was edited or is not one of ours"
            )
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    # torch and numpy
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value
