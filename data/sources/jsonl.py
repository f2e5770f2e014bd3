"""A file with one JSON object on each line, read line by line on demand; and the schema of a user's own data:

    {"question": "Which is nearer?", "choices": ["cup", "jug"], "answer": "cup", "picture": "a.jpg"}

`docs/data.md` has the schema. `python -m data.check FILE` names every line that does not follow it.
"""

from __future__ import annotations

import base64
import difflib
import gzip
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import numpy as np

from data.answers import numbers
from data.answers.parser import chosen
from data.images import LFS
from data.sources.rows import Row
from data.types import LETTERS, BadRow, BadSource, Example

FIELDS = ("uid", "question", "choices", "answer", "picture", "pictures", "task", "kind", "wording", "extra")
KINDS = ("text", "number")
# others' names of the fields
ALIASES = dict(problem="question", options="choices", solution="answer", image="picture", images="pictures")
TAGGED = re.compile(r"\s*<answer>(.*?)</answer>\s*", re.DOTALL)
_LETTERED = re.compile(r"\(?([A-Z])[).:、]\s*(.+)", re.DOTALL)


class JsonlShard:
    """One file: `row(n)` is the object on its n-th line that is not empty. Memory holds line offsets only.

    `pictures` are the fields that name pictures; `keys` is made from them. Raises BadSource naming the file.
    """

    def __init__(
        self, path: Path, columns: Sequence[str], optional: Sequence[str], pictures: Sequence[Sequence[str]]
    ) -> None:
        self.path, self._columns = path, columns
        self._pictures = [name for names in pictures for name in names]
        self._array = False
        starts: list[int] = []
        lines: list[int] = []
        start = 0
        try:
            self._file = self._opened(path)
        except OSError as error:
            raise BadSource(f"{path}: cannot be read: {error.strerror or error}") from error
        for number, line in enumerate(self._file, 1):
            if line.strip():
                starts.append(start)
                lines.append(number)
            start += len(line)
        self._starts, self._lines = np.array(starts, np.int64), np.array(lines, np.int64)

    def _opened(self, path: Path) -> BinaryIO:
        """The file as JSON lines: gzip is unpacked, and an array written line by line, into a temporary
        file without a name."""
        file = open(path, "rb")  # noqa: SIM115, lives as long as this object
        head = file.read(len(LFS))
        if head.startswith(b"PAR1"):
            said = "is a parquet file, and this task reads JSON lines; name the task of its layout"
            raise BadSource(f"{path}: {said}")
        if head == LFS:
            raise BadSource(f"{path}: is a git-lfs pointer; fetch the file with `git lfs pull`")
        file.seek(0)
        if head.startswith(b"\x1f\x8b"):
            packed, file = file, tempfile.TemporaryFile(prefix="glimpse-")  # noqa: SIM115
            with packed, gzip.open(packed) as unpacked:
                shutil.copyfileobj(unpacked, file)
            file.seek(0)
        if file.read(64).decode("utf-8-sig", "replace").lstrip()[:1] == "[":
            file.seek(0)
            try:
                rows = json.loads(file.read().decode("utf-8-sig"))
            except (ValueError, RecursionError):
                # lines; the first happens to be a list
                rows = None
            if isinstance(rows, list) and all(isinstance(row, dict) for row in rows):
                self._array = True
                file = tempfile.TemporaryFile(prefix="glimpse-")  # noqa: SIM115
                file.writelines(json.dumps(row).encode() + b"\n" for row in rows)
        file.seek(0)
        return file

    def __len__(self) -> int:
        return len(self._starts)

    def where(self, number: int) -> str:
        """The name of a row in messages: lines and items of an array count from 1, as in an editor."""
        return f"{self.path}, {'item' if self._array else 'line'} {self._lines[number]}"

    def row(self, number: int) -> dict[str, Any]:
        """The object on a line. Raises BadRow."""
        where = self.where(number)
        self._file.seek(self._starts[number])
        try:
            # utf-8-sig: some editors write a byte order mark
            values = json.loads(self._file.readline().decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise BadRow(where, "", f"is not JSON: {error}", "write one object a line, in UTF-8") from error
        if not isinstance(values, dict):
            kind = type(values).__name__
            raise BadRow(where, "", f"holds a {kind}, not an object", 'write {"question": …}')
        for name in self._columns:
            if name not in values and not any(ALIASES.get(other) == name for other in values):
                near = difflib.get_close_matches(name, set(values).difference(self._columns), n=1)
                raise BadRow(where, name, "is missing", f"rename {near[0]!r}" if near else "add it")
        return values

    def shown(self, values: Mapping[str, Any], where: str) -> tuple[Path, ...]:
        """None: a line has the names of its pictures, and the adapter finds the files."""
        return ()

    def keys(self) -> Iterator[bytes]:
        """For each line a digest: of its pictures' names, else of the line, else of its number."""
        for number in range(len(self)):
            named: list[Any] = [number]
            try:
                values = self.row(number)
                named = [values[name] for name in self._pictures if values.get(name)] or [values]
            except BadRow:
                pass
            yield hashlib.sha256(json.dumps(named, sort_keys=True).encode()).digest()


def own_example(row: Row) -> Example:
    """A line of the user's own data. Raises BadRow naming field and remedy, BadExample."""
    names = list(row.values)
    row = replace(row, values=_renamed(row))
    unknown = [name for name in row.values if name not in FIELDS]
    if unknown:
        near = difflib.get_close_matches(unknown[0], FIELDS, n=1)
        meant = f"did you mean {near[0]!r}? " if near else ""
        raise row.bad(unknown[0], "is no field", f'{meant}the source\'s own facts go into "extra"')
    choices = _unlettered(row.texts("choices", missing=()))
    answer = row.answer()
    if "solution" in names and (tagged := TAGGED.fullmatch(answer)):
        answer = tagged[1].strip()
    answer = _choice(row, choices, answer) if choices else answer
    pictures = _pictures(row)
    kind = row.text("kind", missing="text")
    if kind not in KINDS or (choices and kind != "text"):
        raise row.bad("kind", f"is {kind!r}", f"write {' or '.join(KINDS)}, and nothing beside choices")
    if kind == "number" and numbers.parse(answer) is None:
        remedy = "write it as one number, or leave kind out"
        raise row.bad("kind", f"is 'number', and the answer {short(answer)} is none", remedy)
    extra = row.values.get("extra", {})
    if not isinstance(extra, dict):
        raise row.bad("extra", f"holds {type(extra).__name__}, not an object", 'write {"key": value}')
    uid, question = row.text("uid", missing=row.uid), row.placed("question", pictures)
    task, wording = row.text("task", missing=""), row.text("wording", missing="")
    return Example(uid, question, choices, answer, task, pictures, extra | {"kind": kind}, wording)


def _renamed(row: Row) -> dict[str, Any]:
    """The row under our names of fields: others' names are read, too."""
    values: dict[str, Any] = {}
    for name, value in row.values.items():
        own = ALIASES.get(name, name)
        if own in values:
            raise row.bad(name, f"and another field both say {own!r}", "keep one of the two")
        values[own] = value
    return values


def _unlettered(choices: tuple[str, ...]) -> tuple[str, ...]:
    """Without the letters that the choices carry themselves: "A. a cat", "(B) a dog"."""
    found = [_LETTERED.fullmatch(choice) for choice in choices]
    own = [match[1] if match else "" for match in found]
    return tuple(match[2] for match in found if match) if own == list(LETTERS[: len(own)]) else choices


def _choice(row: Row, choices: tuple[str, ...], answer: str) -> str:
    """The right choice, given as text, letter, or index from 0."""
    value = row.values["answer"]
    index = choices.index(answer) if answer in choices else chosen(answer, choices)
    if type(value) is int and index < 0:
        index = value
    if 0 <= index < len(choices):
        return choices[index]
    said = f"{short(answer)} is not one of the {len(choices)} choices {short(list(choices))}"
    raise row.bad("answer", said, "write the choice's text, its letter, or its index from 0")


def short(value: object) -> str:
    """A value in a message: at most a line."""
    text = repr(value)
    return text if len(text) <= 90 else text[:80] + "…"


def _pictures(row: Row) -> tuple[Path | bytes, ...]:
    if "picture" in row.values and "pictures" in row.values:
        raise row.bad("picture", "stands beside pictures", "keep one of the two")
    if "picture" in row.values:
        return (_picture(row, "picture", row.text("picture")),)
    return tuple(_picture(row, "pictures", name) for name in row.texts("pictures", missing=()))


def _picture(row: Row, field: str, value: str) -> Path | bytes:
    """A file's name, a data URL, or a picture's bytes in base64 (no file has so long a name)."""
    head, _, data = value.partition("base64,")
    if not head.startswith("data:") and len(value) <= 255:
        return inside(row, field, value)
    try:
        return base64.b64decode(data or value, validate=True)
    except ValueError as error:
        said = f"{short(value)} is neither a file's name nor base64"
        raise row.bad(field, said, "name a file, or write the picture's bytes in base64") from error


def inside(row: Row, field: str, name: str, folders: Sequence[Path] = ()) -> Path:
    """The picture file of that name in one of the folders (default: the file's own). Nothing outside of
    them is opened, also not through a link. Raises BadRow."""
    folders = folders or [row.folder]
    path = PurePosixPath(name.replace("\\", "/"))
    if not path.parts or path.is_absolute() or ".." in path.parts or ":" in path.parts[0]:
        remedy = "name pictures from there, as in images/1.png"
        raise row.bad(field, f"{short(name)} leaves the folder of the file", remedy)
    # `Path.is_file` would raise for an impossible name
    folder = next((folder for folder in folders if os.path.isfile(folder / path)), None)
    if folder is None:
        searched = " or ".join(map(str, folders))
        raise row.bad(field, f"no file {path} in {searched}", "put it there, or correct the name")
    if not (folder / path).resolve().is_relative_to(_ground(folder)):
        remedy = "copy the picture there; a hard link (cp -l) takes no space"
        raise row.bad(field, f"{short(name)} is a link that leaves the folder {folder}", remedy)
    return folder / path


@lru_cache(maxsize=64)
def _ground(folder: Path) -> Path:
    """The folder that links may lead to: itself; for a hub snapshot, whose files are links, the cache of its
    repository."""
    place = folder.resolve()
    caches = (above.parent for above in place.parents if above.name == "snapshots")
    return next((cache for cache in caches if (cache / "blobs").is_dir()), place)
