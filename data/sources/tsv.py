"""A table of VLMEvalKit (TSV with pictures in base64), read on demand: memory holds where each row begins.

Cells may be megabytes long, and text in quotes may hold line breaks. Of a row only the wanted cells are kept.
A cell `image` has a picture, a list of pictures, or the index of another row that has the picture.
"""

from __future__ import annotations

import base64
import binascii
import csv
from collections.abc import Iterator, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from data.images import LFS
from data.types import BadRow, BadSource, short

# a longer cell `image` is a picture; a shorter one is the index of another row (VLMEvalKit's own rule)
LONGEST_INDEX = 64
# the csv module's own limit is 131,072 characters a cell
csv.field_size_limit(2**31 - 1)
# stands for a carriage return within a cell: no text has this character
RETURN = "\U0010ffff"
# bytes; a larger file is scanned with a progress bar
LARGE = 100_000_000


class TsvShard:
    """One file: `row(n)` is a dict of the wanted cells, as text, None where a cell is empty.

    `columns` must exist, `optional` may. `pictures` are alternatives: the first whose columns exist is used.
    names: {our name of a column: the file's}. Raises BadSource naming file and column.
    """

    def __init__(
        self,
        path: Path,
        columns: Sequence[str],
        optional: Sequence[str],
        pictures: Sequence[Sequence[str]],
        names: Mapping[str, str],
    ) -> None:
        self.path = path
        try:
            self._file = open(path, "rb")  # noqa: SIM115, lives as long as this object
        except OSError as error:
            raise BadSource(f"{path}: cannot be read: {error.strerror}") from error
        if self._file.read(len(LFS)) == LFS:
            raise BadSource(f"{path}: is a git-lfs pointer; fetch the file with `git lfs pull`")
        self._spans, self._lines = self._scanned()
        self._file.seek(0)
        # whether lines end in a carriage return and a line feed
        self._returns = self._file.readline().endswith(b"\r\n")
        try:
            header = self._cells(0) if len(self._spans) else []
        except BadRow as error:
            raise BadSource(str(error)) from error
        self._header = [header[0].removeprefix("\ufeff"), *header[1:]] if header else []
        if twice := [name for name in self._header if self._header.count(name) > 1]:
            raise BadSource(f"{path}: two columns are called {short(twice[0])}; rename one")
        theirs = {
            name: names.get(name, name) for name in (*columns, *optional, *sum(map(tuple, pictures), ()))
        }
        there = {name for name in theirs if theirs[name] in self._header}
        self.pictures = next((tuple(each) for each in pictures if there.issuperset(each)), ())
        missing = [theirs[name] for name in columns if name not in there]
        missing += [theirs[name] for name in pictures[0]] if pictures and not self.pictures else []
        if missing:
            has = ", ".join(map(repr, self._header[:20])) or "nothing"
            raise BadSource(f"{path}: no column {', '.join(missing)}; it has {has}")
        wanted = dict.fromkeys([*columns, *optional, *self.pictures])
        # our name -> the place of its column
        self._places = {name: self._header.index(theirs[name]) for name in wanted if name in there}
        self._rows_of_index: dict[str, int] = {}

    def _scanned(self) -> tuple[np.ndarray, np.ndarray]:
        """The first byte of each row and the byte behind its last, (n, 2), the header's first; the numbers of
        the lines on which they begin, from 1. Quotes within a cell are doubled: a row has an even number."""
        spans: list[tuple[int, int]] = []
        lines: list[int] = []
        start = at = odd = 0
        first = 1
        size = self.path.stat().st_size
        desc = f"{self.path.name}: rows"
        self._file.seek(0)
        with tqdm(total=size, desc=desc, unit="B", unit_scale=True, disable=size < LARGE or None) as bar:
            for number, line in enumerate(self._file, 1):
                at += len(line)
                odd ^= line.count(b'"') & 1
                if not odd:
                    if at - start > len(line) or line.strip():
                        spans.append((start, at))
                        lines.append(first)
                    bar.update(at - start)
                    start = at
                    first = number + 1
        if odd:
            raise BadSource(f"{self.path}, line {first}: text in quotes does not end; is the file complete?")
        return np.array(spans, np.int64).reshape(-1, 2), np.array(lines, np.int64)

    def __len__(self) -> int:
        return max(0, len(self._spans) - 1)

    def where(self, number: int) -> str:
        """The name of a row in messages: the line on which it begins, as in an editor."""
        return f"{self.path}, line {self._lines[number + 1]}"

    def _cells(self, place: int) -> list[str]:
        """The cells of a row; place 0 is the header. Raises BadRow."""
        start, end = self._spans[place].tolist()
        self._file.seek(start)
        where = f"{self.path}, line {self._lines[place]}"
        try:
            text = self._file.read(end - start).decode("utf-8").removesuffix("\n")
            text = text.removesuffix("\r") if self._returns else text
            # a carriage return alone ends no row, but the csv module thinks so
            rows = list(csv.reader([text.replace("\r", RETURN)], delimiter="\t", strict=True))
        except (UnicodeDecodeError, csv.Error) as error:
            remedy = "write the table in UTF-8, with tabs between and quotes doubled within cells"
            raise BadRow(where, "", f"cannot be read: {error}", remedy) from error
        return [cell.replace(RETURN, "\r") for cell in rows[0]] if rows else []

    def row(self, number: int) -> dict[str, Any]:
        """The wanted cells of a row by our names. Raises BadRow."""
        cells = self._cells(number + 1)
        if len(cells) != len(self._header):
            first = self._header[len(cells)] if len(cells) < len(self._header) else ""
            has = f"the row has {len(cells)} cells, and the header has {len(self._header)}"
            raise BadRow(self.where(number), first, has, "is a tab or a line break in a cell without quotes?")
        return {name: cells[place] or None for name, place in self._places.items()}

    def uids(self, columns: Sequence[str]) -> Iterator[str | None]:
        """For each row the name that it has in these columns, or in `index` if the file lacks them; None
        without one, or if it cannot be read."""
        columns = columns if all(name in self._places for name in columns) else ["index"]
        for number in range(len(self)):
            named = [self._cell(number, name) for name in columns]
            yield "/".join(name or "" for name in named) if all(named) else None

    def _cell(self, number: int, name: str) -> str | None:
        """One cell; None if there is none. The first cells of a row are read without its pictures."""
        place = self._places.get(name)
        if place is None:
            return None
        start, end = self._spans[number + 1].tolist()
        self._file.seek(start)
        head = self._file.read(min(end - start, 4096)).split(b"\t")
        if place < len(head) - 1 and not any(b'"' in cell for cell in head[: place + 1]):
            return head[place].decode("utf-8", "replace") or None
        try:
            cells = self._cells(number + 1)
        except BadRow:
            return None
        return cells[place] or None if place < len(cells) else None

    def shown(self, values: Mapping[str, Any], where: str) -> tuple[bytes, ...]:
        """The pictures in the cell `image`; () if the file has names of pictures only, which the adapter
        finds. Raises BadRow."""
        if self.pictures != ("image",):
            return ()
        found = []
        for cell in self._picture_cells(values["image"], where):
            packed = "".join(cell.rpartition(";base64,")[2].split())
            try:
                found.append(base64.b64decode(packed, validate=True))
            except (binascii.Error, ValueError) as error:
                raise BadRow(where, "image", f"is not base64: {error}", "download the file again") from error
        return tuple(found)

    def _picture_cells(self, cell: str | None, where: str) -> list[str]:
        """The pictures of a row in base64, its own or those of the row that its cell names. Raises BadRow."""
        if cell and len(cell) <= LONGEST_INDEX:
            if not self._rows_of_index:
                indices = enumerate(self.uids(["index"]))
                self._rows_of_index = {name: number for number, name in indices if name}
            other = self._rows_of_index.get(cell)
            if other is None:
                said = f"{short(cell)} is neither a picture in base64 nor the index of a row"
                raise BadRow(where, "image", said, "download the file again")
            cell = self.row(other)["image"]
            if cell and len(cell) <= LONGEST_INDEX:
                raise BadRow(where, "image", f"names {self.where(other)}, which has no picture of its own")
        if not cell:
            raise BadRow(where, "image", "no picture", "leave the row out")
        return items(cell)

    def keys(self) -> Iterator[bytes]:
        """For each row a digest: of its pictures, else of their names, else of its number."""
        for number in range(len(self)):
            try:
                values = self.row(number)
                own = values[self.pictures[0]] if self.pictures else None
                named = self._picture_cells(own, "") if self.pictures == ("image",) else [own or number]
            except BadRow:
                named = [number]
            yield sha256(repr(named).encode()).digest()


def items(cell: str) -> list[str]:
    """The texts of a cell: of "['a', 'b']", a list as Python writes it, its items; else the cell itself.
    Items hold no comma and no quote, as base64 and names of files do."""
    if not (cell.startswith("[") and cell.endswith("]")):
        return [cell]
    return [item.strip().strip("'\"") for item in cell[1:-1].split(",") if item.strip()]
