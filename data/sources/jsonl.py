"""A file with one JSON object on each line, read line by line on demand; and the schema of a user's own data:

    {"question": "Which is nearer?", "choices": ["cup", "jug"], "answer": "cup", "picture": "a.jpg"}

`docs/data.md` has the schema. `python -m data.check FILE` names every line that does not follow it.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from data.answers import numbers
from data.sources.rows import Row
from data.types import LETTERS, BadRow, BadSource, Example

FIELDS = ("uid", "question", "choices", "answer", "picture", "pictures", "task", "kind", "wording", "extra")
KINDS = ("text", "number")


class JsonlShard:
    """One file: `row(n)` is the object on its n-th line that is not empty. Memory holds line offsets only.

    `pictures` are the fields that name pictures; `keys` is made from them. Raises BadSource naming the file.
    """

    def __init__(
        self, path: Path, columns: Sequence[str], optional: Sequence[str], pictures: Sequence[Sequence[str]]
    ) -> None:
        self.path, self._columns = path, columns
        self._pictures = [name for names in pictures for name in names]
        starts: list[int] = []
        lines: list[int] = []
        start = 0
        try:
            with open(path, "rb") as file:
                for number, line in enumerate(file, 1):
                    if number == 1 and line.startswith(b"PAR1"):
                        said = (
                            "is a parquet file, and this task reads JSON lines; name the task of its layout"
                        )
                        raise BadSource(f"{path}: {said}")
                    if line.strip():
                        starts.append(start)
                        lines.append(number)
                    start += len(line)
            self._file = open(path, "rb")  # noqa: SIM115, lives as long as this object
        except OSError as error:
            raise BadSource(f"{path}: cannot be read: {error.strerror}") from error
        self._starts, self._lines = np.array(starts, np.int64), np.array(lines, np.int64)

    def __len__(self) -> int:
        return len(self._starts)

    def where(self, number: int) -> str:
        """The name of a row in messages: lines count from 1, as in an editor."""
        return f"{self.path}, line {self._lines[number]}"

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
            if name not in values:
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
    unknown = [name for name in row.values if name not in FIELDS]
    if unknown:
        near = difflib.get_close_matches(unknown[0], FIELDS, n=1)
        meant = f"did you mean {near[0]!r}? " if near else ""
        raise row.bad(unknown[0], "is no field", f'{meant}the source\'s own facts go into "extra"')
    question, choices = row.text("question"), row.texts("choices", missing=())
    answer = row.values["answer"]
    if type(answer) in (int, float) and math.isfinite(answer):
        answer = repr(answer)
    elif not isinstance(answer, str):
        held = answer if isinstance(answer, float) else type(answer).__name__
        remedy = "write the answer, or the text of the right choice"
        raise row.bad("answer", f"holds {held}, not text or a number", remedy)
    else:
        answer = row.text("answer")
    if choices and answer not in choices:
        lettered = answer.strip("() ").upper() in tuple(LETTERS[: len(choices)])
        remedy = f"write the choice's text, {'not its letter' if lettered else 'letter by letter'}"
        raise row.bad("answer", f"{answer!r} is not one of the choices {list(choices)}", remedy)
    kind = row.text("kind", missing="text")
    if kind not in KINDS or (choices and kind != "text"):
        raise row.bad("kind", f"is {kind!r}", f"write {' or '.join(KINDS)}, and nothing beside choices")
    if kind == "number" and numbers.parse(answer) is None:
        remedy = "write it as one number, or leave kind out"
        raise row.bad("kind", f"is 'number', and the answer {answer!r} is none", remedy)
    extra = row.values.get("extra", {})
    if not isinstance(extra, dict):
        raise row.bad("extra", f"holds {type(extra).__name__}, not an object", 'write {"key": value}')
    return Example(
        uid=row.text("uid", missing=row.uid),
        question=question,
        choices=choices,
        answer=answer,
        task=row.text("task", missing=""),
        pictures=_pictures(row),
        extra=extra | {"kind": kind},
        wording=row.text("wording", missing=""),
    )


def _pictures(row: Row) -> tuple[Path, ...]:
    if "picture" in row.values and "pictures" in row.values:
        raise row.bad("picture", "stands beside pictures", "keep one of the two")
    if "picture" in row.values:
        return (inside(row, "picture", row.text("picture")),)
    return tuple(inside(row, "pictures", name) for name in row.texts("pictures", missing=()))


def inside(row: Row, field: str, name: str, folders: Sequence[Path] = ()) -> Path:
    """The picture file of that name in one of the folders (default: the file's own). Nothing outside of
    them is opened, also not through a link. Raises BadRow."""
    folders = folders or [row.folder]
    path = PurePosixPath(name.replace("\\", "/"))
    if not path.parts or path.is_absolute() or ".." in path.parts or ":" in path.parts[0]:
        remedy = "name pictures from there, as in images/1.png"
        raise row.bad(field, f"{name!r} leaves the folder of the file", remedy)
    # `Path.is_file` would raise for an impossible name
    folder = next((folder for folder in folders if os.path.isfile(folder / path)), None)
    if folder is None:
        searched = " or ".join(map(str, folders))
        raise row.bad(field, f"no file {path} in {searched}", "put it there, or correct the name")
    if not (folder / path).resolve().is_relative_to(_ground(folder)):
        remedy = "copy the picture there; a hard link (cp -l) takes no space"
        raise row.bad(field, f"{name!r} is a link that leaves the folder {folder}", remedy)
    return folder / path


@lru_cache(maxsize=64)
def _ground(folder: Path) -> Path:
    """The folder that links may lead to: itself; for a hub snapshot, whose files are links, the cache of its
    repository."""
    place = folder.resolve()
    caches = (above.parent for above in place.parents if above.name == "snapshots")
    return next((cache for cache in caches if (cache / "blobs").is_dir()), place)
