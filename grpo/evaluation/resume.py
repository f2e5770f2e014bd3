"""What an evaluation that is killed has written so far, so that the same command goes on.

Completions are appended to a file beside --json as they come, one line a question: who wrote them is a hash
of everything that changes a completion (model, prompt, sampling, question). Tokens and text are kept, not
scores: they are read anew, so that a resumed evaluation counts exactly as an uninterrupted one. The file is
removed when the result is written.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from data.types import Example
from grpo.storage.atomic import append_line

# of a file of weights, so much is looked at: gigabytes need not be read to tell two checkpoints apart
BLOCK, BLOCKS = (4096, 64)


class Written(NamedTuple):
    """A completion: its text (the template's opening included), its tokens, and whether it stopped before
    the cap."""

    text: str
    tokens: tuple[int, ...]
    stopped: bool


class Kept:
    """The completions of one pass over the questions. This one keeps nothing."""

    def find(self, number: int, example: Example) -> list[Written] | None:
        """What was written for the number-th question, None if nothing was."""
        return None

    def add(self, asked: Sequence[tuple[int, Example]], written: Sequence[Sequence[Written]]) -> None:
        """Keep what was written for some questions, each with its number."""


class Log:
    """The file of an evaluation that is under way. `asked`: all that was asked for, plain values; what
    changes nothing is left out.

    Raises ValueError if the file is of an evaluation that asked for something else, or is none of ours.
    """

    def __init__(self, path: Path, asked: Mapping[str, Any]) -> None:
        self.path, self.rows = path, {}
        head = json.loads(json.dumps(asked, default=str))
        # a line without its end was torn by a kill
        lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
        whole = sum(len(line) + 1 for line in lines)
        for number, line in enumerate(lines):
            try:
                row = json.loads(line)
                if number == 0:
                    self._same(row["evaluation"], head)
                else:
                    self.rows[row["asked"]] = [
                        Written(text, tuple(tokens), stopped) for text, tokens, stopped in row["completions"]
                    ]
            except (KeyError, TypeError, json.JSONDecodeError, UnicodeDecodeError) as error:
                raise ValueError(
                    f"{path}, line {number + 1}: not written by an evaluation; remove the file, or write "
                    "elsewhere with --json"
                ) from error
        if path.exists():
            os.truncate(path, whole)
        self.resumed = len(self.rows)
        if not lines:
            self._append({"evaluation": head})

    def of(self, **how: Any) -> Kept:
        """The completions that were asked for in one way: by the same model with the same prompt, sampling
        and limits."""
        return _Pass(self, how)

    def _same(self, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        before, now = _flat(before), _flat(now)
        if other := [
            f"{key}: {before.get(key)} there, {now.get(key)} now"
            for key in (before | now)
            if before.get(key) != now.get(key)
        ]:
            raise ValueError(
                f"{self.path}: an interrupted evaluation that was asked differently "
                f"({'; '.join(other[:3])}); "
                "finish it with its own command, remove the file, or write elsewhere with --json"
            )

    def _append(self, row: Mapping[str, Any]) -> None:
        append_line(self.path, (json.dumps(row) + "\n").encode("ascii"))


class _Pass(Kept):
    def __init__(self, log: Log, how: Mapping[str, Any]) -> None:
        self.log, self.how = log, json.dumps(how, sort_keys=True, default=str)

    def find(self, number: int, example: Example) -> list[Written] | None:
        return self.log.rows.get(self._key(number, example))

    def add(self, asked: Sequence[tuple[int, Example]], written: Sequence[Sequence[Written]]) -> None:
        for (number, example), rows in zip(asked, written):
            key = self._key(number, example)
            self.log.rows[key] = list(rows)
            self.log._append({"asked": key, "uid": example.uid, "completions": rows})

    def _key(self, number: int, example: Example) -> str:
        # a uid alone may be there twice
        said = json.dumps([self.how, number, example.uid, example.asked, example.choices])
        return hashlib.sha256(said.encode("ascii")).hexdigest()[:24]


def weights_digest(folder: Path) -> str:
    """A hash of the weights in a model folder: of their names, their sizes and BLOCKS pieces of each file.
    Enough to tell checkpoints apart."""
    found = hashlib.sha256()
    for path in [folder / "config.json", *sorted(folder.glob("model*.safetensors"))]:
        size = path.stat().st_size
        found.update(f"{path.name} {size}".encode())
        with open(path, "rb") as file:
            for number in range(BLOCKS):
                file.seek(size * number // BLOCKS)
                found.update(file.read(BLOCK))
    return found.hexdigest()[:16]


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"models.0.cap": 17, …}"""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            value = dict(enumerate(value))
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found
