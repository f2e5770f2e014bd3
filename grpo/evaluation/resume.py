"""The completions of an interrupted evaluation, so that the same command goes on.

Completions are appended to a file beside --json, one line a question. The key of a line is a hash of
everything that changes a completion: model, prompt, sampling, question. The file keeps tokens and text, not
scores: they are read again, so a resumed evaluation counts exactly as an undisturbed one. It is removed when
the result is written.
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

# of a file of weights, BLOCKS pieces of BLOCK bytes are hashed: enough to tell two checkpoints apart
BLOCK = 4096
BLOCKS = 64


class Written(NamedTuple):
    """A completion: text with the template's opening, tokens, and whether it stopped before the cap."""

    text: str
    tokens: tuple[int, ...]
    stopped: bool


class Kept:
    """The kept completions of one pass over the questions, asked as `how` says. Without a log: none."""

    def __init__(self, log: Log | None = None, how: Mapping[str, Any] | None = None) -> None:
        self.log = log
        self.how = json.dumps(how, sort_keys=True, default=str)

    def find(self, number: int, example: Example) -> list[Written] | None:
        """The completions of the number-th question, None if there are none."""
        return self.log.rows.get(self._key(number, example)) if self.log else None

    def add(self, asked: Sequence[tuple[int, Example]], written: Sequence[Sequence[Written]]) -> None:
        """Keep the completions of some questions, each with its number."""
        if self.log is None:
            return
        for (number, example), rows in zip(asked, written):
            key = self._key(number, example)
            self.log.rows[key] = list(rows)
            self.log._append({"asked": key, "uid": example.uid, "completions": rows})

    def _key(self, number: int, example: Example) -> str:
        # two questions may have the same uid
        said = json.dumps([self.how, number, example.uid, example.asked, example.choices])
        return hashlib.sha256(said.encode("ascii")).hexdigest()[:24]


class Log:
    """The file of an unfinished evaluation. asked: the arguments that change a completion, plain values.

    Raises ValueError if the file is of an evaluation with other arguments, or is not one of ours.
    """

    def __init__(self, path: Path, asked: Mapping[str, Any]) -> None:
        self.path = path
        self.rows: dict[str, list[Written]] = {}
        head = json.loads(json.dumps(asked, default=str))
        # a last line without a newline was cut by a kill
        lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
        for number, line in enumerate(lines):
            try:
                row = json.loads(line)
                if number == 0:
                    self._same(row["evaluation"], head)
                else:
                    found = row["completions"]
                    self.rows[row["asked"]] = [Written(text, tuple(ids), done) for text, ids, done in found]
            except (KeyError, TypeError, json.JSONDecodeError, UnicodeDecodeError) as error:
                problem = f"{path}, line {number + 1}: not written by an evaluation"
                raise ValueError(f"{problem}; remove the file, or write elsewhere with --json") from error
        if path.exists():
            os.truncate(path, sum(len(line) + 1 for line in lines))
        self.resumed = len(self.rows)
        if not lines:
            self._append({"evaluation": head})

    def of(self, **how: Any) -> Kept:
        """The completions of one pass: one model with one prompt, sampling and limits."""
        return Kept(self, how)

    def _same(self, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        a, b = _flat(before), _flat(now)
        other = [f"{key}: {a.get(key)} there, {b.get(key)} now" for key in a | b if a.get(key) != b.get(key)]
        if other:
            problem = f"an interrupted evaluation that was asked differently ({'; '.join(other[:3])})"
            advice = "finish it with its own command, remove the file, or write elsewhere with --json"
            raise ValueError(f"{self.path}: {problem}; {advice}")

    def _append(self, row: Mapping[str, Any]) -> None:
        append_line(self.path, (json.dumps(row) + "\n").encode("ascii"))


def weights_digest(folder: Path) -> str:
    """A hash of a model folder's weights: of their names, their sizes and BLOCKS pieces of each file."""
    found = hashlib.sha256()
    files = [
        folder / "config.json",
        folder / "adapter_config.json",
        *sorted(folder.glob("*model*.safetensors")),
    ]
    for path in filter(Path.is_file, files):
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
