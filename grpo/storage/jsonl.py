"""metrics.jsonl and samples.jsonl: one JSON object per step, safe against a kill and a full disk.

Step n is the n-th optimizer step; step 0 is before training. When a killed run continues from the checkpoint
of step n, its file may have later lines and half a line. `resume(n)` removes both. So the file of an
interrupted run equals that of an uninterrupted one, byte for byte (except times).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from grpo.storage.atomic import append_line, write_whole


class Metrics:
    """Append-only JSON lines.  path: None writes nothing, on all ranks but the first."""

    def __init__(self, path: str | Path | None) -> None:
        self.path = None if path is None else Path(path)
        # called with each row after it is written
        self.followers: list[Callable[[dict[str, Any]], None]] = []
        # the last step that the file held before `resume`
        self.had = -1

    def resume(self, step: int) -> Metrics:
        """Keep the lines up to and including `step` (-1: none). Remove later ones and half a last line.
        Raises ValueError, the file unchanged, if a middle line is no JSON object with a "step"."""
        if self.path is not None and self.path.exists():
            rows = _lines(self.path)
            self.had = max((row["step"] for _, row in rows), default=-1)
            write_whole(self.path, b"".join(line for line, row in rows if row["step"] <= step))
        return self

    def write(self, row: Mapping[str, Any]) -> None:
        """Append one line. `row` has an int "step". Tensors become numbers and lists; inf and nan, which JSON
        lacks, become null. If it raises OSError (a full disk, for example), the file is as before."""
        if self.path is None:
            return
        if not isinstance(row.get("step"), int):
            raise ValueError(f"{self.path.name}: a line needs an int 'step', got {row.get('step')!r}")
        plain = _plain(row)
        line = json.dumps(plain, ensure_ascii=False, allow_nan=False) + "\n"
        append_line(self.path, line.encode("utf-8", "backslashreplace"))
        for follow in self.followers:
            follow(plain)


def read(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a file of `Metrics`, without half a last line; [] if there is no file. Raises ValueError
    that names a broken line."""
    return [row for _, row in _lines(Path(path))] if Path(path).exists() else []


def _lines(path: Path) -> list[tuple[bytes, dict[str, Any]]]:
    # only a line with its newline is whole
    *whole, torn = path.read_bytes().split(b"\n")
    found = []
    for number, line in enumerate(whole, start=1):
        try:
            row = json.loads(line)
        except ValueError:
            # JSON or UTF-8
            row = None
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            found.append((line + b"\n", row))
        elif torn or number < len(whole):
            why = "only a last line can be half written, so this file was edited or is not one of ours"
            wanted = "expected a JSON object with a 'step'"
            raise ValueError(f"{path}, line {number}: {wanted}, got {line[:60]!r}; {why}")
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
