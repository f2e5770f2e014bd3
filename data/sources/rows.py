"""From the rows of files to examples: the description of a source's files (`Layout`) and the sequence of its
examples (`Rows`).

Opening reads names and counts, no pictures. Only a split into training and held-out rows reads the pictures
once: it goes by their content, so that no picture is in both parts. A bad row raises BadRow when it is read.
A run skips, counts and names it; `python -m data.check` lists them all.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from itertools import islice, repeat
from pathlib import Path
from typing import Any, overload

import numpy as np
import yaml
from tqdm import tqdm

from data.sources import hub
from data.types import MARK, BadExample, BadRow, BadSource, Example, Picture

# rows of a small set, and how many of it are held out at least
SMALL = 256
LEAST = 8


@dataclass(frozen=True)
class Row:
    """One row, the input of an adapter.

    uid: for sources without their own.  seed: for random choices, as an order of options.  folder: the
    file's own.  beside: the folder of the pictures, if the user named one.
    """

    values: Mapping[str, Any]
    where: str
    uid: str
    folder: Path
    pictures: tuple[Picture, ...] = ()
    seed: int = 0
    beside: Path | None = None

    def bad(self, field: str, reason: str, remedy: str = "") -> BadRow:
        """The error to raise."""
        return BadRow(self.where, field, reason, remedy)

    def text(self, name: str, missing: str | None = None) -> str:
        """The text in a field; `missing` if there is none. Raises BadRow."""
        value = self.values.get(name)
        if value is None and missing is not None:
            return missing
        if not isinstance(value, str):
            remedy = "fill it" if value is None else "write text in quotes"
            raise self.bad(name, f"holds {type(value).__name__}, not text", remedy)
        return self._encodable(name, value)

    def answer(self, name: str = "answer") -> str:
        """The text or the finite number in a field, as text. Raises BadRow."""
        value = self.values.get(name)
        if isinstance(value, (int, float, Decimal)) and not isinstance(value, bool):
            # a decimal of a table may end in zeros
            if isinstance(value, int) or math.isfinite(value):
                return str(value)
            raise self.bad(name, f"holds {value}, not text or a number", "write the answer")
        if not isinstance(value, str):
            remedy = "write the answer, or the text of the right choice"
            raise self.bad(name, f"holds {type(value).__name__}, not text or a number", remedy)
        return self._encodable(name, value)

    def placed(self, name: str, pictures: Sequence[Picture]) -> str:
        """The question in a field. Marks "<image>" at its start go: there the template puts the pictures.
        Others stay, one for each picture. Raises BadRow."""
        text = self.text(name)
        marks = text.count(MARK)
        if marks not in (0, len(pictures)):
            said = f"has {marks} marks {MARK}, and there are {len(pictures)} pictures"
            raise self.bad(name, said, "write one mark for each picture, or none")
        rest = text.lstrip()
        while rest.startswith(MARK):
            rest = rest.removeprefix(MARK).lstrip()
        return text if not marks else rest.strip() if MARK not in rest else text.strip()

    def texts(self, name: str, missing: tuple[str, ...] | None = None) -> tuple[str, ...]:
        """The list of texts in a field. Raises BadRow."""
        value = self.values.get(name)
        if value is None and missing is not None:
            return missing
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            return tuple(self._encodable(name, item) for item in value)
        held = type(value).__name__
        if isinstance(value, list):
            held = "a list of " + ", ".join(sorted({type(item).__name__ for item in value}))
        raise self.bad(name, f"holds {held}, not a list of texts", 'write ["…", "…"]')

    def _encodable(self, name: str, value: str) -> str:
        r"""JSON may hold half a character (`\ud800`), which no tokenizer takes."""
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            half = f"holds half a character, {value[error.start]!r}"
            raise self.bad(name, half, "write the whole one") from error
        return value


@dataclass(frozen=True)
class Layout:
    """The files of a source.

    shard: the reader of one file.  example: the adapter of one row.  files: patterns for a folder or an id of
    the hub, by split ("all", "train"; "heldout" only if the source has its own file for it).  columns,
    optional: the light columns.  pictures: alternatives of picture columns.  aside: one row in `aside` is
    held out, chosen by its pictures.  single: only rows with one picture.  first: the first `first` rows are
    for training, the others are held out.  rows: the published number of rows of "all".  also: further files
    of a hub dataset, which its rows name.  beside: `data` may end in ",FOLDER", the pictures' folder.
    """

    shard: Callable[..., Any]
    example: Callable[[Row], Example]
    files: Mapping[str, tuple[str, ...]]
    columns: tuple[str, ...]
    optional: tuple[str, ...] = ()
    pictures: tuple[tuple[str, ...], ...] = ()
    aside: int = 16
    single: bool = False
    first: int | None = None
    rows: int | None = None
    also: tuple[str, ...] = ()
    beside: bool = False


_LAYOUTS = yaml.safe_load(Path(__file__).with_name("layouts.yaml").read_text("utf-8"))


def layout(name: str, shard: Callable[..., Any], example: Callable[[Row], Example]) -> Layout:
    """The layout of that name in layouts.yaml."""
    fields = dict(_LAYOUTS[name])
    files = {split: tuple(patterns) for split, patterns in fields.pop("files").items()}
    columns = tuple(fields.pop("columns").split())
    fields["pictures"] = tuple(tuple(names.split()) for names in fields["pictures"])
    fields["also"] = tuple(fields.get("also", ()))
    return Layout(shard, example, {"train": files["all"]} | files, columns, **fields)


@dataclass(frozen=True)
class Rows(Sequence[Example]):
    """Examples, made on demand. `examples[i]` raises BadExample (BadRow, BadPicture) that names file and
    row; a slice is lazy, too. `places` (n, 2): the shard and the row of each. `names`: of the shards."""

    layout: Layout
    shards: list[Any]
    names: list[str]
    places: np.ndarray
    seed: int
    beside: Path | None = None

    def __len__(self) -> int:
        return len(self.places)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> Rows: ...
    def __getitem__(self, index: int | slice) -> Example | Rows:
        if isinstance(index, slice):
            return replace(self, places=self.places[index])
        number, row = (int(x) for x in self.places[index])
        shard = self.shards[number]
        where = shard.where(row)
        values = shard.row(row)
        uid = f"{self.names[number]}/{row}"
        try:
            found = Row(
                values, where, uid, shard.path.parent, shard.shown(values, where), self.seed, self.beside
            )
            return self.layout.example(found)
        except BadRow:
            raise
        except BadExample as error:
            # an error of `Example` names no file
            raise BadRow(where, "", str(error)) from error

    def where(self, index: int) -> str:
        """The file and the number of a row, for messages."""
        number, row = (int(x) for x in self.places[index])
        return self.shards[number].where(row)


def open_rows(layout: Layout, data: str | Path, split: str, limit: int | None, seed: int) -> Rows:
    """The first `limit` rows of a split. Raises BadSource, HubError."""
    beside = None
    if layout.beside and "," in str(data):
        data, _, folder = str(data).rpartition(",")
        beside = Path(folder)
        if not beside.is_dir():
            raise BadSource(f"{folder}: no such folder; it should hold the pictures")
    files, cut = _files(layout, data, split)
    shards = [layout.shard(file, layout.columns, layout.optional, layout.pictures) for file in files]
    chosen = list(islice(_of_split(layout, shards, split if cut else "all"), limit))
    return Rows(layout, shards, _names(files), np.array(chosen, np.int64).reshape(-1, 2), seed, beside)


def _names(files: list[Path]) -> list[str]:
    """A name for each file, for uids: its stem; where two files share one, the path below their folder."""
    names = [file.stem for file in files]
    if len(set(names)) < len(names):
        above = os.path.commonpath([file.parent for file in files])
        names = [os.path.relpath(file, above).replace(os.sep, "/") for file in files]
    return names


def _files(layout: Layout, data: str | Path, split: str) -> tuple[list[Path], bool]:
    """The files of a split, and whether they must be cut: not if a folder has a file for each part."""
    named = hub.parts_of(data)
    whole = Path(data).is_dir() or (named is not None and not named[2] and not Path(data).exists())
    if split != "all" and whole and "heldout" in layout.files:
        try:
            held = hub.resolve(data, layout.files["heldout"], also=layout.also)
            # "*.jsonl" matches the held-out file, too
            found = hub.resolve(data, layout.files["train"], also=layout.also)
            train = [file for file in found if file not in held]
            if not train:
                raise BadSource(f"{data}: there is {held[0].name}, and no file to train on")
            return train if split == "train" else held, False
        except hub.NoMatch:
            pass
    patterns = layout.files["all" if split == "all" else "train"]
    return hub.resolve(data, patterns, also=layout.also), split != "all"


def _few(layout: Layout, shards: list[Any]) -> set[bytes] | None:
    """Of a set of at most SMALL rows, in which the share may give no row or one: the pictures to hold out, so
    that LEAST rows are, or half of the rows if they are fewer. None: the share decides."""
    if sum(map(len, shards)) > SMALL:
        return None
    keys = Counter(key for shard in shards for key in shard.keys())  # noqa: SIM118
    if sum(rows for key, rows in keys.items() if key[0] % layout.aside == layout.aside - 1) >= LEAST:
        return None
    held: set[bytes] = set()
    rows = 0
    for key in sorted(keys):
        if rows < LEAST and rows + keys[key] <= keys.total() // 2:
            held.add(key)
            rows += keys[key]
    return held


def _of_split(layout: Layout, shards: list[Any], split: str) -> Iterator[tuple[int, int]]:
    """The places (shard, row) of a split, in the order of the files. Reads pictures only if it must."""
    before = 0
    few = _few(layout, shards) if split != "all" and layout.first is None else None
    for number, shard in enumerate(shards):
        counts = shard.counts() if layout.single else repeat(1)
        keys = shard.keys() if split != "all" and layout.first is None else None
        desc = f"{shard.path.name}: which rows are {split}"
        shown = None if keys else True
        for row in tqdm(range(len(shard)), desc, unit="row", disable=shown, leave=False, delay=3):
            if keys:
                key = next(keys)
                held = key in few if few is not None else key[0] % layout.aside == layout.aside - 1
            else:
                held = layout.first is not None and before + row >= layout.first
            if next(counts) == 1 and (split == "all" or held == (split == "heldout")):
                yield number, row
        before += len(shard)
