"""What a source gives (`Example`) and what a model takes (`Prompt`).

An example that cannot be used raises a `BadExample` that names it, so a run can skip, count and print it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

# The bytes of a picture file, its path, or a function that draws it when it is needed.
Picture = bytes | Path | Callable[[], Image.Image]

# stands in a question where a picture belongs
MARK = "<image>"
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def short(value: object) -> str:
    """A value in a message: at most a line."""
    text = repr(value)
    return text if len(text) <= 90 else text[:80] + "…"


class BadExample(ValueError):
    """One example cannot be used. The message names its uid and the reason."""


class BadPicture(BadExample):
    """A picture cannot be used: corrupt, empty, too large, too narrow, or of more than 8 bits a channel."""


class BadRow(BadExample):
    """One row of a file is no example. where: its file and number. remedy: what to do ("" if nothing)."""

    def __init__(self, where: str, field: str, reason: str, remedy: str = "") -> None:
        # the name of a field comes from the file, too
        name = field if len(field) <= 90 and field.isprintable() else short(field)
        super().__init__(f"{where}: {f'{name}: ' if name else ''}{reason}{f'; {remedy}' if remedy else ''}")
        self.where, self.field, self.reason, self.remedy = where, field, reason, remedy


class MissingPicture(BadRow):
    """The file that a row names is not there. name: as in the row. link: where it can be fetched, or ""."""

    name: str = ""
    link: str = ""


class BadSource(ValueError):
    """A source is unknown, or its file is missing, unreadable or of another layout. Names file and column."""


class PromptTooLong(BadExample):
    """A prompt has more tokens than the limit. A cut would separate pictures from their placeholders."""


@dataclass(frozen=True)
class Example:
    """One question about zero or more pictures.

    `answer` is the text of the right choice, or free text if `choices` is empty. `extra` holds the source's
    own facts (a scene's geometry, a row's columns); no model sees it. `wording` replaces question and
    choices, for sources that word them in their own way. `may_repeat`: choices may be equal. Raises
    BadExample.
    """

    uid: str
    question: str
    choices: tuple[str, ...]
    answer: str
    task: str = ""
    pictures: tuple[Picture, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)
    wording: str = ""
    may_repeat: bool = False

    def __post_init__(self) -> None:
        bad = lambda reason: BadExample(f"example {short(self.uid)}: {reason}")
        if not self.uid:
            raise BadExample(f"an example has no uid: {short(self.question)}")
        if not self.question.strip():
            raise bad("the question is empty")
        if isinstance(self.choices, str) or isinstance(self.pictures, (str, bytes)):
            raise bad("choices and pictures are tuples, got a single one")
        if len(self.choices) == 1 or len(self.choices) > len(LETTERS):
            raise bad(f"{len(self.choices)} choices; give 2 to {len(LETTERS)}, or none for a free answer")
        if len(set(self.choices)) < len(self.choices) and not self.may_repeat:
            raise bad(f"two choices are the same: {short(list(self.choices))}")
        if not all(choice.strip() for choice in self.choices):
            raise bad(f"a choice is empty: {short(list(self.choices))}")
        if self.choices and self.answer not in self.choices:
            raise bad(f"the answer {short(self.answer)} is not among the choices {short(list(self.choices))}")
        if not self.answer.strip():
            raise bad("the answer is empty")

    @property
    def letter(self) -> str | None:
        """The letter of the right choice, "A" for the first; None for a free answer."""
        return LETTERS[self.choices.index(self.answer)] if self.choices else None

    @property
    def asked(self) -> str:
        """What the model reads: question and choices, worded as CV-Bench and BLINK do; or `wording`."""
        if self.wording or not self.choices:
            return self.wording or self.question
        return f"{self.question}\n{listed(self.choices)}"


def listed(choices: tuple[str, ...]) -> str:
    """`Select from the following choices.` and one line `(A) …` for each choice."""
    return "Select from the following choices." + "".join(map("\n({}) {}".format, LETTERS, choices))


# (a completion's text, its example) -> {name: True, False, or None where it does not apply}
Measure = Callable[[str, Example], Mapping[str, bool | None]]


def measure_nothing(text: str, example: Example) -> dict[str, bool | None]:
    """The measurements of a task that has none of its own."""
    return {}


@dataclass(frozen=True)
class TaskHook:
    """What a task adds to metrics, evaluation and report. `data/sources/table.py` lists the hooks by task.

    measure: see Measure; each name becomes a metric, the share of True. columns: {name: heading} of the
    measurements shown in tables. charts: (title, note, {name: label}) for the report. sets: {split: label}
    of further sets of questions, evaluated before and after training.
    """

    measure: Measure = measure_nothing
    columns: Mapping[str, str] = field(default_factory=dict)
    charts: tuple[tuple[str, str, Mapping[str, str]], ...] = ()
    sets: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Prompt:
    """One example as a model reads it: S tokens, and the N patches of its I pictures.

    text: for people, with one placeholder for each picture.  tokens: (S,) int64, the truth, with one
    placeholder for each merged patch.  patches: (N, 3 * temporal * patch * patch) float32.  grid: (I, 3)
    int64, patches along time, height and width of each picture.
    """

    uid: str
    text: str
    tokens: np.ndarray
    patches: np.ndarray
    grid: np.ndarray
