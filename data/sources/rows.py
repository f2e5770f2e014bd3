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
from data.types import MARK, BadExample, BadRow, BadSource, Example, Picture, short

# different pictures of a small set, and how many rows of it are held out at least
FEW = 256
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
            # `isfinite` of an integer of 400 digits overflows
            if isinstance(value, int) or math.isfinite(value):
                return written(value)
            raise self.bad(name, f"holds {value}, not text or a number", "write the answer")
        if not isinstance(value, str):
            remedy = "write the answer, or the text of the right choice"
            raise self.bad(name, f"holds {type(value).__name__}, not text or a number", remedy)
        return self._encodable(name, value)

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


def written(value: float | Decimal) -> str:
    """A number of a file as text: without the ".0" of a column of floats, and a 32-bit float as short as it
    was before it became one (0.1, not 0.10000000149011612)."""
    if not isinstance(value, float):
        # a decimal of a table may end in zeros
        return str(value)
    if value.is_integer() and abs(value) < 2**53:
        return str(int(value))
    return str(np.float32(value)) if abs(value) < 1e38 and float(np.float32(value)) == value else str(value)


def placed(example: Example, where: str) -> Example:
    """The example with the marks "<image>" of question and choices counted: none, or one for each picture.
    Marks at the start only go, because there the template puts the pictures. Raises BadRow."""
    marks = example.asked.count(MARK)
    if marks not in (0, len(example.pictures)):
        said = f"has {marks} marks {MARK}, and there are {len(example.pictures)} pictures"
        raise BadRow(where, "question", said, "write one mark for each picture, or none")
    field = "wording" if example.wording else "question"
    rest = getattr(example, field).strip()
    while rest.startswith(MARK):
        rest = rest.removeprefix(MARK).lstrip()
    if not marks or not rest:
        return example
    first = replace(example, **{field: rest})
    return example if MARK in first.asked else first


@dataclass(frozen=True)
class Layout:
    """The files of a source.

    shard: the reader of one file.  example: the adapter of one row.  files: patterns for a folder or an id of
    the hub, by split ("all", "train"; "heldout" only if the source has its own file for it).  columns,
    optional: the light columns.  pictures: alternatives of picture columns.  uid: the columns that the file
    names its rows by.  aside: one row in `aside` is held out, chosen by its pictures.  single: only rows with
    one picture.  first: the first `first` rows are for training, the others are held out.  rows: the
    published number of rows of "all".  also: further files of a hub dataset, which its rows name.  beside:
    `data` may end in ",FOLDER", the pictures' folder.
    """

    shard: Callable[..., Any]
    example: Callable[[Row], Example]
    files: Mapping[str, tuple[str, ...]]
    columns: tuple[str, ...]
    optional: tuple[str, ...] = ()
    pictures: tuple[tuple[str, ...], ...] = ()
    uid: tuple[str, ...] = ()
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
    fields["uid"] = tuple(fields.get("uid", "").split())
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
            return placed(self.layout.example(found), where)
        except BadRow:
            raise
        except BadExample as error:
            # an error of `Example` names no file
            raise BadRow(where, "", str(error)) from error

    def refuse_repeated_uids(self) -> None:
        """Answers are paired and random numbers are drawn by uid. Raises BadSource naming uid, file, rows."""
        if not self.layout.uid:
            return
        named = [list(shard.uids(self.layout.uid)) for shard in self.shards]
        first: dict[str, int] = {}
        repeated: list[tuple[int, int]] = []
        for index, (number, row) in enumerate(self.places.tolist()):
            uid = named[number][row] or f"{self.names[number]}/{row}"
            if (before := first.setdefault(uid, index)) != index:
                repeated.append((before, index))
        if repeated:
            before, index = repeated[0]
            number, row = self.places[index].tolist()
            said = f"uid: {short(named[number][row])} is also that of {self.where(before)}"
            more = f", and {len(repeated) - 1} more rows repeat one" if len(repeated) > 1 else ""
            raise BadSource(f"{self.where(index)}: {said}{more}; give each row its own uid")

    def where(self, index: int) -> str:
        """The file and the number of a row, for messages."""
        number, row = (int(x) for x in self.places[index])
        return self.shards[number].where(row)


def open_rows(
    layout: Layout,
    data: str | Path,
    split: str,
    limit: int | None,
    seed: int,
    *,
    columns: Mapping[str, str] | None = None,
    heldout: float | None = None,
) -> Rows:
    """The first `limit` rows of a split. columns: {our name of a column: the file's}. heldout: the share of
    the rows to hold out, instead of the layout's. Raises BadSource, HubError."""
    beside = None
    if layout.beside and "," in str(data):
        data, _, folder = str(data).rpartition(",")
        beside = Path(folder)
        if not beside.is_dir():
            raise BadSource(f"{folder}: no such folder; it should hold the pictures")
    if heldout is not None and not 0 <= heldout < 1:
        raise BadSource(f"heldout: must be a share, at least 0 and below 1, got {heldout}")
    if heldout is not None and split == "all":
        raise BadSource("heldout: the split all holds nothing out; leave the setting out")
    files, cut = _files(layout, data, split)
    if heldout is not None and (layout.first is not None or not cut):
        why = "this source has its own rows for that" if cut else f"{data} has its own files for that"
        raise BadSource(f"heldout: {why}; leave the setting out")
    names = _checked_columns(layout, columns or {})
    shards = [layout.shard(file, layout.columns, layout.optional, layout.pictures, names) for file in files]
    places = _of_split(layout, shards, split if cut else "all", heldout)
    chosen = np.array(list(islice(places, limit)), np.int64).reshape(-1, 2)
    return Rows(layout, shards, _names(files), chosen, seed, beside)


def _checked_columns(layout: Layout, columns: Mapping[str, str]) -> Mapping[str, str]:
    """The setting `columns`. Raises BadSource for a name that the source does not read, and for a column that
    is named twice."""
    pictures = [name for names in layout.pictures for name in names]
    known = dict.fromkeys([*layout.columns, *layout.optional, *pictures])
    for ours, theirs in columns.items():
        if ours not in known:
            turned = f"; write {{{theirs}: {ours}}}, our name first" if theirs in known else ""
            raise BadSource(f"columns: no field {short(ours)}{turned}; there are {', '.join(known)}")
        if twice := [other for other in columns if columns[other] == theirs and other != ours]:
            raise BadSource(
                f"columns: {short(theirs)} is named for {ours} and {twice[0]}; keep one of the two"
            )
    return columns


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


def _of_split(
    layout: Layout, shards: list[Any], split: str, heldout: float | None
) -> Iterator[tuple[int, int]]:
    """The places (shard, row) of a split, in the order of the files. Reads pictures only if it must."""
    before = 0
    share = 1 / layout.aside if heldout is None else heldout
    # nothing to hold out: no row need be read
    by_picture = split != "all" and layout.first is None and share > 0
    few = _few(layout, shards, share) if by_picture else None
    for number, shard in enumerate(shards):
        counts = shard.counts() if layout.single else repeat(1)
        keys = shard.keys() if by_picture else None
        desc = f"{shard.path.name}: which rows are {split}"
        shown = None if keys else True
        for row in tqdm(range(len(shard)), desc, unit="row", disable=shown, leave=False, delay=3):
            if keys:
                key = next(keys)
                held = _place(key) >= 1 - share if few is None else key in few
            else:
                held = layout.first is not None and before + row >= layout.first
            if next(counts) == 1 and (split == "all" or held == (split == "heldout")):
                yield number, row
        before += len(shard)


def _few(layout: Layout, shards: list[Any], share: float) -> set[bytes] | None:
    """Of a set with at most FEW different pictures, in which the share may hold out none or all: those to
    hold out, so that at least LEAST rows are, and no more than half. None: the share decides."""
    keys = Counter[bytes]()
    for shard in shards:
        counts = shard.counts() if layout.single else repeat(1)
        for key, count in zip(shard.keys(), counts):
            keys[key] += count == 1
            if len(keys) > FEW:
                return None
    wanted = round(share * keys.total())
    least = max(LEAST, wanted)
    most = min(max(keys.total() // 2, wanted), keys.total() - 1)
    held: set[bytes] = set()
    rows = 0
    for key in sorted(keys, key=_place, reverse=True):
        if rows < least and rows + keys[key] <= most:
            held.add(key)
            rows += keys[key]
    return held


def _place(key: bytes) -> float:
    """The place of a picture's digest in [0, 1); the last ones are held out, so that a larger share holds out
    the same and more. Bits are read backwards: then a share of 1/16 is byte 0 modulo 16 equal to 15."""
    return int(f"{int.from_bytes(key[:4], 'little'):032b}"[::-1], 2) / 2**32
