"""A user's own questions, in JSON or parquet, under our names of fields or others':

    {"question": "Which is nearer?", "choices": ["cup", "jug"], "answer": "cup", "picture": "a.jpg"}

`docs/data.md` has the schema. `python -m data.check FILE` names every row that does not follow it.
"""

from __future__ import annotations

import base64
import difflib
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from decimal import Decimal
from functools import lru_cache
from hashlib import sha256
from math import isfinite
from pathlib import Path, PurePosixPath
from typing import Any

from data.answers import numbers
from data.answers.parser import chosen
from data.sources.jsonl import JsonlShard, renamed
from data.sources.messages import unfolded
from data.sources.parquet import ParquetShard
from data.sources.rows import Row, layout, written
from data.types import LETTERS, BadRow, BadSource, Example, MissingPicture, Picture, short

NEEDED = ("question", "answer")
FIELDS = (
    *("uid", "question", "choices", "answer", "picture", "pictures", "messages"),
    *("task", "kind", "wording", "extra"),
)
# fields that an empty list leaves out
LISTS = ("choices", "picture", "pictures")
KINDS = ("text", "number")
# others' names of the fields
ALIASES = {
    "problem": "question",
    "prompt": "question",
    "options": "choices",
    "solution": "answer",
    "image": "picture",
    "images": "pictures",
    "conversations": "messages",
}
# known, and not read: others' ids may repeat. To name rows by one, say columns={uid: id}
UNREAD = ("id",)
# two fields that say the same; the setting columns chooses one
RIVALS = {"question": "messages", "messages": "question", "picture": "pictures", "pictures": "picture"}
TAGGED = re.compile(r"\s*<answer>((?:(?!</?answer>).)*)</answer>\s*", re.DOTALL)
# the label that a choice carries itself: "A. a cat", "(b) a cat", "1: a cat", and not "1.5"
_LABELLED = re.compile(r"\(?([A-Z](?=[).:、])|(?:[a-z]|[0-9]{1,2})(?=[).:、]\s))[).:、]\s*(.+)", re.DOTALL)
# the beginnings of PNG, JPEG, GIF and WebP files in base64
_BASE64 = ("iVBORw0KGgo", "/9j/", "R0lGOD", "UklGR")
# no file has a longer name
LONGEST_NAME = 255


class OwnShard:
    """One file of own questions: `row(n)` has our names of fields, messages unfolded into them, and no field
    without a value. names: {our name of a field: the file's}. Raises BadSource naming the file."""

    def __init__(
        self,
        path: Path,
        columns: Sequence[str],
        optional: Sequence[str],
        pictures: Sequence[Sequence[str]],
        names: Mapping[str, str],
    ) -> None:
        self.path, self._names = path, names
        self._file: JsonlShard | ParquetShard
        with open(path, "rb") as file:
            is_parquet = file.read(4) == b"PAR1" or path.suffix.lower() == ".parquet"
        if not is_parquet:
            self._file = JsonlShard(path, (), (), (), {})
            return
        # a name with a dot is that of a column, or leads into one
        theirs = [part for name in names.values() for part in (name, name.partition(".")[0])]
        known = dict.fromkeys([*theirs, *FIELDS, *ALIASES])
        self._file = ParquetShard(path, (), tuple(known), (), {})
        self._check_columns()

    def __len__(self) -> int:
        return len(self._file)

    def where(self, number: int) -> str:
        """The name of a row in messages."""
        return self._file.where(number)

    def row(self, number: int) -> dict[str, Any]:
        """The values of a row. Raises BadRow."""
        where = self.where(number)
        return unfolded(fields(self._file.row(number), self._names, where), where)

    def shown(self, values: Mapping[str, Any], where: str) -> tuple[bytes, ...]:
        """None: the adapter finds the pictures."""
        return ()

    def keys(self) -> Iterator[bytes]:
        """For each row a digest: of its pictures or their names, else of its question, else of its number."""
        for number in range(len(self)):
            named: list[Any] = [number]
            with suppress(BadRow):
                values = self.row(number)
                named = [_identity(each) for each in pictures_of(values)[1]]
                named = named or [values["question"], values.get("choices")]
            yield sha256(repr(named).encode("utf-8", "surrogatepass")).digest()

    def uids(self, columns: Sequence[str]) -> Iterator[str | None]:
        """For each row its own uid; None without one, and for a row that cannot be read."""
        theirs = self._names.get("uid", "uid")
        if isinstance(self._file, ParquetShard) and "." not in theirs:
            yield from self._file.uids([theirs])
            return
        names = {"uid": theirs} if theirs != "uid" else {}
        sign = f'"{theirs.rpartition(".")[2]}"'.encode() if theirs.isascii() else b""
        for number in range(len(self)):
            uid = None
            # most files have none, and then no line is decoded
            if isinstance(self._file, ParquetShard) or sign in self._file.line(number):
                with suppress(BadRow):
                    uid = renamed(self._file.row(number), names, "").get("uid")
            yield None if uid is None else str(uid)

    def _check_columns(self) -> None:
        """Raise BadSource for columns of a table that are missing or no fields."""
        assert isinstance(self._file, ParquetShard)
        there = [name for name in self._file.columns if name not in self._names.values()]
        ours = {*map(own_name, there), *self._names}
        has = ", ".join([*self._file.columns, *self._file.others])[:200]
        # what may hold messages brings both
        for name in () if {"messages", "prompt"} & {*ours, *there} or "question" in self._names else NEEDED:
            if name not in ours:
                said = f"no column {name}; it has {has}; name it with the setting columns={{{name}: …}}"
                raise BadSource(f"{self.path}: {said}")
        for theirs in self._names.values():
            if theirs not in self._file.columns and theirs.partition(".")[0] not in self._file.columns:
                raise BadSource(f"{self.path}: no column {short(theirs)}, which columns names; it has {has}")
        if wrong := unknown(self._file.others, ours, self._names):
            raise BadSource(f"{self.path}: {short(wrong[0])[1:-1]}: {wrong[1]}; {wrong[2]}")


def fields(values: Mapping[str, Any], names: Mapping[str, str], where: str) -> dict[str, Any]:
    """A row under our names of fields: those that `names` gives, else others'. Raises BadRow."""
    replaced = {*names, *(RIVALS[name] for name in names if name in RIVALS)}
    found: dict[str, Any] = {}
    for name, value in renamed(values, names, where).items():
        ours = own_name(name, value)
        empty = value is None or (value == [] and ours in LISTS)
        # a column that another one replaces is not read; one without a value is as if it were not there
        if (ours in replaced and name not in names) or (empty and ours not in NEEDED):
            continue
        if found.get(ours) is not None and value is not None:
            remedy = "keep one of the two, or choose one with the setting columns"
            raise BadRow(where, name, f"and another field both say {ours!r}", remedy)
        if value is not None or ours not in found:
            found[ours] = value
    if "picture" in found and "pictures" in found:
        raise BadRow(where, "picture", "stands beside pictures", "keep one of the two")
    others = [name for name in found if name not in FIELDS]
    for name in () if "messages" in found else NEEDED:
        if name not in found:
            near = difflib.get_close_matches(name, others, n=1)
            remedy = f"rename {near[0]!r}" if near else "add it"
            if others and all(isinstance(found[name], (dict, list)) for name in found):
                remedy = f"this object holds others ({short(others)}); write the rows alone, as one array"
            raise BadRow(where, name, "is missing", f"{remedy}, or name its column: columns={{{name}: …}}")
    if others and (wrong := unknown(others, found, names)):
        raise BadRow(where, *wrong)
    return {name: value for name, value in found.items() if name in FIELDS}


def own_name(name: str, value: Any = None) -> str:
    """Our name of a field. A question (or `prompt`) that is a list holds messages."""
    ours = ALIASES.get(name, name)
    return "messages" if ours == "question" and isinstance(value, (list, dict)) else ours


def unknown(
    others: Sequence[str], there: Iterable[str], names: Mapping[str, str]
) -> tuple[str, str, str] | None:
    """(name, reason, remedy) for the first name that is no field. With the setting `columns` (names) other
    columns are not read; then only a misspelt field is refused, if there is none of the right name."""
    lacking = [name for name in (*FIELDS, *ALIASES) if own_name(name) not in {*there, *names}]
    for name in others:
        if name in UNREAD:
            continue
        near = difflib.get_close_matches(name, lacking if names else FIELDS, 1, 0.84 if names else 0.6)
        if near or not names:
            meant = f"did you mean {near[0]!r}? " if near else ""
            facts = 'the source\'s own facts go into "extra"; name what to read with the setting columns'
            return name, "is no field", meant + facts
    return None


def own_example(row: Row) -> Example:
    """A row of the user's own data. Raises BadRow naming field and remedy, BadExample."""
    choices, labels = _choices(row)
    given = row.values.get("answer")
    answer = row.answer()
    if tagged := TAGGED.fullmatch(answer):
        answer = tagged[1].strip()
    answer = _choice(row, choices, labels, answer) if choices else answer
    is_number = not choices and isinstance(given, (int, float, Decimal)) and numbers.parse(answer) is not None
    kind = row.text("kind", missing="number" if is_number else "text")
    if kind not in KINDS or (choices and kind != "text"):
        raise row.bad("kind", f"is {short(kind)}", f"write {' or '.join(KINDS)}, and nothing beside choices")
    if kind == "number" and numbers.parse(answer) is None:
        remedy = "write it as one number, or leave kind out"
        raise row.bad("kind", f"is 'number', and the answer {short(answer)} is none", remedy)
    extra = row.values.get("extra", {})
    if not isinstance(extra, dict):
        raise row.bad("extra", f"holds {type(extra).__name__}, not an object", 'write {"key": value}')
    if documents := extra.get("documents", row.values.get("documents")):
        if not isinstance(documents, (list, tuple)) or not all(isinstance(text, str) for text in documents):
            raise row.bad("extra", "has documents that are not a list of texts", 'write {"documents": ["…"]}')
        extra = extra | {"documents": tuple(documents)}
    uid = row.values.get("uid")
    uid = str(uid) if type(uid) is int else row.text("uid", missing=row.uid)
    field, pictures = pictures_of(row.values)
    found = tuple(_picture(row, field, each) for each in pictures)
    task, wording = row.text("task", missing=""), row.text("wording", missing="")
    return Example(uid, row.text("question"), choices, answer, task, found, extra | {"kind": kind}, wording)


def answer_example(row: Row) -> Example:
    """The same without its chain of thought, so that imitation learns the answer alone."""
    example = own_example(row)
    extra = {name: value for name, value in example.extra.items() if name != "documents"}
    return replace(example, extra=extra)


def _choices(row: Row) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The choices, a list of texts or numbers or an object with letters as keys; and the labels A, B, … or
    1, 2, … that they carried themselves."""
    given = row.values.get("choices", [])
    keys: tuple[str, ...] = ()
    if isinstance(given, dict):
        pairs = [(key.strip("(). ").upper(), value) for key, value in given.items() if value is not None]
        keys, given = zip(*sorted(pairs, key=lambda pair: (len(pair[0]), pair[0]))) if pairs else ((), ())
        if not _in_order(keys):
            said = f"has the keys {short(list(row.values['choices']))}, not the letters A, B, …"
            raise row.bad("choices", said, 'write ["…", "…"]')
    if isinstance(given, (list, tuple)):
        number = lambda value: type(value) is int or (type(value) is float and isfinite(value))
        given = [written(value) if number(value) else value for value in given]
    choices = replace(row, values={"choices": given}).texts("choices")
    found = [match for choice in choices if (match := _LABELLED.fullmatch(choice))]
    labels = tuple(match[1].upper() for match in found)
    bare = tuple(match[2] for match in found)
    if keys or len(set(bare)) < len(choices) or not _in_order(labels):
        return choices, keys
    return bare, labels


def _in_order(labels: Sequence[str]) -> bool:
    """Whether labels are A, B, … or 1, 2, …"""
    count = len(labels)
    return list(labels) in (list(LETTERS[:count]), [str(number) for number in range(1, count + 1)])


def _choice(row: Row, choices: tuple[str, ...], labels: tuple[str, ...], answer: str) -> str:
    """The right choice, given as text, letter, the number that it carries, or index from 0."""
    index = choices.index(answer) if answer in choices else chosen(answer, choices)
    label = answer.strip("(). ")
    if labels[:1] == ("1",):
        own = labels.index(label) if label in labels else index
        # no reading where "2" is the label of one choice and the value of another
        index = own if index in (own, -1) else -1
    elif index < 0 and label.isdecimal() and len(label) < 3:
        # "1" beside choices that are numbers may be a value that is not there
        is_index = type(row.values["answer"]) in (int, float) or not any(map(numbers.parse, choices))
        index = int(label) if is_index else -1
    if 0 <= index < len(choices):
        return choices[index]
    said = f"{short(answer)} is not one of the {len(choices)} choices {short(list(choices))}"
    raise row.bad("answer", said, "write the choice's text, its letter, or its index from 0")


def pictures_of(values: Mapping[str, Any]) -> tuple[str, list[Any]]:
    """The field of a row that has its pictures, and each of them as the file has it."""
    field = "picture" if "picture" in values else "pictures"
    given = values.get(field, [])
    return field, given if isinstance(given, list) else [given]


def _picture(row: Row, field: str, value: Any) -> Picture:
    """A picture's bytes, also in base64 or in {bytes, path}, as the library `datasets` writes it; or a
    file's name. Raises BadRow."""
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes) and value:
        return value
    if not isinstance(value, str):
        said = f"holds {'no bytes' if value in (None, b'') else type(value).__name__}, not a picture"
        raise row.bad(field, said, "name a file, or write the picture's bytes")
    head, _, data = value.partition("base64,")
    is_name = len(value) <= LONGEST_NAME and not head.startswith("data:")
    if is_name and (not value.startswith(_BASE64) or os.path.isfile((row.beside or row.folder) / value)):
        return inside(row, field, value, (row.beside,) if row.beside else ())
    try:
        return base64.b64decode("".join((data or value).split()), validate=True)
    except ValueError as error:
        said = f"{short(value)} is neither a file's name nor base64"
        raise row.bad(field, said, "name a file, or write the picture's bytes in base64") from error


def _identity(picture: Any) -> str:
    """What two rows with the same picture have in common: the digest of its bytes, or its file."""
    if isinstance(picture, dict):
        picture = picture.get("bytes") or picture.get("path")
    if isinstance(picture, bytes):
        return sha256(picture).hexdigest()
    is_name = isinstance(picture, str) and len(picture) <= LONGEST_NAME
    return os.path.normpath(picture.replace("\\", "/")) if is_name else repr(picture)


def inside(row: Row, field: str, name: str, folders: Sequence[Path] = ()) -> Path:
    """The picture file of that name in one of the folders (default: the file's own). Nothing outside of
    them is opened, also not through a link. Raises BadRow."""
    folders = folders or [row.folder]
    path = PurePosixPath(name.replace("\\", "/"))
    if not path.parts or path.is_absolute() or ".." in path.parts or ":" in path.parts[0]:
        fetch = "download it, and " if "://" in name else ""
        remedy = f"{fetch}name pictures from there, as in images/1.png"
        raise row.bad(field, f"{short(name)} leaves the folder of the file", remedy)
    # `Path.is_file` would raise for an impossible name
    folder = next((folder for folder in folders if os.path.isfile(folder / path)), None)
    if folder is None:
        searched = " or ".join(map(str, folders))
        said = f"no file {short(str(path))[1:-1]} in {searched}"
        missing = MissingPicture(row.where, field, said, _remedy(folders[0] / path))
        missing.name = name
        raise missing
    if not (folder / path).resolve().is_relative_to(_ground(folder)):
        remedy = "copy the picture there; a hard link (cp -l) takes no space"
        raise row.bad(field, f"{short(name)} is a link that leaves the folder {folder}", remedy)
    return folder / path


def _remedy(file: Path) -> str:
    """What to do about a picture that is not there."""
    if os.path.isdir(file):
        return "it is a folder; name one picture in it"
    alike = _names_in(file.parent).get(file.name.lower())
    return f"there is {alike}; correct the name" if alike else "put it there, or correct the name"


@lru_cache(maxsize=8)
def _names_in(folder: Path) -> dict[str, str]:
    """{name in small letters: name} of what a folder holds."""
    return {name.lower(): name for name in (os.listdir(folder) if os.path.isdir(folder) else ())}


@lru_cache(maxsize=64)
def _ground(folder: Path) -> Path:
    """The folder that links may lead to: itself; for a hub snapshot, whose files are links, the cache of its
    repository."""
    place = folder.resolve()
    caches = (above.parent for above in place.parents if above.name == "snapshots")
    return next((cache for cache in caches if (cache / "blobs").is_dir()), place)


JSONL = replace(layout("jsonl", OwnShard, own_example), optional=FIELDS)
VISION_R1_COLD = replace(layout("vision_r1_cold", OwnShard, own_example), optional=FIELDS)
VISION_R1_COLD_ANSWERS = replace(VISION_R1_COLD, example=answer_example)
