"""A file of JSON objects, read on demand: one on each line, or one array of them. Objects over several lines,
and one object with all rows by their ids, are rewritten as lines into a temporary file; gzip and UTF-16 are
unpacked into one.
"""

from __future__ import annotations

import gzip
import json
import shutil
import tempfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from data.images import LFS
from data.sources.json_array import is_array, object_spans
from data.types import BadRow, BadSource, short

# how a file begins that this task cannot read, and what it is
FOREIGN = {
    b"PAR1": "a parquet file, and this task reads JSON lines; name the task of its layout",
    LFS: "a git-lfs pointer; fetch the file with `git lfs pull`",
    b"PK\x03\x04": "compressed (zip); unpack it",
    b"BZh": "compressed (bzip2); unpack it",
    b"\xfd7zXZ": "compressed (xz); unpack it",
    b"\x28\xb5\x2f\xfd": "compressed (zstd); unpack it",
}
# tables of other programs, by the end of their names
TABLES = (".csv", ".tsv", ".xlsx", ".xls")
# bytes of a file of objects over several lines
MOST = 1 << 28
# digits of an integer that Python reads; a longer one stays text
DIGITS = 4000


class JsonlShard:
    """One file: `row(n)` is the n-th object. Memory holds where each begins and ends.

    `columns` must exist. `pictures` are the fields that name pictures; `keys` is made from them. names: {our
    name of a field: the file's}. Raises BadSource naming the file.
    """

    def __init__(
        self,
        path: Path,
        columns: Sequence[str],
        optional: Sequence[str],
        pictures: Sequence[Sequence[str]],
        names: Mapping[str, str],
    ) -> None:
        self.path, self._columns, self._names = path, columns, names
        self._pictures = [name for names in pictures for name in names]
        try:
            self._file = self._opened(path)
            self._array = is_array(self._file)
            spans = object_spans(path, self._file) if self._array else self._line_spans()
        except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
            raise BadSource(f"{path}: cannot be read: {getattr(error, 'strerror', '') or error}") from error
        self._spans, self._numbers = spans

    def _line_spans(self) -> tuple[np.ndarray, np.ndarray]:
        """The first byte of each line that is not empty and the byte behind its last, (n, 2); the numbers of
        these lines, from 1."""
        spans: list[tuple[int, int]] = []
        numbers: list[int] = []
        start = 0
        self._file.seek(0)
        for number, line in enumerate(self._file, 1):
            if line.strip():
                spans.append((start, start + len(line)))
                numbers.append(number)
            start += len(line)
        return np.array(spans, np.int64).reshape(-1, 2), np.array(numbers, np.int64)

    def _opened(self, path: Path) -> BinaryIO:
        """The file as JSON lines in UTF-8. What is packed, in UTF-16 or no lines is rewritten."""
        file = open(path, "rb")  # noqa: SIM115, lives as long as this object
        head = file.read(len(LFS))
        for beginning, what in FOREIGN.items():
            if head.startswith(beginning):
                raise BadSource(f"{path}: is {what}")
        if path.suffix.lower() in TABLES:
            line = (
                f'pandas.read_csv("{path.name}").to_json("{path.stem}.jsonl", orient="records", lines=True)'
            )
            raise BadSource(f"{path}: is a table; write it as JSON lines with the one line {line}")
        file.seek(0)
        if head.startswith(b"\x1f\x8b"):
            packed, file = file, _temporary()
            with packed, gzip.open(packed) as unpacked:
                shutil.copyfileobj(unpacked, file)
            file.seek(0)
        encoding = json.detect_encoding(file.read(4))
        if not encoding.startswith("utf-8"):
            file.seek(0)
            packed, file = file, _temporary()
            with packed:
                file.write(packed.read().decode(encoding).encode("utf-8"))
        file.seek(0)
        if not is_array(file) and (rows := self._objects(file)) is not None:
            file = _temporary()
            file.writelines(json.dumps(row).encode() + b"\n" for row in rows)
        file.seek(0)
        return file

    def _objects(self, file: BinaryIO) -> list[Any] | None:
        """The objects of a file that holds one after the other, over several lines, or one object with all
        rows by their ids; None for lines."""
        file.seek(0)
        texts = (line.decode("utf-8-sig", "replace").strip() for line in file)
        first = next(filter(None, texts), "")
        if first == "[":
            raise BadSource(f"{self.path}: is a JSON array, and its first item is no object")
        try:
            if not first or (isinstance(value := decoded(first), dict) and not _are_rows(value)):
                return None
        except (ValueError, RecursionError):
            pass
        if file.seek(0, 2) > MOST:
            return None
        file.seek(0)
        try:
            found = list(_values(file.read().decode("utf-8-sig")))
        except (ValueError, RecursionError):
            return None
        if len(found) == 1 and _are_rows(found[0]):
            return [{"id": name} | row for name, row in found[0].items()]
        return found if all(isinstance(value, dict) for value in found) else None

    def __len__(self) -> int:
        return len(self._spans)

    def where(self, number: int) -> str:
        """The name of a row in messages: lines and items of an array count from 1, as in an editor."""
        return f"{self.path}, {'item' if self._array else 'line'} {self._numbers[number]}"

    def line(self, number: int) -> bytes:
        """The bytes of a row."""
        start, end = self._spans[number].tolist()
        self._file.seek(start)
        return self._file.read(end - start)

    def row(self, number: int) -> dict[str, Any]:
        """The object on a line. Raises BadRow."""
        where = self.where(number)
        try:
            # utf-8-sig: some editors write a byte order mark
            values = decoded(self.line(number).decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            remedy = "correct it" if self._array else "write one object a line, in UTF-8"
            raise BadRow(where, "", f"is not JSON: {error}", remedy) from error
        if not isinstance(values, dict):
            kind = type(values).__name__
            raise BadRow(where, "", f"holds a {kind}, not an object", 'write {"question": …}')
        values = renamed(values, self._names, where)
        for name in self._columns:
            if name not in values:
                near = get_close_matches(name, set(values).difference(self._columns), n=1)
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
            yield sha256(json.dumps(named, sort_keys=True).encode()).digest()


def _are_rows(value: Any) -> bool:
    """Whether a JSON value is an object with rows by their ids: all its values are objects."""
    return isinstance(value, dict) and bool(value) and all(isinstance(row, dict) for row in value.values())


def renamed(values: Mapping[str, Any], names: Mapping[str, str], where: str) -> dict[str, Any]:
    """A row under our names of fields. names: {ours: the file's}, which may be a path into objects, as
    `reward_model.ground_truth`. Raises BadRow for a name that the row does not have."""
    if not names:
        return dict(values)
    found = {}
    for ours, theirs in names.items():
        value: Any = values
        for part in [theirs] if theirs in values else theirs.split("."):
            if not isinstance(value, dict) or part not in value:
                raise BadRow(
                    where, theirs, f"is missing, and columns names it for {ours}", "correct the name"
                )
            value = value[part]
        found[ours] = value
    others = {name: value for name, value in values.items() if name not in names.values()}
    return others | found


def decoded(text: str) -> Any:
    """The value of a JSON text. Raises ValueError, also for a key that is given twice; RecursionError."""
    return _DECODER.decode(text)


def _values(text: str) -> Iterator[Any]:
    """The values of a text that holds one JSON value after the other."""
    at = len(text) - len(text.lstrip())
    while at < len(text):
        value, at = _DECODER.raw_decode(text, at)
        yield value
        at = len(text) - len(text[at:].lstrip())


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(name for name in found if sum(name == other for other, _ in pairs) > 1)
        raise ValueError(f"the key {short(twice)} is given twice")
    return found


def _integer(digits: str) -> int | str:
    return int(digits) if len(digits) <= DIGITS else digits


_DECODER = json.JSONDecoder(object_pairs_hook=_once, parse_int=_integer)


def _temporary() -> Any:
    """A file without a name. The system deletes it when the program ends."""
    return tempfile.TemporaryFile(prefix="glimpse-")
