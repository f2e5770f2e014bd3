"""Where examples come from: one function a source, `(path, split, limit, seed) -> Sequence[Example]`, in one table.

`limit` keeps the first so many examples, None as many as there are. `seed` is for sources that draw their examples; one that reads a file
ignores it. What is held out is the same whatever the run's seed, so that runs can be compared.
"""

from __future__ import annotations

import difflib
import hashlib
from pathlib import Path
from typing import Any, Callable, Iterator, Sequence

from data.types import LETTERS, Example, listed

BLINK_PICTURES = ("image_1", "image_2", "image_3", "image_4")
BLINK_COLUMNS = ("idx", "question", "sub_task", *BLINK_PICTURES, "choices", "answer", "prompt")


class BadSource(ValueError):
    """A source is unknown, or its file is missing, unreadable or not of its layout; the message names file, column and row."""


def open_source(name: str, path: str | Path | None, *, limit: int | None, seed: int,
                items: int) -> tuple[Sequence[Example], dict[str, list[Example]]]:
    """A task's training examples (at most `limit`) and its held-out sets by name (`items` of each). Raises BadSource, BadExample."""
    if name not in SOURCES:
        near = difflib.get_close_matches(name, SOURCES, n=1)
        raise BadSource(f"no task {name!r}{f'; did you mean {near[0]!r}?' if near else ''} There are {', '.join(SOURCES)}")
    examples = SOURCES[name](path, "train", limit, seed)
    if not len(examples):
        raise BadSource(f"the task {name!r} gives no training example (data: {path}, limit: {limit})")
    return examples, {split: list(SOURCES[name](path, split, items, 0)) for split in HELDOUT[name]}


def shapes(path: str | Path | None, split: str, limit: int | None, seed: int) -> Sequence[Example]:
    """Questions about the built-in world (`data/shapes.py`): splits train, heldout and pairs (of colours and shapes never trained on)."""
    from data.shapes import Shapes

    _check("shapes", path, split, file=False)
    return Shapes(split, seed=seed, **({} if limit is None else {"count": limit}))


def documents(path: str | Path | None, split: str, limit: int | None, seed: int) -> Sequence[Example]:
    """What the built-in base model has read (`data/documents.py`), to imitate; its held-out sets are those of `shapes`."""
    from data.documents import Documents

    _check("documents", path, split, file=False)
    if split != "train":
        return shapes(path, split, limit, seed)
    return Documents(seed=seed, **({} if limit is None else {"count": limit}))


def blink(path: str | Path | None, split: str, limit: int | None, seed: int = 0) -> list[Example]:
    """Any subtask of BLINK (Fu et al. 2024, arXiv 2404.12390): multiple-choice questions about one to four photographs.

    `path` is a parquet file laid out as the hub's BLINK-Benchmark/BLINK. Split "all" is every row. BLINK has no training questions: "train"
    and "heldout" halve the rows by a hash of their photographs, so that questions about the same ones are on the same side. Needs pyarrow.
    Raises BadSource, BadExample.
    """
    _check("blink", path, split, file=True)
    examples: list[Example] = []
    for number, row in _parquet_rows(Path(path), BLINK_COLUMNS):
        if limit is not None and len(examples) >= limit:
            break
        example = _blink_example(row, f"{path}, row {number}")
        if split in ("all", _side(example)):
            examples.append(example)
    return examples


SOURCES: dict[str, Callable[[Any, str, Any, int], Sequence[Example]]] = {"shapes": shapes, "documents": documents, "blink": blink}
SPLITS = {"shapes": ("train", "heldout", "pairs"), "documents": ("train", "heldout", "pairs"), "blink": ("train", "heldout", "all")}
HELDOUT = {"shapes": ("heldout", "pairs"), "documents": ("heldout", "pairs"), "blink": ("heldout",)}  # what a run watches


def _check(name: str, path: str | Path | None, split: str, *, file: bool) -> None:
    if split not in SPLITS[name]:
        raise BadSource(f"the task {name!r} has no split {split!r}; it has {', '.join(SPLITS[name])}")
    if file and path is None:
        raise BadSource(f"the task {name!r} reads a parquet file: give data=FILE")
    if not file and path is not None:
        raise BadSource(f"the task {name!r} draws its pictures and reads no file, but data is {path}; leave it out")


def _blink_example(row: dict[str, Any], where: str) -> Example:
    for column, kind in {"idx": str, "question": str, "sub_task": str, "prompt": str, "answer": str, "choices": list}.items():
        if not isinstance(row[column], kind):
            raise BadSource(f"{where}: column {column} holds {type(row[column]).__name__}, not {kind.__name__}")
    choices, answer = tuple(row["choices"]), row["answer"]
    letter = answer.strip("() ")
    if answer.strip() == "hidden":
        raise BadSource(f"{where}: the answer is hidden; BLINK's test split has none, use its val split")
    if len(letter) != 1 or letter not in LETTERS[:len(choices)]:
        raise BadSource(f"{where}: the answer {answer!r} is not the letter of one of {len(choices)} choices")
    pictures = []
    for column in BLINK_PICTURES:
        if row[column] is None:
            continue
        if not isinstance(row[column], dict) or not row[column].get("bytes"):
            raise BadSource(f"{where}: column {column} holds no picture bytes")
        pictures.append(row[column]["bytes"])
    if not pictures:
        raise BadSource(f"{where}: no picture in any of {', '.join(BLINK_PICTURES)}")
    # `prompt` is what BLINK asks; `question` is shorter in some subtasks. The list of choices at its end is `Example.asked`'s to add.
    ending = "\n" + listed(choices)
    question = row["prompt"].removesuffix(ending) if row["prompt"].endswith(ending) else row["question"]
    return Example(uid=row["idx"], question=question, choices=choices, answer=choices[LETTERS.index(letter)], task=row["sub_task"],
                   pictures=tuple(pictures))


def _side(example: Example) -> str:
    """Which half an example is in: by the content of its pictures alone, whatever the order or the number of rows."""
    digest = hashlib.sha256()
    for picture in example.pictures:
        digest.update(hashlib.sha256(picture).digest())
    return ("train", "heldout")[digest.digest()[0] & 1]


def _parquet_rows(path: Path, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number, row) of a parquet file, a few rows in memory at a time: a file of photographs may be larger than what is kept of it."""
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise BadSource(f"{path}: reading parquet needs pyarrow, an optional extra: pip install pyarrow") from error
    if not path.is_file():
        raise BadSource(f"{path}: no such file")
    try:
        with parquet.ParquetFile(path) as file:
            missing = [name for name in columns if name not in file.schema_arrow.names]
            if missing:
                raise BadSource(f"{path}: no column {', '.join(missing)}; it has {', '.join(file.schema_arrow.names)}")
            number = 0
            for batch in file.iter_batches(batch_size=16, columns=list(columns)):
                for row in batch.to_pylist():
                    yield number, row
                    number += 1
    except (pyarrow.ArrowException, OSError) as error:
        raise BadSource(f"{path}: cannot be read as parquet: {error}") from error
