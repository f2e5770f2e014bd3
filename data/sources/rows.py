"""From the rows of files to examples, one by one: what a source must say about its files (`Layout`), and the
sequence it gives (`Rows`).

Opening reads names and counts, never pictures, except where a file must be cut into a training and a held-out
part: that is done by the content of the pictures, so that no picture is on both sides, and needs one pass
over the file. A bad row raises BadRow when asked for: a run skips it, counts it and names it, `python -m
data.check` lists them all.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
from tqdm import tqdm

from data.sources import hub
from data.types import BadExample, BadRow, BadSource, Example, Picture


@dataclass(frozen=True)
class Row:
    """One row as an adapter gets it.

    `uid` is for sources that have none of their own, `seed` for what is drawn, as an order of choices.
    `folder` is the file's own, `beside` the one that pictures were said to be in.
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
            raise self.bad(
                name,
                f"holds {type(value).__name__}, not text",
                "write text in quotes" if value is not None else "fill it",
            )
        return self._encodable(name, value)

    def texts(self, name: str, missing: tuple[str, ...] | None = None) -> tuple[str, ...]:
        """The list of texts in a field. Raises BadRow."""
        value = self.values.get(name)
        if value is None and missing is not None:
            return missing
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            held = (
                type(value).__name__
                if not isinstance(value, list)
                else "a list of " + ", ".join(sorted({type(x).__name__ for x in value}))
            )
            raise self.bad(name, f"holds {held}, not a list of texts", 'write ["…", "…"]')
        return tuple(self._encodable(name, item) for item in value)

    def _encodable(self, name: str, value: str) -> str:
        r"""JSON may hold half a character (`\ud800`), which no tokenizer takes."""
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise self.bad(
                name, f"holds half a character, {value[error.start]!r}", "write the whole one"
            ) from error
        return value


@dataclass(frozen=True)
class Layout:
    """How the files of a source look.

    shard: what reads one file.  example: one row's adapter.  files: for a folder or an id of the hub,
    alternatives of file patterns by split ("all" and "train"; "heldout" only where the source has a file of
    its own for it).  columns, optional: of the light values.  pictures: alternatives of picture columns.
    aside: one row in so many is held out, by its pictures.  single: only rows with one picture.  first: the
    first so many rows are for training, the later ones held out.  rows: how many "all" has as published.
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
    # files of a dataset of the hub that its rows name
    also: tuple[str, ...] = ()
    # data may end in ",FOLDER": where the pictures are, if not beside the file
    beside: bool = False


class Rows(Sequence):
    """Examples that are made when asked for. `examples[i]` raises BadExample (BadRow, BadPicture) naming
    file and row; a slice is lazy too."""

    def __init__(
        self, layout: Layout, shards: list[Any], index: np.ndarray, seed: int, beside: Path | None = None
    ) -> None:
        # index (n, 2): shard, row
        self.layout, self.shards, self.index, self.seed, self.beside = (layout, shards, index, seed, beside)

    def __len__(self) -> int:
        return len(self.index)

    @overload
    def __getitem__(self, place: int) -> Example: ...
    @overload
    def __getitem__(self, place: slice) -> Rows: ...
    def __getitem__(self, place):
        if isinstance(place, slice):
            part = copy.copy(self)
            part.index = self.index[place]
            return part
        number, row = (int(x) for x in self.index[place])
        shard = self.shards[number]
        where = shard.where(row)
        values = shard.row(row)
        try:
            return self.layout.example(
                Row(
                    values,
                    where,
                    uid=f"{shard.path.stem}/{row}",
                    folder=shard.path.parent,
                    pictures=shard.shown(values, where),
                    seed=self.seed,
                    beside=self.beside,
                )
            )
        except BadRow:
            raise
        except BadExample as error:
            # what Example itself finds wrong knows no file
            raise BadRow(where, "", str(error)) from error

    def where(self, place: int) -> str:
        """The file and the number of a row, for messages."""
        number, row = (int(x) for x in self.index[place])
        return self.shards[number].where(row)


def open_rows(layout: Layout, data: str | Path, split: str, limit: int | None, seed: int) -> Rows:
    """The first `limit` rows of a split. Raises BadSource, HubError."""
    beside = None
    if layout.beside and "," in str(data):
        captions, _, folder = str(data).rpartition(",")
        data, beside = captions, Path(folder)
        if not beside.is_dir():
            raise BadSource(f"{folder}: no such folder; it is where the pictures are looked for")
    files, cut = _files(layout, data, split)
    shards = [layout.shard(file, layout.columns, layout.optional, layout.pictures) for file in files]
    chosen: list[tuple[int, int]] = []
    for place in _of_split(layout, shards, split if cut else "all"):
        if limit is not None and len(chosen) >= limit:
            break
        chosen.append(place)
    return Rows(layout, shards, np.array(chosen, np.int64).reshape(-1, 2), seed, beside)


def _files(layout: Layout, data: str | Path, split: str) -> tuple[list[Path], bool]:
    """The files of a split, and whether they must be cut: they need not be where a folder has a file of
    its own for each part."""
    named = hub.parts_of(data)
    whole = Path(data).is_dir() or (named is not None and not named[2] and not Path(data).exists())
    if split != "all" and whole and "heldout" in layout.files:
        try:
            own = {
                part: hub.resolve(data, layout.files[part], also=layout.also) for part in ("train", "heldout")
            }
            # "*.jsonl" is any file, that one too
            own["train"] = [file for file in own["train"] if file not in own["heldout"]]
            if not own["train"]:
                raise BadSource(f"{data}: there is {own['heldout'][0].name}, and no file to train on")
            return own[split], False
        except hub.NoMatch:
            pass
    return hub.resolve(
        data, layout.files["all" if split == "all" else "train"], also=layout.also
    ), split != "all"


def _of_split(layout: Layout, shards: list[Any], split: str) -> Iterator[tuple[int, int]]:
    """The places (shard, row) of a split, in the order of the files; of their pictures no more is read
    than that needs."""
    before = 0
    for number, shard in enumerate(shards):
        counts = shard.counts() if layout.single else None
        keys = shard.keys() if split != "all" and layout.first is None else None
        bar = tqdm(
            range(len(shard)),
            desc=f"{shard.path.name}: which rows are {split}",
            unit="row",
            disable=None if keys else True,
            leave=False,
            delay=3,
        )
        for row in bar:
            held = (
                next(keys)[0] % layout.aside == layout.aside - 1
                if keys
                else layout.first is not None and before + row >= layout.first
            )
            single = counts is None or next(counts) == 1
            if single and (split == "all" or held == (split == "heldout")):
                yield number, row
        before += len(shard)
