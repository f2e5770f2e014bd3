"""A parquet file of pictures, read on demand, one row group at a time: memory does not grow with the file.

The hub's own files have row groups of a few megabytes; the last few stay in memory. A large row group is
unpacked once into a temporary file (in `TMPDIR`), because parquet can only be read from a group's start.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain, count
from pathlib import Path
from typing import Any

import numpy as np

from data.images import LFS
from data.types import BadRow, BadSource, short

# bytes of row groups kept in memory
HELD = 128 << 20
# bytes: a larger row group (unpacked) goes to a temporary file
LARGE = 64 << 20
# rows read at a time in a scan of the whole file
ROWS = 16
# bytes; without a buffer, or with pre_buffer, pyarrow reads a whole column of a row group at once
BUFFER = 1 << 20


class _Held:
    """A cache of the last row groups of all files, up to HELD bytes; always at least one."""

    def __init__(self) -> None:
        # (file, row group) -> table, least recently used first
        self.tables: OrderedDict[tuple[int, int], Any] = OrderedDict()
        self.bytes = 0

    def get(self, key: tuple[int, int], read: Callable[[], Any]) -> Any:
        """The table of this key; `read` makes it if it is not kept."""
        if key in self.tables:
            self.tables.move_to_end(key)
            return self.tables[key]
        table = self.tables[key] = read()
        self.bytes += table.nbytes
        while len(self.tables) > 1 and self.bytes > HELD:
            self.bytes -= self.tables.popitem(last=False)[1].nbytes
        return table


_held, _number = _Held(), count()


class ParquetShard:
    """One file: `row(n)` is a dict of the light columns and the picture columns.

    `columns` must exist, `optional` may. `pictures` are alternative sets of columns: the first complete set
    is used. names: {our name of a column: the file's}; rows come under ours. `columns` are read, `others`
    are not. Raises BadSource that names file and column.
    """

    def __init__(
        self,
        path: Path,
        columns: Sequence[str],
        optional: Sequence[str],
        pictures: Sequence[Sequence[str]],
        names: Mapping[str, str],
    ) -> None:
        pyarrow = _pyarrow(path)
        if not path.is_file():
            raise BadSource(f"{path}: no such file")
        with open(path, "rb") as file:
            if file.read(len(LFS)) == LFS:
                raise BadSource(f"{path}: is a git-lfs pointer; fetch the file with `git lfs pull`")
        try:
            self._file = pyarrow.parquet.ParquetFile(path, buffer_size=BUFFER, pre_buffer=False)
        except (pyarrow.ArrowException, OSError) as error:
            raise BadSource(f"{path}: cannot be read as parquet: {error}") from error
        self.path, self._errors = path, (pyarrow.ArrowException, OSError)
        there = self._file.schema_arrow.names
        if twice := [name for name in there if there.count(name) > 1]:
            raise BadSource(f"{path}: two columns are called {short(twice[0])}; rename one")
        self._ours = {theirs: ours for ours, theirs in names.items()}
        # a column that another one replaces is not read
        ours = [self._ours.get(name, "" if name in names else name) for name in there]
        missing = [names.get(name, name) for name in columns if name not in ours]
        self.pictures = next((each for each in pictures if all(name in ours for name in each)), ())
        if pictures and not self.pictures:
            missing += [names.get(name, name) for name in pictures[0] if name not in ours]
        if missing:
            has = ", ".join(there[:20] + ["…"] * (len(there) > 20))
            raise BadSource(f"{path}: no column {', '.join(missing)}; it has {has}")
        light = [*columns, *(name for name in optional if name in ours)]
        self._names = names
        self.columns = [names.get(name, name) for name in (*light, *self.pictures)]
        self.others = [name for name in there if name not in self.columns]
        groups = map(self._file.metadata.row_group, range(self._file.num_row_groups))
        self._starts = np.cumsum([0, *(group.num_rows for group in groups)])
        self._number = next(_number)
        self._unpacked: dict[int, _Unpacked] = {}

    def __len__(self) -> int:
        return int(self._starts[-1])

    def where(self, number: int) -> str:
        """The name of a row in messages."""
        return f"{self.path}, row {number}"

    def row(self, number: int) -> dict[str, Any]:
        """The row's values by column. Raises BadSource for a damaged file, BadRow for an impossible date."""
        group = int(np.searchsorted(self._starts, number, side="right")) - 1
        inside = number - int(self._starts[group])
        try:
            return self._renamed(self._group(group).slice(inside, 1).to_pylist()[0])
        except self._errors as error:
            raise BadSource(f"{self.where(number)}: cannot be read as parquet: {error}") from error
        except (ValueError, OverflowError) as error:
            raise BadRow(self.where(number), "", f"cannot be read: {error}", "correct the value") from error

    def _renamed(self, values: dict[str, Any]) -> dict[str, Any]:
        return {self._ours.get(name, name): value for name, value in values.items()}

    def uids(self, columns: Sequence[str]) -> Iterator[str | None]:
        """For each row the name that it has in these columns; None without one."""
        if any(self._names.get(name, name) not in self.columns for name in columns):
            yield from [None] * len(self)
            return
        for values in self._scan(columns):
            named = [str(values[name]) for name in columns if values[name] is not None]
            yield "/".join(named) if len(named) == len(columns) else None

    def shown(self, values: Mapping[str, Any], where: str) -> tuple[bytes, ...]:
        """The pictures in a row's values. Raises BadRow for a picture without bytes, and for none at all."""
        found = []
        for column in self.pictures:
            for picture in _several(values[column]):
                if not (data := _bytes(picture)):
                    remedy = "embed the pictures in the file, or leave the row out"
                    raise BadRow(where, column, "holds no picture bytes", remedy)
                found.append(data)
        if not found:
            raise BadRow(where, ", ".join(self.pictures), "no picture", "leave the row out")
        return tuple(found)

    def keys(self) -> Iterator[bytes]:
        """For each row a digest of its pictures. Reads the whole file, a few rows at a time."""
        for values in self._scan(self.pictures):
            digest = hashlib.sha256()
            for column in self.pictures:
                for picture in _several(values[column]):
                    digest.update(hashlib.sha256(_bytes(picture)).digest())
            yield digest.digest()

    def counts(self) -> Iterator[int]:
        """The number of pictures in each row. Of a struct only the small field `path` is read."""
        names = [self._file.schema.column(number).path for number in range(len(self._file.schema))]
        theirs = {column: self._names.get(column, column) for column in self.pictures}
        path = lambda x: next((n for n in names if n.startswith(f"{x}.") and n.endswith(".path")), x)
        for values in self._scan([path(each) for each in theirs.values()]):
            yield sum(len(_several(values[column])) for column in self.pictures)

    def _scan(self, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
        theirs = [self._names.get(name, name) for name in columns]
        try:
            for batch in self._file.iter_batches(batch_size=ROWS, columns=theirs):
                yield from map(self._renamed, batch.to_pylist())
        except self._errors as error:
            raise BadSource(f"{self.path}: cannot be read as parquet: {error}") from error

    def _group(self, group: int) -> Any:
        """A row group with `slice`: in memory if it is small, else in a temporary file."""
        if group in self._unpacked:
            return self._unpacked[group]
        if self._file.metadata.row_group(group).total_byte_size > LARGE:
            self._unpacked[group] = _Unpacked(self._file, group, self.columns)
            return self._unpacked[group]
        read = lambda: self._file.read_row_group(group, columns=self.columns, use_threads=False)
        return _held.get((self._number, group), read)


class _Unpacked:
    """A row group in a temporary file without a name. The system deletes it when the program ends."""

    def __init__(self, file: Any, group: int, columns: Sequence[str]) -> None:
        import pyarrow

        self._held = tempfile.TemporaryFile(prefix="glimpse-")  # noqa: SIM115, lives as long as this object
        starts = [0]
        batches = file.iter_batches(batch_size=ROWS, row_groups=[group], columns=list(columns))
        first = next(batches)
        with pyarrow.ipc.new_file(pyarrow.PythonFile(self._held, "w"), first.schema) as writer:
            for batch in chain([first], batches):
                writer.write_batch(batch)
                starts.append(starts[-1] + len(batch))
        self._held.flush()
        self._reader = pyarrow.ipc.open_file(pyarrow.PythonFile(self._held, "r"))
        self._starts = np.array(starts)

    def slice(self, number: int, rows: int) -> Any:
        """`rows` rows from `number` on, at most to the end of the batch that `number` is in."""
        batch = int(np.searchsorted(self._starts, number, side="right")) - 1
        return self._reader.get_batch(batch).slice(number - int(self._starts[batch]), rows)


def _several(value: Any) -> Sequence[Any]:
    """A picture column's value (one picture, a list, or None) as a list."""
    return value if isinstance(value, list) else [] if value is None else [value]


def _bytes(picture: Any) -> bytes:
    """The bytes in `struct<bytes, path>` (datasets' Image) or plain bytes; b"" for anything else."""
    data = picture.get("bytes") if isinstance(picture, dict) else picture
    return data if isinstance(data, bytes) else b""


def _pyarrow(path: Path) -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        need = "needs pyarrow, an optional extra: pip install pyarrow"
        raise BadSource(f"{path}: reading parquet {need}") from error
    return pyarrow
