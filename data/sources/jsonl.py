"""A file of one JSON object a line, found by line when one is asked for; and our own schema for questions and
pictures of one's own.

    {"question": "Which is nearer?", "choices": ["the cup", "the jug"], "answer": "the cup", "pictures":
    ["a.jpg", "b.jpg"]}

`docs/data.md` has the schema, `python -m data.check FILE` names every line that does not follow it.
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
    """One file: `row(n)` is the object on its n-th line that is not empty. Only the places of the lines are
    held in memory.

    `pictures` are the fields that name pictures; what they say tells the halves of a file apart (`keys`).
    Raises BadSource naming the file.
    """

    def __init__(
        self, path: Path, columns: Sequence[str], optional: Sequence[str], pictures: Sequence[Sequence[str]]
    ) -> None:
        self.path, self._columns, self._pictures = (
            path,
            columns,
            [name for names in pictures for name in names],
        )
        starts, lines, start = [], [], 0
        try:
            with open(path, "rb") as file:
                for number, line in enumerate(file, 1):
                    if number == 1 and line.startswith(b"PAR1"):
                        raise BadSource(
                            f"{path}: is a parquet file, and this task reads JSON lines; name the task "
                            "whose layout it has"
                        )
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
        self._file.seek(self._starts[number])
        try:
            # some editors put a mark before the first line
            values = json.loads(self._file.readline().decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise BadRow(
                self.where(number), "", f"is not JSON: {error}", "write one object a line, in UTF-8"
            ) from error
        if not isinstance(values, dict):
            raise BadRow(
                self.where(number),
                "",
                f"holds a {type(values).__name__}, not an object",
                'write {"question": …}',
            )
        missing = [name for name in self._columns if name not in values]
        if missing:
            near = difflib.get_close_matches(
                missing[0], [name for name in values if name not in self._columns], n=1
            )
            raise BadRow(
                self.where(number), missing[0], "is missing", f"rename {near[0]!r}" if near else "add it"
            )
        return values

    def shown(self, values: Mapping[str, Any], where: str) -> tuple[Path, ...]:
        """Picture files are the adapter's to find: a line only has their names."""
        return ()

    def keys(self) -> Iterator[bytes]:
        """For each line a digest of the names of its pictures; of the whole line where it has none or
        cannot be read."""
        for number in range(len(self)):
            try:
                values = self.row(number)
                named = [values[name] for name in self._pictures if values.get(name)] or [values]
            except BadRow:
                named = [number]
            yield hashlib.sha256(json.dumps(named, sort_keys=True).encode()).digest()


def own_example(row: Row) -> Example:
    """A line of the user's own data. Raises BadRow naming field and remedy, BadExample."""
    unknown = [name for name in row.values if name not in FIELDS]
    if unknown:
        near = difflib.get_close_matches(unknown[0], FIELDS, n=1)
        raise row.bad(
            unknown[0],
            "is no field",
            f'{f"did you mean {near[0]!r}? " if near else ""}the source\'s own facts go into "extra"',
        )
    question, choices = row.text("question"), row.texts("choices", missing=())
    answer = row.values["answer"]
    if type(answer) in (int, float) and math.isfinite(answer):
        answer = repr(answer)
    elif not isinstance(answer, str):
        raise row.bad(
            "answer",
            f"holds {answer if isinstance(answer, float) else type(answer).__name__}, not text or a number",
            "write the answer, or the text of the right choice",
        )
    else:
        answer = row.text("answer")
    if choices and answer not in choices:
        lettered = answer.strip("() ").upper() in LETTERS[: len(choices)] and len(answer.strip("() ")) == 1
        raise row.bad(
            "answer",
            f"{answer!r} is not one of the choices {list(choices)}",
            f"write the choice's text{', not its letter' if lettered else ', to the letter'}",
        )
    kind = row.text("kind", missing="text")
    if kind not in KINDS or (choices and kind != "text"):
        raise row.bad("kind", f"is {kind!r}", f"write {' or '.join(KINDS)}, and nothing beside choices")
    if kind == "number" and numbers.parse(answer) is None:
        raise row.bad(
            "kind",
            f"is 'number', and the answer {answer!r} is none",
            "write it as one number, or leave kind out",
        )
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
    names = (row.text("picture"),) if "picture" in row.values else row.texts("pictures", missing=())
    return tuple(inside(row, "picture" if "picture" in row.values else "pictures", name) for name in names)


def inside(row: Row, field: str, name: str, folders: Sequence[Path] = ()) -> Path:
    """The picture file of that name in one of the folders (default: the file's own); nothing outside of
    them is ever opened, by a link neither. Raises BadRow."""
    path = PurePosixPath(name.replace("\\", "/"))
    if not path.parts or path.is_absolute() or ".." in path.parts or ":" in path.parts[0]:
        raise row.bad(
            field, f"{name!r} leaves the folder of the file", "name pictures from there, as in images/1.png"
        )
    # False too for an impossible name
    folder = next((folder for folder in folders or [row.folder] if os.path.isfile(folder / path)), None)
    if folder is None:
        raise row.bad(
            field,
            f"no file {path} in {' or '.join(map(str, folders or [row.folder]))}",
            "put it there, or correct the name",
        )
    if not (folder / path).resolve().is_relative_to(_ground(folder)):
        raise row.bad(
            field,
            f"{name!r} is a link that leaves the folder {folder}",
            "copy the picture there; a hard link (cp -l) takes no space",
        )
    return folder / path


@lru_cache(maxsize=64)
def _ground(folder: Path) -> Path:
    """Where the files of a folder may lie: in it; of a snapshot of the hub, which is made of links, in the
    cache of its repository."""
    place = folder.resolve()
    return next(
        (
            above.parent
            for above in place.parents
            if above.name == "snapshots" and (above.parent / "blobs").is_dir()
        ),
        place,
    )
