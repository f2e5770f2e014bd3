"""The table of sources: one function each, `(path, split, limit, seed) -> Sequence[Example]`.

limit: keep the first `limit` examples; None: all.  seed: for the built-in world's examples and the order of
SAT's options; the held-out rows do not depend on it, so runs can be compared. Files are read on demand:
`examples[i]` reads a row, and raises BadExample for a bad one. `docs/data.md` describes each source.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from tqdm import tqdm

from data.shapes import looking
from data.sources import benchmarks, own, training, vlmeval
from data.sources.kinds import Kinds
from data.sources.rows import LEAST, Layout, Rows, open_rows
from data.types import BadExample, BadSource, Example, TaskHook, short


def open_source(
    name: str,
    path: str | Path | None,
    *,
    limit: int | None,
    seed: int,
    items: int,
    columns: Mapping[str, str] | None = None,
    heldout: float | None = None,
) -> tuple[Sequence[Example], dict[str, list[Example]]]:
    """A task's training examples (at most `limit`) and its held-out sets by name (`items` of each; unusable
    ones are named). columns, heldout: see `open_split`. Raises BadSource."""
    open_part = partial(open_split, name, path, columns=columns, heldout=heldout)
    examples = open_part("train", limit, seed)
    if not len(examples):
        raise BadSource(f"the task {name!r} gives no training example (data: {path}, limit: {limit})")
    sets = {split: usable(open_part(split, items, 0)) for split in ("heldout", *hook_of(name).sets)}
    if len(sets["heldout"]) < min(LEAST, items) and heldout != 0:
        said = "give more pictures, a larger heldout, or a file of your own for what is held out"
        tqdm.write(f"held out: only {len(sets['heldout'])} questions, so a score says little; {said}")
    return examples, sets


def open_split(
    name: str,
    path: str | Path | None,
    split: str,
    limit: int | None,
    seed: int,
    *,
    columns: Mapping[str, str] | None = None,
    heldout: float | None = None,
) -> Sequence[Example]:
    """The first `limit` examples of one split of a task. columns: {our name of a column: the file's}.
    heldout: the share of the rows that is held out. Both are for tasks that read files. Raises BadSource."""
    if name not in SOURCES:
        near = difflib.get_close_matches(name, SOURCES, n=1)
        meant = f"; did you mean {near[0]!r}?" if near else ";"
        raise BadSource(f"no task {name!r}{meant} there are {', '.join(SOURCES)}")
    options: dict[str, Any] = {"columns": columns} if columns else {}
    if heldout is not None:
        options["heldout"] = heldout
    if options and name not in LAYOUTS:
        raise BadSource(f"{' and '.join(options)}: for tasks that read files, and {name!r} reads none")
    return SOURCES[name](path, split, limit, seed, **options)


def columns_of(text: str) -> dict[str, str]:
    """The columns of a command line, as train.py writes them: "{question: problem}". Raises ValueError."""
    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError:
        found = None
    if not isinstance(found, dict) or not all(isinstance(x, str) for pair in found.items() for x in pair):
        raise ValueError(f"columns: write {{our name: the file's}}, not {short(text)}")
    return found


def usable(examples: Sequence[Example]) -> list[Example]:
    """The examples that can be made, all in memory. The others are named on the terminal, by kind."""
    found = []
    kinds = Kinds()
    for index in range(len(examples)):
        try:
            found.append(examples[index])
        except BadExample as error:
            if kinds.is_shown(str(error)):
                tqdm.write(f"left out of the held-out questions: {error}", file=sys.stderr)
    for line in kinds.others():
        tqdm.write(f"left out of the held-out questions: {line}", file=sys.stderr)
    return found


def shapes(path: str | Path | None, split: str, limit: int | None, seed: int) -> Sequence[Example]:
    """Questions about the built-in world: splits train, heldout and pairs (pairs of colour and shape that
    are not in train). path: options of the world, such as noise=90,kinds=Count+Depth (docs/data.md)."""
    from data.shapes.world import Shapes, World

    _check("shapes", path, split)
    options = options_of("shapes", path, WORLD_OPTIONS)
    try:
        world = World(**options)
    except ValueError as error:
        raise BadSource(f"data={path}: {error}") from None
    return Shapes(split, seed=seed, world=world, **({} if limit is None else {"count": limit}))


def documents(path: str | Path | None, split: str, limit: int | None, seed: int) -> Sequence[Example]:
    """The built-in base model's documents, for imitation; held-out sets as in `shapes`. path: options of the
    reading list, such as branch=1,looks=0.02 (docs/data.md)."""
    from data.shapes.documents import Documents

    _check("documents", path, split)
    options = options_of("documents", path, DOCUMENT_OPTIONS)
    if split != "train":
        return shapes(None, split, limit, seed)
    if limit is not None:
        options["count"] = limit
    return Documents(seed=seed, **options)


def options_of(name: str, text: str | Path | None, kinds: Mapping[str, Callable]) -> dict[str, Any]:
    """ "noise=90,crowd=1" -> {"noise": 90.0, "crowd": True}. kinds: {option: its reader}.
    Raises BadSource."""
    found: dict[str, Any] = {}
    for part in str(text).split(",") if text else ():
        key, is_option, value = part.partition("=")
        if not is_option or key not in kinds:
            said = f"draws its pictures and reads no file; data may hold options: {', '.join(kinds)}"
            raise BadSource(f"the task {name!r} {said}. It has no {part!r}")
        try:
            found[key] = kinds[key](value)
        except ValueError as error:
            raise BadSource(f"data={text}: {key}: {error}") from None
    return found


def _switch(value: str) -> bool:
    if value not in ("0", "1"):
        raise ValueError(f"write 0 or 1, not {short(value)}")
    return value == "1"


def _share(value: str) -> float:
    if not 0 <= float(value) <= 1:
        raise ValueError(f"a share, from 0 to 1, not {short(value)}")
    return float(value)


def _kind(value: str) -> str:
    if value not in ("long", "short"):
        raise ValueError(f"write long or short, not {short(value)}")
    return value


WORLD_OPTIONS = {
    "noise": float,
    "side": int,
    "crowd": _switch,
    "kinds": lambda value: tuple(value.split("+")),
}
DOCUMENT_OPTIONS = {"branch": _switch, "looks": _share, "again": _share, "counts": _share, "only": _kind}


def rows(
    name: str, path: str | Path | None, split: str, limit: int | None, seed: int = 0, **options: Any
) -> Rows:
    """A source that reads a file, a folder, or an id of the hub (`owner/name`, `owner/name:file`). options:
    of `open_rows`. Raises BadSource, also where two rows have one uid."""
    _check(name, path, split)
    found = open_rows(LAYOUTS[name], path or "", split, limit, seed, **options)
    found.refuse_repeated_uids()
    return found


LAYOUTS: dict[str, Layout] = {
    "sat": training.SAT,
    "sat_paper": training.SAT_PAPER,
    "geometry3k": training.GEOMETRY3K,
    "geoqa": training.GEOQA,
    "clevr": training.CLEVR,
    "vision_r1": training.VISION_R1,
    "vision_r1_cold": own.VISION_R1_COLD,
    "vision_r1_cold_answers": own.VISION_R1_COLD_ANSWERS,
    "jsonl": own.JSONL,
    "blink": benchmarks.BLINK,
    "cvbench": benchmarks.CVBENCH,
    "vsr": benchmarks.VSR,
    **vlmeval.LAYOUTS,
}
SOURCES: dict[str, Callable[..., Sequence[Example]]] = {
    "shapes": shapes,
    "documents": documents,
    **{name: partial(rows, name) for name in LAYOUTS},
}
# what a task measures in a completion, and its further sets of questions
HOOKS: dict[str, TaskHook] = {"shapes": looking.HOOK, "documents": looking.HOOK}


def hook_of(task: str) -> TaskHook:
    """The hook of a task; one that adds nothing where the task has none."""
    return HOOKS.get(task, TaskHook())


SPLITS = {
    "shapes": ("train", "heldout", "pairs"),
    "documents": ("train", "heldout", "pairs"),
    **dict.fromkeys(LAYOUTS, ("train", "heldout", "all")),
}


def _check(name: str, path: str | Path | None, split: str) -> None:
    if split not in SPLITS[name]:
        raise BadSource(f"the task {name!r} has no split {split!r}; it has {', '.join(SPLITS[name])}")
    if name in LAYOUTS and path is None:
        said = "reads files: give data=FILE, data=FOLDER or data=OWNER/NAME, a dataset of the hub"
        raise BadSource(f"the task {name!r} {said}")
